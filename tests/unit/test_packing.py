"""Packed rows and message trees: the same numbers as rows of their own, and ids that fit no layout are refused."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from molmo2.model.attention.blockwise import BlockwiseMask
from molmo2.model.loss import shift_labels, weighted_loss
from molmo2.model.packing import packed_rows, require_packed_layout
from molmo2.model.vision_inputs import token_groups
from support.checkpoints import FAMILIES, build_model
from support.model_inputs import batch, owners_of

IMAGES = (
    "pixel_values",
    "image_token_pooling",
    "image_grids",
    "image_num_crops",
    "pixel_values_videos",
    "video_token_pooling",
    "video_grids",
)
ATTENTION = ("sdpa", "blockwise", "eager", "flex_attention")
# PyTorch has no backward pass of flex_attention on the CPU.
TRAINABLE = ("sdpa", "blockwise", "eager")


def digits(*rows: str) -> torch.Tensor:
    """One digit per token; `.` is -1."""
    return torch.tensor([[-1 if letter == "." else int(letter) for letter in row] for row in rows])


def require_layout(mask, examples, branches, is_visual=None):
    ids = [None if texts is None else digits(*texts) for texts in (mask, examples, branches)]
    shape = next(tensor.shape for tensor in ids[1:] if tensor is not None)
    require_packed_layout(packed_rows(*ids, shape), is_visual)


def written(ids: torch.Tensor) -> list[str]:
    return ["".join("." if entry < 0 else str(entry) for entry in row) for row in ids.tolist()]


# --- positions and labels, as drawings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "examples", "branches", "positions"),
    [
        ("11111111", "00011222", None, "01201012"),
        ("11111111", None, "00011222", "01234345"),  # branches continue where the prefix ends
        ("111111111", "000001111", "001120011", "012320123"),  # trees packed behind each other
        ("00111111", "..000111", None, "00012012"),
        ("11111100", "000111..", None, "01201222"),
        ("11011101", "00.000.1", None, "01123440"),
        ("111111", "000000", "111222", "012012"),  # branches without a prefix
        (None, "0011", None, "0101"),
    ],
)
def test_positions(mask, examples, branches, positions):
    ids = (None if text is None else digits(text) for text in (mask, examples, branches))
    found = packed_rows(*ids, (1, len(positions))).positions()
    assert written(found) == [positions]


def test_each_token_predicts_the_next_one_of_its_example():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    packed = packed_rows(None, digits("000111"), None, (1, 6))
    assert shift_labels(labels, packed).tolist() == [[2, 3, -100, 5, 6, -100]]
    assert shift_labels(labels).tolist() == [[2, 3, 4, 5, 6, -100]]


def test_the_first_token_of_a_branch_has_no_label():
    packed = packed_rows(None, None, digits("001122", "001122"), (2, 6))
    labels = torch.tensor([[-100, 2, -100, 4, -100, 6], [-100, 2, -100, 4, 5, 6]])
    assert shift_labels(labels[:1], packed_rows(None, None, digits("001122"), (1, 6))).tolist() == [
        [2, -100, 4, -100, 6, -100]
    ]
    with pytest.raises(
        ValueError, match=r"Row\(s\) \[1\] have a label at the first token of a branch.*Begin the branch"
    ):
        shift_labels(labels, packed)


@pytest.mark.parametrize(
    ("examples", "branches", "message"),
    [
        (("001100", "001122"), None, r"In row\(s\) \[0\] `example_ids` has an example in several pieces"),
        (None, ("001122", "001121"), r"In row\(s\) \[1\] `branch_ids` has a branch in several pieces"),
        (None, ("001102", "001122"), r"In row\(s\) \[0\] `branch_ids` has a shared prefix \(0\) after a branch"),
        (None, ("00.122", "00.122"), r"In row\(s\) \[0, 1\] `branch_ids` has negative numbers: use 0"),
    ],
)
def test_ids_that_fit_no_layout(examples, branches, message):
    with pytest.raises(ValueError, match=message):
        require_layout(None, examples, branches)


@pytest.mark.parametrize(
    ("mask", "examples", "branches"),
    [
        (None, "000111222", None),
        ("000111111", "333000111", None),  # ids of padding do not count
        ("111011101", "000.111.2", None),
        (None, "000000111", "001122011"),  # numbers of branches restart
        (None, None, "111222333"),
    ],
)
def test_ids_that_are_fine(mask, examples, branches):
    require_layout(*(None if text is None else (text,) for text in (mask, examples, branches)))


def test_images_belong_into_the_prefix():
    is_visual = torch.tensor([[True, True, False, True, False, False]])
    with pytest.raises(ValueError, match=r"In row\(s\) \[0\] there are visual tokens in a branch: put images"):
        require_layout(None, None, ("001122",), is_visual)
    require_layout(None, None, ("000011",), is_visual)


def test_packed_examples_are_rows_of_their_own_to_the_images():
    """A frame of 2 tokens, then one of 3 in the next example, are no image whose two groups are 2 and 3."""
    ids = torch.tensor([[1, 1, 2, 0, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 2]])  # 1 patch, 2 end
    examples = digits("000011112222222")
    config = SimpleNamespace(
        image_patch_id=1,
        image_low_res_id=1,
        image_end_token_id=2,
        frame_end_token_id=9,
        low_res_image_start_token_id=8,
    )
    groups = token_groups(ids, config, examples)
    assert [[size for size, _ in row] for row in groups] == [[2], [3], [2, 3]]
    found = owners_of(groups, [[1, 2, 1, 3]], [[1, 1, 2], [1, 1, 3]])
    assert found == [[("video", 0)], [("video", 1)], [("image", 0)]]


# --- packed rows against rows of their own ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build_model(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return build_model("qwen3")


def with_attention(model, name: str, monkeypatch):
    """A copy under this attention; `blockwise` is sdpa in blocks of a few queries."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("sdpa" if name == "blockwise" else name)
    monkeypatch.setattr(BlockwiseMask, "queries_per_block", 7 if name == "blockwise" else 10**9)
    return model


