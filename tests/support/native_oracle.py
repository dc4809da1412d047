"""Random tiny checkpoints that the native class of recent releases reads too, and its terms for model inputs.

That class always masks missing patches in pooling, needs norms of queries and keys and a position table as large as
the patch grid, and reads `mm_token_type_ids`: settings it lacks are left out here and covered by the golden
checkpoints.
"""

from pathlib import Path

from support.checkpoints import fill_weights, read_json, write_checkpoint, write_json
from support.generated import generated

SHAPES = {
    "qwen3": {},
    "qwen3 one layer of the vision tower": {"adapter_config": {"vit_layers": [-2]}},
    "qwen3 wide heads": {"text_config": {"head_dim": 26, "num_attention_heads": 3, "num_key_value_heads": 1}},
    "qwen3 bias": {"text_config": {"qkv_bias": True}},
    "qwen3 grouped vision heads": {"text_config": {"num_hidden_layers": 1, "intermediate_size": 30}},
    "olmo3": {},
    "olmo3 all layers scaled": {"text_config": {"rope_scaling_layers": None}},
    "olmo3 linear": {"text_config": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}},
    "olmo3 norms before": {"text_config": {"norm_after": False}},
}


def write_native(folder: Path, shape: str) -> Path:
    """A checkpoint of this shape with what the native class needs."""
    write_checkpoint(folder, shape.split()[0], remote_code=False)
    config = read_json(folder / "config.json")
    for section, changes in SHAPES[shape].items():
        config[section].update(changes)
    config["adapter_config"]["pooling_attention_mask"] = True
    rows, cols = (side // 14 for side in config["vit_config"]["image_default_input_size"])
    config["vit_config"]["image_num_pos"] = rows * cols
    write_json(folder / "config.json", config)
    ours_class = generated("modeling_molmo2").Molmo2ForConditionalGeneration
    ours = ours_class(ours_class.config_class.from_pretrained(folder))
    fill_weights(ours, seed=len(shape))
    ours.save_pretrained(folder)
    write_json(folder / "config.json", config)  # the published spelling, not what saving makes of it
    return folder
