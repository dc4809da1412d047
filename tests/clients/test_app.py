"""The app in a real browser: images and a clip are uploaded, asked about, seen with their points, and exported."""

import http.client
import json
import os
import queue
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("playwright")

import gradio as gr

from app import backend as backend_module
from app.backend import Backend, Conversation, UserError
from app.engines import LocalEngine
from app.page import Page
from molmo2.tools.draw import DrawingStyle
from support.app_browser import expect, look_at, visit
from support.browser import browser, require_browser
from support.checkpoints import REPOSITORY, build_model, make_image
from support.model_inputs import processor
from support.ports import free_port
from support.scripted_model import DictatedModel

pytestmark = pytest.mark.slow

DATA = REPOSITORY / "examples" / "data"
CUPS = 'Counting the <points coords="1 1 250 500 2 750 500">cups</points> shows a total of 2.'
BOATS = '<points coords="1 1 100 200\t2 2 300 400">boats</points>'
RING = '<tracks coords="0.0 1 500 500\t1.0 1 600 500">ring</tracks>'
SCRIPT = {
    "cups": CUPS,
    "boats": BOATS,
    "red ring": RING,
    "sure": "<b>Yes</b>, 1 < 2.",
    "cats": "There are none.",
    "red circles": CUPS,
    "story": "word " * 300,
}
IMAGE, VIDEO = "#images img", "#video video"
ENCODED_TOLERANCE = 40  # grey levels, of H.264
AT_ITS_START = """() => {
    const video = document.querySelector("#video video");
    if (video.readyState < 2 || video.seeking) return false;
    if (video.paused && video.currentTime === 0) return true;
    video.autoplay = false;  // else it may begin after it was halted
    video.pause();
    video.currentTime = 0;
    return false;
}"""


class Gate:
    """Holds the model at a place of its answer until it is opened; `texts` are the answers so far, token by token."""

    def __init__(self):
        self.place, self.opened, self.texts = None, threading.Event(), []

    def __call__(self, text):
        self.texts.append(text)
        if self.place is not None and self.place in text:
            assert self.opened.wait(60), "the model was never released"


@pytest.fixture(scope="module")
def running():
    with browser(require_browser()) as running:
        yield running


@pytest.fixture(scope="module")
def gate():
    return Gate()


@pytest.fixture(scope="module")
def page(gate):
    model = DictatedModel(build_model("qwen3").eval(), processor(), SCRIPT, gate)
    return Page(Backend(LocalEngine(model, processor()), num_frames=6, notice="The answers are *dictated*."))


def test_an_answer_ends_before_its_files_go(page, monkeypatch):
    ended = []
    monkeypatch.setattr(page.uploads, "keep", lambda *_: ended.append("files"))
    previous = SimpleNamespace(close=lambda: ended.append("answer"), is_answering=True)
    cleared, opened, last = page.open(None, previous=previous, request=SimpleNamespace(session_hash="one"))
    assert (cleared[page.chat], cleared[page.name]) == ([], "")
    assert (cleared[page.status].visible, opened[page.status].visible) == (True, False)
    assert last == gr.skip()  # what gradio sends again at the end changes nothing
    assert ended == ["answer", "files"]


def test_a_late_question_is_not_asked_in_the_next_conversation(page):
    """Where many ask, a question may wait until its conversation has ended."""
    first, second = (page.backend.open([DATA / "world_clip.mp4"]) for _ in range(2))
    (late,) = page.ask("Point to the cups.", second, name=first.name)
    assert "Ask once they are shown" in late[page.status].value
    (early,) = page.ask("Point to the cups.", None, name=first.name)
    assert "Add an image or a video first" in early[page.status].value
    assert not second.is_answering
    # With its name, and from a page that has not got the name yet.
    for name in (second.name, ""):
        assert len(list(page.ask("Point to the cups.", second, name=name))) > 2
    second.close()  # and while the next one is being opened
    (late,) = page.ask("Point to the cups.", second, name=second.name)
    assert "Ask once they are shown" in late[page.status].value


def test_a_question_to_a_conversation_that_closes_at_this_moment_is_refused(page, paths):
    conversation = page.backend.open(paths[:1])
    asking = page.ask("Point to the cups.", conversation, name=conversation.name)
    answer = conversation.answer

    def answer_of_a_closed_one(*arguments):
        conversation.close()
        return answer(*arguments)

    conversation.answer = answer_of_a_closed_one
    refused, last = asking
    assert "Ask once they are shown" in refused[page.status].value
    assert page.question not in refused
    assert last == gr.skip()
    assert not conversation.is_answering


