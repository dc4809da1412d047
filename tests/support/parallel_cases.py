"""Models and batches of `parallel_processes`, and what one process makes of them."""

import functools
from typing import Any

import torch

from molmo2.model.modeling import Molmo2ForConditionalGeneration
from support.checkpoints import build_model, fill_weights, tiny_config, without_stopping
from support.model_inputs import batch
from support.training_cases import CONVERSATIONS, TREES, collate, example

# Attention under context parallelism, and up to how many queries it has a mask in one piece.
ATTENTION = {"sdpa": 10**9, "blockwise": 7, "eager": 10**9, "checkpointed": 7}


def model_of(family: str) -> Any:
    """A tiny model in training mode; four processes can share the heads, keys and layers of the one "for four"."""
    if family != "for four":
        model = build_model(family)
    else:
        config = tiny_config("olmo3")
        config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 8, 2
        config.text_config.num_hidden_layers = 4
        for part in (config.vit_config, config.adapter_config):
            part.num_attention_heads = part.num_key_value_heads = 4
        model = Molmo2ForConditionalGeneration(config)
        fill_weights(model)
    model.vision_backbone.crops_per_chunk = 2
    return model.train()


@functools.cache
def cases() -> dict[str, dict[str, torch.Tensor]]:
    """Batches: padded rows with images, clips and text; packed rows with trees; weighted text; hardly any token."""
    text = [example(CONVERSATIONS["text"])]
    padded = collate([example(CONVERSATIONS["two images"]), example(CONVERSATIONS["video"]), *text])
    packed = collate([[example(TREES["image"]), example(CONVERSATIONS["video"])], *text])
    weighted = collate(text)
    weighted["loss_weights"] = torch.linspace(0.1, 2, weighted["labels"].numel()).view(weighted["labels"].shape)
    counted = {**collate(text), "num_items_in_batch": torch.tensor(9.0)}
    return {"padded": padded, "packed": packed, "weighted": weighted, "counted": counted}


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the gradients by name."""
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@torch.no_grad()
def generated(model: Any) -> torch.Tensor:
    """Eight tokens about an image and a clip; leaves the model in evaluation mode."""
    inputs = batch("image", "video", padding_side="left")
    return without_stopping(model.eval()).generate(**inputs, max_new_tokens=8, do_sample=False)


@functools.cache
def alone(family: str) -> dict[str, Any]:
    """What one process finds: loss, logits and gradients of every case, the gradients of all of them, an answer."""
    model, found = model_of(family), {}
    for name, inputs in cases().items():
        model.zero_grad()
        result = model(**inputs)
        result.loss.backward()
        found[name] = {
            "loss": result.loss.detach(),
            "logits": result.logits.detach(),
            "gradients": gradients_of(model),
        }
    found["norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    model.zero_grad()
    losses = [model(**{**inputs, "num_items_in_batch": 100.0}).loss for inputs in cases().values()]
    sum(losses).backward()
    found["step"] = {"loss": sum(losses).detach(), "gradients": gradients_of(model)}
    return {**found, "weights": model.state_dict(), "generated": generated(model)}
