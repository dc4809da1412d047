"""The benchmark suite: measurements, alternating sides, goals, reports; one real row from end to end."""

import cProfile
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost, fits, gpu_day, harness, profile, report, runner, scaling, throughput
from benchmarks.bounds import Products, weight_reads
from benchmarks.curves import Curve, exponent, growth, linear_fit
from benchmarks.harness import Finished, Goal, NotAvailable, Row, Settings, Side, measure
from benchmarks.memory import PeakMemory, held_bytes
from molmo2.model.attention.mask import AttentionSpec, mask_mod
from molmo2.tools.memory import RequestShape
from support.checkpoints import build_model
from support.model_inputs import batch
from support.paths import REPOSITORY

SIDE = Side("ours", Settings(quick=True))


def toy(sides: tuple[str, ...] = ("bound", "ours", "peer"), goals: tuple[Goal, ...] = ()) -> Row:
    return Row("toy", "a toy", lambda side: lambda: None, "nothing", goals, sides)


# --- one measurement -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is the Linux kernel's")
def test_memory_that_was_freed_again_counts():
    memory = PeakMemory("cpu")
    np.ones(200_000_000, dtype=np.uint8)
    first = memory.peak_bytes()
    assert 195e6 < first < 260e6
    again = PeakMemory("cpu")  # from here on, none of it
    assert again.peak_bytes() < 50e6


def test_bytes_that_are_shared_count_once():
    tensor = torch.zeros(10, 4)
    assert held_bytes({"a": tensor, "b": [np.zeros(3)], "c": "text", "d": None}) == 160 + 24
    assert held_bytes([tensor, tensor[2:], tensor.view(-1)]) == 160
    assert held_bytes(nn.Linear(4, 10, bias=False)) == 160


