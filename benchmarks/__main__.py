"""Measures ours, the native class of transformers and other remote code; prints the table and writes it as JSON.

Usage: python -m benchmarks [--rows NAME ...] [--curves [NAME ...]] [--peer DIR ...] [--quick] [--output FILE]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import DEFAULT_CACHE, ROWS, Settings


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only; `--rows none` for curves alone")
    parser.add_argument("--curves", nargs="*", metavar="NAME", help="growth curves too: all, or these")
    parser.add_argument("--peer", nargs="+", default=[], metavar="DIR", help="folders of other remote code (*.py)")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round: tries the suite, measures nothing"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes per side (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help="made-up checkpoints and clips"
    )
    parser.add_argument("--list", action="store_true", help="print the names of rows and curves")
    return parser.parse_args(given)


def _chosen(names: Sequence[str] | None, known: Sequence[str], none: bool) -> list[str]:
    """Names that were asked for; all of them for an empty list, and without any unless `none`."""
    if names is None:
        return [] if none else list(known)
    unknown = [name for name in names if name not in known and name != "none"]
    if unknown:
        raise SystemExit(f"No such name: {', '.join(unknown)}. There are: {', '.join(known)}.")
    return [name for name in names if name != "none"] if names else list(known)


def main(given: Sequence[str] | None = None) -> int:
    arguments = _arguments(given)
    from benchmarks import catalogue  # noqa: F401  (registers the rows)
    from benchmarks.curves import CURVES, growth
    from benchmarks.report import curve_line, row_lines
    from benchmarks.runner import machine, run_child, run_row

    if arguments.list:
        print("rows:  ", *ROWS, "\ncurves:", *CURVES)
        return 0
    rows = _chosen(arguments.rows, list(ROWS), none=False)
    if arguments.rows is None and not torch.cuda.is_available():
        rows = [name for name in rows if ROWS[name].device != "cuda"]
    curves = _chosen(arguments.curves, list(CURVES), none=True)
    settings = Settings(arguments.quick, arguments.threads, arguments.cache.resolve())
    settings.cache.mkdir(parents=True, exist_ok=True)
    peers = [str(Path(folder).resolve()) for folder in arguments.peer]
    about = {"quick": settings.quick, "threads": settings.threads, "rounds": arguments.rounds, "command": sys.argv[1:]}
    results: dict[str, Any] = {"machine": machine(), **about, "rows": [], "curves": {}}

    def keep() -> None:
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for name in rows:
        found = run_row(ROWS[name], peers, 1 if settings.quick else arguments.rounds, settings)
        results["rows"].append(found)
        print("\n".join(row_lines(found)), flush=True)
        keep()
    for name in curves:
        points = CURVES[name].points[:3] if settings.quick else CURVES[name].points
        measured = [{"point": point, **run_child(name, "ours", settings, point)} for point in points]
        failed = [entry for entry in measured if "seconds" not in entry]
        if failed:
            results["curves"][name] = {"error": failed[0].get("error", failed[0].get("unavailable"))}
        else:
            for entry in measured:
                entry["seconds"] = sorted(entry["seconds"])[len(entry["seconds"]) // 2]
            results["curves"][name] = growth(CURVES[name], measured)
        print(curve_line(name, results["curves"][name]), flush=True)
        keep()
    errors = [side for found in results["rows"] for side in found["sides"].values() if "error" in side]
    return 1 if errors or any("error" in curve for curve in results["curves"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