def answer_labels(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last tokens of every row, however padded."""
    mask = inputs["attention_mask"]
    from_the_end = mask.flip(-1).cumsum(-1).flip(-1)
    return inputs["input_ids"].masked_fill((mask == 0) | (from_the_end > 9), -100)


def joined_images(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([part[name] for part in parts if name in part])
        for name in IMAGES
        if any(name in part for part in parts)
    }


def padded(rows: list[torch.Tensor], value: Any, side: str) -> torch.Tensor:
    length = max(map(len, rows))
    blanks = [torch.full((length - len(row),), value, dtype=row.dtype) for row in rows]
    return torch.stack(
        [torch.cat((blank, row) if side == "left" else (row, blank)) for row, blank in zip(rows, blanks, strict=True)]
    )


def packed(rows: list[list[str]], side: str) -> dict[str, torch.Tensor]:
    """Each list of names as one row."""
    singles = [[batch(name) for name in names] for names in rows]
    ids = [torch.cat([single["input_ids"][0] for single in row]) for row in singles]
    labels = [torch.cat([answer_labels(single)[0] for single in row]) for row in singles]
    examples = [
        torch.cat([torch.full_like(single["input_ids"][0], number) for number, single in enumerate(row)])
        for row in singles
    ]
    return {
        "input_ids": padded(ids, 1000, side),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0, side),
        "example_ids": padded(examples, -1, side),
        "labels": padded(labels, -100, side),
        **joined_images([single for row in singles for single in row]),
    }


ROWS = [["image", "text", "two videos", "image and video"], ["video", "two images", "text"]]
NAMES = [name for row in ROWS for name in row]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_packed_rows_give_the_logits_and_loss_of_single_rows(model, attention, side, monkeypatch):
    model = with_attention(model, attention, monkeypatch)
    inputs = packed(ROWS, side)
    outputs = model(**inputs)
    apart = batch(*NAMES)
    expected = model(**apart, labels=answer_labels(apart))
    torch.testing.assert_close(outputs.loss, expected.loss, atol=1e-5, rtol=0)
    number = 0
    for row, names in enumerate(ROWS):
        for example in range(len(names)):
            found = outputs.logits[row][inputs["example_ids"][row] == example]
            alone = expected.logits[number][apart["attention_mask"][number].bool()]
            torch.testing.assert_close(found, alone, atol=3e-5, rtol=0)
            number += 1


def gradients(model, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).train()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def require_same_step(model, inputs: dict[str, Any], expected_inputs: dict[str, Any]) -> None:
    (loss, found), (expected_loss, expected) = gradients(model, inputs), gradients(model, expected_inputs)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)
    assert found.keys() == expected.keys()
    assert any("image_vit" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("attention", TRAINABLE)
def test_packed_rows_give_the_gradients_of_single_rows(model, attention, monkeypatch):
    model = with_attention(model, attention, monkeypatch)
    apart = batch(*NAMES)
    require_same_step(model, packed(ROWS, "right"), {**apart, "labels": answer_labels(apart)})


def tree(name: str, branches: list[list[int]]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One row with this prompt as prefix, and the same as a row per branch. Labels: all of a branch but its start."""
    prefix = batch(name)
    ids = prefix["input_ids"][0]
    tails = [torch.tensor(branch) for branch in branches]
    unlabelled = torch.full_like(ids, -100)
    labels = [tail.clone() for tail in tails]
    for label in labels:
        label[0] = -100
    images = {key: value for key, value in prefix.items() if key in IMAGES}
    in_one = {
        "input_ids": torch.cat([ids, *tails])[None],
        "labels": torch.cat([unlabelled, *labels])[None],
        "branch_ids": torch.cat([ids * 0, *(tail * 0 + number for number, tail in enumerate(tails, 1))])[None],
        **images,
    }
    apart = {
        "input_ids": padded([torch.cat([ids, tail]) for tail in tails], 1000, "right"),
        "attention_mask": padded([torch.ones(len(ids) + len(tail)).long() for tail in tails], 0, "right"),
        "labels": padded([torch.cat([unlabelled, label]) for label in labels], -100, "right"),
        **joined_images([images] * len(tails)),
    }
    return in_one, apart


BRANCHES = [[40, 41, 42, 43], [50, 51], [60, 61, 62, 63, 64, 65, 66]]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ["image", "video", "image and video"])
@torch.no_grad()
def test_a_tree_gives_the_logits_of_its_branches(model, name, attention, monkeypatch):
    model = with_attention(model, attention, monkeypatch)
    in_one, apart = tree(name, BRANCHES)
    outputs, expected = model(**in_one), model(**apart)
    torch.testing.assert_close(outputs.loss, expected.loss, atol=1e-5, rtol=0)
    start = int((in_one["branch_ids"] == 0).sum())
    torch.testing.assert_close(outputs.logits[0, :start], expected.logits[0, :start], atol=3e-5, rtol=0)
    for number, branch in enumerate(BRANCHES):
        found = outputs.logits[0][in_one["branch_ids"][0] == number + 1]
        alone = expected.logits[number, start : start + len(branch)]
        torch.testing.assert_close(found, alone, atol=3e-5, rtol=0)