def test_a_measurement_times_the_work_and_not_its_preparation(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def prepare(side):
        now[0] += 0.25

        def work():
            calls.append(side.name)
            now[0] += 0.125
            return torch.zeros(25)

        return work

    found = measure(prepare, SIDE)
    assert len(calls) == 17  # the first, and two seconds of others
    assert found["seconds"] == [0.125] * 16
    assert found["first_seconds"] == 0.125
    assert found["output_bytes"] == 100
    assert set(calls) == {"ours"}


def test_what_takes_long_runs_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work():
        now[0] += 2.5

    assert measure(lambda side: work, SIDE)["seconds"] == [2.5]
    assert now == [2.5]


def test_a_program_speaks_for_itself(monkeypatch):
    """Its own peak and, where it has one, its own time count; how often it runs depends on the time taken here."""
    now = [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(seconds):
        now[0] += 0.5
        return Finished(7, seconds)

    found = measure(lambda side: lambda: work(1e-4), SIDE)
    assert (found["peak_bytes"], found["first_seconds"]) == (7, 1e-4)
    assert found["seconds"] == [1e-4] * 4  # two seconds of runs
    assert measure(lambda side: lambda: work(None), SIDE)["seconds"] == [0.5] * 4


def test_an_unavailable_side_says_why():
    def prepare(side):
        raise NotAvailable("no GPU")

    assert measure(prepare, SIDE) == {"unavailable": "no GPU"}


# --- turns and ratios ------------------------------------------------------------------------------------------------


def run_toy(monkeypatch, row: Row, figures: dict, rounds: int = 3) -> tuple[dict, list[str]]:
    """Runs a row whose processes return these figures: of each side a list, one entry per round, or an error."""
    order: list[str] = []

    def run_child(name, side, settings, point=None):
        order.append(side)
        entry = figures[side]
        return entry if isinstance(entry, dict) else entry[order.count(side) - 1]

    monkeypatch.setattr(runner, "run_child", run_child)
    return runner.run_row(row, ["/x/other"], rounds, SIDE.settings), order


def taken(*seconds: float, peak: int | None = 100, output: int = 50) -> dict:
    return {"seconds": list(seconds), "peak_bytes": peak, "output_bytes": output, "load": 0.0}


def test_sides_take_turns_and_rounds_count_alike(monkeypatch):
    figures = {
        "bound": [taken(1.0), taken(1.0), taken(1.0)],
        "ours": [taken(2.0, 2.0, 2.0, 2.0), taken(3.0), taken(9.0, 9.0)],
        "/x/other": {"error": "Traceback\nValueError: no"},
    }
    found, order = run_toy(monkeypatch, toy(goals=(Goal(2.5, "bound"), Goal(1.5, "output", "peak"))), figures)
    assert order == ["bound", "ours", "/x/other", "bound", "ours", "bound", "ours"]
    assert found["sides"]["ours"]["seconds"] == 3.0
    assert found["sides"]["/x/other"]["error"].endswith("no")
    assert [(goal["found"], goal["met"]) for goal in found["goals"]] == [(3.0, False), (2.0, False)]


def test_rows_whose_runs_differ_get_more_rounds(monkeypatch):
    figures = {"ours": [taken(float(seconds)) for seconds in (1, 9, 2, 9, 2)]}
    row = replace(toy(("ours",)), min_rounds=5)
    found, order = run_toy(monkeypatch, row, figures, rounds=1)
    assert (len(order), found["sides"]["ours"]["seconds"]) == (1, 1.0)  # a quick run measures nothing
    monkeypatch.setattr(sys.modules[__name__], "SIDE", Side("ours", Settings()))
    found, order = run_toy(monkeypatch, row, figures, rounds=1)
    assert (len(order), found["sides"]["ours"]["seconds"]) == (5, 2.0)


@pytest.mark.parametrize(
    ("goal", "found", "met"),
    [
        (Goal(0.5, "bound"), 0.5, True),
        (Goal(0.4, "bound"), 0.5, False),
        (Goal(1.0, "bound", "peak"), 0.1, True),
        (Goal(2.0, "output", "peak"), 1.25, True),
        (Goal(2.0, "over output", "peak"), 2, True),
        (Goal(1.0, "native"), None, None),
    ],
)
def test_goals(monkeypatch, goal, found, met):
    figures = {
        "bound": [taken(2.0, peak=100)],
        "ours": [taken(1.0, peak=10, output=8)],
        "native": {"unavailable": "-"},
    }
    row = toy(("bound", "ours", "native"), (goal,))
    result, _ = run_toy(monkeypatch, row, figures, rounds=1)
    assert (result["goals"][0]["found"], result["goals"][0]["met"]) == (found, met)


def test_a_process_that_fails_is_reported(monkeypatch, tmp_path):
    found = runner.run_child("no such row", "ours", Settings(cache=tmp_path))
    assert "KeyError" in found["error"]


# --- bounds and growth -----------------------------------------------------------------------------------------------


def test_products_are_those_of_the_forward_pass():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.zeros(3, 5, 4)

    def forward():
        hidden = model(inputs)
        nn.functional.scaled_dot_product_attention(hidden[:, None], hidden[:, None], hidden[:, None])

    with torch.no_grad():
        products = Products.from_forward(model, forward)
        assert [(rows, tuple(weight.shape)) for rows, weight in products.linear] == [(15, (6, 4)), (15, (2, 6))]
        assert products.attention == ((torch.Size((3, 1, 5, 2)), torch.Size((3, 1, 5, 2))),)
        products.work()()
        assert len(Products.from_forward(model, forward, attention=False).attention) == 0


def test_weights_that_every_token_needs_are_read(monkeypatch):
    """Matrices as often as there are tokens; embedding tables, vision and vectors never."""
    read = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda weight: read.append(tuple(weight.shape)))
    monkeypatch.setattr(torch, "mv", lambda weight, zeros: read.append(tuple(weight.shape)))
    model = nn.ModuleDict({"blocks": nn.Linear(4, 6), "embedding": nn.Embedding(9, 4), "vision": nn.Linear(4, 4)})
    run = weight_reads(model, 3)
    read.clear()
    run()
    assert read == [(6, 4)] * 3


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponents(power):
    points = [1, 10, 100, 1000]
    assert exponent(points, [3 * n**power for n in points]) == pytest.approx(power)


def test_a_start_does_not_hide_linear_growth():
    points = [1, 100, 200, 400]
    fit = linear_fit(points, [5 + 2 * n for n in points])
    assert (fit["start"], fit["slope"], fit["explained"]) == pytest.approx((5, 2, 1))
    assert linear_fit(points, [n**3 for n in points])["explained"] < 0.95


def curve_figures(power: float = 1.0) -> dict:
    curve = Curve("Toys", "toys", (1, 2, 4), ("seconds",), lambda side, point: lambda: None)
    return growth(curve, [{"point": n, "seconds": 0.1 * n**power, "peak_bytes": 10**6 * n} for n in curve.points])


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch) -> dict:
    figures = {
        "bound": [taken(0.5)],
        "ours": [taken(1.0, peak=3 * 10**9)],
        "native": {"unavailable": "no torchvision"},
        "/x/other": {"error": "Traceback\nValueError: odd"},
    }
    row, _ = run_toy(monkeypatch, toy(("bound", "ours", "native", "peer"), (Goal(1.5, "bound"),)), figures, rounds=1)
    about = {"processor": "a processor", "gpu": None, "cores": 2, "torch": "2.13"}
    return {"machine": about, "threads": 2, "rows": [row], "curves": {"toys": curve_figures()}}


