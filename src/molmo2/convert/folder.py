"""Tensors of a converted folder, located like those of a native checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

from molmo2.convert.errors import CheckpointError
from molmo2.convert.reader import Piece, SourceTensor
from molmo2.convert.shards import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE

LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own readers
DTYPES = {kind: (dtype, size) for dtype, (kind, size) in SAFETENSORS_DTYPES.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a converted folder.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path} is missing; expected a converted folder.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected an object.")
    return content


def read_folder(folder: Path) -> dict[str, SourceTensor]:
    """All tensors of a folder by their converted names.

    Raises:
        CheckpointError: If files are missing or damaged, or if the index disagrees with them.
    """
    if not (folder / INDEX_FILE).is_file():
        return _read_file(folder / SINGLE_FILE)
    places = read_json(folder / INDEX_FILE).get("weight_map", {})
    names = sorted(set(places.values()))
    if any("/" in name or "\\" in name or name in ("", ".", "..") for name in names):
        raise CheckpointError(f"{folder / INDEX_FILE} names files outside its folder: {names}.")
    by_file = {name: _read_file(folder / name) for name in names}
    found = {tensor: name for name, tensors in by_file.items() for tensor in tensors}
    if found != places:
        wrong = sorted(name for name in {**places, **found} if places.get(name) != found.get(name))
        raise CheckpointError(f"{folder / INDEX_FILE} and the files disagree about {wrong[:10]}.")
    return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}


def _read_file(path: Path) -> dict[str, SourceTensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > min(LARGEST_HEADER, size):
            raise CheckpointError(f"{path} is not a readable safetensors file, or is truncated.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error}).") from None
    end = max((t.pieces[0].start + t.pieces[0].num_bytes for t in tensors.values()), default=8 + length)
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes; its header describes {end}.")
    return tensors


def _tensor(path: Path, name: str, entry: dict[str, Any], base: int) -> SourceTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype, item = DTYPES.get(entry["dtype"], (entry["dtype"], None))
    if item is None:
        raise ValueError(f"'{name}' is {dtype}; expected one of {', '.join(DTYPES)}")
    if end - begin != math.prod(shape) * item:
        raise ValueError(f"'{name}' of shape {shape} has {end - begin} bytes")
    return SourceTensor(name, shape, dtype, (Piece(path, base + begin, end - begin, None),))
