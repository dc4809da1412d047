"""Profiles of ours, by function: python -m benchmarks.profile [ROW ...] [--output FILE]

By default of the rows in results/cpu.json that miss a goal. Only the calling thread is profiled: time that other
threads take meanwhile (decoding) shows as waiting.
"""

import argparse
import cProfile
import json
import pstats
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import DEFAULT_CACHE, Settings, Side
from benchmarks.report import duration

RESULTS = Path(__file__).resolve().parent / "results" / "cpu.json"
SHOWN, MIN_SHARE = 6, 0.02
HEAD = "| row | time under the profiler | time by function, without its callees |\n|---|---|---|"

Place = tuple[str, int, str]  # file, line and function, as cProfile has them


def name_of(place: Place) -> str:
    """The name of a function in the table: `gather` for built-in ones, `module.function` for others."""
    file, _, function = place
    builtin = re.search(r"method (?:'(\w+)'|[\w.]*?(\w+)>?)(?: of|\}|$)", function)
    if file == "~":
        return "`" + (next(filter(None, builtin.groups())) if builtin else function) + "`"
    return f"`{Path(file).stem}.{function}`"


def shares(profile: cProfile.Profile) -> tuple[float, list[tuple[str, float, int]]]:
    """Total seconds, and (function, fraction of them, calls) of the functions with the most time of their own."""
    stats = pstats.Stats(profile)
    entries = stats.stats  # type: ignore[attr-defined]  # place -> (calls, all calls, own seconds, seconds, callers)
    total = sum(entry[2] for entry in entries.values())
    ordered = sorted(entries.items(), key=lambda item: -item[1][2])[:SHOWN]
    return total, [(name_of(place), entry[2] / total, entry[1]) for place, entry in ordered]


def profile_row(name: str, settings: Settings) -> str:
    """The line of a row in the table."""
    from benchmarks.catalogue import find

    prepare, _ = find(name, None)
    with torch.inference_mode():
        work = prepare(Side("ours", settings))
        work()
        profile = cProfile.Profile()
        profile.runcall(work)
    total, found = shares(profile)
    parts = [f"{share:.0%} {function} ({calls:,})" for function, share, calls in found if share >= MIN_SHARE]
    return f"| {name} | {duration(total)} | {', '.join(parts)} |"


def missed() -> list[str]:
    """Names of rows that miss a goal."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return [row["row"] for row in rows if any(goal["met"] is False for goal in row["goals"])]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.profile", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--quick", action="store_true", help="small sizes: tries the command, measures nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the table goes, as Markdown")
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.quick, arguments.threads, arguments.cache.resolve())
    settings.cache.mkdir(parents=True, exist_ok=True)
    lines = [HEAD]
    print(HEAD)
    for name in arguments.rows or missed():
        lines.append(profile_row(name, settings))
        print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
