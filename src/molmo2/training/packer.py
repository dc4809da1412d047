"""Packing: rows filled with training examples from a stream, within a token budget and a crop budget.

Attention and the text layers scale with tokens, the vision encoder with crops (a video frame is one crop), so a row is
full when either budget is spent. Examples wait in a pool of bounded size. Each row starts with the oldest example of
the pool, so that none waits forever, and takes the examples that fill the rest best: a knapsack problem with two
capacities, solved by dynamic programming on a coarse grid.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from molmo2.training.examples import example_from_feature

MAX_TOKEN_CELLS, MAX_CROP_CELLS = 256, 128  # size of the grid on which the knapsack is solved

PoolEntry = tuple[int, int, Any]  # tokens, crops, example


@dataclass(frozen=True)
class Pack:
    """The examples of one row; `DataCollator` takes a pack as one feature."""

    examples: tuple[Any, ...]
    num_tokens: int
    num_crops: int


@dataclass
class PackingReport:
    """Counts of what a packer has produced so far.

    Attributes:
        rows, examples, tokens, crops: Totals over the rows produced.
        too_large: Examples that were skipped because they fit into no row.
        max_tokens, max_crops: Budgets of a row.
    """

    max_tokens: int
    max_crops: int
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    crops: int = 0
    too_large: int = 0

    @property
    def token_fill(self) -> float:
        """Used fraction of the token budget, over all rows."""
        return self.tokens / max(1, self.rows * self.max_tokens)

    @property
    def crop_fill(self) -> float:
        """Used fraction of the crop budget, over all rows."""
        return self.crops / max(1, self.rows * self.max_crops)

    def __str__(self) -> str:
        return (
            f"{self.examples} examples in {self.rows} rows ({self.examples / max(1, self.rows):.1f} a row), tokens "
            f"{self.token_fill:.1%} full, crops {self.crop_fill:.1%} full, {self.too_large} too large"
        )


def num_tokens(example: Mapping[str, Any]) -> int:
    """Number of tokens of an example."""
    return len(example["input_ids"])


def num_crops(example: Mapping[str, Any]) -> int:
    """Number of image crops plus video frames of an example."""
    pixels = [example.get(name) for name in ("pixel_values", "pixel_values_videos")]
    return sum(len(values) for values in pixels if values is not None)


class Packer:
    """Groups a stream of training examples into rows.

    Args:
        max_tokens: Maximum number of tokens of a row.
        max_crops: Maximum number of crops and frames of a row.
        pool_size: Maximum number of waiting examples. A larger pool fills rows better and takes more memory.
        skip_too_large: Skip and count examples that fit into no row, instead of raising an error.
    Attributes:
        report: A `PackingReport`, updated while packing.
    """

    def __init__(self, max_tokens: int, max_crops: int, *, pool_size: int = 48, skip_too_large: bool = False):
        if min(max_tokens, max_crops, pool_size) < 1:
            raise ValueError(
                f"A packer needs capacity: found max_tokens={max_tokens}, max_crops={max_crops}, "
                f"pool_size={pool_size}; expected at least 1 of each."
            )
        self.max_tokens, self.max_crops, self.pool_size = max_tokens, max_crops, pool_size
        self.skip_too_large = skip_too_large
        self.report = PackingReport(max_tokens, max_crops)

    def pack(self, examples: Iterable[Any], pool: list[PoolEntry] | None = None) -> Iterator[Pack]:
        """Rows of examples, yielded as soon as the pool is full; each example is in exactly one row.

        Args:
            pool: The waiting examples, kept up to date; pass those of an earlier stream to continue it.
        Raises:
            ValueError: For an example that is larger than a row, unless `skip_too_large`.
        """
        pool = [] if pool is None else pool
        for example in examples:
            tokens, crops = num_tokens(example), num_crops(example)
            if tokens > self.max_tokens or crops > self.max_crops:
                self._skip_or_raise(tokens, crops)
                continue
            pool.append((tokens, crops, example))
            if len(pool) == self.pool_size:
                yield self._take_row(pool)
        while pool:
            yield self._take_row(pool)

    def _skip_or_raise(self, tokens: int, crops: int) -> None:
        if not self.skip_too_large:
            raise ValueError(
                f"An example of {tokens} tokens and {crops} crops fits into no row of {self.max_tokens} tokens and "
                f"{self.max_crops} crops. Raise the limits, lower `max_crops` or `num_frames` of the examples, or "
                "skip such examples with `skip_too_large=True`."
            )
        self.report.too_large += 1

    def _take_row(self, pool: list[PoolEntry]) -> Pack:
        """Remove the examples of one row from the pool, the oldest among them."""
        tokens, crops = (np.array([entry[column] for entry in pool]) for column in (0, 1))
        capacity = self.max_tokens - tokens[0], self.max_crops - crops[0]
        chosen = [0, *(index + 1 for index in select_examples(tokens[1:], crops[1:], *capacity))]
        pack = Pack(tuple(pool[index][2] for index in chosen), int(tokens[chosen].sum()), int(crops[chosen].sum()))
        for index in reversed(chosen):
            del pool[index]
        self.report.rows += 1
        self.report.examples += len(pack.examples)
        self.report.tokens += pack.num_tokens
        self.report.crops += pack.num_crops
        return pack


def select_examples(tokens: np.ndarray, crops: np.ndarray, max_tokens: int, max_crops: int) -> list[int]:
    """Indices of the examples that together fill both capacities best, ascending.

    The value of an example is its fraction of the tokens plus its fraction of the crops. Sizes are rounded up to grid
    cells, so that the selection always fits; examples that still fit by their exact sizes are added afterwards.

    Args:
        tokens, crops: (N,) int sizes.
        max_tokens, max_crops: Capacity that is left in the row.
    """
    if not len(tokens) or max_tokens < 1:
        return []
    capacity = min(MAX_TOKEN_CELLS, max_tokens), min(MAX_CROP_CELLS, max(1, max_crops))
    token_cells = -(-tokens * capacity[0] // max_tokens)
    if max_crops:
        crop_cells = -(-crops * capacity[1] // max_crops)
    else:
        crop_cells = np.where(crops > 0, capacity[1] + 1, 0)  # nothing with a crop fits
    value = tokens / max_tokens + crops / max(1, max_crops)
    chosen = _knapsack(token_cells, crop_cells, value, capacity)
    tokens_left, crops_left = max_tokens - tokens[chosen].sum(), max_crops - crops[chosen].sum()
    for index in np.argsort(-value, kind="stable").tolist():
        if index not in chosen and tokens[index] <= tokens_left and crops[index] <= crops_left:
            chosen.append(index)
            tokens_left, crops_left = tokens_left - tokens[index], crops_left - crops[index]
    return sorted(chosen)


def _knapsack(
    token_cells: np.ndarray, crop_cells: np.ndarray, value: np.ndarray, capacity: tuple[int, int]
) -> list[int]:
    """Indices of the most valuable selection within two capacities, by dynamic programming.

    Args:
        token_cells, crop_cells: (N,) int sizes.
        value: (N,) float.
        capacity: Of tokens and of crops, in cells.
    """
    best = np.zeros((capacity[0] + 1, capacity[1] + 1))  # value by capacity
    taken = np.zeros((len(value), *best.shape), dtype=bool)
    for index, (width, height) in enumerate(zip(token_cells.tolist(), crop_cells.tolist())):
        if width > capacity[0] or height > capacity[1]:
            continue
        with_it = best[: capacity[0] + 1 - width, : capacity[1] + 1 - height] + value[index]
        without = best[width:, height:]
        better = with_it > without
        taken[index, width:, height:] = better
        best[width:, height:] = np.where(better, with_it, without)
    chosen, left = [], list(capacity)
    for index in reversed(range(len(value))):
        if taken[index, left[0], left[1]]:
            chosen.append(index)
            left = [left[0] - token_cells[index], left[1] - crop_cells[index]]
    return chosen


class PackedDataset(IterableDataset):
    """The rows of a dataset as packs, for a `DataLoader` or a `Trainer`.

    With several workers each packs its own share of the source. An `IterableDataset` of PyTorch, as a Hugging Face
    stream is, splits itself among workers, as PyTorch expects; of any other source worker k takes every n-th item.
    `Trainer` slices the batches of iterable datasets, which does not work with images, unless its arguments say
    `accelerator_config={"dispatch_batches": False}`.

    Args:
        source: Any iterable that can be read again: a list, a `Dataset`, a stream. Items are built examples, or rows
            as for `molmo2.training.messages_from_row`.
        packer: The `Packer` that fills the rows.
        processor: Needed for rows that are not built yet.
        options: Of `build_training_example`.
    """

    def __init__(self, source: Iterable[Any], packer: Packer, processor: Any = None, **options: Any):
        self.source, self.packer, self.processor, self.options = source, packer, processor, options

    def __iter__(self) -> Iterator[Pack]:
        return self.packer.pack(self._examples())

    def _examples(self) -> Iterator[Any]:
        worker = None if isinstance(self.source, IterableDataset) else get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index, item in enumerate(self.source):
            if index % step == number:
                yield example_from_feature(self.processor, item, **self.options)
