"""Loads the model and the processors of a side: ours and other remote code through the Auto classes, and native."""

import importlib
import importlib.util
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.checkpoints import checkpoint
from benchmarks.harness import NotAvailable, Side
from molmo2 import library_inputs


def _native_processor(side: Side, kind: str) -> Any:
    if importlib.util.find_spec("transformers.models.molmo2") is None:
        raise NotAvailable("this transformers has no Molmo2 of its own")
    if importlib.util.find_spec("torchvision") is None:
        raise NotAvailable("the native processor needs torchvision, which is not installed")
    module = importlib.import_module(f"transformers.models.molmo2.{kind}_processing_molmo2")
    return getattr(module, f"Molmo2{kind.title()}Processor").from_pretrained(checkpoint(side, "thin"))


def image_processor(side: Side) -> Any:
    """The image processor of a side, with the published settings."""
    if side.name == "native":
        return _native_processor(side, "image")
    return processor(side, "thin").image_processor


def video_processor(side: Side) -> Any:
    """The video processor of a side, with the published settings."""
    if side.name == "native":
        return _native_processor(side, "video")
    return processor(side, "thin").video_processor


def processor(side: Side, shape: str) -> Any:
    """The processor of remote code."""
    return AutoProcessor.from_pretrained(checkpoint(side, shape), trust_remote_code=True)


def our_processor(side: Side, shape: str) -> Any:
    """Our processor, for every side: all sides get the same inputs."""
    return processor(Side("ours", side.settings), shape)


def load_model(side: Side, shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The model of a side; the bound works with the weights of ours."""
    side = Side("ours", side.settings) if side.is_bound else side
    folder = checkpoint(side, shape)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=side.name != "native", dtype=dtype, attn_implementation="sdpa"
        )
    except (ValueError, KeyError) as error:
        if side.name != "native":
            raise
        raise NotAvailable(f"the native class does not load: {error}") from error
    model.generation_config.eos_token_id = None  # answers always have the requested length
    return with_weights_read(model.eval().to(device))


def with_weights_read(model: Any) -> Any:
    """The model with every weight read once, because files are memory-mapped."""
    for tensor in model.state_dict().values():
        tensor.sum()
    return model


def inputs_for(side: Side, inputs: Any) -> dict[str, torch.Tensor]:
    """Inputs of our processor as a side reads them."""
    return dict(library_inputs(inputs) if side.name == "native" else inputs)


def chat_inputs(side: Side, shape: str, content: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
    """Inputs of one user turn."""
    inputs = our_processor(side, shape).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )
    return inputs_for(side, inputs)
