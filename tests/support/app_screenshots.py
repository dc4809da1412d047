"""Writes docs/images/app_*.png from the running app: make screenshots

The answers are those of the trained miniature.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from app.models import load_backend
from app.page import Page
from app.samples import SAMPLES
from support.app_browser import expect, visit
from support.browser import browser, find_browser

IMAGES = Path(__file__).resolve().parent.parent.parent / "docs" / "images"
SHOTS = {  # name -> (label of the example, follow-up question)
    "app_image": ("Point in an image", "What colour is the ring?"),
    "app_images": ("Point in several images", None),
    "app_clip": ("Track in a video", None),
}
PAUSE = 1500  # milliseconds, for the page to come to rest


def shoot(visitor, label: str, follow_up: str | None, target: Path) -> None:
    visitor.page.get_by_role("button", name=label, exact=True).click()
    expect(visitor.page.locator("#images img, #video video").first).to_be_visible()
    visitor.page.locator("#question button").click()
    expect(visitor.page.locator("#note")).to_contain_text("tokens in")
    if follow_up is not None:
        visitor.ask(follow_up)
        expect(visitor.answers).to_have_count(2)
        expect(visitor.page.locator("#note")).not_to_contain_text(", 0 cached")
    visitor.page.wait_for_timeout(PAUSE)
    shot = Image.open(io.BytesIO(visitor.page.screenshot())).convert("RGB")
    shot.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(target, optimize=True)  # half the size


def main() -> None:
    executable = find_browser()
    if executable is None:
        raise SystemExit("There is no browser. Install chromium, or name one in $CHROMIUM.")
    IMAGES.mkdir(parents=True, exist_ok=True)
    assert {label for label, _ in SHOTS.values()} <= {sample.label for sample in SAMPLES}
    with tempfile.TemporaryDirectory() as scratch, browser(executable) as running:
        page = Page(load_backend(None, Path(scratch)))
        for name, (label, follow_up) in SHOTS.items():
            with visit(running, page, width=1160, height=930) as visitor:
                shoot(visitor, label, follow_up, IMAGES / f"{name}.png")
            print(f"Wrote {IMAGES / name}.png")


if __name__ == "__main__":
    main()
