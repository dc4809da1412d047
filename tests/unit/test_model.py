"""The model against itself: what must not change the numbers, what must be refused."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging

from molmo2.model import vision_inputs
from molmo2.model.compat import CACHE_NAME
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from support.checkpoints import FAMILIES, build_model, make_image, without_stopping, write_checkpoint
from support.model_inputs import MIXED, batch, clip, processor, real_tokens

ATOL = 2e-5
PIECES = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build_model(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return build_model("qwen3")


@torch.no_grad()
def logits_of(model, inputs, **options) -> torch.Tensor:
    return model(**inputs, **options).logits


def with_attention(model, implementation: str):
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    return other


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_rows(model, side):
    inputs = batch(*MIXED, padding_side=side)
    together = real_tokens(logits_of(model, inputs), inputs)
    for name, row in zip(MIXED, together, strict=True):
        alone = logits_of(model, batch(name))[0]
        torch.testing.assert_close(row, alone, atol=ATOL, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(model, implementation):
    inputs = batch(*MIXED)
    other = with_attention(model, implementation)
    parts = (other, other.model.transformer, other.vision_backbone, other.vision_backbone.image_vit)
    assert [part.config._attn_implementation for part in parts] == [implementation] * 4
    expected, found = logits_of(model, inputs), logits_of(other, inputs)
    for a, b in zip(real_tokens(expected, inputs), real_tokens(found, inputs), strict=True):
        torch.testing.assert_close(b, a, atol=5e-5, rtol=0)


def test_each_part_calls_the_attention_that_was_chosen(qwen3, monkeypatch):
    """Flash attention itself is not installed here; what it would be called with is recorded instead."""
    calls = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        calls.append((type(module).__name__, query.dtype, attention_mask))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    model = copy.deepcopy(qwen3)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", recording)
    for part in (model, model.model.transformer, model.vision_backbone, model.vision_backbone.image_vit):
        part.config._attn_implementation_internal = "flash_attention_2"
    expected = logits_of(qwen3, batch("text"))
    torch.testing.assert_close(logits_of(model, batch("text")), expected, atol=ATOL, rtol=0)
    assert {name for name, *_ in calls} == {"Molmo2Attention"}
    calls.clear()
    # With images the text model needs a mask that flash lacks, as does masked pooling; the vision tower does not.
    torch.testing.assert_close(logits_of(model, batch("image")), logits_of(qwen3, batch("image")), atol=ATOL, rtol=0)
    assert {name for name, *_ in calls} == {"Molmo2VisionAttention"}
    assert {dtype for _, dtype, _ in calls} == {torch.float32}


@pytest.mark.parametrize(("crops", "tokens"), [(1, 1), (3, 7), (None, None), (1000, 1000)])
def test_chunked_vision_equals_unchunked(model, crops, tokens):
    inputs = batch("two images")
    names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
    with torch.no_grad():
        expected = model.get_image_features(**{name: inputs[name] for name in names})
        backbone = copy.deepcopy(model.vision_backbone)
        other = copy.copy(model.model)
        other._modules = {**model.model._modules, "vision_backbone": backbone}
        backbone.crops_per_chunk, backbone.tokens_per_chunk = crops, tokens
        found = other.get_image_features(**{name: inputs[name] for name in names})
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(found[name], expected[name], atol=ATOL, rtol=0)


def test_a_chunk_of_nothing_is_refused(qwen3):
    backbone = copy.deepcopy(qwen3.vision_backbone)
    backbone.crops_per_chunk = 0
    with pytest.raises(ValueError, match="A chunk of 0 was asked for; expected at least 1"):
        backbone(batch("image")["pixel_values"], torch.tensor([[0, 1, 7, 8]]))


@pytest.mark.parametrize("name", MIXED)
def test_cached_steps_equal_one_pass(model, name):
    inputs = batch(name)
    ids, following = inputs.pop("input_ids"), torch.tensor([[40, 41, 42, 43, 44]])
    everything = torch.cat([ids, following], 1)
    inputs.pop("attention_mask")
    types = inputs.pop("token_type_ids")
    longer_types = torch.cat([types, torch.zeros_like(following, dtype=torch.bool)], 1)
    expected = logits_of(model, {**inputs, "token_type_ids": longer_types}, input_ids=everything)
    cache = DynamicCache(config=model.config.text_config)
    pieces = [logits_of(model, {**inputs, "token_type_ids": types}, input_ids=ids, past_key_values=cache)]
    for start, end in ((0, 1), (1, 2), (2, 5)):  # one token at a time, then several
        pieces.append(logits_of(model, {}, input_ids=following[:, start:end], past_key_values=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", MIXED)
def test_embeddings_instead_of_ids(model, name):
    inputs = batch(name)
    expected = logits_of(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    torch.testing.assert_close(logits_of(model, inputs, inputs_embeds=embeds), expected, atol=ATOL, rtol=0)
    inputs.pop("token_type_ids")  # visual tokens are then found by their embedding
    torch.testing.assert_close(logits_of(model, inputs, inputs_embeds=embeds), expected, atol=ATOL, rtol=0)


def test_token_types_under_either_name_or_none(model):
    inputs = batch("image", "text")
    expected = logits_of(model, inputs)
    types = inputs.pop("token_type_ids")
    assert torch.equal(logits_of(model, inputs), expected)
    assert torch.equal(logits_of(model, inputs, mm_token_type_ids=types.long()), expected)
    causal = logits_of(model, inputs, token_type_ids=torch.zeros_like(types))
    assert (causal - expected).abs().max() > 0.01  # the mask matters


def test_images_matter_and_follow_their_order(model):
    inputs = batch("image and video", "image")
    expected = logits_of(model, inputs)
    for name in ("pixel_values", "pixel_values_videos"):
        changed = {**inputs, name: inputs[name].flip(0)}
        assert (logits_of(model, changed) - expected).abs().max() > 0.01
    # The second row's image belongs to it alone.
    first_crops = int(inputs["image_num_crops"][0])
    pixels = inputs["pixel_values"].clone()
    pixels[first_crops:] = 0
    changed = logits_of(model, {**inputs, "pixel_values": pixels})
    torch.testing.assert_close(changed[0], expected[0], atol=ATOL, rtol=0)
    assert (changed[1] - expected[1]).abs().max() > 0.01


def test_a_video_before_an_image(model):
    """The images go where the prompt places them, whatever the order of the arguments."""
    prepared = {"return_tensors": "pt", "video_metadata": [{"total_num_frames": 3, "fps": 2.0}]}
    inputs = dict(processor()(text="<|video|>and<|image|>?", images=make_image(), videos=[clip(3)], **prepared))
    image = {name: inputs[name] for name in ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")}
    video = {name: inputs[name] for name in ("pixel_values_videos", "video_token_pooling", "video_grids")}
    with torch.no_grad():
        features = [model.get_video_features(**video), model.get_image_features(**image)]
        expected = torch.cat([vectors for own in features for vectors in own.pooler_output])
        assert torch.equal(model(**inputs).image_hidden_states, expected)


def test_hidden_states_and_attentions(model):
    inputs = batch("image", "text")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        plain = model(**inputs)
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    rows, length = inputs["input_ids"].shape
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(rows, length, width)] * (depth + 1)
    heads = model.config.num_attention_heads
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(rows, heads, length, length)] * depth
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        sums = outputs.attentions[0][row][:, mask].sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
        assert outputs.attentions[0][row][:, mask][:, :, ~mask].abs().max() == 0 if (~mask).any() else True
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    for a, b in zip(real_tokens(plain.logits, inputs), real_tokens(outputs.logits, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0)
    assert plain.hidden_states is None
    assert plain.attentions is None


def test_tuples_on_request(qwen3):
    with torch.no_grad():
        outputs = qwen3(**batch("image"), return_dict=False)
        named = qwen3(**batch("image"))
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], named.logits)


def test_logits_to_keep(qwen3):
    inputs = batch("image")
    full = logits_of(qwen3, inputs)
    torch.testing.assert_close(logits_of(qwen3, inputs, logits_to_keep=3), full[:, -3:])
    chosen = torch.tensor([0, 5, 7])
    torch.testing.assert_close(logits_of(qwen3, inputs, logits_to_keep=chosen), full[:, chosen])


def test_loss_by_hand(model):
    inputs = batch("image", "text", padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # visual ids stay in: ignored
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    targets = labels[:, 1:]
    counted = (targets != -100) & (targets < model.config.vocab_size)
    assert int((targets >= model.config.vocab_size).sum()) > 0
    log_probabilities = outputs.logits[:, :-1].float().log_softmax(-1)
    picked = log_probabilities[counted].gather(-1, targets[counted][:, None])
    torch.testing.assert_close(outputs.loss, -picked.mean())


def test_labels_without_logits_count_for_no_trainer(qwen3):
    """A trainer counts the labels it sees; those of visual tokens are no targets and must not thin out the others."""
    inputs = batch("image")
    labels = inputs["input_ids"]
    with torch.no_grad():
        expected = qwen3(**inputs, labels=labels).loss
        for counted in ((labels[:, 1:] != -100).sum(), int((labels[:, 1:] != -100).sum())):
            found = qwen3(**inputs, labels=labels, num_items_in_batch=counted).loss
            torch.testing.assert_close(found, expected)
        visual = labels.masked_fill(labels < qwen3.config.text_config.vocab_size, -100)
        assert qwen3(**inputs, labels=visual, num_items_in_batch=torch.tensor(7)).loss == 0


def test_labels_need_all_logits(qwen3):
    inputs = batch("text")
    with pytest.raises(ValueError, match="leave `logits_to_keep` at 0 when passing labels"):
        qwen3(**inputs, labels=inputs["input_ids"], logits_to_keep=1)


def test_copies_of_a_prompt_under_gradient_checkpointing():
    """There is no cache to copy."""
    model, inputs = build_model("qwen3").train(), batch("image")
    model.gradient_checkpointing_enable()
    ids, expanded = model._expand_inputs_for_generation(3, False, **inputs)
    logits = model(input_ids=ids, **expanded, past_key_values=DynamicCache(), use_cache=True).logits
    torch.testing.assert_close(logits, model(**inputs).logits.expand_as(logits), atol=2e-5, rtol=0)


def test_no_cache_comes_to_the_layers_under_gradient_checkpointing():
    """Releases differ in the name by which a layer drops it, and both passes would write to it."""
    model, inputs = build_model("qwen3").train(), batch("image")
    model.gradient_checkpointing_enable()
    caches = []
    layer = model.model.transformer.blocks[0]
    layer.register_forward_pre_hook(lambda *call: caches.append(call[2]["past_key_values"]), with_kwargs=True)
    cache = DynamicCache()
    model(**inputs, past_key_values=cache, use_cache=True).logits.sum().backward()
    assert caches == [None] * len(caches) != []
    assert cache.get_seq_length() == 0
    model.eval()(**inputs, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot be continued under gradient checkpointing"):
        model.train()(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


def test_no_answers_without_a_cache_under_gradient_checkpointing():
    """Each pass would see one token."""
    model, inputs = without_stopping(build_model("qwen3")).eval(), batch("text")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    model.train()
    with pytest.raises(ValueError, match=r"Call `model.eval\(\)` first"):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False), expected)


def test_gradient_checkpointing_in_both_towers():
    plain, saving = build_model("olmo3").train(), build_model("olmo3").train()
    saving.gradient_checkpointing_enable()
    assert saving.model.transformer.gradient_checkpointing
    inputs = batch("image", "video")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for model in (plain, saving):
        model(**inputs, labels=labels).loss.backward()
    checked = 0
    for (name, expected), (_, found) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-4)
            checked += "vision_backbone.image_vit" in name
    assert checked > 10
    calls = []
    block = saving.model.vision_backbone.image_vit.transformer.resblocks[0]
    handle = block.attention.register_forward_hook(lambda *_: calls.append(1))
    saving(**inputs, labels=labels).loss.backward()
    handle.remove()
    forwards = len(calls)
    calls.clear()
    handle = plain.model.vision_backbone.image_vit.transformer.resblocks[0].attention.register_forward_hook(
        lambda *_: calls.append(1)
    )
    plain(**inputs, labels=labels).loss.backward()
    handle.remove()
    assert forwards == 2 * len(calls)  # computed again in the backward pass


@pytest.mark.parametrize("part", ["vision_backbone.image_vit.transformer.resblocks", "transformer.blocks"])
@pytest.mark.parametrize("settings", [None, {}, {"preserve_rng_state": False}])
def test_gradient_checkpointing_trains_a_layer_of_a_frozen_model(part, settings):
    """As with adapters: nothing that the layer reads has a gradient."""
    model = build_model("qwen3").train().requires_grad_(False)
    model.gradient_checkpointing_enable(settings)
    trained = next(model.model.get_submodule(part)[1].parameters()).requires_grad_(True)
    inputs = batch("image")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert trained.grad.abs().sum() > 0


def test_gradient_checkpointing_is_reentrant_where_that_is_asked_for():
    model = build_model("qwen3")
    for given, expected in ((None, False), ({}, False), ({"use_reentrant": True}, True)):
        model.gradient_checkpointing_enable(given)
        assert model.model.transformer.blocks[0]._gradient_checkpointing_func.keywords["use_reentrant"] is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_half_precision(model, dtype, implementation):
    inputs = batch(*MIXED)
    expected = logits_of(model, inputs)
    half = with_attention(model, implementation).to(dtype)
    found = logits_of(half, inputs)
    assert found.dtype == dtype
    assert not found.isnan().any()  # padding queries see nothing, and still give numbers
    error = torch.cat(
        [
            (a - b).abs().flatten()
            for a, b in zip(real_tokens(expected, inputs), real_tokens(found.float(), inputs), strict=True)
        ]
    )
    assert error.mean() < (0.1 if dtype == torch.bfloat16 else 0.02) * expected.std()


def test_float32_islands_in_bfloat16(qwen3, monkeypatch):
    """Scores of the vision attention and the pooling are float32 in a bfloat16 model, values too under sdpa."""
    seen = {}
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recording(module, query, key, value, attention_mask, **kwargs):
        seen[type(module).__name__] = (query.dtype, key.dtype, value.dtype)
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    model = copy.deepcopy(qwen3).to(torch.bfloat16)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", recording)
    logits_of(model, batch("image"))
    single, half = (torch.float32,) * 3, (torch.bfloat16,) * 3
    assert seen == {"Molmo2VisionAttention": single, "Molmo2Pooling": single, "Molmo2Attention": half}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_no_nan(model, implementation, side):
    inputs = batch("text", "two images", padding_side=side)
    assert not logits_of(with_attention(model, implementation), inputs).isnan().any()


@torch.no_grad()
def test_a_mask_as_long_as_a_static_cache(qwen3):
    ids = torch.arange(12)[None]
    mask = torch.zeros(1, 20, dtype=torch.int64)
    mask[:, :12] = 1
    cache = StaticCache(config=qwen3.config.get_text_config(), max_cache_len=20)
    found = qwen3(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, qwen3(input_ids=ids).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_positions_for_all_rows_may_restart(qwen3):
    ids, positions = torch.arange(24).reshape(2, 12), torch.arange(6).repeat(2)[None]
    text = qwen3.model.transformer
    found = text(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    expected = text(input_ids=ids, position_ids=positions.expand(2, -1), use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected)
    alone = text(input_ids=ids[:, 6:], use_cache=False).last_hidden_state
    torch.testing.assert_close(found[:, 6:], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bool", "of one row", "per head"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_masks_of_ones_own_are_those_of_eager(qwen3, implementation, kind):
    ids = torch.arange(24).reshape(2, 12)
    heads = qwen3.config.get_text_config().num_attention_heads
    generator = torch.Generator().manual_seed(0)
    shape = {"bool": (2, 1, 12, 12), "of one row": (1, 1, 12, 12), "per head": (2, heads, 12, 12)}[kind]
    seen = (torch.rand(shape, generator=generator) < 0.7).tril() | torch.eye(12, dtype=torch.bool)
    mask = seen if kind == "bool" else torch.zeros(shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = logits_of(with_attention(qwen3, "eager"), inputs)
    found = logits_of(with_attention(qwen3, implementation), inputs)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_minus_one_counts_as_id_zero(qwen3):
    ids = torch.tensor([[5, 6, 7, -1]])
    assert torch.equal(logits_of(qwen3, {"input_ids": ids}), logits_of(qwen3, {"input_ids": ids.clamp(min=0)}))


def test_the_embedding_is_one_table_in_two_pieces(qwen3):
    table = qwen3.get_input_embeddings()
    ids = torch.tensor([[0, 5, 1023, 1024, 1030, 1151]])
    assert torch.equal(table(ids), torch.cat((table.embedding, table.new_embedding))[ids])
    assert table.num_embeddings == 1024 + 128
    assert torch.equal(table.weight[ids], table(ids))


@torch.no_grad()
def test_a_model_can_be_printed(qwen3):
    table = qwen3.get_input_embeddings()
    assert f"(wte): Molmo2Embedding({table.num_embeddings}, {table.embedding_dim})" in str(qwen3)


def test_resizing_makes_one_table_and_as_many_logits(qwen3, tmp_path):
    """Added tokens follow the visual ones; ids, embeddings and logits of the rest stay, also after loading."""
    model, inputs = copy.deepcopy(qwen3), batch("image", "text")
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.config.text_config.additional_vocab_size == 128
    before, table = model(**inputs).logits, model.get_input_embeddings().weight
    model.resize_token_embeddings(1155)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    assert (model.config.vocab_size, model.config.text_config.additional_vocab_size) == (1155, 0)
    assert torch.equal(model.get_input_embeddings().weight[:1152], table)
    assert model.lm_head.weight.shape[0] == 1155
    rows = model.lm_head.weight
    torch.testing.assert_close(rows[1024:].mean(0), rows[:1024].mean(0), atol=1e-3, rtol=0)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for found in (model, loaded.eval()):
        logits = found(**inputs).logits
        assert logits.shape[-1] == 1155
        torch.testing.assert_close(logits[..., :1024], before, atol=ATOL, rtol=0)
    added = {"input_ids": torch.tensor([[5, 1154, 7]]), "labels": torch.tensor([[5, 1154, 7]])}
    assert torch.isfinite(loaded(**added).loss)


def test_shrinking_below_the_visual_tokens_is_warned_about(qwen3, caplog):
    model = copy.deepcopy(qwen3)
    with caplog.at_level("WARNING", logger="molmo2"):
        model.resize_token_embeddings(1026)
    assert "cut to 1026 rows, which leaves visual tokens without one: {'image_patch_id': 1026" in caplog.text


def test_features_come_as_the_library_s_output(qwen3):
    """Vectors of each image, and the states of the vision transformer; forward takes the whole object."""
    inputs = batch("two images")
    names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
    given = {name: inputs[name] for name in names}
    with torch.no_grad():
        features = qwen3.get_image_features(**given, output_hidden_states=True, output_attentions=True)
        as_tuple = qwen3.get_image_features(**given, return_dict=False)
        expected = qwen3(**inputs)
        rest = {name: value for name, value in inputs.items() if name not in names[:2]}
        found = qwen3(**rest, image_features=features)
    tokens = inputs["image_grids"][:, 0] * inputs["image_grids"][:, 1]
    tokens = tokens + inputs["image_grids"][:, 2] * inputs["image_grids"][:, 3]
    assert [len(vectors) for vectors in features.pooler_output] == tokens.tolist()
    depth = len(qwen3.vision_backbone.image_vit.transformer.resblocks)
    assert (len(features.hidden_states), len(features.attentions)) == (depth + 1, depth)
    assert features.last_hidden_state.shape[:2] == inputs["pixel_values"].shape[:2]
    assert torch.equal(features.hidden_states[-1], features.last_hidden_state)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(found.logits, expected.logits)


@torch.no_grad()
def test_vectors_past_float16_are_an_error(qwen3):
    """Not NaN logits and an answer of exclamation marks."""
    model = copy.deepcopy(qwen3).half()
    model.vision_backbone.image_projector.w2.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"not finite in float16, .* Load the model in bfloat16"):
        model(**batch("image"))
    assert torch.isfinite(model.float()(**batch("image")).logits).all()


def test_a_frozen_tower_stays_out_of_the_backward_pass(qwen3):
    """Also where adapters ask for gradients of the inputs; one that learns is in it."""
    model, inputs = copy.deepcopy(qwen3).train(), batch("image")
    model.vision_backbone.requires_grad_(False)
    model.enable_input_require_grads()
    tower = model.vision_backbone.image_vit
    kept = []
    tower.transformer.resblocks[0].register_forward_hook(lambda _module, _args, output: kept.append(output))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    tower.positional_embedding.requires_grad_(True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [output.requires_grad for output in kept] == [False, True]
    assert tower.positional_embedding.grad.abs().max() > 0


def test_pooling_indices_over_all_images_are_read(qwen3):
    """As transformers' own processor counts them."""
    inputs = batch("two images")
    tokens = inputs["image_grids"][:, 0] * inputs["image_grids"][:, 1]
    tokens = tokens + inputs["image_grids"][:, 2] * inputs["image_grids"][:, 3]
    pooling, first = inputs["image_token_pooling"], inputs["image_num_crops"][0] * inputs["pixel_values"].shape[1]
    counted = torch.cat([pooling[: tokens[0]], torch.where(pooling >= 0, pooling + first, pooling)[tokens[0] :]])
    with torch.no_grad():
        expected, found = qwen3(**inputs).logits, qwen3(**{**inputs, "image_token_pooling": counted}).logits
    assert torch.equal(found, expected)


