"""Comparison of a converted folder on disk with its source, tensor by tensor."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from molmo2.convert.errors import VerificationError, listing
from molmo2.convert.folder import read_folder
from molmo2.convert.numerics import BlockConverter
from molmo2.convert.reader import SourceTensor
from molmo2.convert.source import NativeSource


@dataclass(frozen=True)
class VerifiedFolder:
    """Summary of a folder that equals its source."""

    num_tensors: int
    num_bytes: int
    dtype: str


def _digest(
    tensor: SourceTensor, converter: BlockConverter, on_progress: Callable[[int], object] | None = None
) -> str:
    digest = hashlib.sha256()
    for block in converter.stream(tensor):
        digest.update(block)
        if on_progress is not None:
            on_progress(len(block))
    return digest.hexdigest()


def verify_folder(
    source: NativeSource, folder: Path, on_progress: Callable[[int], object] | None = None
) -> VerifiedFolder:
    """Check names, dtypes, shapes and SHA-256 of every tensor on disk against the source.

    Args:
        source: The checkpoint; it is read again.
        folder: The converted folder, in float32 or bfloat16.
        on_progress: Called with the number of bytes compared.
    Raises:
        VerificationError: Naming every tensor that differs.
        CheckpointError: If the folder or the source cannot be read.
    """
    found = read_folder(folder)
    expected = {rename.target: rename for rename in source.renames}
    problems = [f"'{name}' is missing" for name in expected if name not in found]
    problems += [f"'{name}' does not belong to the model" for name in found if name not in expected]
    dtypes = sorted({tensor.dtype for tensor in found.values()})
    if len(dtypes) > 1:
        problems.append(f"tensors have different dtypes: {', '.join(dtypes)}")
    for name, tensor in found.items():
        if name in expected and tensor.shape != expected[name].shape:
            problems.append(f"'{name}' has shape {tensor.shape}; expected {expected[name].shape}")
    if problems:
        raise VerificationError(f"{folder} differs from {source.name}:\n{listing(problems)}")
    converter = BlockConverter(dtypes[0])
    for name, rename in expected.items():
        have = _digest(found[name], converter)
        want = _digest(source.tensors[rename.native], converter, on_progress)
        if have != want:
            problems.append(f"'{name}' has SHA-256 {have[:16]}..., its source {want[:16]}...")
    if problems:
        raise VerificationError(f"{folder} differs from {source.name}:\n{listing(problems)}")
    return VerifiedFolder(len(found), sum(tensor.num_bytes for tensor in found.values()), dtypes[0])
