"""The decoders behind one interface: decord (or decord2), torchcodec and PyAV, and Pillow for animated WebP.

decord runs in a process of its own, see `decord_process`.

They differ in which of several streams they read, whether they turn a phone video upright, how precise their time
stamps are, and whether a seek lands on the requested frame. The readers here give the same frames:

- a frame is found by its time stamp, or by counting from the start, never by an unchecked seek;
- frames are upright, converted to RGB and, where a video changes its size, brought to the size that the file announces
  by the same ffmpeg filter.

A reader refuses what its decoder cannot read that way with a `VideoDecodeError`.
"""

import importlib
import io
import itertools
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from molmo2.image.limits import MediaLimitError, MediaLimits
from molmo2.image.opening import open_image
from molmo2.values import is_positive
from molmo2.video.decoding.decord_process import BROKEN_INSTALLATION, DecordProcess
from molmo2.video.decoding.orientation import UPRIGHT, matrix_from_bytes, mp4_tracks, require_plain_turns, upright
from molmo2.video.decoding.timeline import (
    CONSTANT_RATE_TOLERANCE_SECONDS,
    VideoDecodeError,
    VideoTimeline,
    brief,
    frame_blocks,
    is_ascending,
    make_timeline,
    undo_rounding,
)

VideoSource = str | Path | bytes | IO[bytes]

PACKAGES = {"decord": "decord2", "torchcodec": "torchcodec", "pyav": "av"}  # what to `pip install`
MODULES = {"decord": "decord", "torchcodec": "torchcodec.decoders", "pyav": "av"}
BACKENDS = tuple(PACKAGES)  # in the order they are tried
# decord decodes and converts every frame to RGB, sampled or not: a clip with more pixels (20 seconds of 1080p) is left
# to a backend that converts the sampled frames only.
MAX_DECORD_PIXELS = 1_000_000_000
# PyAV: a seek to a key frame pays off if it skips more packets than this.
MIN_SEEK_PACKETS = 16
# PyAV: decoder threads. More than cores, so that decoding continues while one core resizes a frame.
THREADS_PER_CORE, MAX_THREADS = 3, 16
NO_TICKS = -(1 << 63)  # PyAV: in place of a time stamp that a packet lacks; ffmpeg has the same
MAX_BACKWARD_SECONDS = 1.0  # PyAV: how far time stamps may go back where no frame hides another
# Formats of Pillow that can be animated.
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
UNSTATED_DURATION = 100  # milliseconds of a frame whose file says 0, as browsers and ffmpeg have it
COPIED_BYTES = 1 << 20  # at a time, of a video in memory
HEAD_BYTES = 4096  # in which ffmpeg looks for the signs of a playlist
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"[Reference]", b"v=0", b"<?xml", b"<asx", b"<smil", b"RTSPtext")
TEXT_BYTES = bytes([7, 8, 9, 10, 12, 13, 27, *range(32, 127), *range(128, 256)])


