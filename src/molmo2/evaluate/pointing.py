"""Scores of points in images and videos: are they in the masks of the objects?

Source of the definitions: the published evaluation of Molmo2. Coordinates are pixels (x, y) from the upper left
corner, masks are (H, W) arrays or COCO's run lengths.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from molmo2.evaluate.assignment import assign
from molmo2.evaluate.masks import contains
from molmo2.grounding.parse import parse_grounding

Scores = dict[str, float]
F1_EPSILON = 1e-10  # of the published formula, so a perfect F1 is 1 - 5e-11


def pointing(answer: str, size: tuple[float, float], points: Sequence[Any], masks: Sequence[Any]) -> Scores:
    """`precision`, `recall` and `f1` of the points that an answer gives in one image (pixmo-points-eval).

    Args:
        size: (width, height) of the image.
        points: (M, 2) true points in pixels.
        masks: M masks, in the same order.
    """
    return point_scores(points_of(answer, size), points, masks)


def point_scores(predicted: Sequence[Any], points: Sequence[Any], masks: Sequence[Any]) -> Scores:
    """`precision`, `recall` and `f1`: the assignment of least distance, a hit where the rounded point is in the mask.

    Args:
        predicted: (N, 2) points in pixels.
        points, masks: As for `pointing`.
    Raises:
        ValueError: The numbers of points and masks differ.
    """
    _require_same_length(points, masks)
    return precision_recall(count_hits(predicted, points, masks), len(predicted), len(masks))


def count_hits(predicted: Sequence[Any], points: Sequence[Any], masks: Sequence[Any]) -> int:
    """Number of assigned points that lie in the mask of their object; arguments as for `point_scores`."""
    return sum(_is_hit(masks[true], predicted[own]) for own, true in _pairs(predicted, points))


def pointbench(answer: str, size: tuple[float, float], mask: Any) -> Scores:
    """`correct` is 1 if the answer has a point and all of its points, truncated to whole pixels, lie in the mask."""
    predicted = points_of(answer, size)
    is_correct = bool(predicted) and all(contains(mask, int(x), int(y)) for x, y in predicted)
    return {"correct": float(is_correct)}


def video_pointing(
    answer: str,
    size: tuple[float, float],
    duration: float,
    points: Sequence[Any],
    masks: Sequence[Mapping[float, Any]],
) -> Scores:
    """`precision`, `recall`, `f1` and `valid` (something was predicted) of points in a video (VideoPointEval).

    Points are assigned by their distance in (time, x, y), as percentages of the duration and the size. A hit lies in
    the mask that the object has at exactly the time as written in the answer.

    Args:
        size: (width, height) of the video.
        duration: Seconds.
        points: (M, 3) true points: seconds, x, y in pixels.
        masks: For each of them masks by their time in seconds.
    Raises:
        ValueError: The numbers of points and masks differ, or the duration is not above 0.
    """
    _require_same_length(points, masks)
    if not 0 < duration < math.inf:
        raise ValueError(f"The duration is {duration!r}; expected seconds above 0.")
    found = parse_grounding(answer, size, kind="video").points
    predicted = [(float(point.key), point.x, point.y) for point in found]
    whole = np.array([duration, *size], dtype=np.float64)
    percent = [
        np.round(np.asarray(places, dtype=np.float64).reshape(-1, 3) / whole * 100, 1)
        for places in (predicted, points)
    ]
    pairs = _pairs(*percent)
    hits = sum(_is_hit(masks[true].get(predicted[own][0]), predicted[own][1:]) for own, true in pairs)
    return {**precision_recall(hits, len(predicted), len(masks)), "valid": float(bool(predicted))}


def precision_recall(hits: int, num_predicted: int, num_true: int) -> Scores:
    """`precision`, `recall` and `f1`; all 1 where nothing is predicted and nothing is true, 0 where one of them is."""
    if not num_predicted or not num_true:
        value = float(num_predicted == num_true)
        return {"precision": value, "recall": value, "f1": value}
    precision, recall = hits / num_predicted, hits / num_true
    f1 = 2 * precision * recall / (precision + recall + F1_EPSILON) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def points_of(answer: str, size: tuple[float, float]) -> list[tuple[float, float]]:
    """Pixels of all points that an answer about one image gives."""
    found = parse_grounding(answer, size, kind="image").points
    return [(point.x, point.y) for point in found if point.x is not None and point.y is not None]


def _pairs(predicted: Any, points: Any) -> list[tuple[int, int]]:
    """The assignment of least sum of Euclidean distances, none where one side is empty."""
    if not len(predicted) or not len(points):
        return []
    one, other = np.asarray(predicted, dtype=np.float64), np.asarray(points, dtype=np.float64)
    return assign(np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1)))


def _is_hit(mask: Any, at: Sequence[Any]) -> bool:
    x, y = at
    return contains(mask, round(float(x)), round(float(y)))


def _require_same_length(points: Sequence[Any], masks: Sequence[Any]) -> None:
    if len(points) != len(masks):
        raise ValueError(f"There are {len(points)} true points and {len(masks)} masks; expected one mask per point.")
