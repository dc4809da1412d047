"""What the tests of quantisation share: the miniature, its linear layers, bytes of its files, and scores."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForImageTextToText

from miniature.evaluate import FRESH_SEED, LOW_IS_GOOD, TARGETS, examples

PATCH_EMBEDDING = "model.vision_backbone.image_vit.patch_embedding"  # rows of 588, in no blocks or groups
QUESTIONS = 12  # about single images; sets and clips come on top


def load(folder: Path, **options: Any) -> Any:
    """The model of a folder, with its remote code."""
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options).eval()


def fresh_questions() -> list[Any]:
    """Questions that training never saw."""
    return examples(FRESH_SEED + 1, QUESTIONS)


def linear_layers(model: nn.Module) -> set[str]:
    """Names of the layers that libraries look for: their type *is* `nn.Linear`."""
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


def weight_bytes(folder: Path) -> int:
    """Size of the saved weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def summary(scores: dict[str, float]) -> str:
    """Scores as the page has them."""
    return ", ".join(f"{name} {scores[name]:.3f}" for name in TARGETS if name in scores)


def require_similar(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    """Scores that are not much worse."""
    for name in TARGETS.keys() & expected.keys():  # so few questions leave out some kinds
        worse = found[name] - expected[name] if name in LOW_IS_GOOD else expected[name] - found[name]
        assert worse <= tolerance, f"{name}: {found[name]:.2f} instead of {expected[name]:.2f}"
