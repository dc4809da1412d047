"""Every way to load a checkpoint gives the numbers of the model that the weights belong to.

The reference is built without any loading (`checkpoints.build_model`); the loaded models come through the Auto classes
and the remote code beside the weights, as users load them.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from molmo2.configuration import Molmo2Config
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from support.checkpoints import (
    FAMILIES,
    PUBLISHED,
    build_model,
    image_inputs,
    module_cache,
    read_json,
    tiny_config,
    write_checkpoint,
    write_json,
)

NEW_EMBEDDING = "model.transformer.wte.new_embedding"


@pytest.fixture(scope="module", autouse=True)
def own_module_cache(tmp_path_factory):
    with module_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes the checkpoint of a family, once."""
    parent = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: write_checkpoint(parent / family, family))


@pytest.fixture
def olmo3(checkpoint) -> Path:
    """The checkpoint whose rotary tables differ from layer to layer."""
    return checkpoint("olmo3")


@functools.cache
def inputs(folder: Path) -> dict[str, Tensor]:
    return image_inputs(folder)


@torch.no_grad()
def logits(model: Any, folder: Path) -> Tensor:
    return model.eval()(**inputs(folder)).logits


def test_code_of_one_repository_with_weights_of_another(checkpoint, tmp_path):
    """What docs/hub.md says of published repositories: their weights and settings, our code, and nothing copied."""
    weights, code = tmp_path / "weights", tmp_path / "code"
    shutil.copytree(checkpoint("qwen3"), weights)
    code.mkdir()
    for file in weights.glob("*.py"):
        shutil.move(file, code / file.name)
    model_class = get_class_from_dynamic_module(
        "modeling_molmo2.Molmo2ForConditionalGeneration", str(code), code_revision="v0.2.0"
    )
    processor_class = get_class_from_dynamic_module(
        "processing_molmo2.Molmo2Processor", str(code), code_revision="v0.2.0"
    )
    model, processor = model_class.from_pretrained(weights).eval(), processor_class.from_pretrained(weights)
    for part in (model, processor, processor.image_processor, processor.video_processor):
        assert type(part).__module__.startswith("transformers_modules.code.")
    expected = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen3"), trust_remote_code=True).eval()
    assert torch.equal(logits(model, checkpoint("qwen3")), logits(expected, checkpoint("qwen3")))


def test_a_pinned_revision_of_the_code(checkpoint, tmp_path):
    """The tag `v0.2.0` of a repository of code, whose main branch is another; by name, and by an `auto_map`."""
    weights, root = tmp_path / "weights", tmp_path / "cache" / "models--owner--molmo2-code"
    shutil.copytree(checkpoint("qwen3"), weights)
    for name, letter in (("v0.2.0", "a"), ("main", "b")):
        commit = letter * 40
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(commit, encoding="utf-8")
        for file in weights.glob("*.py"):
            text = "raise RuntimeError('the code of main')" if name == "main" else file.read_text(encoding="utf-8")
            (snapshot / file.name).write_text(text, encoding="utf-8")
    for file in weights.glob("*.py"):
        file.unlink()
    config = read_json(weights / "config.json")
    auto_map = {name: f"owner/molmo2-code--{reference}" for name, reference in config["auto_map"].items()}
    write_json(weights / "config.json", {**config, "auto_map": auto_map})

    cached = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    reference = "modeling_molmo2.Molmo2ForConditionalGeneration"
    by_name = get_class_from_dynamic_module(reference, "owner/molmo2-code", code_revision="v0.2.0", **cached)
    by_auto_map = load(weights, code_revision="v0.2.0", **cached)

    expected = logits(load(checkpoint("qwen3")), checkpoint("qwen3"))
    for model in (by_name.from_pretrained(weights), by_auto_map):
        assert f".{'a' * 40}." in type(model).__module__
        assert torch.equal(logits(model, checkpoint("qwen3")), expected)
    with pytest.raises(RuntimeError, match="the code of main"):
        get_class_from_dynamic_module(reference, "owner/molmo2-code", **cached)


@functools.cache
def expected_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(build_model(folder.name).to(dtype), folder)


def load(folder: Path, **options) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)


def assert_stored_tensors(model: Any, folder: Path) -> None:
    """Every tensor of the file is in the model, bit for bit, and nothing else is."""
    stored, loaded = load_file(folder / "model.safetensors"), model.state_dict()
    assert stored.keys() == loaded.keys()
    assert [name for name in stored if not torch.equal(stored[name], loaded[name])] == []


