"""Requests and tokens a second of the ways to answer many questions, in one run on one machine.

    python -m benchmarks.throughput                          # all rows in three rounds, ten minutes; prints the table
    python -m benchmarks.throughput --rows batched vllm-16   # some of them
    python -m benchmarks.throughput --markdown FILE          # ... and puts the table between the marks in FILE

The trained miniature answers short questions about images, sets and clips, in float32, greedy. Every side runs in a
process and an environment of its own (constraints/environments.toml), one after the other, with one thread in each
process that holds a model. A row is the round with the median rate, and names the lowest and highest rate: servers on
few cores vary by a factor of two. Start-up does not count: rates are those of the time in which all workers or all
requests are busy, from the last one's first answer to the first one's last answer; `whole run` has it all.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SEED, QUESTIONS_ABOUT_IMAGES = 1400, 36  # with those about sets and clips 66
MAX_NEW_TOKENS = 260
BATCH, WINDOW = 8, 16  # of workers
SIDE_SECONDS, START_SECONDS = 300, 300  # limits
# Title, environment, whose rate the ratio is of, and how many times the questions are asked.
SIDES: dict[str, tuple[str, str, str | None, int]] = {
    "one-by-one": ("`ask`, one by one", "batch", None, 1),
    "batched": ("`ask`, batches of 16", "batch", "one-by-one", 2),
    "core-1": ("`molmo2 batch`, 1 worker on one core", "batch", "one-by-one", 4),
    "workers-1": ("`molmo2 batch`, 1 worker", "batch", "one-by-one", 4),
    "workers-2": ("`molmo2 batch`, 2 workers", "batch", "core-1", 4),
    "ray-1": ("`--engine ray`, 1 worker", "batch", "workers-1", 4),
    "ray-2": ("`--engine ray`, 2 workers", "batch", "ray-1", 4),
    "ray-4": ("`--engine ray`, 4 workers", "batch", "ray-1", 4),
    "vllm-1": ("`vllm serve`, 1 request at a time", "batch", "one-by-one", 1),
    "vllm-16": ("`vllm serve`, 16 at once", "batch", "vllm-1", 2),
    "vllm-64": ("`vllm serve`, 64 at once", "batch", "vllm-1", 4),
    "vllm-alone-16": ("vLLM without the plugin, 16 at once", "batch", "vllm-16", 2),
}
EXTRA = ("vllm-alone-16",)  # measured where they are named


# --- questions -------------------------------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Write the converted miniature, the media and the table of questions."""
    _import_path()
    from PIL import Image

    from miniature import native
    from miniature.evaluate import examples
    from miniature.world import CLIP_FPS
    from support.clips import write_clip

    native.to_transformers(native.CHECKPOINT, work / "model")
    paths: dict[int, str] = {}
    asked = examples(SEED, QUESTIONS_ABOUT_IMAGES)
    with (work / "questions.jsonl").open("w") as file:
        for example in asked:
            row: dict[str, Any] = {"question": example.question.text, "images": [], "videos": []}
            for part in example.parts:
                pixels = part[part["type"]]
                path = work / f"{len(paths)}.{'mp4' if part['type'] == 'video' else 'png'}"
                if id(pixels) not in paths:
                    if part["type"] == "video":
                        write_clip(pixels, path, CLIP_FPS)
                    else:
                        Image.fromarray(pixels).save(path)
                row[f"{part['type']}s"].append(paths.setdefault(id(pixels), str(path)))
            file.write(json.dumps(row) + "\n")
    print(json.dumps({"questions": len(asked)}))


def _import_path() -> None:
    sys.path[:0] = [str(REPOSITORY / "examples"), str(REPOSITORY / "tests")]


def table_of(work: Path, times: int) -> Path:
    """The questions, repeated, each time in another order."""
    import random

    target = work / f"questions-{times}.jsonl"
    lines = (work / "questions.jsonl").read_text().splitlines()
    with target.open("w") as file:
        for turn in range(times):
            places = list(range(len(lines)))
            random.Random(turn).shuffle(places)
            file.writelines(json.dumps({**json.loads(lines[place]), "id": place}) + "\n" for place in places)
    return target


# --- measures --------------------------------------------------------------------------------------------------------


def busy_span(lanes: Sequence[Sequence[tuple[float, float, int]]]) -> tuple[float, float]:
    """The time in which every lane is at work: from the last begin of all to the first end.

    Args:
        lanes: Of each worker, (start, end, answers) of its passes of the model.
    """
    return max(min(start for start, _, _ in lane) for lane in lanes), min(
        max(end for _, end, _ in lane) for lane in lanes
    )


