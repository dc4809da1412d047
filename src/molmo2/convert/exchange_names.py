"""Tensor names of GGUF and MLX for converted models, both ways and as JSON.

    python -m molmo2.convert.exchange_names gguf > names.json
    exchange_rows("mlx", config)        # one row per tensor of a model, with its operation
    target_of("blk.3.attn_q.weight", exchange_patterns("gguf"))     # the way back: its row, with the names here

MLX (package mlx-vlm) renames. GGUF has no architecture for Molmo2: text tensors have the names of its architectures
`qwen3` (norms before) and `olmo2` (norms after), vision ones those of its projector files; the attention pooling takes
the names of a resampler. The tables say where each value goes, not that an engine computes Molmo2 from it.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from molmo2.convert.errors import UnsupportedError
from molmo2.convert.names import LAYER_NUMBER, TABLE, dimensions, expected_renames
from molmo2.convert.native_config import NativeConfig

FORMATS = ("gguf", "mlx")
FOREIGN_LAYER = re.compile(r"(?<=blk\.)\d+(?=\.)|(?<=blocks\.)\d+(?=\.)|(?<=image_vit\.transformer\.)\d+(?=\.)")
# Operations on the way out; `join`, `split` and the order of columns have inverses.
RENAME, SPLIT, JOIN, CONVOLUTION = "rename", "split_rows", "join_rows", "columns_to_convolution"


@dataclass(frozen=True)
class ExchangeRow:
    """What becomes of some tensors of a converted model.

    Attributes:
        targets: Their names in the converted model; `{}` stands for a layer's number.
        foreign: Names in the other format, in the order of the rows.
        operation: "rename"; "split_rows" of one tensor at the sizes in `rows`; "join_rows" of several, one after the
            other; "columns_to_convolution": (D, patch * patch * 3) with columns by row, column, channel becomes
            (D, 3, patch, patch).
        rows: For "split_rows" and "join_rows": names of dimensions (see `names.dimensions`) in patterns, numbers of
            rows in the rows of a model.
    """

    targets: tuple[str, ...]
    foreign: tuple[str, ...]
    operation: str = RENAME
    rows: tuple[str | int, ...] = ()


TEXT, VIT = "model.transformer.blocks.{}.", "model.vision_backbone.image_vit.transformer.resblocks.{}."
POOLING, PROJECTOR = "model.vision_backbone.image_pooling_2d.", "model.vision_backbone.image_projector."
GGUF_NORMS = {
    False: {"attn_norm": "attn_norm", "ff_norm": "ffn_norm"},
    True: {"attn_norm": "post_attention_norm", "ff_norm": "post_ffw_norm"},
}
GGUF_VIT = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_out",
    "feed_forward.w1": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "attention_norm": "ln1",
    "ffn_norm": "ln2",
}
# w1 is the gate, w3 what it multiplies, w2 the way out.
GGUF_PROJECTOR = {"w1": "mm.gate", "w3": "mm.up", "w2": "mm.down"}


def _gguf(norm_after: bool) -> list[ExchangeRow]:
    wte = "model.transformer.wte."
    rows = [
        ExchangeRow(
            (f"{wte}embedding", f"{wte}new_embedding"), ("token_embd.weight",), JOIN, ("vocab", "extra_vocab")
        ),
        ExchangeRow(("model.transformer.ln_f.weight",), ("output_norm.weight",)),
        ExchangeRow(("lm_head.weight",), ("output.weight",)),
        ExchangeRow((f"{TEXT}self_attn.attn_out.weight",), ("blk.{}.attn_output.weight",)),
        ExchangeRow((f"{TEXT}mlp.ff_out.weight",), ("blk.{}.ffn_down.weight",)),
        ExchangeRow(
            (f"{TEXT}mlp.ff_proj.weight",), ("blk.{}.ffn_up.weight", "blk.{}.ffn_gate.weight"), SPLIT, ("mlp", "mlp")
        ),
    ]
    for kind in ("weight", "bias"):
        heads = tuple(f"blk.{{}}.attn_{part}.{kind}" for part in "qkv")
        rows.append(ExchangeRow((f"{TEXT}self_attn.att_proj.{kind}",), heads, SPLIT, ("query", "key", "key")))
    rows += [ExchangeRow((f"{TEXT}self_attn.{p}_norm.weight",), (f"blk.{{}}.attn_{p}_norm.weight",)) for p in "qk"]
    rows += [
        ExchangeRow((f"{TEXT}{own}.weight",), (f"blk.{{}}.{name}.weight",))
        for own, name in GGUF_NORMS[norm_after].items()
    ]
    image = "model.vision_backbone.image_vit."
    rows += [
        ExchangeRow((f"{image}positional_embedding",), ("v.position_embd.weight",)),
        ExchangeRow((f"{image}patch_embedding.weight",), ("v.patch_embd.weight",), CONVOLUTION),
        ExchangeRow((f"{image}patch_embedding.bias",), ("v.patch_embd.bias",)),
    ]
    for kind in ("weight", "bias"):
        rows += [ExchangeRow((f"{VIT}{o}.{kind}",), (f"v.blk.{{}}.{n}.{kind}",)) for o, n in GGUF_VIT.items()]
        rows += [
            ExchangeRow((f"{POOLING}w{own}.{kind}",), (f"resampler.attn.{name}.{kind}",))
            for own, name in zip("qkvo", ("q", "k", "v", "out"), strict=True)
        ]
    rows += [ExchangeRow((f"{PROJECTOR}{o}.weight",), (f"{n}.weight",)) for o, n in GGUF_PROJECTOR.items()]
    return rows


def _mlx_name(target: str) -> str:
    name = re.sub(r"^model\.transformer\.", "language_model.model.", target)
    name = re.sub(r"^model\.vision_backbone\.", "vision_tower.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return name.replace(".transformer.resblocks.", ".transformer.")


def exchange_patterns(format: str, *, norm_after: bool = False) -> list[ExchangeRow]:
    """The whole table of a format; rows for tensors that a model lacks (biases, head norms) are in it.

    Args:
        format: "gguf" or "mlx".
        norm_after: Whether norms follow attention and feed-forward, as in Molmo2-O-7B.

    Raises:
        ValueError: the format is none of the two.
        UnsupportedError: mlx-vlm's Molmo2 has norms before only.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}.")
    if format == "gguf":
        return _gguf(norm_after)
    if norm_after:
        raise UnsupportedError(
            "mlx-vlm's Molmo2 norms before attention and feed-forward, each head for itself; this model norms after "
            "them. It would load there and compute something else."
        )
    return [ExchangeRow((name,), (_mlx_name(name),)) for name in dict.fromkeys(row.target for row in TABLE)]


