"""What the app does, without its page: conversations, points while they come, files, and what users are told."""

import json
import threading
import tracemalloc
from dataclasses import replace
from threading import Event, Thread

import numpy as np
import pytest

from app.__main__ import arguments
from app.backend import Backend, Update, UserError, _note, is_video, readable
from app.engines import NO_ANSWER, LocalEngine
from app.models import MINIATURE, load_backend, server_backend
from app.samples import SAMPLES
from molmo2 import Answer, MediaLimitError, MediaLimits
from molmo2.client import http as client_http
from molmo2.client.media import image_url
from molmo2.grounding.files import from_coco, from_csv, from_json
from molmo2.grounding.parse import parse_grounding
from molmo2.tools.answer import Timings
from molmo2.tools.draw import DrawingStyle
from support.checkpoints import REPOSITORY, build_model, make_image, module_cache
from support.fake_openai import serve
from support.hostile_media import clip
from support.model_inputs import processor
from support.ports import closed_port
from support.scripted_model import DictatedModel

pytestmark = pytest.mark.slow

CUPS = 'Counting the <points coords="1 1 250 500 2 750 500">cups</points> shows a total of 2.'
BOATS = '<points coords="1 1 100 200\t2 2 300 400">boats</points>'
RING = '<tracks coords="0.0 1 500 500\t1.0 1 600 500">ring</tracks>'
SCRIPT = {"cups": CUPS, "boats": BOATS, "ring": RING, "sure": "Yes.", "cats": "There are none."}
CLIP = REPOSITORY / "examples" / "data" / "world_clip.mp4"


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3").eval()


@pytest.fixture
def backend(model):
    return Backend(LocalEngine(DictatedModel(model, processor(), SCRIPT), processor()), num_frames=6)


@pytest.fixture
def paths(tmp_path):
    """Two images."""
    paths = [tmp_path / "left.png", tmp_path / "right.png"]
    for seed, path in enumerate(paths):
        make_image(100, 200, seed).save(path)
    return paths


@pytest.fixture
def encodings(model, monkeypatch):
    """How often the vision transformer ran."""
    calls = []
    original = type(model.vision_backbone).encode_crops
    monkeypatch.setattr(
        type(model.vision_backbone), "encode_crops", lambda self, *args: (calls.append(1), original(self, *args))[1]
    )
    return calls


def color(label, object_id):
    return DrawingStyle().color(label, object_id)


def test_points_are_drawn_while_the_answer_is_written(backend, paths):
    updates = list(backend.open(paths[:1]).answer("Point to the cups."))
    drawn = [update for update in updates if update.images is not None]
    assert [update.raw.count("500") for update in drawn] == [
        1,
        2,
        2,
    ]  # after each point, and with the label at the end
    assert updates.index(drawn[1]) < len(updates) - 5
    first, second, last = (np.asarray(update.images[0]) for update in drawn)
    original = np.asarray(make_image(100, 200))
    assert first.shape == original.shape
    assert tuple(first[50, 50]) == color("", 1)  # the label comes behind the points
    assert (first[50, 150] == original[50, 150]).all()
    assert tuple(second[50, 150]) == color("", 2)
    assert (tuple(last[50, 50]), tuple(last[50, 150])) == (color("cups", 1), color("cups", 2))
    assert updates[-1].text == "Counting the cups (2 points) shows a total of 2."
    assert updates[-1].raw == CUPS
    assert "tokens in" in updates[-1].note


def test_several_images_each_with_its_own_points(backend, paths):
    *_, last = backend.open(paths).answer("Point to the boats.")
    left, right = (np.asarray(drawn) for drawn in last.images)
    assert tuple(left[20, 20]) == color("boats", 1)
    assert tuple(right[40, 60]) == color("boats", 2)
    assert set(last.files) == {"json", "csv", "coco"}  # MOT is about clips


def test_the_files_hold_the_points(backend, paths):
    conversation = backend.open(paths)  # the files are there as long as it is
    *_, last = conversation.answer("Point to the boats.")
    expected = [(0, 20, 20), (1, 60, 40)]
    for name, read in (("json", from_json), ("csv", from_csv), ("coco", from_coco)):
        grounding = read(last.files[name].read_text(encoding="utf-8"))
        assert [(point.image_index, point.x, point.y) for point in grounding.points] == expected


