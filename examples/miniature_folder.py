"""The miniature as a folder that transformers loads, for everything here that wants a model: app, notebooks, demos."""

import shutil
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
TRAINED = EXAMPLES / "miniature" / "checkpoint"  # in the trainer's own form


def is_trained() -> bool:
    """Whether the trained weights are there; without them the miniature has random ones, and its answers are noise."""
    return TRAINED.is_dir()


def write_miniature_folder(folder: Path) -> Path:
    """Convert the trained miniature, or write one with random weights; `folder` is replaced."""
    _import_from_here()
    if is_trained():
        from miniature.native import to_transformers

        return to_transformers(TRAINED, folder)
    from random_miniature import write_miniature

    return write_miniature(folder)


def write_native_folder(folder: Path) -> tuple[Path, Path]:
    """The same in the trainer's form: the checkpoint and the base tokenizer that belongs to it, both in `folder`."""
    _import_from_here()
    if is_trained():
        checkpoint = Path(shutil.copytree(TRAINED, folder / "checkpoint"))
        return checkpoint, checkpoint / "base_tokenizer"
    from random_miniature import write_native_miniature

    return write_native_miniature(folder)


def _import_from_here() -> None:
    """The converter and the modules of the miniature lie beside this file."""
    for place in (EXAMPLES, EXAMPLES.parent):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
