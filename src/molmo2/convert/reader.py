"""Reader of native checkpoints: finds one on disk and locates the bytes of each tensor, without reading weights.

location = find_checkpoint("runs/molmo2")       # a checkpoint, or a save folder with step<N> children
tensors = read_tensors(location)                # native name -> SourceTensor
for block in stream_piece(tensors["transformer.ln_f.weight"].pieces[0], "transformer.ln_f.weight", buffer): ...
"""

import itertools
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2.convert.errors import CheckpointError, listing, shown
from molmo2.convert.small_files import read_bytes, read_model_section
from molmo2.convert.torch_archive import TorchArchive
from molmo2.convert.unpickling import (
    MAX_PICKLE_BYTES,
    METADATA_GLOBALS,
    BytesEntry,
    ChunkEntry,
    IndexEntry,
    Metadata,
    PropertiesEntry,
    StorageEntry,
    TensorEntry,
    load_pickle,
)

CONFIG_FILE, UNSHARDED_FILE, SHARDED_FOLDER, METADATA_FILE = "config.yaml", "model.pt", "model_and_optim", ".metadata"
STEP_FOLDER = re.compile(r"step(\d+)(-unsharded)?")
MODEL_PREFIX = "model."
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,300}")
MODEL_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class CheckpointLocation:
    """One checkpoint directory.

    Attributes:
        step: Training step; None if the directory's name does not contain it.
        is_sharded: Whether the weights are in `model_and_optim` (else in `model.pt`).
    """

    folder: Path
    step: int | None
    is_sharded: bool


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a tensor: bytes [start, start + num_bytes) of a file.

    Attributes:
        crc32: Checksum of these bytes; None where the file has none for them.
    """

    path: Path
    start: int
    num_bytes: int
    crc32: int | None


@dataclass(frozen=True)
class SourceTensor:
    """A native tensor and the pieces that, one after the other, make it up exactly."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


def _is_checkpoint(folder: Path) -> bool:
    sharded = folder / SHARDED_FOLDER
    return (folder / UNSHARDED_FILE).is_file() or (sharded.is_dir() and any(sharded.iterdir()))


def _located(folder: Path) -> CheckpointLocation:
    match = STEP_FOLDER.fullmatch(folder.resolve().name)
    step = None if match is None else int(match.group(1))
    return CheckpointLocation(folder, step, is_sharded=not (folder / UNSHARDED_FILE).is_file())


def find_checkpoint(path: str | Path) -> CheckpointLocation:
    """Choose the checkpoint directory.

    A directory with `model.pt` or a filled `model_and_optim` is one itself. Otherwise the child `step<N>` or
    `step<N>-unsharded` with the highest number is taken, the sharded one at equal number. `step<N>-tmp`, which an
    interrupted save leaves, does not count.

    Raises:
        CheckpointError: If there is none, with what was found instead.
    """
    folder = Path(path)
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {kind}; expected the directory of a checkpoint or a save folder.")
    if _is_checkpoint(folder):
        return _located(folder)
    steps = []
    for child in folder.iterdir():
        match = STEP_FOLDER.fullmatch(child.name)
        if match is not None and child.is_dir():
            steps.append((int(match.group(1)), match.group(2) is None, child))
    if not steps:
        found = ", ".join(shown(name)[1:-1] for name in sorted(child.name for child in folder.iterdir())[:10])
        raise CheckpointError(
            f"{folder} is not a checkpoint: expected `{UNSHARDED_FILE}`, a filled `{SHARDED_FOLDER}` or children "
            f"`step<N>`; found {found if found else 'an empty directory'}."
        )
    chosen = max(steps)[2]
    if not _is_checkpoint(chosen):
        raise CheckpointError(
            f"{chosen} is the latest step but has neither `{UNSHARDED_FILE}` nor a filled `{SHARDED_FOLDER}`. "
            "Name the step directory to convert."
        )
    return _located(chosen)


def read_config(location: CheckpointLocation) -> dict[str, Any]:
    """The section `model` of `config.yaml`, as plain data.

    Raises:
        CheckpointError: If the file is absent, is no YAML, or has no such section.
    """
    path = location.folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the trainer writes it beside the weights. Copy it there.")
    return read_model_section(path)


def read_tensors(location: CheckpointLocation) -> dict[str, SourceTensor]:
    """Locate every tensor of the model. Optimizer state is neither listed nor opened.

    Raises:
        CheckpointError: If a file is missing, damaged, asks for code, or if pieces do not cover their tensor exactly.
    """
    tensors = _read_sharded(location) if location.is_sharded else _read_unsharded(location.folder / UNSHARDED_FILE)
    wrong = [f"'{t.name}' is {t.dtype}" for t in tensors.values() if t.dtype not in MODEL_DTYPES]
    if wrong:
        raise CheckpointError(f"Expected float32 or bfloat16 weights, but found:\n{listing(wrong)}")
    return tensors


