"""Frame sampling: the times or frame indices at which the model sees a video.

Two entry points, because training treated two kinds of input differently:

- `sample_times`: a *file* is sampled in time. The result is in seconds; each stands for the frame on display then.
- `sample_indices`: an *array of frames* is sampled by frame index, with a nominal frame rate.

Pure numpy: numbers in, arrays out. Source of the rules: the training-time preprocessing of Molmo2.
"""

import math
from dataclasses import dataclass

import numpy as np

from molmo2.values import is_positive

UNIFORM_LAST_FRAME = "uniform_last_frame"
FPS = "fps"
FRAME_SAMPLE_MODES = (UNIFORM_LAST_FRAME, FPS)

MIN_SAMPLING_FPS = 1e-5
MAX_SAMPLED_FRAMES = 10_000_000
MAX_CANDIDATE_FPS = 8  # up to which the `fps` mode raises the sampling rate of short videos
# 29.97 is meant as 30, 23.976 as 24: these broadcast rates are a factor of 1000/1001 slower than their name.
NOMINAL_FPS_TOLERANCE = 0.0015


@dataclass(frozen=True)
class SamplingSettings:
    """Options of frame sampling, see `Molmo2VideoProcessorKwargs`; named as in `video_preprocessor_config.json`.

    Raises:
        ValueError: a value is not usable; the message names it.
    """

    num_frames: int
    frame_sample_mode: str = UNIFORM_LAST_FRAME
    max_fps: float | None = None
    sampling_fps: int | float = 2

    def __post_init__(self) -> None:
        if self.frame_sample_mode not in FRAME_SAMPLE_MODES:
            raise ValueError(
                f"Unknown frame_sample_mode {self.frame_sample_mode!r}. Use one of {', '.join(FRAME_SAMPLE_MODES)}."
            )
        if not is_positive(self.num_frames) or int(self.num_frames) != self.num_frames:
            raise ValueError(
                f"num_frames is {self.num_frames!r}, but a video needs a whole number of frames, 1 or more."
            )
        object.__setattr__(self, "num_frames", int(self.num_frames))
        if self.max_fps is not None and not is_positive(self.max_fps):
            raise ValueError(
                f"max_fps is {self.max_fps!r}, but it has to be a positive number. Pass max_fps=None for no limit."
            )
        if not is_positive(self.sampling_fps) or self.sampling_fps < MIN_SAMPLING_FPS:
            raise ValueError(
                f"sampling_fps is {self.sampling_fps!r}, but it has to be at least {MIN_SAMPLING_FPS}, a frame a day."
            )


def sample_times(duration_seconds: float, video_fps: float | None, settings: SamplingSettings) -> np.ndarray:
    """Sampled times of a video file, in seconds from its first frame.

    `uniform_last_frame` spreads `num_frames` times evenly over the video, both ends included. With `max_fps`, a
    video short enough to be covered at that rate is sampled every 1/max_fps seconds, plus its end. `fps` samples the
    video at the highest rate of `_candidate_rates` at which it fits.

    Example: 1.2 seconds at max_fps=2 give 0.0, 0.5, 1.0, 1.2.

    Args:
        duration_seconds: end of the last frame minus start of the first.
        video_fps: average frame rate; only the `fps` mode needs it.

    Returns:
        (F,) float64, ascending, 1 <= F <= num_frames. The last one of `uniform_last_frame` is the duration itself
        (unless `num_frames` is 1), when the last frame is on display.

    Raises:
        ValueError: the duration is not a finite number >= 0, the `fps` mode has no usable frame rate, or more than
            `MAX_SAMPLED_FRAMES` would be sampled.
    """
    if not math.isfinite(duration_seconds) or duration_seconds < 0:
        raise ValueError(f"The duration of the video is {duration_seconds!r} seconds; expected a finite number >= 0.")
    if settings.frame_sample_mode == FPS:
        return _times_at_rate(duration_seconds, require_fps(video_fps), settings)
    if duration_seconds == 0:
        return np.zeros(1)
    max_fps = settings.max_fps
    if max_fps is None or (settings.num_frames - 1) / max_fps < duration_seconds:
        return np.linspace(0, duration_seconds, num=_limited(math.inf, settings), endpoint=True, dtype=np.float64)
    _limited(duration_seconds * max_fps, settings)
    steps = np.arange(0.0, duration_seconds, step=1 / max_fps)
    # Rounding of 1/max_fps can yield one step too many, within a rounding error of the end.
    return np.append(steps[: settings.num_frames - 1], float(duration_seconds))


def sample_indices(total_num_frames: int, fps: float | None, settings: SamplingSettings) -> np.ndarray:
    """Indices of the sampled frames of a video that is given as an array; their times are index / fps.

    Examples: 37 frames at 10 fps with max_fps=2 give 0, 5, 10, ... 35 and 36, the last one. In `fps` mode a rate has
    to give more frames than the one below it: 8 frames at 24 fps give 0 and 4, as 8 per second would give no more
    (whole) steps than 6.

    Args:
        total_num_frames: frames in the array.
        fps: frame rate of the array.

    Returns:
        (F,) int64, ascending, 1 <= F <= num_frames. A frame may repeat where max_fps is above `fps`, as in training.

    Raises:
        ValueError: there is no frame, `fps` is missing or not a positive number, or more than `MAX_SAMPLED_FRAMES`
            would be sampled.
    """
    if total_num_frames < 1:
        raise ValueError(f"The video has {total_num_frames} frames; expected at least one.")
    fps = require_fps(fps)
    if settings.frame_sample_mode == FPS:
        return _indices_at_rate(total_num_frames, fps, settings)
    return _uniform_indices(total_num_frames, fps, settings)


