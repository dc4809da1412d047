"""Long videos as windows of frames: files that are opened and indexed once, and live frames.

    with LongVideo("day.mp4", window=30.0, overlap=4.0, fps=2.0) as video:
        for clip in video.clips():
            clip.window, clip.times, clip.video  # `clip.video` goes to `ask`, or to the processor, as a video

A file is read from its start to its end. Frames are decoded when the processor takes them, and kept only if the next
window shows them too, so that memory does not grow with the video, nor with the window.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, overload

import numpy as np

from molmo2.grounding.parse import MediaInfo, SampledFrame, media_info
from molmo2.image.limits import MediaLimits, checked_limits
from molmo2.long_video.windows import Cutting, Window
from molmo2.video.decoding.opening import open_video
from molmo2.video.decoding.readers import VideoReader
from molmo2.video.loading import SampledVideoMetadata, VideoItem, video_source

SEEKING_BACKENDS = ("pyav", "torchcodec")  # decord decodes from the start for each window


@dataclass(frozen=True)
class Clip:
    """The frames of one window.

    Attributes:
        window: Its number, and those of its samples.
        times: Of its samples, in seconds of the whole video.
        frames: As many frames; those of a file are decoded when they are read.
        metadata: What the processor needs to know of them. Its times count from the start of the window, because the
            model was trained on clips and prints their times with one decimal.
        step: Seconds from a sample to the next.
    """

    window: Window
    times: tuple[float, ...]
    frames: Sequence[Any]
    metadata: SampledVideoMetadata
    step: float

    @property
    def video(self) -> tuple[Sequence[Any], SampledVideoMetadata]:
        """What `ask` and the processor accept as a video."""
        return self.frames, self.metadata

    @property
    def start(self) -> float:
        """Seconds of the whole video at which the window begins."""
        return self.times[0]

    @property
    def end(self) -> float:
        """Seconds of the whole video of its last sample."""
        return self.times[-1]

    @property
    def media(self) -> MediaInfo | None:
        """What answers are read against; `sampled_index` counts the samples of the window."""
        return media_info(self.metadata)


class LongVideo:
    """A video file, opened and indexed once, as windows that overlap; a context manager.

    Args:
        source: A path, URL, the bytes of a video file or an open one.
        window, overlap, fps: See `Cutting`.
        video_backend: "pyav" or "torchcodec" to use this decoder only; None tries them in this order.
        limits: What is refused of videos; see `MediaLimits`.

    Attributes:
        cutting: The windows.
        timeline: When each frame is on display.
        num_samples, num_windows: Of the whole video.

    Raises:
        FileNotFoundError, TypeError, MediaLimitError, VideoDecodeError: As of `open_video`.
        ValueError: The windows make no sense, or the decoder cannot seek.
    """

    origin_seconds = 0.0  # times count from the first frame

    def __init__(
        self,
        source: Any,
        window: float = 30.0,
        overlap: float = 4.0,
        fps: float = 2.0,
        *,
        video_backend: str | None = None,
        limits: MediaLimits | None = None,
    ):
        if video_backend is not None and video_backend not in SEEKING_BACKENDS:
            raise ValueError(
                f"`video_backend` is {video_backend!r}; long videos need a decoder that seeks: "
                f"{' or '.join(SEEKING_BACKENDS)}, or None to try both."
            )
        self.cutting = Cutting(window, overlap, fps)
        readable = video_source(VideoItem("the long video", source), checked_limits(limits))
        self._reader = open_video(readable, SEEKING_BACKENDS if video_backend is None else (video_backend,))
        self.timeline = self._reader.timeline
        self._num_bytes = readable.num_bytes
        self._store = _FrameStore(self._reader, self._shown_from)

    @property
    def num_samples(self) -> int:
        return self.cutting.num_samples(self.timeline.duration_seconds)

    @property
    def num_windows(self) -> int:
        return self.cutting.num_windows(self.num_samples)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the frames in pixels."""
        return self.timeline.width, self.timeline.height

    def __len__(self) -> int:
        return self.num_windows

    def clips(self, start: int = 0) -> Iterator[Clip]:
        """The windows in order, from the one with this number on. Read each before the next: they share a decoder."""
        for index in range(start, self.num_windows):
            yield self.clip(index)

    def clip(self, index: int) -> Clip:
        """One window.

        Raises:
            IndexError: There is no such window.
        """
        if not 0 <= index < self.num_windows:
            raise IndexError(f"Window {index} was asked for; the video has windows 0 to {self.num_windows - 1}.")
        window = self.cutting.window_at(index, self.num_samples)
        samples = np.arange(window.first, window.last + 1)
        times = samples / self.cutting.fps
        indices = self.timeline.frames_at(times)
        next_first = int(self.timeline.frames_at([self.cutting.seconds(window.first + self.cutting.step)])[0])
        metadata = _metadata(times, indices, self.timeline.start_seconds[indices], self.timeline.fps)
        metadata.total_num_frames = self.timeline.num_frames
        metadata.width, metadata.height = self.size
        metadata.duration = self.timeline.duration_seconds
        metadata.video_backend = self._reader.backend
        metadata.source_first_timestamp = self.timeline.first_timestamp_seconds
        frames = _WindowFrames(self._store, indices, next_first)
        return Clip(window, tuple(times.tolist()), frames, metadata, self.cutting.seconds(1))

    def identity(self) -> dict[str, Any]:
        """What tells this video, cut like this, from others; a journal remembers it. Its file may be moved."""
        frames = {"frames": self.timeline.num_frames, "duration": self.timeline.duration_seconds, "size": self.size}
        return {"bytes": self._num_bytes, **frames, **_cut_as(self.cutting)}

    def sampled_frame(self, time: float) -> SampledFrame:
        """The frame at a time of a result, with its place in the file."""
        (index,) = self.timeline.frames_at([time]).tolist()
        start = float(self.timeline.start_seconds[index])
        first = self.timeline.first_timestamp_seconds
        return SampledFrame(
            time, round(time * self.cutting.fps), index, start, None if first is None else first + start
        )

    def close(self) -> None:
        """Free the decoder and the file."""
        self._store.close()
        self._reader.close()

    def __enter__(self) -> "LongVideo":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shown_from(self, source_index: int) -> np.ndarray:
        """Indices of the frames that any window shows, from this one on; each once."""
        samples = np.arange(self.num_samples) / self.cutting.fps
        indices = np.unique(self.timeline.frames_at(samples))
        return indices[np.searchsorted(indices, source_index) :]


