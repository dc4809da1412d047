#!/usr/bin/env python3
"""Runs the test-suite on a release of transformers: scripts/matrix.py RELEASE [pytest options].

Without one it lists the releases, with --others all but that of development.

constraints/environments.toml says which releases run the whole suite, which a wide selection of it, and what the
others run.
"""

import os
import sys

from environment import CONSTRAINTS, REPOSITORY, read_toml


def selected(release: str, releases: dict[str, list[str]]) -> list[str]:
    """Arguments of pytest that select the tests for a release."""
    if release in releases["full_suite"]:
        return []
    if release in releases["wide_suite"]:
        return ["-m", "not slow", *releases["wide"], *(f"--ignore={path}" for path in releases["release_independent"])]
    return ["-m", "not slow", *releases["core"]]


def main(arguments: list[str]) -> None:
    releases = read_toml(CONSTRAINTS / "environments.toml")["transformers"]
    if arguments in ([], ["--others"]):
        print(*releases["others"], *([] if arguments else [releases["main"]]))
        return
    release, *options = arguments
    command = ["scripts/environment.py", f"dev@{release}", "scripts/pytest", "python", "-q", *options]
    os.chdir(REPOSITORY)
    os.execv(sys.executable, [sys.executable, *command, *selected(release, releases)])


if __name__ == "__main__":
    main(sys.argv[1:])
