"""Answers on the screen and in files: text for people, JSON lines and CSV for programs, marks on images and videos."""

import csv
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import click

from molmo2.grounding.parse import Grounding
from molmo2.tools.answer import Answer, answer_record, readable
from molmo2.tools.media_files import MediaFile, is_url

FORMATS = ("text", "json", "csv")
POINT_COLUMNS = ("label", "id", "x", "y", "x_norm", "y_norm", "image", "time", "frame")
COLUMNS = ("files", "question", "text", "count", "truncated", *POINT_COLUMNS, "error")
MAX_POINTS_SHOWN = 12  # in text; JSON, CSV and drawings have them all


def as_text(answer: Answer) -> str:
    """An answer for people: tags are replaced by their labels, and the points follow in a list."""
    lines = [readable(answer.grounding), *_point_lines(answer)]
    if answer.truncated:
        lines.append("(cut off: --max-new-tokens is reached)")
    return "\n".join(line for line in lines if line)


def _point_lines(answer: Answer) -> Iterator[str]:
    points = answer_record(answer)["points"]
    several = len({point.get("image") for point in points}) > 1
    for point in points[:MAX_POINTS_SHOWN]:
        place = f"x {point['x']:.0f}, y {point['y']:.0f}" if "x" in point else f"x {point['x_norm']:.1%} of the width"
        if "x" not in point:
            place += f", y {point['y_norm']:.1%} of the height"
        when = "" if point.get("time") is None else f" at {point['time']:.1f} s"
        where = f" in image {point['image'] + 1}" if several and "image" in point else ""
        yield f"  {point['label']} {point['id']}: {place}{when}{where}"
    if len(points) > MAX_POINTS_SHOWN:
        yield f"  ... and {len(points) - MAX_POINTS_SHOWN} more: --format json or csv has them all"


def as_record(files: Sequence[MediaFile], question: str, answer: Answer) -> dict[str, Any]:
    """An answer with its files and question, for JSON."""
    return {"files": [media.path for media in files], "question": question, **answer_record(answer)}


def as_json(record: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False)


def as_csv(record: dict[str, Any]) -> str:
    """One line for each point of a record; a line without a place where there are none."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore", lineterminator="\n")
    files = " ".join(record["files"]) if len(record["files"]) == 1 else json.dumps(record["files"])
    for point in record.get("points") or [{}]:
        writer.writerow({**record, **point, "files": files})
    return lines.getvalue().removesuffix("\n")


def save_marks(files: Sequence[MediaFile], grounding: Grounding, folder: Path, taken: set[Path]) -> list[Path]:
    """Copies of the media with the points of an answer; none where it has no points.

    Args:
        taken: Files of this run, which grows: images of several folders may be called alike.
    Returns:
        The files that were written: NAME_points.png, NAME_points.mp4. A number is added where a name is taken.
    """
    if not grounding.points:
        return []
    from molmo2.image.loading import load_images
    from molmo2.tools.draw import draw
    from molmo2.tools.draw_video import annotate_video

    folder.mkdir(parents=True, exist_ok=True)
    videos = [media for media in files if media.is_video]
    if videos:
        require_drawable(videos[0].path)
        target = _free_name(folder, videos[0].path, ".mp4", taken)
        return [annotate_video(videos[0].path, grounding, target).path]
    written = []
    drawn = draw(load_images([media.path for media in files]), grounding)
    marked = {point.image_index for point in grounding.points}
    for index, (media, image) in enumerate(zip(files, drawn)):
        if index in marked:
            written.append(_free_name(folder, media.path, ".png", taken))
            image.save(written[-1])
    return written


def require_writable(output: Path | None) -> None:
    """Check before the model is loaded that answers can be written.

    Raises:
        UsageError: The folder of the output does not exist, or nothing can be written there.
    """
    if output is None or str(output) == "-":
        return
    if not output.parent.is_dir():
        raise click.UsageError(f"'{output}' cannot be written: there is no folder '{output.parent}'. Make it first.")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise click.UsageError(f"'{output}' cannot be written: permission is denied. Name another output.")


def require_drawable(source: str) -> None:
    """Check that marks can be drawn on a video.

    Raises:
        ValueError: It is a URL.
    """
    if is_url(source):
        raise ValueError("Marks are drawn on videos on disk only: download it first.")


@contextmanager
def seconds_shown(title: str, patience_seconds: float) -> Iterator[None]:
    """On a terminal, a line with the seconds so far, once it takes longer than that; gone at the end."""
    if not sys.stderr.isatty():
        yield
        return
    ended, started = Event(), time.monotonic()

    def show() -> None:
        wait = patience_seconds
        while not ended.wait(wait):
            wait = 1.0
            sys.stderr.write(f"\r{title}: {time.monotonic() - started:.0f} s")
            sys.stderr.flush()
        if wait == 1.0:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    thread = Thread(target=show, name="molmo2-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _free_name(folder: Path, source: str, suffix: str, taken: set[Path]) -> Path:
    stem = f"{Path(source.partition('?')[0]).stem}_points"
    names = (folder / f"{stem}{'' if number == 1 else f'_{number}'}{suffix}" for number in itertools.count(1))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name
