"""JSON files of the converted folder, made from native settings; the keys are those of the published files."""

import json
import re
from collections.abc import Mapping
from typing import Any

from molmo2.convert.errors import UnsupportedError
from molmo2.convert.native_config import NATIVE_NORM_EPS, ROPE_FIELDS, NativeConfig

FORMAT_VERSION = "4.57.1"  # the oldest transformers that reads these files
MODEL_CLASS, PROCESSOR_CLASS = "Molmo2ForConditionalGeneration", "Molmo2Processor"
IMAGE_PROCESSOR_CLASS, VIDEO_PROCESSOR_CLASS = "Molmo2ImageProcessor", "Molmo2VideoProcessor"
PROCESSOR_MAP = {"AutoProcessor": f"processing_molmo2.{PROCESSOR_CLASS}"}
IMAGE_MAP = {"AutoImageProcessor": f"image_processing_molmo2.{IMAGE_PROCESSOR_CLASS}", **PROCESSOR_MAP}
VIDEO_MAP = {"AutoVideoProcessor": f"video_processing_molmo2.{VIDEO_PROCESSOR_CLASS}", **PROCESSOR_MAP}
MODEL_MAP = {
    "AutoConfig": "configuration_molmo2.Molmo2Config",
    "AutoModel": "modeling_molmo2.Molmo2Model",
    "AutoModelForImageTextToText": f"modeling_molmo2.{MODEL_CLASS}",
    "AutoModelForMultimodalLM": f"modeling_molmo2.{MODEL_CLASS}",
}
# Files that name the remote code, and what they name.
AUTO_MAPS = {
    "config.json": MODEL_MAP,
    "preprocessor_config.json": IMAGE_MAP,
    "video_preprocessor_config.json": VIDEO_MAP,
    "processor_config.json": PROCESSOR_MAP,
    "tokenizer_config.json": PROCESSOR_MAP,
}
# SigLIP: bilinear resizing, pixels scaled to -1..1.
PIXEL_SCALING = {"do_convert_rgb": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
# Native section of each configuration class, and the settings that have another name there.
NATIVE_PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "Molmo2TextConfig": ("llm", {}),
    "Molmo2VitConfig": (
        "vision_backbone.vit",
        {
            "num_attention_heads": "image_num_heads",
            "num_key_value_heads": "image_num_key_value_heads",
            "hidden_act": "image_mlp_activations",
        },
    ),
    "Molmo2AdapterConfig": ("vision_backbone", {}),
}
ATTENTION_CHOICES = ("sdpa", "eager", "flash_attention_2", "flex_attention")


