"""Timed subtitles: from SRT, WebVTT or lists, to the text that follows the frames of a video."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molmo2.data.queries import records

Subtitles = dict[tuple[float, float], str]  # (start, end) in seconds -> text
FRAME_REACH_SECONDS = 1.0
FRAME, ALL = "frame_1", "all"
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
_TIMES = re.compile(rf"^\s*{_TIME}\s*-->\s*{_TIME}")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


def read_subtitles(source: Any) -> Subtitles:
    """Subtitles from the text of an SRT or WebVTT file, from rows, or from a dictionary.

    Args:
        source: Text; rows `{"start", "end", "text"}` or (start, end, text), the rows of names also as one row of
            lists, as `datasets` may give them; or {(start, end): text}. Seconds.
    Raises:
        ValueError: A time ends before it starts or is no number, the text of a row is none, a whole text has no times,
            or the source is none of these.
    """
    subtitles: Subtitles = {}
    for start, end, text in _cues(source) if isinstance(source, str) else _entries(source):
        if not 0 <= start <= end:
            raise ValueError(f"The subtitle {text!r:.60} lasts from {start} to {end} s; expected 0 <= start <= end.")
        key = (float(start), float(end))
        subtitles[key] = f"{subtitles[key]} {text}" if key in subtitles else str(text)
    return dict(sorted(subtitles.items(), key=lambda entry: entry[0]))


def _entries(source: Any) -> list[tuple[float, float, Any]]:
    """(start, end, text) of rows or a dictionary."""
    try:
        if isinstance(source, Mapping) and "start" not in source:
            rows = [(start, end, text) for (start, end), text in source.items()]
        else:
            rows = [
                (row["start"], row["end"], row["text"]) if isinstance(row, Mapping) else row for row in records(source)
            ]
        return [(float(start), float(end), _text(text)) for start, end, text in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"These are no subtitles: {repr(source)[:60]} ({type(error).__name__}: {error}). Expected the text of an "
            "SRT or WebVTT file, rows with start, end and text, or {(start, end): text}."
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text; found {value!r:.40}")
    return value


def _cues(text: str) -> list[tuple[float, float, str]]:
    """The cues of SRT or WebVTT: a line of times, then lines of text up to an empty one."""
    cues: list[tuple[float, float, str]] = []
    for block in re.split(r"\n[ \t]*\n", text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.split("\n")
        place = next((number for number, line in enumerate(lines) if _TIMES.match(line)), None)
        if place is not None and (found := _TIMES.match(lines[place])):
            words = html.unescape(_TAG.sub("", " ".join(lines[place + 1 :]))).split()
            if words:
                cues.append((_seconds(found.groups()[:4]), _seconds(found.groups()[4:]), " ".join(words)))
    if text.strip() and not cues and "-->" not in text and not text.lstrip("\ufeff").startswith("WEBVTT"):
        raise ValueError(
            f"{text[:60]!r} is neither SRT nor WebVTT: it has no times such as 00:00:01,000 --> 00:00:02,500."
        )
    return cues


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = (part or "0" for part in parts)
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}")


def subtitle_text(subtitles: Subtitles | str, times: Iterable[float] | None = None, mode: str = FRAME) -> str:
    """What stands after the frames: `subtitle` and a line for each entry, "12.0 - 14.5 Hello."; "" without entries.

    Args:
        subtitles: As `read_subtitles` returns them; a plain string is written as it is.
        times: Seconds of the sampled frames, for the mode "frame_1".
        mode: "frame_1", as in training: entries that overlap a sampled frame within one second. "all": all of them.
    Raises:
        ValueError: There is no such mode, or "frame_1" without times.
    """
    if mode not in (FRAME, ALL):
        raise ValueError(f"The mode of subtitles is {mode!r}; expected {FRAME!r} or {ALL!r}.")
    if isinstance(subtitles, str):
        return f"subtitle\n{subtitles}" if subtitles else ""
    chosen = list(subtitles.items())
    if mode == FRAME:
        if times is None:
            raise ValueError(f"The mode {FRAME!r} needs the times of the sampled frames; pass them, or mode={ALL!r}.")
        seconds = list(times)
        chosen = [
            (span, text)
            for span, text in chosen
            if any(span[0] <= at + FRAME_REACH_SECONDS and span[1] >= at - FRAME_REACH_SECONDS for at in seconds)
        ]
    lines = "".join(f"{start:.1f} - {end:.1f} {text}\n" for (start, end), text in chosen)
    return f"subtitle\n{lines}" if lines else ""
