"""What is asked of each window, what is kept of its answer, and how the windows become one result.

A task is data. `read` turns the answer about a window into a dictionary that JSON can hold, which the journal keeps; a
`Merger` turns those dictionaries into the result, without a model: a journal can be merged again with other settings.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from molmo2.grounding import prompts
from molmo2.grounding.files import nearest_points
from molmo2.grounding.parse import Grounding, Point
from molmo2.grounding.prompts import Prompt
from molmo2.grounding.structured import StructuredAnswer
from molmo2.long_video.events import EventMerger, LongEvent, MergeSettings, WindowEvents
from molmo2.long_video.source import Clip
from molmo2.long_video.tracks import (
    GAP,
    JoinSettings,
    LongTrack,
    Stitcher,
    TrackPoint,
    WindowTrack,
    WindowTracks,
)
from molmo2.long_video.windows import clock

R = TypeVar("R", covariant=True)


@dataclass(frozen=True)
class Reply:
    """An answer of the model; `truncated` if a limit of tokens ended it."""

    text: str
    truncated: bool = False


Ask = Callable[[Any, Clip | None], Reply]  # (prompt, window) -> answer; without a window the prompt is text alone
Record = dict[str, Any]


class Merger(Protocol[R]):
    """Records of windows, in order, become a result."""

    def add(self, record: Record) -> None:
        """Add what was kept of the next window."""

    def result(self) -> R:
        """The result so far."""


class Task(ABC, Generic[R]):
    """Something that is asked about a long video."""

    @abstractmethod
    def identity(self) -> Record:
        """What makes this task this task: whatever the model is told."""

    @abstractmethod
    def read(self, clip: Clip, ask: Ask, so_far: Merger[R]) -> Record:
        """Ask about a window; what is kept of the answer, with times of the whole video.

        Args:
            so_far: Holds the windows before it.
        """

    @abstractmethod
    def merger(self) -> Merger[R]:
        """A fresh one."""


def _asked(prompt: Prompt, clip: Clip, ask: Ask) -> tuple[Record, Any]:
    """The record of an answer, and what the prompt's reader makes of it."""
    reply = ask(prompt, clip)
    record: Record = {"start": clip.start, "end": clip.end, "text": reply.text, "truncated": reply.truncated}
    return record, prompt.parse(reply.text, clip.media)


def _problems(record: Record) -> list[str]:
    """What is missing of a window, with its times."""
    where = f"{clock(record['start'])} to {clock(record['end'])}"
    cut_off = ["the answer was cut off by the limit of tokens"] * record["truncated"]
    return [f"{where}: {problem}" for problem in [*cut_off, *record.get("problems", [])]]


