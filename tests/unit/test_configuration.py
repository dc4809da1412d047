"""The configuration: both spellings in, the published one out, complete and the same on every transformers."""

import copy
import importlib.util
import inspect
import json
import logging
import math
import pickle
import re
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from molmo2.configuration import (
    TOKEN_ID_OFFSETS,
    Molmo2AdapterConfig,
    Molmo2Config,
    Molmo2TextConfig,
    Molmo2VitConfig,
)
from support.checkpoints import FAMILIES, PUBLISHED, published_config, read_json, tiny_config, write_json
from support.paths import SHARED

SHARED_PUBLISHED = SHARED / "published"
PUBLISHED_CONFIGS = sorted(PUBLISHED.glob("*/config.json")) + sorted(SHARED_PUBLISHED.glob("*/config.json"))
PARTS = {"vit_config": Molmo2VitConfig, "adapter_config": Molmo2AdapterConfig, "text_config": Molmo2TextConfig}
# Of a file, not of a model: read by the library, and not written back by every release.
BOOKKEEPING = {"_name_or_path", "architectures", "attn_implementation", "auto_map", "dtype", "transformers_version"}

# The olmo3 family of `checkpoints`, by hand in the spelling of the class that comes with transformers 5.20 and later.
NATIVE_SPELLING: dict[str, Any] = {
    "adapter_config": {
        "attention_bias": True,
        "attention_dropout": 0.0,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 56,
        "mlp_bias": False,
        "model_type": "molmo2_adapter",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "text_hidden_size": 40,
        "vision_feature_layer": [-3, -9],
    },
    "architectures": ["Molmo2ForConditionalGeneration"],
    "dtype": "float32",
    "frame_end_token_id": 1032,
    "frame_start_token_id": 1031,
    "image_end_token_id": 1025,
    "image_patch_id": 1026,
    "image_start_token_id": 1024,
    "initializer_range": 0.02,
    "low_res_image_start_token_id": 1028,
    "model_type": "molmo2",
    "text_config": {
        "additional_vocab_size": 128,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 12,
        "hidden_act": "silu",
        "hidden_size": 40,
        "initializer_range": 0.02,
        "intermediate_size": 56,
        "max_position_embeddings": 1024,
        "model_type": "molmo2_text",
        "norm_after": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "qk_norm_type": "olmo",
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "rope_theta": 500000.0,
            "rope_type": "yarn",
        },
        "rope_scaling_layers": [0, 2],
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 1024,
    },
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "vision_config": {
        "attention_bias": True,
        "attention_dropout": 0.0,
        "head_dim": 10,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "image_size": [98, 98],
        "initializer_range": 0.02,
        "intermediate_size": 44,
        "layer_norm_eps": 1e-06,
        "model_type": "molmo2_vision",
        "num_attention_heads": 3,
        "num_channels": 3,
        "num_hidden_layers": 10,
        "num_key_value_heads": 3,
        "num_position_embeddings": 81,
        "patch_size": 14,
    },
}


def option_names(config_class: type) -> list[str]:
    """What a configuration class can be given, in its own spelling."""
    names = list(inspect.signature(config_class.__init__).parameters)
    return [name for name in names if name not in ("self", "kwargs", "rope_parameters")]


def model_settings(config: Molmo2Config) -> dict[str, Any]:
    """Every setting of the model, flat, without what belongs to a file."""
    settings = {name: getattr(config, name) for name in option_names(Molmo2Config) if name not in PARTS}
    for part, part_class in PARTS.items():
        for name in option_names(part_class):
            settings[f"{part}.{name}"] = getattr(getattr(config, part), name)
    return settings


