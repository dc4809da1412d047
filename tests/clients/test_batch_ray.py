"""`molmo2.batch` on a local Ray cluster, and Parquet: `make test-batch`."""

import datetime
import json
import os
import sys
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="could not import 'ray'")
parquet = pytest.importorskip("pyarrow.parquet", reason="could not import 'pyarrow.parquet'")

from molmo2.batch import EngineSettings, WorkerPool, open_source, run_batch  # noqa: E402
from molmo2.batch import rows as batch_rows  # noqa: E402
from molmo2.batch.journal import Journal  # noqa: E402
from molmo2.batch.ray_data import MAX_READERS, RayEngine  # noqa: E402
from support.counting_source import CountingSource  # noqa: E402

COMMAND = (sys.executable, str(Path(__file__).resolve().parents[1] / "support" / "batch_worker.py"))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # machines that run other tests are slow
    paths = ":".join(path for path in sys.path if path)
    ray.init(
        num_cpus=4,  # of which there may be fewer: actors ask for one each
        num_gpus=1,  # in name only: where actors are placed is the cluster's matter
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def write_table(path, questions):
    lines = [json.dumps({"question": text, "image": f"{place}.png"}) for place, text in enumerate(questions)]
    path.write_text("\n".join(lines) + "\n{broken\n", encoding="utf-8")
    return open_source(path)


class Enough(Exception):
    """Ends a run as a kill would."""


def test_it_continues_with_two_workers_and_rows_that_kill_them(tmp_path, monkeypatch):
    """A run that another engine began, over blocks that are not whole."""
    monkeypatch.setattr(batch_rows, "ROWS_PER_CHUNK", 16)
    questions = [f"q{place}" for place in range(50)]
    questions[20] = "die"
    source = write_table(tmp_path / "in.jsonl", questions)
    earlier, later = [], []

    def stop(result):
        earlier.append(result["row"])
        if len(earlier) == 11:
            raise Enough

    pool = WorkerPool(EngineSettings(window=4), command=COMMAND)
    with pytest.raises(Enough):
        run_batch(source, tmp_path / "out.jsonl", pool, on_result=stop)
    ray_engine = RayEngine(EngineSettings(model="some", window=8), (1, 2), command=COMMAND)
    summary = run_batch(
        source, tmp_path / "out.jsonl", ray_engine, ordered=True, on_result=lambda result: later.append(result["row"])
    )
    assert sorted(earlier + later) == list(range(51))
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["row"] for result in results] == list(range(51))
    assert [result.get("text") for result in results[:50]] == [
        None if text == "die" else text.upper() for text in questions
    ]
    assert "signal 9" in results[20]["error"]
    assert "is no JSON" in results[50]["error"]
    assert (summary.rows, summary.errors) == (51, 2)


@pytest.mark.parametrize(("workers", "device", "workers_per_gpu"), [(2, "cpu", 1), (4, "cpu", 1), (2, "auto", 2)])
def test_every_worker_takes_part_and_few_processes_read(tmp_path, workers, device, workers_per_gpu):
    questions = [f"q{place}" for place in range(96)]
    table = tmp_path / "in.jsonl"
    write_table(table, questions)
    source = CountingSource(table, None, tmp_path / "readers")
    answered = tmp_path / "answered"
    command = (*COMMAND, str(answered), str(workers))
    settings = EngineSettings(model="some", device=device, window=2)
    engine = RayEngine(settings, (workers, workers), command=command, workers_per_gpu=workers_per_gpu)
    summary = run_batch(source, tmp_path / "out.jsonl", engine, ordered=True)
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result.get("text") for result in results] == [*(text.upper() for text in questions), None]
    assert (summary.rows, summary.errors) == (97, 1)
    assert len(set(answered.read_text().split())) == workers
    readers = source.log.read_text().split()
    assert len(readers) == 49
    assert len(set(readers)) <= min(workers, MAX_READERS)


def test_parquet_in_and_out(tmp_path):
    import pyarrow

    table = pyarrow.table(
        {
            "question": [f"q{place}" for place in range(20)],
            "images": [["a.png", "b.png"], None] * 10,
            "id": list(range(100, 120)),
        }
    )
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=6)
    source = open_source(tmp_path / "in.parquet")
    pool = WorkerPool(EngineSettings(window=4), command=COMMAND)
    run_batch(source, tmp_path / "out.parquet", pool, ordered=True)
    results = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [result["row"] for result in results] == list(range(20))
    assert [result["id"] for result in results] == [str(place) for place in range(100, 120)]
    assert results[0]["images"] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert results[3]["text"] == "Q3"
    chunks = list(source.chunks())
    assert [(chunk.first, chunk.count) for chunk in chunks] == [(0, 6), (6, 6), (12, 6), (18, 2)]
    small = list(source.chunks(4))
    assert [(chunk.place, chunk.skipped, chunk.count) for chunk in small[:3]] == [(0, 0, 4), (0, 4, 2), (1, 0, 4)]
    for chunk in [*small, *small[::-1]]:  # forwards, and from the beginning of a group again
        assert [row.question for row in source.read(chunk)] == [
            f"q{number}" for number in range(chunk.first, chunk.first + chunk.count)
        ]
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(batch_rows.SourceError, match="cannot be read as Parquet"):
        list(open_source(tmp_path / "bad.parquet").chunks())


def test_parquet_decodes_a_group_once(tmp_path, monkeypatch):
    import pyarrow

    parquet.write_table(pyarrow.table({"question": ["q"] * 3000}), tmp_path / "in.parquet")
    source = open_source(tmp_path / "in.parquet")
    opened = []
    monkeypatch.setattr(
        batch_rows.ParquetSource, "_open", lambda self: opened.append(1) or parquet.ParquetFile(self.path)
    )
    assert len(list(batch_rows.all_rows(source))) == 3000
    assert len(opened) == 2  # for the chunks and for the rows


def test_values_that_json_and_parquet_do_not_have(tmp_path):
    """Dates as ids, and halves of surrogate pairs in names."""
    import pyarrow

    date = datetime.date(2024, 2, 29)
    parquet.write_table(pyarrow.table({"question": ["q"], "id": [date]}), tmp_path / "in.parquet")
    pool = WorkerPool(EngineSettings(window=4), command=COMMAND)
    run_batch(open_source(tmp_path / "in.parquet"), tmp_path / "out.jsonl", pool)
    assert json.loads((tmp_path / "out.jsonl").read_text())["id"] == "2024-02-29"
    answer = {"text": "\udcff", "points": [{"label": "\ud800", "id": 1}]}
    with Journal(tmp_path / "names.parquet", {}) as journal:
        journal.write(batch_rows.Row(0, "q", ["\udcfe.png"]).result(answer))
        journal.finish(ordered=True, summary={})
    (result,) = parquet.read_table(tmp_path / "names.parquet").to_pylist()
    assert (result["text"], result["images"]) == ("\\udcff", ["\\udcfe.png"])
    assert result["points"][0]["label"] == "\\ud800"
