"""Molmo2 in FiftyOne's zoo of models: the package `molmo2_fiftyone`, in the layout of a zoo source.

    molmo2_fiftyone.register()
    model = foz.load_zoo_model("allenai/Molmo2-4B", operation="pointing", prompt="boat")

or without the zoo, from a model and a processor that are already there:
`Molmo2FiftyOneModel(model, processor, settings)`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from . import labels
from .model import (
    MEDIA_TYPES,
    OPERATIONS,
    POOLINGS,
    Molmo2FiftyOneModel,
    Molmo2Settings,
)
from .reader import VideoPart

__all__ = [
    "Molmo2FiftyOneModel",
    "Molmo2Settings",
    "VideoPart",
    "download_model",
    "labels",
    "load_model",
    "register",
    "resolve_input",
]


def register() -> Path:
    """Put this package into the folder of FiftyOne's zoo, in place of an earlier version of it; no network is needed.

    Returns:
        Its place there. Checkpoints are downloaded into folders beside the files of the package.
    """
    import fiftyone as fo

    here = Path(__file__).parent
    name = json.loads((here / "manifest.json").read_text(encoding="utf-8"))["name"]
    there = Path(fo.config.model_zoo_dir) / name
    there.mkdir(parents=True, exist_ok=True)
    for file in [*here.glob("*.py"), here / "manifest.json"]:
        shutil.copy(file, there / file.name)
    return there


def download_model(model_name: str, model_path: str) -> None:
    """Download a checkpoint and put this project's remote code into its folder, unless it is there already.

    FiftyOne looks for a file at `model_path`, so it calls this for a folder each time that a model is loaded.

    Args:
        model_name: Its repository on the Hub.
        model_path: The folder to write.
    Raises:
        ImportError: The package `molmo2-transformers`, which brings the remote code, is not installed.
    """
    folder = Path(model_path)
    if _is_complete(folder):
        return
    try:
        from molmo2.convert.conversion import remote_code_files
    except ImportError as error:
        raise ImportError(
            "The remote code comes from the package molmo2-transformers, which is not installed. Install it "
            f"(`pip install .[fiftyone]` in its repository), or put a checkpoint that has it into {folder}."
        ) from error
    from huggingface_hub import snapshot_download

    snapshot_download(model_name, local_dir=model_path)
    for file in remote_code_files():
        shutil.copy(file, folder / file.name)


def _is_complete(folder: Path) -> bool:
    """It has a configuration, this project's code and all files of weights."""
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.is_file():
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / name).is_file() for name in {"config.json", "grounding_molmo2.py", *weights})


def load_model(
    model_name: str, model_path: str, *, load_options: dict[str, Any] | None = None, **settings: Any
) -> Molmo2FiftyOneModel:
    """Load a checkpoint folder with its remote code.

    Args:
        model_path: The folder that `download_model` wrote, or any other with this project's remote code.
        load_options: Of the model's `from_pretrained`: dtype ("auto" unless given), device_map, ...
        settings: Fields of `Molmo2Settings`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = Molmo2Settings(**settings)
    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
    options = {"dtype": "auto", **(load_options or {})}
    model = AutoModelForImageTextToText.from_pretrained(model_path, trust_remote_code=True, **options)
    return Molmo2FiftyOneModel(model.eval(), processor, config)


def resolve_input(model_name: str, ctx: Any) -> Any:
    """The form in which the App asks for the settings."""
    from fiftyone.operators import types

    inputs = types.Object()
    inputs.enum("operation", OPERATIONS, default="describe", required=True, label="Operation")
    inputs.enum("media_type", MEDIA_TYPES, default="video", required=True, label="Media type")
    inputs.str("prompt", required=False, label="Prompt", description="What to look for, or the whole question")
    inputs.str("prompt_field", required=False, label="Prompt field", description="Field with each sample's prompt")
    inputs.enum("pooling", POOLINGS, default="vision", required=True, label="Pooling of embeddings")
    inputs.int("max_new_tokens", default=2048, required=True, label="Most tokens of an answer")
    return types.Property(inputs)