def require_fps(fps: float | None) -> float:
    """The frame rate as a float, or an error that says how to pass one."""
    if not is_positive(fps):
        raise ValueError(
            f"The video has no usable frame rate (fps is {fps!r}), so the times of its frames are unknown. Pass the "
            'rate with the frames: video_metadata={"fps": 30.0}, or the times in seconds of all frames: '
            'video_metadata={"timestamps": [0.0, 0.5]}.'
        )
    return float(fps)


def _limited(count: float, settings: SamplingSettings) -> int:
    """So many frames, or `num_frames` if these are fewer; an error for more than a list of times should hold."""
    num_frames = min(count, settings.num_frames)
    if num_frames > MAX_SAMPLED_FRAMES:
        raise ValueError(
            f"num_frames is {settings.num_frames:,}, and {num_frames:,.0f} frames would be sampled. Use at most "
            f"{MAX_SAMPLED_FRAMES:,}, or limit the rate."
        )
    return int(num_frames)


def _uniform_indices(total_num_frames: int, fps: float, settings: SamplingSettings) -> np.ndarray:
    last = total_num_frames - 1
    num_frames, max_fps = settings.num_frames, settings.max_fps
    if max_fps is not None and total_num_frames <= 2 and total_num_frames <= num_frames:
        return np.arange(total_num_frames, dtype=np.int64)
    if max_fps is None or total_num_frames / fps > (num_frames - 1) / max_fps:
        spread = np.linspace(0, last, num=_limited(total_num_frames, settings), endpoint=True)
        return spread.astype(np.int64)
    _limited(last * max_fps / fps, settings)
    indices = np.round(np.arange(0.0, last, step=fps / max_fps)).astype(np.int64)
    if indices[-1] != last:
        indices = np.append(indices, last)
    return indices


def _times_at_rate(duration_seconds: float, fps: float, settings: SamplingSettings) -> np.ndarray:
    """The `fps` mode in time: the highest candidate rate at which the whole video fits into `num_frames`."""
    rate, *higher_rates = _candidate_rates(fps, settings.sampling_fps)
    for candidate in higher_rates:
        if settings.num_frames / candidate >= duration_seconds:
            rate = candidate
    times = np.arange(_limited(duration_seconds * rate + 2, settings), dtype=np.float64) / rate
    return times[: max(1, int(np.count_nonzero(times < duration_seconds)))]


def _indices_at_rate(total_num_frames: int, fps: float, settings: SamplingSettings) -> np.ndarray:
    """The `fps` mode on frame indices: a higher candidate rate has to give more frames, and they have to fit.

    The frames that training counted are whole steps, so a video shorter than the step counts as 0 frames; from such a
    rate the next one is taken whatever it gives.
    """
    whole_fps = _whole_fps(fps, settings.sampling_fps)
    rates = _candidate_rates(fps, settings.sampling_fps)
    if whole_fps is None:  # no rate divides this video: take the frame on display at each sampled time
        fitting = _limited(total_num_frames * rates[0] / fps + 2, settings)
        displayed = np.floor(np.arange(fitting) * (fps / rates[0]) + 1e-6).astype(np.int64)
        return displayed[displayed < total_num_frames]
    step, *smaller_steps = (max(1, round(whole_fps / rate)) for rate in rates)
    for candidate in smaller_steps:
        count, candidate_count = total_num_frames // step, total_num_frames // candidate
        if count == 0 or count < candidate_count <= settings.num_frames:
            step = candidate
    return np.arange(_limited(math.ceil(total_num_frames / step), settings), dtype=np.int64) * step


def _candidate_rates(fps: float, sampling_fps: float) -> list[float]:
    """Sampling rates of the `fps` mode, ascending: multiples of sampling_fps up to 8 that divide the whole frame rate.

    The first, sampling_fps itself, is the one to use where no higher one fits. Training truncated the frame rate to an
    integer and could not use a video whose truncated rate was not a multiple of sampling_fps. For those `_whole_fps`
    tries the nominal rate (29.97 counts as 30, 23.976 as 24); where that fails as well (25 or 7.5 with sampling_fps=2,
    or less than 1 frame per second) the only candidate is sampling_fps, or the video's own rate if that is lower.
    """
    lowest = min(float(sampling_fps), fps)
    whole_fps = _whole_fps(fps, sampling_fps)
    if whole_fps is None:
        return [lowest]
    multiples = (k * sampling_fps for k in range(2, int(MAX_CANDIDATE_FPS / sampling_fps) + 1))
    return [lowest, *(rate for rate in multiples if _divides(rate, whole_fps))]


def _whole_fps(fps: float, sampling_fps: float) -> int | None:
    """The integer that stands for the frame rate and that sampling_fps divides; None if there is none."""
    nominal = round(fps)
    readings = [int(fps)]  # truncated, as in training
    if nominal >= 1 and abs(fps - nominal) <= NOMINAL_FPS_TOLERANCE * nominal:
        readings.append(nominal)
    for whole_fps in readings:
        if whole_fps >= 1 and _divides(sampling_fps, whole_fps):
            return whole_fps
    return None


def _divides(rate: float, whole_fps: int) -> bool:
    frames = whole_fps / rate
    return frames >= 1 and abs(frames - round(frames)) < 1e-6
