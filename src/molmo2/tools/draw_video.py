"""Points and tracks drawn on the original video, at its full frame rate, with PyAV (`pip install av`).

A video is annotated frame by frame: each is decoded, rotated upright, drawn on and encoded with its own time stamp, so
that variable frame rates and late starts are preserved. Audio is copied, or encoded again where the new container
does not support its codec. Pixel aspect ratio and colour space are those of the source; full-range video becomes
limited range.

Between two sampled frames an object that is visible in both moves on a straight line, linear in presentation time. An
object that is visible in only one of them stays at its position for the half of the interval next to that frame.
Before the first and after the last sampled frame nothing is drawn for longer than half a sampling interval.

Tracks may be sparser than the sampled frames. They have an interval of their own: the median distance between the
times at which the answer places any object. A sampled frame within that interval hides nothing; an object that is
missing where the interval expects a position is hidden, and so is one in a gap longer than the interval.
"""

import base64
import importlib
from bisect import bisect_right
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molmo2.grounding.files import nearest_points, replaced
from molmo2.tools.draw import DrawingStyle, Mark, Position, captions_of, draw_marks

SINGLE_FRAME_HALF_INTERVAL = 0.5  # seconds; where there is only one sampled frame
# Tracks are expected in a frame that is at least this fraction of the track interval away from all frames with tracks.
EXPECTED_GAP_RATIO = 0.75
MAX_EMBEDDED_BYTES = 20_000_000  # of a video inside a notebook cell
# Codecs by preference, and their encoders.
VIDEO_ENCODERS = {"h264": "libx264", "vp9": "libvpx-vp9", "mpeg4": "mpeg4"}
AUDIO_ENCODERS = {"aac": "aac", "opus": "libopus", "mp3": "libmp3lame"}
# ffmpeg's numbers for colour spaces and ranges (AVCOL_SPC_*, AVCOL_RANGE_*).
RGB, UNSPECIFIED = 0, 2
LIMITED = 1


@dataclass(frozen=True)
class AnnotatedVideo:
    """A written video.

    Attributes:
        path: the file.
        num_frames: frames written.
        num_marked_frames: those with at least one mark.
        audio: "none", "copied" or "encoded".
    """

    path: Path
    num_frames: int
    num_marked_frames: int
    audio: str

    def _repr_html_(self) -> str:
        """A player for notebooks; a link where the video is too large to embed."""
        if self.path.stat().st_size > MAX_EMBEDDED_BYTES:
            return f'<a href="{self.path}">{self.path}</a>'
        content = base64.b64encode(self.path.read_bytes()).decode()
        return f'<video controls loop width="640" src="data:video/mp4;base64,{content}"></video>'


def annotate_video(
    source: str | Path, grounding: Any, target: str | Path, style: DrawingStyle | None = None
) -> AnnotatedVideo:
    """Write a copy of a video with the points and tracks of an answer.

    Args:
        source: the video that the answer is about.
        grounding: the answer, parsed with the processor's output for this video (`inputs.media`).
        target: the file to write; its suffix chooses the container. It appears when it is complete.
        style: the look of marks.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such video, or no folder for the target.
        TypeError: `grounding` has no points: it is an `Answer`, or the target.
        ValueError: the answer is about images, the file has no video stream, its time stamps do not increase, or no
            encoder is available.
    """
    av = _pyav()
    style = (DrawingStyle() if style is None else style).for_answer(grounding)
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"There is no video file '{source}'. Check the path.")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{target.parent}' to write '{target.name}' to. Make it first.")
    if target.exists() and target.samefile(source):
        raise ValueError(f"'{target}' is the source itself. Write to another file.")
    marks_at = MarksOverTime(grounding, style)
    with replaced(target) as partial, ExitStack() as stack:
        reader = stack.enter_context(av.open(str(source)))
        if not reader.streams.video:
            raise ValueError(f"'{source}' has no video stream. Pass the video that the answer is about.")
        writer = stack.enter_context(av.open(str(partial), "w"))
        transcoding = _Transcoding(reader, writer, marks_at)
        transcoding.run()
    return AnnotatedVideo(target, transcoding.num_frames, transcoding.num_marked_frames, transcoding.audio)


