"""Batches of training examples: padding, images of every kind, packed rows, one loss in every arrangement."""

import pytest
import torch

from molmo2.training import Pack, TokenWeighting
from support.checkpoints import build_model
from support.model_inputs import processor
from support.training_cases import (
    ATTENTION,
    CONVERSATIONS,
    IMAGE,
    TRAINABLE,
    TREES,
    collate,
    example,
    require_same_step,
    separate,
    turn,
    with_attention,
)


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3")


def letters(batch: dict[str, torch.Tensor]) -> list[str]:
    """One letter per token: `.` padding, `v` visual, `l` target, `t` other text."""
    drawn = []
    for row in range(len(batch["input_ids"])):
        letter = ["t"] * batch["input_ids"].shape[1]
        for place in range(len(letter)):
            if not batch["attention_mask"][row, place]:
                letter[place] = "."
            elif batch["token_type_ids"][row, place]:
                letter[place] = "v"
            elif batch["labels"][row, place] != -100:
                letter[place] = "l"
        drawn.append("".join(letter))
    return drawn


def small(tokens: int, targets: int = 1, **more) -> dict[str, torch.Tensor]:
    """An example of text by hand."""
    ids = torch.arange(40, 40 + tokens)
    labels = ids.masked_fill(torch.arange(tokens) < tokens - targets, -100)
    return {"input_ids": ids, "labels": labels, "token_type_ids": torch.zeros(tokens, dtype=torch.bool), **more}


@pytest.mark.parametrize(
    ("settings", "drawing"),
    [
        ({}, ["ttl..", "tttll"]),
        ({"padding_side": "left"}, ["..ttl", "tttll"]),
        ({"pad_to_multiple_of": 4}, ["ttl.....", "tttll..."]),
        ({"pad_to_multiple_of": 4, "padding_side": "left"}, [".....ttl", "...tttll"]),
    ],
)
def test_ragged_rows(settings, drawing):
    batch = collate([small(3), small(5, 2)], **settings)
    assert letters(batch) == drawing
    is_padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][is_padding] == processor().tokenizer.pad_token_id).all()
    assert (batch["labels"][is_padding] == -100).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "token_type_ids"}


def test_what_only_some_rows_have():
    weighted = small(3, loss_weights=torch.tensor([0.0, 0.0, 0.3]))
    tree = small(4, branch_ids=torch.tensor([0, 0, 1, 2]))
    batch = collate([weighted, tree])
    torch.testing.assert_close(batch["loss_weights"], torch.tensor([[0.0, 0, 0.3, 0], [0, 0, 0, 1.0]]))
    assert batch["branch_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 2]]


@pytest.mark.parametrize(
    ("side", "ids"),
    [("right", [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]), ("left", [[0, 0, 0, 1, 1], [-1, -1, -1, 0, 0]])],
)
@pytest.mark.parametrize("kind", [list, tuple, lambda row: Pack(tuple(row), 0, 0)])
def test_packed_rows(side, ids, kind):
    batch = collate([kind([small(3), small(2)]), small(2)], padding_side=side)
    assert batch["example_ids"].tolist() == ids
    assert batch["input_ids"][0].tolist() == [40, 41, 42, 40, 41]


@pytest.mark.parametrize("options", [{}, {"pixel_dtype": "uint8"}], ids=["float32", "uint8"])
def test_examples_that_were_stored_as_lists(options):
    """A data set that was mapped and saved gives lists instead of tensors, and null for what a row lacks."""
    row = example(CONVERSATIONS["image"], **options)
    stored = {name: value.tolist() for name, value in row.items()} | {"loss_weights": None, "note": "kept aside"}
    found, expected = collate([stored]), collate([row])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype or value.is_floating_point()
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("name", "pixels"), [("image", "pixel_values"), ("video", "pixel_values_videos")])
def test_pixels_of_both_kinds(name, pixels, packed, stored):
    """Those that are not normalised yet are, also where a data set made lists of them."""
    normalized, raw = example(CONVERSATIONS[name]), example(CONVERSATIONS[name], pixel_dtype="uint8")
    if stored:
        raw = {field: value.tolist() for field, value in raw.items()}
    for mixed in ([normalized, raw], [raw, normalized]):
        found = collate([mixed] if packed else mixed)[pixels]
        torch.testing.assert_close(found, torch.cat([normalized[pixels]] * 2), atol=1e-6, rtol=0)
    assert collate([raw, raw])[pixels].dtype == torch.uint8


