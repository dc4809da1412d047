"""Runs rows: a process for each measurement, sides taking turns, medians over all rounds."""

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

from benchmarks.harness import REPOSITORY, Reach, Row, Settings

PACKAGES = ("torch", "transformers", "numpy", "av", "decord2", "torchcodec", "torchvision")
LIMIT_SECONDS = 3600


def run_child(name: str, side: str, settings: Settings, point: int | None = None) -> dict[str, Any]:
    """One measurement; `error` in place of figures where the process failed."""
    request = {"row": name, "side": side, "settings": asdict(settings), "point": point}
    threads = str(settings.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(settings.cache / "modules"),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "benchmarks.child", json.dumps(request, default=str)]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT_SECONDS} s"}
    if done.returncode:
        return {"error": done.stderr[-2000:] or f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def sides_of(row: Row, peers: Sequence[str]) -> list[str]:
    """The sides of a row, "peer" replaced by the folders that were given."""
    return [side for entry in row.sides for side in (peers if entry == "peer" else [entry])]


def run_row(row: Row, peers: Sequence[str], rounds: int, settings: Settings) -> dict[str, Any]:
    """All sides of a row in turn, `rounds` times; what failed or is not available is not tried again."""
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in sides_of(row, peers)}
    given_up: dict[str, dict[str, Any]] = {}
    for _ in range(rounds if row.most_rounds is None else min(rounds, row.most_rounds)):
        for side in [side for side in measured if side not in given_up]:
            found = run_child(row.name, side, settings)
            if "seconds" in found:
                measured[side].append(found)
            else:
                given_up[side] = found
    sides = {side: given_up[side] if side in given_up else summary(found) for side, found in measured.items()}
    return {
        "row": row.name,
        "title": row.title,
        "bound": row.bound,
        "device": row.device,
        "sides": sides,
        "reach": [checked(reach, sides) for reach in row.reach],
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one side over its rounds, each round counting as much as the others."""

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


def checked(reach: Reach, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A figure to reach with what was found; `found` is None where a side has no figures."""
    ours, key = sides.get("ours", {}), {"seconds": "seconds", "peak": "peak_bytes"}[reach.what]
    value = ours.get(key)
    other = ours.get("output_bytes") if "output" in reach.of else sides.get(reach.of, {}).get(key)
    found = None
    if value is not None and other is not None:
        found = value - other if reach.of == "over output" else value / other if other else None
    return {**asdict(reach), "found": found, "met": None if found is None else found <= reach.at_most}


def machine() -> dict[str, Any]:
    """Where the figures come from."""
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
