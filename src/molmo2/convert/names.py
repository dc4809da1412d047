"""Native and converted tensor names: one table for both directions.

Values are never split, transposed or reordered, so a conversion is a renaming. `{}` stands for a layer's number.
Shapes are written in the names of `dimensions`. The order is that of the converted model's modules: it decides which
tensor goes into which shard.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from molmo2.convert.errors import UnsupportedError, listing
from molmo2.convert.native_config import NativeConfig

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # whole segments only: "w1" keeps its digit
VIT_LAYERS = "vision_backbone.image_vit.transformer.resblocks."


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        native: Name pattern in the trainer's checkpoint.
        target: Name pattern in the converted model.
        shape: Names of dimensions, separated by spaces.
        when: The switch that must be on for the tensor to exist; see `switches`.
    """

    native: str
    target: str
    shape: str
    when: str = "always"


def _text(name: str, target: str, shape: str, when: str = "always") -> Row:
    return Row(f"transformer.blocks.{{}}.{name}", f"model.transformer.blocks.{{}}.{target}{name}", shape, when)


def _vision(name: str, shape: str) -> Row:
    return Row(f"vision_backbone.{name}", f"model.vision_backbone.{name}", shape)


def _with_bias(name: str, rows: str, columns: str) -> tuple[Row, Row]:
    return _vision(f"{name}.weight", f"{rows} {columns}"), _vision(f"{name}.bias", rows)


TABLE: tuple[Row, ...] = (
    Row("transformer.wte.embedding", "model.transformer.wte.embedding", "vocab hidden"),
    Row("transformer.wte.new_embedding", "model.transformer.wte.new_embedding", "extra_vocab hidden"),
    _text("att_proj.weight", "self_attn.", "qkv hidden"),  # rows: queries, keys, values
    _text("att_proj.bias", "self_attn.", "qkv", when="qkv_bias"),
    _text("attn_out.weight", "self_attn.", "hidden query"),
    _text("q_norm.weight", "self_attn.", "query_norm", when="qk_norm"),
    _text("k_norm.weight", "self_attn.", "key_norm", when="qk_norm"),
    _text("attn_norm.weight", "", "hidden"),
    _text("ff_proj.weight", "mlp.", "fused_mlp hidden"),  # rows: up, gate
    _text("ff_out.weight", "mlp.", "hidden mlp"),
    _text("ff_norm.weight", "", "hidden"),
    Row("transformer.ln_f.weight", "model.transformer.ln_f.weight", "hidden"),
    _vision("image_vit.positional_embedding", "vit_positions vit"),
    *_with_bias("image_vit.patch_embedding", "vit", "patch_pixels"),
    *_with_bias("image_vit.transformer.resblocks.{}.attention.wq", "vit_query", "vit"),
    *_with_bias("image_vit.transformer.resblocks.{}.attention.wk", "vit_key", "vit"),
    *_with_bias("image_vit.transformer.resblocks.{}.attention.wv", "vit_key", "vit"),
    *_with_bias("image_vit.transformer.resblocks.{}.attention.wo", "vit", "vit_query"),
    *_with_bias("image_vit.transformer.resblocks.{}.feed_forward.w1", "vit_mlp", "vit"),
    *_with_bias("image_vit.transformer.resblocks.{}.feed_forward.w2", "vit", "vit_mlp"),
    _vision("image_vit.transformer.resblocks.{}.attention_norm.weight", "vit"),
    _vision("image_vit.transformer.resblocks.{}.attention_norm.bias", "vit"),
    _vision("image_vit.transformer.resblocks.{}.ffn_norm.weight", "vit"),
    _vision("image_vit.transformer.resblocks.{}.ffn_norm.bias", "vit"),
    *_with_bias("image_pooling_2d.wq", "vit_query", "vit_features"),
    *_with_bias("image_pooling_2d.wk", "vit_key", "vit_features"),
    *_with_bias("image_pooling_2d.wv", "vit_key", "vit_features"),
    *_with_bias("image_pooling_2d.wo", "vit", "vit_query"),
    _vision("image_projector.w1.weight", "mlp vit"),
    _vision("image_projector.w2.weight", "hidden mlp"),
    _vision("image_projector.w3.weight", "mlp vit"),
    Row("transformer.ff_out.weight", "lm_head.weight", "vocab hidden", when="untied"),
    # Tied: the trainer stores no output matrix; the target gets a copy of the base rows.
    Row("transformer.wte.embedding", "lm_head.weight", "vocab hidden", when="tied"),
)


@dataclass(frozen=True)
class Rename:
    """One tensor of the converted model and its native name."""

    native: str
    target: str
    shape: tuple[int, ...]


