"""What is saved or uploaded is a complete checkpoint, the same on every transformers, and readable by all of them."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from molmo2.processing.processor import Molmo2Processor
from molmo2.video.processing import Molmo2VideoProcessor
from support.checkpoints import (
    AUTO_MAP,
    DATA,
    FAMILIES,
    REPOSITORY,
    TOKENIZER,
    build_model,
    copy_remote_code,
    image_messages,
    module_cache,
    read_json,
    tiny_config,
    write_checkpoint,
    write_json,
    write_processor,
)
from support.fake_hub import fake_hub
from support.fresh_process import run

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
# Written by `record_saved.py`, without the files that hold the vocabulary or the template.
SAVED_ELSEWHERE = sorted(DATA.glob("saved_by_*"))
TEXTS = ("Hello  wörld\n\n 12345 x", "<|im_end|>|<EXTRA_TOKENS_3>| <im_patch>ab ", "日本語 café ½ 🙂", "")


@pytest.fixture(scope="module", autouse=True)
def own_module_cache(tmp_path_factory):
    with module_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes the checkpoint of a family, once."""
    parent = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: write_checkpoint(parent / family, family))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, checkpoint):
    """Loads the checkpoint of a family and saves it again, once."""

    @functools.cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp("saved") / family
        load_model(checkpoint(family)).save_pretrained(folder)
        load_processor(checkpoint(family)).save_pretrained(folder)
        return folder

    return save


def load_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def load_processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def inputs_of_a_conversation(processor: Any) -> dict[str, Tensor]:
    """Text, an image and a video."""
    frames = np.random.default_rng(0).integers(0, 256, (9, 50, 70, 3), dtype=np.uint8)
    messages = image_messages()
    messages[0]["content"].append({"type": "video", "video": frames, "video_metadata": {"fps": 3.0}})
    return dict(
        processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def assert_equal_inputs(found: Any, expected: Any) -> None:
    found, expected = inputs_of_a_conversation(found), inputs_of_a_conversation(expected)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert {name: found[name].dtype for name in found} == {name: expected[name].dtype for name in expected}


def code_in(folder: Path) -> dict[str, bytes]:
    """Every module in a folder, and its text."""
    return {module.name: module.read_bytes() for module in folder.glob("*.py")}


def stated(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if value is not None}


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_model_and_inputs_are_the_same_after_saving(checkpoint, saved, family):
    processor = load_processor(saved(family))
    assert_equal_inputs(processor, load_processor(checkpoint(family)))
    inputs = inputs_of_a_conversation(processor)
    assert torch.equal(load_model(saved(family))(**inputs).logits, build_model(family)(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_written_as_they_were_read(checkpoint, saved, family):
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint(family), saved(family)))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_dtype_is_saved(checkpoint, tmp_path):
    load_model(checkpoint("olmo3")).to(torch.bfloat16).save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_tokenizer_alone(checkpoint, saved):
    before, after = (AutoTokenizer.from_pretrained(folder("olmo3")) for folder in (checkpoint, saved))
    for text in TEXTS:
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert after.decode(ids) == before.decode(ids)
        assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)
    assert after.get_vocab() == before.get_vocab()
    for token in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(after, token) == getattr(before, token)


