"""The output of a batch, which a kill at any moment leaves in a state that the next run continues from.

While a run lasts, results are lines of OUTPUT.journal; a last line that was cut off is dropped when the next run
begins. When all rows are there the output appears at once, by a rename. OUTPUT.run.json says what the run was.
"""

import json
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from molmo2.batch.rows import pyarrow

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
ROWS_PER_GROUP = 4096  # of Parquet; as many are in memory at a time
ANEW = "begin anew with overwrite=True (--overwrite)"


class OutputError(ValueError):
    """The output cannot be written, or belongs to another run."""


class RowSet:
    """Numbers from 0, one bit each: a million finished rows take 125 KB."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (number & 7) & 1)

    def add(self, number: int) -> bool:
        """Add a number; False if it was there already."""
        if number in self:
            return False
        byte = number >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1024 - len(self._bits)))
        self._bits[byte] |= 1 << (number & 7)
        self._count += 1
        return True


class Journal:
    """The results of a run so far; use it as a context, which locks the output.

    Attributes:
        done: Numbers of the rows that have a result.
        num_rows, num_errors: Rows of a complete output; how many have errors so far.
        is_complete: The output is there already, made by the same run.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, overwrite: bool = False):
        """Args: identity: what makes this run this run (source, question, model, options), as JSON has it."""
        self.output = output
        self._format = FORMATS.get(output.suffix.lower())
        if self._format is None:
            raise OutputError(f"'{output}' is no output: its suffix is none of {', '.join(FORMATS)}.")
        if self._format == "parquet":
            pyarrow("parquet")  # said before the first answer, not after the last
        self._identity, self._overwrite = json.loads(json.dumps(identity)), overwrite
        self._path, self._about = (output.with_name(f"{output.name}.{end}") for end in ("journal", "run.json"))
        self.done, self.num_rows, self.num_errors, self.is_complete = RowSet(), 0, 0, False
        self._file: BinaryIO | None = None
        self._lock = FileLock(str(output) + ".lock")

    def __enter__(self) -> "Journal":
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"Another run is writing '{self.output}'. Wait for it, or name another output."
            ) from error
        except OSError as error:
            raise OutputError(f"'{self.output}' cannot be written: {error}") from error
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()
        with suppress(OSError):
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    def _open(self) -> None:
        if self._overwrite:
            for path in (self._path, self.output, self._about):
                path.unlink(missing_ok=True)
        about = self._read_about()
        if about is None and (self.output.exists() or self._path.exists()):
            raise OutputError(f"'{self.output}' exists, but not from such a run. Name another output, or {ANEW}.")
        if about is not None and about["run"] != self._identity:
            changed = sorted(
                name for name in {*about["run"], *self._identity} if about["run"].get(name) != self._identity.get(name)
            )
            raise OutputError(
                f"'{self.output}' was started with other settings or another source ({', '.join(changed)}). Use "
                f"those, name another output, or {ANEW}."
            )
        if about is not None and self.output.exists() and not self._path.exists():
            self.is_complete = True
            self.num_rows, self.num_errors = about.get("rows", 0), about.get("errors", 0)
            return
        if about is None:
            self._write_about({})
        self._recover()

    def _read_about(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._about.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise OutputError(f"'{self._about}' is damaged ({error}). Mend it, or {ANEW}.") from error

    def _write_about(self, more: dict[str, Any]) -> None:
        partial = self._about.with_name(self._about.name + ".partial")
        content = {"run": self._identity, **more}
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self._about)

    def _recover(self) -> None:
        """Read what is there, and cut off a last line that is not whole."""
        self._file = self._path.open("a+b")
        self._file.seek(0)
        whole, size = 0, os.fstat(self._file.fileno()).st_size
        for line in self._file:
            try:
                result = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                result = None
            if result is None and whole + len(line) < size:
                raise OutputError(f"'{self._path}' is damaged at byte {whole}, amid whole lines. Mend it, or {ANEW}.")
            if result is None:
                break
            whole += len(line)
            self.done.add(result["row"])
            self.num_errors += result["error"] is not None
        self._file.truncate(whole)
        self._file.seek(whole)

    def write(self, result: dict[str, Any]) -> bool:
        """Add a result; False, and nothing happens, if its row has one already."""
        if self._file is None:
            raise OutputError(f"The journal of '{self.output}' is not open.")
        line = _as_line(result)
        if not self.done.add(result["row"]):
            return False
        self.num_errors += result["error"] is not None
        self._file.write(line)
        self._file.flush()  # to the system: what follows a kill of this process finds it
        return True

    def results(self) -> Iterator[dict[str, Any]]:
        """The results that are there, in the order in which they were written; also those of a complete output.

        Raises:
            OutputError: The output is complete, and not JSONL.
        """
        if self.is_complete and self._format != "jsonl":
            raise OutputError(f"'{self.output}' is read as JSONL only. Name an output that ends with .jsonl.")
        with (self.output if self.is_complete else self._path).open("rb") as file:
            yield from map(json.loads, file)

    def finish(self, *, ordered: bool, summary: dict[str, Any]) -> None:
        """Make the output of the journal."""
        if self._file is None:
            raise OutputError(f"The journal of '{self.output}' is not open.")
        os.fsync(self._file.fileno())
        self._write_about(summary)
        if self._format == "jsonl" and not ordered:
            self._path.replace(self.output)
            return
        partial = self.output.with_name(self.output.name + ".partial")
        lines = self._ordered_lines() if ordered else self._lines()
        if self._format == "jsonl":
            with partial.open("wb") as file:
                file.writelines(lines)
        else:
            _write_parquet(partial, lines)
        partial.replace(self.output)
        self._path.unlink()

    def _lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield from file

    def _ordered_lines(self) -> Iterator[bytes]:
        """Lines by row, found by their offsets: eight bytes a row in memory."""
        places = array("q", [-1]) * (max((json.loads(line)["row"] for line in self._lines()), default=-1) + 1)
        position = 0
        for line in self._lines():
            places[json.loads(line)["row"]] = position
            position += len(line)
        with self._path.open("rb") as file:
            for place in places:
                if place >= 0:
                    file.seek(place)
                    yield file.readline()