def test_the_vision_backbone_alone(qwen3):
    inputs = batch("image")
    backbone = qwen3.model.vision_backbone
    names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
    with torch.no_grad():
        found = backbone(inputs["pixel_values"], inputs["image_token_pooling"])
        expected = torch.cat(qwen3.get_image_features(**{name: inputs[name] for name in names}).pooler_output)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    empty_rows = torch.full((3, 4), -1)
    with torch.no_grad():
        with_empty = backbone(inputs["pixel_values"], torch.cat([empty_rows, inputs["image_token_pooling"]]))
    torch.testing.assert_close(with_empty, expected, atol=ATOL, rtol=0)  # rows without a patch are dropped
    with pytest.raises(ValueError, match=r"points at patch 9999, but \d+ crop\(s\) hold \d+ patches"):
        backbone(inputs["pixel_values"], torch.tensor([[9999, -1, -1, -1]]))


def test_only_needed_vision_layers_are_built(qwen3):
    config = qwen3.config
    depth = config.vit_config.num_hidden_layers
    deepest = max(layer % depth for layer in config.adapter_config.vit_layers)
    assert len(qwen3.model.vision_backbone.image_vit.transformer.resblocks) == deepest + 1 < depth


def test_missing_patches_do_not_weigh_in_the_masked_pooling():
    """The masked mean is over present patches; the plain one over all, zeros included."""
    masked = build_model("qwen3").model.vision_backbone.image_pooling_2d
    plain = build_model("qwen3").model.vision_backbone.image_pooling_2d
    masked.masks_missing, plain.masks_missing = True, False
    width = masked.wq.in_features
    features = torch.randn(6, width, generator=torch.Generator().manual_seed(1))
    window, padded = torch.tensor([[0, 3]]), torch.tensor([[0, 3, -1, -1]])
    with torch.no_grad():
        torch.testing.assert_close(masked(features, padded), masked(features, window))
        assert (plain(features, padded) - plain(features, window)).abs().max() > 1e-3
        assert torch.equal(plain(features, window), masked(features, window))


