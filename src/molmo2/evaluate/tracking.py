"""Scores of tracks: precision, recall and F1 by frame, HOTA, and J&F with masks from a segmenter.

Sources: the published evaluation of Molmo2; J. Luiten et al., HOTA, 2021; F. Perazzi et al., DAVIS, 2016.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from molmo2.evaluate.assignment import assign
from molmo2.evaluate.masks import contains, mask_array
from molmo2.evaluate.pointing import Scores, count_hits, precision_recall
from molmo2.grounding.parse import parse_grounding

Position = tuple[float, float]
Frames = dict[int, dict[Any, Position]]  # frame -> object -> (x, y) in pixels
MASK_SIMILARITY = 0.5  # any alpha gives the same, since the similarity of a point and a mask is 0 or 1
BOUNDARY_TOLERANCE = 0.008  # of the diagonal


def tracking(
    answer: str,
    size: tuple[float, float],
    fps: float,
    points: Mapping[int, Mapping[Any, Position]],
    masks: Mapping[Any, Mapping[int, Any]],
) -> Scores:
    """`precision`, `recall`, `f1`, `hota`, `deta` and `assa` of the tracks that an answer gives (VideoTrackEval).

    Args:
        size: (width, height) of the video.
        fps: Of the frame numbers; a time in the answer is the frame round(seconds * fps).
        points: By frame and object the true (x, y) in pixels.
        masks: By object and frame the masks.
    """
    return track_scores(frames_of(answer, size, fps), points, masks)


def frames_of(answer: str, size: tuple[float, float], fps: float) -> Frames:
    """The tracks of an answer by frame and id, in pixels; of two positions of an object in a frame the first counts.

    Raises:
        ValueError: `fps` is not above 0.
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps!r}; expected frames per second above 0.")
    frames: Frames = {}
    for entry in parse_grounding(answer, size, kind="video").frames(fps):
        frames[entry["frame"]] = {**entry["points"], **frames.get(entry["frame"], {})}
    return frames


def track_scores(
    predicted: Mapping[int, Mapping[Any, Position]],
    points: Mapping[int, Mapping[Any, Position]],
    masks: Mapping[Any, Mapping[int, Any]],
) -> Scores:
    """`tracking` of tracks that are read already.

    Precision, recall and F1 are those of points in each frame that has a prediction or a truth, averaged. As
    published, the recall of a frame divides by all objects of the video, visible or not.

    Args:
        predicted: By frame and id (x, y) in pixels.
        points, masks: As for `tracking`.
    """
    frames = sorted(frame for frame in {*predicted, *points} if predicted.get(frame) or points.get(frame))
    names = ("precision", "recall", "f1")
    rows = [_frame_scores(predicted.get(frame, {}), points.get(frame, {}), masks, frame) for frame in frames]
    means = {name: float(np.mean([row[name] for row in rows])) if rows else 1.0 for name in names}
    sequence = []
    for frame in frames:
        own, true = predicted.get(frame, {}), points.get(frame, {})
        similarity = [[float(_is_inside(masks, name, frame, position)) for position in own.values()] for name in true]
        sequence.append((list(true), list(own), similarity))
    return {**means, **{name: values[0] for name, values in hota(sequence, [MASK_SIMILARITY]).items()}}


def _frame_scores(
    predicted: Mapping[Any, Position],
    points: Mapping[Any, Position],
    masks: Mapping[Any, Mapping[int, Any]],
    frame: int,
) -> Scores:
    if not points:  # a frame is only scored if something is predicted or true in it
        return precision_recall(0, len(predicted), 0)
    own_masks = [masks.get(name, {}).get(frame) for name in points]
    hits = count_hits(list(predicted.values()), list(points.values()), own_masks)
    return precision_recall(hits, len(predicted), len({*masks, *points}))


def _is_inside(masks: Mapping[Any, Mapping[int, Any]], name: Any, frame: int, position: Position) -> bool:
    return contains(masks.get(name, {}).get(frame), round(float(position[0])), round(float(position[1])))


# --- HOTA ------------------------------------------------------------------------------------------------------------


def hota(
    frames: Sequence[tuple[Sequence[Any], Sequence[Any], Any]], alphas: Sequence[float]
) -> dict[str, list[float]]:
    """`hota`, `deta` and `assa` of one sequence, each at every alpha.

    Args:
        frames: For each frame the ids of the true objects (N), those of the tracker (M), each once, and their
            similarities (N, M), 0..1.
        alphas: A match has at least this similarity.
    Returns:
        1 where there is neither truth nor prediction in any frame, 0 where there is one of them only.
    """
    true_counts, own_counts = _counts(frames, 0), _counts(frames, 1)
    if not true_counts or not own_counts:
        value = float(not true_counts and not own_counts)
        return {name: [value] * len(alphas) for name in ("hota", "deta", "assa")}
    rows, columns = ({name: place for place, name in enumerate(counts)} for counts in (true_counts, own_counts))
    sizes = np.add.outer(list(true_counts.values()), list(own_counts.values())).astype(np.float64)
    tables = [
        (
            [rows[name] for name in true],
            [columns[name] for name in own],
            np.asarray(similarity, dtype=np.float64).reshape(len(true), len(own)),
        )
        for true, own, similarity in frames
        if len(true) and len(own)
    ]
    common = np.zeros_like(sizes)
    for true, own, similarity in tables:
        total = similarity.sum(0)[None] + similarity.sum(1)[:, None] - similarity
        share = np.divide(similarity, total, out=np.zeros_like(similarity), where=total > np.finfo(float).eps)
        common[np.ix_(true, own)] += share
    alignment = common / (sizes - common)
    matches = np.zeros((len(alphas), *sizes.shape))
    for true, own, similarity in tables:
        for row, column in assign(-alignment[np.ix_(true, own)] * similarity):
            is_match = similarity[row, column] >= np.asarray(alphas) - np.finfo(float).eps
            matches[:, true[row], own[column]] += is_match
    num_matches = matches.sum((1, 2))
    deta = num_matches / (sum(true_counts.values()) + sum(own_counts.values()) - num_matches)
    assa = (matches * (matches / np.maximum(1, sizes - matches))).sum((1, 2)) / np.maximum(1, num_matches)
    return {"hota": np.sqrt(deta * assa).tolist(), "deta": deta.tolist(), "assa": assa.tolist()}


