"""From prompts with placeholders to rows of ids, as tables and drawings."""

import re

import pytest

from molmo2.processing.prompt_tokens import (
    ExpandedPrompt,
    VisualTokenFormat,
    expand,
    image_tokens,
    insert_bos,
    pad,
    padded_length,
    require_placeholders,
    truncate,
    video_string,
)

# Drawings: L and ( open the low-res view and an image, ) closes one, p and l are patches, | ends a row of patches,
# [ and ] open and close a frame.
LETTERS = {
    "<low_res_im_start>": "L",
    "<im_start>": "(",
    "<im_end>": ")",
    "<im_patch>": "p",
    "<im_low>": "l",
    "<im_col>": "|",
    "<frame_start>": "[",
    "<frame_end>": "]",
}


def drawing(text: str) -> str:
    for token, letter in LETTERS.items():
        text = text.replace(token, letter)
    return text


# --- images as tokens ------------------------------------------------------------------------------------------------

HIGH_RES = {True: "(ppp|ppp|)", False: "(pppppp)"}
LOW_RES_PATCHES = {True: "pp|", False: "pp"}


@pytest.mark.parametrize("low_res_token", [False, True])
@pytest.mark.parametrize("start_token", [True, False])
@pytest.mark.parametrize("low_res_columns", [None, True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_image_tokens(columns, low_res_columns, start_token, low_res_token):
    """A low-res view of 1 x 2 tokens and crops of 2 x 3, under every combination of the options for images."""
    notation = VisualTokenFormat(
        image_use_col_tokens=columns,
        use_single_crop_col_tokens=low_res_columns,
        use_single_crop_start_token=start_token,
        use_low_res_token_for_global_crops=low_res_token,
    )
    low_res = LOW_RES_PATCHES[columns if low_res_columns is None else low_res_columns]
    if low_res_token:
        low_res = low_res.replace("p", "l")
    expected = ("L" if start_token else "(") + low_res + ")" + HIGH_RES[columns]
    assert drawing("".join(image_tokens([1, 2, 2, 3], notation))) == expected


@pytest.mark.parametrize("option", ["video_use_col_tokens", "use_frame_special_tokens"])
def test_options_for_videos_leave_images_alone(option):
    default = VisualTokenFormat()
    changed = VisualTokenFormat(**{option: not getattr(default, option)})
    assert image_tokens([1, 2, 2, 3], changed) == image_tokens([1, 2, 2, 3], default)


@pytest.mark.parametrize(
    ("columns", "frame_tokens", "expected"),
    [
        (False, True, "0.0 [pppp] 0.5 [pppp]"),
        (True, True, "0.0 [pp|pp|] 0.5 [pp|pp|]"),
        (False, False, "0.0 (pppp) 0.5 (pppp)"),
        (True, False, "0.0 (pp|pp|) 0.5 (pp|pp|)"),
    ],
)
def test_video_string(columns, frame_tokens, expected):
    notation = VisualTokenFormat(video_use_col_tokens=columns, use_frame_special_tokens=frame_tokens)
    assert drawing(video_string([2, 2, 2], [0, 0.5], notation)) == expected


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [(0, "0.0"), (0.04, "0.0"), (0.06, "0.1"), (0.25, "0.2"), (0.35, "0.3"), (9.96, "10.0"), (3600.04, "3600.0")],
)
def test_times_have_one_decimal(seconds, printed):
    """Rounded as Python prints floats: 0.25 is exact and goes to even, 0.35 is a little less than it says."""
    assert drawing(video_string([1, 1, 1], [seconds], VisualTokenFormat())) == f"{printed} [p]"


def test_every_frame_has_its_time():
    with pytest.raises(ValueError, match=r"3 frame\(s\) and 2 timestamp\(s\); expected one for each frame"):
        video_string([3, 1, 1], [0.0, 0.5], VisualTokenFormat())


# --- placeholders ----------------------------------------------------------------------------------------------------


def iterators(replacements):
    return {placeholder: iter(texts) for placeholder, texts in replacements.items()}


@pytest.mark.parametrize(
    ("prompt", "replacements", "expected"),
    [
        ("no image", {"<i>": []}, "no image"),
        ("<i>", {"<i>": ["AAAA"]}, "AAAA"),
        ("<i>", {"<i>": [""]}, ""),
        ("a<i>b<i>c", {"<i>": ["1", "22"]}, "a1b22c"),
        ("<v>a<i><v>", {"<i>": ["1"], "<v>": ["7", "8"]}, "7a18"),
        ("<i><i>", {"<i>": ["<i>", "<v>"], "<v>": []}, "<i><v>"),  # what was put in is not looked at again
    ],
)
def test_expand(prompt, replacements, expected):
    assert expand(prompt, iterators(replacements)).text == expected


def test_the_next_prompt_takes_the_texts_that_are_left():
    waiting = iterators({"<i>": ["1", "2", "3"], "<v>": ["7", "8"]})
    assert [expand(prompt, waiting).text for prompt in ("<i><v>", "a", "<i><v><i>")] == ["17", "a", "283"]


def test_positions_move_along():
    """Every character outside of the placeholders is found again behind longer, shorter and empty images."""
    original = "ab<i>cd<v><i>ef"
    expanded = expand(original, iterators({"<i>": ["1234567", ""], "<v>": ["8"]}))
    assert expanded.text == "ab1234567cd8ef"
    moved = {original[place]: expanded.text[expanded.position(place)] for place in (0, 1, 5, 6, 13, 14)}
    assert moved == {letter: letter for letter in "abcdef"}
    assert expanded.position(len(original)) == len(expanded.text)


def test_without_placeholders_nothing_moves():
    assert [ExpandedPrompt("abc").position(place) for place in range(4)] == [0, 1, 2, 3]


def require(counts, passed):
    """Prompts with these numbers of placeholders, and images of all or of each."""
    number, given = (passed, None) if isinstance(passed, int) else (sum(passed), [["a"] * own for own in passed])
    require_placeholders(["b<|image|>" * count for count in counts], "<|image|>", number, given)


@pytest.mark.parametrize(("counts", "passed"), [([], 0), ([0], 0), ([2, 0, 1], 3), ([2, 0, 1], [2, 0, 1])])
def test_matching_placeholders(counts, passed):
    require(counts, passed)


RULE = "The number of `<|image|>` tokens in the prompts should be the same as the number of images."
ADVICE = f"{RULE} Put one `<|image|>` where each image belongs, or let `apply_chat_template` write the prompt."


@pytest.mark.parametrize(
    ("counts", "passed", "message"),
    [
        ([1, 1], 3, f"2 `<|image|>` in the text, but 3 image(s) were passed. {ADVICE}"),
        ([2], 0, f"2 `<|image|>` in the text, but 0 image(s) were passed. {ADVICE}"),
        ([1, 1], [1, 2], f"Prompt 1 has 1 `<|image|>`, but 2 image(s) were passed for it. {ADVICE}"),
        ([1, 0], [0, 1], f"Prompt 0 has 1 `<|image|>`, but 0 image(s) were passed for it. {ADVICE}"),
    ],
)
def test_placeholders_and_images_that_do_not_match(counts, passed, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require(counts, passed)


# --- rows of ids -----------------------------------------------------------------------------------------------------

BOS, VISUAL = 9, frozenset({7, 8})


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([], [9]), ([1], [9, 1]), ([9], [9]), ([9, 1], [9, 1]), ([9, 9, 1], [9, 9, 1]), ([1, 9], [9, 1, 9])],
)
def test_one_bos_in_front(ids, expected):
    assert insert_bos(ids, BOS) == expected


