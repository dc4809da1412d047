"""The path and range of a video in FiftyOne, without its second decoder.

FiftyOne's loops over videos open a reader for each, which starts ffprobe and an ffmpeg that decodes from the first
frame on. Molmo2's processor samples frames from the file itself and needs only the path and the range.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import eta.core.video as etav
import fiftyone.core.models as fom

from molmo2.video.decoding.backends import open_video


@dataclass(frozen=True)
class VideoPart:
    """A video, or a part of one.

    Attributes:
        path: The file.
        support: First and last frame, counted from 1, both included; None is the whole video.
    """

    path: str
    support: tuple[int, int] | None = None

    @classmethod
    def from_sample(cls, sample: Any) -> "VideoPart":
        """The file of a sample; for a clip (`to_clips`) its part of the file."""
        return cls(sample.filepath, tuple(sample.support) if _is_clip(sample) else None)

    @classmethod
    def from_reader(cls, reader: Any) -> "VideoPart":
        """The file and range of one of FiftyOne's own readers."""
        first, last = reader._ranges.limits
        return cls(reader.inpath, None if (first, last) == (1, reader.total_frame_count) else (first, last))

    def clip(self) -> tuple[float, float] | None:
        """The part in seconds from the first frame, as the processor's option `clip`.

        It ends in the middle of its last frame, so that rounding never adds or drops one.

        Raises:
            ValueError: The file has fewer frames.
        """
        if self.support is None:
            return None
        with open_video(self.path) as reader:
            timeline = reader.timeline
        first, last = self.support
        if not 1 <= first <= last <= timeline.num_frames:
            raise ValueError(
                f"Frames {first} to {last} of {self.path} were asked for, but it has {timeline.num_frames}."
            )
        starts = timeline.start_seconds
        following = starts[last] if last < timeline.num_frames else timeline.duration_seconds
        return float(starts[first - 1]), float(starts[last - 1] + following) / 2


class _UnopenedVideo:
    """A stand-in for `eta.core.video.FFmpegVideoReader` that only keeps the path and the range."""

    def __init__(self, inpath: str, frames: Any = None):
        self.part = VideoPart(inpath, None if frames is None else (frames.first, frames.last))

    def __enter__(self) -> VideoPart:
        return self.part

    def __exit__(self, *_: Any) -> None:
        pass


_leaves_unopened: ContextVar[bool] = ContextVar("leaves_unopened", default=False)


class _VideoModule(ModuleType):
    """`eta.core.video` for the loops of `fiftyone.core.models`; its reader depends on the calling thread."""

    def __getattr__(self, name: str) -> Any:
        return getattr(etav, name)

    @property
    def FFmpegVideoReader(self) -> Any:
        return _UnopenedVideo if _leaves_unopened.get() else etav.FFmpegVideoReader


@contextmanager
def videos_left_unopened() -> Iterator[None]:
    """Inside it, FiftyOne's loops pass a `VideoPart` for each video, and need neither ffprobe nor ffmpeg.

    FiftyOne has no hook for this, so the name `etav` of its module `fiftyone.core.models` is replaced once. Only loops
    of that module in the thread that entered are affected; `eta` itself, other threads and other models are not.
    """
    if not isinstance(fom.etav, _VideoModule):
        fom.etav = _VideoModule(etav.__name__)
    token = _leaves_unopened.set(True)
    try:
        yield
    finally:
        _leaves_unopened.reset(token)


def _is_clip(sample: Any) -> bool:
    from fiftyone.core.clips import ClipView

    return isinstance(sample, ClipView)