def assert_exact_rotary_tables(model: Any) -> None:
    fresh = Molmo2ForConditionalGeneration(tiny_config("olmo3")).model.transformer.rotary_emb
    tables = model.model.transformer.rotary_emb
    for name in ("inv_freq", "scaled_inv_freq"):
        assert getattr(tables, name).dtype == torch.float32
        assert torch.equal(getattr(tables, name), getattr(fresh, name))
    assert tables.scaling_factor == fresh.scaling_factor


# --- names and shapes ------------------------------------------------------------------------------------------------


def published_tensors(repository: str) -> dict[str, list[int]]:
    """Name and shape of every tensor in the published files; `{}` in a name stands for 0 .. layers - 1."""
    tensors = {}
    for pattern, entry in read_json(PUBLISHED / repository / "tensors.json").items():
        for layer in range(entry.get("layers", 1)):
            tensors[pattern.format(layer)] = entry["shape"]
    return tensors


@pytest.mark.parametrize(("repository", "number"), [("Molmo2-4B", 706), ("Molmo2-O-7B", 674)])
def test_parameters_are_those_of_the_published_files(repository, number):
    with torch.device("meta"):
        model = Molmo2ForConditionalGeneration(Molmo2Config.from_pretrained(PUBLISHED / repository))
    tensors = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(tensors) == number
    assert tensors == published_tensors(repository)


# --- plain loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_load(checkpoint, family):
    folder = checkpoint(family)
    model, info = load(folder, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert_stored_tensors(model, folder)
    assert torch.equal(logits(model, folder), expected_logits(folder))
    assert not model.training


def test_layers_past_the_last_one_needed_are_not_missing(olmo3):
    config = read_json(olmo3 / "config.json")
    assert (config["vit_config"]["num_hidden_layers"], config["adapter_config"]["vit_layers"]) == (10, [-3, -9])
    model, info = load(olmo3, output_loading_info=True)
    assert not info["missing_keys"]
    assert len(model.model.vision_backbone.image_vit.transformer.resblocks) == 8


def test_base_model_loads_from_the_whole_checkpoint(olmo3):
    model, info = AutoModel.from_pretrained(olmo3, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "Molmo2Model"
    assert list(info["missing_keys"]) == []
    assert list(info["unexpected_keys"]) == ["lm_head.weight"]
    with torch.no_grad():
        found = model(**inputs(olmo3)).last_hidden_state
        expected = build_model("olmo3").model(**inputs(olmo3)).last_hidden_state
    assert torch.equal(found, expected)


def test_weights_in_shards(olmo3, tmp_path):
    load(olmo3).save_pretrained(tmp_path, max_shard_size="200KB")
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == build_model("olmo3").state_dict().keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in build_model("olmo3").state_dict().values())
    assert torch.equal(logits(load(tmp_path), olmo3), expected_logits(olmo3))


def test_weights_in_a_pickle(olmo3, tmp_path):
    folder = write_checkpoint(tmp_path, "olmo3")
    (folder / "model.safetensors").unlink()
    torch.save(build_model("olmo3").state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(logits(load(folder), olmo3), expected_logits(olmo3))


def test_generation_settings_are_loaded(olmo3):
    settings = load(olmo3).generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1002, 1002, 1000)


@pytest.mark.parametrize("chosen", ["eager", {"text_config": "eager"}])
def test_attention_can_be_chosen(olmo3, chosen):
    model = load(olmo3, attn_implementation=chosen)
    assert model.model.transformer.config._attn_implementation == "eager"
    vision = "eager" if chosen == "eager" else "sdpa"
    assert model.model.vision_backbone.image_vit.config._attn_implementation == vision
    assert model.model.vision_backbone.config._attn_implementation == vision
    torch.testing.assert_close(logits(model, olmo3), expected_logits(olmo3), rtol=0, atol=1e-5)


def test_attention_of_the_file_is_used(olmo3, tmp_path):
    folder = write_checkpoint(tmp_path, "olmo3")
    config = read_json(folder / "config.json")
    config["text_config"]["attn_implementation"] = "eager"
    write_json(folder / "config.json", config)
    model = load(folder)
    assert model.model.transformer.config._attn_implementation == "eager"
    assert model.model.vision_backbone.image_vit.config._attn_implementation == "sdpa"


# --- fresh weights ---------------------------------------------------------------------------------------------------


def test_missing_tensors_are_drawn_and_the_others_left_alone(olmo3, tmp_path):
    folder = write_checkpoint(tmp_path, "olmo3")
    stored = load_file(folder / "model.safetensors")
    missing = {
        NEW_EMBEDDING,
        "model.transformer.blocks.1.self_attn.q_norm.weight",
        "model.vision_backbone.image_pooling_2d.wk.bias",
        "model.vision_backbone.image_vit.transformer.resblocks.3.attention_norm.bias",
    }
    save_file({k: v for k, v in stored.items() if k not in missing}, folder / "model.safetensors", {"format": "pt"})

    model, info = load(folder, output_loading_info=True)

    loaded = model.state_dict()
    assert set(info["missing_keys"]) == missing
    assert [name for name in stored if name not in missing and not torch.equal(stored[name], loaded[name])] == []
    assert loaded[NEW_EMBEDDING].std().item() == pytest.approx(0.02, rel=0.1)
    assert (loaded["model.transformer.blocks.1.self_attn.q_norm.weight"] == 1).all()
    assert (loaded["model.vision_backbone.image_pooling_2d.wk.bias"] == 0).all()
    assert (loaded["model.vision_backbone.image_vit.transformer.resblocks.3.attention_norm.bias"] == 0).all()
    assert_exact_rotary_tables(model)


def test_model_from_a_configuration_alone(olmo3):
    config = AutoConfig.from_pretrained(olmo3, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif "norm" in name or ".ln_f." in name:
            assert (tensor == 1).all(), name
        else:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name
    assert_exact_rotary_tables(model)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_in_half_precision(olmo3, dtype):
    model = load(olmo3, dtype=dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert_exact_rotary_tables(model)
    assert torch.equal(logits(model, olmo3), expected_logits(olmo3, dtype))
    assert not torch.equal(logits(model, olmo3), expected_logits(olmo3))


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"torch_dtype": torch.float32}])
def test_load_in_the_dtype_of_the_file(olmo3, options):
    assert load(olmo3, **options).dtype == torch.float32


