"""Recipes in several processes: which rows each of them reads, and what it answers.

    python recipe_processes.py OUTPUT RANK WORLD_SIZE JOB:RECIPE [JOB:RECIPE ...]      (jobs: train, stop, resume, ask)

The processes find one another through a file in the output folder. Each writes the rows that it reads while it reads
them, as `OUTPUT/NAME OF THE RECIPE.RANK.jsonl`, and its answers as its report. `stop` kills one process at the head of
the fourth step. One that waits for longer than `SECONDS` writes where it stands and gives up.
"""

import dataclasses
import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import distributed

from molmo2.recipes import read_recipe
from molmo2.recipes import run as training
from molmo2.registration import load
from molmo2.training import DataCollator
from support.checkpoints import without_stopping

SECONDS = 200
KILLED, DONE = 2, 3  # the process that is killed, and the steps before


def recording(path: Path) -> type:
    """A collator that appends each row that it gets to a file: where its examples come from."""

    class Recording(DataCollator):
        def __call__(self, rows: Any) -> Any:
            with path.open("a") as file:
                file.writelines(json.dumps([example["drawn"] for example in row.examples]) + "\n" for row in rows)
            return super().__call__(rows)

    return Recording


def recorded(path: Path) -> list[list[tuple]]:
    """The rows that were read: (source, place, epoch) of each example."""
    return [[tuple(drawn) for drawn in json.loads(line)] for line in path.read_text().splitlines()]


class Stopping(training._Log):
    """The log of a process that is killed behind a checkpoint, not when anybody expects it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == DONE and distributed.get_rank() == KILLED:
            (self.output / "was killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def follow(recipe: Path, output: Path, job: str) -> None:
    training.DataCollator = recording(output / f"{recipe.stem}.{distributed.get_rank()}.jsonl")
    if job == "stop":
        training._Log = Stopping
    training.train(read_recipe(recipe), resume=job == "resume", say=lambda line: None)


def questions(recipe: Any) -> list:
    """Those of a recipe's only evaluation, with short answers."""
    (evaluation,) = recipe.evaluation
    found = training._questions(recipe, evaluation, lambda line: None)
    return [dataclasses.replace(example, max_new_tokens=6) for example in found]


def asked_model(recipe: Any) -> tuple[Any, Any]:
    model, processor = load(recipe.path(recipe.model))
    return without_stopping(model), processor


def ask(path: Path) -> dict[str, list]:
    """The answers of all processes, and the rows that this one asked about."""
    recipe = read_recipe(path)
    model, processor = asked_model(recipe)
    own, answer = [], training.answer_examples

    def answered(model: Any, processor: Any, examples: list, **options: Any) -> Any:
        own.extend(example.row for example in examples)
        return answer(model, processor, examples, **options)

    training.answer_examples = answered
    callback = training._Evaluate(recipe.evaluation[0], questions(recipe), processor, path, dict(recipe.processor))
    found = callback._answers(model)
    return {"own": own, "answers": [[each.row, each.answer, each.scores] for each in found]}


def main(output: Path, rank: int, world_size: int, jobs: list[str]) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    meeting_point = (output / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=world_size)
    report: dict[str, Any] = {}
    for each in jobs:
        job, _, recipe = each.partition(":")
        if job == "ask":
            report |= ask(Path(recipe))
        else:
            follow(Path(recipe), output, job)
    torch.save(report, output / f"{rank}.pt")
    distributed.barrier()  # nobody leaves while another one still reads from it
    distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