def test_rows_of_a_data_set_are_built():
    weighting = TokenWeighting()
    settings = {"weighting": weighting, "options": {"max_crops": 1}}
    found = collate([{"messages": CONVERSATIONS["image"]}, {"messages": TREES["text"]}], **settings)
    expected = collate(
        [
            example(CONVERSATIONS["image"], weighting=weighting, max_crops=1),
            example(TREES["text"], weighting=weighting),
        ]
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pooling_tables_of_unlike_width():
    """Clips with key frames have wider windows; the rows of the narrower ones are filled up."""
    fast = example(CONVERSATIONS["video"], key_frame_interval=2)
    plain = example(CONVERSATIONS["video"])
    widths = [row["video_token_pooling"].shape[1] for row in (fast, plain)]
    batch = collate([fast, plain])
    table = batch["video_token_pooling"]
    assert widths[0] != widths[1]
    assert table.shape[1] == max(widths)
    first = len(fast["video_token_pooling"])
    assert torch.equal(table[:first, : widths[0]], fast["video_token_pooling"])
    assert torch.equal(table[first:, : widths[1]], plain["video_token_pooling"])
    assert (table[first:, widths[1] :] == -2).all()
    assert (table[:first, widths[0] :] == -2).all()


@pytest.mark.parametrize(
    ("features", "settings", "message"),
    [
        ([small(2)], {"padding_side": "both"}, "`padding_side` is 'both'; expected 'left' or 'right'"),
        (["text"], {}, "A training example is a mapping; found str"),
        ([{"input_ids": torch.tensor([1])}], {}, r"An example with \['input_ids'\] has no `labels`"),
        ([turn("a", "b")], {}, r"A row with the columns \['content', 'role'\] holds no conversation"),
    ],
)
def test_what_makes_no_batch(features, settings, message):
    with pytest.raises(ValueError, match=message):
        collate(features, **settings)


# --- the model on these batches --------------------------------------------------------------------------------------

NAMES = list(CONVERSATIONS)


def apart(model, names: list[str], **options) -> tuple[float, float]:
    """Sum of the losses over tokens and number of tokens, one conversation at a time."""
    total = number = 0.0
    for name in names:
        row = example(CONVERSATIONS[name], **options)
        inputs = collate([row])
        weight = float(row.get("loss_weights", (row["labels"] != -100).float()).sum())
        total += float(model(**inputs).loss) * weight
        number += weight
    return total, number


@pytest.mark.parametrize("weighting", [None, TokenWeighting()])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_mixed_batch_has_the_loss_of_its_rows(model, side, weighting):
    """Text, images, several images, a video, both: padded on either side, the mean over all targets."""
    total, number = apart(model, NAMES, weighting=weighting)
    batch = collate([example(CONVERSATIONS[name], weighting=weighting) for name in NAMES], padding_side=side)
    assert float(model(**batch).loss) == pytest.approx(total / number, abs=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_packed_rows_have_the_loss_of_their_examples(model, attention, side, monkeypatch):
    model = with_attention(model, attention, monkeypatch)
    total, number = apart(model, NAMES)
    rows = [example(CONVERSATIONS[name]) for name in NAMES]
    batch = collate([rows[:4], rows[4:]], padding_side=side)
    assert float(model(**batch).loss) == pytest.approx(total / number, abs=1e-5)


@pytest.mark.parametrize("attention", TRAINABLE)
def test_packed_trees_have_the_gradients_of_all_their_branches(model, attention, monkeypatch):
    """Two trees and a conversation in a row, another one beside it, weighted: six rows in two."""
    options = {"weighting": TokenWeighting()}
    packed = collate(
        [
            [example(TREES["image"], **options), example(TREES["video"], **options)],
            example(CONVERSATIONS["turns"], **options),
        ],
        padding_side="left",
    )
    single = [*separate(TREES["image"]), *separate(TREES["video"]), CONVERSATIONS["turns"]]
    expected = collate([example(messages, **options) for messages in single])
    assert len(expected["input_ids"]) == 6
    require_same_step(with_attention(model, attention, monkeypatch), packed, expected)


def test_accumulated_steps_are_one_step(model):
    """The sum of the weights of the whole step divides each part of it."""
    rows = [example(CONVERSATIONS[name], weighting=TokenWeighting()) for name in ("image", "text")]
    whole = collate(rows)
    divisor = whole["loss_weights"].sum()
    with torch.no_grad():
        parts = [model(**collate([row]), num_items_in_batch=divisor).loss for row in rows]
        torch.testing.assert_close(sum(parts), model(**whole).loss)


def test_the_message_parts_are_not_changed():
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    row = {"messages": messages, "images": [IMAGE["image"]]}
    collate([row])
    assert messages[0] == {"role": "user", "content": "What?"}
    assert row["images"] == [IMAGE["image"]]