def test_rotary_tables_survive_changes_of_dtype(olmo3):
    model = load(olmo3)
    for change in (model.half, model.float, lambda: model.to(torch.bfloat16), model.double, model.float):
        change()
        assert_exact_rotary_tables(model)


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(olmo3, device_map):
    model = load(olmo3, device_map=device_map)
    assert_exact_rotary_tables(model)
    assert_stored_tensors(model, olmo3)
    assert torch.equal(logits(model, olmo3), expected_logits(olmo3))


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")  # a parameter is one
# The border falls into the text model, between its blocks, into the vision part.
@pytest.mark.parametrize("cpu_kilobytes", [350, 450, 650])
def test_offload_to_disk(olmo3, tmp_path, cpu_kilobytes):
    model = load(
        olmo3, device_map="auto", max_memory={"cpu": f"{cpu_kilobytes}KB"}, offload_folder=str(tmp_path / "offload")
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert_exact_rotary_tables(model)
    assert torch.equal(logits(model, olmo3), expected_logits(olmo3))


def test_everything_on_disk_is_beyond_the_library(olmo3, tmp_path):
    """No release can do this to any model: some refuse while loading, some leave the weights without memory."""
    with pytest.raises(
        Exception, match=r"device disk is invalid|whole model to the disk|device meta is not"
    ) as caught:
        logits(load(olmo3, device_map="auto", max_memory={"cpu": 0}, offload_folder=str(tmp_path)), olmo3)
    assert "molmo2" not in str(caught.value).lower()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offload_of_a_loaded_model(olmo3, tmp_path, place):
    """What accelerate offers instead."""
    model = load(olmo3)
    if place == "disk":
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(logits(model, olmo3), expected_logits(olmo3))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_load_state_dict(olmo3):
    model = Molmo2ForConditionalGeneration(tiny_config("olmo3"))
    report = model.load_state_dict(load_file(olmo3 / "model.safetensors"))
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert torch.equal(logits(model, olmo3), expected_logits(olmo3))


def test_build_without_memory_and_assign(olmo3):
    with torch.device("meta"):
        model = Molmo2ForConditionalGeneration(tiny_config("olmo3"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.load_state_dict(load_file(olmo3 / "model.safetensors"), assign=True)
    assert_exact_rotary_tables(model)
    assert torch.equal(logits(model, olmo3), expected_logits(olmo3))


def test_build_without_memory_and_allocate(olmo3):
    """As tools for distributed training do it: the tables are not in the file, so they must be computed."""
    with torch.device("meta"):
        model = Molmo2ForConditionalGeneration(tiny_config("olmo3"))
    model.to_empty(device="cpu")
    model.load_state_dict(load_file(olmo3 / "model.safetensors"))
    assert_exact_rotary_tables(model)
    assert torch.equal(logits(model, olmo3), expected_logits(olmo3))


def test_accelerate_dispatch(olmo3):
    with init_empty_weights():
        model = Molmo2ForConditionalGeneration(tiny_config("olmo3"))
    model = load_checkpoint_and_dispatch(model, str(olmo3 / "model.safetensors"), device_map="auto")
    assert_exact_rotary_tables(model)
    assert torch.equal(logits(model, olmo3), expected_logits(olmo3))