def test_the_table(results):
    lines = report.table(results).splitlines()
    assert lines[0] == "| row | bound | ours | native | other | peak of ours | of native | goals |"
    assert lines[2] == "| a toy | 500 ms | 1 s | - | - | 3.00 GB | - | 2 of bound (at most 1.5) ✗ |"
    assert "- toy, native: no torchvision" in lines
    assert "- toy, other: failed, ValueError: odd" in lines
    assert "- Bound of toy: nothing." in lines
    assert any("time ~ n^1.00, linear fit 1.000 (should be at most linear)" in line for line in lines)


def test_the_readme_keeps_its_text(results, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(report, "README", readme)
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    plot = tmp_path / "growth.png"
    report.main([str(tmp_path / "results.json"), "--readme", "--curves", str(plot)])
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert report.table(results) in text
    assert 500 < plot.stat().st_size < 50_000


def test_the_readme_has_a_place_for_results():
    text = report.README.read_text(encoding="utf-8")
    assert text.count(report.START) == text.count(report.END) == 1


# --- throughput and scaling ------------------------------------------------------------------------------------------

# Passes of two workers: (start, end, answers); the second one begins later and ends earlier.
LANES = [[(0.0, 2.0, 4), (2.0, 6.0, 4)], [(1.0, 3.0, 4), (3.0, 5.0, 4)]]


def test_rates_are_those_of_the_time_in_which_all_are_busy():
    assert throughput.busy_span(LANES) == (1.0, 5.0)
    assert throughput.answered_within(LANES, 1.0, 5.0) == pytest.approx(2 + 3 + 4 + 4)
    assert throughput.rates(LANES, 10) == pytest.approx({"requests": 13 / 4, "tokens": 130 / 4, "measured_seconds": 4})
    assert throughput.rates(LANES[:1], 10)["requests"] == pytest.approx(8 / 6)


@pytest.mark.parametrize(
    ("spans", "share"),
    [([], 1.0), ([(0, 10)], 0.0), ([(2, 4), (3, 5), (8, 20)], 0.5), ([(8, 9), (-5, 1), (0, 4), (2, 3)], 0.5)],
)
def test_time_outside_of_spans(spans, share):
    assert throughput.uncovered(spans, 0, 10) == pytest.approx(share)


def test_the_table_of_throughput(tmp_path):
    figures = {"requests": 2.0, "range": (1.5, 2.25), "tokens": 40.0, "answers": 66, "whole_seconds": 33.0}
    found = {
        "one-by-one": {**figures, "texts": {"0": "a", "1": "b"}},
        "workers-1": {**figures, "requests": 3.0, "outside": 0.034, "texts": {"0": "a", "1": "c"}},
        "ray-2": {"error": "no | Ray"},
    }
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- throughput -->\nold\n<!-- end of throughput -->\nafter\n", encoding="utf-8")
    throughput.replace_table(page, "throughput", throughput.markdown(found))
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[5] == "| `ask`, one by one | 2.0 (1.5 to 2.2) | 40 |  | 66 in 33 s |  | 2 of 2 |"
    assert lines[6].startswith(
        "| `molmo2 batch`, 1 worker | 3.0 (1.5 to 2.2) | 40 | 1.50 of one-by-one | 66 in 33 s | "
    )
    assert lines[6].endswith(" | 3.4% | 1 of 2 |")
    assert "no / Ray" in lines[7]
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)
    with pytest.raises(ValueError, match="has no place for the table"):
        throughput.replace_table(page, "scaling", "")


def test_the_round_of_the_median_rate_counts():
    rounds = [{"vllm-1": {"requests": rate, "round": number}} for number, rate in enumerate((5.0, 1.0, 3.0))]
    assert throughput.median_of(rounds) == {"vllm-1": {"requests": 3.0, "round": 2, "range": (1.0, 5.0)}}
    rounds[1]["vllm-1"] = {"error": "no end"}
    assert throughput.median_of(rounds) == {"vllm-1": {"error": "no end"}}


