"""Which settings of a native checkpoint become what, and which are refused."""

import copy
import math
from typing import Any

import pytest

from molmo2.convert import UnsupportedError
from molmo2.convert import config_files as target
from molmo2.convert.native_config import SECTIONS, parse_config
from molmo2.convert.tokenizer import EXTRA_TOKENS
from support.native_checkpoints import native_section

TOKEN_IDS = {token: 277 + number for number, token in enumerate(EXTRA_TOKENS)}


def refusal(changes: dict[str, Any], **options) -> str:
    with pytest.raises(UnsupportedError) as caught:
        parse_config(native_section(changes), **options)
    return str(caught.value)


def converted(changes: dict[str, Any] | None = None, **options) -> dict[str, Any]:
    config = parse_config(native_section(changes), **options)
    return target.model_config(config, dtype="float32", attention="sdpa", token_ids=TOKEN_IDS)


def without(*paths: str) -> dict[str, Any]:
    section = native_section()
    for path in paths:
        *parents, name = path.split(".")
        place = section
        for parent in parents:
            place = place[parent]
        del place[name]
    return section


def test_another_architecture_stops_first():
    for name in ("molmo_point", "token_indexing_video_molmo2"):
        message = refusal({"model_name": name, "llm.rope": False})
        assert f"model_name is '{name}'" in message
        assert "MolmoPoint" in message
        assert "llm.rope" not in message
    assert "first-generation Molmo" in refusal({"model_name": "molmo"})
    assert "model_name is 'llava'; expected 'video_olmo'" in refusal({"model_name": "llava"})


REFUSED = {
    "llm.block_type": "parallel",
    "llm.include_bias": True,
    "llm.layer_norm_type": "default",
    "llm.rope": False,
    "llm.rope_type": "dynamic",
    "llm.activation_type": "gelu",
    "llm.attention_layer_norm_type": "none",
    "llm.attention_layer_norm_with_affine": False,
    "llm.layer_norm_with_affine": False,
    "llm.bias_for_layer_norm": True,
    "llm.scale_logits": True,
    "llm.normalize_input_embeds": True,
    "llm.can_predict_extra_tokens": True,
    "llm.clip_qkv": 8.0,
    "bi_directional_attn": "all",
    "vision_backbone.vit.image_model_type": "openai",
    "vision_backbone.vit.resize_mode": "default",
    "vision_backbone.vit.normalize": "openai",
    "vision_backbone.image_pooling_2d": "attention",
    "vision_backbone.image_projector": "linear",
    "vision_backbone.image_padding_embed": "pad_embed",
    "vision_backbone.use_deepstack": True,
    "vision_backbone.share_connector": True,
    "vision_backbone.image_pooling_h": 3,
    "vision_backbone.image_pooling_w": 1,
    "mm_preprocessor.image.crop_mode": "resize",
    "mm_preprocessor.video.time_mode": "per-frame",
    "mm_preprocessor.video.frame_sample_mode": "random",
    "mm_preprocessor.video.per_frame_special_token": False,
}


@pytest.mark.parametrize("path", REFUSED)
def test_each_setting_the_target_cannot_express(path):
    message = refusal({path: REFUSED[path]})
    assert f"{path} is {REFUSED[path]!r}; only " in message
    assert " can be converted: " in message
    assert message.count("  - ") == 1


def test_every_restricted_field_has_a_refusal_above():
    restricted = {
        f"{path}.{name}".lstrip(".") for path, fields, _ in SECTIONS for name, field in fields.items() if field.only
    }
    assert restricted == set(REFUSED)


