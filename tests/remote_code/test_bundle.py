"""The generator of the remote code: it only concatenates, and refuses what cannot be concatenated."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY


def _load_bundle():
    specification = importlib.util.spec_from_file_location("bundle", REPOSITORY / "scripts" / "bundle.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["bundle"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


bundle = _load_bundle()
SECTION = re.compile(r"# --- src/(\S+) -+\n")
TWO_FILES = {
    "one_molmo2": bundle.Bundle("molmo2.one.main", "One", ("molmo2.one",)),
    "two_molmo2": bundle.Bundle("molmo2.two.main", "Two", ("molmo2.two",)),
}
PACKAGE = {  # a package that can be bundled; tests damage it
    "one/main.py": '"""Entry of one."""\n\nfrom molmo2.one.helper import help_one\n\n__all__ = ["One"]\n\n\n'
    "class One:\n    help = help_one\n",
    "one/helper.py": '"""Helps one.\n\nAt length.\n"""\n\nimport math\n\n\ndef help_one():\n    return math.pi\n',
    "two/main.py": '"""Entry of two."""\n\nfrom molmo2.one.main import One\n\n__all__ = ["Two"]\n\n\n'
    "class Two(One):\n    pass\n",
}


# --- the files in the root -------------------------------------------------------------------------------------------


def test_the_files_are_up_to_date():
    command = [sys.executable, "scripts/bundle.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def statements_left_out(tree: ast.Module) -> list[ast.stmt]:
    """What a section may lack of its source: docstring, imports, `__all__` and the logger."""
    left_out = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    left_out += [node for node in tree.body if ast.unparse(node).startswith(("__all__ = ", "logger = "))]
    return left_out + (tree.body[:1] if ast.get_docstring(tree) else [])


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return bundle.Bundler().texts()


@pytest.mark.parametrize("name", bundle.BUNDLES)
def test_every_section_is_its_source_line_by_line(generated, name):
    _, *parts = SECTION.split(generated[name])
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(sections) == len(parts) // 2 > 0
    for path, section in sections.items():
        source = (REPOSITORY / "src" / path).read_text(encoding="utf-8")
        tree = ast.parse(source)
        gone = {n for node in statements_left_out(tree) for n in range(node.lineno, node.end_lineno + 1)}
        expected = [line for number, line in enumerate(source.splitlines(), 1) if number not in gone and line]
        found = [line for line in section.splitlines() if line]
        summary = (ast.get_docstring(tree) or "").partition("\n")[0]
        if found[0] == f"# {summary}":
            del found[0]
        if path == list(sections)[-1]:  # `__all__` of the entry ends the file
            assert ast.get_source_segment(source, tree.body[0]) in generated[name]
            exports = [node for node in tree.body if ast.unparse(node).startswith("__all__ = ")]
            expected += [line for node in exports for line in ast.get_source_segment(source, node).splitlines()]
        assert found == expected, path


# --- made-up packages ------------------------------------------------------------------------------------------------


def texts(folder: Path, **changes: str) -> dict[str, str]:
    """The files made of `PACKAGE`; changes are named like `one__helper`."""
    files = PACKAGE | {f"{name.replace('__', '/')}.py": text for name, text in changes.items()}
    for name, text in files.items():
        path = folder / "molmo2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return bundle.Bundler(folder, TWO_FILES).texts()


def test_a_whole_file(tmp_path):
    assert texts(tmp_path)["one_molmo2"] == (
        f"{bundle.HEADER}\n"
        '"""Entry of one."""\n\n'
        "import math\n\n"
        f"{'# --- src/molmo2/one/helper.py '.ljust(119, '-')}\n"
        "# Helps one.\n\n\n"
        "def help_one():\n    return math.pi\n\n\n"
        f"{'# --- src/molmo2/one/main.py '.ljust(119, '-')}\n\n\n"
        "class One:\n    help = help_one\n\n\n"
        '__all__ = ["One"]\n'
    )
    for part in ("Licensed under the Apache License", "Generated from src/molmo2", "do not edit"):
        assert part in bundle.HEADER


def test_a_file_imports_from_another_one(tmp_path):
    assert "\nfrom .one_molmo2 import One\n" in texts(tmp_path)["two_molmo2"]


def test_a_file_imports_all_that_it_needs_itself(tmp_path):
    """Some loaders copy direct imports only: three files in a row, of which the last one uses the second alone."""
    three = {**TWO_FILES, "three_molmo2": bundle.Bundle("molmo2.three.main", "Three", ("molmo2.three",))}
    texts(tmp_path, three__main="from molmo2.two.main import Two\n\n\nclass Three(Two):\n    pass\n")
    text = bundle.Bundler(tmp_path, three).texts()["three_molmo2"]
    assert "\nfrom .one_molmo2 import One  # noqa: F401\nfrom .two_molmo2 import Two\n" in text


def test_one_logger_for_all_modules_of_a_file(tmp_path):
    logger = f"from transformers.utils import logging\n\n{bundle.LOGGER}\n"
    helper, main = (
        f"{logger}{PACKAGE[name].split('import math', 1)[-1]}" for name in ("one/helper.py", "one/main.py")
    )
    main = main.replace('"""Entry of one."""\n', "")
    text = texts(tmp_path, one__helper=helper.replace("math.pi", "logger"), one__main=main)["one_molmo2"]
    assert text.count(bundle.LOGGER) == 1
    assert text.index(bundle.LOGGER) < text.index("# --- ")


def test_what_is_not_imported_does_not_travel(tmp_path):
    assert "unused" not in "".join(texts(tmp_path, one__unused="def unused():\n    pass\n").values())


HELPER, MAIN, TWO = PACKAGE["one/helper.py"], PACKAGE["one/main.py"], PACKAGE["two/main.py"]
REFUSED = {
    "a name defined twice": (
        {"one__helper": f"{HELPER}\n\nclass One:\n    pass\n"},
        "one_molmo2: `One` is defined by molmo2.one.helper and is defined by molmo2.one.main. Rename one.",
    ),
    "a name defined in a branch": (
        {"one__helper": f"{HELPER}\n\ntry:\n    import av as One\nexcept ImportError:\n    One = None\n"},
        "`One` is defined by molmo2.one.helper and is defined by molmo2.one.main",
    ),
    "a name imported and defined": (
        {"one__helper": HELPER.replace("import math", "import math\nfrom math import pi as One")},
        "`One` is set by `from math import pi as One` and is defined by molmo2.one.main",
    ),
    "a name imported from two places": (
        {
            "one__helper": f"import re as shared\n{HELPER}",
            "one__main": MAIN.replace("\nfrom", "\nimport os as shared\nfrom", 1),
        },
        "`shared` is set by `import re as shared` and is set by `import os as shared`",
    ),
    "a name of Python": (
        {"one__helper": f"{HELPER}\n\ndef open():\n    pass\n"},
        "`open` is part of Python and is defined by molmo2.one.helper",
    ),
    "a relative import": (
        {"one__main": MAIN.replace("molmo2.one.helper", ".helper")},
        "molmo2.one.main, line 3: `from .helper import help_one`. What travels imports this package at the top",
    ),
    "an import inside a function": (
        {"one__helper": HELPER.replace("    return", "    from molmo2.two.main import Two\n    return")},
        "molmo2.one.helper, line 10: `from molmo2.two.main import Two`",
    ),
    "an import for type checkers": (
        {"one__helper": f"{HELPER}\n\nif True:\n    from molmo2.two.main import Two\n"},
        "`from molmo2.two.main import Two`",
    ),
    "the package itself": ({"one__helper": f"import molmo2.two.main\n{HELPER}"}, "`import molmo2.two.main`"),
    "every name": ({"one__helper": f"from math import *\n{HELPER}"}, "`from math import *`"),
    "the future": (
        {"one__helper": f"from __future__ import annotations\n{HELPER}"},
        "`from __future__ import annotations`",
    ),
    "a circle of modules": (
        {"one__helper": f"from molmo2.one.main import One\n{HELPER}"},
        "Imports form a circle: molmo2.one.helper -> molmo2.one.main -> molmo2.one.helper.",
    ),
    "a circle of files": (
        {"one__helper": f"from molmo2.two.other import other\n{HELPER}", "two__other": "def other():\n    pass\n"},
        "Imports form a circle: one_molmo2 -> two_molmo2 -> one_molmo2.",
    ),
    "a renamed own import": (
        {"one__main": MAIN.replace("import help_one", "import help_one as helper").replace("= help_one", "= helper")},
        "molmo2.one.main imports help_one from its own file under another name.",
    ),
    "a module that no file takes": (
        {"two__main": TWO.replace("molmo2.one.main", "molmo2.tools"), "tools": "class One:\n    pass\n"},
        "molmo2.tools is imported by code that travels, but no file takes it in.",
    ),
    "a package instead of a module": (
        {"one__main": MAIN.replace("molmo2.one.helper import help_one", "molmo2.one import helper")},
        "molmo2.one is not a module.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(bundle.BundleError, match=re.escape(message)):
        texts(tmp_path, **changes)


def test_a_stale_file_is_named(tmp_path, monkeypatch, capsys):
    """`--check` writes nothing; without it, only what is stale is written."""
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    monkeypatch.setattr(
        bundle, "Bundler", lambda: type("Made", (), {"texts": lambda self: {"a": "1\n", "b": "2\n"}})()
    )
    (tmp_path / "a.py").write_text("1\n")
    monkeypatch.setattr(sys, "argv", ["bundle.py", "--check"])
    assert bundle.main() == 1
    assert capsys.readouterr().err == "Not up to date: b.py. Run `make bundle`.\n"
    assert not (tmp_path / "b.py").exists()
    monkeypatch.setattr(sys, "argv", ["bundle.py"])
    assert bundle.main() == 0
    assert capsys.readouterr().out == "2 files, 2 lines; written: b.py\n"
    assert (tmp_path / "b.py").read_text() == "2\n"