def test_a_side_on_one_core(tmp_path, monkeypatch):
    confined, sides = [], []
    monkeypatch.setattr(os, "sched_setaffinity", lambda *arguments: confined.append(arguments), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3}, raising=False)
    monkeypatch.setattr(throughput, "table_of", lambda work, times: work)
    monkeypatch.setattr(throughput, "_workers", lambda *arguments: sides.append(arguments))
    throughput.run_side("core-1", tmp_path, None)
    assert (confined, sides) == ([(0, [3])], [("core", 1, tmp_path, tmp_path)])


@pytest.mark.parametrize(("page", "name"), [("benchmarks/README.md", "throughput"), ("docs/batch.md", "scaling")])
def test_the_pages_have_places_for_the_tables(page, name):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end of {name} -->") == 1


@pytest.mark.parametrize("side", ["one-by-one", "workers-2"])
def test_a_side_of_the_throughput(tmp_path, monkeypatch, side):
    """Few questions, real answers, workers that keep the time; the environments are those of the test."""
    monkeypatch.setattr(throughput, "QUESTIONS_ABOUT_IMAGES", 4)
    monkeypatch.setattr(throughput, "MAX_NEW_TOKENS", 4)
    monkeypatch.setitem(throughput.SIDES, side, ("", "dev", None, 6))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), *sys.path]))
    throughput.prepare(tmp_path)
    found = throughput.run_side(side, tmp_path, None)
    assert found["answers"] == 6 * len(found["texts"]) == 36
    assert 0 < found["measured_seconds"] <= found["whole_seconds"]
    assert found["tokens"] > found["requests"] > 0
    # Of so few questions one worker may have answered all before the other one was ready.
    assert side == "one-by-one" or (found["workers"] in (1, 2) and 0 <= found["outside"] < 1)


# Nothing varies, and nothing but decoding and the model takes time.
PLAIN = scaling.Costs(
    block_seconds=0, row_seconds=0, list_seconds=0, decode_seconds=0.25, decode_cpu_seconds=1, model_seconds=0.5,
    result_bytes=0, clip_bytes=0, variation=0, cores_per_gpu=4, weight_bytes=0, load_seconds=0, batch=2, window=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "seconds", "limit"),
    [
        ({}, 4 * (2 * 0.25 + 8 * 0.5), "GPUs"),  # four blocks; of each, the first batch is decoded while the GPU waits
        ({"decode_cpu_seconds": 4}, 4 * (8 * 1.0 + 2 * 0.5), "decoding"),
        ({"load_seconds": 7}, 7 + 18, "GPUs"),
        ({"clip_bytes": 1e9, "storage_rate": 1e9}, 64 + 2 * 0.5, "storage"),  # one after the other, for both GPUs
        ({"row_seconds": 1.0}, 4.5 + 64, "driver"),
        ({"result_bytes": 1e9, "driver_rate": 1e9}, 4.5 + 64, "objects"),
        ({"workers_per_gpu": 2, "cores_per_gpu": 8}, 32 * 0.5, "GPUs"),
    ],
)
def test_a_simulated_run_takes_what_its_parts_take(change, seconds, limit):
    found = scaling.simulate(2, replace(PLAIN, **change), rows=64)
    assert found.seconds == pytest.approx(seconds)
    assert found.limit == limit
    assert all(0 <= share <= 1 + 1e-9 for share in found.busy.values())


def test_growth_ends_where_the_driver_does(tmp_path):
    costs = replace(PLAIN, row_seconds=0.02)
    rates = [scaling.simulate(gpus, costs, rows=20_000).rate for gpus in (8, 16, 64, 128)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.05)
    assert rates[2] == pytest.approx(50, rel=0.05)
    assert rates[3] == pytest.approx(50, rel=0.05)


