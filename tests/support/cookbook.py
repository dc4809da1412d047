"""Runs a page of docs/cookbook and compares it with what is stored."""

import re
import sys
from pathlib import Path

from PIL import Image

from support.answers import assert_same_answer
from support.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
import cookbook


def check(name: str, folder: Path) -> None:
    """What the blocks print equals the page, but for places a little beside; images have their names and sizes.

    Args:
        folder: As `cookbook.prepare` leaves it; images of earlier pages are taken away.
    """
    for path in cookbook.images(folder):
        path.unlink()
    stored = (cookbook.PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert_same_answer(cookbook.executed(name, folder), stored)
    sizes = {f"images/{path.name}": Image.open(path).size for path in cookbook.images(folder)}
    shown = {source: Image.open(cookbook.PAGES / source).size for source in re.findall(r"\]\((images/.*?)\)", stored)}
    assert sizes == shown
