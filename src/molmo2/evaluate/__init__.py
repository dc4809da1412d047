"""Metrics of Molmo2's evaluation: from answers and truths to scores. Needs nothing but Python and numpy.

    scores = [evaluate.pointing(answer, size, points, masks) for answer, size, points, masks in ...]
    print(evaluate.summarize(scores)["f1"])  # 0.684 [0.651, 0.716] of 436

Each metric takes one answer as text and the truth, and returns the scores of that example by name.
"""

from collections.abc import Callable

from molmo2.data.evaluation import count_bin
from molmo2.evaluate.answers import CHOICE_RULES, anls, edit_distance, multiple_choice, relaxed_accuracy
from molmo2.evaluate.assignment import assign
from molmo2.evaluate.counting import countbench, image_counting, video_counting
from molmo2.evaluate.masks import contains, mask_array
from molmo2.evaluate.pointing import Scores, point_scores, pointbench, pointing, video_pointing
from molmo2.evaluate.summary import Estimate, Interval, estimate, summarize
from molmo2.evaluate.tracking import frames_of, hota, j_and_f, track_scores, tracking

METRICS: dict[str, Callable[..., Scores]] = {
    metric.__name__: metric
    for metric in (
        pointing,
        pointbench,
        image_counting,
        countbench,
        video_counting,
        video_pointing,
        tracking,
        multiple_choice,
        anls,
        relaxed_accuracy,
    )
}

__all__ = [
    "CHOICE_RULES",
    "METRICS",
    "Estimate",
    "Interval",
    "Scores",
    "anls",
    "assign",
    "contains",
    "count_bin",
    "countbench",
    "edit_distance",
    "estimate",
    "frames_of",
    "hota",
    "image_counting",
    "j_and_f",
    "mask_array",
    "multiple_choice",
    "point_scores",
    "pointbench",
    "pointing",
    "relaxed_accuracy",
    "summarize",
    "track_scores",
    "tracking",
    "video_counting",
    "video_pointing",
]