class LiveVideo:
    """Frames that arrive with their times, as windows that overlap.

    Sample n is the frame on display n / fps seconds after the first, so that a window is there as soon as a frame
    arrives that is later than its last sample. Frames between samples are dropped. All frames of a window are in
    memory until it is answered: `window` times `fps` of them, at their size.

    Args:
        frames: (seconds, frame) pairs, times ascending; a frame as the processor takes it (array, PIL image, tensor).
            Its memory must not be written again by the source.
        window, overlap, fps: See `Cutting`.
    """

    num_windows: int | None = None  # unknown until it ends

    def __init__(
        self, frames: Iterable[tuple[float, Any]], window: float = 30.0, overlap: float = 4.0, fps: float = 2.0
    ):
        self.cutting = Cutting(window, overlap, fps)
        self._frames = iter(frames)
        self._first: tuple[float, Any] | None = None
        self._began = False

    @property
    def origin_seconds(self) -> float:
        """The time of the first frame, for which it waits.

        Raises:
            ValueError: There is no frame.
        """
        if self._first is None:
            self._first = next(self._frames, None)
            if self._first is None:
                raise ValueError("The live video ended before its first frame.")
        return float(self._first[0])

    def clips(self, start: int = 0) -> Iterator[Clip]:
        """The windows in order, from the one with this number on; those before it are read past.

        Raises:
            ValueError: Times do not ascend; or the frames were read before, and a live source has them only once.
        """
        if self._began:
            raise ValueError("The frames of this LiveVideo were read before. Make a new one from a new iterator.")
        self._began = True
        buffer: list[_LiveSample] = []
        index, num_new = 0, 0
        for sample in self._samples():
            buffer.append(sample)
            num_new += 1
            if len(buffer) == self.cutting.size:
                if index >= start:
                    yield self._clip(index, buffer)
                index, num_new = index + 1, 0
                buffer = buffer[self.cutting.step :]
        if num_new and index >= start:
            yield self._clip(index, buffer)

    def identity(self) -> dict[str, Any]:
        """See `LongVideo.identity`."""
        return {"origin": self.origin_seconds, **_cut_as(self.cutting)}

    def close(self) -> None:
        """Does nothing: the frames belong to the caller."""

    def _samples(self) -> Iterator["_LiveSample"]:
        origin, number = self.origin_seconds, 0
        shown: _LiveSample | None = None
        first = self._first
        frames = self._frames if first is None else _chain(first, self._frames)
        for place, (time, frame) in enumerate(frames):
            since = float(time) - origin
            if not math.isfinite(since) or (shown is not None and since < shown.seconds):
                earlier = 0.0 if shown is None else shown.seconds
                raise ValueError(
                    f"Frame {place} of the live video is at {time!r} s, after one at {origin + earlier:g} s. Pass "
                    "finite times that ascend."
                )
            while shown is not None and self.cutting.seconds(number) < since - 1e-6:
                yield shown
                number += 1
            shown = _LiveSample(place, since, frame)
        while shown is not None and self.cutting.seconds(number) <= shown.seconds + 1e-6:
            yield shown
            number += 1

    def _clip(self, index: int, samples: Sequence["_LiveSample"]) -> Clip:
        first = index * self.cutting.step
        relative = np.arange(first, first + len(samples)) / self.cutting.fps
        indices = np.array([sample.source_index for sample in samples])
        starts = self.origin_seconds + np.array([sample.seconds for sample in samples])
        metadata = _metadata(relative, indices, starts, self.cutting.fps)
        times = tuple((self.origin_seconds + relative).tolist())
        frames = [sample.frame for sample in samples]
        window = Window(index, first, first + len(samples) - 1)
        return Clip(window, times, frames, metadata, self.cutting.seconds(1))


