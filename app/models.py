"""The model that the app starts with."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from .backend import Backend

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MINIATURE = (
    "This is a miniature that was trained on drawn shapes: ask about circles, squares, triangles, crosses, rings, "
    "letters and digits, and their colours. To ask about anything else, start the app with `--model FOLDER`."
)


def load(folder: Path | None, scratch: Path, **options: int) -> Backend:
    """A backend with its model.

    Args:
        folder: Of a checkpoint for transformers; None for the miniature.
        scratch: A folder that the miniature is written to.
        options: Of `Backend`.
    """
    notice = ""
    if folder is None:
        sys.path.insert(0, str(EXAMPLES))
        from miniature.native import CHECKPOINT, to_transformers

        folder, notice = to_transformers(CHECKPOINT, scratch / "miniature"), MINIATURE
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto").to(device)
    return Backend(model.eval(), processor, notice=notice, **options)
