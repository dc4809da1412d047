"""Answers in other people's tools: supervision, Label Studio, CVAT, SAM 2.

None of these packages is needed to import this one; `to_supervision` alone needs its own. JSON, CSV, COCO and MOT are
in `molmo2.grounding`.
"""

from molmo2.interop.cvat import from_cvat, to_cvat
from molmo2.interop.label_studio import from_label_studio, label_studio_config, to_label_studio
from molmo2.interop.sam2 import Sam2Prompt, sam2_processor_arguments, sam2_prompts
from molmo2.interop.supervision import to_supervision

__all__ = [
    "Sam2Prompt",
    "from_cvat",
    "from_label_studio",
    "label_studio_config",
    "sam2_processor_arguments",
    "sam2_prompts",
    "to_cvat",
    "to_label_studio",
    "to_supervision",
]
