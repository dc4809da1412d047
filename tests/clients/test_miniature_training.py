"""The training of the miniature: losses fall, and an interrupted run continues as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent.parent
for folder in (REPOSITORY, REPOSITORY / "examples"):
    sys.path.insert(0, str(folder))

from miniature import curves  # noqa: E402
from miniature.train import Lessons, Plan, Trainer  # noqa: E402

PLAN = Plan(minutes=1.0, first_lesson=0.5, images=2, clips=1, sets=1)


@pytest.fixture
def trainer(tmp_path):
    return Trainer(tmp_path / "run", PLAN, seed=0)


def lesson(trainer, passed, step):
    """A batch of the lesson at this share of the run; the clock of the trainer is put there too."""
    lessons = Lessons(trainer.processor, PLAN)
    threads = torch.get_num_threads()
    lessons.clock.fill_(passed)
    trainer.seconds = 60 * PLAN.minutes * passed
    batch = lessons[step]
    torch.set_num_threads(threads)
    return batch


@pytest.mark.parametrize(("passed", "measure"), [(0.0, "patch_colour"), (0.6, "images_loss")])
@pytest.mark.slow
def test_a_repeated_batch_is_fitted(trainer, passed, measure):
    batch = lesson(trainer, passed, 0)
    trainer.step = 100  # warm
    values = [trainer.train_step(batch)[measure] for _ in range(15)]
    if measure.endswith("loss"):
        assert values[-1] < 0.5 * values[0]
    else:
        assert values[-1] > values[0] + 0.2


def test_lessons_of_a_step_are_drawn_again_after_an_interruption(trainer):
    first, again, other = (lesson(trainer, 0.9, step)[0] for step in (4, 4, 5))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert first["input_ids"].shape != other["input_ids"].shape or not torch.equal(
        first["input_ids"], other["input_ids"]
    )


def test_attention_slot_by_slot_gives_the_losses_of_the_whole(trainer):
    for part in lesson(trainer, 0.9, 0):
        split, _ = trainer._second_lesson(part)
        whole, _ = trainer._second_lesson({**part, "slots": torch.tensor([0, part["input_ids"].shape[1]])})
        assert len(part["slots"]) > 2
        torch.testing.assert_close(split, whole)


def test_an_interrupted_run_continues_where_it_was(trainer):
    for step in range(2):
        trainer.train_step(lesson(trainer, 0.9, step))
    trainer.save()
    batch = lesson(trainer, 0.9, 2)
    expected = trainer.train_step(batch)
    resumed = Trainer(trainer.folder, PLAN, seed=1)
    assert (resumed.step, resumed.seconds) == (2, pytest.approx(0.9 * 60))
    assert resumed.train_step(batch) == pytest.approx(expected)
    for (name, left), right in zip(trainer.model.named_parameters(), resumed.model.parameters()):
        torch.testing.assert_close(left, right, msg=name)


def test_what_is_finished_converts_and_holds_the_trained_weights(trainer, tmp_path):
    from miniature import native
    from miniature.evaluate import load

    trainer.train_step(lesson(trainer, 0.9, 0))
    trainer.finish()
    model, _ = load(native.to_transformers(trainer.folder / "checkpoint", tmp_path / "converted"))
    for (name, tuned), shipped in zip(trainer.model.named_parameters(), model.parameters()):
        assert torch.equal(tuned.bfloat16().float(), shipped), name


def test_curves_are_drawn_from_a_log(tmp_path):
    rows = [{"step": i, "minutes": i / 2, "images_loss": 2 / (i + 1), "pointing": i / 10} for i in range(10)]
    rows += [{"step": 7, "minutes": 3.5, "resumed": True}, {**rows[8], "pointing": 0.95}]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    curves.draw(log, tmp_path / "curves.png")
    assert curves.read_curves(log)["pointing"][-2:] == [(3.5, 0.7), (4.0, 0.95)]
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_a_log_without_numbers_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "minutes": 0.0, "resumed": true}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="holds no losses or scores yet"):
        curves.draw(tmp_path / "log.jsonl", tmp_path / "curves.png")


@pytest.mark.slow
def test_the_command_trains_and_writes_the_model(tmp_path):
    """As `make miniature` calls it, in a process of its own that knows nothing of the paths of these tests."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "miniature.train", str(tmp_path / "run"), "--minutes", "0.03"]
    subprocess.run(command, cwd=REPOSITORY / "examples", env=environment, check=True, timeout=250)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoint" / "config.yaml").is_file()
