#!/usr/bin/env python3
"""Runs the test-suite on releases of transformers: scripts/matrix.py [--workers N] [RELEASE...], by default on all.

The releases that constraints/environments.toml lists under `full_suite` run everything, the others what is not marked
slow in the folders of `core_suite`, without the files of `release_independent`. Ends with 1 when one of them failed,
after all have run.
"""

import argparse
import subprocess
import sys
import time

from environment import CONSTRAINTS, REPOSITORY, read_toml


def main() -> int:
    releases = read_toml(CONSTRAINTS / "environments.toml")["transformers"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--older", action="store_true", help="all releases but the newest")
    parser.add_argument("releases", nargs="*")
    options = parser.parse_args()
    chosen = options.releases or releases["older"] + ([] if options.older else [releases["newest"]])

    core = ["-m", "not slow", *releases["core_suite"]]
    core += [f"--ignore={path}" for path in releases["release_independent"]]
    failed = []
    for release in chosen:
        selection = [] if release in releases["full_suite"] else core
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
