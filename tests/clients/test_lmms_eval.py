"""lmms-eval itself asks the miniature, on local rows of the published columns: the scores are ours."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own")

import datasets
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image

from molmo2 import load
from molmo2.data.evaluation import EVALUATION_SETS, evaluation_examples
from molmo2.lmms_eval import TASKS
from molmo2.lmms_eval.model import Molmo2, cut_at, generation_options, message_part
from molmo2.recipes import answer_examples, score
from molmo2.recipes.rows import media_resolver
from support.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples"))

from miniature import native
from miniature.bundle import write_clip
from miniature.evaluate import FRESH_SEED, Example, examples, judge
from miniature.evaluate import score as miniature_score
from miniature.rows import evaluation_rows, even_sides, mask_of
from miniature.world import make_clip, make_image

NUM_ROWS = 6
READERS = {
    "molmo2_pixmo_points": "allenai/pixmo-points-eval",
    "molmo2_pixmo_count": "allenai/pixmo-count",
    "molmo2_pointbench": "PointArena/pointarena-data",
    "molmo2_video_points": "allenai/Molmo2-VideoPointEval",
    "molmo2_video_count": "allenai/Molmo2-VideoCountEval",
    "molmo2_video_tracks": "allenai/Molmo2-VideoTrackEval",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native.to_transformers(native.CHECKPOINT, tmp_path_factory.mktemp("asked") / "miniature")


def image_rows(seed):
    """Rows of the three image sets, about the same images."""
    rows = {name: [] for name in READERS if "video" not in name}
    for number in range(NUM_ROWS):
        drawn = make_image(np.random.default_rng([seed, number]))
        first = drawn.things[0]
        same = [thing for thing in drawn.things if (thing.colour, thing.kind) == (first.colour, first.kind)]
        label, image = f"{first.colour} {first.kind}s", Image.fromarray(drawn.pixels)
        masks = [mask_of(thing, drawn.pixels.shape[:2]) for thing in same]
        points = [{"x": 100 * thing.x, "y": 100 * thing.y} for thing in same]
        rows["molmo2_pixmo_points"].append(
            {"image": image, "label": label, "points": points, "masks": [mask.tolist() for mask in masks]}
        )
        rows["molmo2_pixmo_count"].append({"image": image, "label": label, "count": len(same)})
        mask = Image.fromarray(np.any(masks, axis=0).astype(np.uint8) * 255)
        question = {"user_input": f"Point to the {label}.", "category": first.kind}
        rows["molmo2_pointbench"].append({"image": image, "mask": mask, **question})
    return rows


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The tasks of the package, on local tables in place of the published ones."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "videos").mkdir()
    (folder / "utils.py").write_text((TASKS / "utils.py").read_text())
    rows = image_rows(41)
    for number in range(NUM_ROWS // 2):
        clip = even_sides(make_clip(np.random.default_rng([42, number])))
        write_clip(clip, folder / "videos" / f"clip_{number}.mp4")
        first = clip.movers[0].thing
        for reader, row in evaluation_rows(clip, f"clip_{number}", (first.colour, first.kind)).items():
            rows.setdefault(next(name for name in READERS if READERS[name] == reader), []).append(row)
    for name, own in rows.items():
        datasets.Dataset.from_list(own).to_parquet(folder / f"{name}.parquet")
        lines = (TASKS / f"{name}.yaml").read_text().splitlines()
        (place,) = [place for place, line in enumerate(lines) if line.startswith("dataset_path:")]
        assert lines[place] == f"dataset_path: {READERS[name]}"
        table = json.dumps({"data_files": {"test": str(folder / f"{name}.parquet")}})
        lines[place : place + 1] = ["dataset_path: parquet", f"dataset_kwargs: {table}"]
        (folder / f"{name}.yaml").write_text("\n".join(lines))
    return folder


def expected(folder, tasks, name):
    """The scores of this package, one question at a time."""
    rows = list(datasets.Dataset.from_parquet(str(tasks / f"{name}.parquet")))
    media = media_resolver(["videos"], tasks)
    questions, _ = evaluation_examples(READERS[name], rows, media)
    assert len(questions) == len(rows)
    overall, _ = score(list(answer_examples(*load(folder), questions)))
    return {metric: estimate.mean for metric, estimate in overall.items()}


def test_scores_are_those_of_this_package(folder, tasks, monkeypatch):
    monkeypatch.setenv("MOLMO2_MEDIA", str(tasks / "videos"))
    results = simple_evaluate(
        model="molmo2",
        model_args=f"pretrained={folder}",
        tasks=list(READERS),
        batch_size=4,
        bootstrap_iters=0,
        process_docs_parallel=1,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]
    for name in READERS:
        found = {key.removesuffix(",none"): value for key, value in results[name].items() if key.endswith(",none")}
        for metric, mean in expected(folder, tasks, name).items():
            assert found[metric] == pytest.approx(mean, abs=1e-9), (name, metric)
    assert results["molmo2_pixmo_points"]["f1,none"] > 0.8  # the miniature knows its world
    assert results["molmo2_video_count"]["valid,none"] == 1
    assert results["molmo2_video_points"]["f1,none"] > 0.5
    assert results["molmo2_video_tracks"]["hota,none"] > 0.3


def test_the_table_of_miniature_scores(folder):
    """The questions of `make miniature-scores`, though fewer, have the same scores when lmms-eval's model answers."""
    asked = examples(FRESH_SEED, 12)
    model = Molmo2(str(folder), batch_size=len(asked), device="cpu")
    model.task_dict = {"miniature": {"test": asked}}
    options = {"max_new_tokens": 260}
    requests = [
        SimpleNamespace(args=(example.question.text, Example.message, options, place, "miniature", "test"))
        for place, example in enumerate(asked)
    ]
    found = judge(model.processor, asked, model.generate_until(requests))
    assert found == miniature_score(model.model, model.processor, seed=FRESH_SEED, number=12)
    assert found["pointing"] > 0.8
    assert {"pointing in set", "track found"} <= set(found)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes(folder, tasks, processes, tmp_path):
    """Six questions, which four processes do not divide."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-addr", "127.0.0.1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "lmms_eval", "--model", "molmo2"]
    command += ["--model_args", f"pretrained={folder},device=cpu", "--tasks", "molmo2_pixmo_count"]
    command += ["--include_path", str(tasks), "--batch_size", "2", "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]  # its exit code is 0 even then
    (path,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(path.read_text())["results"]["molmo2_pixmo_count"]
    for metric, mean in expected(folder, tasks, "molmo2_pixmo_count").items():
        assert found[f"{metric},none"] == pytest.approx(mean, abs=1e-9)


def test_every_task_of_the_package_has_a_reader():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert {path.stem for path in TASKS.glob("*.yaml")} == set(manager.all_tasks)
    assert set(READERS) == set(manager.all_tasks)


def test_answers_are_as_long_as_those_of_the_published_evaluation():
    readers = dict(re.findall(r"(\w+), \w+_text, \w+_scores = task\(\"(.+)\"\)", (TASKS / "utils.py").read_text()))
    for path in TASKS.glob("*.yaml"):
        text = path.read_text()
        reader = readers[re.search(r"doc_to_messages: !function utils\.(\w+)", text)[1]]
        assert f"max_new_tokens: {EVALUATION_SETS[reader].max_new_tokens}\n" in text
        assert f"dataset_path: {reader}\n" in text
        assert "until: []" in text


def test_the_entry_point_names_the_model():
    assert get_model("molmo2") is Molmo2


def test_missing_media_are_no_score(folder, tasks, monkeypatch):
    monkeypatch.delenv("MOLMO2_MEDIA", raising=False)
    with pytest.raises(FileNotFoundError, match="MOLMO2_MEDIA"):
        simple_evaluate(
            model="molmo2",
            model_args=f"pretrained={folder}",
            tasks=["molmo2_video_count"],
            process_docs_parallel=1,
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )


def test_parts_and_options():
    assert message_part({"type": "video", "url": "a.mp4", "start_time": 2.0, "max_fps": 2}) == {
        "type": "video",
        "video": "a.mp4",
        "clip": (2.0, None),
        "max_fps": 2,
    }
    assert message_part({"type": "image", "image": "a.png"}) == {"type": "image", "image": "a.png"}
    with pytest.raises(ValueError, match="no input for a part of type 'audio'"):
        message_part({"type": "audio", "url": "a.wav"})
    assert generation_options({"temperature": 0, "top_p": 1.0, "until": ["\n"]}) == {
        "max_new_tokens": 1024,
        "do_sample": False,
    }
    assert generation_options({"temperature": 0.5, "max_new_tokens": 9})["do_sample"] is True
    with pytest.warns(UserWarning, match="image_aspect_ratio are ignored"):
        generation_options({"image_aspect_ratio": "original"})
    assert cut_at("one\n\ntwo. three", ["\n\n", "."]) == "one"
    assert cut_at("one", None) == "one"
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        Molmo2("nowhere", batch_size="auto")
