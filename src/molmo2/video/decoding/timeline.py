"""Timeline of a video: when each frame is on display, the same for every decoder.

Times come from the frames themselves, never from the header of the file. Decoders report them with different
precision; a constant frame rate is recognised and its times are computed exactly, so that all decide ties alike.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from molmo2.values import is_positive

# Headers average a variable rate over the frames less one, or over the duration of the file; some only guess.
DECLARED_RATE_TOLERANCE = 0.25
# Frame times this close to a constant frame rate are taken to be exactly at that rate.
CONSTANT_RATE_TOLERANCE_SECONDS = 1e-4
# Ticks per second of common containers, to undo the float32 rounding of time stamps (coarsest first).
COMMON_TICK_RATES = (600, 1000, 10240, 12288, 12800, 15360, 16000, 24000, 30000, 60000, 90000)
FLOAT32_RELATIVE_ERROR = 2.0**-23
BLOCK_FRAMES = 1 << 13  # whose times are computed at a time


class VideoDecodeError(ValueError):
    """A video, or a frame of it, cannot be read. The message names the file, the backend and the `reason`.

    `index` is that of the frame where decord's process says so, and None otherwise.
    """

    def __init__(self, message: str, reason: str | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason
        self.index = index


def brief(problem: object) -> str:
    """The first line of an exception or text, shortened, without the stack traces and C++ source lines of decoders."""
    lines = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ?", "", str(problem)).strip().splitlines()
    text = lines[0][:200] if lines else ""
    return f"{type(problem).__name__}: {text}" if isinstance(problem, BaseException) else text


@dataclass(frozen=True)
class VideoTimeline:
    """Start times and size of the frames of a video.

    Attributes:
        start_seconds: (N,) float64, ascending: start of each frame, from that of the first.
        duration_seconds: end of the last frame minus start of the first.
        fps: average frames per second.
        height, width: size of the upright frames, in pixels.
        first_timestamp_seconds: the file's own time of the first frame; None if the backend does not report it.
    """

    start_seconds: np.ndarray
    duration_seconds: float
    fps: float
    height: int
    width: int
    first_timestamp_seconds: float | None = None

    @property
    def num_frames(self) -> int:
        return len(self.start_seconds)

    def frames_at(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """Index of the frame on display at each time: the last one that has started.

        Args:
            times: seconds since the first frame; at or after the end the last frame is on display.

        Returns:
            int64 indices, one per time.
        """
        started = np.searchsorted(self.start_seconds, np.asarray(times, dtype=np.float64), side="right")
        return np.clip(started - 1, 0, self.num_frames - 1).astype(np.int64)


def make_timeline(
    starts: np.ndarray,
    end_seconds: float,
    declared_fps: float | None,
    size: tuple[int, int],
    first_timestamp_seconds: float | None = None,
) -> VideoTimeline:
    """The timeline of frames that start at `starts` (seconds, counted from the first frame).

    Backends round: decord to float32, containers to their tick. A constant rate is recognised and its times computed
    exactly, so that "exactly at the start of a frame" means the same for every backend.

    Args:
        starts: they become those of the timeline, and are changed in place: hours have a million.
        end_seconds: end of the last frame.
        declared_fps: the rate in the header; None if it has none.
        size: (height, width) of the frames.
        first_timestamp_seconds: the file's own time of the first frame.

    Raises:
        VideoDecodeError: the times are not ascending from 0.
    """
    starts = np.asarray(starts, dtype=np.float64)
    if starts[0] != 0 or not end_seconds >= starts[-1] or not np.isfinite(end_seconds) or not is_ascending(starts):
        raise VideoDecodeError(
            f"its frame times are unusable: first {starts[0]:.6g}, last {starts[-1]:.6g}, end {end_seconds:.6g} s"
        )
    for rate in _likely_rates(starts, declared_fps):
        # The last frame may be held longer than the others: its end is not asked.
        if all(_is_close(starts[block], rate, block.start).all() for block in frame_blocks(len(starts))):
            for block in frame_blocks(len(starts)):
                starts[block] = _ideal_times(rate, block.start, block.stop)
            end = np.array([end_seconds])
            if _is_close(end, rate, len(starts)).all():
                end_seconds = float(_ideal_times(rate, len(starts), len(starts) + 1)[0])
            break
    return VideoTimeline(
        start_seconds=starts,
        duration_seconds=float(end_seconds),
        fps=_average_fps(len(starts), float(end_seconds), declared_fps),
        height=size[0],
        width=size[1],
        first_timestamp_seconds=first_timestamp_seconds,
    )


def frame_blocks(count: int) -> Iterator[slice]:
    """Places 0 to `count` in pieces, so that what is computed of them never takes the memory of all."""
    for start in range(0, count, BLOCK_FRAMES):
        yield slice(start, min(start + BLOCK_FRAMES, count))


def is_ascending(values: np.ndarray) -> bool:
    """Whether each value is larger than the one before it."""
    later, earlier = values[1:], values[:-1]
    return all(bool(np.all(later[block] > earlier[block])) for block in frame_blocks(len(later)))


def _ideal_times(rate: Fraction, first: int, stop: int) -> np.ndarray:
    """Starts of the frames `first` to `stop` at a constant rate, in seconds."""
    return np.arange(first, stop, dtype=np.float64) * rate.denominator / rate.numerator


def _is_close(times: np.ndarray, rate: Fraction, first: int) -> np.ndarray:
    """Which times, of the frames from `first` on, are those of a constant rate."""
    return np.abs(times - _ideal_times(rate, first, first + len(times))) <= CONSTANT_RATE_TOLERANCE_SECONDS


def _likely_rates(starts: np.ndarray, declared_fps: float | None) -> list[Fraction]:
    """Frame rates to try, as fractions like 30000/1001: the declared one, then the measured one."""
    rates = [declared_fps] if is_positive(declared_fps) else []
    if len(starts) > 1:
        rates.append((len(starts) - 1) / starts[-1])
    fractions = [Fraction(rate).limit_denominator(1001) for rate in rates]
    return [fraction for fraction in fractions if fraction > 0]


def _average_fps(num_frames: int, duration_seconds: float, declared_fps: float | None) -> float:
    """The declared rate, as in the original, unless it is far from that of the frame times."""
    if is_positive(declared_fps) and abs(declared_fps * duration_seconds / num_frames - 1) <= DECLARED_RATE_TOLERANCE:
        return float(declared_fps)
    if duration_seconds > 0:
        return num_frames / duration_seconds
    return float(declared_fps) if is_positive(declared_fps) else 1.0


def undo_rounding(times: np.ndarray) -> np.ndarray:
    """Times that were rounded to float32, moved back to the ticks of their container if one fits."""
    tolerance = FLOAT32_RELATIVE_ERROR * max(1.0, float(np.max(np.abs(times))))
    for ticks_per_second in COMMON_TICK_RATES:
        on_ticks = np.round(times * ticks_per_second) / ticks_per_second
        if tolerance * ticks_per_second < 0.25 and np.all(np.abs(on_ticks - times) <= tolerance):
            return on_ticks
    return times
