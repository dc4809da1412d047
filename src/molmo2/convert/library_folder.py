"""Folders that transformers' own Molmo2 class saved, read as published ones.

It spells config.json in another way, trims the vision transformer to the layers that are read, puts the processors'
files into one, and saves its single embedding table cut into halves under the names of the two published pieces.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from molmo2.convert.folder import DTYPES
from molmo2.convert.reader import Piece, SourceTensor
from molmo2.convert.small_files import read_json

# The library's name of a setting -> the published one, by part of config.json.
SPELLINGS: dict[str, dict[str, str]] = {
    "text_config": {"attention_bias": "qkv_bias", "rms_norm_eps": "layer_norm_eps"},
    "vit_config": {
        "image_size": "image_default_input_size",
        "patch_size": "image_patch_size",
        "num_position_embeddings": "image_num_pos",
    },
    "adapter_config": {"vision_feature_layer": "vit_layers"},
}
# Settings that it has no choice in, and what it does.
IMPLIED: dict[str, dict[str, Any]] = {
    "text_config": {"use_qk_norm": True},
    "vit_config": {"float32_attention": True},
    "adapter_config": {"pooling_attention_mask": True, "image_feature_dropout": 0.0},
}
NESTED_FILES = {"preprocessor_config.json": "image_processor", "video_preprocessor_config.json": "video_processor"}
EMBEDDING, NEW_EMBEDDING = "model.transformer.wte.embedding", "model.transformer.wte.new_embedding"
ITEM_BYTES = dict(DTYPES.values())


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json in the published spelling; as it is if it has that one."""
    if "vision_config" not in config:
        return config
    config = {**config, "vit_config": config["vision_config"]}
    for part, names in SPELLINGS.items():
        if isinstance(config.get(part), dict):
            own = {name: value for name, value in config[part].items() if name != "model_type"}
            renamed = {names.get(name, name): value for name, value in own.items()}
            config[part] = {**IMPLIED[part], **renamed}
    text = config.get("text_config")
    if isinstance(text, dict):
        rope = dict(text.get("rope_parameters") or {})
        text["rope_theta"] = rope.pop("rope_theta", None)
        text["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        if text.get("rope_scaling_layers") == list(range(text.get("num_hidden_layers", 0))):
            text["rope_scaling_layers"] = None  # all of them
    return config


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file of a folder, wherever the library puts it, in the published spelling."""
    if name in NESTED_FILES and not (folder / name).is_file():
        nested = read_json(folder / "processor_config.json").get(NESTED_FILES[name])
        if isinstance(nested, dict):
            return nested
    content = read_json(folder / name)
    return published_config(content) if name == "config.json" else content


def cut_embedding(tensors: Mapping[str, SourceTensor], vocab_size: int) -> dict[str, SourceTensor]:
    """The tensors with `vocab_size` rows in the base piece of the embedding; no byte is moved."""
    pieces = [tensors[name] for name in (EMBEDDING, NEW_EMBEDDING) if name in tensors]
    num_rows = sum(piece.shape[0] for piece in pieces)
    is_table = len(pieces) == 2 and all(len(piece.shape) == 2 for piece in pieces)
    alike = is_table and pieces[0].dtype == pieces[1].dtype and pieces[0].shape[1] == pieces[1].shape[1]
    if not alike or pieces[0].shape[0] == vocab_size or not 0 < vocab_size < num_rows:
        return dict(tensors)
    width = pieces[0].shape[1]
    end = vocab_size * math.prod((width, ITEM_BYTES[pieces[0].dtype]))
    base, new = _split([part for piece in pieces for part in piece.pieces], end)
    return {
        **tensors,
        EMBEDDING: replace(pieces[0], shape=(vocab_size, width), pieces=base),
        NEW_EMBEDDING: replace(pieces[1], shape=(num_rows - vocab_size, width), pieces=new),
    }


def _split(parts: list[Piece], end: int) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Pieces of a file up to this many bytes, and the rest."""
    before, after, start = [], [], 0
    for part in parts:
        first = min(max(end - start, 0), part.num_bytes)
        if first:
            before.append(replace(part, num_bytes=first, crc32=None))
        if first < part.num_bytes:
            after.append(replace(part, start=part.start + first, num_bytes=part.num_bytes - first, crc32=None))
        start += part.num_bytes
    return tuple(before), tuple(after)
