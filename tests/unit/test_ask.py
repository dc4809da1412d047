"""`ask`: one call from a question to an answer, and sessions that read their images once."""

import copy
import threading

import pytest
import torch
from transformers import GenerationConfig

from molmo2.tools.ask import AnswerPiece, MediaSession, ask, ask_stream
from support.checkpoints import build_model, make_image
from support.model_inputs import clip, processor
from support.scripted_model import DictatedModel, ScriptedModel

CUPS = 'Counting the <points coords="1 1 250 500 2 750 500">cups</points> shows a total of 2.'
BOATS = '<points coords="1 1 100 200\t2 2 300 400">boats</points>'
SCRIPT = {
    "cups": CUPS,
    "boats": BOATS,
    "dog": '<tracks coords="0.0 1 500 500\t1.0 1 600 500">dog</tracks>',
    "Hello": "Hi.",
}
CLIP = [(clip(4), {"fps": 2.0})]


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3").eval()


@pytest.fixture
def scripted():
    return ScriptedModel(processor(), SCRIPT)


def by_hand(model, question, images=(), videos=(), **options):
    """The ids of the answer, without any of this."""
    content = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": video, "video_metadata": about} for video, about in videos]
    inputs = processor().apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, do_sample=False, **options)
    return output[0, inputs["input_ids"].shape[1] :]


def decoded(ids) -> str:
    return processor().decode(ids, skip_special_tokens=True).strip()


def test_points_in_pixels_without_passing_anything_by_hand(scripted):
    answer = ask(scripted, processor(), "Point to the cups.", images=make_image(100, 200))
    assert (str(answer), answer.text) == (CUPS, CUPS)
    assert [(point.x, point.y) for point in answer.grounding] == [(50, 50), (150, 50)]
    assert answer.grounding.count == 2
    assert answer.parsed is answer.grounding
    assert not answer.truncated
    assert answer.timings.num_new_tokens == len(processor().tokenizer.encode(CUPS, add_special_tokens=False)) + 1
    assert answer.timings.num_prompt_tokens > 50
    assert answer.timings.preprocess_seconds > 0


def test_one_batch_for_several_questions(scripted):
    images = [make_image(100, 200), [make_image(40, 30), make_image(20, 10)], None]
    answers = ask(scripted, processor(), ["The cups?", "The boats?", "Hello"], images=images)
    assert len(scripted.calls) == 1
    assert [answer.text for answer in answers] == [CUPS, BOATS, "Hi."]
    assert [(point.image_index, point.x, point.y) for point in answers[1].grounding] == [(0, 3, 8), (1, 3, 8)]
    assert answers[2].timings.num_prompt_tokens < answers[0].timings.num_prompt_tokens


def test_an_empty_batch(scripted):
    assert ask(scripted, processor(), []) == []


@torch.no_grad()
def test_same_answer_as_by_hand(model):
    answer = ask(model, processor(), "What is it?", images=[make_image()], max_new_tokens=8, do_sample=False)
    ids = by_hand(model, "What is it?", [make_image()], max_new_tokens=8)
    assert answer.text == decoded(ids)
    assert answer.truncated is (processor().tokenizer.eos_token_id not in ids.tolist())


