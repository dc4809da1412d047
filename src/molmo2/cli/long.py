"""`molmo2 long`: hours of video on the command line."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from molmo2.cli import models, printing

COLUMNS = ("label", "id", "time", "x", "y", "frame", "confidence", "start", "end", "text")
POSITIONS_PER_SECOND = 2.0  # that the model gives where nothing is said


def run_long(kind: str, what: str | None, source: str, options: Mapping[str, Any]) -> int:
    """Ask about a long video and write the result; the progress of its windows is shown on terminals.

    Args:
        kind: "ask", "track", "count" or "events".
        options: The others of the command.
    Raises:
        ClickException: The video cannot be read, the journal belongs to another run, the model cannot be loaded, or
            the output not be written.
    """
    if what is not None and not what.strip():
        raise click.UsageError("The question is empty.")
    if options["model"] is None:
        raise click.UsageError(
            f"There is no model to ask. Pass --model, or set {models.MODEL_VARIABLE}; long videos are asked about in "
            "this process, not on a server."
        )
    if options["overwrite"] and options["journal"] is None:
        raise click.UsageError("--overwrite is for a journal, and none is named. Leave it out, or pass --journal.")
    printing.require_writable(options["output"])
    models.quiet_libraries()
    from molmo2.long_video import Cutting, JoinSettings, LongVideo
    from molmo2.long_video.tasks import AskTask, CountTask, LocalizeTask, TrackTask

    try:
        Cutting(options["window"], options["overlap"], options["fps"])
        if options.get("drawings") is not None:
            printing.require_drawable(source)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    joins = JoinSettings(unique=options.get("unique", False))
    tasks = {
        "ask": lambda: AskTask(what or ""),
        "track": lambda: TrackTask(what or "", joins=joins),
        "count": lambda: CountTask(what or "", joins=joins),
        "events": lambda: LocalizeTask(what),
    }
    try:
        video = LongVideo(source, options["window"], options["overlap"], options["fps"])
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{source}: {error}") from error
    with video:
        result = _last_result(source, video, tasks[kind](), options)
        _write(_lines(options["form"], source, what, result, video), options["output"])
        if options.get("drawings") is not None:
            _draw(source, result, video, options["drawings"])
    for problem in result.problems:
        click.echo(f"incomplete: {problem}", err=True)
    return 0


def _last_result(source: str, video: Any, task: Any, options: Mapping[str, Any]) -> Any:
    """What the model made of all windows.

    Raises:
        ClickException: Something failed: the video, the journal or the model.
    """
    from molmo2.batch.journal import OutputError
    from molmo2.image.limits import MediaLimitError
    from molmo2.long_video import stream_long
    from molmo2.video.decoding.timeline import VideoDecodeError

    model, processor = models.load_model(options["model"], options["device"], options["dtype"])
    interval = options["key_frame_interval"]
    partials = stream_long(
        model,
        processor,
        video,
        task,
        journal=options["journal"],
        overwrite=options["overwrite"],
        progress=sys.stderr.isatty(),
        processor_kwargs=None if interval is None else {"key_frame_interval": interval},
        max_new_tokens=options["max_new_tokens"],
    )
    result: Any = None
    try:
        for partial in partials:
            result = partial.result
    except OutputError as error:
        raise click.UsageError(str(error)) from error
    except (MediaLimitError, VideoDecodeError) as error:
        raise click.ClickException(f"{source}: {error}") from error
    except (OSError, ValueError) as error:  # of the model, or of the journal
        raise click.ClickException(str(error)) from error
    return result


def _write(lines: Iterator[str], output: Path | None) -> None:
    """Write the lines, to the terminal where no file is named.

    Raises:
        BrokenPipeError: The reader of the output has gone.
        ClickException: The file cannot be written.
    """
    try:
        with click.open_file(str(output or "-"), "w", encoding="utf-8") as stream:
            for line in lines:
                click.echo(line, file=stream)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.ClickException(f"'{output or 'the output'}' cannot be written: {error}") from error


def _lines(form: str, source: str, what: str | None, result: Any, video: Any) -> Iterator[str]:
    if form == "text":
        yield from _as_text(what, result, video)
    elif form == "json":
        yield json.dumps({"video": source, "question": what, **_record(result, video)}, ensure_ascii=False)
    else:
        yield _as_csv(result, video)


def _max_step(video: Any) -> float:
    """Seconds between two points of a track that was there all the time; one missing point is no absence."""
    return 2 * max(float(video.cutting.seconds(1)), 1 / POSITIONS_PER_SECOND)


def _as_text(what: str | None, result: Any, video: Any) -> Iterator[str]:
    from molmo2.long_video.windows import clock

    if hasattr(result, "count"):
        yield f"{what}: {result.count} (at least {result.at_least}, at most {result.at_most})"
    for track in getattr(result, "tracks", ()):
        spans = ", ".join(f"{clock(start)} to {clock(end)}" for start, end in track.spans(_max_step(video)))
        yield f"{track.label} {track.id}: {spans} (confidence {track.confidence:.2f})"
    for event in getattr(result, "events", ()):
        yield f"{clock(event.start)} to {clock(event.end)}: {event.description}"
    if hasattr(result, "notes"):
        yield result.text
        yield from (f"  {clock(note.start)} to {clock(note.end)}: {note.text}" for note in result.notes)


def _record(result: Any, video: Any) -> dict[str, Any]:
    """A result as JSON can hold it: times in seconds, places in pixels of the video and its frames."""
    record = {name: value for name, value in vars(result).items() if name != "tracks"}
    for name in ("notes", "events"):
        if name in record:
            record[name] = [asdict(entry) for entry in record[name]]
    if hasattr(result, "tracks"):
        record["tracks"] = [
            {
                "label": track.label,
                "id": track.id,
                "confidence": track.confidence,
                "spans": track.spans(_max_step(video)),
                "points": [_place(point, video) for point in track.points],
            }
            for track in result.tracks
        ]
    return record


def _place(point: Any, video: Any) -> dict[str, Any]:
    width, height = video.size
    frame = video.sampled_frame(point.time).source_index
    return {
        "time": round(point.time, 3),
        "x": round(point.x * width, 1),
        "y": round(point.y * height, 1),
        "frame": frame,
    }


def _as_csv(result: Any, video: Any) -> str:
    """One line for each point of a track, for each event, or for each note."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    record = _record(result, video)
    for track in record.get("tracks", ()):
        writer.writerows({**track, **point} for point in track["points"])
    writer.writerows({**event, "text": event["description"]} for event in record.get("events", ()))
    writer.writerows(record.get("notes", ()))
    return lines.getvalue().removesuffix("\n")


def _draw(source: str, result: Any, video: Any, folder: Path) -> None:
    from molmo2.long_video import as_grounding
    from molmo2.tools.media_files import MediaFile

    grounding = as_grounding(result.tracks, video)
    try:
        saved = printing.save_marks([MediaFile(source, "video")], grounding, folder, set())
    except Exception as error:  # decoders raise nearly anything; the answer is written by now
        raise click.ClickException(f"{source}: not drawn: {error}") from error
    for path in saved:
        click.echo(f"wrote {path}", err=True)
    if not saved:
        click.echo(f"{source}: no points, so nothing to draw", err=True)
