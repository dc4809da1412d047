"""Where rows come from: folders of media, and tables in JSON lines, CSV and Parquet, read as a stream.

A table has the columns `question` (unless one question is asked about all rows), `image` or `images`, `video` or
`videos`, and any others; `id` is copied into the result. Paths are relative to the table.
"""

import codecs
import csv
import hashlib
import importlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from molmo2.tools.media_files import MediaFile, is_url, media_in_folder

MEDIA_COLUMNS = {"image": "images", "images": "images", "video": "videos", "videos": "videos"}
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
ROWS_PER_CHUNK = 256
MAX_ID_LEVELS = 20
MAX_CELL_CHARACTERS = 2**31 - 1  # of CSV; the library's own limit is 131,072


class SourceError(ValueError):
    """There is no such table or folder, or it cannot be read at all."""


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        number: Its place in the source, from 0; results carry it, and a continued run finds finished rows by it.
        images, videos: Paths or URLs.
        id: What the table's column `id` says, or None.
        error: Why it cannot be asked; None if it can.
    """

    number: int
    question: str = ""
    images: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    id: Any = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `Row(**values)` reads it."""
        return asdict(self)

    def result(self, answer: Mapping[str, Any] | None = None, error: str | None = None) -> dict[str, Any]:
        """The row of the output: an answer, or the error that came instead."""
        known = {"row": self.number} if self.id is None else {"row": self.number, "id": self.id}
        asked = {"question": self.question, "images": self.images, "videos": self.videos}
        return {**known, **asked, **({} if answer is None else answer), "error": error}


@dataclass(frozen=True)
class Chunk:
    """Rows that follow each other: `place` is where reading begins, in bytes, row groups or files.

    Attributes:
        skipped: Rows of a row group before the first one.
    """

    first: int
    place: int
    count: int
    skipped: int = 0


class Source(Protocol):
    """A stream of rows, which any process can read from the beginning of any chunk."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source from another, or from itself after a change."""

    def chunks(self, size: int | None = None) -> Iterator[Chunk]:
        """All chunks of `size` rows at most (256), without their rows."""

    def read(self, chunk: Chunk) -> Iterator[Row]:
        """The rows of a chunk."""


def all_rows(source: Source) -> Iterator[Row]:
    """The rows of a source, in order."""
    for chunk in source.chunks():
        yield from source.read(chunk)