@dataclass(frozen=True)
class _LiveSample:
    """A frame on display: its place among those that arrived, and its seconds since the first."""

    source_index: int
    seconds: float
    frame: Any


class _FrameStore:
    """Frames of an open video, decoded forwards in one go; those that the next window shows are kept."""

    def __init__(self, reader: VideoReader, shown_from: Callable[[int], np.ndarray]) -> None:
        """Args: shown_from: from an index to the indices of all frames that windows show from there on, ascending."""
        self._reader, self._shown_from = reader, shown_from
        self._kept: dict[int, np.ndarray] = {}
        self._pending: Iterator[np.int64] = iter(())
        self._frames: Iterator[np.ndarray] = iter(())

    def frame(self, index: int, keep_from: int) -> np.ndarray:
        """A frame; from now on it is in memory, and those of the frames before it that are not before `keep_from`."""
        if index not in self._kept:
            if next(self._pending, None) != index:  # the first one, another window, or a second reading of this one
                indices = self._shown_from(index)
                self._pending, self._frames = iter(indices[1:]), self._reader.frames(indices)
            frame = next(self._frames)
            self._kept = {number: kept for number, kept in self._kept.items() if number >= keep_from}
            self._kept[index] = frame
        return self._kept[index]

    def close(self) -> None:
        self._kept, self._pending, self._frames = {}, iter(()), iter(())


class _WindowFrames(Sequence[Any]):
    """The frames of a window, (H, W, 3) uint8, decoded when they are read."""

    def __init__(self, store: _FrameStore, indices: np.ndarray, keep_from: int) -> None:
        self._store, self._indices, self._keep_from = store, indices, keep_from

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> list[np.ndarray]: ...
    def __getitem__(self, place: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return self._store.frame(int(self._indices[place]), self._keep_from)


def _metadata(times: np.ndarray, indices: np.ndarray, starts: np.ndarray, fps: float) -> SampledVideoMetadata:
    """What the processor has to know of the samples of a window; the times it prints begin at 0."""
    relative = times - times[0]
    metadata = SampledVideoMetadata(total_num_frames=len(times), fps=fps)
    metadata.frames_indices = (relative * fps).tolist()
    metadata.sampled_timestamps = relative.tolist()
    metadata.source_frame_indices = indices.tolist()
    metadata.source_timestamps = starts.tolist()
    return metadata


def _cut_as(cutting: Cutting) -> dict[str, float]:
    return {"window": cutting.window, "overlap": cutting.overlap, "fps": cutting.fps}


def _chain(first: tuple[float, Any], others: Iterator[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
    yield first
    yield from others