def stated_values(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of a config.json that describe the model, flat."""
    flat = {}
    for name, value in content.items():
        if name in PARTS:
            flat.update(stated_values(value, f"{name}."))
        elif name not in BOOKKEEPING:
            flat[prefix + name] = value
    return flat


def attribute(config: Molmo2Config, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.fixture
def log_records(caplog):
    """Everything that transformers or our modules log at warning level, also what is logged once per process."""
    for once in (transformers_logging.warning_once, transformers_logging.info_once):
        once.cache_clear()
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog.records
    transformers_logging.disable_propagation()


# --- published files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PUBLISHED_CONFIGS, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_published_files_load_unchanged_and_silently(path, recwarn, log_records):
    config = Molmo2Config.from_pretrained(path.parent)

    stated = stated_values(read_json(path))
    assert {name: attribute(config, name) for name in stated} == stated
    assert [str(warning.message) for warning in recwarn] == []
    assert [record.getMessage() for record in log_records] == []


def test_defaults_are_those_of_molmo2_4b():
    published = Molmo2Config.from_pretrained(PUBLISHED / "Molmo2-4B")
    assert model_settings(Molmo2Config()) == model_settings(published)


def test_omitted_token_ids_follow_the_vocabulary():
    config = tiny_config("qwen3")
    sparse = Molmo2Config(
        vit_config=config.vit_config, adapter_config=config.adapter_config, text_config=config.text_config
    )
    assert model_settings(sparse) == model_settings(config)
    moved = Molmo2Config(image_start_token_id=151900)
    assert (moved.image_patch_id, moved.image_col_id, moved.frame_end_token_id) == (151902, 151903, 151908)


# --- native spelling -------------------------------------------------------------------------------------------------


def test_native_spelling_means_the_same_settings(recwarn, log_records):
    config = Molmo2Config.from_dict(copy.deepcopy(NATIVE_SPELLING))
    assert model_settings(config) == model_settings(tiny_config("olmo3"))
    assert [str(warning.message) for warning in recwarn] == []
    assert [record.getMessage() for record in log_records] == []


def test_native_spelling_is_written_in_the_published_one(tmp_path):
    Molmo2Config.from_dict(copy.deepcopy(NATIVE_SPELLING)).save_pretrained(tmp_path)
    saved = stated_values(read_json(tmp_path / "config.json"))
    published = stated_values(published_config("olmo3"))
    assert {name: saved.get(name) for name in published} == published
    aliases = {"vision_config", "adapter_config.vision_feature_layer", "text_config.rope_parameters"}
    assert aliases.isdisjoint(saved)


NATIVE_TO_PUBLISHED = {
    "vision_config": "vit_config",
    "image_size": "image_default_input_size",
    "patch_size": "image_patch_size",
    "num_position_embeddings": "image_num_pos",
    "vision_feature_layer": "vit_layers",
    "attention_bias": "qkv_bias",
    "rms_norm_eps": "layer_norm_eps",
}
# Of the native class alone: it builds no other variant of these.
NATIVE_ONLY = {"num_channels": 3, "mlp_bias": False, "attention_bias": True, "tie_word_embeddings": False}


def native_class() -> Any:
    if importlib.util.find_spec("transformers.models.molmo2") is None:
        pytest.skip("this transformers has no Molmo2 of its own; NATIVE_SPELLING stands for what later ones write")
    from transformers.models.molmo2.configuration_molmo2 import Molmo2Config as NativeConfig

    return NativeConfig


def assert_native_values(native: Any, config: Molmo2Config) -> None:
    """Every setting of the native class has the same value in ours; its trimmed tower is the one that ours builds."""
    for native_part, part in (
        ("text_config", "text_config"),
        ("vision_config", "vit_config"),
        ("adapter_config",) * 2,
    ):
        theirs, ours = getattr(native, native_part), getattr(config, part)
        names = set(inspect.signature(type(theirs)).parameters) & set(json.loads(theirs.to_json_string()))
        for name in names - BOOKKEEPING - {"num_hidden_layers", "vision_feature_layer", "rope_scaling_layers"}:
            if name in NATIVE_ONLY and not (part == "text_config" and name == "attention_bias"):
                assert getattr(theirs, name) == NATIVE_ONLY[name]
            else:
                assert getattr(theirs, name) == getattr(ours, NATIVE_TO_PUBLISHED.get(name, name)), (part, name)
    depth = config.vit_config.num_hidden_layers
    layers = [layer % depth for layer in config.adapter_config.vit_layers]
    assert [layer % depth for layer in native.adapter_config.vision_feature_layer] == layers
    assert native.vision_config.num_hidden_layers in (depth, max(layers) + 1)
    assert native.text_config.num_hidden_layers == config.text_config.num_hidden_layers
    scaled = config.text_config.rope_scaling_layers
    assert native.text_config.rope_scaling_layers == (list(range(3)) if scaled is None else scaled)
    for name in json.loads(native.to_json_string()):
        if name.endswith("_id"):
            assert getattr(native, name) == getattr(config, name)


def test_native_spelling_is_that_of_the_native_class():
    native = native_class().from_dict(copy.deepcopy(NATIVE_SPELLING))
    written = json.loads(native.to_json_string())
    assert written == {**NATIVE_SPELLING, "transformers_version": written["transformers_version"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_native_class_reads_what_we_write(family, tmp_path):
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    assert_native_values(native_class().from_pretrained(tmp_path), config)


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_what_the_native_class_writes(family, tmp_path):
    native = native_class().from_dict(published_config(family))
    native.save_pretrained(tmp_path)

    config = Molmo2Config.from_pretrained(tmp_path)

    assert "vision_config" in read_json(tmp_path / "config.json")
    assert_native_values(native, config)
    # The native class counts the layers that are built and numbers them from the front.
    expected = model_settings(tiny_config(family))
    expected.update({"vit_config.num_hidden_layers": 8, "adapter_config.vit_layers": [7, 1]})
    if expected["text_config.rope_scaling_layers"] is None:
        expected["text_config.rope_scaling_layers"] = [0, 1, 2]
    assert model_settings(config) == expected


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_saved_file_states_everything_and_nothing_else(path, tmp_path):
    Molmo2Config.from_pretrained(path.parent).save_pretrained(tmp_path)
    saved, published = read_json(tmp_path / "config.json"), read_json(path)

    assert stated_values(saved) == stated_values(published)
    for part, part_class in PARTS.items():
        assert set(saved[part]) - BOOKKEEPING == {"model_type", *option_names(part_class)}
    assert set(saved) - BOOKKEEPING == {"model_type", "image_high_res_id", *option_names(Molmo2Config)}
    assert saved["architectures"] == published["architectures"]
    assert saved["dtype"] == published["dtype"]


def test_saving_twice_writes_the_same_file(tmp_path):
    tiny_config("olmo3").save_pretrained(tmp_path / "once")
    Molmo2Config.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = (read_json(tmp_path / folder / "config.json") for folder in ("once", "twice"))
    assert once == twice


@pytest.mark.parametrize("part", PARTS)
def test_parts_can_be_saved_alone(part, tmp_path):
    config = getattr(tiny_config("olmo3"), part)
    config.save_pretrained(tmp_path)
    assert type(config).from_dict(read_json(tmp_path / "config.json")).to_dict() == config.to_dict()


def test_parts_load_from_the_file_of_the_whole(tmp_path):
    config = tiny_config("olmo3")
    config.save_pretrained(tmp_path)
    for part, part_class in PARTS.items():
        if part == "text_config":  # the others share the model type of the whole
            loaded = part_class.from_pretrained(tmp_path)
            names = option_names(part_class)
            assert [getattr(loaded, name) for name in names] == [getattr(config.text_config, name) for name in names]


# --- rotary settings -------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({}, 5_000_000.0, None),
        ({"rope_theta": 1e4}, 1e4, None),
        ({"rope_theta": 500_000, "rope_scaling": YARN}, 500_000.0, YARN),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 5_000_000.0, {"rope_type": "yarn", "factor": 4.0}),
        ({"rope_parameters": {"rope_theta": 7.0}}, 7.0, None),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, 7.0, LINEAR),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, None),
        ({"rope_parameters": {"rope_theta": 7.0, **YARN}}, 7.0, YARN),
        ({"rope_theta": 9.0, "rope_parameters": {"rope_theta": 7.0, **YARN}}, 9.0, YARN),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7.0, LINEAR),
    ],
)
def test_rotary_settings_in_every_spelling(given, theta, scaling):
    config = Molmo2TextConfig(**copy.deepcopy(given))
    assert config.rope_theta == theta
    assert isinstance(config.rope_theta, float)
    assert config.rope_scaling == scaling
    assert config.rope_parameters == {
        "rope_theta": theta,
        **({"rope_type": "default"} if scaling is None else scaling),
    }
    written = json.loads(config.to_json_string())
    assert (written["rope_theta"], written["rope_scaling"]) == (theta, scaling)
    assert "rope_parameters" not in written


def test_rotary_settings_can_be_changed():
    config = Molmo2TextConfig()
    config.rope_scaling = {"type": "linear", "factor": 2.0}
    config.rope_theta = 7
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0}


def test_the_callers_dictionaries_are_left_alone():
    scaling = {"type": "linear", "factor": 2.0}
    config = Molmo2TextConfig(rope_scaling=scaling)
    config.rope_theta = 7
    assert scaling == {"type": "linear", "factor": 2.0}


# --- attributes ------------------------------------------------------------------------------------------------------


def test_text_attributes_are_readable_from_the_top():
    config = tiny_config("olmo3")
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ):
        assert getattr(config, name) == getattr(config.text_config, name)
    config.text_config.vocab_size = 1000
    assert config.vocab_size == 1000
    assert config.get_text_config() is config.text_config
    assert config.get_text_config(decoder=True) is config.text_config


def test_copies_of_text_attributes_in_a_file_do_not_matter():
    config = Molmo2Config.from_dict({**published_config("qwen3"), "hidden_size": 7, "vocab_size": 8})
    assert model_settings(config) == model_settings(tiny_config("qwen3"))


def test_image_and_video_token_are_the_patch_token():
    config = tiny_config("qwen3")
    assert config.image_token_id == config.video_token_id == config.image_high_res_id == config.image_patch_id == 1026
    config.image_token_id = 1040
    assert config.image_patch_id == config.video_token_id == 1040
    assert config.to_dict()["image_high_res_id"] == config.to_dict()["image_patch_id"] == 1040
    assert config.vision_config is config.vit_config


def test_image_high_res_id_stands_in_for_the_patch_id():
    content = published_config("qwen3")
    del content["image_patch_id"]
    assert Molmo2Config.from_dict(content).image_patch_id == 1026


def test_unknown_keys_are_kept_and_break_nothing(tmp_path):
    content = published_config("olmo3")
    content["invented_later"] = {"a": [1, 2]}
    for part in PARTS:
        content[part]["invented_later"] = part
    write_json(tmp_path / "config.json", content)

    config = Molmo2Config.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "saved")

    assert model_settings(config) == model_settings(tiny_config("olmo3"))
    assert config.invented_later == {"a": [1, 2]}
    assert stated_values(read_json(tmp_path / "saved" / "config.json")) == stated_values(content)


def test_keys_that_are_computed_from_others_break_nothing():
    content = published_config("qwen3")
    content["vit_config"]["image_num_patch"] = [3, 3]
    for part in (content, *(content[name] for name in PARTS)):
        part["use_return_dict"] = True
    assert model_settings(Molmo2Config.from_dict(content)) == model_settings(tiny_config("qwen3"))


@pytest.mark.parametrize("part", [None, *PARTS])
def test_the_attention_that_a_file_names_for_a_part_is_kept(part):
    content = published_config("qwen3")
    for name in PARTS:
        content[name]["attn_implementation"] = "eager" if name == part else "sdpa"
    config = Molmo2Config.from_dict(content)
    assert [getattr(config, name)._attn_implementation for name in PARTS] == [
        "eager" if name == part else "sdpa" for name in PARTS
    ]


def test_the_attention_chosen_at_the_top_holds_for_all_parts():
    config = Molmo2Config.from_dict(published_config("qwen3"), attn_implementation="eager")
    assert {getattr(config, name)._attn_implementation for name in PARTS} == {"eager"}


def test_equality_looks_at_every_setting():
    assert tiny_config("qwen3") == tiny_config("qwen3")
    assert not tiny_config("qwen3") != tiny_config("qwen3")  # noqa: SIM202  (another method than ==)
    for part in PARTS:
        other = tiny_config("qwen3")
        getattr(other, part).initializer_range = 0.5
        assert other != tiny_config("qwen3")
        assert getattr(other, part) != getattr(tiny_config("qwen3"), part)
    assert tiny_config("qwen3") != tiny_config("qwen3").to_dict()
    assert Molmo2VitConfig() != Molmo2AdapterConfig()


def test_views_of_the_text_model_travel_with_the_class():
    """As cloudpickle takes the class apart and puts it together: tests/clients/test_vllm.py has it."""
    config = tiny_config("qwen3")
    view = type(config).__dict__["hidden_size"]
    kind, arguments = view.__reduce__()
    again = kind(*arguments)
    again.fset(config, 128)
    assert type(again) is type(view)
    assert config.text_config.hidden_size == again.fget(config) == 128
    assert again.__doc__ == view.__doc__


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal_and_independent(duplicate):
    config = tiny_config("olmo3")
    copied = duplicate(config)
    assert copied == config
    copied.text_config.rope_theta = 1.0
    assert config.text_config.rope_theta == 500000.0


def test_text_forms():
    config = tiny_config("olmo3")
    assert json.loads(config.to_json_string())["text_config"]["rope_theta"] == 500000.0
    assert json.loads(config.to_json_string(use_diff=False))["text_config"]["rope_theta"] == 500000.0
    assert '"rope_scaling_layers"' in repr(config)


# --- refusals --------------------------------------------------------------------------------------------------------

HEADS = "attention heads over 5 key/value heads; `num_attention_heads` must be a multiple of `num_key_value_heads`."


@pytest.mark.parametrize(
    ("config_class", "given", "message"),
    [
        (Molmo2VitConfig, {"hidden_size": 0}, "Molmo2VitConfig: `hidden_size` is 0; expected a positive integer."),
        (Molmo2VitConfig, {"head_dim": 7.5}, "Molmo2VitConfig: `head_dim` is 7.5; expected a positive integer."),
        (Molmo2VitConfig, {"patch_size": True}, "`image_patch_size` is True; expected a positive integer."),
        (
            Molmo2VitConfig,
            {"num_attention_heads": 4, "num_key_value_heads": 5},
            f"Molmo2VitConfig: 4 {HEADS}",
        ),
        (
            Molmo2VitConfig,
            {"hidden_act": "gelo"},
            "Molmo2VitConfig: `hidden_act` is 'gelo'; expected an activation known to transformers.",
        ),
        (
            Molmo2VitConfig,
            {"image_default_input_size": [378, 380]},
            "`image_default_input_size` is [378, 380]; expected (height, width) in multiples of the patch, 14.",
        ),
        (
            Molmo2VitConfig,
            {"image_size": [378]},
            "`image_default_input_size` is [378]; expected (height, width) in multiples of the patch, 14.",
        ),
        (
            Molmo2VitConfig,
            {"image_num_pos": 728},
            "`image_num_pos` is 728; expected a square number or the 729 patches of a crop.",
        ),
        (
            Molmo2AdapterConfig,
            {"vit_layers": []},
            "Molmo2AdapterConfig: `vit_layers` is empty; expected at least one layer of the vision transformer.",
        ),
        (Molmo2AdapterConfig, {"text_hidden_size": None}, "`text_hidden_size` is None; expected a positive integer."),
        (
            Molmo2AdapterConfig,
            {"num_key_value_heads": 5},
            f"Molmo2AdapterConfig: 16 {HEADS}",
        ),
        (
            Molmo2AdapterConfig,
            {"hidden_act": None},
            "Molmo2AdapterConfig: `hidden_act` is None; expected an activation known to transformers.",
        ),
        (Molmo2TextConfig, {"vocab_size": -1}, "Molmo2TextConfig: `vocab_size` is -1; expected a positive integer."),
        (
            Molmo2TextConfig,
            {"max_position_embeddings": "4096"},
            "Molmo2TextConfig: `max_position_embeddings` is '4096'; expected a positive integer.",
        ),
        (
            Molmo2TextConfig,
            {"num_key_value_heads": 5},
            f"Molmo2TextConfig: 32 {HEADS}",
        ),
        (
            Molmo2TextConfig,
            {"hidden_act": "swigloo"},
            "Molmo2TextConfig: `hidden_act` is 'swigloo'; expected an activation known to transformers.",
        ),
        (
            Molmo2TextConfig,
            {"head_dim": 7},
            "Molmo2TextConfig: `head_dim` is 7; rotary embeddings rotate pairs, so it must be even.",
        ),
        (Molmo2TextConfig, {"additional_vocab_size": -1}, "`additional_vocab_size` is -1; expected zero or more."),
        (
            Molmo2TextConfig,
            {"qk_norm_type": "llama"},
            "Molmo2TextConfig: `qk_norm_type` is 'llama'; expected one of ('qwen3', 'olmo').",
        ),
        (
            Molmo2TextConfig,
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "the rotary scaling is of type 'longrope'; supported are ('default', 'linear', 'yarn', 'llama3').",
        ),
        (
            Molmo2TextConfig,
            {"rope_scaling": {"factor": 2.0}},
            "the rotary scaling is of type None; supported are ('default', 'linear', 'yarn', 'llama3').",
        ),
        (
            Molmo2TextConfig,
            {"rope_scaling": {"rope_type": "yarn"}},
            "the rotary scaling of type 'yarn' lacks ['factor']; found {'rope_type': 'yarn'}.",
        ),
        (
            Molmo2TextConfig,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "the rotary scaling of type 'llama3' lacks ['low_freq_factor', 'high_freq_factor', "
            "'original_max_position_embeddings']; found",
        ),
        (
            Molmo2TextConfig,
            {"num_hidden_layers": 4, "rope_scaling_layers": [0, 4, -1]},
            "`rope_scaling_layers` names layers [4, -1]; the model has layers 0..3.",
        ),
        (
            Molmo2Config,
            {"tie_word_embeddings": True},
            "Molmo2Config: `tie_word_embeddings` is True; Molmo2 never ties its output matrix, which covers fewer ids "
            "than the embedding; set it to False.",
        ),
        (
            Molmo2Config,
            {"adapter_config": {"vit_layers": [-3, 27]}},
            "`adapter_config.vit_layers` is [-3, 27]; the vision transformer has layers -27..26.",
        ),
        (
            Molmo2Config,
            {"adapter_config": {"vit_layers": [-28]}},
            "`adapter_config.vit_layers` is [-28]; the vision transformer has layers -27..26.",
        ),
        (
            Molmo2Config,
            {"adapter_config": {"text_hidden_size": 30}},
            "the connector writes vectors of 30 into a text model of width 2560; `adapter_config.text_hidden_size` "
            "must equal `text_config.hidden_size`.",
        ),
        (
            Molmo2Config,
            {"vit_config": {"hidden_size": 48}},
            "the connector reads features of 1152 from a vision transformer of width 48; `adapter_config.hidden_size` "
            "must equal `vit_config.hidden_size`.",
        ),
        (
            Molmo2Config,
            {"image_start_token_id": 152056, "image_col_id": -1},
            "token ids {'image_col_id': -1, 'frame_end_token_id': 152064} have no embedding; the two embedding tables "
            "hold ids 0..152063.",
        ),
        (
            Molmo2Config,
            {"frame_end_token_id": 152064},
            "token ids {'frame_end_token_id': 152064} have no embedding; the two embedding tables hold ids 0..152063.",
        ),
    ],
)
def test_refusals(config_class, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_class(**given)


@pytest.mark.parametrize(
    ("config_class", "given"),
    [
        (
            Molmo2VitConfig,
            {"image_default_input_size": [98, 126], "image_num_pos": 63},
        ),  # exactly the patches of a crop
        (
            Molmo2VitConfig,
            {"image_default_input_size": [98, 126], "image_num_pos": 49},
        ),  # a square table to be resized
        (Molmo2TextConfig, {"use_qk_norm": False, "qk_norm_type": "anything"}),
        (Molmo2TextConfig, {"additional_vocab_size": 0}),
        (Molmo2TextConfig, {"rope_scaling_layers": []}),
        (Molmo2Config, {"adapter_config": {"vit_layers": [-27, 26]}}),
    ],
)
def test_unusual_values_that_are_fine(config_class, given):
    config_class(**given)


def test_key_value_heads_default_to_the_query_heads():
    assert Molmo2TextConfig(num_attention_heads=6, num_key_value_heads=None).num_key_value_heads == 6


def test_position_table_defaults_to_the_patch_grid():
    assert Molmo2VitConfig(image_default_input_size=(98, 126)).image_num_pos == 63


@pytest.mark.parametrize("spelling", ["image_patch_id", "image_token_id", "image_high_res_id"])
def test_the_patch_token_under_every_spelling(spelling):
    config = Molmo2Config(**{spelling: 151940})
    assert config.image_patch_id == config.image_token_id == config.video_token_id == 151940


def test_a_part_that_is_no_configuration():
    with pytest.raises(ValueError, match=r"`text_config` is 'x'; expected a dictionary of settings"):
        Molmo2Config(text_config="x")


# --- wrong values ----------------------------------------------------------------------------------------------------

WRONG = (None, "x", "1", -1, 0, 1.5, math.nan, 10**12, True, [], [1], {})
# What may be in place of a value, for some fields: null for a default, 0 for an id or a probability, ...
ALLOWED = {
    "null": ({"rope_theta", "rope_scaling", "rope_scaling_layers", "num_key_value_heads", "image_num_pos"}, (None,)),
    "ids": (set(TOKEN_ID_OFFSETS) - {"image_patch_id"}, (None, 0)),
    "chances": ({"attention_dropout", "residual_dropout", "embedding_dropout", "image_feature_dropout"}, (0,)),
    "scales": ({"initializer_range"}, (0, 1.5, 10**12)),
    "positive": ({"layer_norm_eps", "rope_theta"}, (1.5, 10**12)),
    "flags": ({"qkv_bias", "norm_after", "use_frame_special_tokens"}, (True,)),
    "layers": ({"rope_scaling_layers"}, ([], [1])),
    "places": ({"vit_layers"}, ([1],)),
    "parts": ({"vit_config", "adapter_config", "text_config"}, (None, {})),
    "spellings": ({"image_patch_id", "image_high_res_id"}, (None,)),
    "untied": ({"tie_word_embeddings"}, (None, 0)),
    "unscaled": ({"rope_scaling"}, ({},)),
}
LIBRARY = {*BOOKKEEPING, "model_type", "torch_dtype"}


def wrong_settings():
    settings = json.loads((PUBLISHED / "Molmo2-4B" / "config.json").read_text(encoding="utf-8"))
    for part in (None, "vit_config", "adapter_config", "text_config"):
        holder = settings if part is None else settings[part]
        for name in sorted(holder.keys() - LIBRARY):
            right = [holder[name], *(value for names, values in ALLOWED.values() if name in names for value in values)]
            for value in WRONG:
                if repr(value) not in map(repr, right):
                    changed = {**holder, name: value}
                    yield name, value, changed if part is None else {**settings, part: changed}


def test_every_wrong_value_names_its_field():
    cases, unnamed = list(wrong_settings()), []
    for name, value, settings in cases:
        try:
            Molmo2Config(**settings)
            unnamed.append((name, value, "accepted"))
        except ValueError as error:
            if name not in str(error):
                unnamed.append((name, value, str(error)))
    assert len(cases) > 500
    assert unnamed == []


def test_wrong_values_under_the_native_names():
    with pytest.raises(
        ValueError, match=re.escape("is 'x'; expected a list of integers. Also called `vision_feature_layer`.")
    ):
        Molmo2AdapterConfig(vision_feature_layer="x")
    with pytest.raises(
        ValueError, match=re.escape("`image_patch_id` is 3, but `image_token_id` or `image_high_res_id`")
    ):
        Molmo2Config(image_patch_id=3, image_token_id=4)
    with pytest.raises(ValueError, match=re.escape("`rope_scaling` has 'factor' = 'x'; expected a number above 0.")):
        Molmo2TextConfig(rope_scaling={"rope_type": "linear", "factor": "x"})


def test_a_quantised_models_settings_can_be_written():
    """transformers 4.57 leaves the dtype of before in the parts too, and takes it out of the whole alone."""
    config = Molmo2Config()
    for part in (config, config.text_config, config.vit_config, config.adapter_config):
        part._pre_quantization_dtype = torch.float32
    written = config.to_json_string()
    assert "_pre_quantization_dtype" not in written
    assert json.loads(written) == json.loads(Molmo2Config().to_json_string())
