"""The Python blocks of the README and of the pages in docs run as they are written, in a folder with their files.

On a page, `print(...)  # text` prints that text; the comment may stand on the next line.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "examples"))


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


BLOCKS = python_blocks(REPOSITORY / "README.md")
ELSEWHERE = ("fiftyone", "training")  # test_fiftyone.py, beside a database, and test_trainers.py run these
PAGES = [
    page for page in sorted((REPOSITORY / "docs").glob("*.md")) if python_blocks(page) and page.stem not in ELSEWHERE
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from random_miniature import write_json, write_miniature

    folder = tmp_path_factory.mktemp("readme")
    write_miniature(folder / "Molmo2-4B")
    # Answers of random weights end anywhere or never; the blocks ask for hundreds of tokens.
    settings = json.loads((folder / "Molmo2-4B" / "generation_config.json").read_text(encoding="utf-8"))
    write_json(folder / "Molmo2-4B" / "generation_config.json", {**settings, "max_time": 1.0})
    data = REPOSITORY / "examples" / "data"
    for name, source in (
        ("boats.jpg", "nasa_frame.jpg"),
        ("harbour.jpg", "nasa_frame.jpg"),
        ("penguins.mp4", "nasa_clip.mp4"),
    ):
        shutil.copy(data / source, folder / name)
    return folder


def test_the_blocks_run_as_written(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) == 9
    assert capsys.readouterr().out.count("\n") >= 7  # seven answers
    assert names["plan"].num_tokens <= 1000
    assert len(names["answers"]) == 2
    assert all(isinstance(answer, str) for answer in names["answers"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_as_written(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        for line in re.findall(r"^print\(.*\)(?:  |\n)# (.*)$", block, re.M):
            assert line in printed


def test_the_demo_runs(monkeypatch, capsys, tmp_path):
    import demo

    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "miniature")])
    demo.main()
    printed = capsys.readouterr().out
    for line in printed.splitlines():
        if line.startswith(("  tokens:", "  image:", "  video:")):
            assert line in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert printed.count("  answer: ") == 2
    assert printed.count("  tokens: ") == 2
