"""`molmo2.client` against a small server: what is sent, how answers come back, and what happens when it fails."""

import base64
import itertools
import json
import threading
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from molmo2 import prompts
from molmo2.batch.engines import ServerEngine
from molmo2.batch.rows import Row
from molmo2.batch.settings import EngineError, EngineSettings
from molmo2.cli import main
from molmo2.client import Client, DeadlineExceeded, ServerError, ServerUnreachable
from molmo2.client import http as client_http
from molmo2.client.media import sampled_metadata
from molmo2.video.processing import Molmo2VideoProcessor
from support.checkpoints import REPOSITORY
from support.fake_openai import serve
from support.ports import closed_port

POINTS = '<points coords="1 1 250 500 2 750 500">boats</points>'
CLIP = REPOSITORY / "examples" / "data" / "world_clip.mp4"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client_http, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(client_http, "MAX_PAUSE_SECONDS", 0.02)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "boats.jpg"
    Image.new("RGB", (100, 80), "navy").save(path)
    return path


def sent_image(body, index=0):
    part = body["messages"][0]["content"][index]
    content = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
    return content, Image.open(BytesIO(content))


def test_points_come_back_in_pixels(photo):
    with serve(answer=f" {POINTS}\n") as server:
        answer = Client(server.url, api_key="secret").ask(prompts.point("boats"), images=str(photo), max_new_tokens=9)
    assert answer.text == POINTS
    assert [(point.x, point.y, point.image_index) for point in answer.grounding] == [(25.0, 40.0, 0), (75.0, 40.0, 0)]
    assert answer.parsed == answer.grounding
    timings = answer.timings
    assert (timings.num_prompt_tokens, timings.num_cached_tokens, timings.num_new_tokens) == (30, 20, 7)
    (body,) = server.requests
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("mini", 9, 0.0)
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "Point to the boats."}
    assert sent_image(body)[0] == photo.read_bytes()  # files that every server reads alike are not touched
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_images_of_other_forms_are_sent_upright_in_rgb(tmp_path):
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(turned, exif=exif)
    damaged = tmp_path / "damaged.png"
    Image.new("RGB", (40, 20), "red").save(damaged, exif=b"Exif\0\0junkjunk")
    pixels = np.arange(30 * 10 * 3, dtype=np.uint8).reshape(30, 10, 3)
    said = pytest.warns(UserWarning, match="it is taken as upright")
    with serve(answer='<points coords="1 1 500 500\t2 2 500 500">a</points>') as server, said:
        answer = Client(server.url).ask("Point.", images=[turned, pixels, damaged])
    assert [(point.x, point.y) for point in answer.grounding] == [(10.0, 20.0), (5.0, 15.0)]
    assert sent_image(server.requests[0], 0)[1].size == (20, 40)
    assert (np.asarray(sent_image(server.requests[0], 1)[1]) == pixels).all()
    assert not sent_image(server.requests[0], 2)[1].getexif()


def test_clips_come_back_in_source_frames():
    track = '<tracks coords="0.0 1 500 500\t1.0 1 600 500">ring</tracks>'
    with serve(answer=track, kind="transformers") as server:
        client = Client(server.url, processor_kwargs={"num_frames": 6})
        answer = client.ask(prompts.track("ring"), videos=str(CLIP))
        assert [(point.time, point.frame.source_index) for point in answer.grounding] == [(0.0, 0), (1.0, 10)]
        part = server.requests[0]["messages"][0]["content"][0]
        assert part["video_url"]["url"].startswith("data:video/mp4;base64,")
        assert server.requests[0]["chat_template_kwargs"] == {"num_frames": 6}
        assert "model" not in server.requests[0]
        with pytest.raises(TypeError, match="takes videos as files"):
            client.ask("What?", videos=[np.zeros((2, 8, 8, 3), np.uint8)])


@pytest.mark.parametrize("options", [{}, {"fps": 1}, {"num_frames": None, "sampling_fps": None}, {"clip": (1, 2)}])
def test_frames_of_an_answer_are_those_that_the_server_samples(options):
    (metadata,) = Molmo2VideoProcessor()(str(CLIP), return_metadata=True, **options)["video_metadata"]
    assert sampled_metadata(str(CLIP), options).timestamps == metadata.timestamps


def test_options_of_the_processor_go_where_the_server_reads_them(photo):
    with serve(kind="vllm") as server:
        Client(server.url).ask("What?", images=photo, processor_kwargs={"max_crops": 2})
        assert server.requests[0]["mm_processor_kwargs"] == {"max_crops": 2}
    with serve() as server, pytest.raises(ValueError, match=r"takes no options of the processor.*max_crops"):
        Client(server.url).ask("What?", images=photo, processor_kwargs={"max_crops": 2})


