"""A headless browser: finding one and running it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """A browser of the Chromium family: $CHROMIUM, one on the PATH, or the one that playwright installed."""
    for command in (os.environ.get("CHROMIUM", ""), *COMMANDS):
        found = shutil.which(command) if command else None
        if found is not None:
            return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).is_file() else None


@contextmanager
def browser(executable: str) -> Iterator[Any]:
    with sync_playwright() as playwright:
        # Root may not use the sandbox, and needs none for a page of our own.
        running = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"] * (os.geteuid() == 0))
        yield running
        running.close()


def require_browser() -> str:
    """A browser, or a skipped test; a failed one where $MOLMO2_NEEDS_BROWSER is set."""
    executable = find_browser()
    if executable is None:
        complaint = "There is no browser. Install chromium, or name one in $CHROMIUM."
        if os.environ.get("MOLMO2_NEEDS_BROWSER"):
            pytest.fail(complaint)
        pytest.skip(complaint)
    return executable
