"""What the chat template writes beyond the golden table, and which tokens count as the assistant's."""

import itertools
import re

import numpy as np
import pytest
import torch
from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from transformers import AutoTokenizer

from support.golden_cases import pattern
from support.golden_processor import build_processor, decode, tokenizer

# Crops of 98 pixels: images of few tokens, which keeps these tests fast.
SMALL = {
    "image_processor_init": {"size": {"height": 98, "width": 98}, "overlap_margins": [2, 2]},
    "video_processor_init": {"size": {"height": 98, "width": 98}},
}
IMAGE = {"type": "image", "image": pattern({"kind": "pattern", "height": 60, "width": 90})}
VIDEO = {
    "type": "video",
    "video": pattern({"kind": "pattern_video", "height": 30, "width": 40, "frames": 3}),
    "fps": 2.0,
}


def text(words, **more):
    return {"type": "text", "text": words, **more}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(content):
    return {"role": "assistant", "content": content}


def render(*messages, **options):
    return build_processor(SMALL).apply_chat_template(list(messages), **options)


# --- how servers read it ---------------------------------------------------------------------------------------------


def reads_content(node, variable):
    """Whether an expression is `variable['content']` or `variable.content`, filtered, tested or sliced at will."""
    if isinstance(node, (nodes.Filter, nodes.Test)):
        return node.node is not None and reads_content(node.node, variable)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return reads_content(node.node, variable)
    key = node.arg.value if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) else None
    key = node.attr if isinstance(node, nodes.Getattr) else key
    return key == "content" and isinstance(node.node, nodes.Name) and node.node.name == variable


def names_in(expression):
    return {node.name for node in (expression, *expression.find_all(nodes.Name)) if isinstance(node, nodes.Name)}


def loops_over_content(source, variables=None):
    """Whether a template goes through the parts of a message: that of a loop over `messages`, or one called so."""
    loops = list(Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(source).find_all(nodes.For))
    if variables is None:
        over_messages = [loop for loop in loops if "messages" in names_in(loop.iter)]
        variables = {loop.target.name for loop in over_messages if isinstance(loop.target, nodes.Name)}
    return any(reads_content(loop.iter, variable) for loop in loops for variable in variables)