def test_an_answer_in_pieces(photo):
    with serve(answer=POINTS + " end. ", finish_reason="length") as server:
        pieces = list(Client(server.url).ask_stream("Point.", images=photo))
    assert "".join(piece.text for piece in pieces) == POINTS + " end."
    *earlier, last = pieces
    assert all(piece.answer is None for piece in earlier)
    assert [point.x for piece in pieces for point in piece.points] == [25.0, 75.0]
    assert last.answer.text == POINTS + " end."
    assert last.answer.truncated
    assert last.answer.timings.num_new_tokens == 7


def test_a_stream_that_breaks_off_is_an_error(photo):
    with serve(answer=POINTS, break_after=3) as server, pytest.raises(ServerError, match="before the answer was"):
        list(Client(server.url).ask_stream("Point.", images=photo))


def test_a_conversation(photo):
    with serve(answer=lambda body: str(len(body["messages"]))) as server:
        session = Client(server.url).session(images=photo)
        assert [session.chat(text).text for text in "ab"] == ["1", "3"]
        assert [piece.answer.text for piece in session.chat_stream("c") if piece.answer] == ["5"]
        assert session.ask("d").text == "1"
        assert session.chat("e").text == "7"
    texts = [message["content"] for message in server.requests[-1]["messages"]]
    assert texts[1:] == ["1", "b", "3", "c", "5", "e"]
    assert texts[0][1]["text"] == "a"


def test_an_answer_is_stopped_before_it_has_text(photo):
    with serve(answer="word " * 300, silent=3) as server:
        session = Client(server.url).session(images=photo)
        asked = iter([False, True])
        (last,) = session.chat_stream("Tell a story.", should_stop=lambda: next(asked))
    assert last.answer.text == ""


def test_batches_with_a_limit(photo):
    together, numbers = threading.Barrier(2), itertools.count()

    def answer(body):
        if next(numbers) < 2:  # the first two wait for one another
            together.wait(60)
        return body["messages"][0]["content"][-1]["text"].upper()

    with serve(answer=answer, pause_seconds=0.05) as server:
        client = Client(server.url, max_concurrency=2)
        answers = client.ask(list("abcde"), images=[photo, None, None, None, None])
        assert [str(answer) for answer in answers] == list("ABCDE")
        assert together.broken is False
        assert server.most_active == 2
        with pytest.raises(ValueError, match="5 questions"):
            client.ask(list("abcde"), images=[photo])


def test_schemas_of_structured_prompts():
    said = '{"events": [{"start": "0:01", "end": "0:02", "description": "A lap"}]}'
    with serve(answer=said) as server:
        answer = Client(server.url).ask(prompts.localize_events())
        assert answer.parsed.events[0].end == 2.0
    form = server.requests[0]["response_format"]
    assert form["type"] == "json_schema"
    events = form["json_schema"]["schema"]["properties"]["events"]
    assert list(events["items"]["properties"]) == ["start", "end", "description"]
    with serve(answer=said, kind="transformers") as server, pytest.warns(UserWarning, match="JSON schema"):
        Client(server.url).ask(prompts.localize_events())
    assert "response_format" not in server.requests[0]


def test_a_busy_server_is_asked_again():
    busy = [(503, {}, "later"), (429, {"Retry-After": "0.01"}, "{}")]
    with serve(failures=busy) as server:
        assert Client(server.url).ask("Is it?").text == "Yes."
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ((400, {}, '{"error": {"message": "too many images"}}'), "answers 400: too many images"),
        ((401, {}, '{"detail": "key s3cret is wrong"}'), r"key \*\*\* is wrong Set MOLMO2_API_KEY"),
        ((401, {}, "x" * 496 + "s3cret"), r"x\*\*\*"),
        ((200, {}, "x" * 76 + "s3cret"), r"x\*\*\*"),
        ((200, {}, '"' + "x" * 196 + 's3cret"'), r"x\*\*\*"),
        ((307, {"Location": "http://elsewhere/"}, ""), "Redirects are not followed"),
        ((200, {}, "<html>hello</html>"), "which is no JSON"),
        ((200, {}, '{"choices": []}'), "which is no chat completion"),
    ],
)
def test_what_a_server_refuses_is_said_once_and_without_the_key(failure, message):
    with serve(failures=[failure]) as server, pytest.raises(ServerError, match=message) as caught:
        Client(server.url, api_key="s3cret").ask("Is it?")
    assert len(server.requests) == 1
    assert "s3c" not in str(caught.value)


