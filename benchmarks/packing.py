"""Packing: how full rows are, and how long packing takes: python -m benchmarks.packing [--examples 4000]

Sizes of training examples are drawn from a seed in a mix like that of instruction tuning: questions without images,
images of three to nine crops (documents up to 25), sets of images, clips of up to 128 frames. Token counts follow from
crops about as in the published models: 14 x 14 for the low-resolution view, 150 for a crop without its margins, 81 and
a timestamp for a frame.

`padded`: the fraction of real tokens in batches of 8 examples. `in order`: a row is closed as soon as the next example
does not fit. `greedy`: the oldest waiting example, then the largest ones that fit. `pool`: the packer, with that many
waiting examples.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from molmo2.training.packer import Packer

BUDGETS = ((16384, 128), (8192, 64), (32768, 400))


def sizes(rng: np.random.Generator) -> tuple[int, int]:
    """Tokens and crops of one example."""
    kind = rng.choice(["text", "image", "document", "set", "clip"], p=[0.12, 0.48, 0.1, 0.1, 0.2])
    text = int(np.clip(rng.lognormal(4.6, 0.9), 12, 2500))
    if kind == "text":
        return 3 * text, 0
    if kind == "clip":
        frames = int(np.clip(2 * rng.lognormal(3.2, 0.8), 8, 128))
        return text + frames * (81 + 8), frames
    images = int(rng.integers(2, 6)) if kind == "set" else 1
    max_crops = 24 if kind == "document" else 8
    crops = [1 + int(rng.integers(max(1, max_crops // 3), max_crops + 1)) for _ in range(images)]
    return text + sum(14 * 14 + 2 + (own - 1) * 150 + 40 for own in crops), sum(crops)


def examples(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Examples that have sizes only; pixels of width 0 take no memory."""
    rng = np.random.default_rng(seed)
    drawn = [sizes(rng) for _ in range(number)]
    return [
        {"input_ids": torch.zeros(tokens, dtype=torch.int8), "pixel_values": torch.zeros(crops, 0)}
        for tokens, crops in drawn
    ]


def in_order(rows: Iterable[Any], max_tokens: int, max_crops: int) -> Iterator[tuple[int, int]]:
    """Sizes of rows that are closed as soon as the next example does not fit."""
    tokens = crops = 0
    for row in rows:
        own = len(row["input_ids"]), len(row["pixel_values"])
        if tokens + own[0] > max_tokens or crops + own[1] > max_crops:
            yield tokens, crops
            tokens = crops = 0
        tokens, crops = tokens + own[0], crops + own[1]
    yield tokens, crops


def select_greedily(tokens: np.ndarray, crops: np.ndarray, max_tokens: int, max_crops: int) -> list[int]:
    """The largest examples that fit, one after the other, in place of the packer's knapsack."""
    chosen: list[int] = []
    value = tokens / max(1, max_tokens) + crops / max(1, max_crops)
    for index in np.argsort(-value, kind="stable").tolist():
        if tokens[index] <= max_tokens and crops[index] <= max_crops:
            chosen.append(index)
            max_tokens, max_crops = max_tokens - tokens[index], max_crops - crops[index]
    return sorted(chosen)


def padded_share(rows: list[Any], batch: int = 8) -> float:
    """Fraction of real tokens in batches of unpacked examples."""
    lengths = [len(row["input_ids"]) for row in rows]
    batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return sum(lengths) / sum(len(own) * max(own) for own in batches)


def packed(name: str, how: str, rows: list[Any], packer: Packer) -> str:
    """A line of the table for a packer."""
    started = time.perf_counter()
    for _ in packer.pack(rows):
        pass
    report = packer.report
    milliseconds = 1000 * (time.perf_counter() - started) / report.rows
    fills = f"{report.token_fill:.1%} | {report.crop_fill:.1%}"
    return f"| {name} | {how} | {report.rows} | {fills} | {milliseconds:.1f} ms |"


def measure(rows: list[Any], budget: tuple[int, int], pools: Iterable[int]) -> list[str]:
    """Lines of the table for one budget."""
    fitting = [row for row in rows if len(row["input_ids"]) <= budget[0] and len(row["pixel_values"]) <= budget[1]]
    name = f"{budget[0]} tokens, {budget[1]} crops"
    made = list(in_order(fitting, *budget))
    fills = [sum(row[column] for row in made) / len(made) / budget[column] for column in (0, 1)]
    lines = [f"| {name} | padded | | {padded_share(fitting):.1%} | | |"]
    lines.append(f"| {name} | in order | {len(made)} | {fills[0]:.1%} | {fills[1]:.1%} | |")
    for pool in pools:
        with mock.patch("molmo2.training.packer.select_examples", select_greedily):
            lines.append(packed(name, f"greedy, pool of {pool}", fitting, Packer(*budget, pool_size=pool)))
        lines.append(packed(name, f"pool of {pool}", fitting, Packer(*budget, pool_size=pool)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = examples(arguments.examples, arguments.seed)
    print("| row | how | rows | tokens full | crops full | time a row |\n|---|---|---|---|---|---|")
    for budget in BUDGETS:
        print("\n".join(measure(rows, budget, (16, 48, 96))))


if __name__ == "__main__":
    main()