def dimensions(config: NativeConfig) -> dict[str, int]:
    """The sizes that the table's shapes are written in."""
    llm, vit = config.llm, config.vit
    query, key = llm["n_heads"] * config.head_dim, config.num_kv_heads * config.head_dim
    is_per_head = llm["attention_layer_norm_type"] == "qwen3"
    return {
        "hidden": llm["d_model"],
        "vocab": config.embedding_rows,
        "extra_vocab": llm["additional_vocab_size"],
        "query": query,
        "key": key,
        "qkv": query + 2 * key,
        "query_norm": config.head_dim if is_per_head else query,
        "key_norm": config.head_dim if is_per_head else key,
        "fused_mlp": config.fused_mlp_size,
        "mlp": config.fused_mlp_size // 2,
        "vit": vit["image_emb_dim"],
        "vit_query": vit["image_num_heads"] * vit["image_head_dim"],
        "vit_key": vit["image_num_key_value_heads"] * vit["image_head_dim"],
        "vit_mlp": vit["image_mlp_dim"],
        "vit_positions": vit["image_num_pos"],
        "vit_features": vit["image_emb_dim"] * len(config.backbone["vit_layers"]),
        "patch_pixels": vit["image_patch_size"] ** 2 * 3,
    }


def switches(config: NativeConfig) -> set[str]:
    """The conditions of the table that hold for this model."""
    is_tied = config.llm["weight_tying"]
    found = {"always", "tied" if is_tied else "untied"}
    found |= {"qkv_bias"} if config.llm["qkv_bias"] else set()
    found |= {"qk_norm"} if config.llm["attention_layer_norm"] else set()
    return found


def ensure_layers(config: NativeConfig, num_tensors: int) -> None:
    """Compare numbers of layers with the number of tensors there are, before anything is made for each layer.

    Raises:
        UnsupportedError: If there are more layers than tensors.
    """
    layers = {"llm.n_layers": config.llm["n_layers"], "vision_backbone.vit_layers": config.num_vit_layers}
    problems = [
        f"{name} asks for {number} layers, but there are {num_tensors} tensors in all"
        for name, number in layers.items()
        if number > num_tensors
    ]
    if problems:
        raise UnsupportedError(f"The tensors do not fit `config.yaml`:\n{listing(problems)}")


def expected_renames(config: NativeConfig) -> list[Rename]:
    """All tensors of the converted model, in module order."""
    sizes, on = dimensions(config), switches(config)
    rows = [row for row in TABLE if row.when in on]
    renames: list[Rename] = []
    position = 0
    while position < len(rows):
        prefix = _layer_prefix(rows[position])
        end = position + 1
        while prefix and end < len(rows) and _layer_prefix(rows[end]) == prefix:
            end += 1
        layers = {"": 1, VIT_LAYERS: config.num_vit_layers}.get(prefix, config.llm["n_layers"])
        for layer in range(layers):
            for row in rows[position:end]:
                shape = tuple(sizes[name] for name in row.shape.split())
                renames.append(Rename(row.native.format(layer), row.target.format(layer), shape))
        position = end
    return renames


def _layer_prefix(row: Row) -> str:
    return row.native[: row.native.index("{}")] if "{}" in row.native else ""


def match(found: Mapping[str, tuple[int, ...]], config: NativeConfig) -> list[Rename]:
    """Pair the tensors of a checkpoint with those of the converted model.

    Args:
        found: Native name -> shape.
    Returns:
        One entry per tensor of the converted model, in module order.
    Raises:
        UnsupportedError: If names or shapes differ from what the configuration says; all differences in one message.
    """
    ensure_layers(config, len(found))
    renames = expected_renames(config)
    wanted = {rename.native: rename.shape for rename in renames}
    problems = [f"'{name}' is missing; expected shape {shape}" for name, shape in wanted.items() if name not in found]
    for name, shape in found.items():
        if name in wanted:
            if shape != wanted[name]:
                problems.append(f"'{name}' has shape {shape}; the configuration makes it {wanted[name]}")
        elif not _is_dropped(name, config):
            problems.append(f"'{name}' of shape {shape} is unknown to a model of this configuration")
    if problems:
        raise UnsupportedError(f"The tensors do not fit `config.yaml`:\n{listing(problems)}")
    return renames


def _is_dropped(name: str, config: NativeConfig) -> bool:
    """Layers of the vision transformer past the deepest one that is used: stored by some runs, needed by none."""
    layer = LAYER_NUMBER.search(name)
    if layer is not None and len(layer.group()) > 9:
        return False
    known = {row.native for row in TABLE}
    if not name.startswith(VIT_LAYERS) or layer is None or LAYER_NUMBER.sub("{}", name) not in known:
        return False
    return config.num_vit_layers <= int(layer.group()) < config.vit["image_num_layers"]
