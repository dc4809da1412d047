"""Runs rows: one process per measurement, sides in alternation, medians over all rounds."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from benchmarks.harness import REPOSITORY, Goal, Row, Settings

PACKAGES = ("torch", "transformers", "numpy", "av", "decord2", "torchcodec", "torchvision")
TIMEOUT_SECONDS = 3600


def run_child(name: str, side: str, settings: Settings, point: int | None = None) -> dict[str, Any]:
    """One measurement; `error` instead of figures if the process failed."""
    request = {"row": name, "side": side, "settings": asdict(settings), "point": point}
    threads = str(settings.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(settings.cache / "modules"),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # code of checkpoints would be compiled anew at every start
    command = [sys.executable, "-m", "benchmarks.child", json.dumps(request, default=str)]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {TIMEOUT_SECONDS} s"}
    if done.returncode:
        return {"error": done.stderr[-2000:] or f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def sides_of(row: Row, peers: Sequence[str]) -> list[str]:
    """The sides of a row, "peer" replaced by the folders of the peers."""
    return [side for entry in row.sides for side in (peers if entry == "peer" else [entry])]


def run_row(row: Row, peers: Sequence[str], rounds: int, settings: Settings) -> dict[str, Any]:
    """All sides of a row in alternation, `rounds` times, or as often as the row says; a side that failed or is not
    available is not tried again.
    """
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in sides_of(row, peers)}
    excluded: dict[str, dict[str, Any]] = {}
    rounds = rounds if settings.quick else max(rounds, row.min_rounds)
    for _ in range(rounds if row.max_rounds is None else min(rounds, row.max_rounds)):
        for side in [side for side in measured if side not in excluded]:
            found = run_child(row.name, side, settings)
            if "seconds" in found:
                measured[side].append(found)
            else:
                excluded[side] = found
    sides = {side: excluded[side] if side in excluded else summary(found) for side, found in measured.items()}
    return {
        "row": row.name,
        "title": row.title,
        "bound": row.bound,
        "device": row.device,
        "sides": sides,
        "goals": [check_goal(goal, sides) for goal in row.goals],
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one side over its rounds; every round has the same weight."""

    def median(values: Iterable[Any]) -> Any:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return {
        "seconds": median(statistics.median(entry["seconds"]) for entry in found),
        "peak_bytes": median(entry["peak_bytes"] for entry in found),
        "output_bytes": median(entry["output_bytes"] for entry in found),
        "all_seconds": [entry["seconds"] for entry in found],
        "all_peak_bytes": [entry["peak_bytes"] for entry in found],
        "load": [entry["load"] for entry in found],
    }


def check_goal(goal: Goal, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A goal with the measured figure; `found` is None where a side has no figures."""
    ours, key = sides.get("ours", {}), {"seconds": "seconds", "peak": "peak_bytes"}[goal.what]
    value = ours.get(key)
    other = ours.get("output_bytes") if "output" in goal.of else sides.get(goal.of, {}).get(key)
    found = None
    if value is not None and other is not None:
        found = value - other if goal.of == "over output" else value / other if other else None
    return {**asdict(goal), "found": found, "met": None if found is None else found <= goal.limit}


def machine() -> dict[str, Any]:
    """The machine and the versions of packages."""
    import torch

    processor = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    except OSError:
        pass
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        **versions,
    }