def _read_unsharded(path: Path) -> dict[str, SourceTensor]:
    archive = TorchArchive(path)
    content, storages = archive.read()
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors by name.")
    tensors = {}
    for name, value in content.items():
        _ensure_name(name, path)
        stored = archive.tensor(value, storages, name)
        piece = Piece(path, stored.start, stored.num_bytes, stored.crc32)
        tensors[name] = SourceTensor(name, stored.shape, stored.dtype, (piece,))
    return tensors


def _ensure_name(name: Any, path: Path) -> None:
    """Names are printed and compared; those of parameters are short paths with dots."""
    if not isinstance(name, str) or TENSOR_NAME.fullmatch(name) is None:
        raise CheckpointError(f"{path} names a tensor {shown(name)}; expected letters, digits, dots, `_` and `-`.")


@dataclass(frozen=True)
class _Chunk:
    """Rows [first_row, first_row + shape[0]) of a tensor, as the metadata announces them."""

    first_row: int
    shape: tuple[int, ...]
    file_name: str
    start: int
    length: int


def _read_sharded(location: CheckpointLocation) -> dict[str, SourceTensor]:
    folder = location.folder / SHARDED_FOLDER
    path = folder / METADATA_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing (a hidden file, easily lost in copying). Without it the pieces cannot be put together."
        )
    metadata = load_pickle(read_bytes(path, MAX_PICKLE_BYTES), str(path), METADATA_GLOBALS)
    entries = metadata.field("state_dict_metadata") if isinstance(metadata, Metadata) else None
    places = metadata.field("storage_data") if isinstance(metadata, Metadata) else None
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise CheckpointError(f"{path} does not hold the metadata of a sharded checkpoint. Copy the checkpoint again.")
    problems: list[str] = []
    stored = _places_by_tensor(places, path, problems)
    tensors = {}
    for full_name, entry in entries.items():
        if not isinstance(full_name, str) or not full_name.startswith(MODEL_PREFIX) or isinstance(entry, BytesEntry):
            continue
        _ensure_name(full_name, path)
        name = full_name[len(MODEL_PREFIX) :]
        try:
            size, dtype, chunks = _announced(entry, stored.get(full_name, {}))
            tensors[name] = _assemble(folder, name, size, dtype, chunks)
        except _Problem as problem:
            problems.append(f"'{name}': {problem}")
    if problems:
        raise CheckpointError(f"The pieces in {folder} do not make up the tensors:\n{listing(problems)}")
    return tensors


class _Problem(Exception):
    """Something wrong with one tensor; collected, so that all are reported together."""


def _int_tuple(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(item) is int and item >= 0 for item in value):
        raise _Problem(f"{shown(value)} is not a shape")
    return tuple(value)


def _places_by_tensor(
    places: dict[Any, Any], path: Path, problems: list[str]
) -> dict[str, dict[tuple[int, ...], tuple]]:
    """Full name -> chunk offsets -> (file, byte offset, byte length), for the tensors of the model."""
    stored: dict[str, dict[tuple[int, ...], tuple]] = {}
    for index, info in places.items():
        name = index.field("fqn") if isinstance(index, IndexEntry) else None
        if not isinstance(name, str) or not name.startswith(MODEL_PREFIX):
            continue
        _ensure_name(name, path)
        offset, info = index.field("offset"), info if isinstance(info, StorageEntry) else StorageEntry()
        place = (info.field("relative_path"), info.field("offset"), info.field("length"))
        is_plain = isinstance(place[0], str) and all(type(number) is int and number >= 0 for number in place[1:])
        if not is_plain or info.field("transform_descriptors"):
            problems.append(
                f"'{name[len(MODEL_PREFIX) :]}': its place {shown(place)} cannot be read (compressed or damaged)"
            )
            continue
        if not isinstance(offset, tuple):
            continue
        if not all(type(number) is int for number in offset):  # what is in it is hashed
            problems.append(f"'{name[len(MODEL_PREFIX) :]}': a piece begins at {shown(offset)}; expected numbers")
            continue
        by_offset = stored.setdefault(name, {})
        if tuple(offset) in by_offset:
            problems.append(f"'{name[len(MODEL_PREFIX) :]}': two pieces begin at row {offset[0] if offset else 0}")
        by_offset[tuple(offset)] = place
    _ensure_disjoint(stored, problems)
    return stored


def _ensure_disjoint(stored: dict[str, dict[tuple[int, ...], tuple]], problems: list[str]) -> None:
    """Report pieces that claim the same bytes of a file."""
    claims = sorted((place, name) for name, places in stored.items() for place in places.values())
    for ((file, start, length), name), ((next_file, next_start, _), next_name) in itertools.pairwise(claims):
        if file == next_file and next_start < start + length:
            problems.append(
                f"'{next_name[len(MODEL_PREFIX) :]}': its piece at byte {next_start} of {file} overlaps one of "
                f"'{name[len(MODEL_PREFIX) :]}'"
            )


