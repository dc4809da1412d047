"""The native class of recent transformers releases as an independent oracle for numbers.

Random tiny checkpoints are written in published layout and loaded from the same folder by our class and, with
`trust_remote_code=False`, by the native one.
"""

import gc
import importlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from molmo2 import library_inputs, media_features
from molmo2.training import DataCollator
from support.checkpoints import make_image
from support.generated import generated
from support.model_inputs import batch, processor, real_tokens
from support.native_oracle import SHAPES, write_native

modeling = generated("modeling_molmo2")
Molmo2ForConditionalGeneration = modeling.Molmo2ForConditionalGeneration
processor_module, features_module = (generated(f"{part}processing_molmo2") for part in ("", "image_"))
pytestmark = pytest.mark.skipif("molmo2" not in CONFIG_MAPPING, reason="this release has no native Molmo2")


def load_model_tensors(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


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
    for names in (["text"], ["image"], ["two images"], ["video"], ["text", "image", "two images"], ["text", "video"]):
        inputs = batch(*names)
        with torch.no_grad():
            expected, found = native(**library_inputs(inputs)).logits, ours(**inputs).logits
            if shape == "qwen3":  # ours reads both forms
                assert torch.equal(ours(**library_inputs(inputs)).logits, found)
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


def test_the_processor_warns_where_there_is_a_native_model(tmp_path, monkeypatch):
    """What is wrong without an error there: one image causally, several with patches of each other."""
    folder = write_native(tmp_path, "qwen3")
    said = []
    for module in (features_module, media_features):  # that of the generated files and that of the package
        monkeypatch.setattr(module.logger, "warning_once", said.append)
        monkeypatch.setattr(module, "_num_references", 0)
    importlib.import_module(media_features.LIBRARY_MODEL)  # as transformers does while it loads remote code
    gc.collect()  # native models of earlier tests
    own = processor_module.Molmo2Processor.from_pretrained(folder)
    content = [{"type": "image", "image": make_image()}, {"type": "text", "text": "What is this?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A boat."}]}
    collate = DataCollator(processor())
    inputs = own(images=[make_image()], text="<|image|>", return_tensors="pt")
    collate([{"messages": [{"role": "user", "content": content}, answer]}])
    assert not said  # nothing was made of that class
    native = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    dict(**own(text="no image"))
    collate([{"messages": [{"role": "user", "content": content[1:]}, answer]}])
    assert not said
    dict(**inputs)  # as a call of the model
    assert said == [features_module.LIBRARY_MODEL_WARNING]
    with pytest.raises(ValueError, match=r"not used by the model: \['token_type_ids'"):
        native.generate(**inputs, max_new_tokens=2)
    assert native.generate(**library_inputs(inputs), max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    said.clear()
    batch = collate([{"messages": [{"role": "user", "content": content}, answer]}])  # would be read as wrongly
    assert said == [media_features.LIBRARY_MODEL_WARNING]
    assert library_inputs(batch)["labels"] is batch["labels"]


def test_a_native_model_is_searched_for_when_there_may_be_another(monkeypatch):
    library = importlib.import_module(media_features.LIBRARY_MODEL)
    searches, said, objects = [], [], []
    monkeypatch.setattr(media_features, "gc", SimpleNamespace(get_objects=lambda: searches.append(1) or objects))
    monkeypatch.setattr(media_features.logger, "warning_once", said.append)
    monkeypatch.setattr(media_features, "_num_references", 0)

    def num_searches():
        for _ in range(3):
            media_features.warn_about_library_model(["image_grids", "token_type_ids"])
        return len(searches)

    def make():
        return library.Molmo2PreTrainedModel.__new__(library.Molmo2PreTrainedModel)

    assert num_searches() == 1
    parts = [make()]
    assert num_searches() == 2
    assert not said
    objects += parts
    parts.append(make())
    assert num_searches() == 3
    assert len(said) == 1
    parts.append(make())
    assert num_searches() == 3  # it has been said


def test_several_videos(tmp_path):
    """Pooling indices of a later video count the frames of those before it."""
    folder = write_native(tmp_path, "qwen3")
    ours = Molmo2ForConditionalGeneration.from_pretrained(folder).eval()
    native = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False).eval()
    inputs = batch("two videos", "video")
    given = library_inputs(inputs)
    assert not torch.equal(given["video_token_pooling"], inputs["video_token_pooling"])
    with torch.no_grad():
        expected, found = native(**given).logits, ours(**inputs).logits
        assert torch.equal(ours(**given).logits, found)
    for a, b in zip(real_tokens(expected, inputs), real_tokens(found, inputs), strict=True):
        torch.testing.assert_close(b, a, atol=5e-5, rtol=0)


def test_added_tokens_travel_between_the_classes(tmp_path):
    """A resized model, whose tables are one: from here to the library's class and back, with equal logits."""
    ours = Molmo2ForConditionalGeneration.from_pretrained(write_native(tmp_path / "a", "qwen3")).eval()
    rows = ours.get_input_embeddings().num_embeddings + 3
    ours.resize_token_embeddings(rows)
    ours.save_pretrained(tmp_path / "b")
    native, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "b", trust_remote_code=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = batch("image", "text")
    inputs["input_ids"][:, -1] = rows - 1
    native.eval().save_pretrained(tmp_path / "c")
    back = Molmo2ForConditionalGeneration.from_pretrained(tmp_path / "c").eval()
    with torch.no_grad():
        expected = ours(**inputs).logits
        found = native(**library_inputs(inputs)).logits
        assert torch.equal(back(**inputs).logits, expected)
    assert expected.shape[-1] == rows
    for a, b in zip(real_tokens(expected, inputs), real_tokens(found, inputs), strict=True):
        torch.testing.assert_close(b, a, atol=5e-5, rtol=0)


def test_inputs_that_the_native_class_cannot_take_are_refused():
    with pytest.raises(ValueError, match="takes images or videos in one call, not both"):
        library_inputs(batch("image and video"))
    with pytest.raises(ValueError, match=r"'input_ids'.*are not tensors\. Call the processor with `return_tensors="):
        library_inputs({"input_ids": [[1, 2]]})
    with pytest.raises(ValueError, match=r"are not tensors"):
        library_inputs({name: value.numpy() for name, value in batch("image").items()})
    with pytest.raises(ValueError, match=r"\['video_features'\] are of this package's model.*without `frame_encoder`"):
        library_inputs({**batch("text"), "video_features": torch.zeros(3, 4)})


def test_what_the_native_class_saves_loads_here(tmp_path):
    native = AutoModelForImageTextToText.from_pretrained(
        write_native(tmp_path / "a", "olmo3"), trust_remote_code=False
    ).eval()
    native.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    pieces = load_model_tensors(tmp_path / "b")
    assert pieces["model.transformer.wte.embedding"].shape == (576, 40)  # not 1024: cut into halves
    model, report = Molmo2ForConditionalGeneration.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    expected = Molmo2ForConditionalGeneration.from_pretrained(tmp_path / "a").state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    config = Molmo2ForConditionalGeneration.config_class.from_pretrained(tmp_path / "b")
    original = Molmo2ForConditionalGeneration.config_class.from_pretrained(tmp_path / "a")
    for part in (config.text_config, original.text_config):
        part.dtype = None  # the native class repeats it in every part
    assert config.text_config == original.text_config
    assert config.image_col_id == original.image_col_id
    assert config.vit_config.image_default_input_size == original.vit_config.image_default_input_size