def test_a_question_leaves_the_field_when_it_is_taken_and_comes_back_when_it_fails(page, paths, monkeypatch):
    conversation = page.backend.open(paths[:1])
    refused, last = page.ask("  ", conversation, name=conversation.name)
    assert "Write a question first" in refused[page.status].value
    assert page.question not in refused
    taken, *updates = page.ask("Point to the cups.", conversation, name=conversation.name)
    assert taken[page.question] == ""
    assert [turn["role"] for turn in taken[page.chat]] == ["user"]
    assert not any(page.question in update for update in updates)  # what is typed meanwhile stays
    assert last == updates[-1] == gr.skip()  # gradio sends it again at the end

    def fail():
        raise UserError("no answer")

    monkeypatch.setattr(conversation, "_opened_session", fail)
    taken, failed, _ = page.ask("Point to the cups.", conversation, name=conversation.name)
    assert "no answer" in failed[page.status].value
    assert failed[page.question] == "Point to the cups."
    again, *_ = page.ask("Point to the cups.", conversation, name=conversation.name)
    assert again[page.chat] == taken[page.chat]  # what failed is no turn
    assert [turn["role"] for turn in taken[page.chat]] == ["user", "assistant", "user"]


def test_nothing_follows_the_end_of_a_conversation(page, paths):
    conversation = page.backend.open(paths[:1])
    answer = page.ask("Tell a story.", conversation, name=conversation.name)
    next(answer)
    next(answer)
    ended = []
    closing = threading.Thread(target=lambda: ended.append(conversation.close()))
    closing.start()
    deadline = time.monotonic() + 30
    while not conversation.is_closed:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert conversation.is_answering
    assert not ended  # it waits for the answer
    assert list(answer) == [gr.skip()]
    closing.join(30)
    assert ended == [None]
    assert not conversation.is_answering


@pytest.fixture
def visitor(running, page, gate):
    gate.place = None
    gate.opened.clear()
    gate.texts.clear()
    with visit(running, page) as visitor:
        yield visitor
        gate.opened.set()


@pytest.fixture
def paths(tmp_path):
    paths = [tmp_path / "left.png", tmp_path / "right.png"]
    for seed, path in enumerate(paths):
        make_image(100, 200, seed).save(path)
    return paths


def begin_a_story(visitor, gate, paths):
    """An answer about the first image that the gate holds after its first words."""
    visitor.upload(paths[:1])
    expect(visitor.page.locator(IMAGE)).to_be_visible()
    gate.place = "word word word"
    visitor.ask("Tell a story.")
    expect(visitor.answers).to_contain_text("word word")


@pytest.fixture
def told_to_stop(monkeypatch):
    """Gets the conversation that has been told to end its answer."""
    told, stop = queue.Queue(), Conversation.stop

    def stop_and_tell(conversation):
        stop(conversation)
        told.put(conversation)

    monkeypatch.setattr(Conversation, "stop", stop_and_tell)
    return told


def color(label, object_id):
    return DrawingStyle().color(label, object_id)


def test_an_image_its_points_as_they_come_and_the_files(visitor, gate, paths, tmp_path):
    gate.place = "250 500 2"  # the first point is complete
    original = np.asarray(make_image(100, 200))
    visitor.upload(paths[:1])
    expect(visitor.page.locator(IMAGE)).to_be_visible()
    assert (visitor.shown(IMAGE) == original).all()
    before = visitor.page.locator(IMAGE).get_attribute("src")
    visitor.ask("Point to the cups.")

    expect(visitor.page.locator(IMAGE)).not_to_have_attribute("src", before)
    early = visitor.shows(IMAGE, lambda pixels: (pixels != original).any())
    assert tuple(early[50, 50]) == color("", 1)
    assert (early[50, 150] == original[50, 150]).all()
    expect(visitor.answers).to_contain_text("Counting the")
    expect(visitor.page.locator("#export_json")).to_be_disabled()

    gate.opened.set()
    expect(visitor.answers).to_have_text("Counting the cups (2 points) shows a total of 2.")
    expect(visitor.page.locator("#note")).to_contain_text("tokens in")
    expected = (color("cups", 1), color("cups", 2))
    visitor.shows(IMAGE, lambda late: (tuple(late[50, 50]), tuple(late[50, 150])) == expected)
    exported = visitor.export("coco", tmp_path)
    content = json.loads(exported.read_text(encoding="utf-8"))
    assert exported.name == "points_coco.json"
    assert [annotation["keypoints"][:2] for annotation in content["annotations"]] == [[50, 50], [150, 50]]
    expect(visitor.page.locator("#export_mot")).to_be_disabled()


