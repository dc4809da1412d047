"""Atomic output: the folder appears at once and complete, or not at all.

Everything is written to `.<name>.partial` beside the output, which is renamed at the very end, under the lock
`.<name>.lock`. A killed conversion leaves these behind; in the folder is a record of the finished shards, from which
`--resume` continues.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from molmo2.convert.errors import OutputError

STATE_FILE = ".conversion.json"
CHECK_BYTES = 1 << 22


class Segment(NamedTuple):
    """Consecutive bytes of a file and their checksum."""

    num_bytes: int
    crc32: int


def is_intact(path: Path, segments: list[Segment]) -> bool:
    """Whether a file holds exactly these segments, one after the other."""
    if not path.is_file() or path.stat().st_size != sum(segment.num_bytes for segment in segments):
        return False
    buffer = memoryview(bytearray(CHECK_BYTES))
    with open(path, "rb", buffering=0) as file:
        for segment in segments:
            crc, left = 0, segment.num_bytes
            while left:
                number = file.readinto(buffer[: min(left, CHECK_BYTES)])
                if not number:
                    return False
                crc, left = zlib.crc32(buffer[:number], crc), left - number
            if crc != segment.crc32:
                return False
    return True


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Staging:
    """The folder in which the output is built.

    Args:
        output: Where it will be; may exist if empty, or with `overwrite`, which replaces it at the end.
        inputs: Files and folders that are read to make it.
        fingerprint: Of everything that the shards depend on; finished shards of another one are discarded.
        resume: Keep the finished shards of an earlier attempt, after checking them.
    Raises:
        OutputError: If there is something at `output` that may not be replaced.
    """

    def __init__(
        self,
        output: Path,
        fingerprint: str,
        *,
        inputs: Iterable[Path] = (),
        overwrite: bool = False,
        resume: bool = False,
    ):
        self.output = output.resolve()
        self.folder = self.output.parent / f".{self.output.name}.partial"
        self._retired = self.output.parent / f".{self.output.name}.replaced"
        self._fingerprint = fingerprint
        self._file_lock = FileLock(self.output.parent / f".{self.output.name}.lock")
        self._is_ours = False
        self.finished: dict[str, list[Segment]] = {}
        ensure_disjoint((self.output, self.folder, self._retired), inputs)
        self._restore_retired()
        ensure_replaceable(self.output, overwrite)
        if resume:
            self._adopt()

    def _restore_retired(self) -> None:
        """Undo or complete what a kill between two renames left of an earlier replacement."""
        if self._retired.exists():
            if self.output.exists():
                shutil.rmtree(self._retired)
            else:
                self._retired.rename(self.output)

    def _adopt(self) -> None:
        """Take over the shards of an earlier attempt whose checksums are right."""
        with suppress(OSError, ValueError, AttributeError, TypeError):
            state = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
            if state["fingerprint"] == self._fingerprint:
                for name, recorded in state["shards"].items():
                    segments = [Segment(*numbers) for numbers in recorded]
                    if is_intact(self.folder / name, segments):
                        self.finished[name] = segments

    def open(self) -> None:
        """Make the folder, without anything in it but adopted shards.

        Raises:
            OutputError: If another conversion is writing into it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        for entry in self.folder.iterdir():
            if entry.name not in self.finished:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._save_state()

    def _lock(self) -> None:
        """Keep other conversions out of the folder; the system releases the lock when this process ends."""
        try:
            self._file_lock.acquire(blocking=False)
        except Timeout:
            raise OutputError(
                f"Another conversion is writing into {self.folder}: wait for it, or choose another OUTPUT"
            ) from None
        except OSError:  # a file system without locks
            pass
        self._is_ours = True

    def _unlock(self) -> None:
        self._is_ours = False
        if self._file_lock.is_locked:
            with suppress(OSError):  # Windows keeps files that are open
                os.unlink(self._file_lock.lock_file)
            self._file_lock.release()

    def ensure_space(self, num_bytes: int) -> None:
        """Refuse an output that does not fit on the disk.

        Args:
            num_bytes: Of the complete output.
        """
        parent = self.folder.parent
        while not parent.exists():
            parent = parent.parent
        present = sum((self.folder / name).stat().st_size for name in self.finished)
        abandoned = 0
        if self.folder.is_dir():
            abandoned = sum(f.stat().st_size for f in self.folder.iterdir() if f.is_file()) - present
        free = shutil.disk_usage(parent).free + abandoned
        if num_bytes - present > free:
            raise OutputError(
                f"{parent} has {free / 1e9:.2f} GB free, but {(num_bytes - present) / 1e9:.2f} GB are needed. "
                "Free some space, choose another OUTPUT, or write bfloat16 (--dtype bfloat16)."
            )

    def record(self, file_name: str, segments: list[Segment]) -> None:
        """Note a shard that is finished and flushed."""
        self.finished[file_name] = segments
        self._save_state()

    def _save_state(self) -> None:
        path = self.folder / STATE_FILE
        content = {"fingerprint": self._fingerprint, "shards": self.finished}
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(content), encoding="utf-8")
        flush(draft)
        draft.replace(path)

    def commit(self) -> None:
        """Move the folder into place."""
        for entry in self.folder.iterdir():
            if entry.name not in self.finished:
                flush(entry)
        (self.folder / STATE_FILE).unlink()
        try:
            flush(self.folder)
            if self.output.exists():
                is_empty = not any(self.output.iterdir())
                self.output.rmdir() if is_empty else self.output.rename(self._retired)
            self.folder.rename(self.output)
        except OSError:
            with suppress(OSError):
                self._restore_retired()
            with suppress(OSError):
                self._save_state()  # for `--resume`: all shards are finished
            raise
        flush(self.output.parent)
        shutil.rmtree(self._retired, ignore_errors=True)

    @contextmanager
    def cleanup_on_error(self) -> Iterator[None]:
        """Context for all writing: on failure, finished shards are kept for `--resume`; without any, nothing is left.

        Raises:
            OutputError: In place of an OSError.
        """
        try:
            yield
        except (OSError, OutputError) as error:
            raise OutputError(f"{error}. Nothing was changed at {self.output}. {self._keep_or_discard()}") from error
        except KeyboardInterrupt:
            self._keep_or_discard()
            raise
        except BaseException:
            self.discard()  # a damaged source: there is nothing to continue with
            raise
        finally:
            self._unlock()

    def _keep_or_discard(self) -> str:
        if not self._is_ours:
            return "Nothing was written."
        if not self.finished:
            self.discard()
            return "Nothing is left behind."
        return f"{len(self.finished)} finished file(s) wait in {self.folder}: continue with --resume, or delete it."

    def discard(self) -> None:
        """Remove everything that was written, if it was written here."""
        if not self._is_ours:
            return
        shutil.rmtree(self.folder, ignore_errors=True)


