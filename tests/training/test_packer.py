"""The packer: every example once, both budgets kept, rows well filled, a pool that stays small."""

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from molmo2.training import DataCollator, Pack, PackedDataset, Packer
from molmo2.training.packer import num_crops, num_tokens, select_examples
from support.model_inputs import processor
from support.training_cases import CONVERSATIONS, collate, example


def sized(tokens: int, crops: int = 0, frames: int = 0, **more) -> dict:
    """What the packer looks at."""
    row = {"input_ids": torch.zeros(tokens), **more}
    row.update({"pixel_values": torch.zeros(crops, 1)} if crops else {})
    row.update({"pixel_values_videos": torch.zeros(frames, 1)} if frames else {})
    return row


def sizes_of(pack: Pack) -> list[tuple[int, int]]:
    return [(num_tokens(row), num_crops(row)) for row in pack.examples]


def test_frames_count_as_crops():
    assert num_crops(sized(9, 3, 4)) == 7
    assert num_crops(sized(9)) == 0
    row = example(CONVERSATIONS["image and video"])
    assert num_crops(row) == len(row["pixel_values"]) + len(row["pixel_values_videos"])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), max_size=60),
    pool_size=st.integers(1, 12),
)
@settings(max_examples=60)
def test_each_example_is_in_one_row_within_both_budgets(sizes, pool_size):
    packer = Packer(100, 10, pool_size=pool_size)
    packs = list(packer.pack(sized(*size, number=number) for number, size in enumerate(sizes)))
    numbers = [row["number"] for pack in packs for row in pack.examples]
    assert sorted(numbers) == list(range(len(sizes)))
    for pack in packs:
        assert (pack.num_tokens, pack.num_crops) == tuple(map(sum, zip(*sizes_of(pack), strict=True)))
        assert pack.num_tokens <= 100
        assert pack.num_crops <= 10
    assert packer.report.examples == len(sizes)
    assert packer.report.tokens == sum(size[0] for size in sizes)


@given(sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 8)), min_size=1, max_size=9))
@settings(max_examples=60)
def test_rows_are_filled_nearly_as_well_as_possible(sizes):
    """Against every subset; sizes are rounded up to the cells of the grid, which costs little."""
    tokens, crops = (np.array(side) for side in zip(*sizes, strict=True))

    def value(chosen) -> float:
        chosen = list(chosen)
        return float(tokens[chosen].sum() / 100 + crops[chosen].sum() / 12)

    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(sizes)), n) for n in range(len(sizes) + 1)
    )
    fitting = [own for own in subsets if tokens[list(own)].sum() <= 100 and crops[list(own)].sum() <= 12]
    chosen = select_examples(tokens, crops, 100, 12)
    assert tuple(chosen) in fitting
    assert value(chosen) == pytest.approx(max(map(value, fitting)))


@pytest.mark.parametrize(
    ("sizes", "capacity", "chosen"),
    [
        ([(60, 0), (50, 0), (50, 0)], (100, 10), [1, 2]),  # the largest first would leave 40 empty
        ([(10, 8), (10, 5), (10, 5)], (100, 10), [1, 2]),  # crops are scarce
        ([(30, 9), (70, 0), (30, 0)], (100, 9), [0, 1]),
        ([(5, 1), (5, 0)], (100, 0), [1]),  # no capacity for crops
        ([], (100, 10), []),
        ([(1, 0)], (0, 10), []),
    ],
)
def test_select_examples(sizes, capacity, chosen):
    tokens, crops = np.array([size[0] for size in sizes], int), np.array([size[1] for size in sizes], int)
    assert select_examples(tokens, crops, *capacity) == chosen


def test_the_oldest_comes_first():
    """An awkward example does not wait for ever."""
    awkward = sized(51, number=-1)
    stream = itertools.chain([awkward], (sized(50, number=number) for number in range(100)))
    first = next(Packer(100, 1, pool_size=4).pack(stream))
    assert first.examples[0] is awkward


