"""Benchmarks of speed and memory: `python -m benchmarks` (see README.md beside this file)."""

import sys
from pathlib import Path

# Made-up checkpoints come from the support package of the tests.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.torchvision_peer import make_importable

make_importable()  # before anything imports transformers, which imports torchvision wherever it is installed
