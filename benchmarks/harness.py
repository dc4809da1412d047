"""What a measurement is, and how one is taken: one row, one side, one process.

    @row("photo-8", "1080p photo, 8 crops", bound="the output written once", reach=(Reach(0.15, "native"),))
    def photo(side: Side) -> Work: ...

`photo` prepares everything and returns what is measured, a function without arguments. Sides are called by name:
"ours", "native" (the class of transformers), "bound" (what nothing can beat) or the folder of other remote code.
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
ENOUGH_SECONDS, MOST_RUNS = 2.0, 40

Work = Callable[[], Any]
T = TypeVar("T")


class NotAvailable(Exception):
    """A side cannot do a row here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What all processes of a run share.

    Attributes:
        quick: Small sizes, for trying the suite itself; the figures mean nothing.
        cache: Folder of made-up checkpoints and clips, kept between runs.
    """

    quick: bool = False
    threads: int = 2
    cache: Path = DEFAULT_CACHE


@dataclass(frozen=True)
class Side:
    """Whose code does the work, and the settings of the run."""

    name: str
    settings: Settings

    @property
    def is_bound(self) -> bool:
        return self.name == "bound"

    def pick(self, full: Any, quick: Any) -> Any:
        """The first one in a real run, the other in a quick one."""
        return quick if self.settings.quick else full


@dataclass(frozen=True)
class Reach:
    """A figure to reach.

    Attributes:
        at_most: The largest ratio, or difference in bytes, that counts as reached.
        of: The side that ours is divided by; "output" for the bytes of the result; "over output" for a difference.
        what: "seconds" or "peak".
    """

    at_most: float
    of: str
    what: str = "seconds"


@dataclass(frozen=True)
class Row:
    """One line of the table; `bound` says in words what the side of that name does."""

    name: str
    title: str
    prepare: Callable[[Side], Work]
    bound: str
    reach: tuple[Reach, ...]
    sides: tuple[str, ...]
    device: str = "cpu"
    most_rounds: int | None = None


ROWS: dict[str, Row] = {}


def row(
    name: str,
    title: str,
    *,
    bound: str,
    reach: tuple[Reach, ...] = (),
    sides: tuple[str, ...] = ("bound", "ours", "native", "peer"),
    device: str = "cpu",
    most_rounds: int | None = None,
) -> Callable[[Callable[[Side], Work]], Callable[[Side], Work]]:
    """Registers a row; "peer" among `sides` stands for every folder of other remote code.

    A row that takes minutes says how many rounds are enough in `most_rounds`.
    """

    def register(prepare: Callable[[Side], Work]) -> Callable[[Side], Work]:
        ROWS[name] = Row(name, title, prepare, bound, reach, sides, device, most_rounds)
        return prepare

    return register


def measure(prepare: Callable[[Side], Work], side: Side, device: str = "cpu") -> dict[str, Any]:
    """Prepares and runs the work in this process.

    The first run tells the memory, further ones the time, until enough of it has been spent; where a single run takes
    longer than that, the first one counts.

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
    found = {"first_seconds": first, "peak_bytes": memory.peak_bytes(), "output_bytes": held_bytes(result)}
    del result
    seconds: list[float] = []
    while first < ENOUGH_SECONDS and sum(seconds) < ENOUGH_SECONDS and len(seconds) < MOST_RUNS:
        seconds.append(_timed(work, device)[0])
    return {**found, "seconds": seconds or [first], "load": load}


def fastest(ways: Iterable[T], use: Callable[[T], Any], unable: tuple[type[Exception], ...], device: str = "cpu") -> T:
    """The way that takes `use` the least time; each is tried once.

    Args:
        unable: What a way raises that cannot do it here.
    Raises:
        NotAvailable: None can.
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
