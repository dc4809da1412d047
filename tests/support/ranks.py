"""Programs that run in several processes at once, the ranks of a process group.

    python ranks.py PROGRAM FOLDER COUNT [ARGUMENT ...]

imports what the program imports once, and forks the ranks: torch and transformers take seconds of each process.
"""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path


def run_ranks(program: Path, folder: Path, count: int, arguments: tuple[str, ...], seconds: float) -> list[dict]:
    """What each rank of a program saves as `folder/RANK.pt`; the program gets folder, rank, count and arguments.

    Raises:
        AssertionError: One has failed or was late; all others are killed, as they would wait for it.
    """
    import torch

    command = [sys.executable, __file__, str(program), str(folder), str(count), *arguments]
    parent = subprocess.Popen(command, start_new_session=True)
    try:
        status: int | None = parent.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    errors = [path.read_text() for path in (folder / f"{rank}.err" for rank in range(count)) if path.exists()]
    assert status == 0, "\n".join([f"ended with {status}", *errors])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def fork_ranks(program: str, folder: str, count: int, arguments: list[str]) -> int:
    """Run the ranks; 0 once all have ended well, 1 as soon as one has not."""
    runpy.run_path(program, run_name="ranks")  # its imports and definitions
    for rank in range(count):
        if os.fork() == 0:
            _run_rank(program, [folder, str(rank), str(count), *arguments], Path(folder) / f"{rank}.err")
    for _ in range(count):
        if os.wait()[1]:
            return 1
    return 0


def _run_rank(program: str, arguments: list[str], errors: Path) -> None:
    """Run the program in this process, which ends with it."""
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # here: behind this block the error's tensors are freed, which may wait for other ranks
    os._exit(0)


if __name__ == "__main__":
    sys.exit(fork_ranks(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
