"""Points and tracks drawn into the original video, at its full rate, with PyAV (`pip install av`).

A video is annotated frame by frame: each is decoded, turned upright, drawn on and encoded again with its own time
stamp, so that variable frame rates and late starts stay what they are. Sound is copied, or encoded anew where the
new file cannot hold it as it is. The shape of pixels and the meaning of colours are those of the source; a full range
of brightness becomes the limited one of videos.

Where a mark stands between two sampled frames: an object that both frames show moves on a straight line from one place
to the other, at the pace of the presentation times. What only one of them shows stays where it is, for the half of the
way that is nearer to that frame. Before the first and behind the last sampled frame nothing is drawn for longer than
half a step between samples.

Tracks may be written at a lower rate than frames were sampled. What counts for them are the frames of that rhythm: the
usual step between the times at which the answer places anything. A frame inside a step hides nothing; a step that the
answer takes without an object does, and so does a gap longer than a step.
"""

import base64
import importlib
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molmo2.tools.draw import DrawingStyle, Mark, draw_marks

LONE_SAMPLE_SECONDS = 0.5  # half a step where there is only one sampled frame
# A frame belongs to the rhythm of the tracks where it is this share of a step away from all frames with a track.
DUE_SHARE_OF_STEP = 0.75
EMBEDDED_BYTES = 20_000_000  # the largest video that a notebook is given inside a cell
# Codecs by preference, and what encodes them.
VIDEO_ENCODERS = {"h264": "libx264", "vp9": "libvpx-vp9", "mpeg4": "mpeg4"}
AUDIO_ENCODERS = {"aac": "aac", "opus": "libopus", "mp3": "libmp3lame"}
# Numbers of ffmpeg for matrices and ranges of colours (AVCOL_SPC_*, AVCOL_RANGE_*).
RGB, UNSPECIFIED = 0, 2
LIMITED = 1


@dataclass(frozen=True)
class AnnotatedVideo:
    """A written video.

    Attributes:
        path: where it is.
        num_frames: frames written.
        num_marked_frames: those among them that carry a mark.
        audio: "none", "copied" or "encoded".
    """

    path: Path
    num_frames: int
    num_marked_frames: int
    audio: str

    def _repr_html_(self) -> str:
        """Plays the video in a notebook; a large one is linked instead."""
        if self.path.stat().st_size > EMBEDDED_BYTES:
            return f'<a href="{self.path}">{self.path}</a>'
        content = base64.b64encode(self.path.read_bytes()).decode()
        return f'<video controls loop width="640" src="data:video/mp4;base64,{content}"></video>'


def annotate_video(
    source: str | Path, grounding: Any, target: str | Path, style: DrawingStyle | None = None
) -> AnnotatedVideo:
    """Writes a copy of a video with the points and tracks of an answer.

    Args:
        source: the video that the answer is about.
        grounding: the answer, read with what the processor returned for this video (`inputs.media`).
        target: the file to write; its suffix chooses the container. It appears when it is complete.
        style: how marks look.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such video.
        ValueError: the answer is about images, the file has no video track, its frames have no ascending times, or no
            encoder is there.
    """
    av = _pyav()
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"There is no video file '{source}'. Check the path.")
    if target.exists() and target.samefile(source):
        raise ValueError(f"'{target}' is the source itself. Write to another file.")
    marks_at = MarksOverTime(grounding, DrawingStyle() if style is None else style)
    with _replaced_when_done(target) as partial, ExitStack() as stack:
        reading = stack.enter_context(av.open(str(source)))
        if not reading.streams.video:
            raise ValueError(f"'{source}' has no video track. Pass the video that the answer is about.")
        writing = stack.enter_context(av.open(str(partial), "w"))
        job = _Transcoding(reading, writing, marks_at)
        job.run()
    return AnnotatedVideo(target, job.num_frames, job.num_marked_frames, job.audio)