@dataclass
class Source:
    """A video in a file, which is temporary if the video was given in memory.

    Attributes:
        name: for errors.
        path: absolute, or "a:b.mp4" would look like a protocol to ffmpeg.
        num_bytes: size of the file.
        limits: see `MediaLimits`.
        image_format: the format of an animation, such as "GIF", by Pillow; "" for any other video.
    """

    name: str
    path: str
    num_bytes: int
    limits: MediaLimits
    image_format: str = ""

    @classmethod
    def from_input(cls, source: VideoSource, limits: MediaLimits, name: str | None = None) -> "Source":
        """From a path, the bytes of a file or a file object.

        What is in memory is written to a temporary file, which is removed with the last reference to the result: all
        decoders read paths, so that a video decodes alike whatever the way in.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
            TypeError: `source` is none of these.
            MediaLimitError: it is over a limit that shows in its header, or a stream of more than `fetch_bytes`, of
                which no more than that is read.
            VideoDecodeError: the file is empty, an image, or a text that leads to other files.
        """
        if isinstance(source, (str, Path)):
            result = cls._from_path(Path(source), limits)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            held = replace(limits, fetch_bytes=max(limits.fetch_bytes, len(source)))  # they are in memory already
            result = cls._from_stream(io.BytesIO(source), name or f"a video of {len(source)} bytes", held)
        elif hasattr(source, "read"):
            if hasattr(source, "seek"):
                source.seek(0)
            result = cls._from_stream(source, name or repr(getattr(source, "name", "a file object")), limits)
        else:
            raise TypeError(f"A video is a path, bytes or a file object, not {type(source).__name__}.")
        result._require_video()
        animated_format = cls.animated_format if limits.decode_seconds is None else isolated("animated_format")
        result.image_format = animated_format(result)
        return result

    @classmethod
    def _from_path(cls, path: Path, limits: MediaLimits) -> "Source":
        if os.path.isdir(path):  # which, unlike the path's own method, takes names that no file can have
            raise IsADirectoryError(f"{str(path)!r} is a directory. Pass a video file, or a list of its frames.")
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no video file {str(path)!r:.300}. Check the path.")
        if not os.path.isfile(path):
            raise VideoDecodeError(f"{str(path)!r} is a device or pipe, not a file. Pass the path of a video file.")
        return cls(repr(str(path)), str(path.absolute()), path.stat().st_size, limits)

    @classmethod
    def _from_stream(cls, stream: IO[bytes], name: str, limits: MediaLimits) -> "Source":
        handle, path = tempfile.mkstemp(prefix="molmo2_video_")
        copy = cls(name, path, 0, limits)
        weakref.finalize(copy, _remove, path)
        with os.fdopen(handle, "wb") as file:
            while chunk := stream.read(COPIED_BYTES):
                copy.num_bytes += len(chunk)
                limits.check("fetch_bytes", copy.num_bytes, f"{name} has {copy.num_bytes:,} bytes or more")
                file.write(chunk)
        return copy

    def _require_video(self) -> None:
        """Refuse what is no video by its first bytes."""
        if self.num_bytes == 0:
            raise VideoDecodeError(f"{self.name} is empty (0 bytes). Check that it was written completely.")
        with open(self.path, "rb") as file:
            head = file.read(HEAD_BYTES)
        if _leads_elsewhere(head):
            raise VideoDecodeError(
                f"{self.name} is a text, not a video. Playlists and other lists of addresses are not followed; pass "
                "the video itself."
            )

    def animated_format(self) -> str:
        """The format of an animation; "" for any other video.

        Raises:
            MediaLimitError: it is over a limit that shows in its header.
            VideoDecodeError: it is an image.
        """
        try:
            with self.open_animation() as image:
                kind, size = image.format, (image.height, image.width)
                num_images = 1
                if kind == "GIF":  # has no count: Pillow would walk to its end; the decoders hold it to the limit
                    num_images += image.is_animated
                elif kind in ANIMATED_FORMATS:
                    num_images = getattr(image, "n_frames", 1)
        except MediaLimitError as error:  # the limit has another name for videos
            raise MediaLimitError(str(error).replace("image_pixels", "video_frame_pixels")) from None
        except Exception:  # no image, or one that decoders of videos may understand better
            return ""
        if num_images == 1:
            raise VideoDecodeError(f"{self.name} is an image ({kind}), not a video. Pass it as an image.")
        self.limits.check_video(self.name, num_images, size, self.num_bytes)
        return kind

    def is_avi(self) -> bool:
        """True for a file of the container AVI, by its signature."""
        with open(self.path, "rb") as file:
            head = file.read(12)
        return head[:4] == b"RIFF" and head[8:] == b"AVI "

    def open_animation(self) -> Any:
        """The file as an image of Pillow, held to the limit on frames of videos."""
        as_frame = replace(self.limits, image_pixels=self.limits.video_frame_pixels)
        return open_image(Path(self.path), self.name, as_frame)


# Decoding in a child with a deadline; `isolation.py` puts it here, which the files beside a checkpoint lack.
ISOLATION: dict[str, Callable[..., Any]] = {}


