"""Sizes of the miniature: the `model` section of its native `config.yaml`, and initial weights.

The converter derives everything else from these settings.
"""

from typing import Any

import torch

from molmo2.convert.names import expected_renames
from molmo2.convert.native_config import parse_config
from molmo2.convert.to_native import default_section

CROP, PATCH, PATCHES = 98, 14, 49
TEXT = {
    "d_model": 192,
    "n_heads": 6,
    "n_kv_heads": 3,
    "head_dim": 32,
    "n_layers": 6,
    "mlp_hidden_size": 1024,
    "rope_theta": 10000.0,
    "rope_type": "default",
    "attention_layer_norm": True,
    "attention_layer_norm_type": "qwen3",
    "layer_norm_eps": 1e-6,
    "max_sequence_length": 2048,
    "vocab_size": 384,
    "embedding_size": 384,
    "additional_vocab_size": 128,
    "weight_tying": False,
}
VISION = {
    "image_model_type": "siglip",
    "image_default_input_size": [CROP, CROP],
    "image_patch_size": PATCH,
    "image_emb_dim": 128,
    "image_num_heads": 4,
    "image_num_key_value_heads": 4,
    "image_num_layers": 6,
    "image_head_dim": 32,
    "image_mlp_dim": 384,
    "image_mlp_activations": "gelu_pytorch_tanh",
    "image_num_pos": PATCHES,
    "image_norm_eps": 1e-6,
}
VIT_LAYERS = [-2, -4]
IMAGES = {"max_crops": 4, "max_multi_image_crops": 4, "overlap_margins": [1, 1], "use_single_crop_col_tokens": False}
VIDEOS = {
    "max_frames": 8,
    "frame_sample_mode": "uniform_last_frame",
    "max_fps": [2.0],
    "pooling_h": 3,
    "pooling_w": 3,
    "use_frame_special_tokens": True,
}


def native_section() -> dict[str, Any]:
    """The `model` section of the miniature."""
    section = default_section()
    section["llm"].update(TEXT)
    section["llm"]["tokenizer"]["identifier"] = "base_tokenizer"
    section["vision_backbone"].update(vit_layers=VIT_LAYERS, pooling_attention_mask=True, skip_unused_layers=True)
    section["vision_backbone"]["vit"].update(VISION)
    section["mm_preprocessor"]["image"].update(IMAGES)
    section["mm_preprocessor"]["video"].update(VIDEOS)
    return section


def fresh_tensors(section: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Initial weights from a seed, by their native names; matrices preserve the variance of their input."""
    generator = torch.Generator().manual_seed(seed)
    depth = 2 * section["llm"]["n_layers"]
    tensors = {}
    for rename in expected_renames(parse_config(section)):
        name, shape = rename.native, rename.shape
        if name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        elif "norm" in name or name.endswith("ln_f.weight"):
            tensors[name] = torch.ones(shape)
        elif "wte" in name or "positional" in name:
            tensors[name] = 0.3 * torch.randn(shape, generator=generator)
        else:
            writes_residual = name.endswith(
                ("attn_out.weight", "ff_out.weight", "wo.weight", "feed_forward.w2.weight")
            )
            scale = shape[-1] ** -0.5 * (depth**-0.5 if writes_residual else 1.0)
            tensors[name] = scale * torch.randn(shape, generator=generator)
    return tensors
