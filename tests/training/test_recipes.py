"""Recipes: what is read and refused, a run in two processes, runs that are continued, scores on the way."""

import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from molmo2 import recipes
from molmo2.cli.commands import molmo2
from molmo2.data import SFT_GROUPS
from molmo2.recipes import RecipeError, answer_examples, read_recipe
from molmo2.recipes.recipe import Rates, recipe_from
from molmo2.recipes.rows import media_resolver, read_rows
from molmo2.recipes.run import _mixture, _require_divisible, rate_curve, train
from molmo2.registration import load
from molmo2.training import build_training_example
from support.checkpoints import make_image, write_checkpoint
from support.ports import free_port
from support.ranks import run_ranks
from support.recipe_processes import asked_model, questions, recorded, recording

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "support" / "recipe_processes.py"
MINIMAL = {"model": "model", "output": "run", "steps": 4, "data": [{"name": "a", "files": "a.jsonl"}]}
RECIPE = """\
model: model
output: run
steps: 4
rows_per_step: 2
max_tokens: 300
max_crops: 8
pool_size: 4
learning_rates: {vision: 1e-4, connector: 1e-3, text: 0.001}
warmup_steps: {connector: 2}
processor: {max_crops: 1}
save_every: 2
log_every: 1
data:
  - {name: boats, files: boats.jsonl, group: pointing}
  - {name: text, files: ["text*.json"], group: nlp, size: 9}
  - {name: counts, files: counts.jsonl, reader: allenai/pixmo-points, media: images, group: pointing}
groups: {pointing: 2, nlp: 1}
evaluation:
  - {reader: allenai/pixmo-count, files: questions.jsonl, media: images, every: 2}
"""


def turn(role, text, *parts):
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "model", "qwen3", remote_code=False)