def ensure_disjoint(places: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse to replace inputs, whatever names and links lead to them.

    Args:
        places: Folders that may be emptied or removed.
        inputs: Files and folders that are read; those that do not exist do not count.
    Raises:
        OutputError: If one of the places is an input, or holds one.
    """
    replaced = [place for place in places if place.is_dir()]
    resolved = {path.resolve() for path in inputs if path.exists()} if replaced else set()
    for folder in resolved.union(*(path.parents for path in resolved)):
        for place in replaced:
            if folder.samefile(place):
                held = min(path for path in resolved if folder in (path, *path.parents))
                raise OutputError(
                    f"Replacing {place} would delete {held}, which this conversion reads. Choose another OUTPUT."
                )


def ensure_replaceable(output: Path, overwrite: bool) -> None:
    """Refuse an output that has content, or that cannot be exchanged as a whole.

    Raises:
        OutputError: If `output` is a file, the root of a mounted disk, or a folder with content and `overwrite` is
            false.
    """
    if os.path.ismount(output):
        raise OutputError(f"{output} is the root of a mounted disk, which cannot be exchanged. Choose a folder in it.")
    if output.is_dir():
        if any(output.iterdir()) and not overwrite:
            raise OutputError(f"{output} is not empty. Choose another folder, or replace it with --overwrite.")
    elif output.exists():
        raise OutputError(f"{output} is a file; expected a folder, or nothing yet.")
