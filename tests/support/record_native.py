"""Records what the native class of transformers computes for tiny checkpoints made from seeds.

    PYTHONPATH=src:tests python -m support.record_native

Writes tests/data/native/expected.safetensors, against which all releases are tested, also those without such a class.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from molmo2 import library_inputs
from support.model_inputs import batch
from support.native_oracle import write_native
from support.paths import DATA

FILE = DATA / "native" / "expected.safetensors"
RECORDED_SHAPES = ("qwen3", "qwen3 bias", "olmo3")
BATCHES = {"image": ("image",), "mixed": ("text", "image", "two images"), "videos": ("text", "video")}
NUM_LAST, STRIDE = 4, 23  # of the logits: those of the last tokens, and of these every `STRIDE`-th
NUM_NEW = 6


@torch.no_grad()
def numbers_of(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is recorded of one call; `inputs` in the terms of the model."""
    logits = model(**inputs).logits
    return {
        "argmax": logits.argmax(-1).to(torch.int16),
        "logits": logits[:, -NUM_LAST:, ::STRIDE].contiguous(),
        "logsumexp": logits.logsumexp(-1),
    }


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New tokens, the most likely one after another without a cache, and by how much each leads."""
    inputs, new, margins = dict(inputs), [], []
    for _ in range(NUM_NEW):
        best = model(**inputs).logits[:, -1].topk(2)
        new.append(best.indices[:, 0])
        margins.append(best.values[:, 0] - best.values[:, 1])
        for name, value in (("input_ids", new[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            column = torch.zeros_like(inputs[name][:, :1]) + (value[:, None] if name == "input_ids" else value)
            inputs[name] = torch.cat([inputs[name], column], dim=1)
    return {"new": torch.stack(new, 1).to(torch.int16), "margins": torch.stack(margins, 1)}


def record() -> dict[str, torch.Tensor]:
    recorded = {}
    with tempfile.TemporaryDirectory() as parent:
        for shape in RECORDED_SHAPES:
            folder = write_native(Path(parent) / shape, shape)
            model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
            for name, rows in BATCHES.items():
                inputs = dict(library_inputs(batch(*rows)))
                found = {**numbers_of(model.eval(), inputs), **greedy(model, inputs)}
                found["input_ids"] = inputs["input_ids"].to(torch.int16)
                recorded |= {f"{shape}/{name}/{key}": value for key, value in found.items()}
    return recorded


if __name__ == "__main__":
    save_file(record(), FILE, metadata={"transformers": transformers.__version__, "torch": torch.__version__})
