"""Makes the flat repository root importable as the package `molmo2_remote`, the way the Hub loader sees it."""

import importlib.util
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


def _register_root_package() -> None:
    """The root modules import each other relatively, so they need a package; an empty one over the root will do."""
    spec = importlib.util.spec_from_loader("molmo2_remote", loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(REPOSITORY)]
    sys.modules["molmo2_remote"] = package


def _load_hypothesis_profile() -> None:
    """The same examples in every run, without a limit of time; `--hypothesis-profile=search` draws others."""
    if importlib.util.find_spec("hypothesis") is None:  # the environments of the app and of training do without it
        return
    from hypothesis import settings

    settings.register_profile("search", deadline=None)
    settings.register_profile("steady", deadline=None, derandomize=True)
    settings.load_profile("steady")


_register_root_package()
_load_hypothesis_profile()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; tests that ask for it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the reference data beside the checkout is not there")
    return SHARED
