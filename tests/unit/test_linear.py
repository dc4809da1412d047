"""Products and attention on the CPU by oneDNN: the numbers, and when it is asked."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from molmo2.model import linear
from molmo2.model.attention import dispatch as attention
from molmo2.model.attention.cpu import attends_by_products, attention_by_products
from molmo2.model.linear import Linear, is_for_onednn
from support.checkpoints import build_model
from support.model_inputs import batch

ONEDNN = "mkldnn::_linear_pointwise"
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch was built without oneDNN, and nothing asks for it",
)


@pytest.fixture(autouse=True)
def small_products_count(request, monkeypatch):
    if "as_it_is" not in request.fixturenames:
        monkeypatch.setattr(linear, "FEWEST_MULTIPLICATIONS", 0)


@pytest.fixture
def as_it_is():
    """Small products are left to torch, as for users."""


def asked(work) -> bool:
    """Whether oneDNN was asked for a product while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU]) as noted:
        work()
    return any(event.key == ONEDNN for event in noted.key_averages())


def layer(bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(48, 80, bias=bias)


@pytest.mark.parametrize(
    "shape", [(48,), (1, 48), (3, 48), (2, 2, 48), (2, 8, 48), (17, 48), (0, 48), (3, 1, 200, 48)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_has_the_precision_of_float32(shape, bias):
    part, states = layer(bias), torch.randn(shape)
    with torch.no_grad():
        exact = nn.functional.linear(states.double(), part.weight.double(), part.bias.double() if bias else None)
        found = part(states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("take", [lambda x: x[:, ::2], lambda x: x[:, 3:, :48], lambda x: x.transpose(0, 1)[..., :48]])
def test_states_may_lie_anyhow(take):
    part, states = layer(), take(torch.randn(6, 8, 96))[..., :48]
    with torch.no_grad():
        torch.testing.assert_close(part(states), part(states.contiguous()), rtol=0, atol=0)


def test_onednn_is_asked_for_inference_in_float32():
    part, states = layer(), torch.randn(4, 48)
    with torch.no_grad():
        assert asked(lambda: part(states))
    with torch.inference_mode():
        assert asked(lambda: part(states))


def transposed() -> Linear:
    part = layer()
    part.weight = nn.Parameter(part.weight.detach().t().contiguous().t())
    return part


@pytest.mark.parametrize(
    ("part", "states", "context"),
    [
        (layer(), torch.randn(4, 48), torch.enable_grad),
        (layer(), torch.randn(4, 48), lambda: torch.autocast("cpu", torch.bfloat16)),
        (layer(), torch.randn(4, 48), lambda: torch.backends.mkldnn.flags(enabled=False)),
        (layer().bfloat16(), torch.randn(4, 48).bfloat16(), torch.no_grad),
        (layer().double(), torch.randn(4, 48).double(), torch.no_grad),
        (transposed(), torch.randn(4, 48), torch.no_grad),
    ],
    ids=["gradients", "autocast", "switched off", "bfloat16", "float64", "another layout"],
)
def test_otherwise_it_is_a_layer_of_torch(part, states, context):
    with torch.no_grad(), context():
        assert not asked(lambda: part(states))
        plain = nn.functional.linear(states, part.weight, part.bias)
        torch.testing.assert_close(part(states), plain, rtol=0, atol=0)


@torch.no_grad()
def test_states_of_another_width_are_refused_as_by_torch():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        layer()(torch.randn(4, 47))


@torch.no_grad()
def test_derivatives_in_forward_mode():
    """They are taken without recording gradients too."""
    part, states = layer(), torch.randn(4, 48)
    _, tangent = torch.func.jvp(part, (states,), (torch.ones_like(states),))
    torch.testing.assert_close(tangent, part.weight.sum(1).expand(4, -1), rtol=1e-5, atol=1e-5)


def test_small_products_are_left_to_torch(as_it_is):
    part = layer()
    with torch.no_grad():
        assert not asked(lambda: part(torch.randn(4, 48)))
        assert asked(lambda: part(torch.randn(80, 48)))


def test_gradients_are_those_of_torch():
    part, states = layer(), torch.randn(4, 48, requires_grad=True)
    part(states).square().sum().backward()
    expected = 2 * part(states).detach().t() @ states.detach()
    torch.testing.assert_close(part.weight.grad, expected)


def test_it_compiles_without_a_graph_break():
    part, states = layer(), torch.randn(4, 48)
    compiled = torch.compile(part, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(states), part(states), rtol=1e-5, atol=1e-5)


def heads(queries: int, keys: int, query_heads: int = 4, key_heads: int = 2, batch: int = 2):
    torch.manual_seed(queries)
    query = torch.randn(batch, query_heads, queries, 16)
    return query, *(torch.randn(batch, key_heads, keys, 16) for _ in range(2))


def masks(queries: int, keys: int):
    mask = torch.rand(2, 1, queries, keys) > 0.4
    mask[..., 0] = True
    return {
        "all pairs": None,
        "rows of a batch": mask,
        "one for all": mask[:1],
        "keys alone": mask[:, :, :1],
        "room for more keys": torch.cat((mask, mask), dim=-1),
    }


@pytest.mark.parametrize("name", masks(20, 30))
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 40 * 30, 2**20])
def test_attention_by_products_is_that_of_torch(name, key_heads, at_once, monkeypatch):
    monkeypatch.setattr("molmo2.model.attention.cpu.SCORES_AT_ONCE", at_once)
    query, key, value = heads(70, 30, key_heads=key_heads)
    mask = masks(70, 30)[name]
    with torch.no_grad():
        assert is_for_onednn(query, key)
    found = attention_by_products(query, key, value, mask, 0.3)
    expected = nn.functional.scaled_dot_product_attention(
        query.double(),
        key.double(),
        value.double(),
        attn_mask=None if mask is None else mask[..., :30],
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2**20])
def test_causal_attention_by_products(at_once, monkeypatch):
    monkeypatch.setattr("molmo2.model.attention.cpu.SCORES_AT_ONCE", at_once)
    query, key, value = heads(50, 50)
    found = attention_by_products(query, key, value, None, 0.3, is_causal=True)
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_heads_side_by_side_and_queries_that_see_nothing():
    """As projections leave them, (B, S, heads, head_dim); what padding answers counts in the loss of left padding."""
    query, key, value = (states.transpose(1, 2).contiguous().transpose(1, 2) for states in heads(32, 32))
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    mask[1, :, :5] = False
    found = attention_by_products(query, key, value, mask, 0.3)
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert not expected[1, :, :5].any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_when_attention_is_left_to_torch():
    query, key, value = heads(32, 32)
    with torch.no_grad():
        assert attends_by_products(query, key, value, 0.0)
        assert not attends_by_products(query, key, value, 0.1)
        assert not attends_by_products(query[:, :, :1], key, value, 0.0)
        assert not attends_by_products(*(states.bfloat16() for states in (query, key, value)), 0.0)
    assert not attends_by_products(query, key, value, 0.0)


def calls_in_a_forward_pass(monkeypatch) -> int:
    """How often the model asks for attention by products, for a question about a picture."""
    calls = []

    def noted(*args, **kwargs):
        calls.append(1)
        return attention_by_products(*args, **kwargs)

    monkeypatch.setattr(attention, "attention_by_products", noted)
    with torch.no_grad():
        build_model("qwen3")(**batch("image"))
    return len(calls)


def test_text_and_vision_attend_by_products_under_sdpa(monkeypatch):
    config = build_model("qwen3").config
    layers = config.text_config.num_hidden_layers + config.vit_config.num_hidden_layers
    assert 2 <= calls_in_a_forward_pass(monkeypatch) <= layers


def test_what_replaces_sdpa_is_called(monkeypatch):
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **kwargs: own(*args, **kwargs))
    assert calls_in_a_forward_pass(monkeypatch) == 0