def test_follow_ups_do_not_read_the_images_again(backend, paths, encodings):
    conversation = backend.open(paths)
    answers = [list(conversation.answer(text))[-1] for text in ("Point to the boats.", "Are you sure?", "The cups?")]
    assert len(encodings) == 1
    assert [answer.raw for answer in answers] == [BOATS, "Yes.", CUPS]
    assert answers[1].files is None  # it is not about places: what was drawn and written before still holds
    assert answers[1].images is None
    assert answers[0].files["json"] != answers[2].files["json"]
    assert json.loads(answers[0].files["json"].read_text(encoding="utf-8"))["text"] == BOATS


def test_where_nothing_is_there_the_images_are_clean_again(backend, paths):
    conversation = backend.open(paths[:1])
    list(conversation.answer("Point to the cups."))
    *_, last = conversation.answer("Point to the cats.")
    assert (np.asarray(last.images[0]) == np.asarray(conversation.images[0])).all()
    assert (last.files, last.video) == ({}, None)


def test_a_clip_comes_back_with_its_tracks(backend):
    conversation = backend.open([CLIP])
    assert len(conversation.frames) == 6
    *_, last = conversation.answer("Track the ring.")
    assert last.text == "ring (1 track)"
    assert set(last.files) == {"json", "csv", "coco", "mot"}
    assert [line.split(",")[:2] for line in last.files["mot"].read_text().splitlines()] == [["1", "1"], ["11", "1"]]
    (sheet,) = last.images
    assert tuple(np.asarray(sheet)[90, 90]) == color("ring", 1)  # in the middle of the first frame
    frames, _ = processor().video_processor.fetch_videos(str(last.video), num_frames=6)
    assert np.abs(frames[0][56, 56].astype(int) - color("ring", 1)).max() < 40  # H.264 is not exact
    *_, last = conversation.answer("Track the cats.")
    assert (last.files, last.video) == ({}, CLIP)


def generating():
    """Threads in which a model generates."""
    return [thread for thread in threading.enumerate() if thread.name == "molmo2-answer"]


def test_closing_stops_the_model(model, paths, monkeypatch):
    tokens = []
    endless = DictatedModel(model, processor(), lambda prompt: "word " * 300, lambda text: tokens.append(text))
    conversation = Backend(LocalEngine(endless, processor())).open(paths[:1])
    answer = conversation.answer("Describe it.")
    assert next(answer) == Update("", "")  # the question is taken
    assert next(answer).raw
    idle, threads = conversation._idle.set, []
    monkeypatch.setattr(conversation._idle, "set", lambda: (threads.extend(generating()), idle()))
    assert generating()
    answer.close()
    assert not generating()
    assert threads == []  # the model has ended by the time that the next answer may begin
    assert len(tokens) < 300


def test_without_a_model_it_starts_with_the_miniature(tmp_path):
    with module_cache(tmp_path / "modules"):
        backend = load_backend(None, tmp_path, max_new_tokens=4)
        assert backend.notice == MINIATURE
        *_, last = backend.open(SAMPLES[0].paths).answer(SAMPLES[0].question)
    assert last.note.startswith("4 tokens in")


def test_the_samples_can_be_opened(backend):
    for sample in SAMPLES:
        opened = backend.open(sample.paths)
        assert opened.images or opened.video


def test_a_folder_without_a_model_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["app", "--model", str(tmp_path)])
    with pytest.raises(SystemExit):
        arguments()
    assert "has no config.json. Pass a checkpoint folder for transformers" in capsys.readouterr().err


def test_stopping_keeps_what_there_is(model, paths):
    def stop_at_three(text):
        if text.count("word") == 3:
            conversation.stop()

    endless = DictatedModel(model, processor(), lambda prompt: "word " * 300, stop_at_three)
    conversation = Backend(LocalEngine(endless, processor())).open(paths[:1])
    *_, last = conversation.answer("Tell a story.")
    assert last.note.endswith("; stopped")
    assert 3 <= last.raw.count("word") < 6


def test_an_answer_ends_when_its_time_is_over(model, paths):
    endless = DictatedModel(model, processor(), lambda prompt: "word " * 300)
    *_, last = Backend(LocalEngine(endless, processor()), max_seconds=0).open(paths[:1]).answer("Tell a story.")
    assert last.note.endswith("; stopped")
    assert last.raw.count("word") < 3