@torch.no_grad()
def test_a_batch_answers_as_single_questions(model):
    questions, images = (
        ["What is it?", "And this, what is it?", "Who?"],
        [make_image(), [make_image(70, 40, 1)] * 2, None],
    )
    options = {"max_new_tokens": 6, "do_sample": False}
    together = ask(model, processor(), questions, images=images, **options)
    alone = [
        ask(model, processor(), question, own, **options) for question, own in zip(questions, images, strict=True)
    ]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_points_arrive_while_the_answer_is_written(scripted):
    pieces = list(ask_stream(scripted, processor(), "Point to the cups.", images=[make_image(100, 200)]))
    assert all(isinstance(piece, AnswerPiece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == CUPS
    arrived = [number for number, piece in enumerate(pieces) for _ in piece.points]
    assert len(arrived) == 2
    assert arrived[0] < arrived[1] < len(pieces) - 1
    assert "".join(piece.text for piece in pieces[: arrived[0] + 1]).endswith("250 500")  # and no later
    assert [piece.answer for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].answer.grounding.count == 2


def test_a_truncated_answer_keeps_what_is_complete(scripted):
    num_tokens = len(processor().tokenizer.encode(CUPS[: CUPS.index("750") + 5], add_special_tokens=False))
    answer = ask(scripted, processor(), "The cups?", images=[make_image(100, 200)], max_new_tokens=num_tokens)
    assert answer.truncated
    assert answer.grounding.truncated
    assert [point.id for point in answer.grounding] == [1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"max_new_tokens": 3}, 3),
        ({"max_length": 4}, 4),
        ({"max_new_tokens": None, "max_length": 4}, 4),
        ({"generation_config": GenerationConfig(max_new_tokens=5)}, 5),
        ({}, 6),
    ],
    ids=["option", "length", "length alone", "configuration", "model"],
)
def test_what_limits_the_length(model, monkeypatch, options, found):
    """Counted from the prompt; what the model's own configuration says holds where nothing else says a limit."""
    monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    monkeypatch.setattr(model.generation_config, "max_new_tokens", None if "max_length" in options else 6)
    dictated = DictatedModel(model, processor(), lambda prompt: "word " * 30)
    prompt = ask(dictated, processor(), "Hello", max_new_tokens=1).timings.num_prompt_tokens
    options = {name: prompt + value if name == "max_length" else value for name, value in options.items()}
    answer = ask(dictated, processor(), "Hello", **options)
    assert (answer.timings.num_new_tokens, answer.truncated) == (found, True)


@torch.no_grad()
def test_leaving_a_stream_stops_the_model(model):
    steps = []
    dictated = DictatedModel(model, processor(), lambda prompt: "word " * 400, steps.append)
    session = MediaSession(dictated, processor(), images=[make_image()])
    for pieces in (ask_stream(dictated, processor(), "Tell a story."), session.chat_stream("Tell a story.")):
        next(pieces)
        pieces.close()
        assert 0 < len(steps) < 400
        assert not [thread for thread in threading.enumerate() if thread.name == "molmo2-answer"]
        steps.clear()


def test_pieces_are_the_answer_without_blanks_around_it(model):
    dictated = DictatedModel(model, processor(), lambda prompt: f" \n {BOATS}  and \n more \n ")
    *pieces, last = ask_stream(dictated, processor(), "Hello", images=[make_image(10, 10), make_image(10, 10)])
    assert last.answer.text == f"{BOATS}  and \n more" == "".join(piece.text for piece in pieces)
    points = [point for piece in (*pieces, last) for point in piece.points]
    assert [point.span for point in points] == [point.span for point in last.answer.grounding]


def test_an_error_of_the_model_reaches_the_reader_of_the_stream(scripted):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    scripted.generate = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        list(ask_stream(scripted, processor(), "Hello"))


# --- sessions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def encodings(model, monkeypatch):
    """How often the vision transformer ran."""
    calls = []
    original = type(model.vision_backbone).encode_crops
    monkeypatch.setattr(
        type(model.vision_backbone), "encode_crops", lambda self, *args: (calls.append(1), original(self, *args))[1]
    )
    return calls


QUESTIONS = ["What happens?", "Who is there?", "What happens?"]


@pytest.mark.parametrize("media", ["images", "video", "both"])
@torch.no_grad()
def test_a_session_answers_like_separate_questions(model, encodings, media):
    images = [] if media == "video" else [make_image(), make_image(60, 40, 1)]
    videos = [] if media == "images" else CLIP
    expected = [decoded(by_hand(model, question, images, videos, max_new_tokens=8)) for question in QUESTIONS]
    encodings.clear()
    session = MediaSession(model, processor(), images, videos)
    once = len(encodings)
    answers = [session.ask(question, max_new_tokens=8, do_sample=False) for question in QUESTIONS]
    assert [answer.text for answer in answers] == expected
    assert len(encodings) == once == (2 if media == "both" else 1)
    for answer in answers:
        assert 0 < answer.timings.num_cached_tokens < answer.timings.num_prompt_tokens
    streamed = list(session.stream(QUESTIONS[0], max_new_tokens=8, do_sample=False))
    assert streamed[-1].answer.text == expected[0]


@torch.no_grad()
def test_a_conversation_continues_from_what_was_read(model, encodings):
    session = MediaSession(model, processor(), images=[make_image()])
    first = session.chat("What is it?", max_new_tokens=6, do_sample=False)
    second = session.chat("Are you sure?", max_new_tokens=6, do_sample=False)
    assert len(encodings) == 1
    assert second.timings.num_cached_tokens >= first.timings.num_prompt_tokens
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "What is it?"}],
        },
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Are you sure?"},
    ]
    inputs = processor().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert second.text == decoded(output[0, inputs["input_ids"].shape[1] :])
    alone = session.ask("Are you sure?", max_new_tokens=6, do_sample=False)  # knows nothing of the conversation
    assert alone.timings.num_prompt_tokens < second.timings.num_prompt_tokens


