"""Streaming writer of `torch.save` files: a dictionary of tensors, one after the other."""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from molmo2.convert.numerics import BlockConverter, count_non_finite, non_finite_note
from molmo2.convert.reader import SourceTensor
from molmo2.convert.torch_archive import ITEM_BYTES, LOCAL_HEADER_BYTES

ROOT = "model"
ALIGNMENT = 64  # bytes, so that the file can be mapped into memory
ZIP64_EXTRA_BYTES = 20
PADDING_ID = b"FB"
STORAGE_CLASSES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage"}
TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the same tensors give the same file


class _Tensor:
    """Stand-in for a tensor of which only the description is pickled."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: str):
        self.key, self.shape, self.dtype = key, shape, dtype


class _Storage:
    def __init__(self, tensor: _Tensor):
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Writes what torch's own would: tensors as calls of its rebuild function, storages by reference."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Tensor):
            return NotImplemented
        import torch

        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
        hooks: OrderedDict = OrderedDict()
        arguments = (_Storage(value), 0, tuple(value.shape), tuple(strides), False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        import torch

        kind = getattr(torch, STORAGE_CLASSES[value.tensor.dtype])
        return "storage", kind, value.tensor.key, "cpu", math.prod(value.tensor.shape)


def stored_bytes(tensor: SourceTensor, dtype: str | None) -> int:
    """Bytes of a tensor in another dtype; None means its own."""
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype if dtype is None else dtype]


def _description(tensors: Mapping[str, SourceTensor], dtype: str | None) -> bytes:
    content = {
        name: _Tensor(str(number), tensor.shape, tensor.dtype if dtype is None else dtype)
        for number, (name, tensor) in enumerate(tensors.items())
    }
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()


def write_torch_file(
    path: Path, tensors: Mapping[str, SourceTensor], dtype: str | None, on_progress: Callable[[int], object]
) -> list[str]:
    """Write `tensors` under their keys; `torch.load` reads the file, with `weights_only=True` and `mmap=True` too.

    Args:
        dtype: Of the stored tensors; None keeps each one's own.
        on_progress: Called with the number of bytes after each write.
    Returns:
        A note about each tensor with values that are NaN or infinite.
    """
    notes = []
    small = {"data.pkl": _description(tensors, dtype), "byteorder": b"little", "version": b"3\n"}
    with open(path, "xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in small.items():
            archive.writestr(zipfile.ZipInfo(f"{ROOT}/{name}", TIMESTAMP), content)
        for number, (name, tensor) in enumerate(tensors.items()):
            entry = zipfile.ZipInfo(f"{ROOT}/data/{number}", TIMESTAMP)
            entry.file_size = stored_bytes(tensor, dtype)
            is_large = entry.file_size * 1.05 > zipfile.ZIP64_LIMIT
            _align(entry, file.tell(), ZIP64_EXTRA_BYTES if is_large else 0)
            converter, non_finite = BlockConverter(tensor.dtype if dtype is None else dtype), 0
            with archive.open(entry, "w", force_zip64=is_large) as target:
                for block in converter.stream(tensor):
                    target.write(block)
                    non_finite += count_non_finite(block, converter.dtype)
                    on_progress(len(block))
            notes += [non_finite_note(name, non_finite)] if non_finite else []
    return notes


def _align(entry: zipfile.ZipInfo, position: int, other_extra_bytes: int) -> None:
    """Lengthen the header of an entry so that its data begin at a multiple of `ALIGNMENT`."""
    fixed = position + LOCAL_HEADER_BYTES + len(entry.filename.encode()) + other_extra_bytes + 4
    padding = -fixed % ALIGNMENT
    entry.extra = struct.pack("<2sH", PADDING_ID, padding) + bytes(padding)