def test_two_images_and_a_follow_up(visitor, paths, tmp_path):
    visitor.upload(paths)
    expect(visitor.page.locator(IMAGE)).to_have_count(2)
    visitor.ask("Point to the boats.")
    expect(visitor.answers).to_have_text("boats (2 points)")
    expect(visitor.page.locator("#export_csv")).to_be_enabled()
    visitor.shows(f"{IMAGE} >> nth=0", lambda left: tuple(left[20, 20]) == color("boats", 1))
    visitor.shows(f"{IMAGE} >> nth=1", lambda right: tuple(right[40, 60]) == color("boats", 2))
    lines = visitor.export("csv", tmp_path).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    visitor.ask("Are you sure?")
    expect(visitor.answers.nth(1)).to_have_text("<b>Yes</b>, 1 < 2.")  # what the model writes is text, not HTML
    expect(visitor.page.locator("#note")).to_contain_text("cached")
    expect(visitor.page.locator("#export_csv")).to_be_enabled()  # of the points that are still drawn
    visitor.ask("Any cats?")
    expect(visitor.page.locator("#export_csv")).to_be_disabled()
    visitor.shows(f"{IMAGE} >> nth=0", lambda left: (left == np.asarray(make_image(100, 200))).all())


def test_a_clip_plays_with_its_track(visitor, tmp_path):
    visitor.upload([DATA / "world_clip.mp4"])
    expect(visitor.page.locator(VIDEO)).to_be_visible()
    before = visitor.page.locator(VIDEO).get_attribute("src")
    visitor.ask("Track the red ring.")
    expect(visitor.answers).to_have_text("ring (1 track)")
    expect(visitor.page.locator(VIDEO)).not_to_have_attribute("src", before)
    visitor.page.wait_for_function(AT_ITS_START)
    middle = visitor.shown(VIDEO)[56, 56].astype(int)
    assert np.abs(middle - color("ring", 1)).max() < ENCODED_TOLERANCE
    assert abs(visitor.page.locator(VIDEO).evaluate("video => video.duration") - 2.4) < 0.2
    visitor.shows(IMAGE, lambda sheet: tuple(sheet[90, 90]) == color("ring", 1))  # the sampled frames
    lines = visitor.export("mot", tmp_path).read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [["1", "1"], ["11", "1"]]


def test_a_task_and_fewer_frames(visitor):
    visitor.upload([DATA / "world_clip.mp4"])
    expect(visitor.page.locator(VIDEO)).to_be_visible()
    visitor.page.get_by_text("Frames of a video").click()
    frames = visitor.page.locator("#num_frames input")
    frames.fill("0")
    frames.press("Enter")
    expect(visitor.page.locator("#status")).to_contain_text(
        "0 is not valid: the number of frames must be a whole number from 1 to 384"
    )
    frames.fill("2")
    frames.press("Enter")
    expect(visitor.page.locator("#status")).to_be_hidden()
    visitor.page.get_by_label("Track").check()
    visitor.ask("red ring")
    expect(visitor.page.locator("#chat .user")).to_contain_text("Track: red ring")
    expect(visitor.answers).to_have_text("ring (1 track)")
    expect(visitor.page.locator(IMAGE)).to_be_visible()
    visitor.shows(IMAGE, lambda sheet: sheet.shape[1] < 3 * 180)  # of two frames


def test_a_name_of_a_stranger_is_refused(visitor):
    address = visitor.page.url
    port = address.rstrip("/").rpartition(":")[2]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=90)
    statuses = {}
    for name in (f"127.0.0.1:{port}", f"localhost:{port}", f"rebound.example:{port}"):
        connection.request("GET", "/config", headers={"Host": name})
        response = connection.getresponse()
        statuses[name.partition(":")[0]] = response.status
        response.read()
    connection.close()
    assert statuses == {"127.0.0.1": 200, "localhost": 200, "rebound.example": 421}


def test_what_goes_wrong_is_said(visitor, paths, tmp_path):
    status = visitor.page.locator("#status")
    visitor.ask("Point to the cups.")
    expect(status).to_contain_text("Add an image or a video first.")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    visitor.upload([broken])
    expect(status).to_contain_text("“broken.png” cannot be read as an image.")
    visitor.upload(paths[:1])
    expect(visitor.page.locator(IMAGE)).to_be_visible()  # nothing follows that would hide the next message
    expect(status).to_be_hidden()
    visitor.ask("   ")
    expect(status).to_contain_text("Write a question first")
    visitor.ask("Point to the cups.")
    expect(visitor.answers).to_contain_text("total of 2")
    expect(status).to_be_hidden()