def test_nothing_of_an_answer_follows_the_end_of_its_conversation(model, paths, monkeypatch):
    """Neither where it ends while the last points are drawn, which nothing interrupts, nor before an answer begins."""
    dictated = DictatedModel(model, processor(), lambda prompt: '<points coords="1 1 250 500">cup</points>')
    conversation = Backend(LocalEngine(dictated, processor())).open(paths[:1])
    drawing, drawn, answered = Event(), Event(), []

    def export(grounding):
        drawing.set()
        assert drawn.wait(60)
        return None, {}

    monkeypatch.setattr(conversation, "_export", export)
    answering = Thread(target=lambda: answered.extend(conversation.answer("Point to the cup.")))
    answering.start()
    assert drawing.wait(60)
    conversation.close(seconds=0.1)  # it does not wait for ever
    assert conversation.is_answering
    drawn.set()
    answering.join(60)
    assert answered
    assert not any(update.note for update in answered)  # the last one has a note
    assert not conversation.is_answering
    assert list(conversation.answer("Point to the cup.")) == []


def test_logins_come_from_a_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "logins"
    monkeypatch.setattr("sys.argv", ["app", "--login", str(file)])
    for content in ("", "ann\n", ":secret\n", "ann:secret\nbob:\n", None):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(SystemExit):
            arguments()
        message = capsys.readouterr().err
        assert "--login: " in message
        assert "secret" not in message
    file.write_text("ann:se:cret\n\nbob:other\n")
    assert arguments().logins == [("ann", "se:cret"), ("bob", "other")]


# --- tasks and frames ------------------------------------------------------------------------------------------------


def test_a_task_words_the_question(backend, paths):
    conversation = backend.open(paths[:1])
    *_, last = conversation.answer("cups", "Count")
    assert last.text == "Counting the cups (2 points) shows a total of 2."
    asked = backend.engine.model.prompts[-1]
    assert "How many cups are there?" in asked
    with pytest.raises(UserError, match=r"“Sing” is not a task\. Choose one of Ask, Point, Count, Track"):
        next(conversation.answer("cups", "Sing"))
    with pytest.raises(UserError, match="“red circles”"):
        next(conversation.answer(" ", "Point"))


def test_visitors_choose_the_frames(backend):
    assert len(backend.open([CLIP]).frames) == 6
    assert len(backend.open([CLIP], 4).frames) == 4
    assert len(backend.open([CLIP], 24, 1.0).frames) < len(backend.open([CLIP], 24).frames)
    for frames in (0, 385, 2.5):
        with pytest.raises(
            UserError, match=f"{frames} is not valid: the number of frames must be a whole number from"
        ):
            backend.open([CLIP], frames)
    for fps in (0.0, float("nan")):
        with pytest.raises(UserError, match="is not valid: the frames per second must be a number above 0"):
            backend.open([CLIP], 6, fps)


def test_frames_are_scaled_down_one_by_one(backend, tmp_path):
    path = tmp_path / "large.mp4"
    path.write_bytes(clip(num_frames=24, size=(360, 640)))
    tracemalloc.start()
    try:
        frames = backend.open([path], 24, 24.0).frames
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(frames) == 24
    assert {frame.size for frame in frames} == {(180, 101)}
    assert peak < 8 * 3 * 360 * 640  # bytes: of 8 frames at full size


def test_counts_of_nothing_are_left_out():
    def note(*counts):
        return _note(Answer("", parse_grounding(""), None, False, Timings(0, 0, 2.0, *counts)), True)

    assert note(30, 20, 7) == "7 tokens in 2.0 s; prompt: 10 new tokens, 20 cached; stopped"
    assert note(30, 0, 7) == "7 tokens in 2.0 s; prompt: 30 new tokens; stopped"
    assert note(0, 0, 0) == "2.0 s; stopped"


# --- a server in place of a model ------------------------------------------------------------------------------------


def server_answer(body):
    question = body["messages"][-1]["content"]
    question = question if isinstance(question, str) else question[-1]["text"]
    return next(answer for name, answer in SCRIPT.items() if name in question)


def test_a_server_answers(paths, tmp_path):
    with serve(answer=server_answer, kind="vllm") as server:
        backend = server_backend(server.url, None, num_frames=6, max_new_tokens=40)
        conversation = backend.open(paths[:1])
        updates = list(conversation.answer("cups", "Point"))
        assert len(updates) > 3
        assert updates[-1].text == "Counting the cups (2 points) shows a total of 2."
        assert tuple(np.asarray(updates[-1].images[0])[50, 50]) == color("cups", 1)
        assert updates[-1].note.startswith("7 tokens in")
        *_, last = conversation.answer("Are you sure?")
        assert last.text == "Yes."
        first, second = server.requests
        assert first["max_tokens"] == 40
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
        *_, last = backend.open([CLIP]).answer("ring", "Track")
        assert server.requests[-1]["mm_processor_kwargs"] == {"num_frames": 6}
        assert last.text == "ring (1 track)"
        assert last.video != CLIP


