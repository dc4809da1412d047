"""The miniature as a folder that transformers loads, for everything here that wants a model: app, notebooks, demos."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
TRAINED = EXAMPLES / "miniature" / "checkpoint"  # in the trainer's own form


def is_trained() -> bool:
    """Whether the trained weights are there; without them the miniature has random ones, and its answers are noise."""
    return TRAINED.is_dir()


def write_miniature_folder(folder: Path) -> Path:
    """Convert the trained miniature, or write one with random weights; `folder` is replaced."""
    for place in (EXAMPLES, EXAMPLES.parent):  # where the converter and the miniature are
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    if is_trained():
        from miniature.native import to_transformers

        return to_transformers(TRAINED, folder)
    from random_miniature import write_miniature

    return write_miniature(folder)