@torch.no_grad()
def test_a_conversation_in_pieces_is_the_same(model, encodings):
    options = {"max_new_tokens": 6, "do_sample": False}
    session, streamed = (MediaSession(model, processor(), images=[make_image()]) for _ in range(2))
    expected = [session.chat(question, **options) for question in QUESTIONS]
    next(streamed.chat_stream("This one is given up.", **options))
    pieces = [list(streamed.chat_stream(question, **options)) for question in QUESTIONS]
    assert len(encodings) == 2
    assert ["".join(piece.text for piece in answer).strip() for answer in pieces] == [each.text for each in expected]
    for answer, whole in zip(pieces, expected, strict=True):
        assert answer[-1].answer.timings.num_cached_tokens == whole.timings.num_cached_tokens
        assert answer[-1].answer.timings.num_prompt_tokens == whole.timings.num_prompt_tokens


@torch.no_grad()
@pytest.mark.parametrize("configured", [False, True])
def test_beams_in_a_session(model, configured):
    session = MediaSession(model, processor(), images=[make_image()])
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    if configured:
        ends = model.generation_config.eos_token_id
        options = {"generation_config": GenerationConfig(**options, eos_token_id=ends)}
    answer = session.ask("What is it?", **options)
    expected = by_hand(model, "What is it?", [make_image()], max_new_tokens=5, num_beams=2)
    assert answer.text == decoded(expected)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_session_needs_images(model):
    with pytest.raises(ValueError, match="caches images and videos, but there are none"):
        MediaSession(model, processor())


def test_a_batch_needs_images_for_each_question(scripted):
    with pytest.raises(ValueError, match="There are 2 questions, but `images` or `videos` has 3 entries"):
        ask(scripted, processor(), ["a", "b"], images=[None, None, None])
    with pytest.raises(ValueError, match="one answer per question"):
        ask(scripted, processor(), "Hello", num_return_sequences=2)


@pytest.mark.parametrize("whose", ["options", "model"])
def test_one_answer_per_question_by_any_configuration(model, monkeypatch, whose):
    several = GenerationConfig(num_return_sequences=2, do_sample=True)
    if whose == "model":
        monkeypatch.setattr(model, "generation_config", several)
    options = {"generation_config": several} if whose == "options" else {}
    with pytest.raises(ValueError, match="one answer per question, but `num_return_sequences` is 2"):
        ask(model, processor(), ["a", "b"], **options)


@torch.no_grad()
def test_a_session_needs_its_cache(model):
    session = MediaSession(model, processor(), images=[make_image()])
    with pytest.raises(ValueError, match="needs its cache, but `use_cache` is False"):
        session.ask("What is it?", use_cache=False)


@torch.no_grad()
def test_a_session_counts_the_tokens_that_it_keeps(model, monkeypatch):
    session = MediaSession(model, processor(), images=[make_image()])
    first = session.chat("What is it?", max_new_tokens=6, do_sample=False)
    kept = first.timings.num_prompt_tokens + first.timings.num_new_tokens
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", kept + 4)
    with pytest.raises(ValueError, match=rf"more than the model's `max_position_embeddings` = {kept + 4}\."):
        session.chat("Are you sure?", max_new_tokens=1)
    with pytest.raises(ValueError, match=r"^The session would have \d+ tokens, those in its cache included, "):
        session.ask("a " * kept, max_new_tokens=1)
    assert session.ask("Why?", max_new_tokens=1).text is not None


@pytest.mark.parametrize("question", [None, make_image(8, 8), ["Point to the cups.", None]])
def test_a_question_is_text(scripted, question):
    with pytest.raises(TypeError, match="A question is text or a `Prompt`, not"):
        ask(scripted, processor(), question)


def test_the_processor_comes_second(scripted):
    with pytest.raises(TypeError, match="The processor comes second"):
        ask(processor(), scripted, "Point to the cups.")


def test_an_answer_is_shown_without_repetitions(scripted):
    shown = repr(ask(scripted, processor(), "Point to the cups.", images=make_image(100, 200)))
    assert shown.count("Point(") == 2
    assert "MediaInfo" not in shown
