"""The miniature in the native format, sharded, and its conversion to a folder that transformers loads."""

import pickle
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import StorageMeta

from molmo2.convert.conversion import ConversionOptions, convert_checkpoint
from molmo2.convert.to_native import write_native

from . import layout, tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"  # the trained one that comes with the repository


def write_sharded(
    folder: Path, section: dict[str, Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> Path:
    """Write `config.yaml`, `model_and_optim/` and the base tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": section}, sort_keys=False), encoding="utf-8")
    tokenizer.write(folder / "base_tokenizer")
    state = {f"model.{name}": tensor.detach().to(dtype).clone() for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about running without a process group, which is meant
        writer = FileSystemWriter(str(folder / "model_and_optim"), single_file_per_rank=True, overwrite=True)
        save(state, storage_writer=writer, no_dist=True)
    _without_local_path(folder / "model_and_optim" / ".metadata")
    return folder


def _without_local_path(path: Path) -> None:
    """Remove the path of the local folder from the metadata."""
    metadata = pickle.loads(path.read_bytes())
    metadata.storage_meta = StorageMeta(checkpoint_id="model_and_optim", save_id="0")
    path.write_bytes(pickle.dumps(metadata, protocol=4))


def to_transformers(checkpoint: Path, folder: Path, dtype: str = "float32") -> Path:
    """Convert a native miniature; `folder` is replaced."""
    options = ConversionOptions(tokenizer=str(checkpoint / "base_tokenizer"), dtype=dtype)
    convert_checkpoint(checkpoint, folder, options, overwrite=True)
    return folder


def write_fresh(folder: Path, seed: int = 0) -> Path:
    """A converted miniature with untrained weights."""
    section = layout.native_section()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = write_sharded(Path(scratch) / "native", section, layout.fresh_tensors(section, seed))
        return to_transformers(checkpoint, folder)


def from_transformers(folder: Path, checkpoint: Path) -> Path:
    """The sharded bfloat16 checkpoint of a converted folder, as in the repository."""
    with tempfile.TemporaryDirectory() as scratch:
        section = write_native(folder, Path(scratch) / "native", tokenizer="base_tokenizer")
        tensors = torch.load(Path(scratch) / "native" / "model.pt", weights_only=True)
    return write_sharded(checkpoint, section, tensors, torch.bfloat16)
