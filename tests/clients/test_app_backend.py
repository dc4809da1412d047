"""What the app does, without its page: conversations, points while they come, files, and what users are told."""

import json
import time

import numpy as np
import pytest

from app.__main__ import arguments
from app.backend import Backend, UserError, is_video, readable
from app.engines import LocalEngine
from app.models import MINIATURE, load_backend, server_backend
from app.samples import SAMPLES
from molmo2 import MediaLimits
from molmo2.grounding.files import from_coco, from_csv, from_json
from molmo2.grounding.parse import parse_grounding
from molmo2.tools.draw import DrawingStyle
from support.checkpoints import REPOSITORY, build_model, module_cache, picture
from support.fake_openai import serve
from support.model_inputs import processor
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
        picture(100, 200, seed).save(path)
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
    original = np.asarray(picture(100, 200))
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


def test_closing_stops_the_model(model, paths):
    tokens = []
    endless = DictatedModel(model, processor(), lambda prompt: "word " * 300, lambda text: tokens.append(text))
    answer = Backend(LocalEngine(endless, processor())).open(paths[:1]).answer("Describe it.")
    next(answer)
    answer.close()
    time.sleep(0.5)
    stopped_at = len(tokens)
    assert stopped_at < 300
    time.sleep(0.5)
    assert len(tokens) == stopped_at


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
    with pytest.raises(UserError, match=r"“Sing” is no task\. Choose one of Ask, Point, Count, Track"):
        next(conversation.answer("cups", "Sing"))
    with pytest.raises(UserError, match="“red circles”"):
        next(conversation.answer(" ", "Point"))


def test_visitors_choose_the_frames(backend):
    assert len(backend.open([CLIP]).frames) == 6
    assert len(backend.open([CLIP], 4).frames) == 4
    assert len(backend.open([CLIP], 24, 1.0).frames) < len(backend.open([CLIP], 24).frames)
    for frames, fps in ((0, None), (385, None), (2.5, None), (6, 0.0), (6, float("nan"))):
        with pytest.raises(UserError, match="is no number of frames"):
            backend.open([CLIP], frames, fps)


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
        conversation.stop()
        *_, last = updates
        assert last.note.endswith("; stopped")
        assert 1 <= last.raw.count("word") < 10
        list(conversation.answer("And then?"))
        assert server.requests[-1]["messages"][1] == {"role": "assistant", "content": last.raw}


def test_what_a_server_refuses_is_said(paths, monkeypatch):
    with serve(failures=[(400, {}, '{"error": {"message": "too many tokens"}}')]) as server:
        with pytest.raises(UserError, match="400"):
            list(server_backend(server.url, None).open(paths[:1]).answer("Tell a story."))
        monkeypatch.setattr("app.engines.MAX_SENT_BYTES", 1000)
        with pytest.raises(UserError, match="at most 0 MiB are sent"):
            list(server_backend(server.url, None).open([CLIP]).answer("Tell a story."))
    with serve(models=("one", "two")) as server, pytest.raises(ValueError, match="The server has 2 models"):
        server_backend(server.url, None)
    with pytest.raises(ConnectionError):
        server_backend("http://127.0.0.1:9/v1", None, max_seconds=1)


def test_only_a_server_has_a_model_name(monkeypatch, capsys):
    for given in (["--server-model", "mini"], ["--server", "http://127.0.0.1:8000/v1", "--model", "folder"]):
        monkeypatch.setattr("sys.argv", ["app", *given])
        with pytest.raises(SystemExit):
            arguments()
        assert "--server" in capsys.readouterr().err


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
