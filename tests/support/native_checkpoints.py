"""Writes made-up native checkpoints: the trainer's format, weights drawn from a seed.

    section = native_section()                                      # `model` of config.yaml, of a tiny Molmo2
    tensors = native_tensors(section, seed=0)                       # native names
    write_unsharded(folder, section, tensors)                       # config.yaml, model.pt
    write_sharded(folder, section, tensors, ShardLayout(ranks=3))   # config.yaml, model_and_optim/

Names and shapes are spelled out here, independently of the converter's table.
"""

import copy
import io
import json
import math
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

Tensors = Mapping[str, torch.Tensor]
BASE_TOKENS = 259  # of `write_base_tokenizer`
VOCAB_SIZE = 277

MODEL_SECTION: dict[str, Any] = {
    "model_name": "video_olmo",
    "data_formatter": {
        "prompt_templates": "none",
        "message_format": "qwen3",
        "system_prompt": "demo_or_style_v2",
        "pointing_format": "html-v2",
    },
    "llm": {
        "d_model": 40,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 12,
        "qkv_bias": False,
        "clip_qkv": None,
        "n_layers": 3,
        "mlp_ratio": 4,
        "mlp_hidden_size": 112,
        "activation_type": "swiglu",
        "block_type": "sequential",
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 1000000.0,
        "rope_type": "default",
        "rope_factor": None,
        "full_attention_layers": None,
        "sliding_attention_rope_scaling": False,
        "float32_attention": True,
        "attention_dropout": 0.0,
        "attention_layer_norm": True,
        "attention_layer_norm_type": "qwen3",
        "residual_dropout": 0.1,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "layer_norm_eps": 1.0e-06,
        "attention_layer_norm_with_affine": True,
        "max_sequence_length": 1024,
        "max_position_embeddings": None,
        "include_bias": False,
        "bias_for_layer_norm": None,
        "norm_after": False,
        "moe_num_experts": 8,
        "embedding_dropout": 0.0,
        "scale_logits": False,
        "vocab_size": VOCAB_SIZE,
        "additional_vocab_size": 32,
        "weight_tying": False,
        "embedding_size": VOCAB_SIZE,
        "use_position_ids": True,
        "tokenizer": {"identifier": "tiny-base-tokenizer", "tokenizer_dir": None},
        "can_predict_extra_tokens": False,
        "init_path": "/nowhere/llm.pt",
        "initializer_range": 0.02,
        "normalize_input_embeds": False,
        "fix_pad_tokenizer": False,
    },
    "vision_backbone": {
        "vit": {
            "image_model_type": "siglip",
            "image_default_input_size": [98, 98],
            "image_patch_size": 14,
            "image_pos_patch_size": 14,
            "image_emb_dim": 32,
            "image_num_heads": 3,
            "image_num_key_value_heads": 3,
            "image_num_layers": 10,
            "image_head_dim": 10,
            "image_mlp_dim": 44,
            "image_mlp_activations": "gelu_pytorch_tanh",
            "image_dropout_rate": 0.0,
            "image_num_pos": 49,
            "image_norm_eps": 1.0e-06,
            "initializer_range": 0.02,
            "float32_attention": True,
            "init_path": "/nowhere/vit.pt",
            "resize_mode": "siglip",
            "normalize": "siglip",
        },
        "image_pooling_2d": "attention_meanq",
        "pooling_attention_mask": True,
        "image_projector": "mlp",
        "image_padding_embed": None,
        "vit_layers": [-3, -9],
        "skip_unused_layers": True,
        "use_deepstack": False,
        "share_connector": False,
        "image_feature_dropout": 0.0,
        "normalize_on_gpu": True,
    },
    "mm_preprocessor": {
        "max_answer_len": None,
        "video": {
            "max_frames": 6,
            "frame_sample_mode": "uniform_last_frame",
            "max_fps": [2.0],
            "time_sampling": True,
            "time_mode": "per-frame-compact",
            "subtitle_mode": "frame_1",
            "pooling_w": 3,
            "pooling_h": 3,
            "use_frame_special_tokens": False,
            "per_frame_special_token": True,
        },
        "image": {
            "crop_mode": "overlap-and-resize-c2",
            "use_col_tokens": True,
            "max_crops": 4,
            "high_res_max_crops": 24,
            "pooling_w": 2,
            "pooling_h": 2,
            "overlap_margins": [1, 1],
            "max_images": 5,
            "max_multi_image_crops": 4,
            "multi_image_pooling_w": 2,
            "multi_image_pooling_h": 2,
            "use_single_crop_col_tokens": False,
            "use_single_crop_start_token": True,
        },
    },
    "bi_directional_attn": "image_tokens",
    "cp_enabled": False,
}


