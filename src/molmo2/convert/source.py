"""A native checkpoint, opened and checked: settings, tensors, and what each of them becomes."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from molmo2.convert.names import Rename, match
from molmo2.convert.native_config import NativeConfig, parse_config
from molmo2.convert.reader import CheckpointLocation, SourceTensor, find_checkpoint, read_config, read_tensors


@dataclass(frozen=True)
class NativeSource:
    """A checkpoint as its descriptions describe it, before any weight is read.

    Attributes:
        raw_config: The `model` section of `config.yaml`, as it was.
        tensors: Those that are needed, by native name.
        renames: All tensors of the converted model, in module order.
    """

    location: CheckpointLocation
    raw_config: dict[str, Any]
    config: NativeConfig
    tensors: dict[str, SourceTensor]
    renames: list[Rename]
    is_from_parts: ClassVar[bool] = False

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the converted model."""
        return sum(math.prod(rename.shape) for rename in self.renames)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of weights that a conversion reads (a tied embedding twice)."""
        return sum(self.tensors[rename.native].num_bytes for rename in self.renames)

    @property
    def files(self) -> set[Path]:
        """Files that hold the weights."""
        return {piece.path for tensor in self.tensors.values() for piece in tensor.pieces}

    @property
    def num_pieces(self) -> int:
        return sum(len(tensor.pieces) for tensor in self.tensors.values())

    @property
    def dtypes(self) -> set[str]:
        return {tensor.dtype for tensor in self.tensors.values()}

    @property
    def name(self) -> str:
        """Name of the directory and step, without the path to them."""
        folder = self.location.folder.resolve()
        return folder.name if self.location.step is None else f"{folder.parent.name}/{folder.name}"

    @property
    def description(self) -> str:
        """Where it is and in which form, for the plan."""
        form = f"sharded, {self.num_pieces} pieces" if self.location.is_sharded else "one file"
        return f"{self.location.folder} ({form}, {' and '.join(sorted(self.dtypes))})"

    @property
    def origin(self) -> str:
        """What the model card says of it."""
        return "Converted from a native training checkpoint"


def open_source(
    checkpoint: str | Path, *, max_positions: int | None = None, ignored_fields: tuple[str, ...] = ()
) -> NativeSource:
    """Find and check a checkpoint; only descriptions are read, no weights.

    Args:
        max_positions: Maximum sequence length in tokens, instead of the checkpoint's.
        ignored_fields: Unknown fields of `config.yaml` to accept, as dotted paths.
    Raises:
        CheckpointError: If it is missing, incomplete, damaged or unsafe.
        UnsupportedError: If Molmo2 cannot express it.
    """
    location = find_checkpoint(checkpoint)
    raw_config = read_config(location)
    config = parse_config(raw_config, max_positions=max_positions, ignored_fields=ignored_fields)
    tensors = read_tensors(location)
    renames = match({name: tensor.shape for name, tensor in tensors.items()}, config)
    needed = {rename.native for rename in renames}
    kept = {name: tensor for name, tensor in tensors.items() if name in needed}
    return NativeSource(location, raw_config, config, kept, renames)
