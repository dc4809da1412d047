"""Atomic output: the folder appears at once and complete, or not at all.

Everything is written to `.<name>.partial` beside the output, which is renamed at the very end, under the lock
`.<name>.lock`. A killed conversion leaves these behind; in the folder is a record of the finished shards, from which
`--resume` continues. A folder that is replaced waits inside `.<name>.replaced`, and is deleted only once the new one,
whose identity is recorded there, is in its place.

Others may write to the same place. So links are never followed, and nothing is deleted but folders with our mark: the
record of the conversion, or, between its removal and the rename, the folder's identity in the lock file.
"""

import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from molmo2.convert.errors import ConversionError, OutputError
from molmo2.convert.small_files import read_json

try:
    import fcntl
except ImportError:  # not a POSIX system, which is said when a conversion starts
    fcntl = None  # type: ignore[assignment]

STATE_FILE = ".conversion.json"
DRAFT_FILE = ".conversion.draft"
OLD_FOLDER = "folder"  # in `.<name>.replaced`
CHECK_BYTES = 1 << 22
MAX_LOCK_BYTES = 1_000


class Segment(NamedTuple):
    """Consecutive bytes of a file and their checksum."""

    num_bytes: int
    crc32: int


def ensure_posix() -> None:
    """Refuse systems without the calls that writing needs.

    Raises:
        OutputError: On Windows.
    """
    if fcntl is None:
        raise OutputError("The converter needs a POSIX system (Linux, macOS, or WSL on Windows).")


def is_intact(path: Path, segments: list[Segment]) -> bool:
    """Whether a file holds exactly these segments, one after the other."""
    if _kind(path) != "file" or path.stat().st_size != sum(segment.num_bytes for segment in segments):
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
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kind(path: Path) -> str:
    """What is at a path itself, not behind it: "file", "folder", "link", "other" or ""."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "other")


def _identity(path: Path) -> list[int]:
    """Device and number of a file or folder."""
    status = path.lstat()
    return [status.st_dev, status.st_ino]


def _has_content(folder: Path) -> bool:
    """Whether a folder has anything in it; False once it is gone, which may be at any moment without the lock."""
    try:
        return any(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _remove(entry: Path) -> None:
    shutil.rmtree(entry) if _kind(entry) == "folder" else entry.unlink()


def _remove_marked(folder: Path) -> None:
    """Delete a folder of ours; its mark goes last, so that a kill leaves a folder of ours."""
    for entry in folder.iterdir():
        if entry.name != STATE_FILE:
            _remove(entry)
    with suppress(FileNotFoundError):
        (folder / STATE_FILE).unlink()
    folder.rmdir()


class _Lock:
    """A lock file beside the output; the system releases it when this process ends.

    Not `filelock`, which locks the output of batches: this file also holds a note that outlives a kill, links to it
    are refused, and file systems without locks are accepted. Writing needs POSIX besides: it flushes folders.

    Raises:
        OutputError: If another process holds it, or if there is something else at its path.
    """

    def __init__(self, path: Path, busy: str):
        self.path = path
        while True:
            self._open(busy)
            with suppress(FileNotFoundError):
                if [os.fstat(self._descriptor).st_dev, os.fstat(self._descriptor).st_ino] == _identity(path):
                    break
            os.close(self._descriptor)  # its last holder removed it meanwhile, and a third process may have a new one
        self.content = os.pread(self._descriptor, MAX_LOCK_BYTES, 0)

    def _open(self, busy: str) -> None:
        if _kind(self.path) not in ("", "file"):
            raise OutputError(f"{self.path} is not a regular file, as a lock is; remove it")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise OutputError(busy) from None
        except OSError:  # a file system without locks
            pass

    def note(self, content: dict[str, Any]) -> None:
        """Write into the file, which outlives a kill."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(content).encode(), 0)
        os.fsync(self._descriptor)

    def release(self) -> None:
        with suppress(OSError):
            self.path.unlink()
        os.close(self._descriptor)