@pytest.mark.parametrize(
    ("ids", "max_length", "side", "expected"),
    [
        ([9, 1, 2, 3], 4, "right", [9, 1, 2, 3]),
        ([9, 1, 2, 3], 5, "left", [9, 1, 2, 3]),
        ([9, 1, 2, 3], 2, "right", [9, 1]),
        ([9, 1, 2, 3], 2, "left", [9, 3]),  # BOS stays
        ([9, 1, 2, 3], 1, "left", [9]),
        ([9, 7, 8, 1, 2], 3, "right", [9, 7, 8]),
        ([9, 1, 2, 7, 8], 3, "left", [9, 7, 8]),
    ],
)
def test_truncate(ids, max_length, side, expected):
    assert truncate(ids, max_length, side, VISUAL) == expected


@pytest.mark.parametrize(
    ("ids", "side", "lost"),
    [([9, 1, 7, 8, 7], "right", 2), ([9, 7, 8, 1, 2], "left", 2), ([9, 7, 1, 2, 8], "left", 1)],
)
def test_visual_tokens_are_never_cut(ids, side, lost):
    message = (
        f"Truncating a prompt of 5 tokens to `max_length` = 3 would cut {lost} visual token(s). Raise `max_length` by "
        "2 or more, lower `max_crops` (images) or `num_frames` (videos)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        truncate(ids, 3, side, VISUAL)


class Strategy:
    """Stands for the library's enum of padding strategies."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("padding", "max_length", "multiple", "expected"),
    [
        (False, None, None, 0),
        (None, 9, 8, 0),
        ("do_not_pad", 9, 8, 0),
        (Strategy("do_not_pad"), 9, 8, 0),
        (True, None, None, 5),
        ("longest", 9, None, 5),
        (Strategy("longest"), 9, None, 5),
        (True, None, 4, 8),
        (True, None, 5, 5),
        ("max_length", 9, None, 9),
        ("max_length", 9, 4, 12),
        ("max_length", 3, None, 5),  # padding cuts nothing
    ],
)
def test_padded_length(padding, max_length, multiple, expected):
    assert padded_length([2, 5, 3], padding, max_length, multiple) == expected


def test_nothing_to_pad():
    assert padded_length([], True, None, 8) == 0


def test_padding_errors():
    with pytest.raises(ValueError, match=re.escape('`padding="max_length"` needs `max_length`, the number of tokens')):
        padded_length([2], "max_length", None, None)
    with pytest.raises(ValueError, match="`padding` is 'short'; expected True, 'longest', 'max_length' or False"):
        padded_length([2], "short", None, None)
    with pytest.raises(ValueError, match="`padding_side` is 'up'; expected 'left' or 'right'"):
        pad([1], 2, 0, "up")


@pytest.mark.parametrize(("side", "expected"), [("left", [0, 0, 1, 2]), ("right", [1, 2, 0, 0])])
def test_pad(side, expected):
    assert pad([1, 2], 4, 0, side) == expected
    assert pad([1, 2], 2, 0, side) == [1, 2]
