"""`generate` in all its ways: images follow their own row, caches and shortcuts change nothing."""

import copy
import itertools
import threading

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

from molmo2.model import generation
from molmo2.model.generation import LatestMatchLookup, latest_continuation
from molmo2.model.vision_inputs import ENCODED_INPUTS, MEDIA_INPUTS
from support.checkpoints import FAMILIES, build_model, make_image, without_stopping
from support.model_inputs import MIXED, batch, clip, processor

NEW_TOKENS = 8


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return without_stopping(build_model(request.param))


@pytest.fixture(scope="module")
def qwen3():
    return without_stopping(build_model("qwen3"))


def answer(model, inputs, **options) -> torch.Tensor:
    """New tokens of each row, greedy unless told otherwise."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


def test_mixed_rows_answer_as_they_do_alone(model):
    together = answer(model, batch(*MIXED))
    for name, row in zip(MIXED, together, strict=True):
        assert row.tolist() == answer(model, batch(name))[0].tolist(), name


def test_several_answers_with_one_candidate_are_the_greedy_answer(model):
    inputs = batch(*MIXED)
    greedy = answer(model, inputs)
    sampled = answer(model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, greedy.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("name", ["image", "two images", "video", "image and video", "two videos"])
@torch.no_grad()
def test_expansion_equals_a_batch_made_by_hand(model, name):
    inputs = batch(name, "text", "image")
    ids, expanded = model._expand_inputs_for_generation(3, False, **inputs)
    by_hand = batch(name, name, name, "text", "text", "text", "image", "image", "image")
    assert torch.equal(ids, by_hand["input_ids"])
    found, expected = model(input_ids=ids, **expanded).logits, model(**by_hand).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4}], ids=str)
def test_images_are_encoded_once_for_all_answers(qwen3, options):
    inputs = batch("image", "two images")
    crops = []
    handle = qwen3.vision_backbone.image_vit.register_forward_pre_hook(lambda _, given: crops.append(len(given[0])))
    answer(qwen3, inputs, **options)
    handle.remove()
    assert sum(crops) == len(inputs["pixel_values"])


def test_beams_on_several_crops_follow_their_row(model):
    """Each row's beams give what that row gives alone, and the scores are those of the sequences."""
    big = make_image(200, 150)  # four crops and the low-resolution view at 98 pixels
    prompts = ["<|image|>What is this?", "Image 1<|image|>Image 2<|image|>Compare."]
    images = [big, make_image(60, 60, 1), make_image(200, 40, 2)]
    inputs = dict(processor()(text=prompts, images=images, max_crops=4, padding=True, return_tensors="pt"))
    assert int(inputs["image_num_crops"][0]) == 5
    options = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    together = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    length = inputs["input_ids"].shape[1]
    alone = [
        dict(processor()(text=prompts[0], images=big, max_crops=4, return_tensors="pt")),
        dict(processor()(text=prompts[1], images=images[1:], max_crops=4, return_tensors="pt")),
    ]
    for row, own in enumerate(alone):
        expected = model.generate(**own, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        new = expected.sequences[:, own["input_ids"].shape[1] :]
        assert together.sequences[row, length:].tolist() == new[0].tolist()
        torch.testing.assert_close(together.sequences_scores[row], expected.sequences_scores[0], atol=1e-4, rtol=0)
        # The score is the mean log-probability of the new tokens in one uncached pass over the whole sequence.
        with torch.no_grad():
            images_alone = {k: v for k, v in own.items() if k not in ("input_ids", "attention_mask", "token_type_ids")}
            log_probabilities = model(input_ids=expected.sequences, **images_alone).logits[0].log_softmax(-1)
        picked = log_probabilities[-NEW_TOKENS - 1 : -1].gather(-1, new[0][:, None])
        torch.testing.assert_close(expected.sequences_scores[0], picked.mean(), atol=1e-4, rtol=0)


def test_beams_differ_from_rows_with_swapped_images(qwen3):
    """What the test above would miss if images did not matter to the answer."""
    inputs = batch("image", "two images")
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    scores = [
        qwen3.generate(**given, num_beams=3, max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
        for given in (inputs, swapped)
    ]
    assert (scores[0].sequences_scores - scores[1].sequences_scores).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["text", "image and video"])
@pytest.mark.parametrize("shortcut", ["dynamic", "static", "none", "prompt lookup", "assisted", "cache object"])
def test_caches_and_shortcuts_change_nothing(model, name, shortcut):
    inputs = batch(name)
    greedy = answer(model, inputs)
    options = {
        "dynamic": {"cache_implementation": "dynamic"},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "none": {"use_cache": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_model": model},
        "cache object": {"past_key_values": DynamicCache(config=model.config.text_config)},
    }[shortcut]
    # Some releases let an assisted answer run a token over the limit.
    assert torch.equal(answer(model, inputs, **options)[:, :NEW_TOKENS], greedy)


@pytest.mark.parametrize("shortcut", ["none", "prompt lookup", "assisted"])
def test_guesses_behind_an_image_are_no_visual_tokens(qwen3, shortcut):
    """Where a prompt ends with an image, `generate` gives what it guesses or has written the type of that image."""
    options = {
        "none": {"use_cache": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "assisted": {"assistant_model": qwen3},
    }[shortcut]
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (4, 60, 70, 3), dtype=np.uint8)
        video = {"text": "<|video|>", "videos": [noise], "video_metadata": [{"fps": 2.0}]}
        for prompt in (video, {"text": "a<|image|>", "images": [noise[0]]}):
            inputs = dict(processor()(**prompt, return_tensors="pt"))
            greedy = answer(qwen3, inputs, max_new_tokens=16)
            assert torch.equal(answer(qwen3, inputs, max_new_tokens=16, **options)[:, :16], greedy), seed


@torch.no_grad()
def test_token_types_that_do_not_fit_say_nothing(qwen3):
    inputs = batch("image")
    expected, types = qwen3(**inputs).logits, inputs["token_type_ids"]
    for wrong in (types[:, :5], types[:, :0]):
        assert torch.equal(qwen3(**{**inputs, "token_type_ids": wrong}).logits, expected)
    for other in (torch.zeros_like(types), torch.ones_like(types)):  # what fits is taken at its word
        assert not torch.allclose(qwen3(**{**inputs, "token_type_ids": other}).logits, expected, atol=1e-4)
    embeds = qwen3.get_input_embeddings()(inputs.pop("input_ids"))
    for given in (types, types[:, :0], None):
        found = qwen3(**{**inputs, "token_type_ids": given}, inputs_embeds=embeds).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ids", "longest", "count", "expected"),
    [
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, 2, [4, 1]),  # the later of two matches
        ([1, 2, 3, 9, 2, 4, 1, 2], 2, 2, [3, 9]),  # a longer match before a later one
        ([5, 6, 7], 2, 3, []),
        ([7, 7], 3, 5, [7]),
        ([1, 2, 1], 1, 0, []),
        ([3], 2, 4, []),
        ([1, 1, 1, 1], 3, 2, [1]),  # the match may overlap the last tokens
    ],
)
def test_prompt_lookup_drafts_what_followed_last(ids, longest, count, expected):
    assert latest_continuation(torch.tensor(ids), longest, count).tolist() == expected