def _pyav() -> Any:
    """PyAV, imported when it is needed: most users never annotate a video."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ImportError("Annotating videos needs PyAV, which is not installed: pip install av") from error


# --- positions over time ---------------------------------------------------------------------------------------------


class MarksOverTime:
    """The marks of an answer about a video, as a function of time.

    Args:
        grounding: a `Grounding` of kind "video". Points in images of the same prompt are left out.
        style: colours, captions and the length of trails.

    Raises:
        ValueError: the answer is about images.
    """

    def __init__(self, grounding: Any, style: DrawingStyle):
        self.style = style.for_answer(grounding)
        if grounding.kind != "video" and grounding.points:
            raise ValueError(
                f"The answer is about {grounding.kind.replace('_', ' ')}s, not a video. Draw it with `draw`; "
                "if it is about a video, parse it with the processor's output for that video."
            )
        frames = () if grounding.media is None else grounding.media.sampled_frames
        points = [point for point in grounding.points if point.image_index is None]
        sampled = sorted({_seconds(frame) for frame in frames} | {_point_seconds(point) for point in points})
        tracked = {_point_seconds(point) for point in points if point.tag == "tracks"}
        self._frame_times = SampleTimes.from_times(sampled)
        self._track_times = SampleTimes.from_times(expected_track_times(sampled, tracked))
        placed: dict[tuple[Any, ...], list[tuple[float, Any, float]]] = {}
        for number, point in enumerate(points):
            identity = (point.tag, point.label, point.id) if point.tag == "tracks" else (number,)
            placed.setdefault(identity, []).append((_point_seconds(point), point, point.seconds_to_frame))
        self._objects = {identity: nearest_points(own) for identity, own in placed.items()}

    def __call__(self, seconds: float) -> list[Mark]:
        """The marks to draw `seconds` after the first frame of the video."""
        visible = [
            (next(iter(points_at.values())), position, self._trail(points_at, seconds))
            for points_at in self._objects.values()
            if (position := self._position(points_at, seconds)) is not None
        ]
        captions = captions_of([point for point, *_ in visible], self.style)
        return [
            Mark(*position, self.style.color(point.label, point.id), caption, trail)
            for (point, position, trail), caption in zip(visible, captions, strict=True)
        ]

    def _position(self, points_at: dict[float, Any], seconds: float) -> Position | None:
        """The position of an object as fractions of width and height; None where it is hidden."""
        times = self._times_of(points_at)
        before, after = times.around(seconds)
        old = None if before is None else points_at.get(before)
        new = None if after is None else points_at.get(after)
        if old is not None and new is not None and before is not None and after is not None:
            weight = (seconds - before) / (after - before)
            return old.x_norm + weight * (new.x_norm - old.x_norm), old.y_norm + weight * (new.y_norm - old.y_norm)
        midpoint = times.midpoint(before, after)
        if old is not None and seconds < midpoint:
            return old.x_norm, old.y_norm
        if new is not None and seconds >= midpoint:
            return new.x_norm, new.y_norm
        return None

    def _times_of(self, points_at: dict[float, Any]) -> "SampleTimes":
        is_track = next(iter(points_at.values())).tag == "tracks"
        return self._track_times if is_track else self._frame_times

    def _trail(self, points_at: dict[float, Any], seconds: float) -> tuple[Position, ...]:
        """Earlier positions, back to the last frame that hides the object or to the trail's length."""
        trail: list[Position] = []
        times = self._times_of(points_at).times
        for time in reversed(times[: bisect_right(times, seconds)]):
            if time not in points_at or time < seconds - self.style.trail_seconds:
                break
            trail.insert(0, (points_at[time].x_norm, points_at[time].y_norm))
        return tuple(trail)


