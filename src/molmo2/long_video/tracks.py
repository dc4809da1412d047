"""Tracks of windows, stitched into tracks of the whole video. Pure: numbers in, numbers out.

    stitched = stitch([WindowTracks(0.0, 30.0, (...)), WindowTracks(26.0, 56.0, (...))])
    stitched[0].id, stitched[0].points, stitched[0].confidence

Two windows see the samples of their overlap both. A track of the new window continues one of the earlier windows
if the two are at the same places there. One that begins later may be the return of a track that ended before.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from molmo2.evaluate.assignment import assign
from molmo2.grounding.parse import VIDEO, Grounding, MediaInfo, Point, Track

if TYPE_CHECKING:
    from molmo2.long_video.source import LongVideo

OVERLAP, GAP = "overlap", "gap"  # kinds of joins


class TrackPoint(NamedTuple):
    """Where an object is: seconds of the whole video, and fractions of width and height, 0..1."""

    time: float
    x: float
    y: float


@dataclass(frozen=True)
class WindowTrack:
    """One object in one window: its points, times ascending, each once."""

    label: str
    points: tuple[TrackPoint, ...]


@dataclass(frozen=True)
class WindowTracks:
    """What one window says: `start` and `end` are the times of its first and last sample."""

    start: float
    end: float
    tracks: tuple[WindowTrack, ...]


@dataclass(frozen=True)
class JoinSettings:
    """When two tracks are one object.

    Attributes:
        max_distance: Two points at the same time have nothing in common from this distance on, in fractions of the
            sides.
        max_gap_seconds: Longest absence after which an object counts as the same.
        reach: A return has nothing in common with a track from this distance on: from where the track ended, or from
            where its motion would have led, whichever is nearer.
        min_confidence: Joins below this confidence are not made.
        unique: What is tracked exists once ("the dog", not "cars"): whatever returns is the same, wherever and
            whenever, unless two are seen at once.
    """

    max_distance: float = 0.1
    max_gap_seconds: float = 15.0
    reach: float = 0.25
    min_confidence: float = 0.2
    unique: bool = False


@dataclass(frozen=True)
class Join:
    """Where a track was put together.

    Attributes:
        kind: "overlap": two windows saw it at the same places at the same times. "gap": it was away.
        start, end: For an overlap the first and last time that both windows have; for a gap the last time before it
            and the first after it.
        confidence: 0..1. For an overlap the mean closeness of the two (1 at the same place, 0 from `max_distance` on)
            over the times at which either has a point. For a gap closeness in place (0 from `reach` on) times
            closeness in time (0 from `max_gap_seconds` on); for something unique 0.5 at least.
    """

    kind: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class LongTrack:
    """One object over the whole video; `id` counts objects from 1, in the order in which they were first seen."""

    id: int
    label: str
    points: tuple[TrackPoint, ...]
    joins: tuple[Join, ...] = ()

    @property
    def confidence(self) -> float:
        """That of its weakest join; 1 without any."""
        return min((join.confidence for join in self.joins), default=1.0)

    def spans(self, max_step_seconds: float) -> list[tuple[float, float]]:
        """When it is there: (first, last) times of runs of points without a longer step between them."""
        runs: list[tuple[float, float]] = []
        for point in self.points:
            if runs and point.time - runs[-1][1] <= max_step_seconds + 1e-6:
                runs[-1] = runs[-1][0], point.time
            else:
                runs.append((point.time, point.time))
        return runs


def stitch(windows: Iterable[WindowTracks], settings: JoinSettings | None = None) -> tuple[LongTrack, ...]:
    """The tracks of the whole video.

    Two tracks of one window are joined over a gap like those of two windows, though the model gave them two ids: how
    long something was away decides, not where windows are cut. They are never joined if they have a time in common.

    Args:
        windows: In order.
        settings: When two tracks are one; None for the default.
    """
    stitcher = Stitcher(settings)
    for window in windows:
        stitcher.add(window)
    return stitcher.tracks()


@dataclass
class _Open:
    """A track that may continue."""

    id: int
    label: str
    points: list[TrackPoint]
    joins: list[Join] = field(default_factory=list)
    told: LongTrack | None = None  # as `tracks` told it, unless it continued since

    @property
    def last(self) -> float:
        return self.points[-1].time

    def since(self, start: float) -> dict[float, TrackPoint]:
        """Points from this time on, by time."""
        found: dict[float, TrackPoint] = {}
        for point in reversed(self.points):
            if point.time < start:
                break
            found[point.time] = point
        return found


class Stitcher:
    """`stitch`, window by window; what is said of a track so far is only added to, but for points in the last overlap.

    A window costs as much as the tracks that may continue, however long the video.

    Attributes:
        most_at_once: The largest number of objects that one window has at one time, so far.
    """

    def __init__(self, settings: JoinSettings | None = None) -> None:
        self.settings = JoinSettings() if settings is None else settings
        self._all: list[_Open] = []
        self._open: list[_Open] = []
        self._end = -math.inf  # of the windows so far
        self.most_at_once = 0

    def add(self, window: WindowTracks) -> dict[int, int]:
        """Add the next window.

        Returns:
            For each of its tracks, by place, the id of the object.
        """
        if not self.settings.unique:  # what is seen from here on is no return of those that ended before
            horizon = window.start - self.settings.max_gap_seconds
            self._open = [track for track in self._open if track.last >= horizon]
        new = [track for track in window.tracks if track.points]
        owners = dict(self._by_overlap(window, new))
        for place, owner in owners.items():
            self._continue(owner, new[place], window.start)
        rest = sorted(
            (place for place in range(len(new)) if place not in owners), key=lambda place: _begin(new[place])
        )
        for _, group in groupby(rest, key=lambda place: _begin(new[place])):
            self._by_gap([*group], new, owners)
        at_once = Counter(point.time for track in new for point in track.points)
        self.most_at_once = max([self.most_at_once, *at_once.values()])
        self._end = max(self._end, window.end)
        places = [place for place, track in enumerate(window.tracks) if track.points]
        for owner in owners.values():
            owner.told = None
        return {places[place]: owner.id for place, owner in owners.items()}

    def tracks(self) -> tuple[LongTrack, ...]:
        """The tracks so far."""
        for own in self._all:
            if own.told is None:
                own.told = LongTrack(own.id, own.label, tuple(own.points), tuple(own.joins))
        return tuple(own.told for own in self._all if own.told is not None)

    def _by_overlap(self, window: WindowTracks, new: Sequence[WindowTrack]) -> list[tuple[int, _Open]]:
        """Pairs of a new track, by place, and the one that it continues, by what both say of the overlap."""
        old = [(track, seen) for track in self._open if (seen := track.since(window.start))]
        scores = [
            [
                _agreement(seen, [point for point in track.points if point.time <= self._end], self.settings)
                if _same_label(owner, track)
                else 0.0
                for owner, seen in old
            ]
            for track in new
        ]
        pairs = _best_pairs(scores, self.settings.min_confidence)
        for place, number in pairs:
            owner = old[number][0]
            owner.joins.append(Join(OVERLAP, window.start, min(self._end, window.end), scores[place][number]))
        return [(place, old[number][0]) for place, number in pairs]

    def _by_gap(self, group: Sequence[int], new: Sequence[WindowTrack], owners: dict[int, _Open]) -> None:
        """Give tracks that begin at one time to those that ended before, or make them new ones."""
        begin = _begin(new[group[0]])
        old = [track for track in self._open if track.last < begin]
        scores = [
            [
                _return_confidence(owner, new[place].points[0], self.settings) if _same_label(owner, new[place]) else 0
                for owner in old
            ]
            for place in group
        ]
        if self.settings.unique:
            scores = [self._unique(row, new[place], old) for row, place in zip(scores, group, strict=True)]
        pairs = dict(_best_pairs(scores, self.settings.min_confidence))
        for row, place in enumerate(group):
            if row in pairs:
                owner = old[pairs[row]]
                owner.joins.append(Join(GAP, owner.last, begin, scores[row][pairs[row]]))
                owner.points.extend(new[place].points)
            else:
                owner = _Open(len(self._all) + 1, new[place].label, list(new[place].points))
                self._all.append(owner)
                self._open.append(owner)
            owners[place] = owner

    def _unique(self, scores: Sequence[float], track: WindowTrack, old: Sequence[_Open]) -> list[float]:
        """Scores of a return of something that exists once: at least 0.5, unless another of its name is there now."""
        is_alone = not any(owner.last >= _begin(track) and _same_label(owner, track) for owner in self._open)
        floor = 0.5 if is_alone else 0.0
        return [max(score, floor * _same_label(owner, track)) for score, owner in zip(scores, old, strict=True)]

    def _continue(self, owner: _Open, track: WindowTrack, start: float) -> None:
        """Append a track to one that it agrees with: in the first half of the overlap the old points count."""
        old = owner.since(start)
        middle = (start + self._end) / 2
        kept = {time: point for time, point in old.items() if time <= middle}
        merged = {**old, **{point.time: point for point in track.points}, **kept}
        owner.points[len(owner.points) - len(old) :] = [merged[time] for time in sorted(merged)]


def _begin(track: WindowTrack) -> float:
    return track.points[0].time


def _same_label(owner: _Open, track: WindowTrack) -> bool:
    return owner.label.casefold() == track.label.casefold()


def _distance(one: TrackPoint, other: TrackPoint) -> float:
    return math.hypot(one.x - other.x, one.y - other.y)


def _agreement(old: dict[float, TrackPoint], new: Sequence[TrackPoint], settings: JoinSettings) -> float:
    """Mean closeness of two tracks over the times at which either has a point; 0..1."""
    times = {*old, *(point.time for point in new)}
    close = [max(0.0, 1 - _distance(old[p.time], p) / settings.max_distance) for p in new if p.time in old]
    return sum(close) / len(times) if times else 0.0


def _return_confidence(owner: _Open, point: TrackPoint, settings: JoinSettings) -> float:
    """How well a point fits a track that ended before it; 0..1."""
    gap = point.time - owner.last
    if gap >= settings.max_gap_seconds:
        return 0.0
    distance = min(_distance(place, point) for place in (owner.points[-1], _extrapolated(owner.points, point.time)))
    return max(0.0, 1 - distance / settings.reach) * (1 - gap / settings.max_gap_seconds)


def _extrapolated(points: Sequence[TrackPoint], time: float) -> TrackPoint:
    """Where the motion between the last two points leads; inside the frame, whose edge is where things return."""
    last = points[-1]
    if len(points) < 2:
        return last
    before = points[-2]
    steps = (time - last.time) / (last.time - before.time)
    x, y = last.x + steps * (last.x - before.x), last.y + steps * (last.y - before.y)
    return TrackPoint(time, min(1.0, max(0.0, x)), min(1.0, max(0.0, y)))


def _best_pairs(scores: Sequence[Sequence[float]], least: float) -> list[tuple[int, int]]:
    """Pairs (row, column) with the best sum of scores, without those below `least`."""
    if not scores or not scores[0]:
        return []
    usable = [[score if score >= least else 0.0 for score in row] for row in scores]
    pairs = assign([[-score for score in row] for row in usable])
    return [(row, column) for row, column in pairs if usable[row][column] > 0]


# --- as answers ------------------------------------------------------------------------------------------------------


def as_grounding(tracks: Iterable[LongTrack], video: "LongVideo | None" = None) -> Grounding:
    """Tracks as an answer, for `annotate_video`, `export_grounding` and whatever else takes one.

    Args:
        tracks: Of `stitch` or `track_long`.
        video: Where they are from: gives pixels, and places in the file.
    """
    made = []
    for track in tracks:
        points = tuple(_as_point(track, point, video) for point in track.points)
        made.append(Track(track.id, track.label, points))
    media = MediaInfo(VIDEO) if video is None else MediaInfo(VIDEO, (video.size,))
    every = tuple(point for track in made for point in track.points)
    return Grounding("", VIDEO, every, tuple(made), (), None, False, False, media)


def _as_point(track: LongTrack, point: TrackPoint, video: "LongVideo | None") -> Point:
    return Point(
        tag="tracks",
        label=track.label,
        alt=None,
        key=point.time,
        id=track.id,
        x=None if video is None else point.x * video.size[0],
        y=None if video is None else point.y * video.size[1],
        x_norm=point.x,
        y_norm=point.y,
        image_index=None,
        frame=None if video is None else video.sampled_frame(point.time),
        span=(0, 0),
    )