# What must be refused, and what the message says.


def test_ids_or_embeddings(qwen3):
    with pytest.raises(ValueError, match=r"Pass either `input_ids` or `inputs_embeds`: found neither"):
        qwen3()
    with pytest.raises(ValueError, match="found both"):
        qwen3(input_ids=torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 40))


def test_features_without_slots(qwen3):
    inputs = batch("image")
    ids = inputs["input_ids"]
    stray = torch.cat([ids, torch.tensor([[qwen3.config.image_patch_id]])], 1)
    with pytest.raises(ValueError, match=r"The prompts have \d+ patch token\(s\), but the images and videos give"):
        qwen3(**{**inputs, "input_ids": stray, "attention_mask": torch.ones_like(stray), "token_type_ids": None})


def test_incomplete_images(qwen3):
    inputs = batch("image")
    inputs.pop("image_grids")
    with pytest.raises(ValueError, match="image_grids missing: pass all of"):
        qwen3(**inputs)


def test_contradicting_tables(qwen3):
    inputs = batch("two images")
    with pytest.raises(ValueError, match=r"`image_num_crops` adds up to \d+, but `pixel_values` has \d+ row"):
        qwen3(**{**inputs, "pixel_values": inputs["pixel_values"][1:]})
    with pytest.raises(ValueError, match=r"`image_grids` adds up to \d+, but `image_token_pooling` has \d+ row"):
        qwen3(**{**inputs, "image_token_pooling": inputs["image_token_pooling"][1:]})
    inputs = batch("video")
    with pytest.raises(ValueError, match=r"`video_grids` counts 4, but `pixel_values_videos` has 3 row"):
        qwen3(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][1:]})


