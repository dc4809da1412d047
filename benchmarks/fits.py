"""What a card has to hold, by model, precision and frames: python -m benchmarks.fits

Weights are counted from the shapes of the published configurations, everything besides them is `molmo2.plan`'s
estimate of one video. Nothing is measured, and no weights are read.
"""

import json
from pathlib import Path

import torch
from torch import nn

from molmo2.configuration import Molmo2Config
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from molmo2.tools.memory import RequestShape, estimate_memory

PUBLISHED = Path(__file__).resolve().parent.parent / "tests" / "data" / "published"
MODELS = ("Molmo2-4B", "Molmo2-8B", "Molmo2-O-7B")
FRAMES = (32, 128, 384)
TOKENS_PER_FRAME = 90  # 81 pooled, start, end, and about 7 of the printed time
PROMPT_TOKENS, NEW_TOKENS = 64, 512
# Bytes of a weight in a linear layer, `lm_head` aside: in 4 bits with a float32 scale for 64 of them, in 8 bits with
# one for each row, which is left out here.
PRECISIONS = {"bfloat16": 2.0, "8 bits": 1.0, "4 bits": 0.5 + 4 / 64}
UNQUANTIZED_BYTES = 2


def published(name: str) -> Molmo2ForConditionalGeneration:
    """A model of a published shape, without memory for its weights, in bfloat16."""
    config = Molmo2Config.from_dict(json.loads((PUBLISHED / name / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        return Molmo2ForConditionalGeneration(config).to(torch.bfloat16).eval()


def weight_bytes(model: nn.Module, bytes_per_weight: float) -> float:
    """Bytes of all weights, those of the linear layers but `lm_head` in another precision."""
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    every = sum(parameter.numel() for parameter in model.parameters())
    return linear * bytes_per_weight + (every - linear) * UNQUANTIZED_BYTES


def table() -> list[str]:
    """The lines of a Markdown table, in GB (10^9 bytes): weights, and the peak by the number of frames of a video."""
    heads = ["model", "weights in", "weights", *(f"with {frames} frames" for frames in FRAMES)]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for name in MODELS:
        model = published(name)
        besides = [
            estimate_memory(
                model,
                RequestShape(frames, 81 * frames, 9, 1, frames * TOKENS_PER_FRAME + PROMPT_TOKENS, NEW_TOKENS),
            ).total
            for frames in FRAMES
        ]
        for precision, size in PRECISIONS.items():
            weights = weight_bytes(model, size)
            cells = [f"{(weights + more) / 1e9:.1f}" for more in (0, *besides)]
            lines.append(f"| {name.removeprefix('Molmo2-')} | {precision} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