def rope_scaling(llm: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling of the rotary tables; None when they are unscaled."""
    if llm["rope_type"] == "default":
        return None
    given = {name: llm[f"rope_{name}"] for name, _ in ROPE_FIELDS}
    return {"rope_type": llm["rope_type"], **{name: value for name, value in given.items() if value is not None}}


def rope_scaling_layers(llm: Mapping[str, Any]) -> list[int] | None:
    """Layers that use the scaled tables: the listed ones, or all others when the flag is set."""
    listed = llm["full_attention_layers"]
    if listed is None or not llm["sliding_attention_rope_scaling"]:
        return listed
    return [layer for layer in range(llm["n_layers"]) if layer not in listed]


def _text_config(config: NativeConfig, attention: str) -> dict[str, Any]:
    llm = config.llm
    return {
        "model_type": "molmo2_text",
        "attn_implementation": attention,
        "hidden_size": llm["d_model"],
        "num_hidden_layers": llm["n_layers"],
        "num_attention_heads": llm["n_heads"],
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.fused_mlp_size // 2,
        "hidden_act": "silu",
        "vocab_size": config.embedding_rows,
        "additional_vocab_size": llm["additional_vocab_size"],
        "max_position_embeddings": config.max_positions,
        "qkv_bias": llm["qkv_bias"],
        "use_qk_norm": llm["attention_layer_norm"],
        "qk_norm_type": llm["attention_layer_norm_type"],
        "norm_after": llm["norm_after"],
        "layer_norm_eps": NATIVE_NORM_EPS if llm["layer_norm_eps"] is None else llm["layer_norm_eps"],
        "rope_theta": llm["rope_theta"],
        "rope_scaling": rope_scaling(llm),
        "rope_scaling_layers": rope_scaling_layers(llm),
        "initializer_range": llm["initializer_range"],
        "use_cache": True,
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), 0.0),
    }


def _vit_config(config: NativeConfig, attention: str) -> dict[str, Any]:
    vit = config.vit
    return {
        "model_type": "molmo2",
        "attn_implementation": attention,
        "hidden_size": vit["image_emb_dim"],
        "intermediate_size": vit["image_mlp_dim"],
        "num_hidden_layers": vit["image_num_layers"],
        "num_attention_heads": vit["image_num_heads"],
        "num_key_value_heads": vit["image_num_key_value_heads"],
        "head_dim": vit["image_head_dim"],
        "hidden_act": vit["image_mlp_activations"],
        "layer_norm_eps": vit["image_norm_eps"],
        "image_default_input_size": vit["image_default_input_size"],
        "image_patch_size": vit["image_patch_size"],
        "image_num_pos": vit["image_num_pos"],
        "float32_attention": vit["float32_attention"],
        "initializer_range": vit["initializer_range"],
        **dict.fromkeys(("attention_dropout", "residual_dropout"), 0.0),
    }


def _adapter_config(config: NativeConfig, attention: str) -> dict[str, Any]:
    vit = config.vit
    return {
        "model_type": "molmo2",
        "attn_implementation": attention,
        "vit_layers": config.backbone["vit_layers"],
        "pooling_attention_mask": config.backbone["pooling_attention_mask"],
        "hidden_size": vit["image_emb_dim"],
        "num_attention_heads": vit["image_num_heads"],
        "num_key_value_heads": vit["image_num_key_value_heads"],
        "head_dim": vit["image_head_dim"],
        "float32_attention": vit["float32_attention"],
        "hidden_act": "silu",
        "intermediate_size": config.fused_mlp_size // 2,
        "text_hidden_size": config.llm["d_model"],
        "image_feature_dropout": config.backbone["image_feature_dropout"],
        "initializer_range": config.llm["initializer_range"],
        **dict.fromkeys(("attention_dropout", "residual_dropout"), 0.0),
    }


def model_config(config: NativeConfig, *, dtype: str, attention: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """`config.json`.

    Args:
        dtype: The dtype of the converted tensors.
        attention: Attention implementation of the three parts.
        token_ids: Ids of the extra tokens by their strings.
    """
    return {
        "architectures": [MODEL_CLASS],
        "auto_map": MODEL_MAP,
        "model_type": "molmo2",
        "dtype": dtype,
        "transformers_version": FORMAT_VERSION,
        "text_config": _text_config(config, attention),
        "vit_config": _vit_config(config, attention),
        "adapter_config": _adapter_config(config, attention),
        "image_start_token_id": token_ids["<im_start>"],
        "image_end_token_id": token_ids["<im_end>"],
        "image_patch_id": token_ids["<im_patch>"],
        "image_high_res_id": token_ids["<im_patch>"],
        "image_col_id": token_ids["<im_col>"],
        "low_res_image_start_token_id": token_ids["<low_res_im_start>"],
        "image_low_res_id": token_ids["<im_low>"],
        "frame_start_token_id": token_ids["<frame_start>"],
        "frame_end_token_id": token_ids["<frame_end>"],
        "initializer_range": config.llm["initializer_range"],
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_frame_special_tokens": False,  # as published; prompts follow processor_config.json
    }


def ensure_accepted(content: Mapping[str, Any]) -> None:
    """Check a `config.json` with the configuration class that will read it.

    Args:
        content: The content of `config.json`.
    Raises:
        UnsupportedError: If the class refuses, with native names where they are known.
    """
    from molmo2.configuration import Molmo2Config  # brings transformers in

    try:
        Molmo2Config.from_dict(json.loads(json.dumps(content)))
    except Exception as error:  # classes of several releases check types in their own ways
        raise UnsupportedError(
            f"This checkpoint cannot be converted to Molmo2:\n  - {_natively(str(error))}"
        ) from None


def _natively(message: str) -> str:
    """An error of the configuration class, "Class: `name` ...", in terms of the native section and names."""
    class_name, _, reason = message.partition(": ")
    if class_name not in NATIVE_PLACES:
        return message
    section, names = NATIVE_PLACES[class_name]
    return f"{section}: " + re.sub(r"`(\w+)`", lambda match: f"`{names.get(match[1], match[1])}`", reason)


def generation_config(bos_token_id: int, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """`generation_config.json`."""
    return {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "transformers_version": FORMAT_VERSION,
    }


def processor_config(config: NativeConfig) -> dict[str, Any]:
    """`processor_config.json`: how images and videos are written into prompts."""
    return {
        "auto_map": PROCESSOR_MAP,
        "processor_class": PROCESSOR_CLASS,
        "image_use_col_tokens": config.image["use_col_tokens"],
        "use_single_crop_col_tokens": config.image["use_single_crop_col_tokens"],
        "use_single_crop_start_token": config.image["use_single_crop_start_token"],
        "use_frame_special_tokens": config.video["use_frame_special_tokens"],
        "use_low_res_token_for_global_crops": False,
        "video_use_col_tokens": False,
    }


def _crop_size(config: NativeConfig) -> dict[str, int]:
    height, width = config.vit["image_default_input_size"]
    return {"height": height, "width": width}


def preprocessor_config(config: NativeConfig) -> dict[str, Any]:
    """`preprocessor_config.json`: how images are cut."""
    return {
        **PIXEL_SCALING,
        "auto_map": IMAGE_MAP,
        "image_processor_type": IMAGE_PROCESSOR_CLASS,
        "processor_class": PROCESSOR_CLASS,
        "size": _crop_size(config),
        "patch_size": config.vit["image_patch_size"],
        "pooling_size": [config.image["pooling_h"], config.image["pooling_w"]],
        "max_crops": config.image["max_crops"],
        "overlap_margins": config.image["overlap_margins"],
    }


def video_preprocessor_config(config: NativeConfig) -> dict[str, Any]:
    """`video_preprocessor_config.json`: how frames are chosen and cut, the base class's options included."""
    unused = ("crop_size", "device", "do_center_crop", "fps", "input_data_format", "pad_size", "video_metadata")
    return {
        **PIXEL_SCALING,
        **dict.fromkeys(unused),
        "auto_map": VIDEO_MAP,
        "video_processor_type": VIDEO_PROCESSOR_CLASS,
        "processor_class": PROCESSOR_CLASS,
        "size": _crop_size(config),
        "patch_size": config.vit["image_patch_size"],
        "pooling_size": [config.video["pooling_h"], config.video["pooling_w"]],
        "num_frames": config.video["max_frames"],
        "frame_sample_mode": config.video["frame_sample_mode"],
        "max_fps": config.video["max_fps"][0],
        "sampling_fps": 2,
        "data_format": "channels_first",
        "default_to_square": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "do_sample_frames": True,
        "rescale_factor": 1 / 255,
        "return_metadata": False,
    }