def test_prompt_lookup_stops_at_the_end_of_an_answer_and_of_the_room(qwen3):
    made = []

    class Watched(LatestMatchLookup):
        def get_candidates(self, input_ids, *args, **kwargs):
            found = super().get_candidates(input_ids, *args, **kwargs)
            made.append((self, input_ids, found[0]))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "LatestMatchLookup", Watched)
        answer(qwen3, batch("text"), prompt_lookup_num_tokens=4)
    assert made
    assert all(1 <= found.shape[1] - ids.shape[1] + 1 <= 5 for _, ids, found in made)
    lookup, ids, _ = made[0]
    lookup.eos_token_id, lookup.num_output_tokens, lookup.max_length = torch.tensor([8]), 5, 100
    repeated = torch.tensor([[1, 2, 7, 8, 9, 1, 2]])
    assert lookup.get_candidates(repeated)[0].tolist() == [[1, 2, 7, 8, 9, 1, 2, 7]]
    lookup.eos_token_id, lookup.max_length = None, 10
    assert lookup.get_candidates(repeated)[0].tolist() == [[1, 2, 7, 8, 9, 1, 2, 7, 8]]
    lookup.vocab_size = 8
    assert lookup.get_candidates(repeated)[0].tolist() == [[1, 2, 7, 8, 9, 1, 2, 7]]
    lookup.max_length = 8
    assert lookup.get_candidates(repeated)[0] is repeated


