"""`molmo2.batch`: tables in, one result per row out, whatever dies meanwhile. Workers have no model here."""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from molmo2.batch import EngineError, EngineSettings, OutputError, SourceError, WorkerPool, open_source, run_batch
from molmo2.batch import engines as batch_engines
from molmo2.batch import pool as batch_pool
from molmo2.batch import rows as batch_rows
from molmo2.batch.engines import LocalEngine
from molmo2.batch.journal import Journal
from molmo2.batch.ray_data import RayEngine
from molmo2.batch.run import Shard
from molmo2.batch.worker import gpu_index
from molmo2.cli.batches import shard_of, workers_of
from support.model_inputs import processor
from support.scripted_model import ScriptedModel

SUPPORT = Path(__file__).resolve().parents[1] / "support"
COMMAND = (sys.executable, str(SUPPORT / "batch_worker.py"))


def pool(workers=1, window=4, model="some", **options):
    return WorkerPool(EngineSettings(model=model, window=window), workers, command=COMMAND, **options)


def write_table(path, questions):
    lines = [json.dumps({"question": text, "id": f"row {place}"}) for place, text in enumerate(questions)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_source(path)


def results_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- sources ---------------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    table = tmp_path / "table.jsonl"
    table.write_text(
        '{"question": "One?", "image": "a.png", "id": 7}\n\n'
        '{"question": "Two?", "images": ["/b.png", "https://host/c.png"], "videos": null}\n'
        "{broken\n[1]\n"
        '{"question": " ", "video": "d.mp4"}\n{"question": "Three?", "image": 5}\n',
        encoding="utf-8",
    )
    rows = list(batch_rows.all_rows(open_source(table)))
    assert [row.number for row in rows] == list(range(6))
    assert (rows[0].question, rows[0].images, rows[0].id) == ("One?", [str(tmp_path / "a.png")], 7)
    assert rows[1].images == ["/b.png", "https://host/c.png"]
    errors = ["is no JSON", "is no object with columns", "there is no question", "column 'image' holds 5"]
    assert [part in row.error for part, row in zip(errors, rows[2:], strict=True)] == [True] * 4


def test_csv_with_lines_in_cells_and_a_question_for_all(tmp_path):
    table = tmp_path / "table.csv"
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "name", "images"])
        writer.writerows([["a.mp4", "red\ncar", ""], ["b.mp4", "", '["c.png", "d.png"]'], ["e.mp4"]])
    rows = list(batch_rows.all_rows(open_source(table, "Track the {name} in {this}.")))
    assert "asks for the column 'this'" in rows[0].error
    rows = list(batch_rows.all_rows(open_source(table, "Track the {name}.")))
    assert (rows[0].question, rows[0].videos) == ("Track the red\ncar.", [str(tmp_path / "a.mp4")])
    assert "column 'name', which is missing or empty" in rows[1].error
    assert rows[1].images == [str(tmp_path / "c.png"), str(tmp_path / "d.png")]
    assert "has 1 cells, but there are 3 columns" in rows[2].error


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_chunks_are_read_from_their_places(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(batch_rows, "ROWS_PER_CHUNK", 3)
    table = tmp_path / f"table{suffix}"
    questions = [f"{place}\n{'x' * place}" for place in range(8)]
    if suffix == ".csv":
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([["question"], *([text] for text in questions)])
    else:
        table.write_text("".join(json.dumps({"question": text}) + "\n\n" for text in questions))
    table.write_bytes(table.read_bytes().replace(b"4", "é".encode()))
    questions[4] = questions[4].replace("4", "é")
    source = open_source(table)
    chunks = list(source.chunks())
    assert [(chunk.first, chunk.count) for chunk in chunks] == [(0, 3), (3, 3), (6, 2)]
    assert [chunk.count for chunk in source.chunks(7)] == [7, 1]
    assert all(chunk.place > 20 for chunk in chunks[1:])  # bytes
    rows = [row for chunk in reversed(chunks) for row in source.read(chunk)]
    assert sorted((row.number, row.question) for row in rows) == list(enumerate(questions))


def test_no_csv_and_long_cells(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(f"question\n{'x' * 200_000}\n")
    assert [len(row.question) for row in batch_rows.all_rows(open_source(table))] == [200_000]
    table.write_bytes(b"question\nFa\xdfade?\n")
    with pytest.raises(SourceError, match="cannot be read as CSV in UTF-8"):
        list(open_source(table).chunks())


def test_folders(tmp_path):
    for name in ("b.png", "a.mp4", ".hidden.png", "notes.txt", "in/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    rows = list(batch_rows.all_rows(open_source(tmp_path, "What?", recursive=True)))
    assert [(row.images, row.videos) for row in rows] == [
        ([], [str(tmp_path / "a.mp4")]),
        ([str(tmp_path / "b.png")], []),
        ([str(tmp_path / "in/c.png")], []),
    ]
    source = open_source(tmp_path, "What?")
    chunks = list(source.chunks())
    (tmp_path / "a.png").write_bytes(b"")  # it would move the others
    assert [row.images for row in source.read(chunks[0])] == [[], [str(tmp_path / "b.png")]]
    with pytest.raises(SourceError, match="Pass --question"):
        open_source(tmp_path)


@pytest.mark.parametrize(("name", "message"), [("nothing.csv", "There is no table"), ("table.xls", "none of .jsonl")])
def test_no_source(tmp_path, name, message):
    (tmp_path / "table.xls").write_bytes(b"")
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / name)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_one_result_for_each_row(tmp_path):
    source = write_table(tmp_path / "in.jsonl", [f"q{place}" for place in range(11)] + ["", "print"])
    seen = []
    output = tmp_path / "new folder" / "out.jsonl"
    summary = run_batch(source, output, pool(2), on_result=seen.append)
    results = results_of(output)
    assert sorted(result["row"] for result in results) == list(range(13))
    assert {result["row"]: result.get("text") for result in results} == {
        **{place: f"Q{place}" for place in range(11)},
        11: None,
        12: "PRINT",
    }
    assert {result["id"] for result in results} == {f"row {place}" for place in range(13)}
    assert (summary.rows, summary.errors, summary.answered, len(seen)) == (13, 1, 13, 13)
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]
    again = run_batch(source, output, None)  # nothing is left to ask
    assert (again.rows, again.errors, again.answered) == (13, 1, 0)


def test_a_row_that_kills_its_worker_costs_that_row(tmp_path):
    questions = ["a", "die", "b", "c", "die", *"defghijk"]
    source = write_table(tmp_path / "in.jsonl", questions)
    summary = run_batch(source, tmp_path / "out.jsonl", pool(2, window=3), ordered=True)
    results = results_of(tmp_path / "out.jsonl")
    assert [result["row"] for result in results] == list(range(len(questions)))
    texts = [result.get("text") for result in results]
    assert texts == [None if text == "die" else text.upper() for text in questions]
    assert "the worker died (signal 9)" in results[1]["error"]
    assert summary.errors == 2


def test_a_row_that_never_ends_is_given_up(tmp_path, monkeypatch):
    """Time passes here only while a worker is busy with that row: all others may take as long as they do."""
    now, look = [0.0], WorkerPool._kill_the_slow

    def look_later(workers):
        now[0] += any(1 in worker.suspects for worker in workers._workers)
        look(workers)

    monkeypatch.setattr(WorkerPool, "_kill_the_slow", look_later)
    monkeypatch.setattr(batch_pool, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(batch_pool, "POLL_SECONDS", 0.05)
    source = write_table(tmp_path / "in.jsonl", ["a", "hang", "b"])
    run_batch(source, tmp_path / "out.jsonl", pool(row_seconds=0.3), ordered=True)
    results = results_of(tmp_path / "out.jsonl")
    assert [result.get("text") for result in results] == ["A", None, "B"]
    assert "no answer after 0.3 s" in results[1]["error"]


def test_without_a_model_nothing_is_answered(tmp_path):
    source = write_table(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(EngineError, match="there is no such model"):
        run_batch(source, tmp_path / "out.jsonl", pool(model="missing"))
    broken = WorkerPool(EngineSettings(), command=(sys.executable, "-c", "exit(3)"))
    with pytest.raises(EngineError, match="exit code 3"):
        run_batch(source, tmp_path / "out.jsonl", broken)
    assert run_batch(source, tmp_path / "out.jsonl", pool()).rows == 1  # the same run, with a model


def test_parts_of_a_table(tmp_path):
    source = write_table(tmp_path / "in.jsonl", list("abcde"))
    for index in range(2):
        run_batch(source, tmp_path / "out.jsonl", pool(), shard=Shard(index, 2), ordered=True)
    names = ["out-00001-of-00002.jsonl", "out-00002-of-00002.jsonl"]
    assert [[result["text"] for result in results_of(tmp_path / name)] for name in names] == [list("ACE"), list("BD")]
    assert shard_of("2/8", {}) == (1, 8)
    assert shard_of(None, {"RANK": "3", "WORLD_SIZE": "4"}) == (3, 4)
    assert (workers_of("4"), workers_of("2:16")) == ((4, 4), (2, 16))


RUN = """
import itertools, sys, time
from pathlib import Path
from molmo2.batch import EngineSettings, WorkerPool, open_source, run_batch
source, output, stop_at, *command = sys.argv[1:]
numbers = itertools.count()
def halt(result):  # after this many rows it waits for the kill: the process that watches it may be slow
    if next(numbers) == int(stop_at):
        time.sleep(1000)
pool = WorkerPool(EngineSettings(window=3), 2, command=command)
run_batch(open_source(source), Path(output), pool, ordered=True, on_result=halt)
"""


@pytest.mark.parametrize(
    ("kills", "number"), [(4, 2000), pytest.param(50, 40_000, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)])]
)
def test_killed_at_any_moment_it_continues(tmp_path, kills, number):
    """Kills behind random numbers of answers or after random times, each followed by the same command.

    Times also hit the start, and the end, where the output is written; nothing is lost or there twice.
    """
    write_table(tmp_path / "in.jsonl", [f"q{place}" for place in range(number)])
    output, journal, random_ = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal", random.Random(4)
    command = [sys.executable, "-c", RUN, str(tmp_path / "in.jsonl"), str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def lines():
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    killed = amid_rows = 0
    for turn in range(kills):
        enough = lines() + random_.randint(1, 150)
        process = subprocess.Popen([*command, "450", *COMMAND], env=environment)
        deadline = time.monotonic() + (random_.uniform(0, 3) if turn % 4 == 3 else 1000)
        while process.poll() is None and lines() < enough and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        killed += process.wait() == -9
        amid_rows += 0 < lines() < number
    subprocess.run([*command, str(number), *COMMAND], env=environment, check=True)
    results = results_of(output)
    assert killed == kills
    assert amid_rows >= kills // 2
    assert [result["row"] for result in results] == list(range(number))
    assert [result["text"] for result in results] == [f"Q{place}" for place in range(number)]


def test_a_pool_that_was_stopped_begins_anew(tmp_path):
    """Rows, deaths and lines of workers of the first run mean nothing to the second."""

    class Enough(Exception):
        pass

    def stop(result):
        raise Enough

    first = write_table(tmp_path / "first.jsonl", ["a", "die", *"bcdefgh"])
    second = write_table(tmp_path / "second.jsonl", ["u", "v", "w"])
    workers = pool(2, window=2)
    with pytest.raises(Enough):
        run_batch(first, tmp_path / "1.jsonl", workers, on_result=stop)
    run_batch(second, tmp_path / "2.jsonl", workers, ordered=True)
    assert [result["text"] for result in results_of(tmp_path / "2.jsonl")] == ["U", "V", "W"]


def test_gpus_of_several_processes():
    second_of_two = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert [gpu_index(index, 4, second_of_two) for index in range(3)] == [1, 3, 1]
    assert [gpu_index(index, 2, {}) for index in range(3)] == [0, 1, 0]


# --- the journal -----------------------------------------------------------------------------------------------------


def result(number, text="a"):
    return batch_rows.Row(number, "q").result({"text": text})


def test_a_line_that_was_cut_off_is_answered_again(tmp_path):
    output = tmp_path / "out.jsonl"
    with Journal(output, {"model": "m"}) as journal:
        assert [journal.write(result(number)) for number in (3, 1, 3)] == [True, True, False]
    with (tmp_path / "out.jsonl.journal").open("ab") as file:
        file.write(b'{"row": 2, "text": "hal')
    with Journal(output, {"model": "m"}) as journal:
        assert [number in journal.done for number in range(5)] == [False, True, False, True, False]
        journal.write(result(2, "\udcff"))  # of a name that is no text
        journal.finish(ordered=True, summary={})
    assert [entry["row"] for entry in results_of(output)] == [1, 2, 3]


def test_damage_amid_lines_is_named(tmp_path):
    output = tmp_path / "out.jsonl"
    with Journal(output, {}) as journal:
        journal.write(result(0))
    journal_path = tmp_path / "out.jsonl.journal"
    journal_path.write_bytes(b"damage\n" + journal_path.read_bytes())
    with pytest.raises(OutputError, match="damaged at byte 0"), Journal(output, {}):
        pass


def test_killed_between_output_and_clearing_up(tmp_path):
    """The output is there, and so is the journal: both are made one again."""
    output = tmp_path / "out.jsonl"
    with Journal(output, {}) as journal:
        journal.write(result(0))
    output.write_text("older")
    with Journal(output, {}) as journal:
        assert not journal.is_complete
        journal.finish(ordered=True, summary={"rows": 1})
    with Journal(output, {}) as journal:
        assert (journal.is_complete, journal.num_rows) == (True, 1)
    assert len(results_of(output)) == 1


def test_outputs_of_others_are_left_alone(tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(OutputError, match="not from such a run"), Journal(output, {}):
        pass
    with Journal(output, {"model": "a"}, overwrite=True) as journal:
        journal.write(result(0))
        with pytest.raises(OutputError, match="Another run is writing"), Journal(output, {"model": "a"}):
            pass
    with (
        pytest.raises(OutputError, match=r"other settings or another source \(model\)"),
        Journal(output, {"model": "b"}),
    ):
        pass
    with pytest.raises(OutputError, match=r"none of \.jsonl"):
        Journal(tmp_path / "out.txt", {})


# --- a model in this process -----------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_rows_are_sorted_by_length_and_bad_ones_left_out(tmp_path, photo):
    model = ScriptedModel(processor(), lambda prompt: '<points coords="1 1 500 500">x</points>')
    (tmp_path / "bad.png").write_bytes(b"no image")
    questions = ["long " * 30, "short", "long " * 20, "shorter", "bad"]
    rows = [batch_rows.Row(number, text, [photo]) for number, text in enumerate(questions[:4])]
    rows.append(batch_rows.Row(4, "bad", [str(tmp_path / "bad.png")]))
    watched = []
    engine = LocalEngine(
        model,
        processor(),
        EngineSettings(batch_size=2, window=8),
        lambda rows, busy: watched.append(([row.number for row in rows], busy)),
    )
    results = {result["row"]: result for result in engine.run(iter(rows))}
    assert [["short" in prompt for prompt in prompts] for prompts in model.calls] == [[True, True], [False, False]]
    assert [results[number]["points"][0]["x"] for number in range(4)] == [50.0] * 4
    assert results[0]["timings"]["num_prompt_tokens"] > results[1]["timings"]["num_prompt_tokens"]
    assert "bad.png" in results[4]["error"]
    assert watched[:2] == [([0], True), ([0], False)]
    assert ([2, 0], True) in watched


def test_a_batch_that_fails_is_answered_row_by_row(photo):
    def answer(prompt):
        if "refused" in prompt:
            raise RuntimeError("out of memory")
        return "Yes."

    rows = [batch_rows.Row(number, text, [photo]) for number, text in enumerate(["one", "refused", "two"])]
    engine = LocalEngine(ScriptedModel(processor(), answer), processor(), EngineSettings(batch_size=3))
    results = {result["row"]: result for result in engine.run(iter(rows))}
    assert [results[number].get("text") for number in range(3)] == ["Yes.", None, "Yes."]
    assert results[1]["error"] == "RuntimeError: out of memory"


def test_no_row_ends_a_run_but_a_lost_gpu_ends_a_worker(photo, monkeypatch):
    def answer(prompt):
        raise LookupError("no such thing") if "odd" in prompt else RuntimeError("CUDA error: an illegal access")

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(batch_engines.os, "_exit", end)
    rows = [batch_rows.Row(0, "odd", [photo]), batch_rows.Row(1, "lost " * 9, [photo])]
    settings = EngineSettings(batch_size=1)
    engine = LocalEngine(ScriptedModel(processor(), answer), processor(), settings)
    assert [result["error"].partition(":")[0] for result in engine.run(iter(rows))] == ["LookupError", "RuntimeError"]
    worker = LocalEngine(ScriptedModel(processor(), answer), processor(), settings, is_worker=True).run(iter(rows))
    assert "LookupError" in next(worker)["error"]
    with pytest.raises(SystemExit):
        next(worker)


def test_a_gpu_has_at_least_one_worker():
    with pytest.raises(ValueError, match="`workers_per_gpu` is 0, but at least one worker"):
        RayEngine(EngineSettings(model="some"), (1, 1), workers_per_gpu=0)


def test_no_pipe_of_a_worker_stays_open():
    workers = pool()
    workers._start(0)
    (worker,) = workers._workers
    workers.close()
    limit = time.monotonic() + 10
    while not worker.process.stdout.closed and time.monotonic() < limit:
        time.sleep(0.01)  # its reader closes it
    assert worker.process.stdout.closed