def test_an_example_and_a_new_conversation(visitor):
    expect(visitor.page.locator("#notice")).to_contain_text("dictated")
    visitor.page.get_by_role("button", name="Point in an image").click()
    expect(visitor.page.locator(IMAGE)).to_be_visible()
    expect(visitor.page.locator("#question textarea")).to_have_value("Point to the red circles.")
    visitor.page.locator("#question button").click()
    expect(visitor.answers).to_contain_text("total of 2")
    visitor.page.locator("#again").click()
    expect(visitor.answers).to_have_count(0)
    expect(visitor.page.locator("#export_json")).to_be_disabled()
    expect(visitor.page.locator(IMAGE)).to_be_visible()


def test_stop(visitor, gate, paths, told_to_stop):
    begin_a_story(visitor, gate, paths)
    visitor.page.locator("#stop").click()
    told_to_stop.get(timeout=60)
    gate.opened.set()
    expect(visitor.page.locator("#note")).to_contain_text("; stopped")
    assert 2 < visitor.answers.inner_text().count("word") < 10
    visitor.ask("Point to the cups.")
    expect(visitor.answers.last).to_contain_text("total of 2")


def test_what_is_asked_during_an_answer_stays_in_the_field(visitor, gate, paths, told_to_stop, monkeypatch):
    monkeypatch.setattr(backend_module, "WAITING_SECONDS", 0.01)
    begin_a_story(visitor, gate, paths)
    expect(visitor.page.locator("#question textarea")).to_have_value("")
    visitor.ask("Point to the cups.")
    expect(visitor.page.locator("#status")).to_contain_text("Another answer has not ended")
    expect(visitor.page.locator("#question textarea")).to_have_value("Point to the cups.")
    visitor.page.locator("#stop").click()
    told_to_stop.get(timeout=60)
    expect(visitor.answers).to_have_count(1)
    monkeypatch.setattr(backend_module, "WAITING_SECONDS", 60)  # this one waits until the answer has ended
    visitor.page.locator("#question button").click()
    gate.opened.set()
    expect(visitor.answers).to_have_count(2)
    expect(visitor.answers.first).to_contain_text("word word")
    expect(visitor.answers.last).to_have_text("Counting the cups (2 points) shows a total of 2.")
    expect(visitor.page.locator("#chat .user.message")).to_have_count(2)
    expect(visitor.page.locator("#status")).to_be_hidden()


@pytest.mark.parametrize("asks_at_once", [False, True])
def test_a_new_conversation_ends_the_answer(visitor, gate, paths, told_to_stop, asks_at_once):
    begin_a_story(visitor, gate, paths)
    visitor.page.locator("#again").click()
    expect(visitor.answers).to_have_count(0)
    expect(visitor.page.locator("#status")).to_contain_text("is being ended")
    ended = told_to_stop.get(timeout=60)
    assert ended.is_answering
    expect(visitor.page.locator("#note")).not_to_contain_text("tokens in")
    if asks_at_once:
        visitor.ask("Point to the cups.")
        expect(visitor.page.locator("#status")).to_contain_text("Ask once they are shown")
    gate.opened.set()
    expect(visitor.page.locator("#status")).to_be_hidden()  # the next one is open
    assert not ended.is_answering
    expect(visitor.answers).to_have_count(0)
    expect(visitor.page.locator("#note")).not_to_contain_text("tokens in")
    if asks_at_once:
        expect(visitor.page.locator("#question textarea")).to_have_value("Point to the cups.")
    visitor.ask("Point to the cups.")
    expect(visitor.answers).to_have_text("Counting the cups (2 points) shows a total of 2.")
    assert 2 < max(text.count("word") for text in gate.texts) < 10  # the model did not run on


def test_files_that_come_while_an_answer_ends(visitor, gate, paths, told_to_stop):
    begin_a_story(visitor, gate, paths)
    before = visitor.page.locator(IMAGE).get_attribute("src")
    visitor.upload(paths[1:])
    expect(visitor.answers).to_have_count(0)
    told_to_stop.get(timeout=60)
    gate.opened.set()
    expect(visitor.page.locator(IMAGE)).not_to_have_attribute("src", before)
    visitor.shows(IMAGE, lambda right: (right == np.asarray(Image.open(paths[1]))).all())
    visitor.ask("Point to the cups.")
    expect(visitor.answers).to_have_text("Counting the cups (2 points) shows a total of 2.")


def test_the_command_line_starts_it(running, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "app", "--port", str(port), "--max-new-tokens", "6"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        address = next(line.split()[-1] for line in process.stdout if "http://" in line)
        assert address == f"http://127.0.0.1:{port}"
        with look_at(running, address) as visitor:
            expect(visitor.page.locator("#notice")).to_contain_text("miniature")
            visitor.page.get_by_role("button", name="Track in a video").click()
            expect(visitor.page.locator(VIDEO)).to_be_visible()
            visitor.page.locator("#question button").click()
            expect(visitor.page.locator("#note")).to_contain_text("tokens in")
    finally:
        process.terminate()
        process.wait(30)