def test_a_static_cache_for_a_mixed_batch(model):
    inputs = batch(*MIXED)
    static = answer(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, answer(model, inputs))


@pytest.mark.slow
def test_static_cache_and_compiled_steps(qwen3):
    inputs = batch("image", "text")
    model = copy.deepcopy(qwen3)
    greedy = answer(model, inputs)
    model.forward = torch.compile(model.forward, fullgraph=False)
    assert torch.equal(answer(model, inputs, cache_implementation="static"), greedy)


@pytest.mark.slow
def test_the_decoding_step_compiles_into_one_graph(qwen3):
    from transformers import StaticCache

    inputs = batch("text")
    model = copy.deepcopy(qwen3)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        length = inputs["input_ids"].shape[1]
        mask = torch.zeros(1, 1, 1, 64, dtype=torch.bool)
        mask[..., : length + 1] = True
        step = {
            "input_ids": torch.tensor([[7]]),
            "attention_mask": mask,
            "position_ids": torch.tensor([[length]]),
            "cache_position": torch.tensor([length]),
        }
        plain_cache, compiled_cache = copy.deepcopy(cache), cache
        expected = model(**step, past_key_values=plain_cache).logits
        found = torch.compile(model, fullgraph=True)(**step, past_key_values=compiled_cache).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_quantised_cache(qwen3):
    pytest.importorskip("optimum.quanto", reason="the quantised cache needs optimum-quanto")
    inputs = batch("image")
    # The residual is kept short, so that most of the cache really is quantised.
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 2}
    quantised = answer(qwen3, inputs, cache_implementation="quantized", cache_config=config)
    assert quantised.shape == (1, NEW_TOKENS)
    assert quantised[0, 0] == answer(qwen3, inputs)[0, 0]  # the prefill sees exact keys and values


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache needs an accelerator")
def test_an_offloaded_cache(qwen3):
    model = copy.deepcopy(qwen3).cuda()
    inputs = {name: value.cuda() for name, value in batch("image").items()}
    assert torch.equal(answer(model, inputs, cache_implementation="offloaded"), answer(model, inputs))


def test_streaming(qwen3):
    inputs = batch("image")
    tokenizer = processor().tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=qwen3.generate, kwargs={**inputs, **settings})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(answer(qwen3, inputs)[0])


@pytest.mark.parametrize("name", ["image", "video"])
def test_a_prefill_in_chunks(qwen3, name):
    """Text is cut anywhere. All visual tokens, which see each other, their end included, are in the first chunk."""

    def in_chunks(inputs, size):
        return answer(qwen3, inputs, prefill_chunk_size=size, past_key_values=DynamicCache())

    assert torch.equal(in_chunks(batch("text"), 5), answer(qwen3, batch("text")))
    inputs, encoded = batch(name), batch(name)
    given = {part: encoded.pop(part) for part in ENCODED_INPUTS[name]}
    encoded[f"{name}_features"] = getattr(qwen3, f"get_{name}_features")(**given)
    end = int(inputs["token_type_ids"][0].nonzero()[-1]) + 1
    for size in (4, end - 1):
        for cut in (inputs, encoded):
            with pytest.raises(
                ValueError, match=rf"^The first {size} tokens .* its visual tokens end with token {end}"
            ):
                in_chunks(cut, size)
    assert torch.equal(in_chunks(encoded, end), answer(qwen3, encoded))  # recent releases refuse pixels in any chunk
    assert torch.equal(in_chunks(inputs, inputs["input_ids"].shape[1]), answer(qwen3, inputs))


