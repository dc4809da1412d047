"""Decoding under sdpa: heads that share keys are queries of one head, to the same numbers."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from molmo2.model.attention import dispatch as attention
from molmo2.model.attention.dispatch import Molmo2AttentionBase, sdpa_grouped_decode
from support.checkpoints import build_model, without_stopping
from support.model_inputs import batch

QUERY_HEADS, KEY_HEADS, KEYS, HEAD_DIM = 6, 2, 40, 8
MODULE = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KEY_HEADS, is_causal=True)
PRECISION = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}


def states(queries, dtype=torch.float32):
    """Keys are views of a cache with room behind them."""
    torch.manual_seed(queries)
    room = torch.randn(2, 3, KEY_HEADS, KEYS + 9, HEAD_DIM, dtype=dtype)[:, :, :, :KEYS]
    return torch.randn(3, QUERY_HEADS, queries, HEAD_DIM, dtype=dtype), *room


def mask_of(kind, queries):
    if kind == "every key":
        return None
    mask = torch.rand(3, 1, 1 if kind == "padding" else queries, KEYS + 5 * (kind == "longer")) > 0.5
    mask[..., :2] = True
    return mask[:1] if kind == "one for all rows" else mask


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(
    ("queries", "kind"),
    [(1, "every key"), *((n, kind) for n in (1, 2, 15) for kind in ("padding", "each", "longer", "one for all rows"))],
)
def test_the_numbers_are_those_of_the_library(queries, kind, dtype):
    query, key, value = states(queries, dtype)
    mask = mask_of(kind, queries)
    found = sdpa_grouped_decode(query, key, value, mask, scaling=0.3, dropout=0.0)
    # releases differ in what they do with masks that are longer than the keys
    shown = None if mask is None else mask[..., :KEYS].expand(-1, -1, queries, -1)
    expected, _ = sdpa_attention_forward(MODULE, query, key, value, shown, dropout=0.0, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=PRECISION[dtype], atol=PRECISION[dtype])


def chosen(query, key, mask, is_causal=True):
    module = Molmo2AttentionBase.__new__(Molmo2AttentionBase)
    torch.nn.Module.__init__(module)
    module.is_causal = is_causal
    return module._is_grouped_decode(query, key, mask)


def test_it_is_chosen_for_few_queries_of_heads_that_share_keys():
    query, key, _ = states(1)
    assert chosen(query, key, None)
    assert chosen(*states(15)[:2], mask_of("each", 15))
    assert not chosen(*states(16)[:2], mask_of("each", 16))
    assert not chosen(query[:, :KEY_HEADS], key, None)
    assert not chosen(query, key, torch.zeros(3, 1, 1, KEYS))  # added to the scores
    query, key, _ = states(5)
    assert not chosen(query, key[:, :, :5], None)
    assert chosen(query, key[:, :, :5], None, is_causal=False)


@pytest.mark.parametrize("names", [("image",), ("text", "image")], ids=["alone", "padded"])
@torch.no_grad()
def test_every_step_of_decoding_takes_it(names, monkeypatch):
    model, calls = without_stopping(build_model("qwen3")), []

    def noted(query, *args):
        calls.append(query.shape[2])
        return sdpa_grouped_decode(query, *args)

    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    monkeypatch.setattr(attention, "sdpa_grouped_decode", noted)
    found = model.generate(**batch(*names), **settings)
    assert calls == [1] * 4 * model.config.text_config.num_hidden_layers
    monkeypatch.setattr(attention, "MAX_GROUPED_QUERIES", 0)
    expected = model.generate(**batch(*names), **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
