"""A headless browser on the app: serving a page, and what tests and screenshots do there."""

import base64
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page as BrowserPage
from playwright.sync_api import expect

from app.page import Page, launch
from support.ports import free_port

TIMEOUT = 90_000  # milliseconds, on a machine that has other things to do
READ_PIXELS = """async image => {
    if (image.decode) await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth || image.videoWidth;
    canvas.height = image.naturalHeight || image.videoHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
}"""


@contextmanager
def look_at(running: Any, address: str, *, width: int = 1280, height: int = 900) -> Iterator["Visitor"]:
    """A new visitor of a page that is served somewhere."""
    context = running.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
    context.set_default_timeout(TIMEOUT)
    expect.set_options(timeout=TIMEOUT)
    try:
        browser_page = context.new_page()
        browser_page.goto(address)
        yield Visitor(browser_page)
    finally:
        context.close()


@contextmanager
def visit(running: Any, page: Page, **size: int) -> Iterator["Visitor"]:
    """Serves a page on this machine and looks at it."""
    address = launch(page, "127.0.0.1", free_port(), wait=False)
    try:
        with look_at(running, address, **size) as visitor:
            yield visitor
    finally:
        page.blocks.close(verbose=False)


class Visitor:
    """Someone who uses the page.

    Attributes:
        page: The browser's view of it.
    """

    def __init__(self, page: BrowserPage):
        self.page = page

    def upload(self, paths: Sequence[Path]) -> None:
        """Replace what was uploaded before."""
        remove = self.page.locator("#files").get_by_label("Clear")
        if remove.count():
            remove.first.click()
        self.page.locator("#files input[type=file]").set_input_files([str(path) for path in paths])

    def ask(self, question: str) -> None:
        self.page.locator("#question textarea").fill(question)
        self.page.locator("#question button").click()

    @property
    def answers(self) -> Any:
        return self.page.locator("#chat .bot.message")

    def shown(self, selector: str) -> np.ndarray:
        """What an <img> or <video> shows, (H, W, 3) uint8 in the image's own pixels."""
        data = self.page.locator(selector).evaluate(READ_PIXELS)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def shows(self, selector: str, condition: Callable[[np.ndarray], Any]) -> np.ndarray:
        """What is shown as soon as it is as expected: a text may say so before the browser has loaded the image.

        Raises:
            AssertionError: It never was.
        """
        end = time.monotonic() + TIMEOUT / 1000
        while not condition(pixels := self.shown(selector)):
            assert time.monotonic() < end, f"{selector} shows something else"
            self.page.wait_for_timeout(50)
        return pixels

    def export(self, name: str, folder: Path) -> Path:
        """Click on an export button and keep the file."""
        with self.page.expect_download() as download:
            self.page.locator(f"#export_{name}").click()
        target = folder / download.value.suggested_filename
        download.value.save_as(target)
        return target
