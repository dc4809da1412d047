"""Makes the plain torchvision wheel importable beside a torch without CUDA: the native processors ask for it.

That wheel is built for CUDA, and its compiled library does not load elsewhere. Nothing of it is used for
preprocessing, but its Python part insists on three operations. They are declared here, and never defined.
"""

import importlib.util
import sys
import warnings
from typing import Any

OPERATIONS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
DECLARATION = """import torch
library = torch.library.Library("torchvision", "DEF")
for operation in operations:
    library.define(operation)
kept.append(library)
"""
_kept: list[Any] = []  # operations live as long as their library


def _imports() -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


def make_importable() -> None:
    """Declare what is missing, where torchvision is installed and does not import by itself."""
    if importlib.util.find_spec("torchvision") is None or _imports():
        return
    exec(DECLARATION, {"kept": _kept, "operations": OPERATIONS})
    _imports()


def lines_for_programs() -> str:
    """Python that makes torchvision importable at the start of another program; empty where nothing is needed."""
    return f"kept, operations = [], {OPERATIONS!r}\n{DECLARATION}" if _kept else ""
