"""The example that teaches the miniature a new shape: its questions are right, its run ends on time and is kept."""

import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch

from molmo2.training import DataCollator
from support.checkpoints import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples"))

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft")

import finetune_lora  # noqa: E402
from miniature import native  # noqa: E402
from miniature.tokenizer import build  # noqa: E402
from miniature.world import HELD_OUT_SHAPES  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native.write_fresh(tmp_path_factory.mktemp("miniature") / "fresh")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("star", 1), (" stars", 1), ("How many purple stars are there?", 7), ("diamond", 7), (" diamonds", 9)],
)
def test_the_tokenizer_can_write_the_shapes(text, tokens):
    """A star is a word of its own, a diamond is spelled in bytes."""
    tokenizer = build()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == tokens


@pytest.mark.parametrize("shape", HELD_OUT_SHAPES)
def test_questions_about_the_shape(folder, shape):
    _, processor = finetune_lora.load(folder)
    seen = set()
    for number in range(30):
        image = finetune_lora.image_with(shape, np.random.default_rng([1, number]))
        shown = [thing for thing in image.things if thing.kind == shape]
        for question in finetune_lora.about(shape, np.random.default_rng([2, number]), image):
            seen.add(question.task)
            grounding = processor.post_process_grounding(question.answer)
            wanted = [thing for thing in shown if question.target[0] in (None, thing.colour)]
            if question.task in ("point", "count"):
                assert len(grounding) == len(wanted)
                assert grounding.says_none == (not wanted)
                for point in grounding:
                    assert min(np.hypot(point.x_norm - own.x, point.y_norm - own.y) for own in wanted) < 0.002
            elif question.task == "what":
                assert question.answer == shape
                assert [thing.kind for thing in image.things if thing.colour == question.target[0]] == [shape]
            else:
                assert question.answer == str(len(shown))
    assert seen == {"point", "count", "number", "what"}


def test_lessons_are_trees_that_repeat(folder):
    _, processor = finetune_lora.load(folder)
    first, second = (list(itertools.islice(finetune_lora.Lessons(finetune_lora.Plan()), 12)) for _ in range(2))
    batches = [DataCollator(processor)(rows) for rows in (first, second)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert len(batches[0]["image_grids"]) == 12
    assert batches[0]["branch_ids"].max() > 2


def test_the_run(folder, tmp_path, capsys, monkeypatch):
    scores = finetune_lora.main(
        [str(folder), "--output", str(tmp_path / "adapters"), "--minutes", "0.1", "--number", "2"]
    )
    printed = capsys.readouterr().out
    assert "| score | before | after |" in printed
    assert scores["before"].keys() == scores["after"].keys() >= {"right", "pointing", "count"}
    model, processor = finetune_lora.load(folder)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapters")
    assert finetune_lora.scores(adapted, processor, 2) == scores["after"]


def run_notebook(name, monkeypatch, **settings):
    """The cells one after the other, with less of everything; their names, and the notebook as it is stored."""
    notebook = json.loads((REPOSITORY / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(REPOSITORY / "notebooks")
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    names: dict = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), names)
    return names, cells


def test_the_notebook_runs(monkeypatch, capsys):
    names, cells = run_notebook("finetune_lora", monkeypatch, MINUTES="0.05", IMAGES="1")
    assert len(cells) == 7
    assert names["after"].keys() == names["before"].keys()
    assert capsys.readouterr().out.count("| score | before | after |") == 2


def test_the_notebook_of_video_points_runs(monkeypatch, capsys):
    names, cells = run_notebook("video_pointing", monkeypatch, CLIPS="4", ASKED="2")
    printed = capsys.readouterr().out
    assert "allenai/Molmo2-VideoPoint: 4 rows, 4 examples" in printed
    assert "allenai/Molmo2-VideoPointEval: 2 rows, 2 examples" in printed
    assert names["page"].read_text(encoding="utf-8").count('<section id="example-') == 4
    assert len(names["losses"]) == names["trainer"].state.global_step // 5
    stored = "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])
    before, after = (float(value) for value in re.findall(r"(?:before|after): +([\d.]+) \[", stored))
    assert before < 0.5 < 0.75 < after  # of the run that is stored
