"""Which video, and which part of it: what FiftyOne hands to a model, without the decoding that it does beside.

FiftyOne's loops over videos open a reader for each, which starts ffprobe and an ffmpeg that decodes from the first
frame on. Molmo2's processor picks its frames from the file itself and needs nothing of that but the path and range.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import eta.core.video as etav


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
    def of_sample(cls, sample: Any) -> "VideoPart":
        """The file of a sample; of a clip (`to_clips`) its part of the file."""
        return cls(sample.filepath, tuple(sample.support) if _is_clip(sample) else None)

    @classmethod
    def of_reader(cls, reader: Any) -> "VideoPart":
        """What one of FiftyOne's own readers would read."""
        first, last = reader._ranges.limits
        return cls(reader.inpath, None if (first, last) == (1, reader.total_frame_count) else (first, last))

    def clip(self, decoding: Any) -> tuple[float, float] | None:
        """The part in seconds from the first frame, as the processor's option `clip`.

        It ends in the middle of its last frame, so that this is the last frame to be shown, whatever the rounding.

        Args:
            decoding: The remote code's `molmo2.video.decoding.backends`, which knows when each frame begins.
        Raises:
            ValueError: The file ends before the part does.
        """
        if self.support is None:
            return None
        with decoding.open_video(self.path) as reader:
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
    """In place of `eta.core.video.FFmpegVideoReader`: keeps the path and the range, starts nothing."""

    def __init__(self, inpath: str, frames: Any = None):
        self.part = VideoPart(inpath, None if frames is None else (frames.first, frames.last))

    def __enter__(self) -> VideoPart:
        return self.part

    def __exit__(self, *_: Any) -> None:
        pass


@contextmanager
def videos_left_unopened() -> Iterator[None]:
    """While it lasts, FiftyOne's loops hand over a `VideoPart` for each video, and need neither ffprobe nor ffmpeg."""
    usual = etav.FFmpegVideoReader
    etav.FFmpegVideoReader = _UnopenedVideo
    try:
        yield
    finally:
        etav.FFmpegVideoReader = usual


def _is_clip(sample: Any) -> bool:
    from fiftyone.core.clips import ClipView

    return isinstance(sample, ClipView)