def _pyav() -> Any:
    """PyAV, imported when it is needed: most users of these files never draw into a video."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ImportError("Drawing into videos needs PyAV, which is not installed: pip install av") from error


@contextmanager
def _replaced_when_done(target: Path) -> Iterator[Path]:
    """A path beside `target` that becomes `target` at the end, and disappears if something fails on the way."""
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


# --- where the marks are ---------------------------------------------------------------------------------------------


class MarksOverTime:
    """The marks of an answer about a video, for any moment.

    Args:
        grounding: a `Grounding` of kind "video". Its points in images beside the video are left out.
        style: gives colours, captions and the length of trails.

    Raises:
        ValueError: the answer is about images.
    """

    def __init__(self, grounding: Any, style: DrawingStyle):
        if grounding.kind != "video" and grounding.points:
            raise ValueError(
                f"The answer is about {grounding.kind.replace('_', ' ')}s, not a video. Draw it with `draw_points`; "
                "if it is about a video, read it with what the processor returned for it."
            )
        self.style = style.for_answer(grounding)
        moments = () if grounding.media is None else grounding.media.moments
        points = [point for point in grounding.points if point.image_index is None]
        sampled = sorted({_seconds(moment) for moment in moments} | {_point_seconds(point) for point in points})
        tracked = {_point_seconds(point) for point in points if point.tag == "tracks"}
        self._sampled, self._rhythm = _Grid.of(sampled), _Grid.of(_due_for_tracks(sampled, tracked))
        self._objects: dict[tuple[Any, ...], dict[float, Any]] = {}
        for number, point in enumerate(points):
            identity = (point.tag, point.label, point.id) if point.tag == "tracks" else (number,)
            places, seconds = self._objects.setdefault(identity, {}), _point_seconds(point)
            if seconds not in places or point.frame_distance < places[seconds].frame_distance:
                places[seconds] = point

    def __call__(self, seconds: float) -> list[Mark]:
        """The marks to draw `seconds` after the first frame of the video."""
        marks, labelled = [], set()
        for points in self._objects.values():
            place = self._place(points, seconds)
            if place is None:
                continue
            point = next(iter(points.values()))
            words = [str(point.id)] if self.style.show_ids else []
            if self.style.show_labels and point.label and point.label not in labelled:
                labelled.add(point.label)
                words.append(" ".join(point.label.split()))
            color = self.style.color(point.label, point.id)
            marks.append(Mark(*place, color, " ".join(words), self._trail(points, seconds)))
        return marks

    def _place(self, points: dict[float, Any], seconds: float) -> tuple[float, float] | None:
        """Where an object is at a moment, as shares of width and height; None if it is not to be seen."""
        grid = self._grid(points)
        before, following = grid.around(seconds)
        old = None if before is None else points.get(before)
        new = None if following is None else points.get(following)
        if old is not None and new is not None and before is not None and following is not None:
            share = (seconds - before) / (following - before)
            return old.x_norm + share * (new.x_norm - old.x_norm), old.y_norm + share * (new.y_norm - old.y_norm)
        middle = grid.middle(before, following)
        if old is not None and seconds < middle:
            return old.x_norm, old.y_norm
        if new is not None and seconds >= middle:
            return new.x_norm, new.y_norm
        return None

    def _grid(self, points: dict[float, Any]) -> "_Grid":
        return self._rhythm if next(iter(points.values())).tag == "tracks" else self._sampled

    def _trail(self, points: dict[float, Any], seconds: float) -> tuple[tuple[float, float], ...]:
        """Earlier places back to the last frame that hides the object, or to the trail's length."""
        trail: list[tuple[float, float]] = []
        times = self._grid(points).times
        for time in reversed(times[: bisect_right(times, seconds)]):
            if time not in points or time < seconds - self.style.trail_seconds:
                break
            trail.insert(0, (points[time].x_norm, points[time].y_norm))
        return tuple(trail)