@pytest.mark.parametrize("name", ["image", "video", "image and video"])
def test_a_conversation_continues_with_its_cache(model, name):
    inputs = batch(name)
    first = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[30, 31, 32, 33]])], 1)
    images = {key: value for key, value in inputs.items() if "pixel" in key or "grid" in key}
    images |= {key: value for key, value in inputs.items() if "pooling" in key or "crops" in key}
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**again, **images, max_new_tokens=5, do_sample=False)
    kept = copy.deepcopy(first.past_key_values)
    assert torch.equal(model.generate(**again, past_key_values=kept, max_new_tokens=5, do_sample=False), expected)
    # Passing the images again does no harm: they are in the cache.
    kept = copy.deepcopy(first.past_key_values)
    found = model.generate(**again, **images, past_key_values=kept, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["text", "image"])
@pytest.mark.parametrize("shortcut", ["prompt lookup", "assisted"])
def test_candidates_after_a_kept_cache(qwen3, name, shortcut):
    first = qwen3.generate(**batch(name), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[30, 31, 32, 33, 30, 31]])], 1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = answer(qwen3, again, past_key_values=copy.deepcopy(first.past_key_values))
    if shortcut == "assisted":  # the assistant has no cache, so it needs the image
        again |= {key: value for key, value in batch(name).items() if key in MEDIA_INPUTS}
    options = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "assisted": {"assistant_model": qwen3}}[shortcut]
    found = answer(qwen3, again, past_key_values=copy.deepcopy(first.past_key_values), **options)
    assert torch.equal(found[:, :NEW_TOKENS], expected)


