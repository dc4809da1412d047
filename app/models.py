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

GRACE_SECONDS = 30.0  # that a server gets beyond `max_seconds`, so that what it has written by then is kept
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
        ConnectionError: The server cannot be reached, refuses the key or does not have the model.
        ValueError: The address is not valid, no model is named and there are several, or `num_frames` is given and
            the server takes no such option.
    """
    timeout = options.get("max_seconds", Backend.max_seconds) + GRACE_SECONDS
    client = Client(url, model, api_key=api_key(), timeout=timeout)
    engine = ServerEngine(client, Molmo2VideoProcessor())
    try:
        client.check()
        taken = engine.sampling_options
    except ServerError as error:
        raise ConnectionError(str(error)) from error
    if "num_frames" in options and "num_frames" not in taken:
        raise ValueError("This server decides itself about the frames of a video. Leave out the number of frames.")
    return Backend(engine, **options)