def test_a_server_is_stopped(paths):
    with serve(answer="word " * 300) as server:
        conversation = server_backend(server.url, None).open(paths[:1])
        updates = conversation.answer("Tell a story.")
        next(updates)
        assert next(updates).raw
        with pytest.raises(UserError, match="Another answer has not ended"):
            next(conversation.answer("And then?"))
        conversation.stop()
        *_, last = updates
        assert last.note.endswith("; stopped")
        assert 1 <= last.raw.count("word") < 10
        list(conversation.answer("And then?"))
        assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": last.raw}


@pytest.mark.parametrize("kind", ["openai", "vllm"])
def test_points_are_drawn_on_the_frames_that_they_are_about(kind):
    """`media`, with which answers are read, and the frames of the sheet are of the same sampling."""
    with serve(answer=server_answer, kind=kind) as server:
        backend = replace(server_backend(server.url, None), num_frames=4)
        conversation = backend.open([CLIP])
        *_, last = conversation.answer("ring", "Track")
        expected = 6 if kind == "openai" else 4  # two a second: the model's own sampling
        assert len(conversation.frames) == len(conversation._opened_session().media.sampled_frames) == expected
        assert last.text == "ring (1 track)"
        if kind == "openai":
            for chosen in ((4, None), (None, 1.0)):
                with pytest.raises(UserError, match="cannot be chosen here: the server decides"):
                    backend.open([CLIP], *chosen)
            with pytest.raises(ValueError, match="Leave out the number of frames"):
                server_backend(server.url, None, num_frames=6)
        else:
            conversation = backend.open([CLIP], 2)
            assert len(conversation.frames) == len(conversation._opened_session().media.sampled_frames) == 2


def test_a_server_has_longer_than_an_answer():
    """What was written until `max_seconds` is the answer; the connection's own deadline would lose it."""
    with serve() as server:
        assert server_backend(server.url, None, max_seconds=5.0).engine.client.timeout == 35.0


def test_what_a_server_refuses_is_said(paths, caplog, monkeypatch):
    monkeypatch.setattr(client_http, "FIRST_PAUSE_SECONDS", 0.01)
    refusal = '{"error": {"message": "too many tokens"}}'
    with serve(failures=[(400, {}, refusal), (413, {}, refusal), (404, {}, refusal), (401, {}, refusal)]) as server:
        backend = server_backend(server.url, None)
        said = []
        for _ in range(4):
            with pytest.raises(UserError) as caught:
                list(backend.open(paths[:1]).answer("Tell a story."))
            said.append(str(caught.value))
        assert said == [
            "The server refuses this: too many tokens",
            "The server refuses this: too many tokens Send fewer or smaller images and videos.",
            NO_ANSWER,
            NO_ANSWER,
        ]
        assert f"{server.url} answers 404: too many tokens Does the address end in /v1" in caplog.text
    with serve(models=("one", "two")) as server, pytest.raises(ValueError, match="The server has 2 models"):
        server_backend(server.url, None)
    with closed_port() as port, pytest.raises(ConnectionError):
        server_backend(f"http://127.0.0.1:{port}/v1", None, max_seconds=1)


def test_only_a_server_has_a_model_name(monkeypatch, capsys):
    for given in (["--server-model", "mini"], ["--server", "http://127.0.0.1:8000/v1", "--model", "folder"]):
        monkeypatch.setattr("sys.argv", ["app", *given])
        with pytest.raises(SystemExit):
            arguments()
        assert "--server" in capsys.readouterr().err


def test_files_that_are_too_large_to_send_are_refused_at_once(paths, monkeypatch):
    with serve() as server:
        backend = server_backend(server.url, None)
        size = len(image_url(make_image(100, 200, 0))) * 3 // 4
        monkeypatch.setattr("app.engines.MAX_SENT_BYTES", size * 3 // 2)
        assert backend.open(paths[:1]).images
        refused = "These files are too large: at most 0 MiB are sent to the server"
        with pytest.raises(UserError, match=refused):
            backend.open(paths)
        monkeypatch.setattr("app.engines.MAX_SENT_BYTES", CLIP.stat().st_size)
        assert backend.open([CLIP]).video == CLIP
        monkeypatch.setattr("app.engines.MAX_SENT_BYTES", CLIP.stat().st_size - 1)
        with pytest.raises(UserError, match=refused):
            backend.open([CLIP])


def test_numbers_and_names_of_the_command_line(monkeypatch, capsys):
    refused = {
        ("--num-frames", "500"): "500 is not a whole number from 1 to 384",
        ("--num-frames", "0"): "0 is not a whole number from 1 to 384",
        ("--allow-host", "http://app.example"): "'http://app.example' is not a host name",
        ("--allow-host", ":8080"): "':8080' is not a host name",
    }
    for given, message in refused.items():
        monkeypatch.setattr("sys.argv", ["app", *given])
        with pytest.raises(SystemExit):
            arguments()
        assert message in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["app", "--num-frames", "384", "--allow-host", "app.example:8080"])
    assert arguments().num_frames == 384


