"""The Python blocks of the README and of the pages in docs run as they are written, in a folder with their files.

On a page, `print(...)  # text` prints that text; the comment may stand on the next line.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
for place in (REPOSITORY, REPOSITORY / "examples"):
    sys.path.insert(0, str(place))

from miniature import bundle, native  # noqa: E402
from support import fresh_process  # noqa: E402
from support.random_miniature import write_json, write_miniature  # noqa: E402


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = python_blocks(REPOSITORY / "README.md")
# test_transformers_serve.py, test_fiftyone.py, beside a database, test_quantization.py, test_tools.py and
# test_trainers.py run these.
ELSEWHERE = ("batch", "client", "fiftyone", "quantization", "serving", "tools", "training")
PAGES = [
    page for page in sorted((REPOSITORY / "docs").glob("*.md")) if python_blocks(page) and page.stem not in ELSEWHERE
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    write_miniature(folder / "Molmo2-4B")
    # Answers of random weights end anywhere or never, and most blocks set no limit.
    settings = json.loads((folder / "Molmo2-4B" / "generation_config.json").read_text(encoding="utf-8"))
    write_json(folder / "Molmo2-4B" / "generation_config.json", {**settings, "max_new_tokens": 16, "max_time": 60.0})
    (folder / "allenai").mkdir()
    (folder / "allenai" / "Molmo2-4B").symlink_to(folder / "Molmo2-4B", target_is_directory=True)
    data = REPOSITORY / "examples" / "data"
    for name, source in (
        ("boats.jpg", "nasa_frame.jpg"),
        ("harbour.jpg", "nasa_frame.jpg"),
        ("penguins.mp4", "nasa_clip.mp4"),
    ):
        shutil.copy(data / source, folder / name)
    native.to_transformers(native.CHECKPOINT, folder / "demo_output" / "miniature")
    (folder / "examples" / "data").mkdir(parents=True)
    shutil.copy(data / "world_single.png", folder / "examples" / "data")
    return folder


def test_the_blocks_run_as_written(folder, tmp_path):
    """In a process of their own: one of them registers the package's classes for the Auto classes of all others."""
    report = fresh_process.run("code_blocks", tmp_path, folder=folder, blocks=BLOCKS)
    assert len(BLOCKS) == 12
    assert len(report["lines"]) >= 7  # seven answers
    assert report["planned tokens"] <= 1000
    assert len(report["answers"]) == 2
    assert all(isinstance(text, str) for text in report["answers"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_as_written(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        for line in re.findall(r"^print\(.*\)(?:  |\n)# (.*)$", block, re.M):
            assert line in printed


def test_the_demo_answers_truly(monkeypatch, capsys, tmp_path):
    """What it prints stands in the README; the bundled image and clip are answered as they were drawn."""
    import demo

    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out
    quoted = re.search(r"It prints, among others:\n\n```\n(.*?)^```", README, re.M | re.S).group(1)
    assert quoted.replace("demo_output", str(tmp_path)) in printed
    assert printed.count("the truth: ") == 6
    red_circles = [thing for thing in bundle.image().things if (thing.colour, thing.kind) == ("red", "circle")]
    found = re.findall(r"red circles \d: x (\d+), y (\d+) of (\d+)x(\d+)", printed)
    for thing in red_circles:
        gaps = [(int(x) / int(w) - thing.x) ** 2 + (int(y) / int(h) - thing.y) ** 2 for x, y, w, h in found]
        assert min(gaps) ** 0.5 < 0.03
    assert {path.name for path in tmp_path.iterdir()} >= {"miniature", "points.png", "track.mp4"}
