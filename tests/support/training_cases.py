"""Conversations to train on: text, images, videos, several turns, and trees about one image or clip."""

import copy
from typing import Any

import pytest
import torch

from molmo2.model.attention.blockwise import BlockwiseMask
from molmo2.training import DataCollator, build_training_example
from support.checkpoints import make_image
from support.model_inputs import clip, processor

# PyTorch has no backward pass of flex_attention on the CPU.
TRAINABLE = ("sdpa", "blockwise", "eager")
ATTENTION = (*TRAINABLE, pytest.param("flex_attention", marks=pytest.mark.slow))  # which compiles first

IMAGE = {"type": "image", "image": make_image(90, 130)}
SMALL = {"type": "image", "image": make_image(60, 60, 1)}
CLIP = {"type": "video", "video": clip(), "video_metadata": {"fps": 2.0, "total_num_frames": 4}}


def turn(question: str, answer: str, *parts: dict[str, Any], **keys: Any) -> list[dict[str, Any]]:
    """A question, with images, and its answer; further keys belong to the answer."""
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer, **keys},
    ]


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": turn("What is the time?", "Half past two."),
    "image": turn("What is this?", "A red boat.", IMAGE),
    "turns": [*turn("What is this?", "A boat.", IMAGE), *turn("And its colour?", "It is red, I think.")],
    "two images": turn("Compare.", "The second one is smaller.", SMALL, IMAGE),
    "video": turn("What happens in this clip?", "Something moves.", CLIP),
    "image and video": turn("Is it there?", "Yes, it is.", SMALL, CLIP),
}
TREES: dict[str, list[list[dict[str, Any]]]] = {
    "image": [
        turn("Where is the boat?", "In the middle.", IMAGE),
        turn("Where is the sea?", "Everywhere."),
        [*turn("What is left?", "Nothing."), *turn("Are you sure?", "Yes.")],
    ],
    "video": [turn("What moves?", "A boat.", CLIP), turn("How fast?", "Very fast indeed.")],
    "captions": [turn("Describe.", "A boat.", IMAGE), turn("Describe.", "A red boat at sea.")],
    "text": [turn("Name a colour.", "Red."), turn("Name a number.", "Seven.")],
}


def separate(branches: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The branches of a tree as conversations of their own, each with the images."""
    parts = [part for part in branches[0][0]["content"] if part["type"] != "text"]
    first, *others = branches
    return [first, *([{**own[0], "content": [*parts, *own[0]["content"]]}, *own[1:]] for own in others)]


def example(messages: Any, **options: Any) -> dict[str, torch.Tensor]:
    return build_training_example(processor(), messages, **options)


def collate(features: list[Any], **settings: Any) -> dict[str, torch.Tensor]:
    return DataCollator(processor(), **settings)(features)


def with_attention(model, name: str, monkeypatch):
    """A copy under this attention; `blockwise` is sdpa in blocks of a few queries."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("sdpa" if name == "blockwise" else name)
    monkeypatch.setattr(BlockwiseMask, "queries_per_block", 7 if name == "blockwise" else 10**9)
    return model


def gradients(model, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a copy in training mode."""
    model = copy.deepcopy(model).train()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def require_same_step(model, inputs: dict[str, Any], expected_inputs: dict[str, Any]) -> None:
    """Loss and every gradient are those of the expected inputs."""
    (loss, found), (expected_loss, expected) = gradients(model, inputs), gradients(model, expected_inputs)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: name + text
        )
