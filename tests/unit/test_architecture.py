"""The tree in ARCHITECTURE.md lists the modules that exist, and no others."""

import re
from pathlib import Path

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