@pytest.fixture
def folder(tmp_path, checkpoint):
    """A folder with a recipe, a tiny model and rows of three kinds."""
    (tmp_path / "model").symlink_to(checkpoint)
    (tmp_path / "images").mkdir()
    for name in ("one", "two", "three"):
        Image.new("RGB", (60, 40), "navy").save(tmp_path / "images" / f"{name}.png")
    shown = {"type": "image", "image": str(tmp_path / "images" / "one.png")}
    boat = turn("assistant", '<points coords="1 1 250 400">boat</points>')
    lines(
        tmp_path / "boats.jsonl", [{"messages": [turn("user", f"Point to boat {n}.", shown), boat]} for n in range(5)]
    )
    talk = [{"messages": [turn("user", f"What is {n}?"), turn("assistant", "A number.")]} for n in range(4)]
    (tmp_path / "text_1.json").write_text(json.dumps(talk), encoding="utf-8")
    pixmo = {"points": [{"x": 10.0, "y": 20.0}], "count": 1, "collection_method": "pointing", "label": "boat"}
    lines(tmp_path / "counts.jsonl", [{"image_url": name, **pixmo} for name in ("one", "two", "gone")])
    lines(
        tmp_path / "questions.jsonl",
        [{"image_url": name, "label": "boats", "count": 1} for name in ("one", "two", "three", "gone")],
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def log(folder, output="run", name="log.jsonl"):
    return [json.loads(line) for line in (folder / output / name).read_text().splitlines()]


def losses(folder, output="run"):
    return {entry["step"]: entry["loss"] for entry in log(folder, output) if "loss" in entry}


# --- what a recipe says ----------------------------------------------------------------------------------------------


def test_presets_hold_unless_the_recipe_has_its_own():
    sft = recipe_from({**MINIMAL, "preset": "sft", "learning_rates": {"text": 2e-5}, "processor": {"max_crops": 24}})
    assert (sft.steps, sft.max_tokens, sft.rows_per_step) == (4, 16_384, 128)
    assert sft.learning_rates == Rates(text=2e-5)
    assert sft.processor == {"num_frames": 128, "max_crops": 24}
    assert sft.shares() is None  # no data set names a group
    grouped = [{"name": "a", "files": "a.jsonl", "group": "demo"}]
    assert recipe_from({**MINIMAL, "preset": "sft", "data": grouped}).shares() == {"demo": SFT_GROUPS["demo"]}
    unused = recipe_from({**MINIMAL, "groups": {"a": 1.0}})
    assert unused.shares() == {"a": 1.0}  # which the mixture refuses: no data set has that group
    first = recipe_from({key: value for key, value in MINIMAL.items() if key != "steps"} | {"preset": "pretrain"})
    assert (first.steps, first.learning_rates.connector) == (31_000, 2e-4)
    assert [first.warmup_of(part) for part in ("vision", "connector", "text")] == [2000, 200, 2000]


def test_presets_are_the_stages_of_the_release():
    grouped = [{"name": name, "files": "a.jsonl", "group": name} for name in ("captions", "pointing", "nlp")]
    first = recipe_from({"model": "model", "output": "run", "preset": "pretrain", "data": grouped})
    assert first.shares() == {"captions": 0.6, "pointing": 0.3, "nlp": 0.1}
    assert (first.steps, first.rows_per_step, first.max_tokens) == (31_000, 128, 2536)
    assert first.learning_rates == Rates(vision=6e-6, connector=2e-4, text=2e-5)
    sft, last = (
        recipe_from({key: value for key, value in MINIMAL.items() if key != "steps"} | {"preset": name})
        for name in ("sft", "long-context")
    )
    for stage, tokens, frames in ((sft, 16_384, 128), (last, 36_864, 384)):
        assert (stage.rows_per_step, stage.max_tokens, stage.processor) == (128, tokens, {"num_frames": frames})
        assert stage.learning_rates == Rates(vision=5e-6, connector=5e-6, text=1e-5)
        assert (stage.final_rate, stage.pool_size) == (0.1, 48)
        assert [stage.warmup_of(part) for part in ("vision", "connector", "text")] == [200, 200, 200]
    assert (sft.steps, last.steps) == (30_000, 2000)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"step": 3}, r"there is no entry 'step' \(did you mean steps\?\)"),
        (
            {"tensor_parallel": 2},
            r"tensor_parallel: recipes do not cut .* `molmo2\.training\.tensor_parallel`",
        ),
        ({"pipeline": 2}, r"pipeline: recipes do not cut .* `molmo2\.training\.Pipeline` in a loop"),
        ({"pipeline_parallel": 2}, r"pipeline_parallel: recipes do not cut .* `molmo2\.training\.Pipeline` in a loop"),
        (
            {"parallel": {"tensor": 2}},
            r"parallel: recipes do not cut .* `molmo2\.training\.tensor_parallel` in a loop",
        ),
        ({"trainer": {"parallelism_config": {"tp_size": 2}}}, "trainer has parallelism_config, which other entries"),
        ({"data": []}, "data is empty"),
        ({"data": [{"name": "a"}]}, r"data\[0\]: files is missing"),
        (
            {"data": [{"name": "a", "files": "a", "reader": "allenai/pixmo-point"}]},
            r"did you mean allenai/pixmo-points",
        ),
        ({"data": [{"name": "a", "files": "a", "media": "b"}]}, "belong to a `reader`"),
        ({"data": [{"name": "a", "files": 3}]}, r"data\[0\].files is 3; expected a list"),
        ({"steps": "many"}, "steps is 'many'; expected a whole number"),
        ({"steps": 0}, "steps is 0; expected more than 0"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"learning_rates": {"text": "fast"}}, "learning_rates.text is 'fast'; expected a number"),
        ({"learning_rates": {"llm": 1e-5}}, "learning_rates: there is no entry 'llm'"),
        ({"warmup_steps": {"llm": 2}}, "warmup_steps is llm; expected vision, connector, text"),
        ({"train": ["llm"]}, "train is llm; expected vision, connector, text"),
        ({"preset": "stf"}, r"did you mean sft\?"),
        ({"weighting": "sqrt"}, "weighting is sqrt; expected report"),
        ({"evaluation": {"reader": "mmmu", "files": "a"}}, r"evaluation\[0\]: reader is 'mmmu'; expected one of"),
        ({"trainer": {"max_steps": 3}}, "trainer has max_steps, which other entries"),
        ({"lora": {"rank": 0}}, "lora: rank is 0"),
        ({"preset": ["sft"]}, r"preset is \['sft'\]"),
        ({"learning_rates": {"betas": [0.9]}}, r"betas is \[0\.9\]; expected two numbers"),
        ({"warmup_steps": -5}, "warmup_steps is -5; expected 0 or more"),
        ({"dtype": "float16"}, "dtype is float16; expected float32"),
        ({"trainer": {"save_only_model": True}}, "trainer has save_only_model"),
    ],
)
def test_what_a_recipe_cannot_say(entries, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from({**MINIMAL, **entries})


def test_what_the_package_offers_are_no_modules():
    """`train` was once the name of a module too."""
    assert all(callable(getattr(recipes, name)) for name in recipes.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        recipes.trian  # noqa: B018


def test_files_that_are_no_recipes(tmp_path):
    for content in ("steps: [", "- steps", "x" * (1 << 21), "a: &a [*a]\nb: !!python/object:os.system {}"):
        (tmp_path / "recipe.yaml").write_text(content)
        with pytest.raises(RecipeError, match=r"recipe\.yaml"):
            read_recipe(tmp_path / "recipe.yaml")


def test_rates_rise_and_fall():
    curve = rate_curve(4, 12, 0.1)
    assert [curve(step) for step in (0, 1, 4, 8, 12, 99)] == pytest.approx([0, 0.25, 1, 0.55, 0.1, 0.1])
    assert rate_curve(0, 2, 0.5)(0) == 1


def test_rows_and_media_that_are_not_there(folder):
    assert len(read_rows(["text*.json", "boats.jsonl"], folder)) == 9
    with pytest.raises(RecipeError, match="there is no file 'none'"):
        read_rows(["none"], folder)
    with pytest.raises(RecipeError, match=r"files end with \.png"):
        read_rows(["images/*.png"], folder)
    (folder / "run[1]").mkdir()
    (folder / "run[1]" / "A.JSONL").write_text('{"a": 1}\n{"a": 2}\n')
    assert len(read_rows(["*.JSONL"], folder / "run[1]")) == 2
    (folder / "broken.jsonl").write_text('{"a": 1}\n{"a":')
    with pytest.raises(RecipeError, match=r"broken\.jsonl' cannot be read"):
        read_rows(["broken.jsonl"], folder)
    (folder / "broken.jsonl").write_text("3\n")
    with pytest.raises(RecipeError, match="something else than rows"):
        read_rows(["broken.jsonl"], folder)
    with pytest.raises(RecipeError, match="neither a folder nor a file"):
        media_resolver(["none"], folder)


def test_settings_of_readers(folder):
    """Those that are functions are no entries; images of rows with points in pixels are measured in their folder."""
    Image.new("RGB", (200, 100)).save(folder / "images" / "harbour.png")
    counted = {"label": "boats", "count": 2, "points": {"x": [100.0, 20.0], "y": [20.0, 90.0]}}
    lines(folder / "pixels.jsonl", [{"image_url": name, **counted} for name in ("harbour", "gone", "http://images/1")])
    entry = {"name": "counts", "files": "pixels.jsonl", "reader": "allenai/pixmo-count", "media": "images"}
    said = []
    mixture = _mixture(read_recipe(folder / "recipe.yaml", data=[entry], groups=None), said.append)
    assert said[0].startswith("allenai/pixmo-count: 3 rows, 1 examples, 2 left out: 1 because")
    ((_, answer),) = [example["messages"] for example in mixture.sources["counts"]]
    assert '"1 1 100 900 2 500 200"' in answer["content"][0]["text"]
    for name in ("image_size", "frame_times", "min_scores"):
        changed = {**entry, "settings": {name: 3}}
        with pytest.raises(RecipeError, match=f"data 'counts': settings have no '{name}'; they are .*min_score"):
            _mixture(read_recipe(folder / "recipe.yaml", data=[changed]), said.append)
    wrong = {**entry, "settings": {"max_clip_seconds": None}}
    with pytest.raises(RecipeError, match=r"data 'counts': `Settings.max_clip_seconds` is None; expected a number"):
        _mixture(read_recipe(folder / "recipe.yaml", data=[wrong]), said.append)
    listed = {**entry, "settings": {"excluded_ids": ["a"], "max_clip_seconds": float("inf")}}
    assert len(_mixture(read_recipe(folder / "recipe.yaml", data=[listed], groups=None), said.append).sources) == 1


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line(folder):
    done = CliRunner().invoke(molmo2, ["train", str(folder / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    assert "allenai/pixmo-points: 3 rows, 2 examples, 1 left out" in done.output
    assert "text: 4 examples, 33.3 % of the mixture" in done.output
    assert set(losses(folder)) == {1, 2, 3, 4}
    assert all(loss > 0 for loss in losses(folder).values())
    scores = log(folder, name="scores.jsonl")
    assert [(entry["step"], entry["examples"]) for entry in scores] == [(2, 3), (4, 3)]
    assert set(scores[0]["scores"]) == {"correct", "close", "valid"}
    assert json.loads((folder / "run" / "model" / "config.json").read_text())["model_type"] == "molmo2"
    assert (folder / "run" / "model" / "chat_template.jinja").is_file()

    again = CliRunner().invoke(molmo2, ["train", str(folder / "recipe.yaml")])
    assert (again.exit_code, "continue it with --resume" in again.output) == (2, True)
    weights = (folder / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "run" / "model")  # as if it had been killed while the model was written
    assert train(read_recipe(folder / "recipe.yaml"), resume=True, say=lambda line: None) == folder / "run" / "model"
    assert (folder / "run" / "model" / "model.safetensors").read_bytes() == weights
    assert not list((folder / "run" / "model").glob("optimizer*"))
    again = CliRunner().invoke(molmo2, ["train", str(folder / "recipe.yaml"), "--resume"])
    assert "has all of its 4 steps" in again.output

    answers = folder / "answers.jsonl"
    asked = ["eval", "allenai/pixmo-count", str(folder / "questions.jsonl"), "--media", str(folder / "images")]
    asked += ["--model", str(folder / "run" / "model"), "--limit", "2", "--max-crops", "1", "--output", str(answers)]
    done = CliRunner().invoke(molmo2, asked)
    assert done.exit_code == 0, done.output
    assert f"correct: {scores[1]['scores']['correct']['mean']:.3f}" in done.output
    assert [json.loads(line)["row"] for line in answers.read_text().splitlines()] == [0, 1]


@pytest.mark.slow
def test_a_stopped_run_has_the_losses_of_one_that_was_not(folder):
    train(read_recipe(folder / "recipe.yaml"), say=lambda line: None)
    own = read_recipe(folder / "recipe.yaml", output="stopped")
    train(own, say=lambda line: None)
    for name in ("checkpoint-4/mixture_state.json",):  # as if it had been killed while the checkpoint was written
        (folder / "stopped" / name).unlink()
    with (folder / "stopped" / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(own, resume=True, say=lambda line: None)
    assert losses(folder, "stopped") == losses(folder)
    assert [entry["step"] for entry in log(folder, "stopped", "scores.jsonl")] == [2, 4]
    other = read_recipe(folder / "recipe.yaml", output="stopped", seed=1, max_tokens=400)
    with pytest.raises(RecipeError, match="another max_tokens, seed"):
        train(other, resume=True)


def test_curves_in_tensorboard(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(read_recipe(folder / "recipe.yaml", report_to=["tensorboard"], evaluation=[]), say=lambda line: None)
    (path,) = (folder / "run").rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(path)).Reload()
    for entry in ("loss", "grad_norm", "learning_rate"):
        tag = f"train/{entry}"
        expected = {line["step"]: line[entry] for line in log(folder) if entry in line}
        assert len(expected) == 4
        assert {each.step: each.value for each in found.Scalars(tag)} == pytest.approx(expected, rel=1e-6), tag


def level_db_records(data, header):
    """The records of a log in LevelDB's format: blocks of 32 KiB, pieces behind checksum, length and kind."""
    place, record = header, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # too short for a piece
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_curves_in_wandb(folder, monkeypatch):
    """Offline: the file that `wandb sync` would send later."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    train(read_recipe(folder / "recipe.yaml", report_to=["wandb"], evaluation=[]), say=lambda line: None)
    wandb.teardown()  # ends the process that writes the file, which `finish` does not wait for
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    found = {}
    for record in level_db_records(path.read_bytes(), header=7):
        items = Record.FromString(record).history.item
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        if "train/loss" in row:
            found[row["train/global_step"]] = row["train/loss"]
    assert len(found) == 4
    assert found == pytest.approx(losses(folder), rel=1e-6)


def test_the_first_examples_on_a_page(folder):
    """Those of the mixture in its order, or all of one data set; what was left out is said."""
    page = folder / "page.html"
    recipe = str(folder / "recipe.yaml")
    done = CliRunner().invoke(molmo2, ["view", recipe, "--number", "5", "--output", str(page)])
    assert done.exit_code == 0, done.output
    assert "allenai/pixmo-points: 3 rows, 2 examples, 1 left out" in done.output
    assert done.output.strip().endswith(str(page))
    text = page.read_text(encoding="utf-8")
    assert text.count('<section id="example-') == 5
    assert "recipe.yaml: 5 examples" in text
    read = read_recipe(recipe)
    drawn = list(itertools.islice(_mixture(read, lambda line: None), 5))
    found, processor = recipes.first_examples(read, 5, say=lambda line: None)
    for example, row in zip(found, drawn, strict=True):
        expected = build_training_example(processor, row["messages"], max_crops=1, max_length=300)
        assert example["input_ids"].equal(expected["input_ids"])
        assert example["loss_weights"].max() > 0  # by the rule of the recipe
    found, _ = recipes.first_examples(read, 9, data="counts", say=lambda line: None)
    assert len(found) == 2
    for wrong, message in (
        (["--data", "ships"], "there is no data set 'ships'; the recipe has boats, text, counts"),
        (["--output", str(folder / "nowhere" / "page.html")], "there is no folder"),
    ):
        done = CliRunner().invoke(molmo2, ["view", recipe, *wrong])
        assert (done.exit_code, message in done.output) == (2, True), done.output
    (folder / "recipe.yaml").write_text(RECIPE.replace("model: model", "model: nowhere"))
    assert CliRunner().invoke(molmo2, ["view", recipe, "--output", str(page)]).exit_code == 3


def test_a_row_without_an_example_is_named(folder):
    """An image that cannot be decoded, an answer behind the last token; no traceback in any case."""

    def view(*options):
        done = CliRunner().invoke(molmo2, ["view", str(folder / "recipe.yaml"), *options])
        assert done.exit_code == 2, (done.output, done.exception)
        return done.output

    (folder / "images" / "two.png").write_bytes(b"no image")
    assert re.search(r"data 'counts', row 1: .*two\.png", view("--data", "counts"))
    long = [turn("user", "What is it? " * 100), turn("assistant", "A number.")]
    (folder / "text_1.json").write_text(json.dumps([{"messages": long}]), encoding="utf-8")
    assert "data 'text', row 0: " in view("--data", "text")
    (folder / "text_1.json").write_text(json.dumps([{"input_ids": [65], "labels": ["B"]}]), encoding="utf-8")
    assert "There is no page of these examples: " in view("--data", "text")
    unwritable = folder / f"{'long' * 100}.html"
    assert f"--output: '{unwritable}' cannot be written" in view("--data", "boats", "--output", str(unwritable))


def test_a_run_names_the_row_that_it_ends_at_and_continues_once_it_is_mended(folder):
    """A row that makes no example, and a question whose image cannot be decoded; no traceback in either case."""
    recipe, image = str(folder / "recipe.yaml"), folder / "images" / "two.png"
    content = image.read_bytes()
    image.write_bytes(b"no image")
    done = CliRunner().invoke(molmo2, ["train", recipe])
    assert done.exit_code == 2, (done.output, done.exception)
    assert re.search(r"(data 'counts', row 1|evaluation with allenai/pixmo-count, row 1): .*two\.png", done.output)
    assert "Mend it, or put another row in its place: with --resume the run continues" in done.output
    asked = ["eval", "allenai/pixmo-count", str(folder / "questions.jsonl"), "--media", str(folder / "images")]
    scores = folder / "scores.jsonl"
    done = CliRunner().invoke(molmo2, [*asked, "--model", str(folder / "model"), "--output", str(scores)])
    assert done.exit_code == 2, (done.output, done.exception)
    assert re.search(r"row 1: .*two\.png.* Mend or remove it\.", done.output)
    assert [json.loads(line)["row"] for line in scores.read_text(encoding="utf-8").splitlines()] == [0]
    image.write_bytes(content)
    done = CliRunner().invoke(molmo2, ["train", recipe, "--resume"])
    assert done.exit_code == 0, done.output
    assert len(losses(folder)) == 4


def test_parts_have_their_own_rates_and_frozen_ones_none(folder):
    recipe = read_recipe(folder / "recipe.yaml", train=["connector"], evaluation=[], steps=2)
    before = torch_weights(folder / "model")
    after = torch_weights(train(recipe, say=lambda line: None))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("image_pooling_2d" in name or "image_projector" in name for name in changed)


def torch_weights(folder):
    from safetensors.torch import load_file

    return {name: value for path in Path(folder).glob("*.safetensors") for name, value in load_file(path).items()}


def test_rows_have_to_fit_the_processes(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="which 3 processes with 1 rows at a time do not divide"):
        train(read_recipe(folder / "recipe.yaml"))
    with pytest.raises(RecipeError, match=r"context_parallel is 2, which does not divide the 3 process"):
        train(read_recipe(folder / "recipe.yaml", context_parallel=2))


@pytest.mark.parametrize("processes", [1, 8, 64])
def test_the_recipe_of_the_docs_fits_the_processes_of_its_commands(processes, tmp_path):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"| {processes}" in text.split("| processes | command |")[1].split("\n\n")[0]
    (recipe,) = re.findall(r"```yaml\n(model: .*?)```", text, re.S)
    (tmp_path / "points.yaml").write_text(recipe, encoding="utf-8")
    _require_divisible(read_recipe(tmp_path / "points.yaml"), processes)


@contextmanager
def started(command, logs):
    """Processes of torchrun, one per file of output; what runs at the end is ended together with its workers.

    Workers are in sessions of their own, which no signal to torchrun's group reaches: torchrun passes SIGTERM on to
    them, and kills those that stay for 30 seconds.
    """
    processes = []
    try:
        for path in logs:
            with path.open("w") as output:
                processes.append(
                    subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
                )
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def torchrun(processes, machines, *arguments):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"),
        *("--local-addr", "127.0.0.1", *arguments),
    ]


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_the_workers_of_torchrun_end_with_it(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "Path(sys.argv[1], f'worker {os.getpid()}').touch()\n"
        "time.sleep(600)\n"
    )
    command = torchrun(2, 1, str(program), str(tmp_path))
    with started(command, [tmp_path / "log.txt"]) as (process,):
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("worker *"))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = [int(path.name.split()[1]) for path in tmp_path.glob("worker *")]
        assert [is_running(worker) for worker in workers] == [True, True], (tmp_path / "log.txt").read_text()
    assert process.returncode != 0
    assert not any(map(is_running, workers))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "shared"),
    [(1, 1), (1, 2), (2, 1)],
    ids=["rows of their own", "rows that they share", "two machines"],
)
def test_two_processes_have_the_losses_of_one(folder, machines, shared):
    """Also where torchrun is started on each machine, with one process, as the docs say for 64 processes."""
    train(read_recipe(folder / "recipe.yaml", evaluation=[]), say=lambda line: None)
    recipe = folder / "two.yaml"
    recipe.write_text(RECIPE.replace("output: run", f"output: two\ncontext_parallel: {shared}"))
    command = torchrun(2 // machines, machines, "-m", "molmo2.cli", "train", str(recipe))
    logs = [folder / f"machine {number}.txt" for number in range(machines)]
    with started(command, logs) as processes:
        codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0] * machines, "".join(path.read_text()[-3000:] for path in logs)
    assert losses(folder, "two") == pytest.approx(losses(folder), rel=1e-4)
    scores = log(folder, "two", "scores.jsonl")
    assert [(entry["step"], entry["examples"]) for entry in scores] == [(2, 3), (4, 3)]
    stopped, whole = (folder / name / "checkpoint-2" / "mixture_state.json" for name in ("two", "run"))
    assert json.loads(stopped.read_text()) == json.loads(whole.read_text())  # continues with the same row


@pytest.mark.slow
def test_four_processes_are_as_one(folder, monkeypatch):
    """Each row is read once, also where one process is killed behind a checkpoint and all go on; losses are those of
    one process, also where pairs share rows; every question is asked, and answered as in one process.
    """
    names = ("one", "two", "three", "gone", "one", "two")
    for place, name in enumerate(names[:3]):
        make_image(60 + 40 * place, 140 - 40 * place, seed=place).save(folder / "images" / f"{name}.png")
    monkeypatch.setattr("molmo2.recipes.run.DataCollator", recording(folder / "alone.jsonl"))
    train(read_recipe(folder / "recipe.yaml", rows_per_step=8, evaluation=[]), say=lambda line: None)
    rows = recorded(folder / "alone.jsonl")[:32]  # of four steps; accelerate reads one ahead
    drawn = [each for row in rows for each in row]
    assert len(set(drawn)) == len(drawn) > 32

    four, pairs, asked = (folder / f"{name}.yaml" for name in ("four", "pairs", "recipe"))
    text = RECIPE.partition("evaluation:")[0].replace("rows_per_step: 2", "rows_per_step: 8")
    four.write_text(text.replace("output: run", "output: four"))
    text = text.replace("output: run", "output: pairs\ncontext_parallel: 2").replace("\nsteps: 4", "\nsteps: 2")
    pairs.write_text(text)
    asks = [{"image_url": name, "label": "boats " * 2**place, "count": 1} for place, name in enumerate(names)]
    lines(folder / "questions.jsonl", asks)
    first, second = folder / "first", folder / "second"
    first.mkdir()
    second.mkdir()
    with pytest.raises(AssertionError):
        run_ranks(PROGRAM, first, 4, (f"stop:{four}",), seconds=200)
    assert (folder / "four" / "was killed").is_file()
    assert not (folder / "four" / "checkpoint-4").exists()
    reports = run_ranks(PROGRAM, second, 4, (f"resume:{four}", f"train:{pairs}", f"ask:{asked}"), seconds=200)

    for rank in range(4):
        own = rows[rank::4]
        assert recorded(first / f"four.{rank}.jsonl")[:4] == own[:4]
        assert recorded(second / f"four.{rank}.jsonl")[:4] == own[4:]
        assert recorded(second / f"pairs.{rank}.jsonl")[:8] == rows[rank // 2 : 16 : 2]
    expected = losses(folder)
    assert losses(folder, "four") == pytest.approx(expected, rel=1e-4)
    assert losses(folder, "pairs") == pytest.approx({step: expected[step] for step in (1, 2)}, rel=1e-4)
    ends = (folder / name / "checkpoint-4" / "mixture_state.json" for name in ("run", "four"))
    assert len({path.read_text() for path in ends}) == 1

    recipe = read_recipe(asked)
    model, processor = asked_model(recipe)
    alone = answer_examples(model, processor, questions(recipe), processor_kwargs=dict(recipe.processor))
    answers = [[each.row, each.answer, each.scores] for each in alone]
    assert [row for row, *_ in answers] == [0, 1, 2, 4, 5]
    assert len({answer for _, answer, _ in answers}) > 1
    assert all(report["answers"] == answers for report in reports)
    assert [len(report["own"]) for report in reports] == [2] * 4
    assert {row for report in reports for row in report["own"]} == {0, 1, 2, 4, 5}


@pytest.mark.slow
def test_adapters_learn_from_a_table(folder):
    datasets, peft = pytest.importorskip("datasets"), pytest.importorskip("peft")
    rows = [json.loads(line) for line in (folder / "counts.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list(rows).to_parquet(folder / "counts.parquet")
    data = [{"name": "counts", "files": "*.parquet", "reader": "allenai/pixmo-points", "media": "images"}]
    changes = {"data": data, "groups": None, "lora": {"rank": 2}, "evaluation": [], "steps": 2}
    adapters = train(read_recipe(folder / "recipe.yaml", **changes), say=lambda line: None)
    weights = torch_weights(adapters)
    assert weights
    assert all("lora_" in name for name in weights)
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    model, processor = load(folder / "model")
    assert peft.PeftModel.from_pretrained(model, adapters).peft_config["default"].lora_alpha == 4
