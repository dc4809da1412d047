"""The tree in ARCHITECTURE.md lists the modules that exist, and no others; what uses the package names what it has."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def modules_in_tree(text):
    """Paths of the modules that the first code block names; folders end with `/`, indentation says what is in them."""
    block = re.search(r"^```\n(.*?)^```", text, re.M | re.S).group(1)
    folders, modules = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folder = re.match(r" *([\w/]+)/( |$)", line)
        if folder:
            folders[depth:] = [folder.group(1)]
        else:
            modules += ["/".join([*folders[:depth], name]) for name in re.findall(r"[\w/]+\.py\b", line)]
    return modules


def test_the_tree_names_every_module_once():
    named = modules_in_tree((REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    found = [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "src" / "molmo2").rglob("*.py")]
    assert len(named) == len(set(named))
    assert sorted(set(found) - set(named)) == [], "modules that ARCHITECTURE.md does not name"
    assert sorted(set(named) - set(found)) == [], "modules that do not exist"


def test_it_fits_on_two_screens():
    assert len((REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= 110


def imported_names(path):
    """The names that a file takes from modules of the package, inside of functions too: (module, name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "molmo2":
            yield from ((node.module, alias.name) for alias in node.names)


def has(module, name):
    """Whether a module of the package has a name, or a module of that name in it."""
    found = importlib.import_module(module)
    return hasattr(found, name) or (
        hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None
    )


@pytest.mark.parametrize("folder", ["app", "benchmarks", "examples", "integrations", "scripts"])
def test_names_that_other_folders_import_exist(folder):
    """Much of it runs by hand alone, and what it imports in functions, only then."""
    plugins = ("molmo2.vllm", "molmo2.lmms_eval", "molmo2.vlmevalkit")  # which need packages of their own
    names = {
        (path.name, *each)
        for path in (REPOSITORY / folder).rglob("*.py")
        for each in imported_names(path)
        if not each[0].startswith(plugins)
    }
    assert names
    assert sorted(each for each in names if not has(*each[1:])) == []
