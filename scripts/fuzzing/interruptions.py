"""Conversions that are killed at any of their steps, and four at once: an output is complete, or as it was.

for case in itertools.islice(cases(seed), 150):
    run(case)

Needs `src` and `tests` on the path. Processes are forked from this one, which has everything imported and planned.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from molmo2.convert import ConversionOptions, OutputError, plan_conversion
from molmo2.convert.conversion import ConversionPlan, write_plan
from support.native_checkpoints import ShardLayout, native_section, native_tensors, write_base_tokenizer, write_sharded

Case = tuple[str, int]
# What a conversion does to names on the disk; a kill comes right before one of these.
STEPS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fcntl.flock", "os.scandir")
MAX_STEPS = 160
DONE, REFUSED, BROKEN = 0, 5, 9
MAX_SECONDS = 300.0  # far more than a conversion takes: only what hangs
OLD = {"old.txt": b"old", "config.json": b"{}"}


@cache
def _plan() -> ConversionPlan:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-interruptions-"))
    write_base_tokenizer(folder / "tokenizer")
    changes = {"llm.n_layers": 1, "vision_backbone.vit.image_num_layers": 3, "vision_backbone.vit_layers": [-1, -2]}
    section = native_section(changes)
    write_sharded(folder / "native", section, native_tensors(section), ShardLayout(ranks=2, files_per_rank=1))
    options = ConversionOptions(tokenizer=str(folder / "tokenizer"), max_shard_bytes=60_000)
    return plan_conversion(folder / "native", options)


@cache
def _complete() -> dict[str, bytes]:
    output = Path(tempfile.mkdtemp(prefix="fuzz-interruptions-")) / "out"
    assert _forked(lambda: write_plan(_plan(), output)) == DONE
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _start(work: Callable[[], object]) -> int:
    """A process that does the work; its exit code says how it ended."""
    number = os.fork()
    if number == 0:
        code = BROKEN
        try:
            work()
            code = DONE
        except OutputError:
            code = REFUSED
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return number


def _ended(number: int) -> int:
    """Exit code, or minus the signal."""
    deadline = time.monotonic() + MAX_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    raise AssertionError(f"a conversion did not end within {MAX_SECONDS} s")


def _forked(work: Callable[[], object]) -> int:
    return _ended(_start(work))


def _kill_before(step: int) -> None:
    """Let this process die before its step number `step`."""
    left = step

    def count(event: str, _: tuple) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def prepare() -> None:
    """Everything that cases have in common; once, before processes are forked for them."""
    _plan()  # in this process, or each of the others would plan anew
    _complete()


def cases(seed: int) -> Iterator[Case]:
    """Without end: two kills for each round of four."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(("kill", "kill", "four")), rng.getrandbits(48)


def run(case: Case) -> str:
    """Try one case.

    Returns:
        "killed", "never killed" where each conversion ended before its turn, or "four at once".
    Raises:
        AssertionError: If an output is lost, incomplete or wrong, or if anything is left beside a complete one.
    """
    kind, seed = case
    prepare()
    parent = Path(tempfile.mkdtemp(prefix="fuzz-interruption-"))
    try:
        return (_killed if kind == "kill" else _four)(parent / "out", random.Random(seed))
    finally:
        shutil.rmtree(parent)


def _put_old(output: Path, rng: random.Random) -> bool:
    """Often, an older folder that is to be replaced."""
    if rng.random() < 0.5:
        return False
    output.mkdir()
    for name, content in OLD.items():
        (output / name).write_bytes(content)
    return True


def _ensure_kept(output: Path, had_old: bool) -> bool:
    """Whether the output is complete; it may also be as it was, or wait where the next run finds it."""
    if output.exists():
        found = contents(output)
        assert found in (_complete(), OLD if had_old else _complete()), f"the output holds {sorted(found)}"
        return found == _complete()
    old = output.parent / f".{output.name}.replaced" / "folder"
    assert not had_old or contents(old) == OLD, "the old output is lost"
    return False


def _killed(output: Path, rng: random.Random) -> str:
    """Kill one conversion after the other, then let one end."""
    had_old, is_complete, was_killed = _put_old(output, rng), False, False
    for _ in range(rng.randrange(1, 4)):
        step, resume = rng.randrange(MAX_STEPS), rng.random() < 0.7

        def work(step: int = step, resume: bool = resume) -> None:
            _kill_before(step)
            write_plan(_plan(), output, overwrite=had_old, resume=resume)

        code = _forked(work)
        assert code in (DONE, -signal.SIGKILL) or (code == REFUSED and is_complete), f"exit code {code}"
        was_killed = was_killed or code == -signal.SIGKILL
        is_complete = _ensure_kept(output, had_old) or is_complete
    assert _forked(lambda: write_plan(_plan(), output, overwrite=True, resume=rng.random() < 0.7)) == DONE
    assert contents(output) == _complete()
    left = sorted(path.name for path in output.parent.iterdir())
    assert left == ["out"], f"left beside the output: {left}"
    return "killed" if was_killed else "never killed"


def _four(output: Path, rng: random.Random) -> str:
    """Four conversions to one place: at least one is done, the others are done or refused."""
    had_old = _put_old(output, rng)
    if rng.random() < 0.5:
        step = rng.randrange(MAX_STEPS)

        def interrupted() -> None:
            _kill_before(step)
            write_plan(_plan(), output, overwrite=had_old)

        _forked(interrupted)
        had_old = had_old or output.exists()
    pauses = [rng.random() * rng.choice((0, 0.02, 0.2)) for _ in range(4)]
    resumes = [rng.random() < 0.7 for _ in range(4)]

    def work(number: int) -> None:
        time.sleep(pauses[number])
        write_plan(_plan(), output, overwrite=had_old, resume=resumes[number])

    processes = [_start(lambda number=number: work(number)) for number in range(4)]
    codes = [_ended(number) for number in processes]
    assert DONE in codes, f"exit codes {codes}"
    assert set(codes) <= {DONE, REFUSED}, f"exit codes {codes}"
    assert contents(output) == _complete(), "the output is incomplete"
    left = sorted(path.name for path in output.parent.iterdir())
    assert left == ["out"], f"left beside the output: {left}"
    return "four at once"
