"""Layout of the safetensors files: shards, headers and index, planned before any weight is read."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from molmo2.convert.names import Rename

SAFETENSORS_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
HEADER_ALIGNMENT = 8
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
GIGABYTE = 10**9  # shard sizes are decimal, as in the published index


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        header: The bytes before the first tensor.
        num_bytes: Size of the whole file.
    """

    file_name: str
    tensors: tuple[Rename, ...]
    header: bytes
    num_bytes: int


def tensor_bytes(rename: Rename, dtype: str) -> int:
    """Bytes of a converted tensor."""
    return math.prod(rename.shape) * SAFETENSORS_DTYPES[dtype][1]


def plan_shards(renames: Sequence[Rename], dtype: str, max_shard_bytes: int) -> list[Shard]:
    """Fill shards greedily, in module order; a tensor larger than the limit gets a shard of its own.

    With 5e9 bytes this reproduces the published indices.
    """
    groups: list[list[Rename]] = [[]]
    filled = 0
    for rename in renames:
        size = tensor_bytes(rename, dtype)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(rename)
        filled += size
    names = [SINGLE_FILE]
    if len(groups) > 1:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [_shard(name, tuple(group), dtype) for name, group in zip(names, groups, strict=True)]


def _shard(file_name: str, tensors: tuple[Rename, ...], dtype: str) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for rename in tensors:
        end = position + tensor_bytes(rename, dtype)
        kind = SAFETENSORS_DTYPES[dtype][0]
        entries[rename.target] = {"dtype": kind, "shape": list(rename.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file_name, tensors, header, len(header) + position)


def index_content(shards: Sequence[Shard], dtype: str) -> dict[str, Any]:
    """`model.safetensors.index.json`."""
    tensors = [rename for shard in shards for rename in shard.tensors]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(rename.shape) for rename in tensors),
            "total_size": sum(tensor_bytes(rename, dtype) for rename in tensors),
        },
        "weight_map": {rename.target: shard.file_name for shard in shards for rename in shard.tensors},
    }
