"""`embed` and `nearest`: which hidden states make a vector, and that neither batches nor neighbours change it."""

import numpy as np
import pytest
import torch

import molmo2
from molmo2 import embed, nearest
from molmo2.tools.embedding import POOLINGS, pooled_states
from support.checkpoints import build_model, make_image
from support.model_inputs import clip, processor

IMAGES = [make_image(90, 130), make_image(30, 20, seed=1), make_image(50, 200, seed=2)]
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3").eval()


def states(model, content):
    """Ids and last hidden states of one prompt, (S,) and (S, D), by hand."""
    inputs = processor().apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    return inputs["token_type_ids"][0], hidden


def unit(vector):
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_states_from_the_first_visual_token_on(model, pooling):
    is_visual, hidden = states(model, [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": QUESTION}])
    kept = hidden[int(is_visual.int().argmax()) :]
    assert 0 < len(kept) < len(hidden)
    wanted = {"mean": kept.mean(0), "max": kept.amax(0), "last": hidden[-1]}[pooling]
    rows = embed(model, processor(), images=IMAGES[0], pooling=pooling, prompt=QUESTION)
    assert (rows.shape, rows.dtype) == ((1, 40), np.float32)
    np.testing.assert_allclose(rows[0], unit(wanted), atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_texts_without_their_first_token(model, pooling):
    texts = ["red", "a much longer text about a ship"]
    rows = embed(model, processor(), texts=texts, pooling=pooling)
    for row, text in zip(rows, texts):
        _, hidden = states(model, [{"type": "text", "text": text}])
        kept = hidden[1:]
        wanted = {"mean": kept.mean(0), "max": kept.amax(0), "last": kept[-1]}[pooling]
        np.testing.assert_allclose(row, unit(wanted), atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batches_change_nothing(model, pooling, padding_side, monkeypatch):
    single = np.concatenate([embed(model, processor(), images=image, pooling=pooling) for image in IMAGES])
    monkeypatch.setattr(processor().tokenizer, "padding_side", padding_side)
    for batch_size in (2, 8):
        rows = embed(model, processor(), images=IMAGES, pooling=pooling, batch_size=batch_size)
        np.testing.assert_allclose(rows, single, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.abs(single[0] - single[1]).max() > 1e-3


def test_one_row_for_several_images(model):
    rows = embed(model, processor(), images=[IMAGES[:2], IMAGES[0]])
    assert rows.shape == (2, 40)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


def test_the_first_token_sees_nothing(model):
    """Why it is no pooling: its state is the same for every image."""
    found = [states(model, [{"type": "image", "image": image}])[1] for image in IMAGES[:2]]
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][-1], found[1][-1], atol=1e-3)
    with pytest.raises(ValueError, match=r'causal, so its first token sees nothing.*Use "last"'):
        embed(model, processor(), images=IMAGES, pooling="cls")


# --- frames ----------------------------------------------------------------------------------------------------------


def frames_and_rate(frames, fps=2.0):
    return frames, {"fps": fps}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_frames_know_neither_neighbours_nor_time(model, pooling):
    frames = clip(4)
    rows, times = embed(
        model, processor(), videos=frames_and_rate(frames), per_frame=True, pooling=pooling, batch_size=3
    )
    assert (rows.shape, rows.dtype, times.tolist()) == ((4, 40), np.float32, [0.0, 0.5, 1.0, 1.5])
    for row, frame in zip(rows, frames):
        alone = embed(model, processor(), videos=frames_and_rate(frame[None]), pooling=pooling)
        np.testing.assert_allclose(row, alone[0], atol=1e-5)
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


def test_times_of_a_part_and_of_several_videos(model):
    videos = [frames_and_rate(clip(4)), frames_and_rate(clip(2))]
    options = {"clip": [(0.5, 1.2), None]}
    first, second = embed(model, processor(), videos=videos, per_frame=True, processor_kwargs=options)
    assert first.times.tolist() == [0.5, 1.0]
    assert second.times.tolist() == [0.0, 0.5]
    whole = embed(model, processor(), videos=videos[0], per_frame=True)
    np.testing.assert_allclose(first.rows, whole.rows[1:3], atol=1e-5)
    rows = embed(model, processor(), videos=videos, processor_kwargs=options, batch_size=1)
    np.testing.assert_allclose(rows[1], embed(model, processor(), videos=videos[1])[0], atol=1e-5)


def test_frames_with_pixels_in_place_of_features(model):
    """`videos_kwargs` keep the frames from being encoded while they are decoded."""
    video = frames_and_rate(clip(3))
    encoded = embed(model, processor(), videos=video, per_frame=True)
    pixels = embed(model, processor(), videos=video, per_frame=True, processor_kwargs={"videos_kwargs": {}})
    np.testing.assert_allclose(pixels.rows, encoded.rows, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "exactly one of .* found none"),
        ({"images": IMAGES, "texts": "a"}, r"found \['images', 'texts'\]"),
        ({"images": IMAGES, "pooling": "median"}, "'median'; expected one of"),
        ({"images": IMAGES, "per_frame": True}, "`per_frame` is for videos; found `images`"),
        ({"texts": "a", "prompt": "b"}, "texts stand alone"),
        ({"texts": ["a"], "batch_size": 0}, "`batch_size` is 0"),
        ({"images": [IMAGES[0], []]}, r"`images\[1\]` is an empty list"),
    ],
)
def test_calls_without_meaning(model, call, message):
    with pytest.raises(ValueError, match=message):
        embed(model, processor(), **call)


def test_nothing_gives_no_rows(model):
    assert embed(model, processor(), images=[]).shape == (0, 40)


def test_vectors_have_to_be_finite(model):
    inputs = processor()(text=["abc"], return_tensors="pt")
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output * float("inf"))
    try:
        with pytest.raises(ValueError, match=r"not finite in torch.float32. Load the model in bfloat16"):
            pooled_states(model, inputs, "mean")
    finally:
        handle.remove()


# --- nearest ---------------------------------------------------------------------------------------------------------

ROWS = np.array([[1, 0], [0, 2], [3, 3], [-1, 0]], dtype=np.float32)


def test_nearest_by_angle():
    found = nearest([2, 0.1], ROWS, k=3)
    assert found.indices.tolist() == [0, 2, 1]
    np.testing.assert_allclose(found.similarities, [0.998752, 0.741, 0.04993], atol=1e-3)
    several = nearest([[0, 1], [-2, 0]], ROWS)
    assert several.indices[:, 0].tolist() == [1, 3]
    assert several.similarities.shape == (2, 4)


def test_equal_rows_keep_their_order():
    assert nearest(ROWS[0], np.repeat(ROWS[:1], 5, axis=0)).indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("query", "rows", "k", "message"),
    [
        ([1, 0, 0], ROWS, 1, "`query` has the width 3 and `rows` 2"),
        ([0, 0], ROWS, 1, r"`query` has no direction in row\(s\) \[0\]"),
        ([1, 0], [[1, 0], [np.nan, 0]], 1, r"`rows` has no direction in row\(s\) \[1\]"),
        ([1, 0], ROWS[0], 1, r"the shape \(2,\)"),
        ([1, 0], ROWS, 0, "`k` is 0"),
    ],
)
def test_queries_without_meaning(query, rows, k, message):
    with pytest.raises(ValueError, match=message):
        nearest(query, rows, k)


def test_the_package_exports_them():
    assert molmo2.embed is embed
    assert {"embed", "nearest", "FrameEmbeddings", "Neighbours"} <= set(molmo2.__all__)