@dataclass(frozen=True)
class SampleTimes:
    """The times at which the answer either shows or hides an object.

    Attributes:
        times: in seconds, ascending.
        half_interval: half of the median distance between them.
    """

    times: list[float]
    half_interval: float

    @classmethod
    def from_times(cls, times: list[float]) -> "SampleTimes":
        half_interval = float(np.median(np.diff(times))) / 2 if len(times) > 1 else SINGLE_FRAME_HALF_INTERVAL
        return cls(times, half_interval)

    def around(self, seconds: float) -> tuple[float | None, float | None]:
        """The last time up to `seconds`, and the first after it; None where there is none."""
        position = bisect_right(self.times, seconds)
        before = self.times[position - 1] if position else None
        return before, self.times[position] if position < len(self.times) else None

    def midpoint(self, before: float | None, after: float | None) -> float:
        """When a position of the earlier frame alone disappears, and one of the later frame alone appears."""
        if before is not None and after is not None:
            return (before + after) / 2
        return before + self.half_interval if before is not None else float(after or 0) - self.half_interval


def expected_track_times(sampled: list[float], tracked: set[float]) -> list[float]:
    """The sampled times at which the tracks of this answer would have a position: 0 . 2 . 4 of 0 1 2 3 4 for 0 2 4.

    The track interval is the median distance of frames with a track, in frames; with fewer than three such frames it
    is unknown, and every sampled time counts. A frame in the middle of a double interval counts too: there the tracks
    are interrupted.

    Args:
        sampled: times of all sampled frames, ascending.
        tracked: those at which the answer places a track.
    """
    frames = [frame for frame, time in enumerate(sampled) if time in tracked]
    intervals = sorted(after - before for before, after in pairwise(frames))
    if len(intervals) < 2:
        return sampled
    min_distance = EXPECTED_GAP_RATIO * intervals[(len(intervals) - 1) // 2]
    return [
        time
        for frame, time in enumerate(sampled)
        if time in tracked or all(abs(frame - other) >= min_distance for other in frames)
    ]


def _seconds(frame: Any) -> float:
    """When a sampled frame is displayed, in seconds since the first frame of the video."""
    return frame.time if frame.source_time is None else frame.source_time


def _point_seconds(point: Any) -> float:
    return float(point.key) if point.frame is None else _seconds(point.frame)


# --- reading and writing ---------------------------------------------------------------------------------------------


class _Transcoding:
    """One pass over a file: frames are drawn on and encoded, audio packets are copied or encoded."""

    def __init__(self, source: Any, target: Any, marks_at: "MarksOverTime"):
        self._av = _pyav()
        self._source, self._target, self._marks_at = source, target, marks_at
        self._video = source.streams.best("video")
        self._video.thread_type = "AUTO"
        self._rate = self._video.average_rate or 25
        self._audio = source.streams.best("audio")
        self.audio = "none"
        self._out_audio: Any = None
        self._out_video: Any = None
        # AVI stores decoding times only: the n-th displayed frame gets the n-th of them.
        self._stamps: deque[int] | None = deque() if source.format.name == "avi" else None
        self._first_pts = self._last_pts = self._next_pts = 0
        self._durations: dict[int, int] = {}  # in ticks, by the time stamp of a frame
        self.num_frames = self.num_marked_frames = 0

    def run(self) -> None:
        pending: list[Any] = []  # audio before the first frame: streams have to be added before anything is written
        streams = [stream for stream in (self._video, self._audio) if stream is not None]
        for packet in self._source.demux(streams):
            if packet.stream is self._video:
                if self._stamps is not None and packet.size and packet.dts is not None:
                    self._stamps.append(packet.dts)
                for frame in packet.decode():
                    self._write_frame(frame)
                    while pending:
                        self._write_audio(pending.pop(0))
            elif self._out_video is None:
                pending.append(packet)
            else:
                self._write_audio(packet)
        if self._out_video is None:
            raise ValueError(f"No frame of '{self._source.name}' could be decoded. Check that the file is complete.")
        self._write_encoded(None)
        if self.audio == "encoded":
            self._target.mux(self._out_audio.encode(None))

    def _write_frame(self, frame: Any) -> None:
        quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
        image = Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), k=quarter_turns))
        if self._out_video is None:
            self._add_streams(image.size, quarter_turns)
        pts = self._presentation_time(frame)
        marks = self._marks_at(float((pts - self._first_pts) * self._video.time_base))
        drawn = _pad_to_even(draw_marks(image, marks, self._marks_at.style) if marks else image)
        encoded = self._av.VideoFrame.from_ndarray(drawn, format="rgb24").reformat(
            format=self._out_video.pix_fmt, dst_colorspace=self._out_video.codec_context.colorspace
        )
        encoded.pts, encoded.time_base = pts, self._video.time_base
        self._durations[pts] = getattr(frame, "duration", None) or 0  # missing in old releases of PyAV
        self._write_encoded(encoded)
        self.num_frames += 1
        self.num_marked_frames += bool(marks)

    def _write_encoded(self, frame: Any) -> None:
        """Encode a frame; None flushes the encoder, which forgets durations: the last frame needs its own."""
        for packet in self._out_video.encode(frame):
            packet.duration = self._durations.pop(packet.pts, 0) or packet.duration
            self._target.mux(packet)

    def _presentation_time(self, frame: Any) -> int:
        """The presentation time stamp of a frame; raw streams have none and get a constant frame rate."""
        pts = frame.pts
        if self._stamps is not None:
            pts = self._stamps.popleft() if self._stamps else None
        if pts is None:
            pts = self._next_pts
        if self.num_frames == 0:
            self._first_pts = pts
        elif pts <= self._last_pts:
            raise ValueError(
                f"The time stamps of '{self._source.name}' do not increase: frame {self.num_frames} is at "
                f"{float(pts * self._video.time_base):.3f} s, the one before it at "
                f"{float(self._last_pts * self._video.time_base):.3f} s. Encode the video again first, for example "
                "with `ffmpeg -i VIDEO -fps_mode cfr NEW.mp4`."
            )
        self._last_pts = pts
        self._next_pts = pts + max(1, round(1 / (self._rate * self._video.time_base)))
        return pts

    def _add_streams(self, size: tuple[int, int], quarter_turns: int) -> None:
        """Add the output streams; upright size and, in some files, colours are only known from the first frame."""
        encoder = self._encoder(VIDEO_ENCODERS)
        self._out_video = self._target.add_stream(encoder, rate=self._rate)
        self._out_video.width, self._out_video.height = (side + side % 2 for side in size)
        self._out_video.pix_fmt = "yuv420p"  # the only format that every player supports
        writer, reader = self._out_video.codec_context, self._video.codec_context
        writer.time_base = self._video.time_base
        aspect = self._video.sample_aspect_ratio
        if aspect:
            writer.sample_aspect_ratio = 1 / aspect if quarter_turns % 2 else aspect
        writer.color_primaries, writer.color_trc = reader.color_primaries, reader.color_trc
        writer.colorspace = UNSPECIFIED if reader.colorspace == RGB else reader.colorspace
        writer.color_range = min(reader.color_range, LIMITED)  # pixels are converted to it, from full range too
        if encoder == "libx264":
            # Without B-frames the last packet is the frame displayed last: some containers end at that packet.
            self._out_video.options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        if self._audio is None:
            return
        if self._audio.codec_context.name in self._target.supported_codecs:
            self._out_audio = self._target.add_stream_from_template(self._audio)
            self.audio = "copied"
        else:
            encoder = self._encoder(AUDIO_ENCODERS)
            rate = self._audio.codec_context.sample_rate
            rates = self._av.Codec(encoder, "w").audio_rates or [rate]  # PyAV resamples to the rate of the stream
            self._out_audio = self._target.add_stream(encoder, rate=min(rates, key=lambda other: abs(other - rate)))
            self.audio = "encoded"

    def _encoder(self, encoders: dict[str, str]) -> str:
        """The first encoder that PyAV offers and whose codec the container supports."""
        for codec, encoder in encoders.items():
            if encoder in self._av.codecs_available and codec in self._target.supported_codecs:
                return encoder
        raise ValueError(
            f"A {self._target.format.name} file cannot be written: it supports none of {list(encoders)}, or PyAV "
            f"lacks the encoders {list(encoders.values())}. Choose another suffix, such as .mp4."
        )

    def _write_audio(self, packet: Any) -> None:
        if self.audio == "encoded":
            for frame in packet.decode():
                self._target.mux(self._out_audio.encode(frame))
        elif packet.dts is not None:
            packet.stream = self._out_audio
            self._target.mux(packet)


def _pad_to_even(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 with even sides, as yuv420p needs them: the border is repeated at odd sides."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
