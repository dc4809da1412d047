"""Measurements: a registry of rows, and how one side of a row is timed in one process.

    @row("photo-8", "1080p photo, 8 crops", bound="the output written once", goals=(Goal(0.15, "native"),))
    def photo(side: Side) -> Work: ...

`photo` prepares everything and returns the work to measure, a function without arguments. A side is "ours", "native"
(the class of transformers), "bound" (a lower bound of the work) or the folder of other remote code, a peer.
"""

import functools
import gc
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.memory import PeakMemory, held_bytes

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CACHE = REPOSITORY / ".benchmarks"
ENOUGH_SECONDS, MAX_RUNS = 2.0, 40

Work = Callable[[], Any]  # may return a `Finished`
T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """Of a program that was started and has ended: figures that count instead of those of this process.

    Attributes:
        seconds: None where the time of the whole program counts.
    """

    peak_bytes: int | None
    seconds: float | None = None


class NotAvailable(Exception):
    """A side cannot run a row on this machine; the message says why."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run, the same in all its processes.

    Attributes:
        quick: Small sizes, to try the suite itself; the figures mean nothing.
        cache: Folder for made-up checkpoints and clips, kept between runs.
    """

    quick: bool = False
    threads: int = 2
    cache: Path = DEFAULT_CACHE


@dataclass(frozen=True)
class Side:
    """One of the implementations that are compared, with the settings of the run."""

    name: str
    settings: Settings

    @property
    def is_bound(self) -> bool:
        return self.name == "bound"

    def pick(self, full: Any, quick: Any) -> Any:
        """`full` in a real run, `quick` in a quick one."""
        return quick if self.settings.quick else full


@dataclass(frozen=True)
class Goal:
    """A target figure.

    Attributes:
        limit: The largest ratio, or difference in bytes, that meets the goal.
        of: The side that ours is divided by; "output" for the bytes of the result; "over output" for the difference
            to them.
        what: "seconds" or "peak".
    """

    limit: float
    of: str
    what: str = "seconds"


@dataclass(frozen=True)
class Row:
    """One line of the table; `bound` describes the work of the side "bound"."""

    name: str
    title: str
    prepare: Callable[[Side], Work]
    bound: str
    goals: tuple[Goal, ...]
    sides: tuple[str, ...]
    device: str = "cpu"
    max_rounds: int | None = None
    min_rounds: int = 1


ROWS: dict[str, Row] = {}


def row(
    name: str,
    title: str,
    *,
    bound: str,
    goals: tuple[Goal, ...] = (),
    sides: tuple[str, ...] = ("bound", "ours", "native", "peer"),
    device: str = "cpu",
    max_rounds: int | None = None,
    min_rounds: int = 1,
) -> Callable[[Callable[[Side], Work]], Callable[[Side], Work]]:
    """Register a row.

    Args:
        sides: "peer" stands for every folder of other remote code.
        max_rounds: Fewer rounds, for a row that takes minutes.
        min_rounds: More rounds, for a row whose runs differ more among themselves than its sides do.
    """

    def register(prepare: Callable[[Side], Work]) -> Callable[[Side], Work]:
        ROWS[name] = Row(name, title, prepare, bound, goals, sides, device, max_rounds, min_rounds)
        return prepare

    return register


def measure(prepare: Callable[[Side], Work], side: Side, device: str = "cpu") -> dict[str, Any]:
    """Prepare and run the work in this process.

    Memory is taken from the first run, time from the following ones, for `ENOUGH_SECONDS` in total; if the first run
    takes longer than that, it is the only one.

    Returns:
        seconds: one number per run that counts; first_seconds; peak_bytes over what was resident before (None where
        unknown); output_bytes of the result; load: the machine's load average before; or `unavailable`, the reason.
    """
    try:
        work = prepare(side)
    except NotAvailable as reason:
        return {"unavailable": str(reason)}
    gc.collect()
    load = os.getloadavg()[0]
    memory = PeakMemory(device)
    first, result = _timed(work, device)
    counted = _counted(first, result)
    peak = result.peak_bytes if isinstance(result, Finished) else memory.peak_bytes()
    found = {"first_seconds": counted, "peak_bytes": peak, "output_bytes": held_bytes(result)}
    del result
    seconds: list[float] = []
    spent = 0.0
    while first < ENOUGH_SECONDS and spent < ENOUGH_SECONDS and len(seconds) < MAX_RUNS:
        taken, result = _timed(work, device)
        seconds.append(_counted(taken, result))
        spent += taken
        del result
    return {**found, "seconds": seconds or [counted], "load": load}


def _counted(seconds: float, result: Any) -> float:
    """The time of a run: what was taken here, or what a program says about itself."""
    return result.seconds if isinstance(result, Finished) and result.seconds is not None else seconds


def fastest(ways: Iterable[T], use: Callable[[T], Any], unable: tuple[type[Exception], ...], device: str = "cpu") -> T:
    """The alternative with which `use` takes the least time; each is tried once.

    Args:
        unable: Exceptions that mean an alternative does not work on this machine.
    Raises:
        NotAvailable: No alternative works.
    """
    taken = []
    for way in ways:
        try:
            taken.append((_timed(functools.partial(use, way), device)[0], way))
        except unable:
            continue
    if not taken:
        raise NotAvailable("nothing that could do it is installed")
    return min(taken, key=lambda entry: entry[0])[1]


def _timed(work: Work, device: str) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - start, result