def test_a_prompt_that_is_too_long_says_what_to_lower():
    model = build_model("qwen3")
    model.model.transformer.config.max_position_embeddings = 30
    inputs = batch("image")
    length = inputs["input_ids"].shape[1]
    message = rf"The prompt has {length} tokens, {length - 30} more than .* = 30. Lower `num_frames` .* or `max_crops`"
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@torch.no_grad()
def test_padding_takes_no_room():
    model = build_model("qwen3")
    inputs = batch("image")
    expected = model(**inputs).logits
    length = inputs["input_ids"].shape[1]
    model.model.transformer.config.max_position_embeddings = length
    padded = batch("image", padding="max_length", max_length=length + 20)
    found = model(**padded).logits[padded["attention_mask"].bool()]
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=0)


# --- what would be silently wrong ------------------------------------------------------------------------------------


@torch.no_grad()
def test_visual_tokens_need_their_media(qwen3):
    inputs = batch("image")
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    message = (
        r"^The prompt has \d+ patch token\(s\), but no image or video was passed for them: expected `pixel_values`"
    )
    for call in (qwen3, qwen3.model):
        with pytest.raises(ValueError, match=message):
            call(**tokens)
    with pytest.raises(ValueError, match=message):
        qwen3.generate(**tokens, max_new_tokens=1)
    cache = qwen3(**batch("text"), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        qwen3(input_ids=tokens["input_ids"], past_key_values=cache)
    embeds = qwen3.get_input_embeddings()(tokens["input_ids"])
    with pytest.raises(ValueError, match=message):
        qwen3(inputs_embeds=embeds, **{name: tokens[name] for name in ("attention_mask", "token_type_ids")})


@torch.no_grad()
def test_bare_ids_of_visual_tokens_are_warned_about(qwen3, caplog):
    """transformers' common tests pass ids alone; neither the processor nor `generate` does."""
    type(vision_inputs.logger).warning_once.cache_clear()
    with caplog.at_level("WARNING", logger="molmo2"):
        qwen3(input_ids=batch("image")["input_ids"])
    assert "but no image or video was passed for them" in caplog.text


@torch.no_grad()
def test_media_enter_with_the_prefill_alone(qwen3):
    inputs = batch("image")
    cache = qwen3(**batch("text"), use_cache=True).past_key_values
    held = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=rf"^Images and videos belong to whole rows, but the cache holds {held} tokens"
    ):
        qwen3(**inputs, past_key_values=cache)