@pytest.mark.parametrize("attention", TRAINABLE)
@pytest.mark.parametrize("name", ["image", "video"])
def test_a_tree_gives_the_gradients_of_its_branches(model, name, attention, monkeypatch):
    require_same_step(with_attention(model, attention, monkeypatch), *tree(name, BRANCHES))


@pytest.mark.parametrize("attention", TRAINABLE)
def test_trees_packed_into_one_row(model, attention, monkeypatch):
    """Two trees and a plain example in a row, with padding and weights, against seven rows."""
    model = with_attention(model, attention, monkeypatch)
    trees = [tree("image", BRANCHES), tree("video", BRANCHES[:2]), tree("text", [[70, 71, 72]])]
    parts = [in_one for in_one, _ in trees]
    length = sum(part["input_ids"].shape[1] for part in parts) + 3
    row = {
        key: padded([torch.cat([part[key][0] for part in parts]), torch.zeros(length).long()], value, "left")[:1]
        for key, value in (("input_ids", 1000), ("labels", -100), ("branch_ids", 9))
    }
    row["attention_mask"] = (torch.arange(length) >= 3).long()[None]
    row["example_ids"] = torch.cat(
        [torch.tensor([-1] * 3), *(part["input_ids"][0] * 0 + number for number, part in enumerate(parts))]
    )[None]
    row["loss_weights"] = (row["input_ids"] % 7 + 1) / 4
    row |= joined_images(parts)
    separate = [apart for _, apart in trees]
    width = max(part["input_ids"].shape[1] for part in separate)
    rows = {
        key: torch.cat(
            [torch.nn.functional.pad(part[key], (0, width - part[key].shape[1]), value=value) for part in separate]
        )
        for key, value in (("input_ids", 1000), ("labels", -100), ("attention_mask", 0))
    }
    rows["loss_weights"] = (rows["input_ids"] % 7 + 1) / 4
    assert len(rows["input_ids"]) == 6
    require_same_step(model, row, rows | joined_images(separate))