class Staging:
    """The folder in which the output is built.

    Args:
        output: Where it will be; may exist if empty, or with `overwrite`, which replaces it at the end.
        inputs: Files and folders that are read to make it.
        fingerprint: Of everything that the shards depend on; finished shards of another one are discarded.
        overwrite: Replace an output that has content.
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
        ensure_posix()
        self.output = output.resolve()
        self.folder = self.output.parent / f".{self.output.name}.partial"
        self._retired = self.output.parent / f".{self.output.name}.replaced"
        self._fingerprint, self._overwrite, self._resume = fingerprint, overwrite, resume
        self._lock: _Lock | None = None
        self._taken: list[int] | None = None  # identity of the folder, once it is ours
        self.finished: dict[str, list[Segment]] = {}
        self.notes: dict[str, list[str]] = {}  # what was noticed in finished shards
        ensure_disjoint((self.output, self.folder, self._retired), inputs)
        if _kind(self._retired) == "":
            ensure_replaceable(output, overwrite)

    def open(self, planned: Mapping[str, int] | None = None, other_bytes: int = 0) -> None:
        """Make the folder, without anything in it but adopted shards.

        Args:
            planned: Size of each shard by name; None if there are no shards.
            other_bytes: Of all other files.
        Raises:
            OutputError: If another conversion is writing into it, if something at its path is not ours, if the output
                may not be replaced any more, or if the disk is too small.
        """
        planned = {} if planned is None else planned
        self.output.parent.mkdir(parents=True, exist_ok=True)
        busy = f"Another conversion is writing into {self.folder}: wait for it, or choose another OUTPUT"
        self._lock = _Lock(self.output.parent / f".{self.output.name}.lock", busy)
        if _kind(self.folder) == "folder" and self._is_noted(self.folder):
            self._write_mark(self.folder, {"fingerprint": "", "shards": {}})
        self._restore_retired()
        ensure_replaceable(self.output, self._overwrite)
        self._take()
        if self._resume:
            self._adopt(planned)
        self._ensure_space(sum(planned.values()) + other_bytes)
        for entry in self.folder.iterdir():
            if entry.name not in self.finished and entry.name != STATE_FILE:
                _remove(entry)
        self._save_state()

    def _restore_retired(self) -> None:
        """Undo or complete what a kill between two renames left of an earlier replacement."""
        kind = _kind(self._retired)
        if kind == "":
            return
        if kind != "folder":
            raise self._foreign(self._retired)
        if not self._is_ours(self._retired):
            if _kind(self.output) != "":
                raise self._foreign(self._retired)
            self._retired.rename(self.output)
            return
        old = self._retired / OLD_FOLDER
        if _kind(old) == "folder" and not self._is_in_place(self._state_of(self._retired)):
            if _kind(self.output) == "folder" and not _has_content(self.output):
                self.output.rmdir()
            if _kind(self.output) != "":
                raise OutputError(
                    f"{old} is what was at {self.output} before a conversion was interrupted, and something else is "
                    "there now. Move one of the two away"
                )
            old.rename(self.output)
        _remove_marked(self._retired)

    def _is_in_place(self, state: dict[str, Any] | None) -> bool:
        """Whether the output is the new folder of a replacement with this mark, and not what somebody put there."""
        if state is None or _kind(self.output) != "folder" or state.get("new") != _identity(self.output):
            return False
        return set(state.get("files", ())) <= set(os.listdir(self.output))  # file systems use a number again

    def _take(self) -> None:
        """Make the folder, or take over the one that an earlier attempt left."""
        kind = _kind(self.folder)
        if kind == "":
            self.folder.mkdir()
        elif kind != "folder" or not self._is_ours(self.folder):
            raise self._foreign(self.folder)
        self._taken = _identity(self.folder)

    def _is_ours(self, folder: Path) -> bool:
        """Whether a folder is empty or carries our mark."""
        return {entry.name for entry in folder.iterdir()} <= {DRAFT_FILE} or self._state_of(folder) is not None

    def _is_noted(self, folder: Path) -> bool:
        """Whether a killed conversion noted a folder in the lock file when it removed our mark from it."""
        with suppress(ValueError, AttributeError):
            return self._lock is not None and json.loads(self._lock.content).get("folder") == _identity(folder)
        return False

    @staticmethod
    def _state_of(folder: Path) -> dict[str, Any] | None:
        """The record in a folder; None if there is none."""
        path = folder / STATE_FILE
        if _kind(path) == "file":
            with suppress(ConversionError):
                state = read_json(path)
                return state if {"fingerprint", "shards"} <= set(state) else None
        return None

    @staticmethod
    def _foreign(path: Path) -> OutputError:
        return OutputError(
            f"{path} does not come from a conversion, but conversions write under this name. Move it away, or choose "
            "another OUTPUT"
        )

    def _adopt(self, planned: Mapping[str, int]) -> None:
        """Take over the shards of an earlier attempt whose checksums are right."""
        state = self._state_of(self.folder)
        if state is None or state["fingerprint"] != self._fingerprint:
            return
        for name, num_bytes in planned.items():
            with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
                segments = [Segment(*numbers) for numbers in state["shards"][name]]
                total = sum(segment.num_bytes for segment in segments)
                if total == num_bytes and is_intact(self.folder / name, segments):
                    self.finished[name] = segments
                    self.notes[name] = [str(note) for note in state.get("notes", {}).get(name, [])]

    def _ensure_space(self, num_bytes: int) -> None:
        """Refuse an output of this size if it does not fit on the disk."""
        present = sum((self.folder / name).stat().st_size for name in self.finished)
        abandoned = sum(f.lstat().st_size for f in self.folder.iterdir() if _kind(f) == "file") - present
        free = shutil.disk_usage(self.folder.parent).free + abandoned
        if num_bytes - present > free:
            raise OutputError(
                f"{self.folder.parent} has {free / 1e9:.2f} GB free, but {(num_bytes - present) / 1e9:.2f} GB are "
                "needed. Free some space, choose another OUTPUT, or write bfloat16 (--dtype bfloat16)"
            )

    def write_text(self, name: str, text: str) -> None:
        """A file of the output; it must not exist yet."""
        # A lone surrogate, from the name of a folder or a tokenizer, becomes an escape, as JSON writes it.
        with open(self.folder / name, "x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)

    def copy(self, source: Path) -> None:
        """The same with a copy of a file, under its name."""
        with open(source, "rb") as file, open(self.folder / source.name, "xb") as copied:
            shutil.copyfileobj(file, copied)

    def record(self, file_name: str, segments: list[Segment], notes: list[str] | None = None) -> None:
        """Note a shard that is finished and flushed."""
        self.finished[file_name] = segments
        self.notes[file_name] = [] if notes is None else notes
        self._save_state()

    def _save_state(self) -> None:
        content = {"fingerprint": self._fingerprint, "shards": self.finished, "notes": self.notes}
        self._write_mark(self.folder, content)

    @staticmethod
    def _write_mark(folder: Path, content: dict[str, Any]) -> None:
        draft = folder / DRAFT_FILE
        with suppress(FileNotFoundError):
            draft.unlink()
        with open(draft, "x", encoding="utf-8") as file:
            json.dump(content, file)
        flush(draft)
        draft.replace(folder / STATE_FILE)

    def commit(self, planned: Mapping[str, int | None]) -> None:
        """Move the folder into place.

        Args:
            planned: Size of every file by name, None where any will do.
        Raises:
            OutputError: If the folder does not hold exactly these files, or the output may not be replaced any more.
        """
        self._ensure_complete(planned)
        ensure_replaceable(self.output, self._overwrite)  # others may have written there meanwhile
        for entry in self.folder.iterdir():
            if entry.name not in self.finished:
                flush(entry)
        if self._lock is not None:
            self._lock.note({"folder": self._taken})
        (self.folder / STATE_FILE).unlink()
        try:
            flush(self.folder)
            is_replaced = self._overwrite and _has_content(self.output)
            if is_replaced:
                self._retire()
            elif self.output.exists():
                self.output.rmdir()
            self.folder.rename(self.output)
        except OSError:
            with suppress(OSError):
                self._save_state()  # for `--resume`: all shards are finished
            with suppress(OSError):
                self._restore_retired()
            raise
        flush(self.output.parent)
        if is_replaced:
            with suppress(OSError):
                _remove_marked(self._retired)

    def _retire(self) -> None:
        """Move the old output away, into a folder with our mark."""
        self._retired.mkdir()
        new = {"new": self._taken, "files": os.listdir(self.folder)}
        self._write_mark(self._retired, {"fingerprint": self._fingerprint, "shards": {}, **new})
        self.output.rename(self._retired / OLD_FOLDER)

    def _ensure_complete(self, planned: Mapping[str, int | None]) -> None:
        if _kind(self.folder) != "folder" or _identity(self.folder) != self._taken:
            raise OutputError(f"{self.folder} was exchanged while the conversion was writing into it")
        sizes = {entry.name: entry.lstat().st_size for entry in self.folder.iterdir() if _kind(entry) == "file"}
        names = {entry.name for entry in self.folder.iterdir()} - {STATE_FILE, DRAFT_FILE}
        wrong = sorted(names ^ set(planned))
        wrong += sorted(name for name, size in planned.items() if size is not None and sizes.get(name) != size)
        if wrong or not names <= set(sizes):
            raise OutputError(f"Files in {self.folder} were changed by another process: {wrong}")

    @contextmanager
    def cleanup_on_error(self) -> Iterator[None]:
        """Context for all writing: on failure, finished shards are kept for `--resume`; without any, nothing is left.

        Raises:
            OutputError: In place of an OSError.
        """
        try:
            yield
        except (OSError, OutputError) as error:
            reason = str(error).rstrip(".")
            raise OutputError(f"{reason}. Nothing was changed at {self.output}. {self._keep_or_discard()}") from error
        except KeyboardInterrupt:
            self._keep_or_discard()
            raise
        except BaseException:
            self.discard()  # a damaged source: there is nothing to continue with
            raise
        finally:
            self._taken = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _keep_or_discard(self) -> str:
        if self._taken is None:
            return "Nothing was written."
        if not self.finished:
            self.discard()
            return "Nothing is left behind."
        return f"{len(self.finished)} finished file(s) wait in {self.folder}: continue with --resume, or delete it."

    def discard(self) -> None:
        """Remove everything that was written, if it was written here."""
        with suppress(OSError):
            if self._taken is not None and _identity(self.folder) == self._taken:
                _remove_marked(self.folder)


def ensure_disjoint(places: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse to replace inputs, whatever names and links lead to them.

    Args:
        places: Folders that may be emptied or removed.
        inputs: Files and folders that are read; those that do not exist do not count.
    Raises:
        OutputError: If one of the places is an input, or holds one.
    """
    replaced = {}
    for place in filter(Path.is_dir, places):
        with suppress(FileNotFoundError):  # another conversion may remove it at any moment
            replaced[tuple(_identity(place.resolve()))] = place
    resolved = {path.resolve() for path in inputs if path.exists()} if replaced else set()
    for folder in resolved.union(*(path.parents for path in resolved)):
        found = replaced.get(tuple(_identity(folder)))
        if found is not None:
            held = min(path for path in resolved if folder in (path, *path.parents))
            raise OutputError(
                f"Replacing {found} would delete {held}, which this conversion reads. Choose another OUTPUT."
            )


def ensure_replaceable(output: Path, overwrite: bool) -> None:
    """Refuse an output that has content, or that cannot be exchanged as a whole.

    Raises:
        OutputError: If `output` is a file, the root of a mounted disk, or a folder with content and `overwrite` is
            false, or only a link leads to it.
    """
    if os.path.ismount(output):
        raise OutputError(f"{output} is the root of a mounted disk, which cannot be exchanged. Choose a folder in it.")
    if output.is_dir():
        if _has_content(output):
            if not overwrite:
                raise OutputError(f"{output} is not empty. Choose another folder, or replace it with --overwrite.")
            if output.is_symlink():
                raise OutputError(
                    f"{output} is a link to {output.resolve()}. To replace that folder, name it as OUTPUT."
                )
    elif output.exists():
        raise OutputError(f"{output} is a file; expected a folder, or nothing yet.")
