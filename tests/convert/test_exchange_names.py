"""Names in GGUF and MLX: every tensor of a model goes somewhere, once, and comes back.

gguf and mlx-vlm themselves know them in tests/clients/test_tools.py (`make test-tools`).
"""

import json
import math

import pytest

from molmo2.convert.errors import UnsupportedError
from molmo2.convert.exchange_names import as_json, exchange_patterns, exchange_rows, target_of
from molmo2.convert.names import expected_renames
from molmo2.convert.native_config import parse_config
from support.native_checkpoints import native_section

AFTER = {"llm": {"norm_after": True, "attention_layer_norm_type": "olmo"}}


def config_of(changes=None):
    section = native_section()
    for part, values in (changes or {}).items():
        section[part].update(values)
    return parse_config(section)


@pytest.mark.parametrize(("format", "changes"), [("mlx", None), ("gguf", None), ("gguf", AFTER)])
def test_every_tensor_goes_to_one_place_and_back(format, changes):
    config = config_of(changes)
    rows = exchange_rows(format, config)
    shapes = {rename.target: rename.shape for rename in expected_renames(config)}
    assert sorted(name for row in rows for name in row.targets) == sorted(shapes)
    foreign = [name for row in rows for name in row.foreign]
    assert len(foreign) == len(set(foreign))
    patterns = exchange_patterns(format, norm_after=config.llm["norm_after"])
    for row in rows:
        if row.operation == "split_rows":
            assert sum(row.rows) == shapes[row.targets[0]][0]
        elif row.operation == "join_rows":
            assert [shapes[name][0] for name in row.targets] == list(row.rows)
        elif row.operation == "columns_to_convolution":
            assert math.isqrt(shapes[row.targets[0]][1] // 3) == config.vit["image_patch_size"]
        for name in row.foreign:
            assert target_of(name, rows) == row
            assert target_of(name, patterns).targets == row.targets


def test_the_order_of_fused_rows():
    """As names.py has it: queries, keys, values; what is gated before its gate."""
    rows = {row.targets[0]: row for row in exchange_rows("gguf", config_of())}
    fused = rows["model.transformer.blocks.2.self_attn.att_proj.weight"]
    assert fused.foreign == ("blk.2.attn_q.weight", "blk.2.attn_k.weight", "blk.2.attn_v.weight")
    assert fused.rows == (48, 24, 24)
    assert rows["model.transformer.blocks.0.mlp.ff_proj.weight"].foreign == (
        "blk.0.ffn_up.weight",
        "blk.0.ffn_gate.weight",
    )


def test_what_has_no_name():
    with pytest.raises(UnsupportedError, match="norms after"):
        exchange_rows("mlx", config_of(AFTER))
    with pytest.raises(UnsupportedError, match="always norms the queries and keys of each head"):
        exchange_rows("mlx", config_of({"llm": {"attention_layer_norm": False}}))
    with pytest.raises(UnsupportedError, match=r"'blk\.0\.attn_qkv\.weight' is none of the names"):
        target_of("blk.0.attn_qkv.weight", exchange_patterns("gguf"))
    with pytest.raises(ValueError, match="expected one of gguf, mlx"):
        exchange_patterns("onnx")


def test_the_table_for_machines():
    tables = json.loads(json.dumps(as_json("gguf")))["architectures"]
    assert list(tables) == ["qwen3", "olmo2"]
    assert all(set(row) == {"targets", "foreign", "operation", "rows"} for table in tables.values() for row in table)