@pytest.mark.parametrize("attention", ["sdpa", "blockwise"])
@torch.no_grad()
def test_positions_that_restart_mark_examples_too(qwen3, attention, monkeypatch):
    """A convention of the library, for rows without padding and without a cache."""
    model = with_attention(qwen3, attention, monkeypatch)
    inputs = packed([["text", "text"]], "right")
    expected = model(**inputs).logits
    found = model(
        input_ids=inputs["input_ids"],
        position_ids=packed_rows(None, inputs["example_ids"], None, inputs["input_ids"].shape).positions(),
        use_cache=False,
    ).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert not torch.allclose(found, model(input_ids=inputs["input_ids"]).logits, atol=1e-2)


@torch.no_grad()
def test_a_packed_row_may_be_longer_than_the_longest_prompt(qwen3):
    model = copy.deepcopy(qwen3)
    inputs = packed([["text", "image"]], "right")
    longest = int((inputs["example_ids"] == 1).sum())
    model.model.transformer.config.max_position_embeddings = longest
    assert model(**inputs).loss.isfinite()
    model.model.transformer.config.max_position_embeddings = longest - 1
    with pytest.raises(ValueError, match=f"The prompt has {longest} tokens, 1 more than"):
        model(**inputs)


def test_flash_has_no_mask_for_packed_rows(qwen3, monkeypatch):
    text = qwen3.get_decoder()
    monkeypatch.setattr(text.config, "_attn_implementation_internal", "flash_attention_2")
    rows = packed_rows(None, digits("0011"), None, (1, 4))
    embeds = torch.zeros(1, 4, text.config.hidden_size)
    arguments, _ = text._layer_arguments(embeds, None, None, None, None, rows, False, None)
    assert arguments["implementation"] == "sdpa"


# --- weights of labels -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weighted_loss_by_hand(model):
    inputs = batch("image", "text", padding_side="right")
    labels = answer_labels(inputs)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    outputs = model(**inputs, labels=labels, loss_weights=weights)
    log_probabilities = outputs.logits.float().log_softmax(-1)
    total = divisor = 0.0
    for row in range(2):
        for place in range(1, labels.shape[1]):
            label = int(labels[row, place])
            if 0 <= label < model.config.vocab_size:
                total -= float(weights[row, place] * log_probabilities[row, place - 1, label])
                divisor += float(weights[row, place])
    assert float(outputs.loss) == pytest.approx(total / divisor, abs=1e-5)
    accumulated = model(**inputs, labels=labels, loss_weights=weights, num_items_in_batch=torch.tensor(12.5))
    assert float(accumulated.loss) == pytest.approx(total / 12.5, abs=1e-4)
    unweighted = model(**inputs, labels=labels, loss_weights=torch.full(labels.shape, 0.3)).loss
    torch.testing.assert_close(unweighted, model(**inputs, labels=labels).loss)


def test_weights_of_nothing_and_negative_ones():
    logits, targets = torch.randn(1, 3, 5, requires_grad=True), torch.tensor([[1, 2, -100]])
    loss = weighted_loss(logits, targets, torch.zeros(1, 3))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(logits.grad.abs().max()) == 0
    with pytest.raises(ValueError, match="`loss_weights` has negative entries: use 0 for tokens"):
        weighted_loss(logits, targets, torch.tensor([[0.0, -1.0, 1.0]]))


# --- what must be refused --------------------------------------------------------------------------------------------


def test_packed_rows_start_without_a_cache(qwen3):
    inputs = batch("text")
    cache = DynamicCache(config=qwen3.config.text_config)
    with torch.no_grad():
        qwen3(**inputs, past_key_values=cache)
    length = inputs["input_ids"].shape[1]
    examples = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(ValueError, match=f"the cache holds {length} tokens already. Run packed rows in one pass"):
        qwen3(input_ids=inputs["input_ids"], example_ids=examples, past_key_values=cache)


def test_packed_rows_have_no_answer(qwen3):
    inputs = batch("text")
    with pytest.raises(
        ValueError, match="`generate` was given branch_ids, but an answer continues one prompt per row"
    ):
        qwen3.generate(**inputs, branch_ids=torch.zeros_like(inputs["input_ids"]), max_new_tokens=2)


def test_ids_of_another_shape(qwen3):
    inputs = batch("text")
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=rf"`example_ids` is \(1, 3\), but the tokens are \(1, {length}\)"):
        qwen3(**inputs, example_ids=torch.zeros(1, 3, dtype=torch.int64))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`attention_mask` is \(1, 1, .*told apart token by token"):
        qwen3(input_ids=inputs["input_ids"], attention_mask=mask, example_ids=torch.zeros_like(inputs["input_ids"]))
