"""Rotary tables: the plain formula, yarn on chosen layers, and tables that survive casts and empty allocations."""

import math

import pytest
import torch

from molmo2.model.rotary import Molmo2RotaryEmbedding, plain_inverse_frequencies, rotate
from support.checkpoints import tiny_config

POSITIONS = torch.arange(7)[None]

# theta 500000, head_dim 16, factor 8, original length 128, beta 32 and 1: computed with transformers 4.57.1.
YARN_FREQUENCIES = [
    1.0,
    0.10908155143260956,
    0.004700753837823868,
    0.0009115831344388425,
    0.00017677668074611574,
    3.428102354519069e-05,
    6.647869668086059e-06,
    1.289173155782919e-06,
]
YARN_FACTOR = 1.2079441541679836


def test_plain_frequencies():
    expected = [500000 ** (-2 * i / 12) for i in range(6)]
    assert plain_inverse_frequencies(12, 500000.0).tolist() == pytest.approx(expected, rel=1e-6)


def test_rotation_turns_pairs_half_a_head_apart():
    angle = 0.3
    states = torch.tensor([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned = rotate(states, matrix[None, None, :, :, None].expand(1, 1, 2, 2, 2)).flatten().tolist()
    expected = [math.cos(angle), -2 * math.sin(angle), math.sin(angle), 2 * math.cos(angle)]
    assert turned == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_published_formula(dtype):
    """To the last bit: states * cos + turned * sin, each step rounded."""
    config = tiny_config("qwen3").text_config
    states = torch.randn(2, 7, 3, config.head_dim).to(dtype)
    angles = POSITIONS[..., None].float() * plain_inverse_frequencies(config.head_dim, config.rope_theta)
    cos, sin = (torch.cat((part, part), dim=-1).to(dtype)[:, :, None] for part in (angles.cos(), angles.sin()))
    first, second = states.chunk(2, dim=-1)
    expected = states * cos + torch.cat((-second, first), dim=-1) * sin
    assert torch.equal(rotate(states, Molmo2RotaryEmbedding(config)(POSITIONS, dtype)[0]), expected)


def yarn_config(layers: list[int] | None):
    config = tiny_config("olmo3").text_config
    config.head_dim = 16
    config.rope_theta = 500000.0
    config.rope_scaling = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": YARN_FACTOR,
    }
    config.rope_scaling_layers = layers
    return config


def test_yarn_as_in_the_release_the_models_were_published_with():
    rotary = Molmo2RotaryEmbedding(yarn_config(None))
    assert rotary.scaled_inv_freq.tolist() == pytest.approx(YARN_FREQUENCIES, rel=1e-6)
    assert rotary.scaling_factor == YARN_FACTOR


def test_yarn_without_an_original_length_takes_that_of_the_model():
    said, unsaid = yarn_config(None), yarn_config(None)
    said.max_position_embeddings = unsaid.max_position_embeddings = 128
    unsaid.rope_scaling = {"rope_type": "yarn", "factor": 8.0, "attention_factor": YARN_FACTOR}
    for config in (said, unsaid):
        rotary = Molmo2RotaryEmbedding(config)
        assert rotary.scaled_inv_freq.tolist() == pytest.approx(YARN_FREQUENCIES, rel=1e-6)


def test_listed_layers_are_scaled_and_the_rest_plain():
    config = yarn_config([0, 2])
    scaled = Molmo2RotaryEmbedding(yarn_config(None))(POSITIONS, torch.float32)[0]
    config_plain = tiny_config("qwen3").text_config
    config_plain.head_dim, config_plain.rope_theta = 16, 500000.0
    plain = Molmo2RotaryEmbedding(config_plain)(POSITIONS, torch.float32)[0]
    tables = Molmo2RotaryEmbedding(config)(POSITIONS, torch.float32)
    assert len(tables) == config.num_hidden_layers
    for layer, table in enumerate(tables):
        assert torch.equal(table, scaled if layer in (0, 2) else plain)
    assert not torch.equal(scaled, plain)


def test_a_null_list_with_scaling_means_every_layer():
    rotary = Molmo2RotaryEmbedding(yarn_config(None))
    assert rotary.scaled_layers == set(range(rotary.config.num_hidden_layers))


@pytest.mark.parametrize("family", ["qwen3", "olmo3"])
def test_tables_stay_float32_through_casts(family):
    rotary = Molmo2RotaryEmbedding(tiny_config(family).text_config)
    expected = rotary(POSITIONS, torch.float32)
    for cast in (lambda: rotary.to(torch.bfloat16), rotary.half, rotary.double, rotary.float):
        cast()
        assert rotary.inv_freq.dtype == torch.float32
        found = rotary(POSITIONS, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tables_are_restored_after_an_empty_allocation():
    rotary = Molmo2RotaryEmbedding(tiny_config("olmo3").text_config)
    expected = rotary.inv_freq.clone(), rotary.scaled_inv_freq.clone()
    rotary.to_empty(device="cpu")
    rotary.inv_freq.fill_(float("nan"))
    rotary.scaled_inv_freq.fill_(7.0)
    rotary.restore()
    assert torch.equal(rotary.inv_freq, expected[0])
    assert torch.equal(rotary.scaled_inv_freq, expected[1])


def test_tables_come_out_in_the_dtype_of_the_model():
    table, *_ = Molmo2RotaryEmbedding(tiny_config("qwen3").text_config)(POSITIONS, torch.bfloat16)
    assert table.dtype == torch.bfloat16
    assert table.shape == (1, 7, 2, 2, 6)


def test_tables_are_not_stored():
    assert not Molmo2RotaryEmbedding(tiny_config("olmo3").text_config).state_dict()