def open_source(path: str | Path, question: str | None = None, *, recursive: bool = False) -> Source:
    """The source that a path names: a folder, or a table by its suffix.

    Args:
        question: Asked about every row; `{name}` stands for the column of that name. None takes the table's.
        recursive: Look into folders of folders too.
    Raises:
        SourceError: There is nothing there, its suffix is unknown, or a folder comes without a question.
    """
    path = Path(path)
    if path.is_dir():
        if question is None:
            raise SourceError(f"'{path}' is a folder, which holds no questions. Pass --question.")
        return FolderSource(path, question, recursive)
    if not path.is_file():
        raise SourceError(f"There is no table or folder '{path}'. Check the path.")
    kinds: dict[str, Any] = {
        **dict.fromkeys((".jsonl", ".ndjson"), JsonLinesSource),
        ".csv": CsvSource,
        ".parquet": ParquetSource,
    }
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise SourceError(f"'{path}' is no table that can be read: its suffix is none of {', '.join(kinds)}.")
    return kind(path, question)


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    path: Path
    question: str | None

    def fingerprint(self) -> dict[str, Any]:
        status = self.path.stat()
        return {"path": str(self.path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns}

    def row(self, number: int, values: Any) -> Row:
        """The row of the values of one line; a row with an error where they do not make a question."""
        if not isinstance(values, Mapping):
            return Row(number, error=f"row {number} is no object with columns but {str(values)[:60]!r}")
        media: dict[str, list[str]] = {"images": [], "videos": []}
        name = None
        try:
            name = _json_value(values.get("id"))
            for column, kind in MEDIA_COLUMNS.items():
                media[kind] += [self._located(entry) for entry in _listed(values.get(column), column)]
            question = _question(self.question, values)
        except ValueError as error:
            return Row(number, "", media["images"], media["videos"], name, str(error))
        return Row(number, question, media["images"], media["videos"], name)

    def _located(self, path: str) -> str:
        return path if is_url(path) else str(self.path.parent / path)


@dataclass(frozen=True)
class JsonLinesSource(_Table):
    """One JSON object a line; empty lines do not count."""

    def chunks(self, size: int | None = None) -> Iterator[Chunk]:
        number = first = place = position = 0
        with self.path.open("rb") as file:
            for line in file:
                position += len(line)
                number += bool(line.strip())
                if number - first == (size or ROWS_PER_CHUNK):
                    yield Chunk(first, place, number - first)
                    first, place = number, position
        if number > first:
            yield Chunk(first, place, number - first)

    def read(self, chunk: Chunk) -> Iterator[Row]:
        with self.path.open("rb") as file:
            file.seek(chunk.place)
            lines = (line for line in file if line.strip())
            for number, line in enumerate(islice(lines, chunk.count), start=chunk.first):
                try:
                    row = self.row(number, json.loads(line))
                except (ValueError, RecursionError) as error:
                    row = Row(number, error=f"row {number} is no JSON ({error})")
                yield row


@dataclass(frozen=True)
class CsvSource(_Table):
    """Comma-separated, the first line names the columns; a list of files is written as JSON: ["a.jpg", "b.jpg"]."""

    def chunks(self, size: int | None = None) -> Iterator[Chunk]:
        first = count = 0
        with self._lines() as lines:
            records = csv.reader(lines)
            next(records, None)
            place = lines.position
            for values in records:
                count += bool(values)
                if count == (size or ROWS_PER_CHUNK):
                    yield Chunk(first, place, count)
                    first, count, place = first + count, 0, lines.position
        if count:
            yield Chunk(first, place, count)

    def read(self, chunk: Chunk) -> Iterator[Row]:
        with self._lines() as lines:
            columns = next(csv.reader(lines), [])
        with self._lines(chunk.place) as lines:
            records = (values for values in csv.reader(lines) if values)
            for number, values in enumerate(islice(records, chunk.count), start=chunk.first):
                if len(values) != len(columns):
                    found = f"row {number} has {len(values)} cells, but there are {len(columns)} columns"
                    yield Row(number, error=found)
                    continue
                yield self.row(number, dict(zip(columns, values)))

    @contextmanager
    def _lines(self, place: int = 0) -> "Iterator[_CountedLines]":
        """The lines behind a place in bytes; what is no CSV in UTF-8 is an error of the source."""
        csv.field_size_limit(MAX_CELL_CHARACTERS)
        with self.path.open("rb") as file:
            place = place or len(codecs.BOM_UTF8) * (file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8)
            file.seek(place)
            try:
                yield _CountedLines(io.TextIOWrapper(file, encoding="utf-8", newline=""), place)
            except (UnicodeDecodeError, csv.Error) as error:
                raise SourceError(f"'{self.path}' cannot be read as CSV in UTF-8: {error}") from error


class _CountedLines:
    """The lines of a file and where the next one begins, in bytes: a record of CSV may take several."""

    def __init__(self, file: io.TextIOWrapper, position: int):
        self._file, self.position = file, position

    def __iter__(self) -> "_CountedLines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.position += len(line.encode())
        return line


@dataclass(frozen=True)
class ParquetSource(_Table):
    """A Parquet file; images and videos are strings or lists of them."""

    def chunks(self, size: int | None = None) -> Iterator[Chunk]:
        first, size = 0, size or ROWS_PER_CHUNK
        with self._open() as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                for skipped in range(0, count, size):
                    yield Chunk(first + skipped, group, min(size, count - skipped), skipped)
                first += count

    def read(self, chunk: Chunk) -> Iterator[Row]:
        key = (*self.fingerprint().values(), chunk.place)
        reader = _GROUPS.pop(key, None)
        if reader is None or reader.position > chunk.skipped:
            reader = _GroupReader(self._open(), chunk.place)
        for number, values in enumerate(reader.take(chunk.skipped, chunk.count), start=chunk.first):
            yield self.row(number, values)
        _GROUPS.clear()
        if not reader.is_at_end:
            _GROUPS[key] = reader

    def _open(self) -> Any:
        try:
            return pyarrow("parquet").ParquetFile(self.path)
        except (OSError, ValueError) as error:
            raise SourceError(f"'{self.path}' cannot be read as Parquet: {error}") from error


class _GroupReader:
    """A row group from its beginning on: rows that are skipped are decoded, but become no objects of Python."""

    def __init__(self, file: Any, group: int):
        self.position, self._count = 0, file.metadata.row_group(group).num_rows
        self._batches = file.iter_batches(batch_size=ROWS_PER_CHUNK, row_groups=[group])
        self._batch: Any = None

    @property
    def is_at_end(self) -> bool:
        return self.position == self._count

    def take(self, skipped: int, count: int) -> Iterator[dict[str, Any]]:
        """The rows behind the skipped ones."""
        while self.position < skipped + count:
            if not self._batch:  # none yet, or an empty one
                self._batch = next(self._batches)
            wanted = skipped + count if self.position >= skipped else skipped
            length = min(wanted - self.position, len(self._batch))
            part, self._batch = self._batch.slice(0, length), self._batch.slice(length)
            if self.position >= skipped:
                yield from part.to_pylist()
            self.position += length


# The row group that this process reads, at most one: chunks that follow each other decode it once.
_GROUPS: dict[Any, _GroupReader] = {}


def pyarrow(module: str) -> Any:
    """A module of pyarrow, imported where Parquet is really used.

    Raises:
        SourceError: It is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        message = "Parquet needs pyarrow, which is not installed: pip install 'molmo2-transformers[parquet]'"
        raise SourceError(message) from error


def _listed(value: Any, column: str) -> list[str]:
    """Paths of one cell: a string, a list of them, or a list written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"column '{column}' begins like a list but is no JSON ({error})") from error
    entries = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise ValueError(f"column '{column}' holds {repr(value)[:60]}; expected a path, a URL or a list of them")
    return entries


