"""Training examples: what the targets are, how much they count, and trees that are what their branches are apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from molmo2.training import TokenWeighting, messages_from_row
from molmo2.training.examples import common_prefix_length
from molmo2.training.weighting import is_pointing_style
from support.checkpoints import FAMILIES, build_model, make_image
from support.model_inputs import processor
from support.training_cases import (
    ATTENTION,
    CLIP,
    CONVERSATIONS,
    IMAGE,
    TRAINABLE,
    TREES,
    collate,
    example,
    gradients,
    require_same_step,
    separate,
    turn,
    with_attention,
)

LLAVA = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A boat."}]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build_model(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return build_model("qwen3")


def target_text(row: dict[str, torch.Tensor]) -> str:
    """The text of the targets, `|` where something between is none."""
    pieces, last = [], None
    for place in (row["labels"] != -100).nonzero()[:, 0].tolist():
        pieces += ["|"] * (last is not None and place != last + 1)
        pieces.append(processor().tokenizer.decode([int(row["labels"][place])]))
        last = place
    return "".join(pieces)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("text", "Half past two.<|im_end|>"),
        ("image", "A red boat.<|im_end|>"),
        ("turns", "A boat.<|im_end|>|It is red, I think.<|im_end|>"),
        ("two images", "The second one is smaller.<|im_end|>"),
        ("video", "Something moves.<|im_end|>"),
    ],
)
def test_the_answers_and_their_closing_tokens_are_targets(name, text):
    row = example(CONVERSATIONS[name])
    assert target_text(row) == text
    kept = row["labels"] != -100
    assert torch.equal(row["labels"][kept], row["input_ids"][kept])
    assert row["input_ids"][-1] == processor().tokenizer.convert_tokens_to_ids("<|im_end|>")  # and no newline
    assert not (row["token_type_ids"] & kept).any()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_rows_are_those_of_the_chat(name):
    """What is read in training is what is read when the model answers, images included."""
    messages = CONVERSATIONS[name]
    row = example(messages)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    chat = dict(processor().apply_chat_template(messages, **options))
    assert (chat.pop("attention_mask") == 1).all()
    for field in ("input_ids", "token_type_ids"):
        assert torch.equal(row.pop(field), chat.pop(field)[0])
    labels = row.pop("labels")
    assert row.keys() == chat.keys()
    for field, value in chat.items():
        assert torch.equal(row[field], value), field
    prompt = processor().apply_chat_template(messages[:-1], add_generation_prompt=True, **options)["input_ids"][0]
    last_answer = (labels == -100).nonzero()[:, 0].max() + 1
    assert torch.equal(example(messages)["input_ids"][:last_answer], prompt)


def test_system_and_subtitle_are_read_and_no_targets():
    messages = [{"role": "subtitle", "content": "0.0 hello"}, {"role": "system", "content": "Be brief."}]
    row = example([*messages, *CONVERSATIONS["image"]])
    assert "Be brief." in processor().tokenizer.decode(row["input_ids"])
    assert target_text(row) == "A red boat.<|im_end|>"


def test_options_reach_the_images():
    assert len(example(CONVERSATIONS["image"], max_crops=1)["pixel_values"]) == 2
    assert len(example(CONVERSATIONS["video"], num_frames=2)["pixel_values_videos"]) == 2


def test_visual_tokens_in_an_answer_are_no_targets():
    row = example(turn("Draw it.", "Here: <im_col> it is.", IMAGE))
    visual = processor().tokenizer.convert_tokens_to_ids("<im_col>")
    assert (row["input_ids"] == visual).sum() > 0
    assert visual not in row["labels"].tolist()


def test_the_end_is_cut_off():
    whole = example(CONVERSATIONS["turns"])
    length = len(whole["input_ids"]) - 3
    cut = example(CONVERSATIONS["turns"], max_length=length, weighting=TokenWeighting())
    for field in ("input_ids", "labels", "token_type_ids"):
        assert torch.equal(cut[field], whole[field][:length])
    assert len(cut["loss_weights"]) == length


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (CONVERSATIONS["text"][:1], {}, r"A conversation of 1 message\(s\) has none from the assistant"),
        (CONVERSATIONS["text"], {"max_length": 4}, r"nothing to learn in a conversation of 4 tokens"),
        (CONVERSATIONS["image"], {"max_length": 9}, r"would cut \d+ visual token\(s\)"),
        (turn("a", "b", loss_weight=0), {}, "nothing to learn"),
        (turn("a", "b", loss_weight=-1), {}, "Message 1 has `loss_weight` -1: use 0"),
        (turn("a", "b", loss_weight="0.5"), {}, "Message 1 has `loss_weight` '0.5': use 0"),
        (turn("a", "b", loss_weight=float("nan")), {}, "Message 1 has `loss_weight` nan: use 0"),
        (turn("a", "b", loss_weight=float("inf")), {}, "`loss_weight` inf: .* otherwise a finite number"),
        (turn("a", "b"), {"weighting": TokenWeighting}, r"the class TokenWeighting; pass an instance, TokenWeighting"),
        (
            [{"role": "user", "value": "a"}, {"role": "assistant", "value": "b"}],
            {},
            r"Message 0, from the user, has the keys \['role', 'value'\] and no `content`; expected text",
        ),
        (
            [*turn("a", "b")[:1], {"role": "assistant", "value": "b"}],
            {},
            "Message 1, from the assistant, .* no `content`",
        ),
        (turn("a", [{"type": "text", "text": None}]), {}, r"Message 1, an answer, has no text in its 1 part\(s\)"),
        (turn("a", []), {}, r"Message 1, an answer, has no text in its 0 part\(s\)"),
        ([TREES["text"][0], turn("a", [])], {}, "Message 1, an answer, has no text"),
        (
            CONVERSATIONS["text"],
            {"chat_template": "{{ messages[0]['content'] }}"},
            r"marks 0 answer\(s\) of 1 message\(s\)",
        ),
        ([TREES["image"][0], turn("b", "c", CLIP)], {}, r"has 1 image\(s\) and 0 video\(s\), another one has 0"),
        (
            [TREES["image"][0], turn("b", "c", {"type": "image", "image": make_image(90, 130, 1)})],
            {},
            "or different ones. All branches of a tree have the same media",
        ),
    ],
)
def test_what_cannot_be_a_target(messages, options, message):
    with pytest.raises(ValueError, match=message):
        example(messages, **options)


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["turns", "video"])
@torch.no_grad()
def test_the_loss_by_hand(model, name):
    row = example(CONVERSATIONS[name])
    outputs = model(**collate([row]))
    log_probabilities = outputs.logits[0].float().log_softmax(-1)
    targets = [place for place, label in enumerate(row["labels"].tolist()) if label != -100]
    terms = [-float(log_probabilities[place - 1, row["labels"][place]]) for place in targets]
    assert float(outputs.loss) == pytest.approx(sum(terms) / len(terms), abs=1e-5)


@pytest.mark.parametrize(
    ("answer", "keys", "weight"),
    [
        ("A boat at sea.", {}, None),  # 4 / sqrt(number of tokens)
        ("A boat at sea.", {"style": "video_long_caption"}, 0.1),
        ("A boat at sea.", {"style": "video_short_caption"}, None),
        ("There are none.", {"style": "pointing"}, 0.2),
        ("There are none.", {"style": "video_point_track_per_frame"}, 0.2),
        ("3", {"style": "video_multiple_choice_count_without_pointing"}, None),
        ('<points coords="1 1 500 500">boats</points>', {}, 0.2),
        ("A boat at sea.", {"loss_weight": 0.7}, 0.7),
    ],
)
def test_weights_of_answers(answer, keys, weight):
    row = example(turn("Describe.", answer, IMAGE, **keys), weighting=TokenWeighting())
    is_target = row["labels"] != -100
    expected = 4 / int(is_target.sum()) ** 0.5 if weight is None else weight
    torch.testing.assert_close(row["loss_weights"], is_target * expected)


def test_each_message_has_its_own_weight():
    messages = [
        *turn("Point.", "<points>", IMAGE, style="pointing"),
        *turn("Why?", "So.", loss_weight=0),
        *turn("Ah.", "Oh."),
    ]
    row = example(messages, weighting=TokenWeighting(pointing=0.3, scale=2.0))
    assert target_text(row) == "<points><|im_end|>|Oh.<|im_end|>"
    weights = row["loss_weights"][row["labels"] != -100].unique()
    last = len(processor().tokenizer("Oh.<|im_end|>")["input_ids"])
    torch.testing.assert_close(weights, torch.tensor([0.3, 2 / last**0.5]))
    assert row["loss_weights"].count_nonzero() == (row["labels"] != -100).sum()


@pytest.mark.parametrize(
    ("weighting", "scale", "branches"),
    [(TokenWeighting.report(), 4, 1), (TokenWeighting.released_trainer(), 2, 3)],
)
def test_the_two_rules_in_a_tree(weighting, scale, branches):
    """The released trainer divides by sqrt(branches) too, but not the fixed weights of points and long captions."""
    tree = [
        turn("Describe.", "A boat at sea.", IMAGE),
        turn("Point.", "<points>", style="pointing"),
        turn("Describe.", "Long.", style="video_long_caption"),
    ]
    row = example(tree, weighting=weighting)
    found = [row["loss_weights"][(row["branch_ids"] == branch) & (row["labels"] != -100)] for branch in (1, 2, 3)]
    expected = [scale / (len(found[0]) * branches) ** 0.5, 0.2, 0.1]
    for weights, value in zip(found, expected):
        torch.testing.assert_close(weights, torch.full_like(weights, value))
    assert weighting.weight("A boat.", None, 16) == scale / 4  # a conversation is a tree of one branch


def test_the_style_of_the_question_counts():
    parts = {"type": "text", "text": "Describe.", "style": "video_long_caption"}
    messages = [{"role": "user", "content": [CLIP, parts]}, {"role": "assistant", "content": "A boat."}]
    assert example(messages, weighting=TokenWeighting())["loss_weights"].max() == pytest.approx(0.1)


def test_weights_are_off_by_default():
    assert "loss_weights" not in example(CONVERSATIONS["image"])
    row = example(turn("a", "b", loss_weight=0.5))
    assert row["loss_weights"].unique().tolist() == [0.0, 0.5]


def test_styles_of_pointing_are_those_of_the_template():
    styles = {"pointing", "video_point", "point_count", "cosyn_point", "multi_image_point_then_count", "user_qa"}
    assert {style for style in styles if is_pointing_style(style)} == styles - {"user_qa"}


@torch.no_grad()
def test_weighted_loss_of_two_answers_by_hand(qwen3):
    messages = [*turn("Point.", "Here.", IMAGE, loss_weight=0.2), *turn("Why?", "So it is.", loss_weight=2.5)]
    row = example(messages)
    outputs = qwen3(**collate([row]))
    log_probabilities = outputs.logits[0].float().log_softmax(-1)
    total = divisor = 0.0
    for place, label in enumerate(row["labels"].tolist()):
        if label != -100:
            total -= float(row["loss_weights"][place] * log_probabilities[place - 1, label])
            divisor += float(row["loss_weights"][place])
    assert float(outputs.loss) == pytest.approx(total / divisor, abs=1e-5)


# --- trees -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "max_length", "length"),
    [(["abcd", "abxy"], 4, 2), (["abcd", "abcd"], 2, 2), (["ab", "abcd"], 9, 2), (["a", "b"], 1, 0)],
)
def test_branches_share_what_is_equal(rows, max_length, length):
    assert common_prefix_length([[ord(letter) for letter in row] for row in rows], max_length) == length


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("weighting", [None, TokenWeighting()])
def test_the_branches_of_a_tree_are_rows(name, weighting):
    """Prefix and branch side by side are the row that the conversation makes alone."""
    tree = example(TREES[name], weighting=weighting)
    shared = tree["branch_ids"] == 0
    assert not (tree["labels"][shared] != -100).any()
    for number, messages in enumerate(separate(TREES[name]), start=1):
        alone = example(messages, weighting=weighting)
        chosen = shared | (tree["branch_ids"] == number)
        for field in ("input_ids", "labels", "token_type_ids", *(["loss_weights"] if weighting else [])):
            assert torch.equal(tree[field][chosen], alone[field]), field
        assert tree["labels"][tree["branch_ids"] == number][0] == -100
    assert not tree["token_type_ids"][~shared].any()
    assert len(tree["input_ids"]) < sum(len(example(messages)["input_ids"]) for messages in separate(TREES[name]))


def test_the_images_of_a_tree_are_there_once():
    assert len(example(TREES["image"])["image_grids"]) == 1
    assert torch.equal(example(separate(TREES["image"]))["input_ids"], example(TREES["image"])["input_ids"])


def test_branches_that_differ_late_share_their_question():
    tree = example(TREES["captions"])
    text = processor().tokenizer.decode(tree["input_ids"][tree["branch_ids"] == 0])
    assert text.endswith("Describe.<|im_end|>\n<|im_start|>assistant")


def test_a_tree_of_one_branch_is_a_conversation():
    tree, alone = example([CONVERSATIONS["image"]]), example(CONVERSATIONS["image"])
    assert tree.keys() == alone.keys()
    assert all(torch.equal(tree[field], alone[field]) for field in alone)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", TREES)
@torch.no_grad()
def test_a_tree_has_the_loss_of_its_branches(qwen3, name, attention, monkeypatch):
    model = with_attention(qwen3, attention, monkeypatch)
    for weighting in (None, TokenWeighting()):
        tree = collate([example(TREES[name], weighting=weighting)])
        apart = collate([example(messages, weighting=weighting) for messages in separate(TREES[name])])
        torch.testing.assert_close(model(**tree).loss, model(**apart).loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", TRAINABLE)
@pytest.mark.parametrize("name", ["image", "video"])
def test_a_tree_has_the_gradients_of_its_branches(model, name, attention, monkeypatch):
    tree = collate([example(TREES[name], weighting=TokenWeighting())])
    apart = collate([example(messages, weighting=TokenWeighting()) for messages in separate(TREES[name])])
    require_same_step(with_attention(model, attention, monkeypatch), tree, apart)


# --- how it is trained -----------------------------------------------------------------------------------------------


def test_a_step_under_autocast(qwen3):
    inputs = collate([example(TREES["image"]), example(CONVERSATIONS["video"])])
    loss, expected = gradients(qwen3, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_loss, found = gradients(qwen3, inputs)
    assert float(half_loss) == pytest.approx(float(loss), rel=0.02)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        if gradient.norm() > 1e-4:
            likeness = torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
            assert likeness > 0.95, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_packs_and_trees(qwen3, reentrant):
    """Both towers compute their layers again in the backward pass, to the same gradients."""
    inputs = collate([[example(TREES["image"]), example(CONVERSATIONS["video"])], example(CONVERSATIONS["text"])])
    loss, expected = gradients(qwen3, inputs)
    saving = build_model("qwen3")
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        saving.enable_input_require_grads()
        saving.vision_backbone.image_vit.enable_input_require_grads()
    calls = {"vision": 0, "text": 0}

    def count(tower):
        return lambda *_: calls.update({tower: calls[tower] + 1})

    saving = saving.train()
    saving.vision_backbone.image_vit.transformer.resblocks[0].attention.register_forward_hook(count("vision"))
    saving.model.transformer.blocks[0].self_attn.register_forward_hook(count("text"))
    saved_loss = saving(**inputs).loss
    before = dict(calls)
    saved_loss.backward()
    assert calls == {tower: 2 * number for tower, number in before.items()}
    torch.testing.assert_close(saved_loss.detach(), loss)
    found = {name: value.grad for name, value in saving.named_parameters() if value.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


# --- rows of data sets -----------------------------------------------------------------------------------------------


def same(row: dict, messages: list, **options) -> bool:
    found, expected = example(messages_from_row(row), **options), example(messages, **options)
    return found.keys() == expected.keys() and all(torch.equal(found[field], expected[field]) for field in expected)


def test_images_in_columns_of_their_own():
    waiting = {"type": "image", "text": None}
    messages = [
        {"role": "user", "content": [waiting, {"type": "text", "text": "What is this?"}]},
        *CONVERSATIONS["image"][1:],
    ]
    assert same({"messages": messages, "images": [IMAGE["image"]]}, CONVERSATIONS["image"])
    plain = [{"role": "user", "content": "What is this?"}, *CONVERSATIONS["image"][1:]]
    assert same({"messages": plain, "images": [IMAGE["image"]]}, CONVERSATIONS["image"])
    assert same({"messages": plain, "image": IMAGE["image"], "videos": None}, CONVERSATIONS["image"])
    tree = [plain, turn("Why?", "So.")]
    assert same({"messages": tree, "images": [IMAGE["image"]]}, [CONVERSATIONS["image"], tree[1]])
    for images, message in (([], "1 image part.s. without a source, and the row has 0"), ([1, 2], "the row has 2")):
        with pytest.raises(ValueError, match=message):
            messages_from_row({"messages": messages, "images": images})


def test_videos_in_columns_of_their_own():
    for column, value in (("videos", ["clip.mp4"]), ("video", "clip.mp4")):
        first, _ = messages_from_row({"messages": turn("What?", "That."), column: value})
        assert first["content"][0] == {"type": "video", "video": "clip.mp4"}


def test_a_null_style_is_none():
    def styled(**style):
        texts = ({"type": "text", "text": text, **style} for text in ("What is this?", "A boat."))
        return [{"role": role, "content": [text]} for role, text in zip(("user", "assistant"), texts)]

    found, expected = example(styled(style=None)), example(styled())
    assert all(torch.equal(found[field], expected[field]) for field in expected)
    assert target_text(found) == "A boat.<|im_end|>"
    assert target_text(example(styled(style="vqa2"))) == "vqa2: A boat.<|im_end|>"


@pytest.mark.parametrize("column", ["video", "videos"])
def test_a_column_with_the_frames_of_one_video(column):
    frames = [np.full((8, 8, 3), 20 * number, dtype=np.uint8) for number in range(3)]
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}, turn("", "That.")[1]]
    (part, _) = messages_from_row({"messages": asked, column: frames})[0]["content"]
    assert part["video"] is frames


def test_branches_may_name_the_same_image_again(tmp_path):
    """By another path object, or decoded once more."""
    path = tmp_path / "a.png"
    IMAGE["image"].save(path)
    wanted = example([turn("Where?", "Here.", IMAGE), turn("Why?", "So.")])
    for source in (lambda: Path(str(path)), lambda: Image.open(path).convert("RGB")):
        parts = [{"type": "image", "image": source()} for _ in range(2)]
        found = example([turn("Where?", "Here.", parts[0]), turn("Why?", "So.", parts[1])])
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[field], wanted[field]) for field in wanted)


def test_of_prompt_and_completion_the_second_is_the_target():
    prompt, completion = CONVERSATIONS["turns"][:3], CONVERSATIONS["turns"][3:]
    row = example(messages_from_row({"prompt": prompt, "completion": completion}))
    assert target_text(row) == "It is red, I think.<|im_end|>"
    row = example(messages_from_row({"prompt": "How?", "completion": "So."}))
    assert target_text(row) == "So.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Hello"}, r"A row with the columns \['text'\] holds no conversation: expected"),
        ({}, r"A row with the columns \[\] holds no conversation: .* `remove_unused_columns=False`"),
        (
            {"messages": LLAVA},
            r"A message with the keys \['from', 'value'\] has no `role`; expected ",
        ),
        ({"messages": LLAVA, "image": IMAGE["image"]}, r"\['from', 'value'\] has no `role`"),
        ({"prompt": LLAVA[:1], "completion": LLAVA[1:]}, r"\['from', 'value'\] has no `role`"),
        ({"messages": [LLAVA, LLAVA]}, r"\['from', 'value'\] has no `role`"),
    ],
)
def test_rows_without_a_conversation(row, message):
    with pytest.raises(ValueError, match=message):
        collate([row])


def test_an_empty_answer_is_a_target_where_it_is_meant():
    for empty in ("", [{"type": "text", "text": ""}]):
        assert target_text(example(turn("What is there?", empty))) == "<|im_end|>"


def test_a_text_part_without_text_is_refused():
    parts = [{"type": "text", "text": "A boat."}, {"type": "text", "text": None}]
    with pytest.raises(ValueError, match=r"Part 1 of message 1 is of type 'text' with the keys \['type'\]"):
        example(turn("What is this?", parts))
