"""Inputs at random, one module for each kind: `cases(seed)` makes them, `run(case)` raises on a wrong result."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