def test_curves_and_table_of_the_simulation(tmp_path, capsys):
    assert scaling.main(["--gpus", "8", "64", "--rows", "2000", "--curves", str(tmp_path / "plot.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(scaling.CASES)
    assert all(re.fullmatch(r"\| [^|]+( \| \d+ \([\d.]+\) \w+){2} \|", line) for line in lines[2:])
    assert 2_000 < (tmp_path / "plot.png").stat().st_size < 50_000


# --- from end to end -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_row_from_end_to_end(tmp_path):
    """Real processes, a made-up checkpoint, this repository as its own peer; native may or may not be available."""
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--cache", str(tmp_path / "cache")]
    command += ["--rows", "vision", "--peer", str(REPOSITORY), "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=850)  # a dozen processes
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(output.read_text(encoding="utf-8"))["rows"]
    for side in ("bound", "ours", str(REPOSITORY)):
        assert row["sides"][side]["seconds"] > 0
    native = row["sides"]["native"]
    assert "seconds" in native or native["unavailable"]
    assert row["sides"]["ours"]["output_bytes"] == 512 * 4  # the logits of one place
    assert report.table(json.loads(output.read_text(encoding="utf-8")))


def test_profiles_name_what_takes_the_time(tmp_path, capsys):
    output = tmp_path / "profiles.md"
    assert profile.main(["photo-8", "--quick", "--threads=1", f"--cache={tmp_path}", f"--output={output}"]) == 0
    line = output.read_text(encoding="utf-8").splitlines()[-1]
    assert re.fullmatch(r"\| photo-8 \| [\d.]+ \w+ \| (\d+% `[^`|]+` \([\d,]+\)(, )?)+ \|", line)
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("~", 0, "<built-in method torch._C._nn.linear>"), "`linear`"),
        (("~", 0, "<method 'gather' of 'torch._C.TensorBase' objects>"), "`gather`"),
        (("/a/modeling_molmo2.py", 12, "rows"), "`modeling_molmo2.rows`"),
        (("/a/pixels.py", 12, "<dictcomp>"), "`pixels.<dictcomp>`"),  # a frame of its own before 3.12
        (("<string>", 2, "<lambda>"), "`<string>.<lambda>`"),
    ],
)
def test_names_in_profiles(place, name):
    assert profile.name_of(place) == name


def test_profiles_share_the_time_among_functions():
    def waiting():
        for _ in range(3):
            time.sleep(0.05)

    run = cProfile.Profile()
    run.runcall(waiting)
    total, (most, *_) = profile.shares(run)
    assert total >= 0.15
    assert (most[0], most[2]) == ("`sleep`", 3)


def test_rows_that_miss_their_goal_are_profiled(tmp_path, monkeypatch):
    rows = [{"row": str(met), "goals": [{"met": True}, {"met": met}]} for met in (True, False, None)]
    (tmp_path / "cpu.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    monkeypatch.setattr(profile, "RESULTS", tmp_path / "cpu.json")
    assert profile.missed() == ["False"]


# --- what a request costs --------------------------------------------------------------------------------------------


def multiply_adds(forward) -> int:
    """Of the linear layers in a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    counted = counter.get_flop_counts()["Global"]
    return sum(number for kind, number in counted.items() if str(kind) in ("aten.mm", "aten.addmm")) // 2


def test_the_multiply_adds_of_a_prompt_and_of_its_images():
    model, inputs = build_model("qwen3"), batch("text")
    length = inputs["input_ids"].shape[1]
    expected = length * cost.matrices(model.get_decoder()) + cost.matrices(model.lm_head)
    assert multiply_adds(lambda: model(**inputs, use_cache=True, logits_to_keep=1)) == expected
    shape = RequestShape(0, 0, 0, 1, length)
    text = model.config.text_config
    pairs = length * (length + 1) * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    assert cost.prefill(model, shape).products == length * cost.matrices(model.get_decoder()) + pairs

    crops, patches = 2, 49
    pixels, pooling = torch.zeros(crops, patches, 588), torch.arange(crops * patches).unflatten(0, (-1, 7))
    shape = RequestShape(crops, len(pooling), 7, 1, 0)
    tower = model.config.vit_config
    counted = multiply_adds(lambda: model.vision_backbone(pixels, pooling))
    found = cost.vision(model, shape).products
    pairs = crops * 2 * patches**2 * tower.num_attention_heads * tower.head_dim * tower.num_hidden_layers
    assert counted <= found <= 1.3 * counted + pairs


def test_visual_tokens_see_each_other_in_both_directions():
    """As many pairs as the mask of training has."""
    visual = torch.tensor([[False, True, True, False, True, True, True, False]])
    place = torch.arange(8)
    seen = mask_mod(AttentionSpec(is_visual=visual))(torch.tensor(0), torch.tensor(0), place[:, None], place)
    assert cost.pairs(RequestShape(1, 2 * 5, 9, 2, 8)) == seen.sum()  # of each of two rows


def test_a_token_reads_weights_and_what_is_cached():
    model = build_model("qwen3")
    text = model.config.text_config
    short, long = (cost.decode(model, RequestShape(0, 0, 0, 2, length)).bytes for length in (10, 110))
    assert long - short == 100 * 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    once = cost.decode(model, RequestShape(0, 0, 0, 0, 10))
    assert once.bytes == 4 * (cost.matrices(model.get_decoder()) + cost.matrices(model.lm_head))


def test_products_of_few_rows_have_a_speed_of_their_own():
    speeds = cost.Speeds("any", products=1e12, bytes=1e12, few_rows={4: 1e9})
    assert cost.Work(1e9, 0, rows=4).seconds(speeds) == 1
    assert cost.Work(1e9, 0, rows=512).seconds(speeds) == 1e-3


def test_the_page_has_the_tables():
    page = (REPOSITORY / "docs" / "cost.md").read_text(encoding="utf-8")
    assert cost.tables().strip() == page.split("<!-- tables -->")[1].split("<!-- end of tables -->")[0].strip()


@pytest.mark.slow
def test_the_check_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "measured_speeds", lambda: cost.Speeds("any", 1e9, 1e9))
    lines = cost.check(Settings(quick=True, cache=tmp_path)).splitlines()
    assert len(lines) == 2 + 2 + 1 + 1 + 2


# --- a day with a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gpu_day_without_a_gpu(tmp_path):
    """Every step with a small model on the pretend device; what needs kernels is left out by name."""
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--pretend", "--cache", str(tmp_path)]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads(output.read_text(encoding="utf-8"))["steps"]
    assert list(steps) == [step.title for step in gpu_day.STEPS]
    left_out = {
        title for title, found in steps.items() if "not measured" in found["ours" if "ours" in found else "vllm"]
    }
    assert {title for title in left_out if not re.search("flex|flash|vLLM", title)} == set()
    assert steps["kernels for each token"]["ours"]["kernels"] > 10
    assert done.stdout.count("| ours: ") == len(steps)


def test_a_gpu_day_ends_in_time(tmp_path, capsys):
    assert gpu_day.main(["--pretend", "--minutes", "0", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("skipped: ") == len(gpu_day.STEPS)


def test_an_error_of_a_gpu_day_is_one_row_of_the_table_and_whole_in_the_json(tmp_path, capsys, monkeypatch):
    text = "a | b\n" + "line\n" * 400 + "the end"

    def fails(day):
        raise RuntimeError(text)

    def fails_beside(day):
        """The side that is compared with runs out of memory."""
        day.models.update(ours=None, native=None)
        return day.each(lambda name, _: (lambda: None) if name == "ours" else lambda: fails(day))

    steps = (gpu_day.Step("one", fails, 0), gpu_day.Step("two", fails_beside, 0))
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    output = tmp_path / "gpu.json"
    assert gpu_day.main(["--pretend", "--output", str(output), "--cache", str(tmp_path)]) == 1
    found = json.loads(output.read_text(encoding="utf-8"))["steps"]
    assert found["one"]["ours"]["failed"] == found["two"]["native"]["failed"] == f"RuntimeError: {text}"
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| (one|two) \|", line)]
    assert len(rows) == 2
    for row in rows:
        assert row.count("|") == 4
        assert "failed RuntimeError: a / b line" in row
        assert "line the end |" in row
        assert len(row) < 400


def test_the_memory_table_is_what_is_computed():
    """docs/quantization.md prints what `python -m benchmarks.fits` does."""
    page = (REPOSITORY / "docs" / "quantization.md").read_text(encoding="utf-8")
    lines = fits.table()
    assert "\n".join(lines) in page
    assert len(lines) == 2 + len(fits.MODELS) * len(fits.PRECISIONS)


def test_weights_of_the_memory_table_are_the_published_ones():
    """Of 4B and O-7B, whose tensors are listed."""
    for name in ("Molmo2-4B", "Molmo2-O-7B"):
        tensors = json.loads((fits.PUBLISHED / name / "tensors.json").read_text(encoding="utf-8"))
        listed = sum(math.prod(entry["shape"]) * entry.get("layers", 1) for entry in tensors.values())
        assert sum(parameter.numel() for parameter in fits.published(name).parameters()) == listed