# --- tracks and counts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongTracks:
    """Objects over a long video.

    Attributes:
        tracks: One for each object.
        problems: What is missing, in words.
    """

    tracks: tuple[LongTrack, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class LongCount:
    """How many different objects there are in a long video.

    Attributes:
        count: Tracks after stitching; an object that two windows see counts once.
        at_least: The most that one window has at one time.
        at_most: The count if nothing had returned: joins over a gap counted as two objects.
        tracks, problems: As of `LongTracks`.
    """

    count: int = 0
    at_least: int = 0
    at_most: int = 0
    tracks: tuple[LongTrack, ...] = ()
    problems: tuple[str, ...] = ()


def tracked(clip: Clip, grounding: Grounding) -> tuple[list[Record], list[str]]:
    """The tracks of an answer about a window, at its samples: [{"label", "points": [[seconds, x, y], ...]}]; problems.

    Of several points of an object at one sample, the one that was written for the nearest time counts. Points at times
    that are no sample's, a step away from the nearest, are left out. Whatever is no track, is cut off or is missing is
    among the problems.
    """
    step = clip.times[1] - clip.times[0] if len(clip.times) > 1 else math.inf
    placed: dict[tuple[str, int], list[tuple[int, Point, float]]] = {}
    num_outside = 0
    for track in grounding.tracks:
        for point in track.points:
            if point.frame is None or point.seconds_to_frame >= step:
                num_outside += 1
                continue
            own = placed.setdefault((track.label, track.id), [])
            own.append((point.frame.sampled_index, point, point.seconds_to_frame))
    tracks = [
        {
            "label": label,
            "points": [[clip.times[place], p.x_norm, p.y_norm] for place, p in sorted(nearest_points(own).items())],
        }
        for (label, _), own in placed.items()
    ]
    problems = [f"{num_outside} point(s) are at times outside the window"] * (num_outside > 0)
    return tracks, problems + _missing_tracks(grounding)


def _missing_tracks(grounding: Grounding) -> list[str]:
    """What an answer has instead of whole tracks, in words."""
    problems = ["a tag of the answer is cut off"] * grounding.truncated
    num_stray = sum(point.tag != "tracks" for point in grounding.points)
    if num_stray:
        problems.append(f"{num_stray} point(s) belong to no track")
    if not (problems or grounding.tracks or grounding.says_none):
        problems.append(f"the answer has neither tracks nor says that there are none: {grounding.text[:60]!r}")
    return problems


def window_tracks(record: Record) -> WindowTracks:
    """The tracks of a window out of its record."""
    tracks = tuple(
        WindowTrack(track["label"], tuple(TrackPoint(*point) for point in track["points"]))
        for track in record["tracks"]
    )
    return WindowTracks(record["start"], record["end"], tracks)


def _read_tracks(prompt: Prompt, clip: Clip, ask: Ask) -> Record:
    record, grounding = _asked(prompt, clip, ask)
    tracks, problems = tracked(clip, grounding)
    return {**record, "tracks": tracks, "problems": problems}


class _TrackMerger:
    def __init__(self, settings: JoinSettings) -> None:
        self.stitcher, self._problems = Stitcher(settings), list[str]()

    def add(self, record: Record) -> None:
        self.stitcher.add(window_tracks(record))
        self._problems += _problems(record)

    def result(self) -> LongTracks:
        return LongTracks(self.stitcher.tracks(), tuple(self._problems))


@dataclass(frozen=True)
class TrackTask(Task[LongTracks]):
    """Follow objects.

    Attributes:
        what: Their name.
        fps: Positions a second that the model is asked for; it gives 2 where nothing is said.
        joins: When two tracks are one object.
    """

    what: str
    fps: float | None = None
    joins: JoinSettings = field(default_factory=JoinSettings)

    def identity(self) -> Record:
        return {"task": "tracks", "prompt": prompts.track(self.what, self.fps).text}

    def read(self, clip: Clip, ask: Ask, so_far: Merger[LongTracks]) -> Record:
        return _read_tracks(prompts.track(self.what, self.fps), clip, ask)

    def merger(self) -> Merger[LongTracks]:
        return _TrackMerger(self.joins)


class _CountMerger:
    def __init__(self, settings: JoinSettings) -> None:
        self._tracks = _TrackMerger(settings)

    def add(self, record: Record) -> None:
        self._tracks.add(record)

    def result(self) -> LongCount:
        found = self._tracks.result()
        returns = sum(join.kind == GAP for track in found.tracks for join in track.joins)
        count = len(found.tracks)
        at_once = self._tracks.stitcher.most_at_once
        return LongCount(count, at_once, count + returns, found.tracks, found.problems)


@dataclass(frozen=True)
class CountTask(Task[LongCount]):
    """Count different objects, by following them: the windows are asked what `TrackTask` asks.

    Attributes:
        what, fps, joins: As of `TrackTask`.
    """

    what: str
    fps: float | None = None
    joins: JoinSettings = field(default_factory=JoinSettings)

    def identity(self) -> Record:
        return TrackTask(self.what, self.fps).identity()

    def read(self, clip: Clip, ask: Ask, so_far: Merger[LongCount]) -> Record:
        return _read_tracks(prompts.track(self.what, self.fps), clip, ask)

    def merger(self) -> Merger[LongCount]:
        return _CountMerger(self.joins)


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongEvents:
    """When things happen in a long video.

    Attributes:
        events: By their start.
        problems: What could not be read, in words.
    """

    events: tuple[LongEvent, ...] = ()
    problems: tuple[str, ...] = ()


class _EventsMerger:
    def __init__(self, settings: MergeSettings) -> None:
        self._merger, self._problems = EventMerger(settings), list[str]()

    def add(self, record: Record) -> None:
        events = tuple((start, end, description) for start, end, description in record["events"])
        self._merger.add(WindowEvents(record["start"], record["end"], events))
        self._problems += _problems(record)

    def result(self) -> LongEvents:
        return LongEvents(self._merger.events(), tuple(self._problems))


@dataclass(frozen=True)
class LocalizeTask(Task[LongEvents]):
    """Find when things happen.

    Attributes:
        what: The events to look for; None for all.
        merging: When events of two windows are one; None for the default, with `same_kind` if `what` is given.
    """

    what: str | None = None
    merging: MergeSettings | None = None

    @property
    def prompt(self) -> Prompt:
        return prompts.localize_events(self.what)

    def identity(self) -> Record:
        return {"task": "events", "prompt": self.prompt.text}

    def read(self, clip: Clip, ask: Ask, so_far: Merger[LongEvents]) -> Record:
        record, found = _asked(self.prompt, clip, ask)
        events, problems = _whole_events(clip, found)
        return {**record, "events": events, "problems": problems}

    def merger(self) -> Merger[LongEvents]:
        return _EventsMerger(MergeSettings(same_kind=self.what is not None) if self.merging is None else self.merging)


def _whole_events(clip: Clip, found: StructuredAnswer) -> tuple[list[list[Any]], list[str]]:
    """Events in seconds of the whole video, inside the window; and problems in words.

    The last sample stands for the time up to the next one: what begins there begins at the last sample.
    """
    events: list[list[Any]] = []
    problems = list(found.problems)
    length = clip.end - clip.start
    for event in found.events:
        if event.start is None or event.end is None or event.end < event.start:
            continue  # among the problems already
        if event.start > length + clip.step + 1e-6:
            problems.append(f"{event.description[:60]!r} begins at {event.start:g} s of a window of {length:g} s")
            continue
        start, end = (clip.start + min(time, length) for time in (event.start, event.end))
        events.append([start, end, event.description])
    return events, problems


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """What was answered about one window, in seconds of the whole video."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class LongAnswer:
    """The answer to a question about a long video.

    Attributes:
        text: The answer for all that was seen: a summary that each window brings up to date.
        notes: The answers about single windows.
        problems: What is missing, in words.
    """

    text: str = ""
    notes: tuple[Note, ...] = ()
    problems: tuple[str, ...] = ()


class _AnswerMerger:
    def __init__(self) -> None:
        self._text, self._notes, self._problems = "", list[Note](), list[str]()

    def add(self, record: Record) -> None:
        self._text = record["summary"]
        self._notes.append(Note(record["start"], record["end"], record["text"]))
        self._problems += _problems(record)

    def result(self) -> LongAnswer:
        return LongAnswer(self._text, tuple(self._notes), tuple(self._problems))


@dataclass(frozen=True)
class AskTask(Task[LongAnswer]):
    """Answer a question: each window is asked, and its answer brought into a running summary.

    The summary is an answer in text alone, so its prompt is as long as one summary and one note, however long the
    video.
    """

    question: str

    def identity(self) -> Record:
        return {"task": "answer", "prompt": str(self.question)}

    def read(self, clip: Clip, ask: Ask, so_far: Merger[LongAnswer]) -> Record:
        reply = ask(self.question, clip)
        record: Record = {"start": clip.start, "end": clip.end, "text": reply.text, "truncated": reply.truncated}
        before = so_far.result()
        if not before.notes:
            return {**record, "summary": reply.text}
        summary = ask(summary_prompt(self.question, before, Note(clip.start, clip.end, reply.text)), None)
        return {**record, "truncated": reply.truncated or summary.truncated, "summary": summary.text}

    def merger(self) -> Merger[LongAnswer]:
        return _AnswerMerger()


def summary_prompt(question: str, so_far: LongAnswer, note: Note) -> str:
    """The text that asks for the next running summary; its times count from the start of the video."""
    first = so_far.notes[0].start
    seen, start, end = (clock(time - first) for time in (so_far.notes[-1].end, note.start, note.end))
    return (
        f"These are notes on a long video.\nFrom {clock(0)} to {seen}: {so_far.text}\n"
        f"From {start} to {end}: {note.text}\n"
        f"The question about the video is: {question}\n"
        "Answer it for both parts together, in a few sentences."
    )
