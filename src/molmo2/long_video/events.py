"""Events of windows, merged into events of the whole video. Pure: numbers and words in, the same out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from molmo2.evaluate.assignment import assign

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class WindowEvents:
    """What one window says: (start, end, description) of events, in seconds of the whole video."""

    start: float
    end: float
    events: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class LongEvent:
    """Something that happens in a long video.

    Attributes:
        start, end: Seconds of the whole video.
        description: The longest of those that windows gave.
        windows: How many windows saw it.
        confidence: That two windows mean the same, the least of its merges; 1 for an event of one window.
    """

    start: float
    end: float
    description: str
    windows: int = 1
    confidence: float = 1.0


@dataclass(frozen=True)
class MergeSettings:
    """When events of two windows are one.

    Attributes:
        max_gap_seconds: Between the end of one and the start of the other; they may overlap.
        min_similarity: Share of words that two descriptions have in common, of all words in either (case aside).
        same_kind: All events are occurrences of what was asked for: descriptions need nothing in common, and the
            similarity counts as 0.5 at least.
    """

    max_gap_seconds: float = 1.0
    min_similarity: float = 0.4
    same_kind: bool = False


def merge_events(windows: Iterable[WindowEvents], settings: MergeSettings | None = None) -> tuple[LongEvent, ...]:
    """The events of the whole video, by their start.

    Events of one window are never merged with each other. Events of two windows that follow each other are if each
    reaches what both windows see, they touch in time, and their descriptions are alike.
    """
    merger = EventMerger(settings)
    for window in windows:
        merger.add(window)
    return merger.events()


class EventMerger:
    """`merge_events`, window by window."""

    def __init__(self, settings: MergeSettings | None = None) -> None:
        self.settings = MergeSettings() if settings is None else settings
        self._done: list[LongEvent] = []
        self._last: list[LongEvent] = []  # seen by the last window
        self._end: float | None = None

    def add(self, window: WindowEvents) -> None:
        """Add the next window."""
        new = [LongEvent(*event) for event in window.events]
        scores = [[self._likeness(old, event, window.start) for event in new] for old in self._last]
        pairs = dict(assign([[-score for score in row] for row in scores])) if self._last and new else {}
        merged: dict[int, LongEvent] = {}
        for number, old in enumerate(self._last):
            if number in pairs and scores[number][pairs[number]] > 0:
                merged[pairs[number]] = _merged(old, new[pairs[number]], scores[number][pairs[number]])
            else:
                self._done.append(old)
        self._last = [merged.get(place, event) for place, event in enumerate(new)]
        self._end = window.end

    def events(self) -> tuple[LongEvent, ...]:
        """The events so far."""
        return tuple(sorted([*self._done, *self._last], key=lambda event: (event.start, event.end)))

    def _likeness(self, old: LongEvent, new: LongEvent, start: float) -> float:
        """How sure it is that an event of the last window and one of the next are the same; 0 if they are not."""
        slack = self.settings.max_gap_seconds
        reaches_seam = self._end is not None and old.end >= start - slack and new.start <= self._end + slack
        gap = max(new.start - old.end, old.start - new.end)
        if not reaches_seam or gap > slack:
            return 0.0
        similarity = _similarity(old.description, new.description)
        if self.settings.same_kind:
            similarity = max(similarity, 0.5)
        return similarity if similarity >= self.settings.min_similarity else 0.0


def _merged(old: LongEvent, new: LongEvent, confidence: float) -> LongEvent:
    description = max(old.description, new.description, key=len)
    return replace(
        old,
        start=min(old.start, new.start),
        end=max(old.end, new.end),
        description=description,
        windows=old.windows + 1,
        confidence=min(old.confidence, confidence),
    )


def _similarity(one: str, other: str) -> float:
    """Share of the words of either that both have; 1 if neither has any."""
    words, others = (_words(text) for text in (one, other))
    return len(words & others) / len(words | others) if words | others else 1.0


def _words(text: str) -> set[str]:
    return {word.casefold() for word in WORD.findall(text)}
