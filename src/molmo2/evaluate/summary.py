"""Means over examples with confidence intervals by bootstrap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_DRAWN = 1 << 20  # indices that are drawn at a time


@dataclass(frozen=True)
class Interval:
    """How intervals are estimated: percentiles of the means of samples drawn with replacement.

    Attributes:
        confidence: Of the interval, between 0 and 1.
        num_resamples: Number of samples.
        seed: Of the draws; the same seed gives the same interval.
    Raises:
        ValueError: A value is out of its range.
    """

    confidence: float = 0.95
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.num_resamples < 1:
            raise ValueError(
                f"An interval has a confidence between 0 and 1 and one resample or more; found {self.confidence} and "
                f"{self.num_resamples}."
            )


@dataclass(frozen=True)
class Estimate:
    """A mean over examples.

    Attributes:
        low, high: Ends of its confidence interval.
        num_examples: Number of values.
    """

    mean: float
    low: float
    high: float
    num_examples: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.num_examples}"


def estimate(values: Sequence[float], interval: Interval | None = None) -> Estimate:
    """The mean of values, one per example, with its confidence interval.

    Raises:
        ValueError: There are no values, or some are not finite.
    """
    interval = Interval() if interval is None else interval
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"An estimate needs finite values, one per example; found {list(values)[:8]}.")
    rng, means = np.random.default_rng(interval.seed), []
    rows = max(1, MAX_DRAWN // len(numbers))
    for start in range(0, interval.num_resamples, rows):
        size = (min(rows, interval.num_resamples - start), len(numbers))
        means.append(numbers[rng.integers(len(numbers), size=size)].mean(axis=1))
    tail = (1 - interval.confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail]).tolist()
    return Estimate(float(numbers.mean()), low, high, len(numbers))


def summarize(
    rows: Sequence[Mapping[str, float]],
    groups: Sequence[Any] | None = None,
    interval: Interval | None = None,
) -> dict[str, Any]:
    """Means over examples of each score, or those of each group of examples.

    Args:
        rows: The scores of each example, as the functions of this package return them.
        groups: For each example the group in which it is reported, such as its category.
    Returns:
        {score: `Estimate`}; with groups {group: {score: `Estimate`}}, groups in order of their first example.
    Raises:
        ValueError: There are no examples, they have different scores, or the number of groups differs.
    """
    if groups is not None:
        if len(groups) != len(rows):
            raise ValueError(f"There are {len(rows)} examples and {len(groups)} groups; expected one per example.")
        members = {group: [row for row, own in zip(rows, groups) if own == group] for group in dict.fromkeys(groups)}
        return {group: summarize(own, interval=interval) for group, own in members.items()}
    if not rows:
        raise ValueError("There are no examples to summarize.")
    different = next((row for row in rows if row.keys() != rows[0].keys()), None)
    if different is not None:
        raise ValueError(
            f"Examples have different scores, {sorted(rows[0])} and {sorted(different)}. Summarize one metric at a "
            "time."
        )
    return {name: estimate([row[name] for row in rows], interval) for name in rows[0]}
