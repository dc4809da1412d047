"""The model or the server of the app."""

import sys
from pathlib import Path
from typing import Any

import torch

from molmo2 import load
from molmo2.client import Client, ServerError, api_key
from molmo2.video.processing import Molmo2VideoProcessor

from .backend import Backend
from .engines import LocalEngine, ServerEngine

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MINIATURE = (
    "This is a miniature that was trained on drawn shapes: ask about circles, squares, triangles, crosses, rings, "
    "letters and digits, and their colours. For anything else, start the app with `--model FOLDER`."
)


def load_backend(folder: Path | None, scratch: Path, **options: Any) -> Backend:
    """A backend with its model.

    Args:
        folder: A checkpoint folder for transformers; None for the miniature.
        scratch: A folder for the converted miniature.
        options: Of `Backend`.
    """
    notice = ""
    if folder is None:
        sys.path.insert(0, str(EXAMPLES))
        from miniature.native import CHECKPOINT, to_transformers

        folder, notice = to_transformers(CHECKPOINT, scratch / "miniature"), MINIATURE
    model, processor = load(folder)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # decorated by transformers
    return Backend(LocalEngine(model.eval(), processor), notice=notice, **options)


def server_backend(url: str, model: str | None, **options: Any) -> Backend:
    """A backend that asks a server; its key is that of the environment.

    Args:
        model: Its name there; None for the only one.
        options: Of `Backend`.
    Raises:
        ConnectionError: The server cannot be reached, refuses the key or has not the model.
        ValueError: The address is none, or no model is named and there are several.
    """
    client = Client(url, model, api_key=api_key(), timeout=options.get("max_seconds", Backend.max_seconds))
    try:
        client.check()
    except ServerError as error:
        raise ConnectionError(str(error)) from error
    return Backend(ServerEngine(client, Molmo2VideoProcessor()), **options)