def _announced(entry: Any, places: dict[tuple[int, ...], tuple]) -> tuple[tuple[int, ...], str, list[_Chunk]]:
    """Shape, dtype and chunks with rows, in row order."""
    if not isinstance(entry, TensorEntry):
        raise _Problem(f"described by a {type(entry).__name__}; expected a tensor")
    size = _int_tuple(entry.field("size"))
    properties = entry.field("properties")
    dtype = properties.dtype if isinstance(properties, PropertiesEntry) else None
    if dtype not in MODEL_DTYPES:
        raise _Problem(f"of dtype {dtype if isinstance(dtype, str) else shown(dtype)}; expected float32 or bfloat16")
    chunks, places, empty = [], dict(places), set()
    listed = entry.field("chunks")
    if not isinstance(listed, list) or not all(isinstance(chunk, ChunkEntry) for chunk in listed):
        raise _Problem("without a list of its pieces")
    for chunk in listed:
        offsets, sizes = _int_tuple(chunk.field("offsets")), _int_tuple(chunk.field("sizes"))
        if len(offsets) != len(size) or len(sizes) != len(size) or any(offsets[1:]) or sizes[1:] != size[1:]:
            raise _Problem(
                f"a piece of {sizes} at {offsets} in {size}; only pieces cut along dimension 0 are supported"
            )
        if 0 in sizes:
            empty.add(offsets)  # a rank that holds nothing, maybe at the row where the next one begins
            continue
        if offsets not in places:
            raise _Problem(f"the piece at row {offsets[0] if offsets else 0} is in no file")
        chunks.append(_Chunk(offsets[0] if offsets else 0, sizes, *places.pop(offsets)))
    places = {offsets: place for offsets, place in places.items() if offsets not in empty}
    if places:
        raise _Problem(f"files hold pieces at {shown(sorted(places))} that the metadata does not announce")
    return size, dtype, sorted(chunks, key=lambda chunk: chunk.first_row)


def _assemble(folder: Path, name: str, size: tuple[int, ...], dtype: str, chunks: list[_Chunk]) -> SourceTensor:
    """Open the envelope of every piece and check that the pieces cover the tensor exactly."""
    next_row, pieces = 0, []
    for chunk in chunks:
        if chunk.first_row != next_row:
            kind = "missing" if chunk.first_row > next_row else "covered twice: pieces overlap"
            raise _Problem(f"rows {min(next_row, chunk.first_row)} to {max(next_row, chunk.first_row)} are {kind}")
        next_row += chunk.shape[0] if chunk.shape else 1
        path = _piece_file(folder, chunk.file_name)
        archive = TorchArchive(path, chunk.start, chunk.length)
        stored = archive.tensor(*archive.read(), name)
        if stored.shape != chunk.shape or stored.dtype != dtype:
            raise _Problem(
                f"{archive.label} holds {stored.dtype} {stored.shape}; the metadata announces {dtype} {chunk.shape}"
            )
        pieces.append(Piece(path, stored.start, stored.num_bytes, stored.crc32))
    if size and next_row != size[0]:
        raise _Problem(
            f"rows {next_row} to {size[0]} are missing" if next_row < size[0] else "more rows than announced"
        )
    return SourceTensor(name, size, dtype, tuple(pieces))


def _piece_file(folder: Path, file_name: str) -> Path:
    if file_name in ("", ".", "..") or any(character in file_name for character in "/\\\0:"):
        raise CheckpointError(
            f"{folder / METADATA_FILE} names the file {shown(file_name)}; pieces lie in {folder} itself, under plain "
            "names. This looks like an attempt to read other files: do not use the checkpoint."
        )
    path = folder / file_name
    if not path.is_file():
        raise _Problem(f"{path} is missing; copy it there")
    return path


def stream_piece(piece: Piece, name: str, buffer: memoryview) -> Iterator[memoryview]:
    """Yield the bytes of a piece in order, each time a filled part of `buffer`, which the next step overwrites.

    Args:
        name: Of the tensor, for messages.
        buffer: Writable, a multiple of 4 bytes long.
    Raises:
        CheckpointError: If the file ends early, or if the bytes do not match their checksum.
    """
    crc, position = 0, 0
    with open(piece.path, "rb", buffering=0) as file:
        file.seek(piece.start)
        while position < piece.num_bytes:
            block = buffer[: min(len(buffer), piece.num_bytes - position)]
            _fill(file, block, piece.path)
            if piece.crc32 is not None:
                crc = zlib.crc32(block, crc)
            position += len(block)
            yield block
    if piece.crc32 is not None and crc != piece.crc32:
        raise CheckpointError(
            f"{piece.path} is damaged: bytes {piece.start} to {piece.start + piece.num_bytes}, a piece of "
            f"'{name}', have checksum {crc:08x}; {piece.crc32:08x} was stored. Copy the checkpoint again."
        )


def _fill(file: Any, block: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(block):
        number = file.readinto(block[filled:])
        if not number:
            raise CheckpointError(f"{path} ended early while it was read; was it changed meanwhile?")
        filled += number
