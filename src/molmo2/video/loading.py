"""Loading of videos: files, URLs, bytes, arrays and lists of images become frames with times.

Two kinds of input are sampled differently, as in training: an encoded video (path, URL, bytes, open file) in time, a
decoded one (array, tensor, list of images) by frame index. Frames are passed on one at a time, so that a long video at
full resolution is never in memory.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from molmo2.image.limits import MediaLimits
from molmo2.image.loading import (
    is_encoded,
    is_stored_file,
    load_images,
    named_file,
    original_size,
    stored_file,
)
from molmo2.image.suffixes import FRAME_SUFFIXES
from molmo2.video.decoding.backends import Result, decode_video
from molmo2.video.decoding.readers import Source, VideoReader
from molmo2.video.decoding.timeline import VideoTimeline
from molmo2.video.sampling import SamplingSettings, require_fps, sample_indices, sample_times

FrameConsumer = Callable[[Iterator[np.ndarray], int], Result]  # (frames, their number) -> result

logger = logging.get_logger(__name__)

MAX_FRAME_INDEX = 1 << 53  # up to which floating point tells one from the next
DEFAULT_FPS = 24.0  # of frames without a rate, as processors of transformers assume
ACCEPTED_VIDEOS = (
    "a path, a URL (http, https, file, data), base64 text, the bytes of a video file or an open one, a row {'bytes', "
    "'path'} of an undecoded column, an array or tensor of frames, a list of images, or a pair (frames, metadata)"
)


class SampledVideoMetadata(VideoMetadata):
    """The library's `VideoMetadata` of a sampled video, with the times and sources of its frames.

    As in the original processor, `frames_indices / fps` are the sampled times, so of a file `frames_indices` may be
    fractions. The frames really shown are in the attributes below, one entry per sampled frame.

    Attributes:
        sampled_timestamps: sampled times in seconds; these are printed in the prompt.
        source_frame_indices: index of the frame shown, in the whole video.
        source_timestamps: when that frame begins, in seconds from the first frame of the whole video.
        source_first_timestamp: the file's own time of its first frame, in seconds; None where the decoder or the kind
            of input does not tell.
        frame_size: (height, width) of frames that were passed decoded; `height` and `width` are those of the metadata.
    """

    sampled_timestamps: list[float] | None = None
    source_frame_indices: list[int] | None = None
    source_timestamps: list[float] | None = None
    source_first_timestamp: float | None = None
    frame_size: tuple[int, int] | None = None

    @property
    def timestamps(self) -> list[float]:
        """Times of the sampled frames in seconds, as printed in the prompt."""
        return super().timestamps if self.sampled_timestamps is None else self.sampled_timestamps


@dataclass(frozen=True)
class VideoItem:
    """One video of a call: `where` names it in errors, `metadata` is what the caller passed with it, empty without."""

    where: str
    video: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadingOptions:
    """Options of reading one video, see `Molmo2VideoProcessorKwargs`.

    Attributes:
        input_data_format: "channels_last" or "channels_first", for arrays that could be either.
        sample_timestamps_fn, sample_indices_fn: see `Molmo2VideoProcessor.fetch_videos`.
    """

    sampling: SamplingSettings
    do_sample_frames: bool = True
    clip: tuple[float, float | None] | None = None
    backend: str | None = None
    input_data_format: str | None = None
    sample_timestamps_fn: Callable[..., Any] | None = None
    sample_indices_fn: Callable[..., Any] | None = None
    limits: MediaLimits = field(default_factory=MediaLimits)


def list_videos(videos: Any, video_metadata: Any = None) -> list[VideoItem]:
    """The videos of a call in order, nested lists flattened, each with its metadata.

    Args:
        videos: one video or a (nested) list of them, see `ACCEPTED_VIDEOS`. Arrays and tensors are (T, H, W, C) or
            (T, C, H, W), the images of a list PIL's, arrays or paths of image files.
        video_metadata: a dict or `VideoMetadata` per video, nested or flat; None if there is none.

    Raises:
        TypeError: an item is no video.
        ValueError: the number of metadata differs from the number of videos.
    """
    items = list(_flatten(videos, "videos"))
    metadata = list(_flat_metadata(video_metadata))
    if not any(entry is not None for entry in metadata):
        return items
    if len(metadata) != len(items):
        raise ValueError(
            f"There are {len(items)} video(s) but {len(metadata)} entries in video_metadata. Pass one per video, or "
            "None for a video without."
        )
    return [
        item if entry is None else replace(item, metadata=entry) for item, entry in zip(items, metadata, strict=True)
    ]


def is_one_video(value: Any) -> bool:
    """True for a video, False for a list or batch of them and for anything else."""
    return (
        is_encoded(value)
        or is_stored_file(value)
        or has_metadata(value)
        or _num_axes(value) == 4
        or _is_list_of_frames(value)
    )


def read_video(
    item: VideoItem, options: ReadingOptions, consume: FrameConsumer[Result]
) -> tuple[Result, SampledVideoMetadata]:
    """The result of `consume` on the sampled frames of a video, and their metadata.

    Args:
        item: the video.
        options: how to sample and decode it.
        consume: called with an iterator of (H, W, 3) RGB arrays and their number; reads it to its end. If a decoder
            fails before that, it is called again with the frames of another one.

    Returns:
        The result of `consume`, and the metadata with the sampled times.

    Raises:
        FileNotFoundError, TypeError, ValueError: the video cannot be read or an option does not fit it.
    """
    if not is_encoded(item.video):
        return _read_frames(item, options, consume)

    def read(reader: VideoReader) -> tuple[Result, SampledVideoMetadata]:
        with reader:
            timeline = reader.timeline
            metadata = SampledVideoMetadata(
                total_num_frames=timeline.num_frames,
                fps=timeline.fps,
                width=timeline.width,
                height=timeline.height,
                duration=timeline.duration_seconds,
                video_backend=reader.backend,
            )
            times = file_times(item, timeline, metadata, options)
            indices = timeline.frames_at(times)
            metadata.frames_indices = (times * timeline.fps).tolist()
            metadata.sampled_timestamps = times.tolist()
            metadata.source_frame_indices = indices.tolist()
            metadata.source_timestamps = timeline.start_seconds[indices].tolist()
            metadata.source_first_timestamp = timeline.first_timestamp_seconds
            return consume(reader.frames(indices), len(indices)), metadata

    return decode_video(video_source(item, options.limits), read, options.backend)


# --- times of a file -------------------------------------------------------------------------------------------------


def file_times(
    item: VideoItem, timeline: VideoTimeline, metadata: VideoMetadata, options: ReadingOptions
) -> np.ndarray:
    """Sampled times in seconds from the first frame, float64."""
    if options.sample_indices_fn is not None:
        indices = np.asarray(options.sample_indices_fn(metadata=metadata), dtype=np.int64).reshape(-1)
        return timeline.start_seconds[np.clip(indices, 0, timeline.num_frames - 1)]
    if options.sample_timestamps_fn is not None:
        times = np.asarray(options.sample_timestamps_fn(metadata=metadata), dtype=np.float64).reshape(-1)
        if not times.size or not np.all(np.isfinite(times)) or np.any(times < 0):
            raise ValueError(
                f"sample_timestamps_fn returned {times.tolist()} for {item.where}; expected seconds >= 0."
            )
        return times
    start, end = _clip_within(item, options.clip, timeline.duration_seconds)
    return start + sample_times(end - start, timeline.fps, options.sampling)


def _clip_within(
    item: VideoItem, clip: tuple[float, float | None] | None, duration_seconds: float
) -> tuple[float, float]:
    """Start and end of the part to sample, in seconds."""
    if clip is None:
        return 0.0, duration_seconds
    start, end = clip
    if start > 0 and start >= duration_seconds:
        raise ValueError(
            f"The clip of {item.where} starts at {start} s, but the video is {duration_seconds:.3f} s long. "
            "Pass clip=(start_seconds, end_seconds) inside the video."
        )
    return start, duration_seconds if end is None else min(end, duration_seconds)


def video_source(item: VideoItem, limits: MediaLimits) -> Source:
    """The video as decoders take it; URLs are downloaded."""
    if not isinstance(item.video, (str, os.PathLike)):
        return Source.from_input(item.video, limits)
    name, file = named_file(item.video, item.where, limits)
    if isinstance(file, (Path, bytes)):
        return Source.from_input(file, limits, name=name)
    with file:
        return Source.from_input(file, limits, name=name)


# --- frames ----------------------------------------------------------------------------------------------------------


def _read_frames(
    item: VideoItem, options: ReadingOptions, consume: FrameConsumer[Result]
) -> tuple[Result, SampledVideoMetadata]:
    """`read_video` of decoded frames."""
    frames, given = item.video, item.metadata
    if not len(frames):
        raise ValueError(f"{item.where} has no frames. Pass at least one.")
    times = _frame_times(item, len(frames), options.do_sample_frames)
    if options.do_sample_frames and not _is_sampled(given, len(frames)):
        chosen = _chosen_frames(item, times, options)
    else:
        chosen = np.arange(len(frames))
    about = {name: given.get(name) for name in ("width", "height", "duration", "video_backend")}
    metadata = SampledVideoMetadata(total_num_frames=_total_num_frames(item), fps=times.fps, **about)
    first = int(chosen[0])
    metadata.frame_size = original_size(_rgb_frame(item, frames[first], first, options))
    metadata.sampled_timestamps = times.seconds[chosen].tolist()
    metadata.source_first_timestamp = getattr(given, "source_first_timestamp", None)
    metadata.frames_indices = times.positions[chosen].tolist()
    for name in ("source_frame_indices", "source_timestamps"):  # known if the frames come from `fetch_videos`
        of_source = getattr(given, name, None)
        of_frames = times.indices if name == "source_frame_indices" else times.seconds
        setattr(metadata, name, np.asarray(of_frames if of_source is None else of_source)[chosen].tolist())
    rgb_frames = (_rgb_frame(item, frames[index], index, options) for index in chosen.tolist())
    return consume(rgb_frames, len(chosen)), metadata


@dataclass(frozen=True)
class _FrameTimes:
    """Index in the source and time of each frame; `positions` are the times in frames, as in `frames_indices`."""

    indices: np.ndarray
    seconds: np.ndarray
    fps: float
    positions: np.ndarray


def _frame_times(item: VideoItem, num_frames: int, are_all: bool) -> _FrameTimes:
    """Times of the passed frames; `are_all` if they are the whole video unless the metadata says otherwise."""
    given = item.metadata
    fps = given.get("fps")
    stamps = getattr(given, "sampled_timestamps", None)
    if stamps is None and not isinstance(given, VideoMetadata):  # there it is computed from fps
        stamps = given.get("timestamps")
    indices = given.get("frames_indices")
    if indices is not None and len(indices) != num_frames and not are_all:
        raise ValueError(
            f"{item.where} has {num_frames} frames, but its metadata lists {len(indices)} frames_indices. Pass one "
            "index per frame, or leave them out."
        )
    if indices is None or len(indices) != num_frames or all(index is None for index in indices):
        indices = range(num_frames)  # where there are some, they are those of an earlier sampling
    positions = np.asarray(indices)
    if positions.dtype.kind not in "iuf" or not np.all(np.abs(positions) <= MAX_FRAME_INDEX):
        raise ValueError(f"The frames_indices of {item.where} have to be finite numbers; found {list(indices)[:8]}.")
    indices = np.floor(positions + 1e-6).astype(np.int64)  # of a file they may be fractions: which frame is shown then
    seconds = None if stamps is None else np.asarray(stamps, dtype=np.float64).reshape(-1)
    if seconds is not None:
        if len(seconds) != num_frames or not np.all(np.isfinite(seconds)) or np.any(np.diff(seconds) < 0):
            raise ValueError(
                f"The timestamps of {item.where} have to be {num_frames} ascending seconds, one per frame; found "
                f"{len(seconds)}: {seconds[:8].tolist()}."
            )
        span = seconds[-1] - seconds[0]
        fps = ((num_frames - 1) / span if span > 0 else 1.0) if fps is None else fps
    elif fps is None:
        logger.warning_once(
            f"{item.where} has no frame rate: its times in the prompt assume {DEFAULT_FPS:.0f} frames per second. "
            'Pass the rate, video_metadata={"fps": 30.0}, or times in seconds, {"timestamps": [0.0, 0.5]}.'
        )
        fps = DEFAULT_FPS
    try:
        fps = require_fps(fps)
    except ValueError as error:
        raise ValueError(f"{item.where}: {error}") from None
    if seconds is None:
        return _FrameTimes(indices, positions / fps, fps, positions)
    return _FrameTimes(indices, seconds, fps, seconds * fps)


def _is_sampled(given: Mapping[str, Any], num_frames: int) -> bool:
    """True if the frames were sampled from a longer video before, by their metadata."""
    indices, total = given.get("frames_indices"), given.get("total_num_frames")
    if indices is None or len(indices) != num_frames:
        return False
    if getattr(given, "sampled_timestamps", None) is not None:
        return True
    return list(indices) != list(range(num_frames)) if total is None else total != num_frames


def _chosen_frames(item: VideoItem, times: _FrameTimes, options: ReadingOptions) -> np.ndarray:
    """Indices of the sampled frames among the passed ones."""
    num_frames, total = len(item.video), _total_num_frames(item)
    if not 1 <= total <= num_frames:
        raise ValueError(
            f"The metadata of {item.where} says total_num_frames={total}, but {num_frames} frames were passed. Pass "
            "all frames, or correct the number; for frames that were sampled before, pass do_sample_frames=False and "
            "their frames_indices."
        )
    if options.clip is None:
        return sample_indices(total, times.fps, options.sampling)
    seconds = times.seconds[:total]
    start, end = _clip_within(item, options.clip, float(seconds[-1]) + 1 / times.fps)
    first, last = np.clip(np.searchsorted(seconds, [start, end], side="right") - 1, 0, total - 1).tolist()
    return first + sample_indices(last - first + 1, times.fps, options.sampling)


def _total_num_frames(item: VideoItem) -> int:
    """Frames of the whole video by the metadata, else those that were passed."""
    total = item.metadata.get("total_num_frames")
    return len(item.video) if total is None else total


def _rgb_frame(item: VideoItem, frame: Any, index: int, options: ReadingOptions) -> np.ndarray:
    """(H, W, 3); errors name the frame."""
    try:
        (image,) = load_images(frame, input_data_format=options.input_data_format, limits=options.limits)
    except (OSError, TypeError, ValueError) as error:
        raise type(error)(f"Frame {index} of {item.where}: {error}") from error
    return image


# --- finding the videos ----------------------------------------------------------------------------------------------


def _flatten(videos: Any, where: str) -> Iterator[VideoItem]:
    """The videos of a nested list in order, not yet with the metadata of the call."""
    if has_metadata(videos):
        yield VideoItem(where, stored_file(videos[0]), videos[1])
    elif is_one_video(videos):
        is_path_list = isinstance(videos, (list, tuple)) and _are_image_paths(videos)
        yield VideoItem(f"{where} ({os.fspath(videos[0])!r}, ...)" if is_path_list else where, stored_file(videos))
    elif isinstance(videos, (list, tuple)) or _num_axes(videos) == 5:
        for index, video in enumerate(videos):
            yield from _flatten(video, f"{where}[{index}]")
    else:
        shape = f" of shape {tuple(videos.shape)}" if _num_axes(videos) else ""
        raise TypeError(f"{where} is a {type(videos).__name__}{shape}, which is no video. Pass {ACCEPTED_VIDEOS}.")


def has_metadata(value: Any) -> bool:
    """True for a pair (video, metadata)."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return is_pair and isinstance(value[1], Mapping) and not is_stored_file(value[1])


