"""Programs that run in several processes at once, the ranks of a process group."""

import subprocess
import sys
import time
from pathlib import Path

import torch


def run_ranks(program: Path, folder: Path, count: int, arguments: tuple[str, ...], seconds: float) -> list[dict]:
    """What each rank of a program saves as `folder/RANK.pt`; the program gets folder, rank, count and arguments.

    Raises:
        AssertionError: One has failed or was late; all others are killed, as they would wait for it.
    """
    errors = [folder / f"{rank}.err" for rank in range(count)]
    running = []
    for rank, path in enumerate(errors):
        command = [sys.executable, str(program), str(folder), str(rank), str(count), *arguments]
        with path.open("w") as file:
            running.append(subprocess.Popen(command, stderr=file))
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if {process.poll() for process in running} not in ({None}, {None, 0}):
                break
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * count, "\n".join(map(Path.read_text, errors))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]