def _json_value(value: Any, levels: int = MAX_ID_LEVELS) -> Any:
    """A value as JSON has it: times, dates, decimals and bytes, which Parquet has too, become text."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if not levels:
        raise ValueError(f"column 'id' holds lists or objects in more than {MAX_ID_LEVELS} levels")
    if isinstance(value, Mapping):
        return {str(name): _json_value(entry, levels - 1) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(entry, levels - 1) for entry in value]
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _question(template: str | None, values: Mapping[str, Any]) -> str:
    if template is None:
        question = values.get("question")
        if not isinstance(question, str) or not question.strip():
            raise ValueError("there is no question: the column 'question' is missing or empty")
        return question

    def filled(place: re.Match[str]) -> str:
        if values.get(place[1]) in (None, ""):
            raise ValueError(f"the question asks for the column '{place[1]}', which is missing or empty")
        return str(values[place[1]])

    return PLACEHOLDER.sub(filled, template)


# --- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSource:
    """One question about every image and video of a folder, by name. The names are held in memory."""

    path: Path
    question: str
    recursive: bool = False

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for media in self._media:
            digest.update(media.path.encode("utf-8", "surrogateescape") + b"\0")
        return {"path": str(self.path.resolve()), "names": digest.hexdigest()}

    def chunks(self, size: int | None = None) -> Iterator[Chunk]:
        count, size = len(self._media), size or ROWS_PER_CHUNK
        for first in range(0, count, size):
            yield Chunk(first, first, min(size, count - first))

    def read(self, chunk: Chunk) -> Iterator[Row]:
        chosen = self._media[chunk.place : chunk.place + chunk.count]
        for number, media in enumerate(chosen, start=chunk.first):
            images, videos = ([], [media.path]) if media.is_video else ([media.path], [])
            yield Row(number, self.question, images, videos)

    @cached_property
    def _media(self) -> list[MediaFile]:
        """Listed once: files that appear later would move the numbers of the others."""
        return list(media_in_folder(self.path, self.recursive))
