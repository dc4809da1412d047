"""The pages of docs/cookbook run as they are written, and what they show is what the miniature answers.

Pages that need an environment of their own are run there: test_fiftyone.py, test_quantization.py.
"""

import re
import sys

import pytest
from PIL import Image

from support.cookbook import check, cookbook
from support.paths import REPOSITORY

MAX_BYTES = 20_000  # of an image, which all clones hold
PAGES = [path for path in sorted(cookbook.PAGES.glob("*.md")) if path.stem != "index"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cookbook.prepare(tmp_path_factory.mktemp("cookbook"))


@pytest.mark.parametrize("name", cookbook.pages_of("dev"))
def test_a_page_prints_and_draws_what_it_shows(name, folder):
    check(name, folder)


def test_a_page_runs_again_where_it_has_run(tmp_path):
    """The one that writes a folder and a journal."""
    folder = cookbook.prepare(tmp_path)
    for _ in range(2):
        check("many", folder)


def test_every_page_runs_somewhere_and_says_what_real_weights_change():
    assert {path.stem for path in PAGES} == set(cookbook.pages_of("dev")) | set(cookbook.ENVIRONMENTS)
    for path in PAGES:
        assert "\n## With real weights\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/cookbook/index.md", "README.md"])
def test_each_page_is_linked_with_its_image(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    prefix = "docs/cookbook/" if page == "README.md" else ""
    for path in PAGES:
        (first,) = re.findall(r"^!\[.*\]\((images/.*)\)$", path.read_text(encoding="utf-8"), re.M)
        assert f"({prefix}{path.name})" in text
        assert f'"{prefix}{first}"' in text


def test_images_are_small_and_each_is_shown():
    images = sorted((cookbook.PAGES / "images").iterdir())
    shown = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [path.name for path in images if f"images/{path.name}" not in shown] == []
    assert [path.name for path in images if path.stat().st_size > MAX_BYTES] == []


def test_the_command_writes_a_page_anew(tmp_path, monkeypatch):
    """Printed text and images take the place of older ones; code and prose stay."""
    monkeypatch.setattr(cookbook, "PAGES", tmp_path)
    monkeypatch.setattr(cookbook, "prepare", lambda folder: folder)
    monkeypatch.setattr(sys, "argv", ["cookbook.py", "page"])
    (tmp_path / "images").mkdir()
    image = "from PIL import Image\n\nImage.new('RGB', (3, 2)).save('new.webp')\n"
    code = f"# Title\n\n```python\nprint('new')\n```\n\n%s```python\nx = 1\n{image}```\n\nEnd.\n"
    (tmp_path / "page.md").write_text(code % "```text\nold\n```\n\n")
    cookbook.main()
    assert (tmp_path / "page.md").read_text() == code % "```text\nnew\n```\n\n"
    assert Image.open(tmp_path / "images" / "new.webp").size == (3, 2)
