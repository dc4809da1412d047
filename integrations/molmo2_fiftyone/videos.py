"""The path and range of a video in FiftyOne: all that Molmo2's processor needs, which samples frames from the file."""

from dataclasses import dataclass
from typing import Any

from molmo2.video.decoding.opening import open_video


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


def _is_clip(sample: Any) -> bool:
    from fiftyone.core.clips import ClipView

    return isinstance(sample, ClipView)
