#!/usr/bin/env python3
"""Runs the test-suite on releases of transformers: scripts/matrix.py [--jobs N] [RELEASE...], by default on all.

constraints/environments.toml says which releases run the whole suite, which a wide selection of it, and what the
others run. Several releases run side by side, each in one process, because a suite that is split over processes
imports torch and transformers, and collects its tests, in each of them; one release alone is split. Ends with 1 when a
release failed, after all have run.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

from environment import CONSTRAINTS, REPOSITORY, read_toml


def selected(release: str, releases: dict[str, list[str]]) -> list[str]:
    """Arguments of pytest that select the tests for a release."""
    if release in releases["full_suite"]:
        return []
    if release in releases["wide_suite"]:
        return ["-m", "not slow", *releases["wide"], *(f"--ignore={path}" for path in releases["release_independent"])]
    return ["-m", "not slow", *releases["core"]]


def run(release: str, selection: list[str], workers: int) -> tuple[bool, float, str]:
    """Test one release: whether it passed, the seconds it took, and what was printed."""
    print(f"=== transformers {release}: started", flush=True)
    begin = time.monotonic()
    tests = ["scripts/pytest", "python", "-q", "-n", str(workers), *selection]
    command = [sys.executable, "scripts/environment.py", f"dev@{release}", *tests]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.returncode == 0, time.monotonic() - begin, done.stdout.decode(errors="replace")


def results(chosen: list[str], selections: list[list[str]], jobs: int) -> Iterator[tuple[bool, float, str]]:
    """The results of `run` in the order of the releases, `jobs` of which run at a time."""
    workers = jobs if len(chosen) == 1 else 0  # of pytest; 0 is none beside its own process
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run, chosen, selections, repeat(workers))


def main() -> int:
    releases = read_toml(CONSTRAINTS / "environments.toml")["transformers"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes that run at a time")
    parser.add_argument("--others", action="store_true", help="all releases but the one of development")
    parser.add_argument("releases", nargs="*")
    options = parser.parse_args()
    chosen = options.releases or releases["others"] + ([] if options.others else [releases["main"]])

    failed = []
    selections = [selected(release, releases) for release in chosen]
    for release, selection, (passed, seconds, printed) in zip(
        chosen, selections, results(chosen, selections, options.jobs), strict=True
    ):
        print(f"=== transformers {release} {' '.join(selection) or '(full suite)'}")
        print(printed, end="")
        print(f"=== transformers {release}: {seconds:.0f} seconds", flush=True)
        failed += [] if passed else [release]
    print(f"{'Failed' if failed else 'Passed'} with transformers: {', '.join(failed or chosen)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