def test_images_after_a_kept_cache_are_refused(qwen3):
    first = qwen3.generate(**batch("text"), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    inputs = batch("image")
    ids = torch.cat([first.sequences, inputs["input_ids"]], 1)
    inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs.pop("token_type_ids")
    length = first.sequences.shape[1] - 1
    message = rf"The prompt has 40 patch token\(s\) after the {length} tokens that the cache holds"
    with pytest.raises(ValueError, match=message):
        qwen3.generate(**inputs, past_key_values=first.past_key_values, max_new_tokens=3)
    # Recent releases take the new tokens alone, with a mask for all.
    inputs["input_ids"] = ids[:, length:]
    with pytest.raises(ValueError, match=message):
        qwen3.generate(**inputs, past_key_values=first.past_key_values, max_new_tokens=3)


def test_generating_from_embeddings(model):
    inputs = batch("image and video")
    greedy = answer(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {**inputs, "inputs_embeds": embeds}
    given.pop("input_ids")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    assert torch.equal(model.generate(**given, **settings), greedy)
    given.pop("token_type_ids")
    assert torch.equal(model.generate(**given, **settings), greedy)
    static = model.generate(**given, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, greedy)


def test_generating_from_embeddings_with_beams(qwen3):
    inputs = batch("image", "two images")
    expected = answer(qwen3, inputs, num_beams=2)
    given = {**inputs, "inputs_embeds": qwen3.get_input_embeddings()(inputs["input_ids"]).detach()}
    given.pop("input_ids")
    found = qwen3.generate(**given, num_beams=2, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(found, expected)


def test_sampling_repeats_with_its_seed(qwen3):
    inputs = batch("image", "text")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(answer(qwen3, inputs, do_sample=True, temperature=1.5).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_penalties_on_prompts_with_visual_tokens(qwen3):
    """Ids of visual tokens lie past the logits; processors of logits would use them as indices."""
    inputs = batch("image", "video")
    greedy = answer(qwen3, inputs)
    penalised = answer(qwen3, inputs, repetition_penalty=5.0, no_repeat_ngram_size=2)
    assert penalised.shape == greedy.shape
    for row in penalised.tolist():
        pairs = list(itertools.pairwise(row))
        assert len(pairs) == len(set(pairs))
    assert (penalised < qwen3.config.vocab_size).all()
    assert torch.equal(answer(qwen3, inputs, repetition_penalty=1.0), greedy)


def test_the_defaults_of_a_generation_config_hold(qwen3):
    model = copy.deepcopy(qwen3)
    model.generation_config.max_new_tokens = 3
    inputs = batch("image")
    assert model.generate(**inputs, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
    model.generation_config.eos_token_id = int(answer(model, batch("image"))[0, 0])
    assert answer(model, batch("image")).shape == (1, 1)


def test_vision_runs_once_per_answer(qwen3):
    """Images enter in the prefill and are not encoded again at later steps."""
    calls = []
    handle = qwen3.vision_backbone.register_forward_hook(lambda *_: calls.append(1))
    answer(qwen3, batch("image"))
    answer(qwen3, batch("image"), prompt_lookup_num_tokens=2)
    handle.remove()
    assert len(calls) == 2


def test_the_embedding_table_is_not_copied_at_each_step(qwen3, monkeypatch):
    """A step touches the rows it needs; joining both tables at every token was the original's slowest habit."""
    from molmo2.model.text import Molmo2Embedding

    def refuse(self):
        raise AssertionError("the joined table was made")

    monkeypatch.setattr(Molmo2Embedding, "weight", property(refuse))
    assert answer(qwen3, batch("image")).shape == (1, NEW_TOKENS)


def test_answers_on_bfloat16(model):
    half = without_stopping(copy.deepcopy(model).to(torch.bfloat16))
    inputs = batch("image", "text", "video")
    assert answer(half, inputs).shape == (3, NEW_TOKENS)


def test_a_clip_in_pixels_of_another_dtype(qwen3):
    inputs = dict(processor()(text="<|video|>x", videos=[clip(2)], video_metadata=[{"fps": 2.0}], return_tensors="pt"))
    expected = answer(qwen3, inputs)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
    assert torch.equal(answer(qwen3, inputs), expected)


@pytest.mark.parametrize("names", [("image",), ("text", "two images")], ids=["alone", "padded"])
@torch.no_grad()
def test_several_answers_read_their_prompt_once(names, monkeypatch):
    """One row per prompt in the prefill; the tokens are those of beams whose rows were all read."""
    model, rows = without_stopping(build_model("qwen3")), []
    model.model.transformer.blocks[0].register_forward_hook(lambda _, given, output: rows.append(given[0].shape[:2]))
    inputs, settings = batch(*names), {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    settings |= {"do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    found = model.generate(**inputs, **settings)
    assert rows[0] == inputs["input_ids"].shape
    assert {size[0] for size in rows[1:]} == {3 * len(names)}
    assert {len(states) for states in found.hidden_states[0]} == {3 * len(names)}
    monkeypatch.setattr("molmo2.model.modeling.can_copy_rows", lambda cache: False)
    rows.clear()
    expected = model.generate(**inputs, **settings)
    assert rows[0][0] == 3 * len(names)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores)


@torch.no_grad()
def test_a_step_of_decoding_is_one_graph_for_all_lengths():
    """No recompilation over lengths, images and sessions, with a cache of fixed size."""
    model = build_model("qwen3")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    for names in (("text",), ("image",), ("video",)):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
        inputs = batch(*names)
        model(**inputs, past_key_values=cache)
        length = inputs["input_ids"].shape[1]
        for place in range(length, length + 3):
            position = torch.tensor([place])
            mask = (torch.arange(256) <= place)[None, None, None]
            token = {"input_ids": torch.tensor([[place]]), "attention_mask": mask, "position_ids": position[None]}
            token |= {"past_key_values": cache, "cache_position": position, "use_cache": True}
            token |= {"logits_to_keep": 1}
            found = step(**token).logits
            assert torch.isfinite(found).all()
    assert len(graphs) == 1
