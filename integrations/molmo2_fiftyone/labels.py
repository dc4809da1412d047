"""Molmo2's answers as FiftyOne labels, and keypoints back as the text of an answer.

Usable alone, with any `Grounding` or `StructuredAnswer`. Positions are fractions of width and height, as in FiftyOne.
Frame numbers count the frames of the file from 1: they come from `SampledFrame.source_index`, so they are correct for
variable frame rates, late starts and clips.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import fiftyone as fo

from molmo2.grounding.files import nearest_points

logger = logging.getLogger(__name__)


def image_keypoints(grounding: Any) -> fo.Keypoints:
    """The points of the first image of a prompt, one `fo.Keypoint` each, with the point's id as `index`.

    Args:
        grounding: A `Grounding`; points in other images and in videos are left out.
    """
    return fo.Keypoints(keypoints=[_keypoint(point) for point in grounding.points if point.image_index == 0])


def frame_keypoints(grounding: Any) -> dict[int, fo.Keypoints]:
    """The points of a video by frame number, for `sample.add_labels` or `sample.frames`.

    Keypoints of one tracked object share an `fo.Instance`. If the answer places an object twice at one time, the first
    position counts, as in `Track`; of two times in one frame, the one nearer to the frame.

    Raises:
        ValueError: The answer was parsed without the sampled frames of its video.
    """
    frames: dict[int, list[fo.Keypoint]] = {}
    tracked = [
        (point, instance)
        for track in grounding.tracks
        for instance in [fo.Instance()]
        for point in _one_per_frame(track)
    ]
    single = [(point, None) for point in grounding.points if point.tag != "tracks" and point.image_index is None]
    for point, instance in single + tracked:
        frames.setdefault(frame_number(point.frame), []).append(_keypoint(point, instance))
    return {number: fo.Keypoints(keypoints=frames[number]) for number in sorted(frames)}


def _one_per_frame(track: Any) -> list[Any]:
    """The points of a track, one for each of its frames."""
    placed = ((frame_number(point.frame), point, point.seconds_to_frame) for point in track.points)
    return list(nearest_points(placed).values())


def no_keypoints() -> fo.Keypoints:
    """Of a frame in which nothing was pointed at."""
    return fo.Keypoints()


def temporal_detections(events: Iterable[Any], media: Any) -> fo.TemporalDetections:
    """Events as ranges of frames of the file, both ends included.

    Args:
        events: Of a `StructuredAnswer`: `start`, `end` in seconds or None, and `description`. Events without a start
            are left out, with a warning; without an end an event is one frame; reversed ends are swapped.
        media: The `MediaInfo` of the answer; a time means the sampled frame nearest to it, as for points.
    Raises:
        ValueError: `media` has no sampled frames, or not their indices in the file.
    """
    return _detections([(event.description, event.start, event.end, {}) for event in events], media)


def structured_labels(answer: Any, media: Any) -> dict[str, Any]:
    """The sections of a structured description, by the names of FiftyOne's fields.

    `summary` is text; an answer without valid JSON becomes the `summary` unchanged. `scene_info_*` and
    `activities_primary` are Classifications of one label each, other `activities_*` of several. In videos `events`,
    `objects` (with an attribute `description`) and `text_content` are TemporalDetections, of which those without a
    time are left out, with a warning; of images there are `objects` and `text_content` as Classifications.
    """
    labels: dict[str, Any] = {"summary": answer.summary if answer.found else answer.raw.strip()}
    if media.kind == "video":
        objects = [
            (item.name, item.first_seen, item.last_seen, {"description": item.description}) for item in answer.objects
        ]
        labels["events"] = temporal_detections(answer.events, media)
        labels["objects"] = _detections(objects, media)
        labels["text_content"] = _detections([(item.text, item.start, item.end, {}) for item in answer.text], media)
    else:
        labels["objects"] = fo.Classifications(
            classifications=[
                fo.Classification(label=item.name, description=item.description) for item in answer.objects
            ]
        )
        labels["text_content"] = _classifications(item.text for item in answer.text)
    for name, value in answer.scene:
        labels[f"scene_info_{_field_name(name)}"] = fo.Classification(label=value)
    for name, values in answer.activities:
        is_primary = name == "primary"  # one type for a field, however many texts a sample has
        found = fo.Classification(label=", ".join(values)) if is_primary else _classifications(values)
        labels[f"activities_{_field_name(name)}"] = found
    return labels


def _detections(spans: Iterable[tuple[str, Any, Any, dict[str, Any]]], media: Any) -> fo.TemporalDetections:
    """Labels with start and end in seconds, or None, and further attributes."""
    detections, timeless = [], []
    for label, start, end, attributes in spans:
        times = [time for time in (start, end) if time is not None]
        if start is None:
            timeless.append(label)
            continue
        support = sorted(frame_number(media.frame_at(time)) for time in (times[0], times[-1]))
        detections.append(fo.TemporalDetection(label=label, support=support, **attributes))
    if timeless:
        logger.warning("The answer has no time for %s: left out.", ", ".join(map(repr, timeless)))
    return fo.TemporalDetections(detections=detections)


def _field_name(name: str) -> str:
    """A name of the answer as the end of a field's name."""
    return re.sub(r"\W+", "_", name.strip().lower()).strip("_") or "other"


def image_positions(keypoints: fo.Keypoints) -> list[tuple[float, float]]:
    """Positions for `format_points`, to turn corrected keypoints into training data."""
    return [tuple(place) for keypoint in keypoints.keypoints for place in keypoint.points]


def track_positions(
    frames: Mapping[int, fo.Keypoints], times: Mapping[int, float]
) -> dict[int, dict[float, tuple[float, float]]]:
    """{object id: {seconds: (x, y)}} for `format_tracks`, from keypoints of one point with an `index`.

    Args:
        frames: {frame number from 1: keypoints}, as `frame_keypoints` gives them.
        times: {frame number: seconds as printed in the prompt}, one for each of these frames.
    Raises:
        ValueError: A keypoint has no index, or not exactly one point.
    """
    tracks: dict[int, dict[float, tuple[float, float]]] = {}
    for number, keypoints in frames.items():
        for keypoint in keypoints.keypoints:
            if keypoint.index is None or len(keypoint.points) != 1:
                raise ValueError(
                    f"A keypoint in frame {number} has index {keypoint.index} and {len(keypoint.points)} points; a "
                    "track needs an index and one point."
                )
            tracks.setdefault(keypoint.index, {})[times[number]] = tuple(keypoint.points[0])
    return tracks


def _keypoint(point: Any, instance: fo.Instance | None = None) -> fo.Keypoint:
    return fo.Keypoint(label=point.label, points=[(point.x_norm, point.y_norm)], index=point.id, instance=instance)


def _classifications(names: Any) -> fo.Classifications:
    return fo.Classifications(classifications=[fo.Classification(label=name) for name in names])


def frame_number(frame: Any) -> int:
    """The frame number of a `SampledFrame` in the file, from 1.

    Raises:
        ValueError: It is unknown.
    """
    if frame is None or frame.source_index is None:
        raise ValueError(
            "It is unknown which frame of the file a time means. Parse the answer with the processor's output "
            "(`processor.post_process_grounding(text, inputs)`), or pass the video's metadata."
        )
    return frame.source_index + 1