def native_section(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `model` section of a tiny model.

    Args:
        changes: Values by dotted path, such as {"llm.n_layers": 2}.
    """
    section = copy.deepcopy(MODEL_SECTION)
    for path, value in ({} if changes is None else changes).items():
        *parents, name = path.split(".")
        place = section
        for parent in parents:
            place = place[parent]
        place[name] = value
    return section


def native_shapes(section: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything the trainer would store for such a model."""
    llm, backbone = section["llm"], section["vision_backbone"]
    vit, width = backbone["vit"], llm["d_model"]
    query, key = llm["n_heads"] * llm["head_dim"], llm["n_kv_heads"] * llm["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(llm["n_layers"]):
        block = f"transformer.blocks.{layer}."
        if llm["attention_layer_norm"]:
            per_head = llm["attention_layer_norm_type"] == "qwen3"
            shapes[block + "k_norm.weight"] = (llm["head_dim"] if per_head else key,)
            shapes[block + "q_norm.weight"] = (llm["head_dim"] if per_head else query,)
        shapes[block + "attn_out.weight"] = (width, query)
        shapes[block + "ff_out.weight"] = (width, llm["mlp_hidden_size"] // 2)
        shapes[block + "attn_norm.weight"] = shapes[block + "ff_norm.weight"] = (width,)
        shapes[block + "att_proj.weight"] = (query + 2 * key, width)
        if llm["qkv_bias"]:
            shapes[block + "att_proj.bias"] = (query + 2 * key,)
        shapes[block + "ff_proj.weight"] = (llm["mlp_hidden_size"], width)
    rows = llm["vocab_size"] if llm["embedding_size"] is None else llm["embedding_size"]
    shapes["transformer.ln_f.weight"] = (width,)
    shapes["transformer.wte.embedding"] = (rows, width)
    shapes["transformer.wte.new_embedding"] = (llm["additional_vocab_size"], width)
    if not llm["weight_tying"]:
        shapes["transformer.ff_out.weight"] = (rows, width)
    return {**shapes, **_vision_shapes(backbone, vit, width, llm["mlp_hidden_size"] // 2)}


def _vision_shapes(backbone: Mapping, vit: Mapping, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    size, depth = vit["image_emb_dim"], vit["image_num_layers"]
    query, key = (vit["image_head_dim"] * vit[f"image_num_{name}"] for name in ("heads", "key_value_heads"))
    linear: dict[str, tuple[int, int]] = {"image_vit.patch_embedding": (size, vit["image_patch_size"] ** 2 * 3)}
    shapes: dict[str, tuple[int, ...]] = {"image_vit.positional_embedding": (vit["image_num_pos"], size)}
    stored = max(layer % depth for layer in backbone["vit_layers"]) + 1 if backbone["skip_unused_layers"] else depth
    for layer in range(stored):
        block = f"image_vit.transformer.resblocks.{layer}."
        linear |= {f"{block}attention.{name}": (key, size) for name in ("wk", "wv")}
        linear |= {f"{block}attention.wq": (query, size), f"{block}attention.wo": (size, query)}
        linear |= {f"{block}feed_forward.w1": (vit["image_mlp_dim"], size)}
        linear |= {f"{block}feed_forward.w2": (size, vit["image_mlp_dim"])}
        for norm in ("attention_norm", "ffn_norm"):
            shapes |= {f"{block}{norm}.weight": (size,), f"{block}{norm}.bias": (size,)}
    features = size * len(backbone["vit_layers"])
    linear |= {f"image_pooling_2d.{name}": (key, features) for name in ("wk", "wv")}
    linear |= {"image_pooling_2d.wq": (query, features), "image_pooling_2d.wo": (size, query)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"image_projector.{name}.weight": (hidden, size) for name in ("w1", "w3")}
    shapes["image_projector.w2.weight"] = (width, hidden)
    return {f"vision_backbone.{name}": shape for name, shape in shapes.items()}


def native_tensors(
    section: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Weights drawn from the seed, scaled so that signals keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in native_shapes(section).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name or "ln_f" in name:
            noise = noise * 0.2 if name.endswith("bias") else 1 + noise * 0.2
        elif "embedding" not in name or "patch_embedding" in name:
            noise = noise * (0.2 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)
        tensors[name] = noise.to(dtype)
    return tensors


def write_config(folder: Path, section: Mapping[str, Any]) -> None:
    """`config.yaml`, with some of the other sections a trainer writes."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"run_name": "made-up", "model": section, "seed": 6198, "optimizer": {"name": "adamw"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def write_unsharded(folder: Path, section: Mapping[str, Any], tensors: Tensors) -> Path:
    """A checkpoint directory with `model.pt`."""
    write_config(folder, section)
    torch.save(dict(tensors), folder / "model.pt")
    return folder


@dataclass
class ShardLayout:
    """How a sharded checkpoint is cut.

    Attributes:
        ranks: Each tensor is cut along dimension 0 into at most this many pieces; the last may be shorter.
        files_per_rank: Pieces of one rank are spread over this many files.
        has_optimizer: Store AdamW state beside the model.
        writer_module: Where the class that records a piece's place seems to come from.
        edit: Called with the metadata before it is written, to break it.
    """

    ranks: int = 2
    files_per_rank: int = 2
    has_optimizer: bool = False
    writer_module: str = "olmo.train.remote_filesystem"
    edit: Callable[[Metadata], None] = field(default=lambda _: None)


@contextmanager
def storage_info_class(module_name: str) -> Iterator[type]:
    """A class `_StorageInfo` that pickles as one of `module_name`."""
    if module_name in sys.modules or module_name.startswith("torch."):
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        yield _StorageInfo
        return
    created = [".".join(module_name.split(".")[:count]) for count in range(1, module_name.count(".") + 2)]
    namespace = {"__module__": module_name, "__init__": lambda self, *place: self.__dict__.update(_place(*place))}
    info = type("_StorageInfo", (), namespace)
    for name in created:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[module_name]._StorageInfo = info  # type: ignore[attr-defined]
    try:
        yield info
    finally:
        for name in created:
            del sys.modules[name]


def _place(relative_path: str, offset: int, length: int) -> dict[str, Any]:
    return {"relative_path": relative_path, "offset": offset, "length": length}


def row_slices(num_rows: int, ranks: int) -> list[tuple[int, int]]:
    """(first row, rows) of each rank's piece; ranks past the end hold none."""
    size = math.ceil(num_rows / ranks)
    return [(first, min(size, num_rows - first)) for first in range(0, num_rows, size)]


class ShardedWriter:
    """Writes pieces one by one, so that a checkpoint larger than memory can be made.

    with ShardedWriter(folder / "model_and_optim", layout) as writer:
        writer.add("model.x", shape, dtype, lambda first, rows: tensor[first : first + rows])
    """

    def __init__(self, folder: Path, layout: ShardLayout):
        self.folder, self.layout = folder, layout
        self.metadata = Metadata(state_dict_metadata={}, planner_data={}, storage_data={})
        self.metadata.storage_meta = StorageMeta(checkpoint_id="/runs/model_and_optim", save_id="0")
        self._turn = [0] * layout.ranks

    def __enter__(self) -> "ShardedWriter":
        self.folder.mkdir(parents=True)
        self._files = {
            (rank, number): open(self.folder / f"__{rank}_{number}.distcp", "wb")  # noqa: SIM115
            for rank in range(self.layout.ranks)
            for number in range(self.layout.files_per_rank)
        }
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files.values():
            file.close()
        with storage_info_class(self.layout.writer_module) as info:
            self.metadata.storage_data = {index: info(*place) for index, place in self.metadata.storage_data.items()}
            self.layout.edit(self.metadata)
            (self.folder / ".metadata").write_bytes(pickle.dumps(self.metadata, protocol=4))

    def _store(self, rank: int, value: Any) -> tuple[str, int, int]:
        stream = io.BytesIO()
        torch.save(value, stream)
        number = self._turn[rank] % self.layout.files_per_rank
        self._turn[rank] += 1
        file = self._files[rank, number]
        offset = file.tell()
        file.write(stream.getbuffer())
        return f"__{rank}_{number}.distcp", offset, stream.getbuffer().nbytes

    def add(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rows: Callable[[int, int], torch.Tensor]
    ) -> None:
        """One tensor, cut into pieces; `rows(first, number)` makes them."""
        chunks = []
        for rank, (first, number) in enumerate(row_slices(shape[0], self.layout.ranks)):
            offsets = torch.Size([first, *[0] * (len(shape) - 1)])
            chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([number, *shape[1:]])))
            place = self._store(rank, rows(first, number).clone())
            self.metadata.storage_data[MetadataIndex(name, offsets, len(chunks) - 1)] = place
        properties = TensorProperties(dtype=dtype)
        self.metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        self.metadata.planner_data[name] = ("model", name.partition(".")[2])

    def add_object(self, name: str, value: Any) -> None:
        """Something that is no tensor."""
        self.metadata.state_dict_metadata[name] = BytesStorageMetadata()
        self.metadata.storage_data[MetadataIndex(name)] = self._store(0, value)


def write_sharded(
    folder: Path, section: Mapping[str, Any], tensors: Tensors, layout: ShardLayout | None = None
) -> Path:
    """A checkpoint directory with `model_and_optim/`."""
    layout = ShardLayout() if layout is None else layout
    write_config(folder, section)
    (folder / "train").mkdir()
    (folder / "train" / "rank0.pt").write_bytes(b"never opened")
    with ShardedWriter(folder / "model_and_optim", layout) as writer:
        for name, tensor in tensors.items():
            slices = _slices_of(tensor)
            writer.add(f"model.{name}", tuple(tensor.shape), tensor.dtype, slices)
            if layout.has_optimizer:
                for moment in ("exp_avg", "exp_avg_sq"):
                    writer.add(f"optim.state.{name}.{moment}", tuple(tensor.shape), tensor.dtype, slices)
        if layout.has_optimizer:
            writer.add_object("optim.param_groups.0.lr", 1e-4)
    return folder


def _slices_of(tensor: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda first, rows: tensor[first : first + rows]


def write_base_tokenizer(folder: Path) -> Path:
    """The tokenizer of a base language model: 256 bytes and three chat tokens; no bos."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in chat])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