def _counts(frames: Sequence[tuple[Sequence[Any], Sequence[Any], Any]], side: int) -> dict[Any, int]:
    """In how many frames each id occurs.

    Raises:
        ValueError: An id occurs twice in a frame.
    """
    counts: dict[Any, int] = {}
    for number, frame in enumerate(frames):
        if len(set(frame[side])) != len(frame[side]):
            raise ValueError(f"Frame {number} has an id twice: {list(frame[side])}. Ids are unique within a frame.")
        for name in frame[side]:
            counts[name] = counts.get(name, 0) + 1
    return counts


# --- J&F -------------------------------------------------------------------------------------------------------------


def j_and_f(
    predicted: Mapping[int, Mapping[Any, Position]],
    masks: Mapping[Any, Mapping[int, Any]],
    segment: Callable[[Mapping[int, Position]], Mapping[int, Any]],
) -> Scores:
    """`j`, `f` and `j_and_f` of masks that a segmenter such as SAM 2 makes from tracks.

    Tracks are assigned to objects by the best sum of J&F. Frames are those in which an object has a mask; a missing
    mask counts as empty, and so does every frame of an object without a track.

    Args:
        predicted: By frame and id (x, y) in pixels, as `frames_of` returns them.
        masks: By object and frame the true masks.
        segment: From the points of one track, {frame: (x, y)}, to its masks, {frame: (H, W)}.
    Raises:
        ValueError: There are no true masks.
    """
    shown = {name: {frame: mask for frame, mask in of.items() if mask is not None} for name, of in masks.items()}
    true = {name: {frame: mask_array(mask) for frame, mask in of.items()} for name, of in shown.items() if of}
    if not true:
        raise ValueError("There are no true masks, so J&F is not defined.")
    tracks: dict[Any, dict[int, Position]] = {}
    for frame in sorted(predicted):
        for name, position in predicted[frame].items():
            tracks.setdefault(name, {})[frame] = position
    made = [segment(track) for track in tracks.values()]
    empty: Mapping[int, Any] = {}
    table = np.array([[_mask_scores(own, of) for own in [*made, empty]] for of in true.values()])  # (N, M + 1, 2)
    chosen = dict(assign(-table[:, :-1].mean(-1))) if made else {}
    j, f = np.mean([table[row, chosen.get(row, -1)] for row in range(len(true))], axis=0).tolist()
    return {"j": j, "f": f, "j_and_f": (j + f) / 2}


def _mask_scores(predicted: Mapping[int, Any], true: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Means of J and F over the frames of one object."""
    pairs = [
        (np.zeros_like(mask) if predicted.get(frame) is None else mask_array(predicted[frame]), mask)
        for frame, mask in true.items()
    ]
    values = [(region_iou(own, mask), boundary_f(own, mask)) for own, mask in pairs]
    return float(np.mean([j for j, _ in values])), float(np.mean([f for _, f in values]))


def region_iou(predicted: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two (H, W) bool masks; 1 if both are empty."""
    union = np.count_nonzero(predicted | true)
    return np.count_nonzero(predicted & true) / union if union else 1.0


def boundary_f(predicted: np.ndarray, true: np.ndarray) -> float:
    """F: F1 of boundary pixels that lie within 0.8 % of the diagonal (rounded up) of the other boundary.

    Args:
        predicted, true: (H, W) bool.
    """
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*true.shape))
    own, other = _boundary(predicted), _boundary(true)
    num_own, num_other = np.count_nonzero(own), np.count_nonzero(other)
    if not num_own or not num_other:
        return float(num_own == num_other)
    precision = np.count_nonzero(own & _dilated(other, radius)) / num_own
    recall = np.count_nonzero(other & _dilated(own, radius)) / num_other
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour; the last row and column repeat."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    return (here != padded[:-1, 1:]) | (here != padded[1:, :-1]) | (here != padded[1:, 1:])


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within `radius` of a pixel of the mask."""
    height, width = mask.shape
    sums = np.zeros((height, width + 2 * radius + 1), dtype=np.int64)
    sums[:, 1:] = np.cumsum(np.pad(mask, ((0, 0), (radius, radius))), axis=1)
    result = np.zeros_like(mask)
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        reach = math.isqrt(radius**2 - dy**2)
        first, last = radius - reach, radius + reach + 1
        near = sums[:, last : last + width] > sums[:, first : first + width]
        target = slice(max(0, dy), min(height, height + dy))
        source = slice(max(0, -dy), min(height, height - dy))
        result[target] |= near[source]
    return result
