"""Answers as the arrays of `supervision`, for its annotators, zones and line counters."""

from typing import Any

import numpy as np

from molmo2.grounding.files import points_by_frame, require_pixels
from molmo2.grounding.parse import Grounding, Point
from molmo2.interop.objects import is_about_video, label_of, labels_of


def to_supervision(grounding: Grounding, *, box_size: float | None = None, fps: float | None = None) -> dict[int, Any]:
    """The points of an answer, image by image or frame by frame.

    Args:
        box_size: None for `sv.KeyPoints` with one key point each. Else `sv.Detections`: boxes around the points
            with sides of this many pixels, which may reach beyond the image, for annotators and trackers that
            want boxes.
        fps: Rate of the video, where the answer was read without the frames of the source.
    Returns:
        By index of the image in the prompt, or of the frame in the video, both from 0, ascending; those without
        points are missing. `class_id` counts the labels of the whole answer in order of appearance, and
        `data["class_name"]` has them. Ids of objects in videos are `tracker_id` of detections, and
        `data["tracker_id"]` of key points, which have no such field.

    Raises:
        ImportError: `supervision` is not installed.
        ValueError: pixels are unknown, source frames are, or the answer mixes a video with images.
    """
    try:
        import supervision
    except ImportError as error:
        raise ImportError("`to_supervision` needs the package supervision: pip install supervision") from error
    require_pixels(grounding.points, "supervision")
    has_video = is_about_video(grounding, "supervision")
    places: dict[int, list[tuple[int | None, Point]]] = {}
    if has_video:
        for (frame, number), point in points_by_frame(grounding.points, fps).items():
            places.setdefault(frame, []).append((number, point))
    else:
        for point in sorted(grounding.points, key=lambda point: point.image_index or 0):
            places.setdefault(point.image_index or 0, []).append((None, point))
    classes = labels_of(grounding)
    found = {}
    for index, entries in places.items():
        names = [label_of(point) for _, point in entries]
        class_id = np.array([classes.index(name) for name in names])
        data: dict[str, Any] = {"class_name": np.array(names)}
        centers = np.array([(point.x, point.y) for _, point in entries], np.float32)  # (n, 2)
        tracker_id = np.array([number for number, _ in entries]) if has_video else None
        if box_size is None:
            data |= {} if tracker_id is None else {"tracker_id": tracker_id}
            found[index] = supervision.KeyPoints(xy=centers[:, None], class_id=class_id, data=data)
        else:
            boxes = np.concatenate([centers - box_size / 2, centers + box_size / 2], axis=1)
            found[index] = supervision.Detections(boxes, class_id=class_id, tracker_id=tracker_id, data=data)
    return found
