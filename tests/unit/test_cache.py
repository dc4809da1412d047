"""The cache grows in place, and is in all else a DynamicCache."""

import copy
import inspect

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from molmo2.model.cache import MIN_SPARE_TOKENS, PreallocatedLayer, use_preallocated_layers
from support.checkpoints import build_model, without_stopping
from support.model_inputs import batch

HEADS, HEAD_DIM, LAYERS = 2, 4, 2


class Pair:
    """A growing cache and the library's, told the same."""

    def __init__(self, grown=None, plain=None):
        self.grown = use_preallocated_layers(DynamicCache()) if grown is None else grown
        self.plain = DynamicCache() if plain is None else plain

    def __len__(self):
        return self.plain.get_seq_length()

    @property
    def rows(self):
        return len(self.plain.layers[0].keys) if len(self) else 2

    def each(self, work):
        for cache in (self.grown, self.plain):
            work(cache)

    def add(self, count):
        for layer in range(LAYERS):
            states = torch.rand(2, self.rows, HEADS, count, HEAD_DIM)
            for found, expected in zip(*(cache.update(*states, layer) for cache in (self.grown, self.plain))):
                assert torch.equal(found, expected)

    def check(self):
        assert self.grown.get_seq_length() == len(self)
        for grown, plain in zip(self.grown.layers, self.plain.layers, strict=True):
            assert torch.equal(grown.keys, plain.keys)
            assert torch.equal(grown.values, plain.values)

    def twin(self, deep):
        if deep:
            return Pair(copy.deepcopy(self.grown), copy.deepcopy(self.plain))
        twins = [copy.copy(cache) for cache in (self.grown, self.plain)]
        for twin in twins:
            twin.layers = [copy.copy(layer) for layer in twin.layers]
        return Pair(*twins)


def change(pair, rng, num_rows):
    """Something that the library does to a cache."""
    kind = rng.integers(6)
    if kind == 0 and len(pair) > 1:
        excess = int(rng.integers(1, len(pair)))
        pair.each(lambda cache: cache.crop(-excess))
    elif kind == 1:
        order = torch.from_numpy(rng.integers(0, num_rows, num_rows))
        pair.each(lambda cache: cache.reorder_cache(order))
    elif kind == 2 and num_rows < 5:
        pair.each(lambda cache: cache.batch_repeat_interleave(2))
    elif kind == 3:
        rows = torch.arange(1 + num_rows // 2)
        pair.each(lambda cache: cache.batch_select_indices(rows))
    else:
        pair.add(int(rng.integers(1, 40)))


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_the_content_is_that_of_the_library(seed):
    """Whatever is done to it, and to copies that share its memory."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pairs = [Pair()]
    pairs[0].add(int(rng.integers(1, 100)))
    for _ in range(60):
        pair = pairs[rng.integers(len(pairs))]
        if rng.random() < 0.1 and len(pairs) < 4:
            pairs.append(pair.twin(deep=bool(rng.integers(2))))
        elif rng.random() < 0.5:
            pair.add(1)
        else:
            change(pair, rng, pair.rows)
        for each in pairs:
            each.check()


@torch.no_grad()
def test_tokens_are_written_behind_the_others():
    cache = use_preallocated_layers(DynamicCache())
    cache.update(torch.rand(1, HEADS, 100, HEAD_DIM), torch.rand(1, HEADS, 100, HEAD_DIM), 0)
    places = []
    for _ in range(2 * MIN_SPARE_TOKENS):
        keys, values = cache.update(*torch.rand(2, 1, HEADS, 1, HEAD_DIM), 0)
        places.append((keys.data_ptr(), values.data_ptr()))
    assert len(set(places)) == 2  # memory was made when the first new token came, and once more
    capacity = keys.untyped_storage().nbytes() // (HEADS * HEAD_DIM * 4)
    assert capacity <= max(keys.shape[2] * 9 // 8, keys.shape[2] + MIN_SPARE_TOKENS)


def test_gradients_go_through_it():
    cache = use_preallocated_layers(DynamicCache())
    states = torch.rand(3, 1, HEADS, 5, HEAD_DIM, requires_grad=True)
    for part in states:
        keys, values = cache.update(part, 2 * part, 0)
    (keys * values).sum().backward()
    torch.testing.assert_close(states.grad, 4 * states.detach())


@torch.no_grad()
def test_other_kinds_of_tensors_are_joined():
    class Spread(torch.Tensor):
        """As those of tensor parallelism: not every operation has a meaning."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            assert function is not torch.Tensor.as_strided
            return super().__torch_function__(function, types, args, kwargs)

    cache = use_preallocated_layers(DynamicCache())
    for count in (3, 1, 1):
        keys, values = cache.update(*(torch.rand(1, HEADS, count, HEAD_DIM).as_subclass(Spread) for _ in range(2)), 0)
    assert keys.shape == values.shape == (1, HEADS, 5, HEAD_DIM)


def scaled(layer):
    layer.keys, layer.values = layer.keys * 1.5, layer.values.clone()


def expanded(layer):
    layer.keys, layer.values = (states[:1].expand(2, -1, -1, -1) for states in (layer.keys, layer.values))


def other_values(layer):
    layer.values = layer.values * 1.5


@pytest.mark.parametrize("edit", [scaled, expanded, other_values])
@torch.no_grad()
def test_states_that_somebody_exchanged(edit):
    """Keys or values may be replaced by others of the same shape, wherever these lie."""
    pair = Pair()
    for count in (5, 1, 1):
        pair.add(count)
    pair.each(lambda cache: [edit(layer) for layer in cache.layers])
    for count in (1, 1):
        pair.add(count)
    pair.check()


@torch.no_grad()
def test_new_states_of_another_kind():
    """Another dtype is joined as the library does, another number of rows refused, and nothing is changed by that."""
    pair = Pair()
    for count in (5, 1):
        pair.add(count)
    before = pair.grown.layers[0].keys.clone()
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        pair.grown.update(*torch.rand(2, 1, HEADS, 1, HEAD_DIM), 0)
    assert torch.equal(pair.grown.layers[0].keys, before)
    states = torch.rand(2, 2, HEADS, 1, HEAD_DIM, dtype=torch.float64)
    pair.each(lambda cache: [cache.update(*states, layer) for layer in range(LAYERS)])
    assert pair.grown.layers[0].keys.dtype == torch.float64
    pair.check()


@torch.no_grad()
def test_a_forward_pass_that_makes_a_cache_is_one_graph():
    model = build_model("qwen3").model.transformer
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids)
    found = torch.compile(model, fullgraph=True, backend="eager")(input_ids=ids)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert found.past_key_values.get_seq_length() == 12


