"""Objects of an answer about a video, frame by frame: what formats with tracks are written from."""

from dataclasses import dataclass
from itertools import pairwise

from molmo2.grounding.files import points_by_frame, require_pixels
from molmo2.grounding.parse import Grounding, Point

DEFAULT_LABEL = "object"


@dataclass(frozen=True)
class Appearance:
    """One object in one frame.

    Attributes:
        frame: Index of the frame in the source, from 0.
        is_last: The object is not in the next sampled frame, or there is none: what is drawn between key frames ends
            here.
    """

    frame: int
    point: Point
    is_last: bool


@dataclass(frozen=True)
class ObjectTrack:
    """One object of a video and where it appears, by ascending frame."""

    number: int
    label: str
    appearances: tuple[Appearance, ...]


def label_of(point: Point) -> str:
    """The label, or "object" where the answer has none: annotation tools refuse empty labels."""
    return point.label or DEFAULT_LABEL


def labels_of(grounding: Grounding) -> list[str]:
    """Labels in order of appearance, each once."""
    return list(dict.fromkeys(map(label_of, grounding.points)))


def size_of(grounding: Grounding, format_name: str) -> tuple[float, float]:
    """(width, height) of the video.

    Raises:
        ValueError: it is unknown.
    """
    if grounding.media is None or not grounding.media.sizes:
        raise ValueError(
            f"{format_name} needs the size of the video, which this answer does not know. Read the answer with the "
            "processor's output."
        )
    return grounding.media.sizes[0]


def object_tracks(grounding: Grounding, format_name: str, fps: float | None = None) -> list[ObjectTrack]:
    """The objects of an answer about one video, by number.

    Args:
        format_name: Of the file to be written, for messages.
        fps: Rate of the video, where the answer was read without the frames of the source.

    Raises:
        ValueError: there are points in images, pixels are unknown, or source frames are.
    """
    if any(point.image_index is not None for point in grounding.points):
        raise ValueError(f"{format_name} is about one video, but the answer has points in images. Write them apart.")
    require_pixels(grounding.points, format_name)
    places: dict[int, dict[int, Point]] = {}
    for (frame, number), point in points_by_frame(grounding.points, fps).items():
        places.setdefault(number, {})[frame] = point
    sampled = () if grounding.media is None else grounding.media.sampled_frames
    order = sorted({frame.source_index for frame in sampled if frame.source_index is not None})
    following = dict(pairwise(order))
    tracks = []
    for number in sorted(places):
        frames = list(places[number])
        after = dict(pairwise(frames))
        appearances = tuple(
            Appearance(frame, point, frame not in after or following.get(frame, after[frame]) != after[frame])
            for frame, point in places[number].items()
        )
        tracks.append(ObjectTrack(number, label_of(appearances[0].point), appearances))
    return tracks