@torch.no_grad()
def test_added_tokens_are_read_and_predicted_after_saving(checkpoint, tmp_path):
    """Tokenizer, both tables and the output matrix, from a folder with code; also in beams."""
    model, processor = load_model(checkpoint("qwen3")), load_processor(checkpoint("qwen3"))
    processor.tokenizer.add_tokens(["<turn_left>", "<turn_right>"])
    model.resize_token_embeddings(len(processor.tokenizer))
    right = processor.tokenizer.convert_tokens_to_ids("<turn_right>")
    assert right == model.get_input_embeddings().num_embeddings - 1
    inputs = processor(
        text="<|image|>After <turn_left>", images=[image_messages()[0]["content"][0]["image"]], return_tensors="pt"
    )
    assert right - 1 in inputs["input_ids"][0]
    last = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    model.lm_head.weight[:] = 0
    model.lm_head.weight[right] = last
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    loaded, reader = load_model(tmp_path), load_processor(tmp_path)

    again = reader(
        text="<|image|>After <turn_left>", images=[image_messages()[0]["content"][0]["image"]], return_tensors="pt"
    )
    assert again["input_ids"].tolist() == inputs["input_ids"].tolist()
    assert torch.equal(loaded(**again).logits, model(**inputs).logits)
    for beams in (1, 2):
        output = loaded.generate(**again, max_new_tokens=1, num_beams=beams, do_sample=False)
        assert reader.batch_decode(output[:, again["input_ids"].shape[1] :]) == ["<turn_right>"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_code_is_saved_beside_the_weights(checkpoint, saved):
    assert code_in(saved("olmo3")) == code_in(checkpoint("olmo3"))


def test_code_of_each_part_is_saved_with_it(checkpoint, tmp_path):
    AutoConfig.from_pretrained(checkpoint("olmo3"), trust_remote_code=True).save_pretrained(tmp_path / "config")
    load_model(checkpoint("olmo3")).save_pretrained(tmp_path / "model")
    load_processor(checkpoint("olmo3")).save_pretrained(tmp_path / "processor")
    config, model, processor = (code_in(tmp_path / part).keys() for part in ("config", "model", "processor"))
    assert config == {"configuration_molmo2.py"}
    assert {"modeling_molmo2.py", "configuration_molmo2.py"} <= model
    assert {"processing_molmo2.py", "image_processing_molmo2.py", "video_processing_molmo2.py"} <= processor
    assert model | processor == code_in(checkpoint("olmo3")).keys()
    assert "modeling_molmo2.py" not in processor


def test_auto_map_of_every_file(saved):
    entry = {"AutoProcessor": "processing_molmo2.Molmo2Processor"}
    expected = {
        "config.json": AUTO_MAP,
        "processor_config.json": entry,
        "tokenizer_config.json": entry,
        "preprocessor_config.json": {
            "AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor",
            **entry,
        },
        "video_preprocessor_config.json": {
            "AutoVideoProcessor": "video_processing_molmo2.Molmo2VideoProcessor",
            **entry,
        },
    }
    assert {name: read_json(saved("olmo3") / name)["auto_map"] for name in expected} == expected


@pytest.mark.parametrize("name", PROCESSOR_FILES)
def test_processor_files_keep_the_published_form(checkpoint, saved, name):
    """Engines read these files by name, so nothing may move into another one."""
    before, after = (read_json(folder("olmo3") / name) for folder in (checkpoint, saved))
    assert {key: after.get(key) for key in stated(before)} == stated(before)
    assert set(after) - set(before) <= {"use_low_res_token_for_global_crops"}
    assert {"image_processor", "video_processor", "tokenizer", "feature_extractor"}.isdisjoint(after)


def test_processor_options_without_a_value_are_written_too(checkpoint, tmp_path):
    processor = load_processor(checkpoint("olmo3"))
    processor.use_single_crop_col_tokens = None
    processor.save_pretrained(tmp_path)
    content = read_json(tmp_path / "processor_config.json")
    assert content["use_single_crop_col_tokens"] is None
    assert load_processor(tmp_path).use_single_crop_col_tokens is None


def test_chat_template_is_saved_for_both_readers(saved):
    template = (REPOSITORY / "chat_template.jinja").read_text(encoding="utf-8")
    assert read_json(saved("olmo3") / "tokenizer_config.json")["chat_template"] == template
    assert (saved("olmo3") / "chat_template.jinja").read_text(encoding="utf-8") == template
    assert AutoTokenizer.from_pretrained(saved("olmo3")).chat_template == template
    assert load_processor(saved("olmo3")).chat_template == template


def test_another_chat_template_is_saved(checkpoint, tmp_path):
    processor = load_processor(checkpoint("olmo3"))
    processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    processor.save_pretrained(tmp_path)
    assert read_json(tmp_path / "tokenizer_config.json")["chat_template"] == processor.chat_template
    assert load_processor(tmp_path).apply_chat_template([{"role": "user", "content": "x"}]) == "user"


def test_tokenizer_file_is_readable_everywhere(checkpoint, saved):
    """Releases differ in the class names they know and in the form of two keys."""
    content = read_json(saved("olmo3") / "tokenizer_config.json")
    assert content["tokenizer_class"] in ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast")
    assert content.get("extra_special_tokens", {}) == {}
    listed = read_json(checkpoint("olmo3") / "tokenizer_config.json")["additional_special_tokens"]
    assert content.get("additional_special_tokens", listed) == listed
    assert "padding_side" not in content or content["padding_side"] == "left"


def test_changed_options_are_saved(checkpoint, tmp_path):
    processor = load_processor(checkpoint("olmo3"))
    processor.image_processor.max_crops = 7
    processor.image_processor.overlap_margins = [1, 2]
    processor.video_processor.num_frames = 5
    processor.video_processor.max_fps = 4.0
    processor.use_frame_special_tokens = True
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(tmp_path)

    loaded = load_processor(tmp_path)

    assert (loaded.image_processor.max_crops, loaded.image_processor.overlap_margins) == (7, [1, 2])
    assert (loaded.video_processor.num_frames, loaded.video_processor.max_fps) == (5, 4.0)
    assert loaded.use_frame_special_tokens is True
    assert_equal_inputs(loaded, processor)


def test_nothing_of_this_machine_is_saved(checkpoint, saved):
    for path in saved("olmo3").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        for place in (checkpoint("olmo3").parent, saved("olmo3").parent, REPOSITORY):
            assert str(place) not in text, path.name
        if path.name == "tokenizer_config.json":
            assert {"is_local", "local_files_only", "name_or_path"}.isdisjoint(json.loads(text))


def test_parts_that_were_not_loaded_from_code_beside_them_name_none(tmp_path):
    """Without the files there must be no `auto_map` that points to them."""
    write_processor(tmp_path / "source")
    Molmo2Processor.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").glob("*.py")) == []
    for name in (*PROCESSOR_FILES, "tokenizer_config.json"):
        assert "auto_map" not in read_json(tmp_path / "saved" / name)
    assert_equal_inputs(
        Molmo2Processor.from_pretrained(tmp_path / "saved"), Molmo2Processor.from_pretrained(tmp_path / "source")
    )


def test_image_and_video_processor_alone(tmp_path):
    image_processor = Molmo2ImageProcessor(max_crops=3, overlap_margins=(2, 1), image_mean=0.25)
    video_processor = Molmo2VideoProcessor(num_frames=7, max_fps=None)
    image_processor.save_pretrained(tmp_path)
    video_processor.save_pretrained(tmp_path)
    assert Molmo2ImageProcessor.from_pretrained(tmp_path).to_dict() == image_processor.to_dict()
    assert Molmo2VideoProcessor.from_pretrained(tmp_path).to_dict() == video_processor.to_dict()


# --- between releases ------------------------------------------------------------------------------------------------


def assemble(parts: Path, folder: Path) -> Path:
    """A checkpoint folder from recorded files: with code, vocabulary and template, without weights."""
    shutil.copytree(parts, folder)
    copy_remote_code(folder)
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    shutil.copy(REPOSITORY / "chat_template.jinja", folder)
    return folder


def test_two_releases_are_recorded():
    assert [path.name for path in SAVED_ELSEWHERE] == ["saved_by_4.57.1", "saved_by_5.23.0"]


@pytest.mark.parametrize("parts", SAVED_ELSEWHERE, ids=lambda path: path.name)
def test_files_saved_by_another_release_can_be_read(checkpoint, tmp_path, parts):
    folder = assemble(parts, tmp_path / parts.name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    expected = tiny_config("olmo3").to_dict()
    found = config.to_dict()
    for name in ("text_config", "vit_config", "adapter_config"):
        for settings in (found[name], expected[name]):  # older releases list a dtype that was never set
            settings.pop("dtype", None)
        assert found[name] == expected[name]
    assert_equal_inputs(load_processor(folder), load_processor(checkpoint("olmo3")))
    for text in TEXTS:
        tokenizers = (AutoTokenizer.from_pretrained(path) for path in (folder, checkpoint("olmo3")))
        assert len({tuple(tokenizer(text)["input_ids"]) for tokenizer in tokenizers}) == 1


@pytest.mark.parametrize("parts", SAVED_ELSEWHERE, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", *PROCESSOR_FILES])
def test_files_are_the_same_on_every_release(saved, parts, name):
    here, there = read_json(saved("olmo3") / name), read_json(parts / name)
    for content in (here, there):
        content.pop("transformers_version", None)
    assert here == there


def test_nested_processor_file_can_be_read(checkpoint, tmp_path):
    """Recent releases put the image and the video processor into processor_config.json, and write no other file."""
    folder = write_checkpoint(tmp_path / "nested", "olmo3")
    content = read_json(folder / "processor_config.json")
    for part, name in (("image_processor", "preprocessor_config"), ("video_processor", "video_preprocessor_config")):
        content[part] = read_json(folder / f"{name}.json")
        (folder / f"{name}.json").unlink()
    write_json(folder / "processor_config.json", content)

    processor = load_processor(folder)

    assert_equal_inputs(processor, load_processor(checkpoint("olmo3")))
    chosen = AutoProcessor.from_pretrained(folder, trust_remote_code=True, max_crops=2, num_frames=7)
    assert (chosen.image_processor.max_crops, chosen.video_processor.num_frames) == (2, 7)
    processor.save_pretrained(tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "preprocessor_config.json")["max_crops"] == 4
    assert "image_processor" not in read_json(tmp_path / "saved" / "processor_config.json")


@torch.no_grad()
def test_native_model_reads_what_we_save(saved):
    """The class that comes with transformers gives the same logits; it calls `token_type_ids` by another name."""
    if importlib.util.find_spec("transformers.models.molmo2") is None:
        pytest.skip("this transformers has no Molmo2 of its own")
    native, info = AutoModelForImageTextToText.from_pretrained(
        saved("qwen3"), trust_remote_code=False, output_loading_info=True
    )
    assert type(native).__module__.startswith("transformers.models.molmo2.")
    assert {name: list(found) for name, found in info.items() if found} == {}
    processor = load_processor(saved("qwen3"))
    inputs = processor.apply_chat_template(
        image_messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = build_model("qwen3")(**inputs).logits
    theirs = native(mm_token_type_ids=inputs.pop("token_type_ids").long(), **inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


# --- upload ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uploads(tmp_path_factory, checkpoint) -> dict[str, dict[str, bytes]]:
    """What `fresh_process.push` leaves on a Hub."""
    folder = shutil.copytree(checkpoint("qwen3"), tmp_path_factory.mktemp("push") / "tiny")
    with fake_hub() as hub:
        offline = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        environment = {**offline, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_none"}
        run("push", tmp_path_factory.mktemp("cache"), env=environment, folder=folder, repository="tester/tiny")
        assert [request for request in hub.unanswered if request.startswith("POST")] == []
        return hub.repositories


def test_upload_of_the_configuration(uploads, checkpoint):
    files = uploads["tester/tiny-config"]
    assert files.keys() - {"README.md"} == {"config.json", "configuration_molmo2.py"}
    code = {"configuration_molmo2.py": files["configuration_molmo2.py"]}
    assert code.items() <= code_in(checkpoint("qwen3")).items()
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("repository", ["tester/tiny", "tester/tiny-saved"])
@torch.no_grad()
def test_upload_of_model_and_processor_is_a_complete_checkpoint(uploads, saved, checkpoint, tmp_path, repository):
    files = uploads[repository]
    assert files.keys() - {"README.md"} == {path.name for path in saved("qwen3").iterdir()}

    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert code_in(folder) == code_in(checkpoint("qwen3"))
    processor = load_processor(folder)
    assert_equal_inputs(processor, load_processor(checkpoint("qwen3")))
    inputs = inputs_of_a_conversation(processor)
    assert torch.equal(load_model(folder)(**inputs).logits, build_model("qwen3")(**inputs).logits)
    for name in ("config.json", *PROCESSOR_FILES):
        assert json.loads(files[name]) == read_json(saved("qwen3") / name)


# --- without the Auto classes ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_model_class_saves_and_loads_by_itself(tmp_path):
    model = build_model("olmo3")
    model.save_pretrained(tmp_path)
    ids = torch.arange(40)[None]
    assert torch.equal(Molmo2ForConditionalGeneration.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