def isolated(name: str) -> Callable[..., Any]:
    """What decodes in a child: "reader" or "animated_format".

    Raises:
        ValueError: this is one of the files beside a checkpoint.
    """
    if name not in ISOLATION:
        raise ValueError(
            "MediaLimits(decode_seconds=...) needs the package molmo2-transformers, and a model that `molmo2.load` "
            "loads: the files beside a checkpoint decode in this process. Leave it out here."
        )
    return ISOLATION[name]


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _leads_elsewhere(head: bytes) -> bool:
    """True for the beginning of a text: ffmpeg opens the files and addresses that playlists name."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"YUV4MPEG2 "):
        return False
    is_text = not head.translate(None, TEXT_BYTES)
    return is_text or text.startswith(PLAYLISTS) or b"<mpd" in head.lower() or b"\nc=IN IP" in head


class VideoReader(ABC):
    """An open video, a context manager; `backend` is the name of its decoder."""

    backend: str
    timeline: VideoTimeline

    def __init__(self, source: "Source") -> None:
        self._source = source

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The decoded frames with these indices, in their order; an index may be repeated.

        One frame is in memory at a time if the indices ascend, else all requested ones. Read the iterator to its end:
        some faults of a file only show there.

        Args:
            indices: 0 <= index < timeline.num_frames.

        Yields:
            (H, W, 3) uint8 RGB.

        Raises:
            IndexError: there is no such frame.
            VideoDecodeError: a frame cannot be decoded.
        """
        indices = np.asarray(indices, dtype=np.int64)
        outside = indices[(indices < 0) | (indices >= self.timeline.num_frames)]
        if outside.size:
            raise IndexError(
                f"Frame {outside[0]} of {self._source.name} was requested, but the video has frames 0 to "
                f"{self.timeline.num_frames - 1}."
            )
        found, counts = np.unique(indices, return_counts=True)
        ascending = found.tolist()
        decoded = zip(ascending, self._checked(ascending), strict=True)
        if np.all(np.diff(indices) >= 0):
            for (_, frame), count in zip(decoded, counts, strict=True):
                yield from [frame] * int(count)
        else:
            frames = dict(decoded)
            for index in indices.tolist():
                yield frames[index]

    def _checked(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames of `_decode`, which have one size."""
        size = self.timeline.height, self.timeline.width
        for index, frame in zip(indices, self._decode(indices), strict=True):
            if frame.shape[:2] != size:
                problem = f"it has {frame.shape[0]} x {frame.shape[1]} pixels, the first one {size[0]} x {size[1]}"
                raise self._frame_error(index, problem)
            yield frame

    @abstractmethod
    def close(self) -> None:
        """Frees the decoder and the file."""

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _decode(self, indices: list[int]) -> Iterator[np.ndarray]:
        """The frames with these indices (ascending, no repetition)."""

    def _error(self, problem: str) -> VideoDecodeError:
        return VideoDecodeError(f"{self.backend} cannot read {self._source.name}: {problem}", reason=problem)

    def _frame_error(self, index: int, problem: object) -> VideoDecodeError:
        return self._error(
            f"frame {index} of {self.timeline.num_frames} ({self.timeline.start_seconds[index]:.3f} s) cannot be "
            f"decoded: {brief(problem)}"
        )


# --- decord ----------------------------------------------------------------------------------------------------------


class _DecordReader(VideoReader):
    """Decodes all frames in order, without seeks.

    decord's seek takes the index of a key frame in the file for its index in display order, and so returns other
    frames where frames shown before a key frame are stored after it (the default of x265); in some containers even its
    first frame is a later one. Read in order to the end, it gives exactly the number of frames it lists, or the
    difference is an error.
    """

    backend = "decord"
    _process: DecordProcess | None = None

    def __init__(self, source: Source, only_choice: bool) -> None:
        super().__init__(source)
        tracks = mp4_tracks(source.path)
        require_plain_turns(tracks)
        if not only_choice:  # known without a child
            _leave_to_others(max((track.num_pixels for track in tracks), default=0))
        process = self._process = DecordProcess.borrow()
        try:
            spans, fps, shape = process.open(source.path, source.limits, source.name)
            if len(shape) != 3 or shape[2] != 3:  # very narrow videos
                raise VideoDecodeError(f"its frames have the shape {shape}, expected (height, width, 3)")
            height, width = shape[:2]
            num_frames = len(spans)
            if not only_choice:
                _leave_to_others(num_frames * height * width)
            starts, end = _decord_times(spans)
            self.timeline = make_timeline(starts, end, fps, (height, width))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.give_back()

    def _decode(self, indices: list[int]) -> Iterator[np.ndarray]:
        if self._process is None or self._process.is_busy:  # closed, or an earlier iterator was not read to its end
            self.close()
            self._process = DecordProcess.borrow()
            self._process.open(self._source.path, self._source.limits, self._source.name)
        try:
            yield from self._process.decode(indices, self.timeline.num_frames)
        except VideoDecodeError as error:
            at, reason = error.index, error.reason
            raise (self._error(reason) if at is None else self._frame_error(at, reason)) from None


def _leave_to_others(num_pixels: float) -> None:
    """Leaves a clip with this many pixels in all its frames to other backends, where there are any."""
    if num_pixels > MAX_DECORD_PIXELS and _others_usable():
        raise VideoDecodeError("it would have to convert all frames, wanted or not, of a clip this long")


def _decord_times(spans: np.ndarray) -> tuple[np.ndarray, float]:
    """Starts of the frames, (N,) float64, and the end of the last one, in seconds; spans are (N, 2)."""
    if not np.all(np.isfinite(spans)):
        raise VideoDecodeError("its frames have no time stamps")
    spans = spans[spans[:, 0] >= 0]  # an edit list cuts off what comes before; decord lists it, but skips it
    if not len(spans):
        raise VideoDecodeError("it shows no frames")
    end = spans[-1, 1]
    if end <= spans[-1, 0] and len(spans) > 1:  # unknown, as in FLV: as long as the frame before it
        end = 2 * spans[-1, 0] - spans[-2, 0]
    times = undo_rounding(np.append(spans[:, 0], end))
    return times[:-1], float(times[-1])


# --- torchcodec ------------------------------------------------------------------------------------------------------


class _TorchcodecReader(VideoReader):
    """Seeks exactly, but knows the time of a frame only after decoding it.

    The timeline is predicted from the frame rate if number of frames and duration agree with it, and each decoded
    frame is checked against it; otherwise all frames are decoded once to get their times.
    """

    backend = "torchcodec"

    def __init__(self, source: Source, only_choice: bool) -> None:
        super().__init__(source)
        decoders = _import_backend("torchcodec")
        require_plain_turns(mp4_tracks(source.path))
        self._decoder = decoders.VideoDecoder(
            source.path,
            dimension_order="NHWC",
            num_ffmpeg_threads=0,
            device="cpu",
            seek_mode="exact",
        )
        source.limits.check_frames(source.name, len(self._decoder))
        metadata = self._decoder.metadata
        if metadata.codec in ("h264", "hevc") and source.is_avi():  # torchcodec finds frames by their time stamps
            raise VideoDecodeError("AVI does not store the order of B-frames, which it may have. PyAV (av) reads it")
        self._first_timestamp = float(metadata.begin_stream_seconds)
        end = float(metadata.end_stream_seconds) - self._first_timestamp
        self.timeline = self._predicted_timeline(end) or self._measured_timeline()

    def close(self) -> None:
        self._decoder = None

    def _predicted_timeline(self, end_seconds: float) -> VideoTimeline | None:
        """The timeline of a constant rate, exact or in whole milliseconds (Matroska, WebM); None if neither fits."""
        num_frames, fps = len(self._decoder), self._decoder.metadata.average_fps_from_header
        if not is_positive(fps) or abs(num_frames / fps - end_seconds) > 1.5e-3:
            return None
        rate = Fraction(fps).limit_denominator(1001)
        exact = np.arange(num_frames) * rate.denominator / rate.numerator
        measured = self._frame_times(range(min(num_frames, 8)))[0]
        for starts in (exact, np.round(exact, 3)):
            if np.all(np.abs(starts[: len(measured)] - measured) <= CONSTANT_RATE_TOLERANCE_SECONDS):
                end = float(undo_rounding(np.array([end_seconds]))[0])
                return make_timeline(starts, end, fps, self._size(), self._first_timestamp)
        return None

    def _measured_timeline(self) -> VideoTimeline:
        """The timeline from the times of all frames."""
        starts, ends = self._frame_times(range(len(self._decoder)))
        times = undo_rounding(np.append(starts, ends[-1]))
        fps = self._decoder.metadata.average_fps_from_header
        return make_timeline(times[:-1], times[-1], fps, self._size(), self._first_timestamp)

    def _frame_times(self, indices: range) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of these frames, in seconds since the first one; decodes them, one at a time."""
        spans = []
        for index in indices:
            frame = self._decoder.get_frame_at(index)
            spans.append((frame.pts_seconds, frame.pts_seconds + frame.duration_seconds))
        starts, ends = np.array(spans, dtype=np.float64).T - self._first_timestamp
        return starts, ends

    def _size(self) -> tuple[int, int]:
        return tuple(self._decoder.get_frame_at(0).data.shape[:2])  # upright; the metadata's may be as stored

    def _decode(self, indices: list[int]) -> Iterator[np.ndarray]:
        for index in indices:
            try:
                frame = self._decoder.get_frame_at(index)
            except Exception as error:
                raise self._frame_error(index, error) from error
            start = float(frame.pts_seconds) - self._first_timestamp
            if abs(start - self.timeline.start_seconds[index]) > CONSTANT_RATE_TOLERANCE_SECONDS:
                raise self._frame_error(index, f"it is shown at {start:.4f} s, the frame rate is not constant")
            yield frame.data.numpy()


# --- PyAV ------------------------------------------------------------------------------------------------------------


class _PyavReader(VideoReader):
    """Lists the packets first (no decoding), then decodes from key frames and finds frames by their time stamp."""

    backend = "pyav"
    _container: Any = None
    _stream: Any = None
    _converter: tuple[Any, Any] | None = None
    _size: tuple[int, int] = (0, 0)  # (width, height) as the file announces them, to which other frames are scaled
    _started: Iterator[tuple[int | None, Any]] | None = None  # all frames, the first of which is decoded already
    _last_stamp: int | None = None  # of the frame that the decoder returned last
    _is_damaged = False

    def __init__(self, source: Source, only_choice: bool) -> None:
        super().__init__(source)
        self._av = _import_backend("pyav")
        self._open()
        packets = self._counted(self._demuxed())
        self._packets = _PacketTable.from_packets(self._stream, packets, is_avi=source.is_avi())
        if self._packets.has_stamps and self._packets.is_counted:
            self._require_all_frames()
        frames = self._decoded_from(0)
        stamp, first = next(frames, (None, None))  # tells rotation and size
        if first is None:
            raise VideoDecodeError("not one frame could be decoded")
        self._started = itertools.chain([(stamp, first)], frames)
        self.timeline = self._packets.timeline(self._to_rgb(first).shape[:2])

    def _require_all_frames(self) -> None:
        """Decode all once: a frame that is missing anywhere would shift those after it, which are only counted."""
        count, expected = sum(1 for _ in self._decoded_from(0)), len(self._packets.shown_stamps)
        if count != expected:
            raise VideoDecodeError(f"{count} of {expected} frames can be decoded, and nothing tells which these are")

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._stream = self._converter = self._started = None

    def _open(self) -> None:
        self.close()
        limits, name = self._source.limits, self._source.name
        self._container = self._av.open(self._source.path, options={"protocol_whitelist": "file"})
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            raise VideoDecodeError("it has no video track")
        context = self._stream.codec_context
        limits.check_video(name, 1, (context.height, context.width), self._source.num_bytes)
        self._size = context.width, context.height
        context.options = {"max_pixels": str(limits.video_frame_pixels)}  # for frames that are larger than announced
        # How a damaged frame is concealed depends on the number of threads, and on chance. In MPEG-4 it is not marked.
        is_serial = self._is_damaged or context.name == "mpeg4"
        self._stream.thread_type = "AUTO"
        context.thread_count = 1 if is_serial else min(MAX_THREADS, THREADS_PER_CORE * (os.cpu_count() or 1))

    def _decode(self, indices: list[int]) -> Iterator[np.ndarray]:
        frames: Iterator[tuple[int | None, Any]] | None = None
        from_start, reached = False, 0
        for index in indices:
            stamp, key = self._packets.stamp_of(index), self._packets.key_before(index)
            if frames is None or key > reached + MIN_SEEK_PACKETS:
                frames, from_start = self._frames_from(key), key == 0
            try:
                frame = _frame_with(stamp, frames)
                if frame is None and not from_start:  # decoding cannot start at that key frame: read all before it
                    frames, from_start = self._decoded_from(0), True
                    frame = _frame_with(stamp, frames)
                if frame is None:
                    raise self._frame_error(index, "the file lists this frame, but the decoder does not return it")
                rgb = self._to_rgb(frame)
            except VideoDecodeError:
                raise
            except Exception as error:
                after_last = index if self._last_stamp is None else self._packets.num_until(self._last_stamp)
                raise self._frame_error(min(after_last, index), error) from error
            reached = self._packets.place_of(stamp)
            yield rgb

    def _frames_from(self, place: int) -> Iterator[tuple[int | None, Any]]:
        """As `_decoded_from`; continues where opening stopped, if that is the start and nothing was read since."""
        started, self._started = self._started, None
        return started if started is not None and place == 0 else self._decoded_from(place)

    def _decoded_from(self, place: int) -> Iterator[tuple[int | None, Any]]:
        """(stamp, frame) in display order, decoded from the packet at this place of the file on."""
        self._last_stamp = None
        for count, frame in enumerate(self._alike(place)):
            last: int | None = self._last_stamp
            stamp = self._packets.stamp_of_shown(count) if self._packets.is_counted else frame.pts
            if stamp is not None and last is not None and stamp < last:
                raise self._error("its time stamps are not in the order of its frames")
            self._last_stamp = stamp
            yield stamp, frame

    def _alike(self, place: int) -> Iterator[Any]:
        """The frames decoded from this packet on, from the first damaged one on by one thread."""
        for count, frame in enumerate(self._decoded(place)):
            if frame.is_corrupt and not self._is_damaged:
                self._is_damaged = True
                self._open()
                yield from itertools.islice(self._decoded(place), count, None)
                return
            yield frame

    def _decoded(self, place: int) -> Iterator[Any]:
        return (frame for packet in self._packets_from(place) for frame in packet.decode())

    def _packets_from(self, place: int) -> Iterator[Any]:
        """Packets in file order from the one at `place` on; seeks if that gets there, in MP4 to the start too."""
        if place > 0 or (self._container.format.name.startswith("mov") and 0 in self._packets.key_places[:1]):
            with suppress(self._av.FFmpegError):  # then no packet lands where it should
                self._container.seek(self._packets.stamp_at(place), stream=self._stream)
            packets = self._demuxed()
            first = next(packets, None)
            landed = self._packets.place_of(first.pts) if first is not None else -1
            if 0 <= landed <= place:
                yield from itertools.islice(itertools.chain([first], packets), place - landed, None)
                return
        self._open()
        yield from itertools.islice(self._demuxed(), place, None)

    def _demuxed(self) -> Iterator[Any]:
        """Packets from the current position on; the last one, without time stamp, flushes the decoder."""
        for packet in self._container.demux(self._stream):
            if packet.size or packet.dts is None:  # AVI stores a dropped frame as an empty packet
                yield packet

    def _counted(self, packets: Iterator[Any]) -> Iterator[Any]:
        """The packets, as long as they are not more than the frames a video may have."""
        max_frames, context = self._source.limits.video_frames, self._stream.codec_context
        for count, packet in enumerate(packets):
            if count > max_frames or count % 1000 == 0:
                size = context.height, context.width
                self._source.limits.check_video(self._source.name, count, size, self._source.num_bytes)
            yield packet

    def _to_rgb(self, frame: Any) -> np.ndarray:
        """The frame as upright RGB, converted by the filter that decord and torchcodec use too."""
        shape = (frame.width, frame.height, frame.format.name)
        if self._converter is None or self._converter[0] != shape:
            graph = self._av.filter.Graph()
            scaled = [] if shape[:2] == self._size else [graph.add("scale", "{}:{}".format(*self._size))]
            graph.link_nodes(
                graph.add_buffer(
                    width=frame.width, height=frame.height, format=frame.format.name, time_base=self._stream.time_base
                ),
                *scaled,
                graph.add("format", "pix_fmts=rgb24"),
                graph.add("buffersink"),
            ).configure()
            self._converter = (shape, graph)
        graph = self._converter[1]
        graph.push(frame)
        # Not `frame.side_data`: the frame would keep its container, which keeps the frame, until a garbage collection.
        data = self._av.sidedata.sidedata.SideDataContainer(frame).get("DISPLAYMATRIX")
        matrix = UPRIGHT if data is None else matrix_from_bytes(bytes(data))
        return np.ascontiguousarray(upright(_rgb_view(graph.pull()), matrix))


def _rgb_view(frame: Any) -> np.ndarray:
    """(H, W, 3) over the memory of an RGB frame, which the array keeps alive."""
    (plane,) = frame.planes
    rows = np.frombuffer(plane, dtype=np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


@dataclass(frozen=True)
class _PacketTable:
    """The packets of a stream. A *place* counts them in file order, an index in display order.

    Arrays, of 4 bytes a packet, 12 where frames are not stored in the order they are shown in (8 and 20 where 32 bits
    do not hold the time stamps), and 8 for each key frame: ten hours have a million packets.

    Attributes:
        origin: what is added to the numbers of `file_stamps` and `shown_stamps`, in ticks.
        file_stamps: time stamp of each place, in ticks (the place itself if the file has no time stamps).
        by_stamp: places in the order of their time stamps; None if that is the order of the file.
        shown_stamps: time stamps of the frames that are shown, ascending.
        key_places: places of key frames, ascending.
        has_stamps: False for raw streams; a constant rate is assumed, and a tick is a frame.
        is_counted: frames are counted from the start, as their time stamps do not tell the order on the screen.
        last_ticks: duration of the last frame, in ticks.
        tick_seconds: length of a tick.
        rate: declared frames per second; None if unknown.
    """

    origin: int
    file_stamps: np.ndarray
    by_stamp: np.ndarray | None
    shown_stamps: np.ndarray
    key_places: np.ndarray
    has_stamps: bool
    is_counted: bool
    last_ticks: int
    tick_seconds: Fraction
    rate: float | None

    @classmethod
    def from_packets(cls, stream: Any, packets: Iterator[Any], *, is_avi: bool = False) -> "_PacketTable":
        """The table of all packets. Those that an edit list cuts off are needed for decoding but not shown."""
        listed, decoded, keys, hidden = array("q"), array("q"), array("q"), array("q")
        rate, tick_seconds = stream.average_rate, stream.time_base
        steps_back: dict[bool, tuple[int, int, int]] = {}
        # AVI stores no order of B-frames. Where ffmpeg does not derive it, time stamps keep the order of the file, and
        # only the times of decoding are evenly spaced.
        is_unordered = is_avi and stream.codec_context.has_b_frames
        has_stamps, highest, last_ticks = True, NO_TICKS, 0
        for place, packet in enumerate(_watched(packets, tick_seconds, steps_back)):
            has_stamps = has_stamps and packet.pts is not None
            listed.append(packet.pts or 0)
            if is_unordered and packet.dts is not None:
                decoded.append(packet.dts)
            if packet.is_keyframe:
                keys.append(place)
            if packet.is_discard:
                hidden.append(place)
            elif has_stamps and packet.pts >= highest:
                highest, last_ticks = packet.pts, packet.duration or 0
        count, is_counted = len(listed), not has_stamps
        if count == len(hidden):
            raise VideoDecodeError("its video track has no frames")
        if has_stamps:
            ticks = np.frombuffer(listed, dtype=np.int64)
            is_counted = len(decoded) == count and bool(np.all(ticks[1:] >= ticks[:-1]))
            origin, file_stamps = _packed(decoded if is_counted else listed)
        elif rate:
            origin, file_stamps = 0, np.arange(count, dtype=np.int32)
            tick_seconds, last_ticks = 1 / rate, 1
        else:
            raise VideoDecodeError("it has neither time stamps nor a frame rate")
        shown = np.delete(file_stamps, hidden) if hidden else file_stamps
        by_stamp, num_lost = None, 0
        if not is_ascending(file_stamps):  # frames are stored in another order than they are shown in
            by_stamp = np.argsort(file_stamps, kind="stable").astype(np.int32)
            ordered = file_stamps[by_stamp]
            num_lost = int(np.count_nonzero(ordered[1:] == ordered[:-1]))
            shown = np.unique(shown) if hidden or num_lost else ordered
        if has_stamps:
            _require_one_recording(steps_back, tick_seconds, num_lost, count)
        return cls(
            origin=origin,
            file_stamps=file_stamps,
            by_stamp=by_stamp,
            shown_stamps=shown,
            key_places=np.array([] if is_counted else keys, dtype=np.int64),
            has_stamps=has_stamps,
            is_counted=is_counted,
            last_ticks=last_ticks,
            tick_seconds=tick_seconds,
            rate=float(rate) if rate else None,
        )

    def stamp_of(self, index: int) -> int:
        """Time stamp of a frame, in ticks."""
        return self.origin + int(self.shown_stamps[index])

    def stamp_of_shown(self, count: int) -> int | None:
        """Time stamp of the frame that comes after `count` from the decoder; None after the last one."""
        return self.stamp_of(count) if count < len(self.shown_stamps) else None

    def stamp_at(self, place: int) -> int:
        """Time stamp of a packet, in ticks."""
        return self.origin + int(self.file_stamps[place])

    def num_until(self, stamp: int) -> int:
        """Of the frames, how many are shown up to this time stamp."""
        return bisect_right(self.shown_stamps, stamp - self.origin)

    def place_of(self, stamp: int | None) -> int:
        """Place of the first packet with this time stamp; -1 if there is none."""
        if stamp is None:
            return -1
        # Not `np.searchsorted`, which copies the whole array where the types differ.
        if self.by_stamp is None:
            place = min(bisect_left(self.file_stamps, stamp - self.origin), len(self.file_stamps) - 1)
        else:
            rank = bisect_left(self.by_stamp, stamp - self.origin, key=self.file_stamps.__getitem__)
            place = int(self.by_stamp[min(rank, len(self.by_stamp) - 1)])
        return place if self.stamp_at(place) == stamp else -1

    def key_before(self, index: int) -> int:
        """Place from which this frame can be decoded: that of a key frame stored and shown no later; 0 if none is."""
        stamp = self.stamp_of(index)
        keys = self.key_places[: np.searchsorted(self.key_places, self.place_of(stamp), side="right")]
        return next((int(key) for key in keys[::-1] if self.stamp_at(int(key)) <= stamp), 0)

    def timeline(self, size: tuple[int, int]) -> VideoTimeline:
        """When each frame, of this (height, width), is shown."""
        stamps, tick, last_ticks = self.shown_stamps, self.tick_seconds, self.last_ticks
        count, first = len(stamps), int(stamps[0])
        if last_ticks <= 0:  # unknown: as long as the frame before it
            last_ticks = int(stamps[-1]) - int(stamps[-2]) if count > 1 else 0
        end = float((int(stamps[-1]) - first + last_ticks) * tick.numerator) / tick.denominator
        starts = np.empty(count, dtype=np.float64)
        for block in frame_blocks(count):
            starts[block] = (stamps[block].astype(np.int64) - first) * tick.numerator / tick.denominator
        first_timestamp = float(self.stamp_of(0) * tick) if self.has_stamps else None
        return make_timeline(starts, end, self.rate, size, first_timestamp)


def _packed(stamps: "array[int]") -> tuple[int, np.ndarray]:
    """Time stamps as an origin and their distances from it: from the first one in 32 bits, or else from 0 in 64."""
    ticks, origin = np.frombuffer(stamps, dtype=np.int64), stamps[0]
    if max(origin - int(ticks.min()), int(ticks.max()) - origin) >= 1 << 31:
        return 0, ticks
    return origin, np.subtract(ticks, origin, out=np.empty(len(ticks), np.int32), casting="unsafe")


def _watched(
    packets: Iterator[Any], tick_seconds: Fraction, steps_back: dict[bool, tuple[int, int, int]]
) -> Iterator[Any]:
    """The packets with content. Within a recording they are decoded at ascending times; those of the next one restart.

    Args:
        steps_back: gets (place, ticks, ticks before) of the first step back of more than `MAX_BACKWARD_SECONDS`, at
            True, and of the first shorter one.
    """
    latest: int | None = None
    for place, packet in enumerate(packet for packet in packets if packet.size):
        ticks = packet.dts
        if ticks is not None:
            if latest is not None and ticks < latest:
                is_far = (latest - ticks) * tick_seconds > MAX_BACKWARD_SECONDS
                steps_back.setdefault(is_far, (place, ticks, latest))
            latest = ticks
        yield packet


def _require_one_recording(
    steps_back: dict[bool, tuple[int, int, int]], tick_seconds: Fraction, num_lost: int, count: int
) -> None:
    """Refuse recordings that are joined without new time stamps: frames of the same time would hide each other.

    Args:
        steps_back: see `_watched`.
        num_lost: packets whose time to be shown is that of another one.
        count: of all packets.
    """
    step = min(steps_back.values(), default=None) if num_lost else steps_back.get(True)
    if step is not None:
        new, old = (float(ticks * tick_seconds) for ticks in step[1:])
        raise VideoDecodeError(
            f"its time stamps restart at frame {step[0]} of {count} ({new:.3f} s after {old:.3f} "
            "s), as if recordings were joined; join them anew with ffmpeg's concat demuxer"
        )


def _frame_with(stamp: int, frames: Iterator[tuple[int | None, Any]]) -> Any:
    """The frame with this time stamp; drops the frames before it. None if a later frame comes first."""
    for found, frame in frames:
        if found == stamp:
            return frame
        if found is not None and found > stamp:
            return None
    return None


# --- Pillow ----------------------------------------------------------------------------------------------------------


class _PillowReader(VideoReader):
    """Animated WebP, which ffmpeg does not read. All frames are decoded once for their durations."""

    backend = "pillow"

    def __init__(self, source: Source, only_choice: bool) -> None:
        super().__init__(source)
        self._image = source.open_animation()
        durations = []
        for index in range(self._image.n_frames):
            self._image.seek(index)
            self._image.load()
            durations.append(self._image.info["duration"] or UNSTATED_DURATION)
        ends = np.cumsum(durations) / 1000
        self.timeline = make_timeline(np.append(0.0, ends[:-1]), float(ends[-1]), None, self._image.size[::-1])

    def close(self) -> None:
        self._image.close()

    def _decode(self, indices: list[int]) -> Iterator[np.ndarray]:
        for index in indices:
            try:
                self._image.seek(index)
                yield np.asarray(self._image.convert("RGB"))
            except Exception as error:
                raise self._frame_error(index, error) from error


READERS: dict[str, Callable[..., VideoReader]] = {
    "decord": _DecordReader,
    "torchcodec": _TorchcodecReader,
    "pyav": _PyavReader,
    "pillow": _PillowReader,
}


def _import_backend(backend: str) -> Any:
    """The module of a backend.

    Raises:
        VideoDecodeError: it cannot be imported.
    """
    try:
        return importlib.import_module(MODULES[backend])
    except Exception as error:  # also OSError or RuntimeError: libraries of ffmpeg missing
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == MODULES[backend].partition(".")[0]
        advice = f"Install it with `pip install {PACKAGES[backend]}`." if is_absent else BROKEN_INSTALLATION
        raise VideoDecodeError(f"{backend} cannot be loaded ({brief(error)}). {advice}") from error


def _others_usable() -> bool:
    """True if another backend than decord can be imported."""
    for name in BACKENDS[1:]:
        with suppress(VideoDecodeError):
            _import_backend(name)
            return True
    return False