CONTRADICTIONS = [
    ({"mm_preprocessor.image.max_multi_image_crops": 8}, "max_crops is 4 and max_multi_image_crops is 8"),
    ({"mm_preprocessor.image.multi_image_pooling_w": 4}, "pooling_w is 2 and multi_image_pooling_w is 4"),
    ({"mm_preprocessor.image.multi_image_pooling_h": 1}, "pooling_h is 2 and multi_image_pooling_h is 1"),
    ({"mm_preprocessor.image.overlap_margins": [1]}, "overlap_margins is [1]; expected two numbers"),
    ({"mm_preprocessor.video.max_fps": [1.0, 2.0]}, "max_fps is [1.0, 2.0]; the target has exactly one"),
    ({"mm_preprocessor.video.max_fps": []}, "max_fps is []; the target has exactly one"),
    ({"mm_preprocessor.video.max_fps": None}, "max_fps is None; expected a list (a number each)"),
    ({"mm_preprocessor.video.max_frames": 0}, "max_frames is 0; expected a positive number"),
    ({"mm_preprocessor.video": None}, "mm_preprocessor.video is missing; expected a section"),
    ({"llm.n_kv_heads": 3}, "llm.n_heads is 4, which 3 key/value heads do not divide"),
    ({"llm.n_heads": 3, "llm.n_kv_heads": 1, "llm.head_dim": None}, "3 heads do not divide llm.d_model, 40"),
    ({"llm.mlp_hidden_size": 113}, "is 113; up and gate need an even number"),
    ({"llm.additional_vocab_size": 10}, "llm.additional_vocab_size is 10; the 14 extra tokens need a row each"),
    ({"llm.full_attention_layers": [1, 3]}, "llm.full_attention_layers names [3]; there are layers 0 to 2"),
    ({"llm.d_model": "wide"}, "llm.d_model is 'wide'; expected an integer"),
    ({"llm.d_model": 40.5}, "llm.d_model is 40.5; expected an integer"),
    ({"llm.d_model": None}, "llm.d_model is None; expected an integer"),
    ({"llm.qkv_bias": "yes"}, "llm.qkv_bias is 'yes'; expected true or false"),
    ({"llm.n_layers": 0}, "llm.n_layers is 0; expected a positive number"),
    ({"vision_backbone.vit_layers": [-3, 10]}, "vit_layers is [-3, 10]; expected layers from -10 to 9"),
    ({"vision_backbone.vit_layers": []}, "vit_layers is []; expected layers"),
    ({"vision_backbone.vit.image_default_input_size": [98, 99]}, "expected (height, width) in multiples of 14"),
    ({"llm.max_sequence_length": None}, "are not set; pass --max-model-len"),
    ({"llm.max_sequence_length": 0}, "llm.max_sequence_length, is 0; expected a positive number, or pass --max-model"),
    ({"llm.rope_theta": math.nan}, "llm.rope_theta is nan; expected a number"),
    ({"llm.rope_theta": "-.inf"}, "llm.rope_theta is '-.inf'; expected a number"),
    ({"llm.rope_theta": -math.inf}, "llm.rope_theta is -inf; expected a number"),
    ({"llm.rope_theta": 10**400}, "expected a number"),
    ({"llm.rope_theta": 0}, "llm.rope_theta is 0; expected more than 0"),
    ({"llm.rope_factor": -2.0}, "llm.rope_factor is -2.0; expected more than 0"),
    ({"llm.layer_norm_eps": -1.0}, "llm.layer_norm_eps is -1.0; expected 0 or more"),
    ({"llm.initializer_range": -0.1}, "llm.initializer_range is -0.1; expected 0 or more"),
    ({"vision_backbone.vit.image_norm_eps": -1e-6}, "vit.image_norm_eps is -1e-06; expected 0 or more"),
    ({"vision_backbone.image_feature_dropout": 1.5}, "image_feature_dropout is 1.5; expected 0 to 1"),
    ({"mm_preprocessor.video.max_fps": [0]}, "max_fps is [0]; expected more than 0"),
    ({"mm_preprocessor.video.max_fps": [math.nan]}, "max_fps is [nan]; expected a list (a number each)"),
    ({"mm_preprocessor.image.overlap_margins": [-1, 1]}, "overlap_margins is [-1, 1]; expected 0 or more"),
]


