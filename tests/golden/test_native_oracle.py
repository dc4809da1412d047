"""The native class of recent transformers releases as an independent oracle for numbers.

Random tiny checkpoints are written in published layout and loaded from the same folder by our class and, with
`trust_remote_code=False`, by the native one. That one always masks missing patches in pooling, needs norms of queries
and keys and a position table as large as the patch grid, and reads `mm_token_type_ids`: settings it lacks are left out
here and covered by the golden checkpoints.
"""

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from molmo2.model.attention.blockwise import BlockwiseMask
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from molmo2.model.vision_inputs import MediaGrids, flat_pooling
from support.checkpoints import fill_weights, read_json, write_checkpoint, write_json
from support.model_inputs import batch, real_tokens

pytestmark = pytest.mark.skipif("molmo2" not in CONFIG_MAPPING, reason="this release has no native Molmo2")

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


def write(folder, shape: str):
    """A checkpoint of this shape with what the native class needs."""
    write_checkpoint(folder, shape.split()[0], remote_code=False)
    config = read_json(folder / "config.json")
    for section, changes in SHAPES[shape].items():
        config[section].update(changes)
    config["adapter_config"]["pooling_attention_mask"] = True
    rows, cols = (side // 14 for side in config["vit_config"]["image_default_input_size"])
    config["vit_config"]["image_num_pos"] = rows * cols
    write_json(folder / "config.json", config)
    ours = Molmo2ForConditionalGeneration(Molmo2ForConditionalGeneration.config_class.from_pretrained(folder))
    fill_weights(ours, seed=len(shape))
    ours.save_pretrained(folder)
    write_json(folder / "config.json", config)  # the published spelling, not what saving makes of it
    return folder


def as_native(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs in the native class's terms: its name of the token types, pooling indices over all crops."""
    theirs = dict(inputs)
    theirs["mm_token_type_ids"] = theirs.pop("token_type_ids").long()
    patches = (98 // 14) ** 2
    if "image_grids" in inputs:
        tokens = MediaGrids(image_grids=inputs["image_grids"]).image_tokens()
        theirs["image_token_pooling"] = flat_pooling(
            inputs["image_token_pooling"], tokens, inputs["image_num_crops"], patches
        )
    return theirs


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "blockwise"])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_logits_from_the_same_folder(tmp_path, shape, implementation, monkeypatch):
    folder = write(tmp_path, shape)
    if implementation == "blockwise":
        monkeypatch.setattr(BlockwiseMask, "queries_per_block", 7)
        implementation = "sdpa"
    options = {"attn_implementation": implementation, "dtype": torch.float32}
    ours = Molmo2ForConditionalGeneration.from_pretrained(folder, **options).eval()
    native = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False, **options).eval()
    assert type(native).__module__.startswith("transformers.models.molmo2")
    for names in (["text"], ["image"], ["video"], ["text", "image", "two images"], ["text", "video"]):
        inputs = batch(*names)
        with torch.no_grad():
            expected, found = native(**as_native(inputs)).logits, ours(**inputs).logits
        assert 0.5 < expected.std() < 10
        for a, b in zip(real_tokens(expected, inputs), real_tokens(found, inputs), strict=True):
            torch.testing.assert_close(b, a, atol=5e-5, rtol=0)


def test_what_we_save_loads_in_the_native_class(tmp_path):
    ours = Molmo2ForConditionalGeneration.from_pretrained(write(tmp_path / "a", "olmo3")).eval()
    ours.save_pretrained(tmp_path / "b")
    native, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "b", trust_remote_code=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = batch("text")
    with torch.no_grad():
        expected = ours(**inputs).logits
        inputs.pop("token_type_ids")
        torch.testing.assert_close(native.eval()(**inputs).logits, expected, atol=5e-5, rtol=0)


def test_what_the_native_class_saves_loads_here(tmp_path):
    native = AutoModelForImageTextToText.from_pretrained(
        write(tmp_path / "a", "olmo3"), trust_remote_code=False
    ).eval()
    native.save_pretrained(tmp_path / "b")
    config = Molmo2ForConditionalGeneration.config_class.from_pretrained(tmp_path / "b")
    original = Molmo2ForConditionalGeneration.config_class.from_pretrained(tmp_path / "a")
    for part in (config.text_config, original.text_config):
        part.dtype = None  # the native class repeats it in every part
    assert config.text_config == original.text_config
    assert config.image_col_id == original.image_col_id
    assert config.vit_config.image_default_input_size == original.vit_config.image_default_input_size
