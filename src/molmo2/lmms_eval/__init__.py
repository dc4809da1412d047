"""A model and tasks for lmms-eval: `lmms-eval --model molmo2 --model_args pretrained=allenai/Molmo2-4B --tasks ...`.

The model is found through the entry point `lmms_eval.models`. `TASKS` is the folder of this package's own tasks, for
`--include_path`; `python -m molmo2.lmms_eval` prints it.
"""

from pathlib import Path
from typing import Any

TASKS = Path(__file__).resolve().parent / "tasks"


def manifest() -> Any:
    """The payload of the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("molmo2", chat_class_path="molmo2.lmms_eval.model.Molmo2")
