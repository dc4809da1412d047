"""Fills rows with training examples while they stream by, within a budget of tokens and one of crops.

Attention and text layers pay for tokens, the vision transformer for crops (a video frame is one): a row is full when
either is. Examples wait in a pool of bounded size. A row begins with the one that waited longest, so that none is left
behind, and takes the others that fill it best: a knapsack with two capacities, solved on a coarse grid.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from molmo2.training.examples import training_example

TOKEN_CELLS, CROP_CELLS = 256, 128  # of the grid on which rows are planned


@dataclass(frozen=True)
class Pack:
    """The examples of one row; `Molmo2DataCollator` takes it as one feature."""

    examples: tuple[Any, ...]
    num_tokens: int
    num_crops: int


@dataclass
class PackingReport:
    """What a packer has done so far.

    Attributes:
        rows, examples, tokens, crops: In the rows that it made.
        too_large: Examples that fit into no row and were left out.
        max_tokens, max_crops: Of a row.
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
        """Tokens in the rows as a share of those that they could hold."""
        return self.tokens / max(1, self.rows * self.max_tokens)

    @property
    def crop_fill(self) -> float:
        return self.crops / max(1, self.rows * self.max_crops)

    def __str__(self) -> str:
        return (
            f"{self.examples} examples in {self.rows} rows ({self.examples / max(1, self.rows):.1f} a row), tokens "
            f"{self.token_fill:.1%} full, crops {self.crop_fill:.1%} full, {self.too_large} too large"
        )


def num_tokens(example: Mapping[str, Any]) -> int:
    return len(example["input_ids"])


def num_crops(example: Mapping[str, Any]) -> int:
    """Crops of images and frames of videos."""
    pixels = [example.get(name) for name in ("pixel_values", "pixel_values_videos")]
    return sum(len(own) for own in pixels if own is not None)


class Packer:
    """Packs a stream of training examples.

    Args:
        max_tokens: Most tokens of a row.
        max_crops: Most crops and frames of a row.
        pool_size: So many examples wait at most; more fill rows better and take more memory.
        skip_too_large: Leave out examples that fit into no row, counting them, instead of raising an error.
    Attributes:
        report: A `PackingReport`, up to date while packing.
    """

    def __init__(self, max_tokens: int, max_crops: int, *, pool_size: int = 48, skip_too_large: bool = False):
        if min(max_tokens, max_crops, pool_size) < 1:
            raise ValueError(
                f"A packer needs room: found max_tokens={max_tokens}, max_crops={max_crops}, pool_size={pool_size}; "
                "expected at least 1 of each."
            )
        self.max_tokens, self.max_crops, self.pool_size = max_tokens, max_crops, pool_size
        self.skip_too_large = skip_too_large
        self.report = PackingReport(max_tokens, max_crops)

    def pack(self, examples: Iterable[Any]) -> Iterator[Pack]:
        """Rows of examples, as soon as the pool is full; each example is in exactly one.

        Raises:
            ValueError: For an example that is larger than a row.
        """
        pool: list[tuple[int, int, Any]] = []
        for example in examples:
            size = num_tokens(example), num_crops(example)
            if size[0] > self.max_tokens or size[1] > self.max_crops:
                self._refuse(size)
                continue
            pool.append((*size, example))
            if len(pool) == self.pool_size:
                yield self._take(pool)
        while pool:
            yield self._take(pool)

    def _refuse(self, size: tuple[int, int]) -> None:
        if not self.skip_too_large:
            raise ValueError(
                f"An example of {size[0]} tokens and {size[1]} crops fits into no row of {self.max_tokens} tokens and "
                f"{self.max_crops} crops. Raise the limits, lower `max_crops` or `num_frames` of the examples, or "
                "leave such examples out with `skip_too_large=True`."
            )
        self.report.too_large += 1

    def _take(self, pool: list[tuple[int, int, Any]]) -> Pack:
        """Remove a row's examples from the pool, the oldest first."""
        tokens, crops = (np.array([entry[side] for entry in pool]) for side in (0, 1))
        room = self.max_tokens - tokens[0], self.max_crops - crops[0]
        chosen = [0, *(place + 1 for place in fill(tokens[1:], crops[1:], *room))]
        pack = Pack(tuple(pool[place][2] for place in chosen), int(tokens[chosen].sum()), int(crops[chosen].sum()))
        for place in reversed(chosen):
            del pool[place]
        self.report.rows += 1
        self.report.examples += len(pack.examples)
        self.report.tokens += pack.num_tokens
        self.report.crops += pack.num_crops
        return pack