@torch.no_grad()
def test_caches_by_both_names(qwen3):
    """transformers calls them `past_key_values` up to 5.23 and `cache` from 5.24 on."""
    ids = batch("text")["input_ids"]
    expected = qwen3(input_ids=ids).logits[:, -1]
    found = []
    for name in ("past_key_values", "cache"):
        for whole, model in ((True, qwen3), (False, qwen3.model), (False, qwen3.get_decoder())):
            past = model(input_ids=ids[:, :-1], use_cache=True)
            output = model(input_ids=ids[:, -1:], **{name: past[CACHE_NAME]})
            found.append(output.logits if whole else qwen3.lm_head(output.last_hidden_state))
    for logits in found:
        torch.testing.assert_close(logits[:, -1], expected)
    with pytest.raises(ValueError, match=r"^`cache` and `past_key_values` are two names of one argument"):
        qwen3(input_ids=ids, cache=DynamicCache(), past_key_values=DynamicCache())
    names = ("past_key_values", "cache")
    for values in ((None, DynamicCache()), (DynamicCache(), None), (DynamicCache(),) * 2, (None, None)):
        output = qwen3(input_ids=ids, use_cache=True, **dict(zip(names, values)))
        given = [value for value in values if value is not None]
        assert not given or output[CACHE_NAME] is given[0]
        torch.testing.assert_close(output.logits[:, -1], expected)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("pixel_value", "pixel_values"),
        ("token_type_id", "token_type_ids"),
        ("attention_masks", "attention_mask"),
        ("image_sizes", "pixel_values, image_token_pooling, "),
    ],
)
def test_misspelt_arguments(qwen3, name, meant):
    for call in (qwen3, qwen3.model):
        with pytest.raises(ValueError, match=rf"^`forward` has no argument '{name}'; did you mean {meant}"):
            call(**batch("text"), **{name: torch.zeros(1)})
    qwen3(**batch("text"), num_items_in_batch=None, output_router_logits=False)  # what trainers and the library pass


