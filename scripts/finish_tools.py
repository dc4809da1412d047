"""Finishes the environment of the tools with sam2, run by its interpreter.

Its source package names torch as a tool of its build, and pip would download one for that, with CUDA. It is built with
the torch that is there, and without the kernels for CUDA, which only fill holes in masks.
"""

import os
import subprocess
import sys
from pathlib import Path

PINNED = Path(__file__).resolve().parent.parent / "constraints" / "sam2.txt"


def main() -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--requirement", PINNED],
        check=True,
        env={**os.environ, "SAM2_BUILD_CUDA": "0"},
    )


if __name__ == "__main__":
    main()
