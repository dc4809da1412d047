"""The generated files in the root, importable as the package `molmo2_remote`, the way a loader sees them."""

import importlib.util
import sys
from types import ModuleType

from support.paths import REPOSITORY

PACKAGE = "molmo2_remote"


def _register() -> None:
    """The files import each other relatively, so they need a package; an empty one over the root will do."""
    spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(REPOSITORY)]
    sys.modules[PACKAGE] = package


def generated(name: str) -> ModuleType:
    """A generated file as a module: `generated("modeling_molmo2")`."""
    if PACKAGE not in sys.modules:
        _register()
    return importlib.import_module(f"{PACKAGE}.{name}")