def test_a_model_is_printed():
    """With the rows of both tables, and of the one that resizing leaves."""
    model = build_model("qwen3")
    assert "(wte): Molmo2Embedding(1152, 40)\n" in repr(model)
    model.resize_token_embeddings(1160)
    assert "(wte): Molmo2Embedding(1160, 40)\n" in str(model)


def test_an_embedding_that_is_cut_elsewhere_in_the_file_loads(tmp_path):
    """As transformers' own class saves its single table; what is saved here has the published cut again."""
    expected = build_model("olmo3").state_dict()
    table = torch.cat([expected[name] for name in PIECES])
    write_checkpoint(tmp_path, "olmo3", remote_code=False)
    for num_rows in (len(table) // 2, 3):
        pieces = dict(zip(PIECES, (piece.clone() for piece in table.split((num_rows, len(table) - num_rows)))))
        save_file({**expected, **pieces}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = Molmo2ForConditionalGeneration.from_pretrained(tmp_path)
        found = model.state_dict()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert all(parameter.requires_grad for parameter in model.parameters())
        given = Molmo2ForConditionalGeneration.from_pretrained(
            None, config=model.config, state_dict={**expected, **pieces}
        )
        assert torch.equal(given.state_dict()[PIECES[0]], expected[PIECES[0]])
    pieces[PIECES[1]] = pieces[PIECES[1]][:-1].clone()
    save_file({**expected, **pieces}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match="mismatch"):
        Molmo2ForConditionalGeneration.from_pretrained(tmp_path)


def halves_in(folder) -> torch.Tensor:
    """The embedding table, which `folder` then holds as transformers' own class saves it."""
    state = build_model("olmo3").state_dict()
    table = torch.cat([state[name] for name in PIECES])
    write_checkpoint(folder, "olmo3", remote_code=False)
    halves = dict(zip(PIECES, (half.clone() for half in table.chunk(2))))
    save_file({**state, **halves}, folder / "model.safetensors", metadata={"format": "pt"})
    return table


def test_the_cut_is_moved_before_weights_are_offloaded(tmp_path, monkeypatch):
    """The library calls `eval` once they are loaded; after it those on the CPU leave the modules for hooks."""
    seen = []
    monkeypatch.setattr(Molmo2ForConditionalGeneration, "eval", lambda model: seen.append(model.state_dict()))
    table = halves_in(tmp_path)
    Molmo2ForConditionalGeneration.from_pretrained(tmp_path)
    assert [tuple(seen[0][name].shape) for name in PIECES] == [(1024, 40), (128, 40)]
    assert torch.equal(torch.cat([seen[0][name] for name in PIECES]), table)


def test_an_embedding_on_disk_stays_as_it_is_there(tmp_path, caplog, monkeypatch):
    """And works; a warning says how it would be saved."""
    table = halves_in(tmp_path)
    parts = ("emb_drop", "blocks", "ln_f", "rotary_emb")
    names = ("lm_head", "model.vision_backbone", *(f"model.transformer.{part}" for part in parts))
    places = {"model.transformer.wte": "disk", **dict.fromkeys(names, "cpu")}
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model = Molmo2ForConditionalGeneration.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert "The embedding in these files is cut after 576 rows, not after 1024" in caplog.text
    ids = torch.tensor([[0, 575, 576, 1023, 1024, 1151]])
    assert torch.equal(model.get_input_embeddings()(ids)[0], table[ids[0]])


def test_the_cut_of_an_embedding_without_memory(monkeypatch):
    """Under FSDP one process alone reads the files, and all need the same shapes."""
    monkeypatch.setattr("molmo2.model.pretrained.is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *args: None)
    model = build_model("olmo3").to("meta")
    model._load_pretrained_model(model, {name: torch.empty(576, 40) for name in PIECES}, None)
    assert [tuple(model.state_dict()[name].shape) for name in PIECES] == [(1024, 40), (128, 40)]
