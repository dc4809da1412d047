"""How full packed rows are, and what is saved: python benchmarks/packing.py [--examples 4000]

Sizes of training examples are drawn from a seed in a mix like that of instruction tuning: questions without pictures,
images of three to nine crops (documents up to 25), sets of images, clips of up to 128 frames. Tokens follow from crops
about as in the published models: 14 x 14 for the view, 150 for a crop less its margins, 81 and its time for a frame.

`padded`: the share of batches of 8 examples that is no padding. `in order`: a row is closed as soon as the next
example does not fit. `pool`: the packer, with so many examples waiting.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
BUDGETS = ((16384, 128), (8192, 64), (32768, 400))


def packer_module() -> Any:
    """The module that is measured."""
    return importlib.import_module("molmo2.training.packer")


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
    most = 24 if kind == "document" else 8
    crops = [1 + int(rng.integers(max(1, most // 3), most + 1)) for _ in range(images)]
    return text + sum(14 * 14 + 2 + (own - 1) * 150 + 40 for own in crops), sum(crops)


def examples(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Examples with nothing in them but their sizes; pixels of no width take no memory."""
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


def padded_share(rows: list[Any], batch: int = 8) -> float:
    lengths = [len(row["input_ids"]) for row in rows]
    batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return sum(lengths) / sum(len(own) * max(own) for own in batches)


def measure(rows: list[Any], budget: tuple[int, int], pools: Iterable[int], packer: Callable) -> list[str]:
    """Lines of the table for one budget."""
    fitting = [row for row in rows if len(row["input_ids"]) <= budget[0] and len(row["pixel_values"]) <= budget[1]]
    name = f"{budget[0]} tokens, {budget[1]} crops"
    made = list(in_order(fitting, *budget))
    shares = [sum(row[side] for row in made) / len(made) / budget[side] for side in (0, 1)]
    lines = [f"| {name} | padded | | {padded_share(fitting):.1%} | | |"]
    lines.append(f"| {name} | in order | {len(made)} | {shares[0]:.1%} | {shares[1]:.1%} | |")
    for pool in pools:
        filler = packer(*budget, pool_size=pool)
        started = time.perf_counter()
        for _ in filler.pack(fitting):
            pass
        milliseconds = 1000 * (time.perf_counter() - started) / filler.report.rows
        report = filler.report
        fills = f"{report.token_fill:.1%} | {report.crop_fill:.1%}"
        lines.append(f"| {name} | pool of {pool} | {report.rows} | {fills} | {milliseconds:.1f} ms |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = examples(given.examples, given.seed)
    print("| row | how | rows | tokens full | crops full | time a row |\n|---|---|---|---|---|---|")
    for budget in BUDGETS:
        print("\n".join(measure(rows, budget, (16, 48, 96), packer_module().Packer)))


if __name__ == "__main__":
    main()