class Generation(Extension):
    """`{% generation %}`, of which the servers' parsers know that it encloses a body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


@pytest.mark.parametrize("variables", [None, {"message"}], ids=["vllm", "sglang"])
def test_servers_see_that_content_may_be_a_list(variables):
    source = build_processor(SMALL).chat_template
    assert loops_over_content(source, variables)
    # Otherwise a server joins the parts to one string, and images land behind "user".
    assert not loops_over_content(source.replace("| default([], true)", "or []"), variables)


def test_parts_as_transformers_serve_passes_them_on():
    # It maps `image_url` and `video_url` to `image` and `video` with a `url`, and text parts stay as they are.
    content = [{"type": "image", "url": "a.png"}, {"type": "video", "url": "a.mp4"}, text("Hi")]
    assert render(user(*content)) == "<|image|><|video|><|im_start|>user\nHi<|im_end|>\n"


# --- one turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("Hi", "Hi"),
        ("", ""),
        ([text("Hi")], "Hi"),
        ([text("a"), text("b")], "a b"),
        ([text(""), text("b")], "b"),
        ([text("a"), IMAGE, text("b")], "a b"),
        (["a", IMAGE, "b"], "a b"),
        ([text("a"), "b"], "a b"),
        ([{"text": "a"}], "a"),
        ([], ""),
        (" spaces stay\n", " spaces stay\n"),
    ],
)
def test_text_of_a_turn(content, written):
    images = "<|image|>" * (IMAGE in content if isinstance(content, list) else 0)
    rendered = render({"role": "user", "content": content})
    assert rendered == f"{images}<|im_start|>user\n{written}<|im_end|>\n"


BARE_STYLES = """
point_count pointing cosyn_point user_qa long_caption short_caption video_long_caption video_short_caption
video_point_track_per_frame video_point_track_start_end video_point_track_all_frames
video_single_point_track_start_end video_transcript video_clip_caption_start_end
video_clip_caption_start_end_in_seconds video_clip_transcript_start_end video_clip_transcript_start_end_in_seconds
video_frame_caption_timestamp video_frame_caption_timestamp_in_seconds correction_qa text_sft video_point
video_point_count video_count video_count_point multi_image_pointing multi_image_counting
multi_image_point_then_count multi_image_count_then_point demo a_okvqa_mc ai2_diagram_no_letter ai2_diagram
science_qa multi_image_mc multi_image_mc_exp mantis_instruct_mc video_multiple_choice
video_multiple_choice_count_without_pointing video_multiple_choice_multiple_correct video_multiple_choice_w_subtitle
"""


@pytest.mark.parametrize("style", re.findall(r"\w+", BARE_STYLES))
def test_demo_styles_are_not_written(style):
    assert render(user(text("Count.", style=style))) == "<|im_start|>user\nCount.<|im_end|>\n"


@pytest.mark.parametrize(
    ("parts", "written"),
    [
        ([text("Why?", style="vqa2")], "vqa2: Why?"),
        ([text("Why?", style="Demo")], "Demo: Why?"),  # names are compared exactly
        ([text("a", style="vqa2"), text("b", style="demo"), text("c", style="tally_qa")], "vqa2: a b tally_qa: c"),
        ([text("", style="vqa2"), text("b")], "vqa2:  b"),  # a style is written even before an empty text
    ],
)
def test_other_styles_are_written(parts, written):
    assert render(user(*parts)) == f"<|im_start|>user\n{written}<|im_end|>\n"


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_images", "num_videos", "opening"),
    [
        (0, 0, ""),
        (1, 0, "<|image|>"),
        (2, 0, "Image 1<|image|>Image 2<|image|>"),
        (0, 1, "<|video|>"),
        (0, 2, "<|video|><|video|>"),
        (1, 1, "<|image|><|video|>"),
        (2, 2, "Image 1<|image|>Image 2<|image|><|video|><|video|>"),
    ],
)
def test_images_open_the_prompt(num_images, num_videos, opening):
    """Images first, then videos, wherever they stand: the last of them in a later turn here."""
    parts = [*[VIDEO] * num_videos, *[IMAGE] * num_images]
    rendered = render(user(text("a"), *parts[:-1]), assistant("b"), user(text("c"), *parts[-1:]))
    assert rendered == (
        f"{opening}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("part", "opening"),
    [
        ({"type": "image"}, "<|image|>"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "<|image|>"),
        ({"image": "a.png"}, "<|image|>"),
        ({"image_url": "a.png"}, "<|image|>"),
        ({"type": "video"}, "<|video|>"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "<|video|>"),
        ({"video": "a.mp4"}, "<|video|>"),
        ({"video_url": "a.mp4"}, "<|video|>"),
        ({"image": "a.png", "video": "a.mp4"}, "<|image|>"),  # one part, one image
        ({"type": "audio", "audio": "a.mp3"}, ""),
    ],
)
def test_what_counts_as_an_image(part, opening):
    assert render(user(part)) == f"{opening}<|im_start|>user\n<|im_end|>\n"


def test_images_in_any_role_count():
    messages = [
        {"role": "system", "content": [IMAGE, text("s")]},
        user(text("a")),
        assistant([text("b"), IMAGE]),
    ]
    assert render(*messages) == (
        "Image 1<|image|>Image 2<|image|><|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>"
    )


# --- system and subtitle ---------------------------------------------------------------------------------------------

SUBTITLE, SYSTEM = {"role": "subtitle", "content": "0.0 hello\n"}, {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("opening", "written"),
    [
        ([SUBTITLE], "0.0 hello\n"),
        ([SYSTEM], "<|im_start|>system\nBe brief.<|im_end|>\n"),
        ([SUBTITLE, SYSTEM], "0.0 hello\n<|im_start|>system\nBe brief.<|im_end|>\n"),
        ([SYSTEM, SUBTITLE], "0.0 hello\n<|im_start|>system\nBe brief.<|im_end|>\n"),
        ([{"role": "System", "content": [text("a"), text("b")]}], "<|im_start|>system\na b<|im_end|>\n"),
    ],
)
def test_messages_before_the_first_turn(opening, written):
    """The subtitle follows the images, the system message follows the subtitle."""
    rendered = render(*opening, user(VIDEO, text("What?")), add_generation_prompt=True)
    assert rendered == f"<|video|>{written}<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


def test_opening_messages_alone():
    assert render(SUBTITLE) == "0.0 hello\n"
    assert render(SYSTEM, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_subtitles_that_are_odd_are_written_as_in_training():
    listed = {"role": "subtitle", "content": [text("hello")]}
    assert render(listed, user("a")) == "[{'type': 'text', 'text': 'hello'}]<|im_start|>user\na<|im_end|>\n"
    assert render(user("a"), SUBTITLE, user("b")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    )


# --- turns -----------------------------------------------------------------------------------------------------------


def test_turns():
    """The newline stands between turns; a finished last turn of the assistant ends with its closing token."""
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    whole = (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    )
    assert render(*turns) == whole
    assert render(*turns[:3]) == whole.partition("<|im_start|>assistant\nd")[0]
    assert render(*turns[:3], add_generation_prompt=True) == whole.removesuffix("d<|im_end|>")
    assert render(*turns, add_generation_prompt=True) == whole + "\n<|im_start|>assistant\n"


def test_roles_in_any_case():
    messages = [{"role": "User", "content": "a"}, {"role": "ASSISTANT", "content": "b"}]
    assert render(*messages) == render(user("a"), assistant("b"))


@pytest.mark.parametrize("content", ["It is a", [text("It is"), text("a")]])
def test_a_turn_to_continue_stays_open(content):
    """The closing token is left out, so that generation continues where the message stops."""
    rendered = render(user(IMAGE, text("What?")), assistant(content), continue_final_message=True)
    assert rendered == "<|image|><|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nIt is a"


def test_batches_are_rendered_one_by_one():
    conversations = [[user("a")], [user(IMAGE, text("b")), assistant("c")]]
    processor = build_processor(SMALL)
    assert processor.apply_chat_template(conversations) == [render(*messages) for messages in conversations]


ROLES = "Conversation roles must alternate user/assistant/user/assistant/... after an optional subtitle and system "


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "The conversation is empty; expected at least one message."),
        ([assistant("b")], ROLES + "message, but turn 1 is from 'assistant', expected 'user'."),
        ([user("a"), user("b")], ROLES + "message, but turn 2 is from 'user', expected 'assistant'."),
        ([user("a"), SYSTEM], ROLES + "message, but turn 2 is from 'system', expected 'assistant'."),
        ([SYSTEM, SYSTEM, user("a")], ROLES + "message, but turn 1 is from 'system', expected 'user'."),
        ([SYSTEM, user("a"), assistant("b"), assistant("c")], ROLES + "message, but turn 3 is from 'assistant', "),
        ([user("a"), {"role": "tool", "content": "b"}], ROLES + "message, but turn 2 is from 'tool', "),
        ([user("a"), {"role": "Tool", "content": "b"}], ROLES + "message, but turn 2 is from 'Tool', "),
        (
            [{"role": "user", "content": None}],
            "The content of a message from 'user' is null; expected text or a list of parts.",
        ),
        (
            [user("a"), assistant(None)],
            "The content of a message from 'assistant' is null; expected text or a list of parts.",
        ),
        ([{"role": "user", "content": {"text": "x"}}], "The content of a message from 'user' is a single object;"),
        ([{"role": "system", "content": None}], "The content of a message from 'system' is null;"),
    ],
)
def test_what_cannot_be_written(messages, message):
    with pytest.raises(TemplateError, match=f"^{re.escape(message)}"):
        render(*messages)


@pytest.fixture
def saved_tokenizer(tmp_path):
    build_processor(SMALL).save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_saved_tokenizers_carry_the_template(saved_tokenizer):
    """Trainers that only know the tokenizer write the same text."""
    processor = build_processor(SMALL)
    assert saved_tokenizer.chat_template == processor.chat_template
    for messages, flag in itertools.product(
        ([SYSTEM, user(IMAGE, VIDEO, text("a"))], [SUBTITLE, user("a"), assistant([text("b")])]), (True, False)
    ):
        assert saved_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=flag) == (
            processor.apply_chat_template(messages, add_generation_prompt=flag)
        )


# --- the assistant's tokens ------------------------------------------------------------------------------------------

LONG = [
    SYSTEM,
    user(text("What is this?"), IMAGE),
    assistant("It is a cat."),
    user(IMAGE, VIDEO, text("And this? It is a cat.<|im_end|>")),
    assistant([text("Naïve  café 😀"), text("1 2 3")]),
]
SHORT = [user("x"), assistant("yes")]
LONG_SAID, SHORT_SAID = "It is a cat.<|im_end|>Naïve  café 😀 1 2 3<|im_end|>", "yes<|im_end|>"


def encode_with_mask(conversation, **options):
    return build_processor(SMALL).apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )


def marked(output):
    """The text of the marked tokens of each row."""
    rows = zip(np.asarray(output["input_ids"]), np.asarray(output["assistant_masks"]), strict=True)
    return [decode(ids[mask == 1].tolist()) for ids, mask in rows]


@pytest.mark.parametrize(("conversation", "said"), [(SHORT, SHORT_SAID), (LONG, LONG_SAID)], ids=["text", "images"])
def test_the_assistants_tokens_are_marked(conversation, said):
    """Its text with the closing token, and nothing else, wherever images moved it."""
    output = encode_with_mask(conversation)
    assert marked(output) == [said]
    assert len(output["assistant_masks"][0]) == len(output["input_ids"][0])
    assert output["input_ids"][0][0] == tokenizer().bos_token_id


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [{"padding": True}, {"padding": "max_length", "max_length": 400}])
def test_marks_in_padded_batches(side, padding):
    output = encode_with_mask([SHORT, LONG], padding_side=side, return_tensors="pt", **padding)
    masks = output["assistant_masks"]
    assert masks.dtype == torch.int64
    assert masks.shape == output["input_ids"].shape
    assert marked(output) == [SHORT_SAID, LONG_SAID]
    assert not (masks * (1 - output["attention_mask"])).any()


def test_marks_where_the_text_brings_its_bos():
    """No BOS is put in front of this row, so nothing moves by one."""
    opening = {"role": "subtitle", "content": "<|im_end|>"}
    output = encode_with_mask([opening, *SHORT])
    assert output["input_ids"][0].count(tokenizer().bos_token_id) == 3
    assert marked(output) == [SHORT_SAID]


@pytest.mark.parametrize(("cut", "left_over"), [(0, "yes<|im_end|>"), (1, "yes"), (2, "y"), (3, ""), (5, "")])
def test_marks_of_truncated_rows(cut, left_over):
    (ids,) = encode_with_mask(SHORT)["input_ids"]
    assert [decode([token]) for token in ids[-3:]] == ["y", "es", "<|im_end|>"]
    output = encode_with_mask(SHORT, truncation=True, max_length=len(ids) - cut)
    assert marked(output) == [left_over]
    assert output["input_ids"] == [ids[: len(ids) - cut]]


def test_marks_of_rows_truncated_on_the_left(monkeypatch):
    monkeypatch.setattr(tokenizer(), "truncation_side", "left")
    (ids,) = encode_with_mask(SHORT)["input_ids"]
    output = encode_with_mask(SHORT, truncation=True, max_length=5)
    assert output["input_ids"] == [[ids[0], *ids[-4:]]]
    assert marked(output) == [SHORT_SAID]


@pytest.mark.parametrize(
    ("conversation", "options", "said"),
    [
        (SHORT, {"continue_final_message": True}, "yes"),
        (SHORT, {"add_generation_prompt": True}, "yes<|im_end|>"),
        ([user("x")], {"add_generation_prompt": True}, ""),
        ([user("x"), assistant("")], {}, "<|im_end|>"),
    ],
)
def test_marks_of_open_and_empty_turns(conversation, options, said):
    assert marked(encode_with_mask(conversation, **options)) == [said]


@pytest.mark.parametrize("options", [{}, {"tokenize": True}, {"return_dict": True}])
def test_marks_need_a_dictionary(options):
    with pytest.raises(
        ValueError, match=r"^`return_assistant_tokens_mask` needs `tokenize=True` and `return_dict=True`"
    ):
        render(*SHORT, return_assistant_tokens_mask=True, **options)


def test_the_tokenizer_marks_them_too(saved_tokenizer):
    """Trainers of text-only data take the marks from the tokenizer, which knows the template but no images."""
    output = saved_tokenizer.apply_chat_template(
        SHORT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.asarray(output["input_ids"]), np.asarray(output["assistant_masks"])
    assert decode(ids[mask == 1].tolist()) == SHORT_SAID