def exchange_rows(format: str, config: NativeConfig) -> list[ExchangeRow]:
    """The rows of one model, with layers and numbers of rows filled in; each of its tensors is in exactly one.

    Raises:
        UnsupportedError: see `exchange_patterns`; also where MLX lacks what the model has.
    """
    llm = config.llm
    per_head = llm["attention_layer_norm"] and llm["attention_layer_norm_type"] == "qwen3"
    if format == "mlx" and not llm["norm_after"] and not per_head:
        raise UnsupportedError("mlx-vlm's Molmo2 always norms the queries and keys of each head; this model does not.")
    sizes = dimensions(config)
    patterns = {row.targets[0]: row for row in exchange_patterns(format, norm_after=llm["norm_after"])}
    found = []
    for target in dict.fromkeys(rename.target for rename in expected_renames(config)):
        row = patterns.get(LAYER_NUMBER.sub("{}", target))
        if row is None:  # the second tensor of a joined one
            continue
        rows = tuple(sizes[str(name)] for name in row.rows)
        found.append(replace(_filled(row, LAYER_NUMBER.findall(target)), rows=rows))
    return found


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that mlx-vlm reads as it is meant: depth and layers of the vision transformer as stored.

    mlx-vlm 0.7.10 takes every depth above 25 for 25 and counts negative `vit_layers` from there, so that [-3, -9] of
    the 27 published layers become 22 and 16 in the place of 24 and 18. Here layers are not negative, and the depth is
    the number of layers in the folder; for transformers both mean the same.
    """
    depth = config["vit_config"]["num_hidden_layers"]
    layers = [layer % depth for layer in config["adapter_config"]["vit_layers"]]
    return {
        **config,
        "vit_config": {**config["vit_config"], "num_hidden_layers": max(layers) + 1},
        "adapter_config": {**config["adapter_config"], "vit_layers": layers},
    }


def target_of(foreign: str, rows: Iterable[ExchangeRow]) -> ExchangeRow:
    """The row that a tensor of the other format comes from, among patterns or the rows of a model.

    Raises:
        UnsupportedError: there is none.
    """
    numbers = FOREIGN_LAYER.findall(foreign)
    for row in rows:
        filled = _filled(row, numbers)
        if foreign in filled.foreign:
            return filled
    raise UnsupportedError(f"'{foreign}' is none of the names of this format.")


def _filled(row: ExchangeRow, numbers: Sequence[str]) -> ExchangeRow:
    """The row of one layer; those without a place for its number stay as they are."""
    if not numbers:
        return row
    targets, foreign = (tuple(name.format(*numbers) for name in names) for names in (row.targets, row.foreign))
    return replace(row, targets=targets, foreign=foreign)


def as_json(format: str) -> dict[str, Any]:
    """The table for machines: patterns, and for GGUF the architecture that they belong to."""
    by_norm: Mapping[str, bool] = {"qwen3": False, "olmo2": True} if format == "gguf" else {"molmo2": False}
    tables = {
        name: [asdict(row) for row in exchange_patterns(format, norm_after=after)] for name, after in by_norm.items()
    }
    return {"format": format, "architectures": tables}


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in FORMATS:
        sys.exit(f"usage: python -m molmo2.convert.exchange_names {{{','.join(FORMATS)}}}")
    print(json.dumps(as_json(sys.argv[1]), indent=1))
