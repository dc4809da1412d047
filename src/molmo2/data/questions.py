"""Rows with questions and answers, captions and plain text."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from molmo2.data.media import is_name, name_text
from molmo2.data.queries import (
    Draw,
    Family,
    Item,
    OtherForm,
    Query,
    Row,
    Settings,
    images_of,
    no_media,
    records,
    text_of,
    video_of,
)
from molmo2.data.styles import LETTERS, NO_POINTING, draw_length_prompt, draw_multiple_choice, draw_prompt
from molmo2.data.subtitles import Subtitles, read_subtitles, subtitle_text

CAPTION_COLUMNS = {
    "video_caption": "video_short_caption",
    "merged_caption": "video_merged_caption",
    "video_frame_merged_caption": "video_long_caption",
}
COUNTING = re.compile(r"\s*(?:how many|count|what is the (?:total )?number)\b", re.I)
TURN = re.compile(r"\[(USER|ASSISTANT)\]")
EMPTY = "there is no answer"
NO_QUESTION = "there is no question"
# Of Molmo2-SynMultiImageQA; which ones CoSyn-400K has is not documented, so that it takes any name.
SET_CONFIGS = ("chart", "chemical", "circuit", "diagram", "doc", "graphic", "music", "table")


def _is_excluded(row: Row, settings: Settings) -> str | None:
    name = row.get("video_id")
    return "the video is excluded" if is_name(name) and name_text(name) in settings.excluded_ids else None


# --- captions --------------------------------------------------------------------------------------------------------


def _caption_problem(row: Row, settings: Settings) -> str | None:
    score = row.get("annotation_score")
    if score is not None and score < settings.min_score:
        return f"the score is below {settings.min_score:g}"
    captions = [text_of(row.get(name)) for name in CAPTION_COLUMNS]
    return _is_excluded(row, settings) or (None if any(captions) else EMPTY)


def _read_video_captions(rows: Sequence[Row], draw: Draw) -> Item:
    queries = [
        Query(style, draw_prompt(style, draw.rng), row[column])
        for row in rows
        for column, style in CAPTION_COLUMNS.items()
        if text_of(row.get(column))
    ]
    chosen = draw.rng.sample(queries, min(len(queries), draw.settings.max_captions))
    return Item([[query] for query in chosen])


def _read_image_captions(rows: Sequence[Row], draw: Draw) -> Item:
    """A caption and one of the transcripts, their length in the prompt, as in pre-training."""
    branches = []
    for row in rows:
        texts = [("long_caption", row["caption"])] if text_of(row.get("caption")) else []
        spoken = _spoken(row)
        if spoken:
            texts.append(("transcript", draw.rng.choice(spoken)))
        for style, text in texts:
            branches.append([Query(style, draw_length_prompt(style, text, draw.rng), text, is_styled=True)])
    return Item(branches)


def _spoken(row: Row) -> list[str]:
    """The transcripts that say something."""
    return [text for text in records(row.get("transcripts")) if text_of(text)]


def _image_caption_problem(row: Row, settings: Settings) -> str | None:
    caption, spoken = text_of(row.get("caption")), _spoken(row)
    return None if caption or spoken else EMPTY


# --- questions about videos ------------------------------------------------------------------------------------------


def _choice_problem(row: Row, settings: Settings) -> str | None:
    others = records(row["NegativeAnswers"])
    if not text_of(row["Answer"]) or not others or not all(map(text_of, others)):
        return "there is no answer, or no other option"
    if len(others) >= len(LETTERS):
        return f"there are more than {len(LETTERS)} options"
    if not text_of(row["Question"]):
        return NO_QUESTION
    return _is_excluded(row, settings)


def _read_video_choices(rows: Sequence[Row], draw: Draw) -> Item:
    branches = []
    for row in rows:
        options = records(row["NegativeAnswers"])
        correct = draw.rng.randint(0, len(options))
        options.insert(correct, row["Answer"])
        question, answer = draw_multiple_choice(row["Question"], options, correct, draw.rng)
        branches.append([Query("video_multiple_choice", question, answer)])
    return Item(branches)


def _subtitles(row: Row) -> Subtitles:
    subtitle = row.get("subtitle")
    return read_subtitles([] if subtitle is None else subtitle)


def _subtitle_problem(row: Row, settings: Settings) -> str | None:
    try:
        _subtitles(row)
    except ValueError:
        return "the subtitle cannot be read"
    return _choice_problem(row, settings)


def _read_subtitle_choices(rows: Sequence[Row], draw: Draw) -> Item:
    subtitles = _subtitles(rows[0])
    item = _read_video_choices(rows, draw)
    branches = [
        [replace(query, style="video_multiple_choice_w_subtitle") for query in turns] for turns in item.branches
    ]
    return Item(branches, subtitle=subtitle_text(subtitles, draw.times, draw.settings.subtitle_mode))


def _answer_problem(row: Row, settings: Settings) -> str | None:
    answer = text_of(row["answer"])
    if not text_of(row["question"]):
        return NO_QUESTION
    return _is_excluded(row, settings) or (None if answer else EMPTY)


def _read_user_questions(rows: Sequence[Row], draw: Draw) -> Item:
    return Item([[Query("user_qa", row["question"], row["answer"])] for row in rows])


# --- questions about images ------------------------------------------------------------------------------------------


def _image_set_problem(row: Row, settings: Settings) -> str | None:
    if not 1 <= len(images_of(row)) <= settings.max_images:
        return f"there are not 1 to {settings.max_images} images"
    answered = [question for question, answer, _ in _pairs(row) if answer]
    return (None if all(answered) else NO_QUESTION) if answered else EMPTY


def _pairs(row: Row) -> list[tuple[str, str, str]]:
    """(question, answer, explanation) of a row, "" for what is null or blank.

    Raises:
        OtherForm: There are not as many of them.
        TypeError: One is no text.
    """
    pairs: dict[str, Any] = row["qa_pairs"]
    for name in ("question", "answer"):
        if name not in pairs:
            raise OtherForm(f"`qa_pairs` has no {name!r}")
    questions, answers = records(pairs["question"]), records(pairs["answer"])
    explanations = records(pairs.get("explanation")) or [""] * len(questions)
    if not len(questions) == len(answers) == len(explanations):
        raise OtherForm("there are not as many answers or explanations as questions")
    columns = ([text if text_of(text) else "" for text in texts] for texts in (questions, answers, explanations))
    return list(zip(*columns))


def _multi_image_problem(row: Row, settings: Settings) -> str | None:
    images = images_of(row)
    is_alone = len(images) == 1 and getattr(images[0], "name", "") is not None  # None: missing, as its media say
    return "there is only one image" if is_alone else _image_set_problem(row, settings)


def _read_image_set_questions(rows: Sequence[Row], draw: Draw) -> Item:
    (row,) = rows
    return Item(
        [
            [Query("correction_qa", f"{NO_POINTING if COUNTING.match(question) else ''}{question}", answer)]
            for question, answer, _ in _pairs(row)
            if answer
        ]
    )


def _read_synthetic_questions(rows: Sequence[Row], draw: Draw) -> Item:
    """Answers with their explanation before them."""
    (row,) = rows
    style = f"cosyn_{draw.settings.config}_exp"
    return Item(
        [
            [Query(style, question, f"{explanation} Answer: {answer}" if explanation else answer)]
            for question, answer, explanation in _pairs(row)
            if answer
        ]
    )


def _require_config(settings: Settings) -> None:
    if not settings.config:
        raise ValueError("This data set has several configurations; pass `Settings(config='chart')`, for instance.")


def _require_set_config(settings: Settings) -> None:
    if settings.config and settings.config not in SET_CONFIGS:
        raise ValueError(
            f"`Settings.config` is {settings.config!r}; expected one of the configurations {', '.join(SET_CONFIGS)}."
        )
    _require_config(settings)


def _read_caption_questions(rows: Sequence[Row], draw: Draw) -> Item:
    """Conversations of pixmo-cap-qa: `[USER] ... [ASSISTANT] ... [USER] ...` and the last answer."""
    branches = []
    for row in rows:
        texts = [text.strip() for text in TURN.split(row["question"])]
        said = list(zip(texts[1::2], texts[2::2])) if len(texts) > 1 else [("USER", texts[0])]
        asked = [text for role, text in said if role == "USER" and text]
        answers = [*(text for role, text in said if role == "ASSISTANT" and text), row["answer"].strip()]
        branches.append([Query("synthetic_qa", *pair) for pair in zip(asked, answers)])
    return Item(branches)


def _caption_question_problem(row: Row, settings: Settings) -> str | None:
    texts = TURN.split(row["question"])
    roles = [role for role, text in zip(texts[1::2], texts[2::2]) if text.strip()]
    is_alternating = roles == ["USER", "ASSISTANT"] * (len(roles) // 2) + ["USER"]
    if len(texts) > 1 and (texts[0].strip() or not is_alternating):
        return "its turns do not alternate"
    return _answer_problem(row, settings)


# --- text ------------------------------------------------------------------------------------------------------------


def _text_problem(row: Row, settings: Settings) -> str | None:
    messages = records(row["messages"], "role", "content")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        return "its turns do not alternate"
    if row.get("has_special_token"):
        return "it contains a special token"
    return None if all(text_of(message["content"]) for message in messages) else EMPTY


def _read_text(rows: Sequence[Row], draw: Draw) -> Item:
    (row,) = rows
    texts = [message["content"] for message in records(row["messages"])]
    system = texts.pop(0) if records(row["messages"])[0]["role"] == "system" else ""
    return Item([[Query("text_sft", *pair) for pair in zip(texts[::2], texts[1::2])]], system=system)


def _fixed_problem(row: Row, settings: Settings) -> str | None:
    response = text_of(row["response"])
    if not all(map(text_of, records(row["questions"]) or [None])):
        return NO_QUESTION
    return None if response else EMPTY


def _read_fixed_answers(rows: Sequence[Row], draw: Draw) -> Item:
    (row,) = rows
    return Item([[Query("demo", question, row["response"])] for question in records(row["questions"])])


def _held_images(row: Row) -> list[object]:
    return records(row.get("images"))


VIDEO_CAPTIONS = Family(_read_video_captions, video_of, (), _caption_problem)
VIDEO_CHOICES = Family(_read_video_choices, video_of, ("video_id",), _choice_problem)
SUBTITLE_CHOICES = Family(_read_subtitle_choices, video_of, ("video_id",), _subtitle_problem)
VIDEO_QUESTIONS = Family(_read_user_questions, video_of, ("video_id",), _answer_problem)
IMAGE_QUESTIONS = Family(_read_user_questions, images_of, ("image_url",), _answer_problem)
IMAGE_SET_QUESTIONS = Family(_read_image_set_questions, images_of, (), _multi_image_problem)
SYNTHETIC_QUESTIONS = Family(_read_synthetic_questions, images_of, (), _image_set_problem, require=_require_config)
SYNTHETIC_SET_QUESTIONS = replace(SYNTHETIC_QUESTIONS, require=_require_set_config)
IMAGE_CAPTIONS = Family(_read_image_captions, images_of, (), _image_caption_problem)
CAPTION_QUESTIONS = Family(_read_caption_questions, images_of, ("image_url",), _caption_question_problem)
TEXT = Family(_read_text, no_media, (), _text_problem)
FIXED_ANSWERS = Family(_read_fixed_answers, _held_images, (), _fixed_problem)