@dataclass(frozen=True)
class _Grid:
    """The times, in seconds and ascending, at which an object is either shown by the answer or hidden."""

    times: list[float]
    half_step: float

    @classmethod
    def of(cls, times: list[float]) -> "_Grid":
        return cls(times, float(np.median(np.diff(times))) / 2 if len(times) > 1 else LONE_SAMPLE_SECONDS)

    def around(self, seconds: float) -> tuple[float | None, float | None]:
        """The last time that has come, and the next; None where there is none."""
        after = bisect_right(self.times, seconds)
        return self.times[after - 1] if after else None, self.times[after] if after < len(self.times) else None

    def middle(self, before: float | None, following: float | None) -> float:
        """When what only the earlier frame shows gives way to what only the later one shows."""
        if before is not None and following is not None:
            return (before + following) / 2
        return before + self.half_step if before is not None else float(following or 0) - self.half_step


def _due_for_tracks(sampled: list[float], tracked: set[float]) -> list[float]:
    """The sampled frames in which tracks of this answer would be written down: 0 . 2 . 4 of 0 1 2 3 4 for 0 2 4.

    The usual step is the median distance of frames with a track, in frames; two such frames alone show no rhythm, and
    every frame counts. The frame in the middle of a double step counts too, as the one that hides what was there.
    """
    places = [place for place, time in enumerate(sampled) if time in tracked]
    steps = sorted(after - before for before, after in pairwise(places))
    if len(steps) < 2:
        return sampled
    distance = DUE_SHARE_OF_STEP * steps[(len(steps) - 1) // 2]
    return [
        time
        for place, time in enumerate(sampled)
        if time in tracked or all(abs(place - other) >= distance for other in places)
    ]


def _seconds(moment: Any) -> float:
    """When the frame of a moment is on display, in seconds since the first frame of the video."""
    return moment.time if moment.source_time is None else moment.source_time


def _point_seconds(point: Any) -> float:
    return float(point.key) if point.moment is None else _seconds(point.moment)


# --- reading and writing ---------------------------------------------------------------------------------------------


class _Transcoding:
    """One pass over a file: frames drawn on and encoded, packets of sound passed on."""

    def __init__(self, reading: Any, writing: Any, marks_at: "MarksOverTime"):
        self._av = _pyav()
        self._reading, self._writing, self._marks_at = reading, writing, marks_at
        self._video = reading.streams.best("video")
        self._video.thread_type = "AUTO"
        self._rate = self._video.average_rate or 25
        self._sound = reading.streams.best("audio")
        self.audio = "none"
        self._out_sound: Any = None
        self._out_video: Any = None
        # AVI tells where a frame lies in the file, not when it is shown: the n-th to be shown gets the n-th stamp.
        self._stamps: deque[int] | None = deque() if reading.format.name == "avi" else None
        self._first_pts = self._last_pts = self._next_pts = 0
        self._ticks_shown: dict[int, int] = {}  # by the time stamp of a frame
        self.num_frames = self.num_marked_frames = 0

    def run(self) -> None:
        waiting: list[Any] = []  # sound before the first frame: streams have to be declared before anything is written
        streams = [stream for stream in (self._video, self._sound) if stream is not None]
        for packet in self._reading.demux(streams):
            if packet.stream is self._video:
                if self._stamps is not None and packet.size and packet.dts is not None:
                    self._stamps.append(packet.dts)
                for frame in packet.decode():
                    self._write_frame(frame)
                    while waiting:
                        self._write_sound(waiting.pop(0))
            elif self._out_video is None:
                waiting.append(packet)
            else:
                self._write_sound(packet)
        if self._out_video is None:
            raise ValueError(f"Not one frame of '{self._reading.name}' could be decoded. Check that it is complete.")
        self._write_encoded(None)
        if self.audio == "encoded":
            self._writing.mux(self._out_sound.encode(None))

    def _write_frame(self, frame: Any) -> None:
        quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
        picture = Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), k=quarter_turns))
        if self._out_video is None:
            self._declare(picture.size, quarter_turns)
        pts = self._presentation_time(frame)
        marks = self._marks_at(float((pts - self._first_pts) * self._video.time_base))
        drawn = _even(draw_marks(picture, marks, self._marks_at.style) if marks else picture)
        encoded = self._av.VideoFrame.from_ndarray(drawn, format="rgb24").reformat(
            format=self._out_video.pix_fmt, dst_colorspace=self._out_video.codec_context.colorspace
        )
        encoded.pts, encoded.time_base = pts, self._video.time_base
        self._ticks_shown[pts] = getattr(frame, "duration", None) or 0  # not in old releases of PyAV
        self._write_encoded(encoded)
        self.num_frames += 1
        self.num_marked_frames += bool(marks)

    def _write_encoded(self, frame: Any) -> None:
        """Encodes a frame, or the rest for None. Encoders forget how long a frame is shown; the last one needs it."""
        for packet in self._out_video.encode(frame):
            packet.duration = self._ticks_shown.pop(packet.pts, 0) or packet.duration
            self._writing.mux(packet)

    def _presentation_time(self, frame: Any) -> int:
        """When a frame is shown, in ticks. Raw streams do not tell: their frames follow each other at one rate."""
        pts = frame.pts
        if self._stamps is not None:
            pts = self._stamps.popleft() if self._stamps else None
        if pts is None:
            pts = self._next_pts
        if self.num_frames == 0:
            self._first_pts = pts
        elif pts <= self._last_pts:
            raise ValueError(
                f"The frames of '{self._reading.name}' have no ascending times: frame {self.num_frames} is shown at "
                f"{float(pts * self._video.time_base):.3f} s, the one before it at "
                f"{float(self._last_pts * self._video.time_base):.3f} s. Write the video anew first, for example with "
                "`ffmpeg -i VIDEO -fps_mode cfr NEW.mp4`."
            )
        self._last_pts = pts
        self._next_pts = pts + max(1, round(1 / (self._rate * self._video.time_base)))
        return pts

    def _declare(self, size: tuple[int, int], quarter_turns: int) -> None:
        """Adds the streams; only the first frame tells the upright size and, in some files, the colours."""
        encoder = self._encoder(VIDEO_ENCODERS)
        self._out_video = self._writing.add_stream(encoder, rate=self._rate)
        self._out_video.width, self._out_video.height = (side + side % 2 for side in size)
        self._out_video.pix_fmt = "yuv420p"  # the one format that every player shows
        writer, reader = self._out_video.codec_context, self._video.codec_context
        writer.time_base = self._video.time_base
        aspect = self._video.sample_aspect_ratio
        if aspect:
            writer.sample_aspect_ratio = 1 / aspect if quarter_turns % 2 else aspect
        writer.color_primaries, writer.color_trc = reader.color_primaries, reader.color_trc
        writer.colorspace = UNSPECIFIED if reader.colorspace == RGB else reader.colorspace
        writer.color_range = min(reader.color_range, LIMITED)  # what pixels are converted to, also from a full range
        if encoder == "libx264":
            # Without B-frames the last packet is the frame shown last: some files end with that packet.
            self._out_video.options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        if self._sound is None:
            return
        if self._sound.codec_context.name in self._writing.supported_codecs:
            self._out_sound = self._writing.add_stream_from_template(self._sound)
            self.audio = "copied"
        else:
            encoder = self._encoder(AUDIO_ENCODERS)
            rate = self._sound.codec_context.sample_rate
            known = self._av.Codec(encoder, "w").audio_rates or [rate]  # PyAV resamples to the rate of the stream
            self._out_sound = self._writing.add_stream(encoder, rate=min(known, key=lambda other: abs(other - rate)))
            self.audio = "encoded"

    def _encoder(self, encoders: dict[str, str]) -> str:
        """The first encoder that this PyAV has and whose codec the new file can hold."""
        for codec, encoder in encoders.items():
            if encoder in self._av.codecs_available and codec in self._writing.supported_codecs:
                return encoder
        raise ValueError(
            f"A {self._writing.format.name} file cannot be written: it holds none of {list(encoders)}, or this PyAV "
            f"lacks {list(encoders.values())}. Choose another suffix, such as .mp4."
        )

    def _write_sound(self, packet: Any) -> None:
        if self.audio == "encoded":
            for frame in packet.decode():
                self._writing.mux(self._out_sound.encode(frame))
        elif packet.dts is not None:
            packet.stream = self._out_sound
            self._writing.mux(packet)


def _even(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 with even sides, as yuv420p needs them: an odd border is repeated."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
