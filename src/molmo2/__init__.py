"""Molmo2 for transformers: models that understand images and videos, and point.

    from molmo2 import load, ask

    model, processor = load("allenai/Molmo2-4B", dtype="auto", device_map="auto")
    answer = ask(model, processor, "Point to the boats.", images="boats.jpg")

Names are imported when they are first used, so that `molmo2.convert` works without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from molmo2.version import __version__

if TYPE_CHECKING:
    from molmo2.grounding import prompts
    from molmo2.grounding.parse import Grounding, parse_grounding
    from molmo2.image.limits import MediaLimitError, MediaLimits
    from molmo2.registration import load, register
    from molmo2.tools.answer import Answer, AnswerPiece, Timings
    from molmo2.tools.ask import MediaSession, ask, ask_stream
    from molmo2.tools.draw import DrawingStyle, contact_sheet, draw
    from molmo2.tools.draw_video import AnnotatedVideo, annotate_video
    from molmo2.tools.embedding import FrameEmbeddings, Neighbours, embed, nearest
    from molmo2.tools.plan import RequestPlan, plan

_HOMES = {
    "AnnotatedVideo": "molmo2.tools.draw_video",
    "Answer": "molmo2.tools.answer",
    "AnswerPiece": "molmo2.tools.answer",
    "DrawingStyle": "molmo2.tools.draw",
    "FrameEmbeddings": "molmo2.tools.embedding",
    "Grounding": "molmo2.grounding.parse",
    "MediaLimitError": "molmo2.image.limits",
    "MediaLimits": "molmo2.image.limits",
    "MediaSession": "molmo2.tools.ask",
    "Neighbours": "molmo2.tools.embedding",
    "RequestPlan": "molmo2.tools.plan",
    "Timings": "molmo2.tools.answer",
    "annotate_video": "molmo2.tools.draw_video",
    "ask": "molmo2.tools.ask",
    "ask_stream": "molmo2.tools.ask",
    "contact_sheet": "molmo2.tools.draw",
    "draw": "molmo2.tools.draw",
    "embed": "molmo2.tools.embedding",
    "load": "molmo2.registration",
    "nearest": "molmo2.tools.embedding",
    "parse_grounding": "molmo2.grounding.parse",
    "plan": "molmo2.tools.plan",
    "register": "molmo2.registration",
}

__all__ = [
    "AnnotatedVideo",
    "Answer",
    "AnswerPiece",
    "DrawingStyle",
    "FrameEmbeddings",
    "Grounding",
    "MediaLimitError",
    "MediaLimits",
    "MediaSession",
    "Neighbours",
    "RequestPlan",
    "Timings",
    "__version__",
    "annotate_video",
    "ask",
    "ask_stream",
    "contact_sheet",
    "draw",
    "embed",
    "load",
    "nearest",
    "parse_grounding",
    "plan",
    "prompts",
    "register",
]


def __getattr__(name: str) -> Any:
    if name == "prompts":
        value = importlib.import_module("molmo2.grounding.prompts")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'molmo2' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
