"""Molmo2 in FiftyOne's zoo of models.

    foz.register_zoo_model_source("https://...")
    model = foz.load_zoo_model("allenai/Molmo2-4B", operation="pointing", prompt="boat")

or without the zoo, from a model and a processor that are already there:
`Molmo2FiftyOneModel(model, processor, settings)`.
"""

import shutil
from pathlib import Path
from typing import Any

from .model import (
    MEDIA_TYPES,
    OPERATIONS,
    POOLINGS,
    Molmo2FiftyOneModel,
    Molmo2Settings,
    apply_in_batches,
    embed_in_batches,
)

__all__ = [
    "Molmo2FiftyOneModel",
    "Molmo2Settings",
    "apply_in_batches",
    "embed_in_batches",
    "download_model",
    "load_model",
    "resolve_input",
]


def download_model(model_name: str, model_path: str) -> None:
    """Download a checkpoint and put this project's remote code into its folder.

    Args:
        model_name: Its repository on the Hub.
        model_path: The folder to write.
    Raises:
        ImportError: The package `molmo2-transformers`, which brings the remote code, is not installed.
    """
    try:
        from convert.conversion import remote_code_files
    except ImportError as error:
        raise ImportError(
            "The remote code comes from the package molmo2-transformers, which is not installed. Install it "
            "(`pip install .[fiftyone]` in its repository), or convert a checkpoint with it and pass `checkpoint=`."
        ) from error
    from huggingface_hub import snapshot_download

    snapshot_download(model_name, local_dir=model_path)
    for file in remote_code_files():
        shutil.copy(file, Path(model_path) / file.name)


def load_model(
    model_name: str,
    model_path: str,
    *,
    checkpoint: str | None = None,
    load_options: dict[str, Any] | None = None,
    **settings: Any,
) -> Molmo2FiftyOneModel:
    """Load a checkpoint folder with its remote code.

    Args:
        model_path: The folder that `download_model` wrote.
        checkpoint: Another folder to take instead.
        load_options: Of the model's `from_pretrained`: dtype ("auto" unless given), device_map, ...
        settings: Fields of `Molmo2Settings`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = checkpoint or model_path
    config = Molmo2Settings(**settings)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    options = {"dtype": "auto", **(load_options or {})}
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)
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
    inputs.int("max_new_tokens", default=512, required=True, label="Most tokens of an answer")
    return types.Property(inputs)