def answered_within(lanes: Sequence[Sequence[tuple[float, float, int]]], begin: float, end: float) -> float:
    """Answers in a time: of a pass that lies across its edges, the share that lies inside."""
    return sum(
        answers * max(0.0, min(end, last) - max(begin, first)) / (last - first)
        for lane in lanes
        for first, last, answers in lane
    )


def uncovered(spans: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """The share of a time that lies in none of the spans."""
    covered, reached = 0.0, begin
    for first, last in sorted(spans):
        first, last = max(first, reached), min(last, end)
        if last > first:
            covered, reached = covered + last - first, last
    return 1 - covered / (end - begin)


def rates(lanes: Sequence[Sequence[tuple[float, float, int]]], tokens_per_answer: float) -> dict[str, float]:
    """Answers and tokens a second of the time in which all lanes are busy."""
    begin, end = busy_span(lanes)
    requests = answered_within(lanes, begin, end) / (end - begin)
    return {"requests": requests, "tokens": requests * tokens_per_answer, "measured_seconds": end - begin}


# --- a worker that keeps the time ------------------------------------------------------------------------------------


def worker(folder: Path) -> int:
    """`molmo2.batch.worker`, which notes when it decodes and when the model computes."""
    from molmo2.batch import engines
    from molmo2.batch import worker as batch_worker

    log = (folder / f"{os.getpid()}.jsonl").open("w", buffering=1)

    def timed(kind: str, function: Callable[..., Any], answers: Callable[..., int]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.time()
            try:
                return function(*arguments, **options)
            finally:
                log.write(json.dumps([kind, start, time.time(), answers(*arguments)]) + "\n")

        return call

    request = engines.Request
    engines.plan = timed("decode", engines.plan, lambda *arguments: 0)
    request.from_conversations = timed("decode", request.from_conversations, lambda *arguments: 0)
    request.generate = timed("model", request.generate, lambda own, model: len(own.questions))
    return batch_worker.main()


def worker_logs(folder: Path) -> list[list[tuple[str, float, float, int]]]:
    """What each worker noted; those that answered nothing are left out."""
    logs = [[tuple(json.loads(line)) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")]
    return [log for log in logs if any(kind == "model" for kind, *_ in log)]


# --- sides, each in a process of its own -----------------------------------------------------------------------------


def run_side(name: str, work: Path, url: str | None) -> dict[str, Any]:
    """One side's figures, measured in this process."""
    kind, _, number = name.rpartition("-")
    if kind == "core":  # a worker decodes ahead beside the model: without this one has two cores for itself
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(number)])
    if kind in ("workers", "core", "ray"):
        return _workers(kind, int(number), table_of(work, SIDES[name][3]), work)
    if kind.startswith("vllm"):
        return _server(int(number), table_of(work, SIDES[name][3]), str(url))
    return _in_process(name, table_of(work, SIDES[name][3]), work)


def _workers(kind: str, number: int, table: Path, work: Path) -> dict[str, Any]:
    from molmo2.batch import EngineSettings, WorkerPool, open_source, run_batch

    logs = Path(tempfile.mkdtemp(dir=work))
    command = (sys.executable, "-m", "benchmarks.throughput", "--worker", str(logs))
    settings = EngineSettings(
        model=str(work / "model"), dtype="float32", device="cpu", batch_size=BATCH, window=WINDOW,
        generate_options={"max_new_tokens": MAX_NEW_TOKENS},
    )  # fmt: skip
    if kind == "ray":
        import ray

        from molmo2.batch.ray_data import RayEngine

        # Actors ask for a processor each; there may be more of them here than processors.
        ray.init(num_cpus=max(2, number), include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
        ray.data.DataContext.get_current().enable_progress_bars = False
        engine: Any = RayEngine(settings, (number, number), command=command)
    else:
        engine = WorkerPool(settings, number, command=command)
    results: list[dict[str, Any]] = []
    own = time.process_time()
    summary = run_batch(open_source(table), logs / "out.jsonl", engine, on_result=results.append)
    own = time.process_time() - own
    noted = worker_logs(logs)
    lanes = [[(start, end, count) for kind, start, end, count in log if kind == "model"] for log in noted]
    outside = []
    for log in noted:
        begin, end = min(entry[1] for entry in log), max(entry[2] for entry in log)
        outside.append(uncovered([(entry[1], entry[2]) for entry in log], begin, end))
    found = rates(lanes, _tokens_per_answer(results))
    return {
        **found, **_about(results), "whole_seconds": summary.seconds, "outside": max(outside),
        "driver": own / summary.seconds, "workers": len(lanes),
    }  # fmt: skip


def _server(concurrency: int, table: Path, url: str) -> dict[str, Any]:
    """A server that runs already, asked by the client, as `molmo2 batch --server` does."""
    from molmo2.batch import EngineSettings
    from molmo2.batch.engines import ServerEngine
    from molmo2.batch.rows import all_rows, open_source
    from molmo2.client import Client

    client = Client(url, max_concurrency=concurrency)
    settings = EngineSettings(batch_size=concurrency, generate_options={"max_new_tokens": MAX_NEW_TOKENS})
    rows = list(all_rows(open_source(table)))
    list(ServerEngine(client, settings).run(iter(rows[:4])))  # the first requests compile and allocate
    starts: dict[int, float] = {}
    engine = ServerEngine(client, settings, lambda rows, busy: starts.setdefault(rows[0].number, time.time()))
    results, lane = [], []
    start = time.time()
    for result in engine.run(iter(rows)):
        results.append(result)
        lane.append((starts[result["row"]], time.time(), 1))
    seconds = time.time() - start
    end = max(starts.values()) if concurrency > 1 else time.time()  # from there on fewer are busy
    requests = answered_within([lane], start, end) / (end - start)
    tokens = requests * _tokens_per_answer(results)
    return {
        "requests": requests, "tokens": tokens, "measured_seconds": end - start, "whole_seconds": seconds,
        **_about(results),
    }  # fmt: skip


def _in_process(name: str, table: Path, work: Path) -> dict[str, Any]:
    import torch

    from molmo2 import ask, load
    from molmo2.batch import EngineSettings
    from molmo2.batch.engines import LocalEngine
    from molmo2.batch.rows import all_rows, open_source
    from molmo2.tools.answer import answer_record

    torch.set_num_threads(1)
    start = time.time()
    model, processor = load(str(work / "model"), dtype="float32")
    rows = list(all_rows(open_source(table)))
    settings = EngineSettings(batch_size=16, window=64, generate_options={"max_new_tokens": MAX_NEW_TOKENS})

    def answers(rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        if name == "batched":
            yield from LocalEngine(model, processor, settings).run(iter(rows))
            return
        for row in rows:
            answer = ask(
                model, processor, row.question, row.images or None, row.videos or None, max_new_tokens=MAX_NEW_TOKENS
            )
            yield row.result(answer_record(answer))

    list(answers(rows[:2]))
    start = time.time()
    results = list(answers(rows))
    end = time.time()
    found = rates([[(start, end, len(results))]], _tokens_per_answer(results))
    return {**found, **_about(results), "whole_seconds": end - start}


def _tokens_per_answer(results: Sequence[dict[str, Any]]) -> float:
    errors = [result["error"] for result in results if result["error"] is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(results)} questions failed: {errors[0]}")
    return sum(result["timings"]["num_new_tokens"] for result in results) / len(results)


def _about(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"answers": len(results), "texts": {result["id"]: result["text"] for result in results}}


# --- all sides -------------------------------------------------------------------------------------------------------


def _environment(**more: str) -> dict[str, str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths).rstrip(os.pathsep), **more}


def _in(environment: str, *command: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "scripts" / "environment.py"), environment, *command]


def run_child(environment: str, *arguments: str, limit: float = SIDE_SECONDS) -> dict[str, Any]:
    """The JSON on the last line of this program, run in an environment of the repository; or an error."""
    command = _in(environment, "python", "-m", "benchmarks.throughput", *arguments)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, cwd=REPOSITORY, env=_environment()
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {limit:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip() or "no message").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def vllm_server(model: Path, log: Path, plugin: bool = True) -> Iterator[str]:
    """The URL of a running `vllm serve`, which has ended when the context is left."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port = made.getsockname()[1]
    command = _in("vllm", "vllm", "serve", str(model), "--served-model-name", "miniature", "--dtype", "float32")
    command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    if not plugin:
        settings["VLLM_PLUGINS"] = ""
        command.append("--trust-remote-code")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=_environment(**settings), start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not start: {log.read_text()[-500:]}")
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with closing(urllib.request.urlopen(url, timeout=5)) as response:
            return response.status == 200
    except OSError:
        return False


def measure(names: Sequence[str], work: Path, limit: float) -> dict[str, dict[str, Any]]:
    """The figures of the sides, or the error of each that has none."""
    found: dict[str, dict[str, Any]] = {}

    def take(name: str, *more: str) -> None:
        found[name] = run_child(SIDES[name][1], "--side", name, "--work", str(work), *more, limit=limit)
        shown = {key: value for key, value in found[name].items() if key != "texts"}
        print(name, json.dumps(shown), file=sys.stderr, flush=True)

    for name in names:
        if not name.startswith("vllm"):
            take(name)
    for plugin in (True, False):
        served = [name for name in names if name.startswith("vllm") and ("alone" not in name) is plugin]
        if not served:
            continue
        try:
            with vllm_server(work / "model", work / f"vllm-{plugin}.log", plugin) as url:
                for name in served:
                    take(name, "--url", url)
        except RuntimeError as error:
            found.update({name: {"error": str(error).splitlines()[-1]} for name in served if name not in found})
    return {name: found[name] for name in names}


def median_of(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each side the round with the median rate, with `range` of all; an error if it failed in one."""
    found = {}
    for name in rounds[0]:
        taken = [each[name] for each in rounds]
        failed = next((entry for entry in taken if "error" in entry), None)
        if failed is None:
            taken.sort(key=lambda entry: entry["requests"])
            ends = taken[0]["requests"], taken[-1]["requests"]
            found[name] = {**taken[len(taken) // 2], "range": ends}
        else:
            found[name] = failed
    return found


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = [
        "| | requests/s | tokens/s | ratio | whole run | outside decoding and model | same answers |",
        "|---|---|---|---|---|---|---|",
    ]
    first = next((entry["texts"] for entry in found.values() if "texts" in entry), {})
    for name, entry in found.items():
        title, _, of, _ = SIDES[name]
        if "error" in entry:
            lines.append(f"| {title} | - | - | {entry['error'].replace('|', '/')} | | | |")
            continue
        base, (lowest, highest) = found.get(of or "", {}), entry["range"]
        ratio = f"{entry['requests'] / base['requests']:.2f} of {of}" if "requests" in base else ""
        outside = f"{entry['outside']:.1%}" if "outside" in entry else ""
        same = sum(entry["texts"][key] == text for key, text in first.items())
        whole = f"{entry['answers']} in {entry['whole_seconds']:.0f} s"
        rate = f"{entry['requests']:.1f} ({lowest:.1f} to {highest:.1f}) | {entry['tokens']:.0f}"
        lines.append(f"| {title} | {rate} | {ratio} | {whole} | {outside} | {same} of {len(first)} |")
    return "\n".join(lines)


def replace_table(path: Path, name: str, table: str) -> None:
    """Put the table between the marks <!-- name --> and <!-- end of name --> of a page."""
    text = path.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if not re.search(f"{first}.*{last}", text, re.S):
        raise ValueError(f"'{path}' has no place for the table: add {first} and {last}.")
    written = f"{first}\n\n{table}\n\n{last}"
    path.write_text(re.sub(f"{first}.*?{last}", lambda match: written, text, flags=re.S), encoding="utf-8")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in SIDES if name not in EXTRA]
    parser.add_argument("--rows", nargs="+", choices=list(SIDES), default=default, metavar="NAME", help=str(default))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page with <!-- throughput -->")
    parser.add_argument(
        "--rounds", type=int, default=3, choices=(1, 3, 5, 7), help="how many times each row is measured"
    )
    parser.add_argument("--limit", type=float, default=SIDE_SECONDS, metavar="SECONDS", help="of each row")
    for name in ("--side", "--url", "--work", "--worker", "--prepare"):  # of the children
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.worker:
        return worker(Path(arguments.worker))
    if arguments.prepare:
        prepare(Path(arguments.prepare))
        return 0
    if arguments.side:
        print(json.dumps(run_side(arguments.side, Path(arguments.work), arguments.url)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        made = run_child("batch", "--prepare", scratch)
        if "error" in made:
            raise SystemExit(made["error"])
        found = median_of([measure(arguments.rows, Path(scratch), arguments.limit) for _ in range(arguments.rounds)])
    print(markdown(found))
    if arguments.markdown:
        replace_table(arguments.markdown, "throughput", markdown(found))
    return 1 if any("error" in entry for entry in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