# --- what users are told ---------------------------------------------------------------------------------------------


def test_nothing_to_look_at(backend):
    for nothing in (None, []):
        with pytest.raises(UserError, match="Add an image or a video first"):
            backend.open(nothing)


def test_too_much(backend, paths):
    for given in ([CLIP, CLIP], [CLIP, paths[0]]):
        with pytest.raises(UserError, match="one video, or any number of images"):
            backend.open(given)


@pytest.mark.parametrize(
    ("name", "kind"), [("broken.png", "an image"), ("broken.mp4", "a video"), ("notes.txt", "an image")]
)
def test_broken_files(backend, tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"no " + kind.encode())
    with pytest.raises(UserError, match=f"“{name}” cannot be read as {kind}"):
        backend.open([tmp_path / name])


def test_no_question(backend, paths):
    with pytest.raises(UserError, match="Write a question first"):
        list(backend.open(paths).answer("  "))


def test_more_than_the_model_can_read(backend, paths):
    with pytest.raises(UserError, match="Lower `num_frames`"):
        list(backend.open(paths * 20).answer("The cups?"))


# --- text ------------------------------------------------------------------------------------------------------------

READABLE = {
    CUPS: "Counting the cups (2 points) shows a total of 2.",
    RING: "ring (1 track)",
    "There are none.": "There are none.",
    'See <points coords="1 1 250 5': "See (0 points)",
    '<points coords="1 1 250 500">a</points>, <points coords="1 2 100 100">b</points>': "a (1 point), b (1 point)",
    "2 < 3 & <b>bold</b>": "2 < 3 & <b>bold</b>",
}


@pytest.mark.parametrize(("answer", "expected"), READABLE.items())
def test_answers_as_people_read_them(answer, expected):
    assert readable(parse_grounding(answer)) == expected


def test_clips_are_told_from_images():
    assert is_video(CLIP)
    assert is_video(REPOSITORY / "phone.M4V")
    assert not is_video(REPOSITORY / "animation.gif")
    assert not is_video(REPOSITORY / "no_suffix")


def test_uploads_and_questions_have_limits(model, paths):
    narrow = Backend(
        LocalEngine(model, processor()), num_frames=6, limits=MediaLimits(image_pixels=100, video_frames=3)
    )
    with pytest.raises(UserError, match=r"“left.png” is too large for this app"):
        narrow.open(paths)
    with pytest.raises(UserError, match=r"“world_clip.mp4” is too large for this app"):
        narrow.open([CLIP])
    with pytest.raises(UserError, match=r"The question has 4,001 characters\. Use at most 4,000"):
        next(Backend(LocalEngine(model, processor())).open(paths).answer("a" * 4001))
    assert processor().image_processor.limits == MediaLimits()


def test_images_have_a_limit_together(backend, paths, monkeypatch):
    monkeypatch.setattr("app.backend.MAX_PIXELS", 2 * 100 * 200)
    assert len(backend.open(paths).images) == 2
    monkeypatch.setattr("app.backend.MAX_PIXELS", 2 * 100 * 200 - 1)
    monkeypatch.setattr("app.backend.fetch_images", None)  # refused by their headers, before any is decoded
    with pytest.raises(UserError, match=r"too large together: 40,000 pixels, and at most 39,999 fit"):
        backend.open(paths)


def test_a_clip_that_takes_too_long_is_refused(backend, tmp_path):
    slow = replace(backend, limits=replace(backend.limits, decode_seconds=0))
    with pytest.raises(UserError, match="takes too long to decode"):
        slow.open([CLIP])


def test_a_clip_that_cannot_be_drawn_in_time(backend, monkeypatch):
    conversation = backend.open([CLIP])
    deadlines = []

    def late(function, *arguments, seconds):
        deadlines.append((function.__name__, seconds))
        raise MediaLimitError("too late")

    monkeypatch.setattr("app.backend.call_isolated", late)
    *_, last = conversation.answer("Track the ring.")
    assert deadlines == [("annotate_video", backend.max_seconds)]
    assert last.video == CLIP  # as it was uploaded; the files are there
    assert set(last.files) == {"json", "csv", "coco", "mot"}
    assert last.note.endswith("; drawing into the video failed or took too long")