def test_inference_mode_may_be_left():
    pair = Pair()
    with torch.inference_mode():
        for count in (5, 1, 1):
            pair.add(count)
    with torch.no_grad():
        pair.add(1)
        pair.add(1)
    pair.check()


def test_only_plain_caches_grow():
    config = build_model("qwen3").config.get_text_config()
    assert {type(layer) for layer in use_preallocated_layers(DynamicCache(config=config)).layers} == {
        PreallocatedLayer
    }
    offloading = use_preallocated_layers(DynamicCache(config=config, offloading=True))
    assert PreallocatedLayer not in {type(layer) for layer in offloading.layers}
    static = StaticCache(config=config, max_cache_len=8)
    kinds = [type(layer) for layer in static.layers]
    assert [type(layer) for layer in use_preallocated_layers(static).layers] == kinds
    assert use_preallocated_layers(None) is None


@pytest.mark.parametrize("own", [True, False], ids=["given", "made by generate"])
@torch.no_grad()
def test_answers_are_those_of_the_library_cache(own, monkeypatch):
    model = without_stopping(build_model("qwen3"))
    inputs = batch("image", "video")
    given = {"past_key_values": DynamicCache()} if own else {}
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    grown = model.generate(**inputs, **settings, **given)
    assert {type(layer) for layer in grown.past_key_values.layers} == {PreallocatedLayer}
    monkeypatch.setattr(PreallocatedLayer, "update", DynamicLayer.update)
    plain = model.generate(**inputs, **settings)
    assert torch.equal(grown.sequences, plain.sequences)
    torch.testing.assert_close(grown.logits, plain.logits, rtol=0, atol=0)


class StrictCache(DynamicCache):
    """Takes what the library's own models pass, which is a dictionary in early releases, and no more."""

    if "cache_kwargs" in inspect.signature(DynamicCache.update).parameters:

        def update(self, key_states, value_states, layer_idx, cache_kwargs):
            return super().update(key_states, value_states, layer_idx, cache_kwargs)

    else:

        def update(self, key_states, value_states, layer_idx):
            return super().update(key_states, value_states, layer_idx)


def test_a_cache_of_somebody_else():
    model, inputs = build_model("qwen3"), batch("text")
    with torch.no_grad():
        found = model(**inputs, past_key_values=StrictCache(config=model.config)).logits
        assert torch.equal(found, model(**inputs).logits)
