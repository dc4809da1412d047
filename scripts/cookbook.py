#!/usr/bin/env python3
"""Runs pages of docs/cookbook and stores what they print and draw: make cookbook, or scripts/cookbook.py PAGE ...

The Python blocks of a page run in order, in a folder that looks like a checkout after `make demo`. What a block prints
is the block "```text" behind it; images that it saves, "*.webp", are those of docs/cookbook/images.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = REPOSITORY / "docs" / "cookbook"
# Pages that need the packages of another environment of constraints/environments.toml than dev.
ENVIRONMENTS = {"labelling": "fiftyone", "map": "fiftyone", "quantized": "quantization"}
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def pages_of(environment: str) -> list[str]:
    """Names of the pages that run in an environment."""
    names = (path.stem for path in sorted(PAGES.glob("*.md")) if BLOCK.search(path.read_text(encoding="utf-8")))
    return [name for name in names if ENVIRONMENTS.get(name, "dev") == environment]


def prepare(folder: Path) -> Path:
    """The examples of the checkout and the converted miniature, where the pages name them; returns `folder`."""
    os.environ.setdefault("FIFTYONE_DATABASE_VALIDATION", "false")  # prints about the age of the database
    sys.path.insert(0, str(REPOSITORY / "examples"))
    from miniature import native

    (folder / "examples").symlink_to(REPOSITORY / "examples", target_is_directory=True)
    native.to_transformers(native.CHECKPOINT, folder / "demo_output" / "miniature")
    return folder


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path


def executed(name: str, folder: Path) -> str:
    """The page with what its blocks print now; `images(folder)` are those that it saved then."""
    names: dict[str, object] = {}

    def run(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match["code"], f"{name}.md", "exec"), names)
        output = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{match['code']}```\n{output}"

    with _inside(folder):
        return BLOCK.sub(run, (PAGES / f"{name}.md").read_text(encoding="utf-8"))


def images(folder: Path) -> list[Path]:
    """What pages saved in a folder."""
    return sorted(folder.glob("*.webp"))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(Path(scratch))
        for name in sys.argv[1:] or pages_of("dev"):
            (PAGES / f"{name}.md").write_text(executed(name, folder), encoding="utf-8")
            for path in images(folder):
                path.replace(PAGES / "images" / path.name)
                print(f"{name}: wrote images/{path.name}, {(PAGES / 'images' / path.name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