def fill(tokens: np.ndarray, crops: np.ndarray, max_tokens: int, max_crops: int) -> list[int]:
    """Places of the examples that together fill most of the room, ascending.

    What is filled counts as the sum of both shares. Sizes are rounded up to cells of a grid, so that a plan always
    fits; whatever still fits exactly is added then.

    Args:
        tokens, crops: (N,) int sizes.
    """
    if not len(tokens) or max_tokens < 1:
        return []
    cells = min(TOKEN_CELLS, max_tokens), min(CROP_CELLS, max(1, max_crops))
    across = -(-tokens * cells[0] // max_tokens)
    down = -(-crops * cells[1] // max(1, max_crops)) if max_crops else np.where(crops > 0, cells[1] + 1, 0)
    worth = tokens / max_tokens + crops / max(1, max_crops)
    chosen = _knapsack(across, down, worth, cells)
    left = [max_tokens - tokens[chosen].sum(), max_crops - crops[chosen].sum()]
    for place in np.argsort(-worth, kind="stable").tolist():
        if place not in chosen and tokens[place] <= left[0] and crops[place] <= left[1]:
            chosen.append(place)
            left = [left[0] - tokens[place], left[1] - crops[place]]
    return sorted(chosen)


def _knapsack(across: np.ndarray, down: np.ndarray, worth: np.ndarray, room: tuple[int, int]) -> list[int]:
    """The choice of most worth whose sizes fit into the room, by dynamic programming over all rooms.

    Args:
        across, down: (N,) int sizes, in cells.
    """
    best = np.zeros((room[0] + 1, room[1] + 1))
    taken = np.zeros((len(across), *best.shape), dtype=bool)
    for place, (width, height) in enumerate(zip(across.tolist(), down.tolist())):
        if width > room[0] or height > room[1]:
            continue
        with_it = best[: room[0] + 1 - width, : room[1] + 1 - height] + worth[place]
        without = best[width:, height:]
        better = with_it > without
        taken[place, width:, height:] = better
        best[width:, height:] = np.where(better, with_it, without)
    chosen, left = [], list(room)
    for place in reversed(range(len(across))):
        if taken[place, left[0], left[1]]:
            chosen.append(place)
            left = [left[0] - across[place], left[1] - down[place]]
    return chosen


class PackedDataset(IterableDataset):
    """Packs of the examples of a source, for a `DataLoader` or a `Trainer`.

    With several workers each packs its own share of the source. PyTorch's `IterableDataset`s, of which streams of
    Hugging Face data sets are some, divide themselves among workers, by PyTorch's rule; of anything else a worker
    takes every n-th item. A `Trainer` cuts the batches of streams into rows, which pictures do not follow, unless its
    arguments say `accelerator_config={"dispatch_batches": False}`.

    Args:
        source: Anything that can be iterated again and again: a list, a `Dataset`, a stream of data sets.
        packer: What fills the rows.
        build: Makes a training example of an item, for instance `processor.build_training_example`. None: the items
            are examples.
    """

    def __init__(self, source: Iterable[Any], packer: Packer, build: Any = None):
        self.source, self.packer, self.build = source, packer, build

    def __iter__(self) -> Iterator[Pack]:
        return self.packer.pack(self._examples())

    def _examples(self) -> Iterator[Any]:
        worker = None if isinstance(self.source, IterableDataset) else get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for place, item in enumerate(self.source):
            if place % step == number:
                yield item if self.build is None else self.build(item)


def packed_dataset(processor: Any, source: Iterable[Any], packer: Packer, **options: Any) -> PackedDataset:
    """Rows of a data set as packs.

    Args:
        source: Rows with `messages`, or built examples; see `molmo2.training.examples.training_example`.
        options: Of `build_training_example`.
    """
    return PackedDataset(source, packer, partial(training_example, processor, **options))