def test_the_pool_is_bounded():
    read = 0

    def stream() -> Iterator[dict]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield sized(10)

    rows = Packer(100, 1, pool_size=20).pack(stream())
    next(rows)
    assert read == 20
    next(rows)
    assert read <= 30


def test_the_same_stream_gives_the_same_rows():
    sizes = [(random.Random(number).randint(1, 90), number % 5) for number in range(80)]
    runs = [[sizes_of(pack) for pack in Packer(100, 8).pack(sized(*size) for size in sizes)] for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_report():
    packer = Packer(100, 10, skip_too_large=True)
    assert len(list(packer.pack([sized(60, 2), sized(40, 3), sized(101), sized(5, 11), sized(50)]))) == 2
    report = packer.report
    assert (report.rows, report.examples, report.too_large) == (2, 3, 2)
    assert report.token_fill == pytest.approx(150 / 200)
    assert report.crop_fill == pytest.approx(5 / 20)
    assert str(report) == "3 examples in 2 rows (1.5 a row), tokens 75.0% full, crops 25.0% full, 2 too large"


def test_what_fits_nowhere():
    with pytest.raises(ValueError, match="An example of 101 tokens and 0 crops fits into no row of 100 tokens and 10"):
        list(Packer(100, 10).pack([sized(101)]))
    with pytest.raises(ValueError, match="A packer needs capacity: found max_tokens=0"):
        Packer(0, 10)


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_rows_of_a_data_set(workers):
    """Through a DataLoader: built, packed, batched; every conversation once, however many workers."""
    names = ["text", "image", "turns", "video", "text", "two images"]
    rows = [{"messages": CONVERSATIONS[name]} for name in names]
    packer = Packer(max_tokens=260, max_crops=12, pool_size=3)
    loader = DataLoader(
        PackedDataset(rows, packer, processor(), max_crops=2),
        batch_size=2,
        collate_fn=DataCollator(processor()),
        num_workers=workers,
    )
    batches = list(loader)
    num_targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert num_targets == sum(int((example(row["messages"])["labels"] != -100).sum()) for row in rows)
    assert all(batch["input_ids"].shape[1] <= 260 for batch in batches)
    assert sum(len(batch.get("image_grids", [])) for batch in batches) == 4
    assert sum(len(batch.get("video_grids", [])) for batch in batches) == 1


class Countable:
    """Not a list, and no data set either."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        yield from self.rows


class DividedStream(Countable, IterableDataset):
    """A stream that divides itself among workers, the first of which gets most; from the third on they get nothing."""

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        yield from self.rows if worker is None else (self.rows[:-2], self.rows[-2:], [], [])[number]


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("kind", [list, Countable, DividedStream])
def test_every_example_arrives_once(kind, workers):
    """However the source is divided among workers; `test_trainers.py` has those of Hugging Face."""
    source = kind([{"input_ids": [number] * 5, "labels": [number] * 5} for number in range(24)])
    dataset = PackedDataset(source, Packer(max_tokens=20, max_crops=1))
    packs = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert sorted(example["input_ids"][0] for pack in packs for example in pack.examples) == list(range(24))


def test_examples_that_were_stored_with_nulls():
    """What another row has and this one lacks; rows that are not built yet may stand beside them."""
    row = {"messages": CONVERSATIONS["turns"]}
    built = [example(CONVERSATIONS[name]) for name in ("text", "image", "video")]
    columns = sorted({*row, *(name for own in built for name in own)})
    stored = [{name: own.get(name) for name in columns} for own in [*built, row]]
    packer = Packer(max_tokens=2000, max_crops=40)
    assert [num_crops(own) for own in stored[:3]] == [num_crops(own) for own in built]
    found = collate(list(PackedDataset(stored, packer, processor())))
    expected = collate(list(PackedDataset([*built, row], packer, processor())))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_packed_data_set_can_be_read_again():
    built = [example(CONVERSATIONS[name]) for name in ("text", "image")]
    dataset = PackedDataset(built, Packer(500, 10))
    first, second = ([sizes_of(pack) for pack in dataset] for _ in range(2))
    assert first == second
    assert set(collate(list(dataset))) >= {"example_ids", "labels"}
