"""Feeds hostile inputs to the package and counts what happens: tried, refused, wrong.

    python scripts/fuzz.py --minutes 5                    # all corpora
    python scripts/fuzz.py --minutes 2 --corpus fetch --seed 7

A corpus is a module of `scripts/fuzzing`: `cases(seed)` gives inputs without end, `run(case)` returns "refused" or
"wrong: why", or anything else where the input was taken, and raises where a result is wrong; `prepare()`, if there is
one, comes before the first case. Cases run in a watched child: one that dies, takes too long or takes too much memory is
wrong, and so is every exception that is not documented. Each wrong case is printed with the seed and number that bring
it back.
"""

import argparse
import importlib
import json
import queue
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CORPORA = REPOSITORY / "scripts" / "fuzzing"
CASE_SECONDS = 60  # a case on a busy machine; CPU time is bounded by CASE_CPU_SECONDS
CASE_CPU_SECONDS = 10
CHILD_BYTES = 16 << 30
START_SECONDS = 300  # imports, on a busy machine
MAX_PRINTED = 20


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
        before = time.process_time()
        try:
            result = corpus.run(case)
            outcome = result if str(result).startswith(("refused", "wrong")) else "ok"
        except Exception as error:
            outcome = f"wrong: {type(error).__name__}: {error}"[:500]
            traceback.print_exc()
        used = time.process_time() - before
        say(end=number, outcome=f"wrong: {used:.0f} seconds of CPU" if used > CASE_CPU_SECONDS else outcome)


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


def fuzz(name: str, seed: int, seconds: float, most: int | None) -> dict[str, int]:
    """Run a corpus for this time; prints wrong cases and returns the counts."""
    counts = {"tried": 0, "ok": 0, "refused": 0, "wrong": 0}
    deadline, first = time.monotonic() + seconds, 0
    while time.monotonic() < deadline and (most is None or first < most):
        child = Child(name, seed, first)
        if child.next_line(START_SECONDS) != {"ready": True}:
            raise SystemExit(f"{name}: the child could not start (status {child.stop()}).")
        while time.monotonic() < deadline and (most is None or first < most):
            line = child.next_line(CASE_SECONDS)
            if "start" in line:
                continue
            outcome = line["outcome"]
            counts["tried"] += 1
            counts["wrong" if outcome.startswith("wrong") else outcome] += 1
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
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=known, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        run_cases(given.child, given.seed, given.first)
        return 0
    names = given.corpus or known
    wrong = 0
    for name in names:
        counts = fuzz(name, given.seed, 60 * given.minutes / len(names), given.cases)
        wrong += counts["wrong"]
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