def test_a_key_in_json_or_an_address_is_not_repeated():
    endpoint = Client("http://127.0.0.1:8000/v1", api_key='a"b').endpoint
    assert endpoint.quoted(json.dumps({"key": 'a"b'})) == '{"key": "***"}'
    with closed_port() as port, pytest.raises(ServerError) as caught:
        Client(f"http://127.0.0.1:{port}/s3cret", api_key="s3cret", retries=0).ask("Is it?")
    assert "s3cret" not in str(caught.value)


def test_a_deadline():
    let_go = threading.Event()
    with serve(answer=lambda body: let_go.wait(60) and "Too late.") as server:
        client = Client(server.url, "mini", kind="openai", timeout=0.2)
        with pytest.raises(DeadlineExceeded, match="no answer in time"):
            client.ask("Is it?")  # while the server has not answered
        let_go.set()
    with serve(failures=[(503, {"Retry-After": "100"}, "")]) as server, pytest.raises(DeadlineExceeded):
        Client(server.url, "mini", kind="openai", timeout=1.0).ask("Is it?")


def test_no_server(photo, capsys):
    with closed_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        with pytest.raises(ServerUnreachable, match=f"Nothing answers at {url[:-3]}"):
            Client(url).ask("Is it?")
        engine = ServerEngine(Client(url, retries=0), EngineSettings())
        with pytest.raises(EngineError, match="Nothing answers"):
            list(engine.run(iter([Row(0, "Is it?")])))
        assert main(["ask", "Is it?", str(photo), "--server", url]) == 3


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://me:s3cret@host/v1", "http://host/v1?key=s3cret"]
)
def test_no_address(url):
    with pytest.raises(ValueError, match=r"server|address") as caught:
        Client(url)
    assert "me:s3cret" not in str(caught.value)


def test_several_models():
    with serve(models=("a", "b")) as server:
        with pytest.raises(ValueError, match=r"2 models.*\['a', 'b'\]"):
            Client(server.url).ask("Is it?")
        assert Client(server.url, "b").ask("Is it?").text == "Yes."
    assert server.requests[0]["model"] == "b"


def test_rows_of_a_batch(photo):
    rows = [Row(0, "Is it?", [str(photo)]), Row(1, "Is it?", ["missing.jpg"]), Row(2, "Is it?")]
    with serve(answer=POINTS) as server:
        results = list(ServerEngine(Client(server.url), EngineSettings(batch_size=2)).run(iter(rows)))
    assert sorted(result["row"] for result in results) == [0, 1, 2]
    by_row = {result["row"]: result for result in results}
    assert [point["x"] for point in by_row[0]["points"]] == [25.0, 75.0]
    assert "missing.jpg" in by_row[1]["error"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_all_rows_would_fail_of_ends_a_batch(status):
    rows = [Row(0, "Is it?"), Row(1, "Is it?")]
    refused = (status, {}, '{"error": {"message": "not you"}}')
    with serve(failures=[refused]) as server:
        with pytest.raises(EngineError, match=f"answers {status}: not you"):  # asked once, before the first row
            list(ServerEngine(Client(server.url, "wrong"), EngineSettings()).run(iter(rows)))
        assert len(server.requests) == 1
        server.failures.append(refused)
        with pytest.raises(EngineError, match=f"answers {status}: not you"):  # amid rows
            list(ServerEngine(Client(server.url), EngineSettings(batch_size=1)).run(iter(rows)))
        server.requests.clear()
        assert len(list(ServerEngine(Client(server.url, "other name"), EngineSettings()).run(iter(rows)))) == 2
        assert len(server.requests) == 3
        server.models = ("a", "b")
        with pytest.raises(EngineError, match="2 models"):
            list(ServerEngine(Client(server.url), EngineSettings()).run(iter(rows)))


def test_images_over_a_limit_are_said_and_not_sent(photo, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    rows = [Row(0, "Is it?", [str(photo)]), Row(1, "Is it?")]
    with serve() as server:
        results = {row["row"]: row for row in ServerEngine(Client(server.url), EngineSettings()).run(iter(rows))}
        assert "MAX_IMAGE_PIXELS" in results[0]["error"]
        assert results[1]["text"] == "Yes."
        assert main(["ask", "Is it?", str(photo), "--server", server.url]) == 1
    assert "MAX_IMAGE_PIXELS" in capsys.readouterr().err
    assert len(server.requests) == 1


def test_the_command_line_asks_a_server(photo, capsys, monkeypatch):
    monkeypatch.setenv("MOLMO2_MODEL", "a/folder/here")  # which means nothing there
    with serve(answer=POINTS, models=("a", "mini")) as server:
        assert main(["point", "boats", str(photo), "--server", server.url, "--model", "mini"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == "boats (2 points)"
        server.models = ("a",)
        assert main(["point", "boats", str(photo), "--server", server.url]) == 0
    assert [body["model"] for body in server.requests] == ["mini", "a"]
