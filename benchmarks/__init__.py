"""Measurements: `python -m benchmarks` (see README.md beside this file)."""

from benchmarks.torchvision_peer import make_importable

make_importable()  # before anything imports transformers, which imports torchvision wherever it is installed