def _num_axes(value: Any) -> int:
    """Axes of an array or tensor; 0 for anything else."""
    return len(value.shape) if hasattr(value, "shape") and hasattr(value, "__array__") else 0


def _is_list_of_frames(value: Any) -> bool:
    """True for a list of images, arrays of images or paths of images."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return _are_image_paths(value) or all(
        isinstance(frame, Image.Image) or _num_axes(frame) in (2, 3) for frame in value
    )


def _are_image_paths(values: Any) -> bool:
    """True for several paths of image files; a single one is more likely a mix-up of images and videos."""
    return len(values) > 1 and all(
        isinstance(value, (str, os.PathLike)) and os.fspath(value).lower().endswith(FRAME_SUFFIXES) for value in values
    )


def _flat_metadata(metadata: Any) -> Iterator[Mapping[str, Any] | None]:
    """The entries of nested metadata in order."""
    if metadata is None or isinstance(metadata, Mapping):
        yield metadata
    elif isinstance(metadata, Sequence) and not isinstance(metadata, str):
        for entry in metadata:
            yield from _flat_metadata(entry)
    else:
        raise TypeError(
            f"video_metadata has an entry of type {type(metadata).__name__}. Pass a dict such as "
            '{"fps": 30.0} or a VideoMetadata per video.'
        )
