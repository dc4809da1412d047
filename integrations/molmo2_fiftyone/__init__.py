"""Molmo2 in FiftyOne's zoo of models: the package `molmo2_fiftyone`, in the layout of a zoo source.

    molmo2_fiftyone.register()
    model = foz.load_zoo_model("allenai/Molmo2-4B", operation="pointing", prompt="boat")

or without the zoo, from a loaded model and its processor: `Molmo2FiftyOneModel(*molmo2.load(folder), operation=...)`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from molmo2 import load
from molmo2.grounding.files import replaced
from molmo2.tools.embedding import POOLINGS

from . import labels
from .model import MEDIA_TYPES, OPERATIONS, Molmo2FiftyOneModel
from .videos import VideoPart

__all__ = [
    "Molmo2FiftyOneModel",
    "VideoPart",
    "download_model",
    "labels",
    "load_model",
    "register",
    "resolve_input",
]


def register() -> Path:
    """Copy this package into the folder of FiftyOne's zoo, in place of an earlier version; no network is needed.

    Returns:
        Its folder there. Checkpoints are downloaded into folders beside the files of the package.
    """
    import fiftyone as fo

    package = Path(__file__).parent
    name = json.loads((package / "manifest.json").read_text(encoding="utf-8"))["name"]
    folder = Path(fo.config.model_zoo_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    files = [*package.glob("*.py"), package / "manifest.json"]
    for file in files:  # each is replaced at once: another process may load the package meanwhile
        with replaced(folder / file.name) as partial:
            shutil.copy(file, partial)
    for stale in {path.name for path in folder.glob("*.py")} - {file.name for file in files}:  # of an earlier version
        (folder / stale).unlink(missing_ok=True)
    return folder


def download_model(model_name: str, model_path: str) -> None:
    """Download a checkpoint, unless its folder is complete.

    FiftyOne looks for a file at `model_path`, which is a folder here, so it calls this each time a model is loaded.

    Args:
        model_name: Its repository on the Hub.
        model_path: The folder to write.
    """
    if not _is_complete(Path(model_path)):
        from huggingface_hub import snapshot_download

        snapshot_download(model_name, local_dir=model_path)


def _is_complete(folder: Path) -> bool:
    """Whether it has a configuration and all files of weights."""
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.is_file():
        weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / name).is_file() for name in {"config.json", *weights})


def load_model(
    model_name: str, model_path: str, *, load_options: dict[str, Any] | None = None, **settings: Any
) -> Molmo2FiftyOneModel:
    """Load a checkpoint folder with the installed package; no code in the folder is executed.

    Args:
        model_path: The folder that `download_model` wrote, or any other checkpoint folder for transformers.
        load_options: Options of `molmo2.load`: dtype, device_map, ...
        settings: Attributes of `Molmo2FiftyOneModel`: operation, prompt, ...
    """
    model, processor = load(model_path, **(load_options or {}))
    return Molmo2FiftyOneModel(model.eval(), processor, **settings)


def resolve_input(model_name: str, ctx: Any) -> Any:
    """The form in which FiftyOne's App asks for the settings."""
    from fiftyone.operators import types

    inputs = types.Object()
    inputs.enum("operation", OPERATIONS, default="describe", required=True, label="Operation")
    inputs.enum("media_type", MEDIA_TYPES, default="video", required=True, label="Media type")
    inputs.str("prompt", required=False, label="Prompt", description="Objects to look for, or the whole question")
    inputs.str("events", required=False, label="Events", description="What temporal_localization looks for")
    inputs.str("prompt_field", required=False, label="Prompt field", description="Field with each sample's prompt")
    inputs.enum("pooling_strategy", POOLINGS, default=POOLINGS[0], required=True, label="Pooling of embeddings")
    inputs.str("embedding_prompt", required=False, label="Question of embeddings", description="What they are about")
    inputs.int("max_new_tokens", default=2048, required=True, label="Maximum number of new tokens")
    return types.Property(inputs)
