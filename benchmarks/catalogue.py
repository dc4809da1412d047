"""All rows and growth curves by name."""

from collections.abc import Callable
from functools import partial

from benchmarks import curves, gpu, images, models, questions, startup, videos  # noqa: F401  (these register their rows)
from benchmarks.curves import CURVES
from benchmarks.harness import ROWS, Side, Work


def find(name: str, point: int | None) -> tuple[Callable[[Side], Work], str]:
    """What prepares a row, or one point of a curve, and the device that it runs on."""
    if point is None:
        return ROWS[name].prepare, ROWS[name].device
    return partial(CURVES[name].prepare, point=point), "cpu"
