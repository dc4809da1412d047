"""Tensors of a converted folder, located like those of a native checkpoint."""

import math
from pathlib import Path
from typing import Any

from molmo2.convert.errors import CheckpointError, UnsupportedError, shown
from molmo2.convert.reader import Piece, SourceTensor
from molmo2.convert.shards import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE
from molmo2.convert.small_files import MAX_JSON_BYTES, parse_json, read_json

DTYPES = {kind: (dtype, size) for dtype, (kind, size) in SAFETENSORS_DTYPES.items()}
# Buffers 0, 1, 2, ... that older releases of transformers stored beside the weights of vision towers, as int64.
BUFFER, BUFFER_DTYPE, BUFFER_ITEM = "position_ids", "I64", 8


def read_folder(folder: Path) -> dict[str, SourceTensor]:
    """All tensors of a folder by their converted names, but for stored `position_ids`.

    Raises:
        CheckpointError: If files are missing or damaged, or if the index disagrees with them.
    """
    return {name: tensor for name, tensor in _read_files(folder).items() if tensor.dtype != BUFFER_DTYPE}


def _read_files(folder: Path) -> dict[str, SourceTensor]:
    if not (folder / INDEX_FILE).is_file():
        return _read_file(folder / SINGLE_FILE)
    places = read_json(folder / INDEX_FILE).get("weight_map", {})
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} has {shown(places)} as weight_map; expected names of files.")
    names = sorted(set(places.values()))
    if any("/" in name or "\\" in name or name in ("", ".", "..") for name in names):
        raise CheckpointError(f"{folder / INDEX_FILE} names files outside its folder: {shown(names)}.")
    by_file = {name: _read_file(folder / name) for name in names}
    found = {tensor: name for name, tensors in by_file.items() for tensor in tensors}
    if found != places:
        wrong = sorted(name for name in {**places, **found} if places.get(name) != found.get(name))
        raise CheckpointError(f"{folder / INDEX_FILE} and the files disagree about {shown(wrong[:10], 500)}.")
    return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}


def _read_file(path: Path) -> dict[str, SourceTensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > min(MAX_JSON_BYTES, size - 8):
            raise CheckpointError(f"{path} is not a readable safetensors file, or is truncated.")
        header = parse_json(file.read(length), f"The header of {path}")
    header.pop("__metadata__", None)
    try:
        tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error}).") from None
    end = 8 + length
    for piece in sorted(
        (piece for tensor in tensors for piece in tensor.pieces), key=lambda p: (p.start, p.num_bytes)
    ):
        if piece.start != end:
            raise CheckpointError(f"{path} has a damaged header: a tensor begins at byte {piece.start}, not at {end}.")
        end += piece.num_bytes
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes; its header describes {end}.")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: dict[str, Any], base: int) -> SourceTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype, item = DTYPES.get(entry["dtype"], (entry["dtype"], None))
    if dtype == BUFFER_DTYPE and name.rpartition(".")[2] == BUFFER:
        item = BUFFER_ITEM
    if item is None:
        raise UnsupportedError(
            f"{path}: {shown(name)} is {shown(dtype)}; expected one of {', '.join(DTYPES)}. Save the model in "
            "bfloat16 or float32 first."
        )
    if not all(type(number) is int and 0 <= number < 2**63 for number in (begin, end, *shape)) or len(shape) > 16:
        raise ValueError(f"{shown(name)} has shape {shown(shape)} and offsets {shown((begin, end))}")
    if end - begin != math.prod(shape) * item:
        raise ValueError(f"{shown(name)} of shape {shape} has {end - begin} bytes")
    return SourceTensor(name, shape, dtype, (Piece(path, base + begin, end - begin, None),))
