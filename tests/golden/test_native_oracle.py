"""The native class of recent transformers releases as an independent oracle for numbers.

Random tiny checkpoints are written in published layout and loaded from the same folder by our class and, with
`trust_remote_code=False`, by the native one.
"""

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.generated import generated
from support.model_inputs import batch, real_tokens
from support.native_oracle import SHAPES, as_native, write_native

modeling = generated("modeling_molmo2")
Molmo2ForConditionalGeneration = modeling.Molmo2ForConditionalGeneration
pytestmark = pytest.mark.skipif("molmo2" not in CONFIG_MAPPING, reason="this release has no native Molmo2")


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "blockwise"])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_logits_from_the_same_folder(tmp_path, shape, implementation, monkeypatch):
    folder = write_native(tmp_path, shape)
    if implementation == "blockwise":
        monkeypatch.setattr(modeling.BlockwiseMask, "queries_per_block", 7)
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
    ours = Molmo2ForConditionalGeneration.from_pretrained(write_native(tmp_path / "a", "olmo3")).eval()
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
        write_native(tmp_path / "a", "olmo3"), trust_remote_code=False
    ).eval()
    native.save_pretrained(tmp_path / "b")
    config = Molmo2ForConditionalGeneration.config_class.from_pretrained(tmp_path / "b")
    original = Molmo2ForConditionalGeneration.config_class.from_pretrained(tmp_path / "a")
    for part in (config.text_config, original.text_config):
        part.dtype = None  # the native class repeats it in every part
    assert config.text_config == original.text_config
    assert config.image_col_id == original.image_col_id
    assert config.vit_config.image_default_input_size == original.vit_config.image_default_input_size
