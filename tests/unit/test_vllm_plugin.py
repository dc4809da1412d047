"""The parts of the vLLM plugin that need no vLLM; tests/clients/test_vllm.py runs the engine."""

import logging
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from molmo2.vllm import is_supported
from molmo2.vllm.options import sorted_options
from molmo2.vllm.settings import EngineSettings, RefusedSettings
from molmo2.vllm.training_mask import TrainingMask

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.32.0", True),
        ("0.33.1+cu130", True),
        ("0.32", True),
        ("0.31.2", False),
        ("0.3.2", False),
        ("0.320.0", False),
    ],
)
def test_supported_versions(version, expected):
    assert is_supported(version) is expected


def test_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(RefusedSettings, "version", "0.99.1")
    with pytest.raises(ValueError, match=r"works with vLLM 0\.32 and 0\.33; this is vLLM 0\.99\.1"):
        RefusedSettings.verify_and_update_config(None)


class FakeLayer:
    """An attention layer of vLLM whose requests lie one after the other: causal, each by itself."""

    def __init__(self):
        self.impl = SimpleNamespace(forward=self.forward, scale=HEAD_DIM**-0.5)

    def forward(self, layer, query, key, value, kv_cache, metadata, output, output_scale=None):
        starts = metadata.query_start_loc.tolist()
        for start, end in pairwise(starts):
            output[start:end] = attention(query[start:end], key[start:end], value[start:end], causal(end - start))
        return output


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def attention(query, key, value, allowed):
    states = [rows.transpose(0, 1) for rows in (query, key, value)]
    return scaled_dot_product_attention(*states, attn_mask=allowed, enable_gqa=True).transpose(0, 1)


def one_step(lengths, cached=None):
    """Queries, keys and values of requests, and what vLLM's metadata says of them."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    states = [torch.randn(total, heads, HEAD_DIM, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    seq_lens = torch.tensor(lengths) + torch.tensor(cached or [0] * len(lengths))
    return states, SimpleNamespace(query_start_loc=ends, seq_lens=seq_lens)


def run(mask, states, metadata):
    layer = FakeLayer()
    mask.apply_to(layer)
    output = torch.empty_like(states[0])
    layer.impl.forward(layer, *states, None, metadata, output=output, output_scale=None)
    return output


@pytest.mark.parametrize("queries_per_block", [3, 512])
def test_visual_tokens_of_a_prompt_see_each_other_and_no_other_prompt(monkeypatch, queries_per_block):
    monkeypatch.setattr("molmo2.vllm.training_mask.BlockwiseMask.queries_per_block", queries_per_block)
    lengths = [1, 7, 5, 6]  # a decoding step, a prompt with two images, text alone, one image
    is_visual = torch.tensor([0] + [0, 1, 1, 0, 1, 1, 0] + [0] * 5 + [0, 1, 1, 1, 0, 0]).bool()
    states, metadata = one_step(lengths, cached=[9, 0, 0, 0])
    mask = TrainingMask()
    mask.begin_step(is_visual)
    found = run(mask, states, metadata)
    for start, end in [(0, 1), (1, 8), (8, 13), (13, 19)]:
        own = is_visual[start:end]
        allowed = causal(end - start) | (own[:, None] & own)
        expected = attention(*(rows[start:end] for rows in states), allowed)
        torch.testing.assert_close(found[start:end], expected)
    causal_alone = attention(*(rows[1:8] for rows in states), causal(7))
    assert not torch.allclose(found[1:8], causal_alone, atol=1e-3)


def test_a_step_without_visual_tokens_is_left_to_vllm():
    states, metadata = one_step([4])
    mask = TrainingMask()
    mask.begin_step(torch.ones(4).bool())
    mask.begin_step(torch.zeros(4).bool())  # the next step
    torch.testing.assert_close(run(mask, states, metadata), attention(*states, causal(4)))


def test_a_prompt_in_pieces_is_reported(caplog):
    states, metadata = one_step([4], cached=[2])
    mask = TrainingMask()
    mask.begin_step(torch.tensor([0, 1, 1, 0]).bool())
    with caplog.at_level(logging.ERROR, logger="vllm.molmo2"):
        run(mask, states, metadata)
    assert "a prompt of 6 tokens reached the model in pieces, the last of 4" in caplog.text


@dataclass
class Architecture:
    """What vLLM keeps of a model's configuration."""

    vocab_size: int = 1000


def engine(**parallel):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{"pipeline_parallel_size": 1, **parallel}),
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=True, long_prefill_token_threshold=512, max_num_batched_tokens=2048
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        model_config=SimpleNamespace(
            max_model_len=36864,
            model_arch_config=Architecture(),
            hf_config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=1000, additional_vocab_size=128)),
        ),
    )


def test_prompts_are_computed_in_one_step():
    config = engine()
    EngineSettings.verify_and_update_config(config)
    scheduler = config.scheduler_config
    assert not scheduler.enable_chunked_prefill
    assert not config.cache_config.enable_prefix_caching
    assert scheduler.long_prefill_token_threshold == 0
    assert scheduler.max_num_batched_tokens == scheduler.max_num_encoder_input_tokens == 36864
    assert scheduler.encoder_cache_size > 36864


def test_a_mask_that_cannot_be_kept_is_announced(caplog):
    config = engine(pipeline_parallel_size=2)
    with caplog.at_level(logging.WARNING, logger="vllm.molmo2"):
        EngineSettings.verify_and_update_config(config)
    assert "NO MASK OF THE TRAINING with pipeline parallelism" in caplog.text
    assert "Of 63 answers of a small model 33 and 49 stayed the same" in caplog.text  # what it costs
    assert config.scheduler_config.enable_chunked_prefill


def test_the_vocabulary_has_the_visual_tokens():
    config = engine()
    EngineSettings.verify_and_update_config(config)
    assert config.model_config.model_arch_config.vocab_size == 1128


def test_options_by_modality():
    assert sorted_options({"max_crops": 3, "num_frames": 9, "videos_kwargs": {"clip": [0, 2]}}, 100) == {
        "text_kwargs": {},
        "images_kwargs": {"max_crops": 3},
        "videos_kwargs": {"num_frames": 9, "clip": [0, 2]},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling_size": 1}, r"has \['pooling_size'\]; expected some of .*max_crops"),
        ({"images_kwargs": {"pixel_dtype": "uint8"}}, r"\['images_kwargs.pixel_dtype'\]"),
        ({"text_kwargs": {"padding": True}}, r"\['text_kwargs.padding'\]"),
        ({"max_crops": 101}, "`max_crops` is 101, but a prompt has at most 100 tokens"),
        ({"videos_kwargs": {"num_frames": 10**9}}, "`num_frames` is 1000000000, but"),
        ({"num_frames": 3, "videos_kwargs": {"num_frames": 3}}, "given twice"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sorted_options(options, 100)
