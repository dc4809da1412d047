"""`molmo2.client` and `molmo2 batch` against the real `transformers serve`: the answers of the model itself."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi", reason="could not import 'fastapi'")

from molmo2 import ask, load, prompts
from molmo2.batch import EngineSettings, WorkerPool, open_source, run_batch
from molmo2.cli.serving import ServeOptions, serve_command
from molmo2.client import Client, ServerError
from support.paths import REPOSITORY
from support.ports import free_port

sys.path.insert(0, str(REPOSITORY / "examples"))

from miniature import native

DATA = REPOSITORY / "examples" / "data"
IMAGE, CLIP = DATA / "world_single.png", DATA / "world_clip.mp4"
PAIR = [DATA / "world_pair_1.png", DATA / "world_pair_2.png"]
START_SECONDS = 240
QUESTIONS = [
    (prompts.point("red circles"), {"images": IMAGE}),
    (prompts.count("red circles"), {"images": IMAGE}),
    (prompts.point("blue squares"), {"images": PAIR}),
    (prompts.track("red ring"), {"videos": CLIP}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native.to_transformers(native.CHECKPOINT, tmp_path_factory.mktemp("served") / "miniature")


@pytest.fixture(scope="module")
def url(folder):
    port = free_port()
    command = serve_command("transformers", ServeOptions(str(folder), port=port, more=["--device", "cpu"]))
    assert "--trust-remote-code" not in command
    with (folder.parent / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, (folder.parent / "log").read_text()[-2000:]
            with socket.socket() as caller:
                if caller.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def places(answer):
    return [(point.x, point.y, point.time, point.frame and point.frame.source_index) for point in answer.grounding]


def test_answers_are_those_of_the_model(folder, url):
    model, processor = load(folder)
    client = Client(url, processor_kwargs={"num_frames": processor.video_processor.num_frames})
    assert client.kind == "transformers"
    for question, media in QUESTIONS:
        expected = ask(model, processor, question, **media)
        served = client.ask(question, **media)
        *pieces, last = client.ask_stream(question, **media)
        assert served.text == last.answer.text == expected.text
        assert places(served) == places(last.answer) == places(expected)
        assert "".join(piece.text for piece in pieces) == expected.text
        assert served.timings.num_new_tokens > 0


def test_a_conversation_and_a_limit(url):
    session = Client(url).session(images=IMAGE)
    first = session.chat(QUESTIONS[0][0])
    assert session.chat("How many are there?").grounding.count == len(first.grounding) == 3
    assert session.ask(QUESTIONS[0][0], max_new_tokens=5).truncated
    with pytest.raises(ServerError, match="is pinned to"):
        Client(url, "another").ask("What?", images=IMAGE)


def test_a_batch(url, tmp_path):
    rows = [{"question": str(QUESTIONS[0][0]), "image": str(path)} for path in (IMAGE, PAIR[0], "none.png")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = WorkerPool(EngineSettings(server=url, batch_size=2, window=2))
    run_batch(open_source(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", pool, ordered=True)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(result.get("points", [])) for result in results] == [3, 1, 0]
    assert "none.png" in results[2]["error"]


@pytest.mark.parametrize("page", ["client", "batch"])
def test_the_blocks_of_the_pages_run_as_written(folder, url, tmp_path, monkeypatch, capsys, page):
    for name in ("boats.jpg", "harbour.jpg", "photos/a.jpg", "photos/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(DATA / "nasa_frame.jpg", tmp_path / name)
    shutil.copy(DATA / "nasa_clip.mp4", tmp_path / "penguins.mp4")
    (tmp_path / "Molmo2-4B").symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(block.replace("http://127.0.0.1:8000/v1", url), {})
    if page == "batch":
        assert capsys.readouterr().out == "2 0\n"
