#!/usr/bin/env python3
"""Runs the test-suite on releases of transformers: scripts/matrix.py [--workers N] [RELEASE...], by default on all.

constraints/environments.toml says which releases run the whole suite, which a wide selection of it, and what the
others run. Ends with 1 when one of them failed, after all have run.
"""

import argparse
import subprocess
import sys
import time

from environment import CONSTRAINTS, REPOSITORY, read_toml


def selected(release: str, releases: dict[str, list[str]]) -> list[str]:
    """Arguments of pytest that select the tests for a release."""
    if release in releases["full_suite"]:
        return []
    if release in releases["wide_suite"]:
        return ["-m", "not slow", *releases["wide"], *(f"--ignore={path}" for path in releases["release_independent"])]
    return ["-m", "not slow", *releases["core"]]


def main() -> int:
    releases = read_toml(CONSTRAINTS / "environments.toml")["transformers"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--others", action="store_true", help="all releases but the one of development")
    parser.add_argument("releases", nargs="*")
    options = parser.parse_args()
    chosen = options.releases or releases["others"] + ([] if options.others else [releases["main"]])

    failed = []
    for release in chosen:
        selection = selected(release, releases)
        print(f"=== transformers {release} {' '.join(selection) or '(full suite)'}", flush=True)
        begin = time.monotonic()
        tests = ["scripts/pytest", "python", "-q", "-n", options.workers, *selection]
        run = [sys.executable, "scripts/environment.py", f"dev@{release}", *tests]
        if subprocess.run(run, cwd=REPOSITORY).returncode:
            failed.append(release)
        print(f"=== transformers {release}: {time.monotonic() - begin:.0f} seconds", flush=True)
    print(f"{'Failed' if failed else 'Passed'} with transformers: {', '.join(failed or chosen)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
