"""Feeds hostile inputs to the package and counts what happens: tried, refused, wrong.

    python scripts/fuzz.py --minutes 5                    # all corpora
    python scripts/fuzz.py --minutes 2 --corpus fetch --seed 7
    python scripts/fuzz.py --full --seed 7                # the numbers of cases that SECURITY.md states

A corpus is a module of `scripts/fuzzing`: `cases(seed)` gives inputs without end, `run(case)` returns what became of
one ("refused", "killed", None for "ok") or "wrong: why", and raises where a result is wrong; `prepare()`, if there is
one, comes before the first case. Cases run in a watched child, which is kept until one kills it: a case that dies,
takes too long or takes too much memory, processes that it starts included, is wrong, and so is every exception that
is not documented. Each wrong case is printed with the seed and number that bring it back.
"""

import argparse
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CORPORA = REPOSITORY / "scripts" / "fuzzing"
CASE_SECONDS = 60  # a case on a busy machine; CPU time is bounded by CASE_CPU_SECONDS
CASE_CPU_SECONDS = 10
CASE_BYTES = 2 << 30  # by which a case may raise the memory of its processes; the default limits allow 1 GB of pixels
CHILD_BYTES = 16 << 30
START_SECONDS = 300  # imports, on a busy machine
MAX_PRINTED = 20
FULL = {  # cases of each corpus
    "answers": 100_000,
    "checkpoints": 5_000,
    "configs": 2_000,
    "fetch": 1_000,
    "interruptions": 180,  # two kills for each round of four
    "media": 10_000,
    "prompts": 2_000,
}


def load_corpus(name: str) -> Any:
    for folder in (REPOSITORY, REPOSITORY / "src", REPOSITORY / "tests"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    corpus = importlib.import_module(f"scripts.fuzzing.{name}")
    getattr(corpus, "prepare", lambda: None)()
    return corpus


def run_cases(name: str, seed: int, first: int) -> None:
    """What the child does: runs cases from number `first` on and prints a line before and after each."""
    limit_memory(CHILD_BYTES)
    corpus = load_corpus(name)
    say = lambda **line: print(json.dumps(line), flush=True)  # noqa: E731
    say(ready=True)
    for number, case in enumerate(corpus.cases(seed)):
        if number < first:
            continue
        say(start=number)
        usage = Usage()
        try:
            outcome = str(corpus.run(case) or "ok")
        except Exception as error:
            outcome = f"wrong: {type(error).__name__}: {error}"[:500]
            traceback.print_exc()
        say(end=number, outcome=usage.excess() or outcome)


class Usage:
    """CPU time and memory of this process and of those that it has started, from now on."""

    def __init__(self) -> None:
        self.start_seconds = self._cpu_seconds()
        self.start_bytes = self._sum_of("VmRSS")
        for process in self._processes():  # the peak of memory is counted from here
            with suppress(OSError):
                Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")

    def excess(self) -> str:
        """What is over the limits of a case; "" for nothing."""
        seconds = self._cpu_seconds() - self.start_seconds
        num_bytes = self._sum_of("VmHWM") - self.start_bytes
        if seconds > CASE_CPU_SECONDS:
            return f"wrong: {seconds:.0f} seconds of CPU"
        return f"wrong: {num_bytes:,} bytes of memory" if num_bytes > CASE_BYTES else ""

    def _processes(self) -> list[str]:
        found = [str(os.getpid())]
        for tasks in Path("/proc/self/task").glob("*/children"):
            with suppress(OSError):
                found += tasks.read_text(encoding="ascii").split()
        return found

    def _sum_of(self, field: str) -> int:
        """Bytes of all processes; 0 where the system does not say."""
        total = 0
        for process in self._processes():
            with suppress(OSError):
                lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
                total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
        return total

    def _cpu_seconds(self) -> float:
        times = os.times()
        total = times.user + times.system + times.children_user + times.children_system
        for process in self._processes()[1:]:
            with suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total


def limit_memory(num_bytes: int) -> None:
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Child:
    """A process that runs cases; its lines come through a queue, None when it ended."""

    def __init__(self, name: str, seed: int, first: int) -> None:
        command = [sys.executable, __file__, "--child", name, "--seed", str(seed), "--first", str(first)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def next_line(self, seconds: float) -> dict[str, Any]:
        """The next line, or {"outcome"} of the case that it is in where none comes."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return {"outcome": f"wrong: no end in {seconds} seconds"}
        return {"outcome": f"wrong: the process ended with status {self.stop()}"} if line is None else line

    def stop(self) -> int:
        self.process.kill()
        return self.process.wait()


def fuzz(name: str, seed: int, seconds: float, max_cases: int | None) -> Counter[str]:
    """Run a corpus until this time or number of cases; prints wrong cases and returns the counts."""
    counts = Counter({"tried": 0, "refused": 0, "wrong": 0})
    deadline, first = time.monotonic() + seconds, 0
    while time.monotonic() < deadline and (max_cases is None or first < max_cases):
        child = Child(name, seed, first)
        if child.next_line(START_SECONDS) != {"ready": True}:
            raise SystemExit(f"{name}: the child could not start (status {child.stop()}).")
        while time.monotonic() < deadline and (max_cases is None or first < max_cases):
            line = child.next_line(CASE_SECONDS)
            if "start" in line:
                continue
            outcome = line["outcome"]
            counts["tried"] += 1
            counts[outcome.partition(":")[0]] += 1
            if outcome.startswith("wrong") and counts["wrong"] <= MAX_PRINTED:
                print(f"{name}: seed {seed}, case {first}: {outcome}", flush=True)
            first += 1
            if "end" not in line:  # the child is gone
                break
        child.stop()
    return counts


def main() -> int:
    known = sorted(path.stem for path in CORPORA.glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5, help="for all corpora together (%(default)s)")
    parser.add_argument("--corpus", action="append", choices=known, help="default: all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="most cases of a corpus")
    parser.add_argument("--full", action="store_true", help="the stated number of cases, however long that takes")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=known, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        run_cases(given.child, given.seed, given.first)
        return 0
    names = given.corpus or known
    wrong = 0
    for name in names:
        seconds = float("inf") if given.full else 60 * given.minutes / len(names)
        counts = fuzz(name, given.seed, seconds, given.cases or (FULL[name] if given.full else None))
        wrong += counts["wrong"]
        print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
