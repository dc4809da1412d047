"""Objects of an answer about a video, frame by frame: what formats with tracks are written from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from molmo2.grounding.files import points_by_frame, require_pixels
from molmo2.grounding.parse import Grounding, Point

DEFAULT_LABEL = "object"
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


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
    """The label without control characters, which XML has not, or "object" where the answer has none: annotation
    tools refuse empty labels.
    """
    return CONTROL.sub(" ", point.label).strip() or DEFAULT_LABEL


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


def require_names(grounding: Grounding, names: Sequence[str]) -> Sequence[tuple[float, float]]:
    """The sizes of the images, (width, height), of which each has a name.

    Raises:
        ValueError: there are not as many names as images of known size.
    """
    sizes = () if grounding.media is None else grounding.media.sizes
    if len(names) != len(sizes):
        raise ValueError(
            f"The answer is about {len(sizes)} image(s) of known size, but there are {len(names)} name(s). Read it "
            "with the processor's output or with sizes, and pass one name for each image."
        )
    return sizes


def is_about_video(grounding: Grounding, format_name: str) -> bool:
    """Whether the points are in a video.

    Raises:
        ValueError: some are in a video and others in images.
    """
    in_video = [point.image_index is None for point in grounding.points]
    if any(in_video) and not all(in_video):
        raise ValueError(
            f"{format_name}: the answer has points in a video and in images, whose indices would mix. Ask about them "
            "in two questions."
        )
    return any(in_video)


def object_tracks(grounding: Grounding, format_name: str, fps: float | None = None) -> list[ObjectTrack]:
    """The objects of an answer about one video, by number.

    Args:
        format_name: Of the file to be written, for messages.
        fps: Rate of the video, where the answer was read without the frames of the source.

    Raises:
        ValueError: there are points in images, pixels are unknown, or source frames are.
    """
    is_about_video(grounding, format_name)
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
