"""The model of the app."""

import sys
from pathlib import Path
from typing import Any

import torch

from molmo2 import load

from .backend import Backend

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
    return Backend(model.eval(), processor, notice=notice, **options)
