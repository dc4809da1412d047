"""Writes tiny checkpoint folders in the layout of the published ones, weights drawn from a seed.

    folder = write_checkpoint(tmp_path / "tiny", "olmo3")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

Three families, after the text models that Molmo2 was trained from: `qwen3` (norm per head), `qwen2` (bias on the fused
projection, no norm of queries and keys, no mask in the pooling) and `olmo3` (norms after the sublayers and over whole
projections, yarn on some layers). Sizes are awkward on purpose: heads times head_dim is not the width of any model.
The JSON files are the published ones (`data/published`) with only their values made small.
"""

import copy
import functools
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import dynamic_module_utils

from molmo2.configuration import Molmo2Config
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from molmo2.processing.processor import Molmo2Processor

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DATA = Path(__file__).resolve().parent.parent / "data"
PUBLISHED = DATA / "published"
TOKENIZER = DATA / "golden" / "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

FAMILIES = {"qwen3": "Molmo2-4B", "qwen2": "Molmo2-4B", "olmo3": "Molmo2-O-7B"}  # and whose config.json they follow
SIZE = (98, 98)  # (height, width) of a crop in pixels
BASE_VOCABULARY = 1024  # of the tiny tokenizer; the ids of the visual tokens follow

AUTO_MAP = {
    "AutoConfig": "configuration_molmo2.Molmo2Config",
    "AutoModel": "modeling_molmo2.Molmo2Model",
    "AutoModelForImageTextToText": "modeling_molmo2.Molmo2ForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_molmo2.Molmo2ForConditionalGeneration",
}
TEXT_SIZES = {
    "head_dim": 12,
    "hidden_size": 40,
    "intermediate_size": 56,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": BASE_VOCABULARY,
}
TEXT_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"qkv_bias": True, "use_qk_norm": False, "rope_theta": 1000000.0},
    "olmo3": {"num_key_value_heads": 4, "rope_scaling_layers": [0, 2]},
}
ADAPTER_SIZES = {
    "head_dim": 12,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "text_hidden_size": 40,
}
VIT_SIZES = {
    "head_dim": 10,
    "hidden_size": 32,
    "image_num_pos": 49,
    "intermediate_size": 44,
    "num_attention_heads": 3,
    "num_hidden_layers": 10,  # of which vit_layers -3 and -9 leave 0..7
    "num_key_value_heads": 3,
}
IMAGE_OPTIONS = {"max_crops": 4, "overlap_margins": [1, 1]}
VIDEO_OPTIONS = {"num_frames": 6}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def published_config(family: str) -> dict[str, Any]:
    """The config.json of a tiny checkpoint: every key of the published files, more Auto classes in `auto_map`.

    Args:
        family: One of `FAMILIES`.
    """
    config = read_json(PUBLISHED / FAMILIES[family] / "config.json")
    text, vit, adapter = config["text_config"], config["vit_config"], config["adapter_config"]
    shift = BASE_VOCABULARY - text["vocab_size"]
    config.update({name: value + shift for name, value in config.items() if name.endswith("_id")})
    config["auto_map"] = AUTO_MAP
    text.update(TEXT_SIZES | TEXT_OF_FAMILY[family])
    if text["rope_scaling"] is not None:
        text["rope_scaling"]["original_max_position_embeddings"] = 128
    adapter.update(ADAPTER_SIZES, pooling_attention_mask=family != "qwen2")
    vit.update(VIT_SIZES, image_default_input_size=list(SIZE))
    if family == "olmo3":
        vit["image_num_pos"] = 81  # a stored table of another size than the patch grid
    return config


def tiny_config(family: str) -> Molmo2Config:
    """`published_config` as our configuration object."""
    return Molmo2Config.from_dict(published_config(family))


def fill_weights(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter from the seed, in the order of their names.

    Logits get a standard deviation between 1 and 2; biases and norms are far from their neutral values, so that none
    can be forgotten unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if "norm" in name or ".ln_f." in name:
                noise = noise * 0.2 if name.endswith("bias") else 1 + noise * 0.2
            elif parameter.dim() == 1:
                noise = noise * 0.2
            elif not name.endswith("embedding"):
                noise = noise * (1.5 if name.startswith("lm_head") else 0.9) / parameter.shape[-1] ** 0.5
            parameter.copy_(noise)


def build_model(family: str) -> Molmo2ForConditionalGeneration:
    """The model that `write_checkpoint` stores, built without loading, float32, in eval mode; a copy of its own."""
    return copy.deepcopy(_built(family))


@functools.cache
def _built(family: str) -> Molmo2ForConditionalGeneration:
    model = Molmo2ForConditionalGeneration(tiny_config(family))
    fill_weights(model)
    return model.eval()


def without_stopping(model):
    """Random weights may end an answer at once; the tests want tokens, so the end is an id without logits."""
    model.generation_config.eos_token_id = 1151
    model.generation_config.pad_token_id = 1000
    return model


def copy_remote_code(folder: Path) -> None:
    """The shipped modules, as they lie beside the weights in a published repository."""
    for module in REPOSITORY.glob("*_molmo2.py"):
        shutil.copy(module, folder)


def write_processor(folder: Path) -> Path:
    """Everything of a checkpoint that its processor reads, without code; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    crop = {"size": {"height": SIZE[0], "width": SIZE[1]}}
    for name, changes in (
        ("preprocessor_config.json", IMAGE_OPTIONS | crop),
        ("video_preprocessor_config.json", VIDEO_OPTIONS | crop),
        ("processor_config.json", {}),
    ):
        write_json(folder / name, read_json(PUBLISHED / "Molmo2-4B" / name) | changes)
    shutil.copy(REPOSITORY / "chat_template.jinja", folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    del tokenizer_config["padding_side"]  # published files state none
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def write_checkpoint(folder: Path, family: str, *, remote_code: bool = True) -> Path:
    """Write a complete tiny checkpoint (1 MB).

    Args:
        folder: Made if it is not there.
        family: One of `FAMILIES`.
        remote_code: Copy the shipped modules too, as in a published repository.
    Returns:
        `folder`.
    """
    write_processor(folder)
    write_json(folder / "config.json", published_config(family))
    tokens = {"bos_token_id": 1002, "eos_token_id": 1002, "pad_token_id": 1000}
    write_json(folder / "generation_config.json", {**tokens, "transformers_version": "4.57.1"})
    weights = build_model(family).state_dict()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if remote_code:
        copy_remote_code(folder)
    return folder


def make_image(height: int = 90, width: int = 130, seed: int = 0) -> Image.Image:
    """Noise over a gradient: no two patches are alike."""
    noise = np.random.default_rng(seed).integers(0, 96, (height, width, 3))
    slope = np.linspace(0, 159, width)[None, :, None]
    return Image.fromarray((noise + slope).astype(np.uint8))


def image_messages() -> list[dict[str, Any]]:
    """A conversation about one image."""
    content = [{"type": "image", "image": make_image()}, {"type": "text", "text": "What is in the picture?"}]
    return [{"role": "user", "content": content}]


def image_inputs(folder: Path) -> dict[str, torch.Tensor]:
    """What the processor of a checkpoint makes of `image_messages`."""
    processor = Molmo2Processor.from_pretrained(folder)
    return dict(
        processor.apply_chat_template(
            image_messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


@contextmanager
def module_cache(folder: Path) -> Iterator[None]:
    """Remote code is copied to `folder`, not to the user's cache, and forgotten in the end."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        # A cache that another test used would be found first.
        patch.setattr(sys, "path", [place for place in sys.path if not Path(place, "transformers_modules").is_dir()])
        forget()
        yield
        forget()
