"""A million clips on 8 to 512 GPUs, simulated: where `molmo2 batch --engine ray` stops growing, and at what.

    python -m benchmarks.scaling                                    # the table, from the costs below
    python -m benchmarks.scaling --curves benchmarks/images/scaling.png --markdown docs/batch.md
    python -m benchmarks.scaling --measure                          # what the driver takes, measured on this machine

Blocks of rows go through one driver (Ray's executor, results, journal), shared storage and actors, event by event. An
actor decodes the next batch while the model answers one; the first batch of a block finds the model idle, as in
`molmo2.batch.engines`. What is measured and what is assumed: `Costs`.
"""

import argparse
import heapq
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.throughput import REPOSITORY, replace_table

GPUS = (8, 16, 32, 64, 128, 256, 512)
ROWS = 1_000_000
GIGABIT = 1e9 / 8  # bytes
INKS = ("#c0392b", "#2471a3", "#1e8449", "#7d3c98", "#b9770e", "#555555")


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of each step.

    Attributes:
        block_seconds: CPU time of the driver to hand out one block and to take it back (Ray's executor). Measured
            with `--measure`, with two actors; that of hundreds of actors was not.
        row_seconds: CPU time of the driver for one result: read, checked, written to the journal. Measured.
        list_seconds: CPU time of the driver for one row before the first block: its place in the table. Measured.
        result_bytes: Of a result in the object store, on its way to the driver. Assumed: a dozen points.
        decode_seconds: Until the frames of a clip are decoded and cut, by one worker, which decodes one clip at a
            time. Measured: 128 frames of a 64 s clip of 720p (README.md).
        decode_cpu_seconds: CPU time of the same. Measured.
        model_seconds: GPU time of one clip in a batch. Assumed: 4B in bfloat16, 128 frames, a short answer.
        clip_bytes: Assumed: 64 s at 2 Mbit/s.
        variation: Standard deviation of the logarithm of a clip's length. Assumed.
        workers_per_gpu: Actors that share a GPU, and the model's time on it.
        cores_per_gpu, storage_rate, driver_rate, weight_bytes, load_seconds: Of the cluster. Assumed; rates in bytes a
            second, of storage to all nodes together and of the driver's network.
    """

    block_seconds: float = 0.012
    row_seconds: float = 0.0001
    list_seconds: float = 3e-7
    result_bytes: float = 2500.0
    decode_seconds: float = 1.35
    decode_cpu_seconds: float = 1.9
    model_seconds: float = 0.5
    clip_bytes: float = 16e6
    variation: float = 0.5
    workers_per_gpu: int = 1
    cores_per_gpu: float = 12.0
    storage_rate: float = 400 * GIGABIT
    driver_rate: float = 10 * GIGABIT
    weight_bytes: float = 9e9
    load_seconds: float = 60.0
    batch: int = 8
    window: int = 32

    @property
    def decode_per_clip(self) -> float:
        """Seconds that an actor takes to decode one clip with its share of the cores."""
        return max(self.decode_seconds, self.decode_cpu_seconds * self.workers_per_gpu / self.cores_per_gpu)


@dataclass(frozen=True)
class Outcome:
    """One simulated run.

    Attributes:
        seconds: From the start to the last row in the journal.
        busy: Share of the time in which driver, objects (its network), storage, decoding and GPUs are at work.
    """

    gpus: int
    seconds: float
    rows: int
    busy: dict[str, float]

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds

    @property
    def limit(self) -> str:
        """What is busiest."""
        return max(self.busy, key=lambda name: self.busy[name])


class _Server:
    """Does one thing after the other, in the order of their arrival."""

    def __init__(self) -> None:
        self.free_at = self.busy = 0.0

    def take(self, now: float, seconds: float) -> float:
        """When a task that arrives now is done."""
        self.free_at = max(self.free_at, now) + seconds
        self.busy += seconds
        return self.free_at


def simulate(gpus: int, costs: Costs, rows: int = ROWS, seed: int = 0) -> Outcome:
    """Run the rows over the GPUs.

    An actor asks for the next block when it begins one, so that the driver has the time of a block to hand it out.
    """
    lengths = _batch_lengths(costs, rows, seed)
    driver, objects, storage = _Server(), _Server(), _Server()
    cards = [_Server() for _ in range(gpus)]
    actors = gpus * costs.workers_per_gpu
    loaded = costs.load_seconds + actors * costs.weight_bytes / costs.storage_rate
    driver.take(0.0, rows * costs.list_seconds)
    left, decoding, end = rows, 0.0, 0.0
    idle_at = [loaded] * actors  # when each actor has done what it has
    events = [_Event(loaded, actor, "ask", actor) for actor in range(actors)]
    while events:
        event = heapq.heappop(events)
        now, actor = event.time, event.actor
        new: list[tuple[float, str, int]] = []
        if event.kind == "ask" and left:
            size = min(costs.window, left)
            left -= size
            new = [(max(driver.take(now, costs.block_seconds), idle_at[actor]), "begin", size)]
        elif event.kind == "begin":
            count = -(-event.size // costs.batch)
            own = [lengths.pop() for _ in range(min(count, len(lengths)))]
            decoding += sum(own) * costs.decode_per_clip
            idle_at[actor] = _answer(now, own, event.size, costs, storage, cards[actor % gpus])
            new = [(now, "ask", 0), (idle_at[actor], "results", event.size)]
        elif event.kind == "results":
            arrived = objects.take(now, event.size * costs.result_bytes / costs.driver_rate)
            end = driver.take(arrived, event.size * costs.row_seconds)
        for time_, kind, size in new:
            heapq.heappush(events, _Event(time_, event.number + actors, kind, actor, size))
    busy = {"driver": driver.busy, "objects": objects.busy, "storage": storage.busy}
    busy |= {"decoding": decoding / actors, "GPUs": sum(card.busy for card in cards) / gpus}
    return Outcome(gpus, end, rows, {name: seconds / end for name, seconds in busy.items()})


@dataclass(frozen=True, order=True)
class _Event:
    """What happens at a time: an actor asks for a block, begins one, or its results arrive."""

    time: float
    number: int
    kind: str
    actor: int
    size: int = 0


def _batch_lengths(costs: Costs, rows: int, seed: int) -> list[float]:
    """Of the clips of each batch together; 1 is a clip of mean length."""
    draw = np.random.default_rng(seed)
    sides = (-(-rows // costs.batch), costs.batch)
    return draw.lognormal(-(costs.variation**2) / 2, costs.variation, sides).sum(1).tolist()


def _answer(now: float, lengths: Sequence[float], size: int, costs: Costs, storage: _Server, card: _Server) -> float:
    """When an actor has answered a block.

    Args:
        lengths: Of the clips of each batch together.
    """
    reading = max(now, storage.free_at)
    storage.take(now, sum(lengths) * costs.clip_bytes / costs.storage_rate)
    decoded = computed = now
    for number, length in enumerate(lengths):
        clips = min(costs.batch, size - number * costs.batch)
        reading += length * costs.clip_bytes / costs.storage_rate
        decoded = max(decoded + length * costs.decode_per_clip, reading)
        computed = max(computed, decoded) + clips * costs.model_seconds
    card.busy += size * costs.model_seconds
    # Actors that share a GPU: what it computes for one it cannot for another.
    card.free_at = max(card.free_at, now) + size * costs.model_seconds
    return max(computed, card.free_at) if costs.workers_per_gpu > 1 else computed


# --- what is simulated -----------------------------------------------------------------------------------------------

CLIPS = Costs()
SHARED = replace(CLIPS, workers_per_gpu=3)
CASES: dict[str, Costs] = {
    "clips, 1 worker a GPU": CLIPS,
    "clips, 3 workers a GPU": SHARED,
    "... with 3 cores a GPU": replace(SHARED, cores_per_gpu=3.0),
    "... with storage of 50 Gbit/s": replace(SHARED, storage_rate=50 * GIGABIT),
    "images, 1 worker a GPU": replace(
        CLIPS, decode_seconds=0.02, decode_cpu_seconds=0.02, model_seconds=0.05, clip_bytes=3e5, variation=0.2
    ),
}


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Rows a second, hours and limits as Markdown."""
    gpus = [outcome.gpus for outcome in next(iter(outcomes.values()))]
    lines = ["| rows/s (hours), what limits | " + " | ".join(f"{number} GPUs" for number in gpus) + " |"]
    lines.append("|---" * (len(gpus) + 1) + "|")
    for name, row in outcomes.items():
        cells = [f"{outcome.rate:.0f} ({outcome.seconds / 3600:.1f}) {outcome.limit}" for outcome in row]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(outcomes: dict[str, list[Outcome]], target: Path) -> None:
    """Rows a second over GPUs, both in powers of two; thin lines are linear growth from the fewest GPUs on."""
    (width, height), margin = (520, 360), 60
    plot = Image.new("RGB", (width + 2 * margin, height + 2 * margin + 18 * len(outcomes)), "white")
    pen, font = ImageDraw.Draw(plot), ImageFont.load_default(13)
    gpus = [entry.gpus for entry in next(iter(outcomes.values()))]
    rates = [entry.rate for row in outcomes.values() for entry in row]
    low, high = math.floor(math.log2(min(rates))), math.ceil(math.log2(max(rates)))
    first, last = math.log2(gpus[0]), math.log2(gpus[-1])

    def place(number: float, rate: float) -> tuple[float, float]:
        across = (math.log2(number) - first) / max(last - first, 1)
        return margin + width * across, margin + height * (high - math.log2(rate)) / (high - low)

    pen.text((margin, margin - 40), "rows a second over GPUs", fill="black", font=font)
    for power in range(low, high + 1):
        (left, y), right = place(gpus[0], 2.0**power), margin + width
        pen.line((left, y, right, y), fill="#dddddd")
        pen.text((8, y - 8), f"{2**power:,}" if power >= 0 else f"1/{2**-power}", fill="black", font=font)
    for number in gpus:
        pen.text((place(number, rates[0])[0] - 8, margin + height + 6), str(number), fill="black", font=font)
    for line, ((name, row), ink) in enumerate(zip(outcomes.items(), INKS)):
        start = row[0]
        reach = min(gpus[-1], start.gpus * 2.0**high / start.rate)
        pen.line((place(start.gpus, start.rate), place(reach, start.rate * reach / start.gpus)), fill="#bbbbbb")
        places = [place(entry.gpus, entry.rate) for entry in row]
        pen.line(places, fill=ink, width=2)
        for x, y in places:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        pen.text((margin, margin + height + 30 + 18 * line), name, fill=ink, font=font)
    target.parent.mkdir(parents=True, exist_ok=True)
    plot.quantize(32).save(target, optimize=True)


# --- what is measured ------------------------------------------------------------------------------------------------


# (rows, rows of a block): what differs tells the cost of a block, of a row and of the run itself.
DRIVER_RUNS = ((1024, 8), (1024, 64), (8192, 64))


def measure_driver(actors: int = 2) -> dict[str, float]:
    """Costs of the driver on this machine, in CPU time: a local Ray cluster whose workers answer at once."""
    import ray

    ray.init(num_cpus=actors, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as scratch:
        _drive(Path(scratch), 64, 8, actors)  # imports
        taken = [_drive(Path(scratch), rows, size, actors) for rows, size in DRIVER_RUNS]
    ray.shutdown()
    terms = [[1.0, rows / size, float(rows)] for rows, size in DRIVER_RUNS]
    fixed, block, row = np.linalg.solve(terms, [seconds for seconds, _, _ in taken])
    _, listed, written = taken[-1]
    return {
        "block_seconds": float(block),
        "row_seconds": float(row),
        "list_seconds": listed / DRIVER_RUNS[-1][0],
        "result_bytes": written / DRIVER_RUNS[-1][0],
        "seconds of a run without rows": float(fixed),
    }


def _drive(folder: Path, rows: int, size: int, actors: int) -> tuple[float, float, int]:
    """(CPU seconds of the run, CPU seconds of finding its blocks, bytes of its output)."""
    from molmo2.batch import EngineSettings, open_source, run_batch
    from molmo2.batch.ray_data import RayEngine

    support = REPOSITORY / "tests" / "support" / "batch_worker.py"
    table, output = folder / f"{rows}-{size}.jsonl", folder / f"out-{rows}-{size}.jsonl"
    question = "Track the red car that enters from the left."
    table.write_text("".join(json.dumps({"question": question, "video": f"{row}.mp4"}) + "\n" for row in range(rows)))
    engine = RayEngine(
        EngineSettings(model="some", window=size), (actors, actors), command=(sys.executable, str(support))
    )
    started = time.process_time()
    run_batch(open_source(table), output, engine)
    taken = time.process_time() - started
    started = time.process_time()
    for _ in open_source(table).chunks(size):
        pass
    return taken, time.process_time() - started, output.stat().st_size


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--measure", action="store_true", help="measure the driver instead; needs Ray")
    parser.add_argument("--curves", type=Path, metavar="PNG")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page with <!-- scaling -->")
    arguments = parser.parse_args(given)
    if arguments.measure:
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
        for name, value in measure_driver().items():
            print(f"{name}: {value:.3g}")
        return 0
    outcomes: dict[str, list[Any]] = {
        name: [simulate(gpus, costs, arguments.rows) for gpus in arguments.gpus] for name, costs in CASES.items()
    }
    print(table(outcomes))
    if arguments.markdown:
        replace_table(arguments.markdown, "scaling", table(outcomes))
    if arguments.curves:
        draw_curves(outcomes, arguments.curves)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