def _as_line(result: dict[str, Any]) -> bytes:
    """One line of JSON; names of files that are no text are escaped, so that they can be read again."""
    try:
        return json.dumps(result, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(result).encode() + b"\n"


def _write_parquet(path: Path, lines: Iterator[bytes]) -> None:
    """Rows in groups; columns that hold objects of no fixed form are JSON text."""
    arrow, parquet = pyarrow("lib"), pyarrow("parquet")
    point = {"label": arrow.string(), "id": arrow.int64(), "image": arrow.int64(), "frame": arrow.int64()}
    point |= dict.fromkeys(("x", "y", "x_norm", "y_norm", "time"), arrow.float64())
    texts = arrow.list_(arrow.string())
    schema = arrow.schema(
        [
            ("row", arrow.int64()),
            *((name, arrow.string()) for name in ("id", "question", "text", "error", "structured", "timings")),
            *((name, texts) for name in ("images", "videos")),
            ("truncated", arrow.bool_()),
            ("count", arrow.int64()),
            ("points", arrow.list_(arrow.struct(list(point.items())))),
        ]
    )
    with parquet.ParquetWriter(path, schema) as writer:
        while group := [_flat(json.loads(line)) for line in islice(lines, ROWS_PER_GROUP)]:
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    as_text: dict[str, Any] = {name: json.dumps(result[name]) for name in ("structured", "timings") if name in result}
    named = {"id": str(result["id"])} if result.get("id") is not None else {}
    return _clean({**result, **as_text, **named})


def _clean(value: Any) -> Any:
    """A value whose texts can be encoded: halves of surrogate pairs are written as their numbers."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_clean(name): _clean(entry) for name, entry in value.items()}
    return [_clean(entry) for entry in value] if isinstance(value, list) else value