@pytest.mark.parametrize(
    ("changes", "expected"), CONTRADICTIONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_contradictions(changes, expected):
    assert expected in refusal(changes)


def test_all_refusals_are_reported_together():
    message = refusal({path: value for path, value in REFUSED.items() if path.startswith("llm.")})
    assert message.count("  - ") == sum(path.startswith("llm.") for path in REFUSED)


def test_refused_values_and_contradictions_are_reported_together():
    message = refusal(
        {
            "llm.scale_logits": True,
            "llm.mlp_hidden_size": 113,
            "vision_backbone.vit.image_emb_dim": "wide",
            "mm_preprocessor.image.max_multi_image_crops": 8,
            "mm_preprocessor.video.max_fps": [1.0, 2.0],
            "new": 1,
        }
    )
    assert message.count("  - ") == 6


def test_unknown_fields_are_refused_unless_accepted_by_name():
    changes = {"llm.new_switch": 1, "vision_backbone.vit.other": [2], "third": True}
    message = refusal(changes)
    assert "llm.new_switch is unknown (value 1)" in message
    assert "pass --ignore-field vision_backbone.vit.other" in message
    assert "  - third is unknown (value True)" in message
    parse_config(native_section(changes), ignored_fields=["llm.new_switch", "vision_backbone.vit.other", "third"])
    assert "third" in refusal(changes, ignored_fields=["llm.new_switch", "vision_backbone.vit.other", "llm.third"])


def test_keys_of_older_trainers_are_dropped():
    legacy = {
        "debug": None,
        "shared_low_high_embedding": True,
        "llm.mm_rope": False,
        "llm.debug": False,
        **{
            f"vision_backbone.{name}": 1 for name in ("fix_image_padding", "residual_patch_features", "patch_residual")
        },
        **{f"vision_backbone.{name}": 1 for name in ("patch_residual_thresh", "debug", "frame_embedding")},
        "vision_backbone.pool_size_embeds": None,
        "vision_backbone.image_pooling_h": 2,
        "vision_backbone.image_pooling_w": 2,
        "vision_backbone.vit.truncate_pos_ids": False,
    }
    assert converted(legacy) == converted()


def test_missing_fields_take_the_trainers_defaults():
    optional = [
        f"{path}.{name}"
        for path, fields, _ in SECTIONS
        for name, field in fields.items()
        if field.nullable and path and _has(path, name)
    ]
    assert len(optional) > 10
    config = parse_config(without(*optional), max_positions=512)
    assert config.llm["n_kv_heads"] is None
    assert config.num_kv_heads == 4
    assert config.head_dim == 10
    assert config.fused_mlp_size == 160
    assert config.embedding_rows == 277
    eps = target.model_config(config, dtype="float32", attention="sdpa", token_ids=TOKEN_IDS)["text_config"]
    assert eps["layer_norm_eps"] == 1e-5


def _has(path: str, name: str) -> bool:
    section = native_section()
    for part in path.split("."):
        section = section[part]
    return name in section


def test_missing_sizes_are_not_guessed():
    with pytest.raises(UnsupportedError, match=r"llm\.d_model is missing, and no default is safe") as caught:
        parse_config(without("llm.d_model", "llm.weight_tying", "vision_backbone.vit.image_num_pos"))
    assert "llm.weight_tying is missing" in str(caught.value)
    assert "vision_backbone.vit.image_num_pos is missing" in str(caught.value)


def test_missing_sections():
    with pytest.raises(UnsupportedError, match="llm is missing; expected a section"):
        parse_config(without("llm"))
    with pytest.raises(UnsupportedError, match=r"vision_backbone\.vit is 3; expected a section"):
        parse_config(native_section({"vision_backbone.vit": 3}))


def test_numbers_that_yaml_reads_as_strings():
    assert converted({"llm.layer_norm_eps": "1e-6"})["text_config"]["layer_norm_eps"] == 1e-6


def test_longest_sequence():
    assert converted()["text_config"]["max_position_embeddings"] == 1024
    both = {"llm.max_position_embeddings": 2048}
    assert converted(both)["text_config"]["max_position_embeddings"] == 2048
    assert converted(both, max_positions=4096)["text_config"]["max_position_embeddings"] == 4096


def test_a_useless_longest_sequence_may_be_replaced():
    text = converted({"llm.max_sequence_length": 0}, max_positions=512)["text_config"]
    assert text["max_position_embeddings"] == 512


def test_numbers_at_the_edge_of_their_range():
    changes = {
        "llm.layer_norm_eps": 0,
        "llm.rope_theta": 1e-3,
        "vision_backbone.image_feature_dropout": 1,
        "mm_preprocessor.image.overlap_margins": [0, 4],
    }
    assert converted(changes)["adapter_config"]["image_feature_dropout"] == 1


def test_scaled_rotary_layers():
    yarn = {"llm.rope_type": "yarn", "llm.rope_factor": 8.0, "llm.full_attention_layers": [2]}
    text = converted(yarn)["text_config"]
    assert text["rope_scaling"] == {"rope_type": "yarn", "factor": 8.0}
    assert text["rope_scaling_layers"] == [2]
    others = converted({**yarn, "llm.sliding_attention_rope_scaling": True})
    assert others["text_config"]["rope_scaling_layers"] == [0, 1]
    assert converted({**yarn, "llm.full_attention_layers": None})["text_config"]["rope_scaling_layers"] is None


def test_sizes_that_follow_from_others():
    config = converted({"llm.head_dim": None, "llm.n_kv_heads": None, "llm.mlp_hidden_size": None})
    text = config["text_config"]
    assert (text["head_dim"], text["num_key_value_heads"], text["intermediate_size"]) == (10, 4, 80)
    assert config["adapter_config"]["intermediate_size"] == 80


def test_the_low_resolution_view_may_follow_the_crops():
    config = parse_config(native_section({"mm_preprocessor.image.use_single_crop_col_tokens": None}))
    assert target.processor_config(config)["use_single_crop_col_tokens"] is None


def test_causal_images_convert_with_a_warning():
    assert parse_config(native_section()).warnings == ()
    config = parse_config(native_section({"bi_directional_attn": None}))
    assert not config.has_two_way_images
    (warning,) = config.warnings
    assert "Set `inputs['token_type_ids']` to zero" in warning


def test_other_prompt_formats_convert_with_a_warning():
    (warning,) = parse_config(native_section({"data_formatter.message_format": "role"})).warnings
    assert "data_formatter.message_format is 'role', but the chat template writes 'qwen3'" in warning


def test_the_section_is_not_changed():
    section = native_section()
    before = copy.deepcopy(section)
    parse_config(section)
    assert section == before
