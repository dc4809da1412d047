"""A run by a recipe: the model, the packed mixture and the trainer, checkpoints that it continues from, and a log."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainingArguments

from molmo2.data import Examples, Mixture, Settings, Source
from molmo2.data.evaluation import EvaluationExample, evaluation_examples
from molmo2.data.mixture import MixtureState
from molmo2.processing.processor import Molmo2Processor
from molmo2.recipes.recipe import PARTS, DataSet, Evaluation, Recipe, RecipeError
from molmo2.recipes.rows import media_resolver, read_rows
from molmo2.recipes.scoring import EvaluationError, Scored, answer_examples, score
from molmo2.registration import load
from molmo2.training import (
    DataCollator,
    LearningRates,
    PackedMixture,
    Packer,
    RepeatedRows,
    SaveMixture,
    TokenWeighting,
    context_group,
    context_parallel,
    freeze,
    fsdp_config,
    lora_targets,
    resume_mixture,
    trainer_class,
)
from molmo2.training.packed_mixture import ExampleError, example_of
from molmo2.training.resuming import STATE_FILE

RECIPE_FILE, LOG_FILE, SCORES_FILE, MODEL_FOLDER = "recipe.json", "log.jsonl", "scores.jsonl", "model"
PARTIAL_FOLDER, OLDER_FOLDER = ".model.partial", ".model.older"  # becomes `model` once it is complete; what it was
TRAINER_FILES = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    STATE_FILE,
)
Say = Callable[[str], object]


def train(recipe: Recipe, *, resume: bool = False, say: Say = print) -> Path:
    """Train by a recipe, in this process or in all those of torchrun or `accelerate launch`.

    The output folder gets `recipe.json`, `checkpoint-N`, `log.jsonl` (a line for each entry of the trainer's log),
    `scores.jsonl` (a line for each evaluation) and, at the end, `model`: a folder for `molmo2.load`; of a run with
    adapters, the adapters. A continued run has the losses of one that was never stopped.

    Args:
        resume: Continue behind the last complete checkpoint of the output folder.
        say: Called with a line about what was read, in the first process only.
    Returns:
        The folder `model`.
    Raises:
        RecipeError: The recipe does not fit its files, the processes or the run that is continued, or a row makes no
            example.
        OSError: The model or a file cannot be read.
    """
    world, is_first = _processes()
    say = say if is_first else _ignore
    output = recipe.path(recipe.output)
    _require_divisible(recipe, world)
    checkpoint = _checkpoint(recipe, output, resume)
    if checkpoint is not None and _number(checkpoint) >= recipe.steps:
        if is_first:
            _write_model(checkpoint, output / MODEL_FOLDER)
        return output / MODEL_FOLDER
    mixture = _mixture(recipe, say)
    questions = [(each, _questions(recipe, each, say)) for each in recipe.evaluation]
    model, processor = load(_model_name(recipe), dtype=recipe.dtype)
    model = _prepared(model, recipe)
    stream = PackedMixture(
        mixture,
        Packer(recipe.max_tokens, recipe.max_crops, pool_size=recipe.pool_size),
        processor,
        **_building(recipe),
    )
    arguments = _arguments(recipe, output, world)
    callbacks: list[TrainerCallback] = [SaveMixture(stream, recipe.context_parallel), _Log(output)]
    rows = _shared(model, stream, recipe)
    trainer = _trainer_class(recipe)(
        model, arguments, DataCollator(processor), rows, processing_class=processor, callbacks=callbacks
    )
    for evaluation, examples in questions:
        trainer.add_callback(_Evaluate(evaluation, examples, processor, output, dict(recipe.processor)))
    if checkpoint is not None:
        try:
            resume_mixture(stream, checkpoint)
        except ValueError as error:
            raise RecipeError(f"the run in '{output}' cannot be continued: {error}") from error
        say(f"continuing behind {checkpoint.name}")
    trainer.accelerator.wait_for_everyone()  # all have looked at the folder
    if is_first:
        _begin(output, recipe, 0 if checkpoint is None else _number(checkpoint))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (ExampleError, EvaluationError) as error:
        raise RecipeError(
            f"{str(error).rstrip('.')}. Mend it, or put another row in its place: with --resume the run continues "
            "behind its last checkpoint."
        ) from error
    trainer.save_model(str(output / PARTIAL_FOLDER))
    trainer.accelerator.wait_for_everyone()
    if is_first:
        _replace(output / MODEL_FOLDER, output / PARTIAL_FOLDER)
    say(f"the packer: {stream.packer.report}")
    return output / MODEL_FOLDER


def first_examples(
    recipe: Recipe, number: int, *, data: str | None = None, say: Say = print
) -> tuple[list[Mapping[str, Any]], Molmo2Processor]:
    """The examples that a run begins with, as the model gets them, and the processor that built them.

    Args:
        number: How many; no more than the data sets have together. They are drawn as in the run: of one data set each
            comes once, of several some may come again before others have come.
        data: Only those of this data set.
        say: Called with a line about what was read.
    Raises:
        RecipeError: The recipe does not fit its files, it has no such data set, or a row makes no example: its image
            cannot be decoded, its answer lies behind `max_tokens`, ...
        OSError: The processor cannot be read.
    """
    if data is not None:
        named = tuple(each for each in recipe.data if each.name == data)
        if not named:
            names = ", ".join(each.name for each in recipe.data)
            raise RecipeError(f"there is no data set {data!r}; the recipe has {names}")
        recipe = dataclasses.replace(recipe, data=named, groups=None)
    mixture = _mixture(recipe, say)
    processor = Molmo2Processor.from_pretrained(_model_name(recipe))
    draws = itertools.islice(mixture.draws(MixtureState()), min(number, sum(map(len, mixture.sources.values()))))
    options = _building(recipe)
    try:
        return [example_of(mixture, drawn, processor, options) for drawn in draws], processor
    except ExampleError as error:
        raise RecipeError(str(error)) from error


def _require_divisible(recipe: Recipe, world: int) -> None:
    shared = recipe.context_parallel
    if world % shared:
        raise RecipeError(f"context_parallel is {shared}, which does not divide the {world} process(es) of this run")
    rows = recipe.rows_per_device * world // shared
    if recipe.rows_per_step % rows:
        by = f" (by {shared} for each)" if shared > 1 else ""
        raise RecipeError(
            f"rows_per_step is {recipe.rows_per_step}, which {world} processes with {recipe.rows_per_device} rows at "
            f"a time{by} do not divide; expected a multiple of {rows}"
        )


def _ignore(line: str) -> None:
    """Say nothing."""


def _processes() -> tuple[int, bool]:
    """How many processes there are, and whether this is the first."""
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0


def _model_name(recipe: Recipe) -> str:
    """The folder that the recipe names, or else the repository."""
    path = recipe.path(recipe.model)
    return str(path) if path.is_dir() else recipe.model


# --- data ------------------------------------------------------------------------------------------------------------


def _mixture(recipe: Recipe, say: Say) -> Mixture:
    sources = []
    for data in recipe.data:
        examples = _examples(recipe, data)
        if isinstance(examples, Examples):
            say(str(examples.report))
        sources.append(Source(data.name, examples, data.group, data.size))
    try:
        mixture = Mixture(sources, recipe.shares(), seed=recipe.seed)
    except ValueError as error:
        raise RecipeError(f"data: {error}") from error
    for name, rate in mixture.rates.items():
        say(f"{name}: {len(mixture.sources[name])} examples, {100 * rate:.1f} % of the mixture")
    return mixture


def _examples(recipe: Recipe, data: DataSet) -> Any:
    """The examples of a data set: rows as they are, or what its reader makes of them."""
    try:
        rows = read_rows(data.files, recipe.folder)
        if data.reader is None:
            return rows
        media = media_resolver(data.media, recipe.folder, cut_clips=data.cut_clips)
        known = {each.name for each in dataclasses.fields(Settings)} - {"frame_times", "image_size"}
        if unknown := sorted(set(data.settings) - known):
            raise RecipeError(f"settings have no {unknown[0]!r}; they are {', '.join(sorted(known))}")
        return Examples(data.reader, rows, media, Settings(**data.settings), seed=recipe.seed)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"data '{data.name}': {error}") from error


def _questions(recipe: Recipe, evaluation: Evaluation, say: Say) -> list[EvaluationExample]:
    try:
        rows = read_rows(evaluation.files, recipe.folder)
        chosen = list(itertools.islice(rows, evaluation.limit))
        media = media_resolver(evaluation.media, recipe.folder)
        examples, report = evaluation_examples(evaluation.reader, chosen, media)
    except ValueError as error:
        raise RecipeError(f"evaluation with {evaluation.reader}: {error}") from error
    say(str(report))
    if not examples:
        raise RecipeError(f"evaluation with {evaluation.reader}: no row can be asked about. {report}")
    return examples


def _building(recipe: Recipe) -> dict[str, Any]:
    """Options of `build_training_example`."""
    rules = {"report": TokenWeighting.report, "released_trainer": TokenWeighting.released_trainer}
    rule = rules.get(recipe.weighting)
    weighting = {} if rule is None else {"weighting": rule()}
    return {**recipe.processor, "max_length": recipe.max_tokens, **weighting}


# --- the model and the trainer ---------------------------------------------------------------------------------------


def _prepared(model: Any, recipe: Recipe) -> Any:
    """The model with adapters, or with parts frozen."""
    model.train()
    if recipe.lora is None:
        frozen = [part for part in PARTS if part not in recipe.train]
        if frozen:
            freeze(model, *frozen)
        return model
    if importlib.util.find_spec("peft") is None:
        raise RecipeError("lora needs PEFT, which is not installed: pip install peft")
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora_targets(*lora.parts),
    )
    return get_peft_model(model, config)


def _shared(model: Any, stream: PackedMixture, recipe: Recipe) -> Any:
    """The rows of the stream as processes get them; those that share rows get the same."""
    if recipe.context_parallel == 1:
        return stream
    try:
        context_parallel(model, context_group(recipe.context_parallel))
    except ValueError as error:
        raise RecipeError(f"context_parallel: {error}") from error
    return RepeatedRows(stream, recipe.context_parallel, recipe.rows_per_device)


def _arguments(recipe: Recipe, output: Path, world: int) -> TrainingArguments:
    has_gpu = torch.cuda.is_available()
    is_sharded = world > 1 and (recipe.sharding == "fsdp" or (recipe.sharding == "auto" and has_gpu))
    sharded = {"fsdp": "full_shard auto_wrap", "fsdp_config": fsdp_config()} if is_sharded else {}
    settings: dict[str, Any] = {
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.rows_per_device,
        "gradient_accumulation_steps": recipe.rows_per_step
        * recipe.context_parallel
        // (recipe.rows_per_device * world),
        "learning_rate": recipe.learning_rates.text,  # parts have rates of their own
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.bf16,
        "save_steps": recipe.save_every,
        "save_total_limit": recipe.keep,
        "logging_steps": recipe.log_every,
        "report_to": list(recipe.report_to),
        "seed": recipe.seed,
        # What a run needs to be continued with the very next row.
        "ignore_data_skip": True,
        "dataloader_num_workers": 0,
        "accelerator_config": {"dispatch_batches": False},
        "remove_unused_columns": False,
        "use_cpu": not has_gpu,
        **({"gradient_checkpointing": True} if recipe.gradient_checkpointing else {}),
        **({} if has_gpu or world == 1 else {"ddp_backend": "gloo"}),
        **sharded,
    }
    try:
        return TrainingArguments(str(output), **settings, **recipe.trainer)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"trainer: {error}") from error


def _trainer_class(recipe: Recipe) -> type:
    rates = recipe.learning_rates
    settings = {**dataclasses.asdict(rates), "betas": tuple(rates.betas)}
    base: Any = trainer_class(Trainer, LearningRates(**settings))

    class RecipeTrainer(base):
        """A trainer whose rates rise for as many steps as the recipe says of each part, and fall along a cosine."""

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            """One curve for each group of parameters."""
            optimizer = self.optimizer if optimizer is None else optimizer
            curves = [
                rate_curve(recipe.warmup_of(group["name"]), num_training_steps, recipe.final_rate)
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, curves)
            return self.lr_scheduler

    return RecipeTrainer


def rate_curve(warmup: int, steps: int, final: float) -> Callable[[int], float]:
    """The part of its rate that a group of parameters learns with at a step, counted from 0."""

    def at(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return at


# --- continuing ------------------------------------------------------------------------------------------------------


def _checkpoint(recipe: Recipe, output: Path, resume: bool) -> Path | None:
    """The checkpoint to continue from; None for a run that begins.

    Raises:
        RecipeError: The folder holds a run and none is to be continued, the recipe is another one, or the run is over.
    """
    stored = output / RECIPE_FILE
    if not stored.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise RecipeError(f"output '{output}' is not empty and holds no run; name a new folder")
        return None
    if not resume:
        raise RecipeError(f"output '{output}' holds a run; continue it with --resume, or name a new folder")
    before, now = json.loads(stored.read_text(encoding="utf-8")), json.loads(json.dumps(recipe.identity()))
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if different:
        raise RecipeError(
            f"the run in '{output}' has another {', '.join(different)}; continue with the recipe of its start"
        )
    # The state of the mixture is written last, so a checkpoint with one is complete.
    last = max((path.parent for path in output.glob(f"checkpoint-*/{STATE_FILE}")), key=_number, default=None)
    if last is not None and _number(last) >= recipe.steps and (output / MODEL_FOLDER).is_dir():
        raise RecipeError(f"the run in '{output}' has all of its {_number(last)} steps; for more, raise `steps`")
    return last


def _write_model(checkpoint: Path, folder: Path) -> None:
    """The model of a run that was stopped behind its last checkpoint: what is there, but for the trainer's files."""
    partial = folder.with_name(PARTIAL_FOLDER)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns(*TRAINER_FILES))
    _replace(folder, partial)


def _replace(folder: Path, partial: Path) -> None:
    """Let a complete folder take the place of one from fewer steps."""
    older = folder.with_name(OLDER_FOLDER)
    shutil.rmtree(older, ignore_errors=True)
    if folder.is_dir():
        folder.rename(older)
    partial.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


def _number(checkpoint: Path) -> int:
    """The step behind which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _begin(output: Path, recipe: Recipe, step: int) -> None:
    """Write down the recipe, and drop what a stopped run logged behind the step that is continued from."""
    output.mkdir(parents=True, exist_ok=True)
    (output / RECIPE_FILE).write_text(json.dumps(recipe.identity(), indent=1), encoding="utf-8")
    for path in (output / LOG_FILE, output / SCORES_FILE):
        if path.is_file():
            whole = [
                line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
            ]
            path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")


# --- what is written during a run ------------------------------------------------------------------------------------


class _Log(TrainerCallback):
    """A line of JSON for each entry of the trainer's log."""

    def __init__(self, output: Path):
        self.output = output

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append the entry."""
        if state.is_world_process_zero:
            _append(self.output / LOG_FILE, {"step": state.global_step, **(logs or {})})


class _Evaluate(TrainerCallback):
    """Asks the model questions every `evaluation.every` steps and after the last; processes share the questions."""

    def __init__(
        self,
        evaluation: Evaluation,
        examples: Sequence[EvaluationExample],
        processor: Any,
        output: Path,
        options: dict[str, Any],
    ):
        self.evaluation, self.examples, self.processor = evaluation, examples, processor
        self.output, self.options = output, options

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Ask, where it is time."""
        if state.global_step % self.evaluation.every and state.global_step < state.max_steps:
            return
        scored = self._answers(model)
        if state.is_world_process_zero:
            overall, groups = score(scored)
            line = {
                "step": state.global_step,
                "set": self.evaluation.reader,
                "examples": len(scored),
                "scores": {name: dataclasses.asdict(each) for name, each in overall.items()},
                "groups": {
                    name: {
                        member: {metric: each.mean for metric, each in own.items()} for member, own in members.items()
                    }
                    for name, members in groups.items()
                },
            }
            _append(self.output / SCORES_FILE, line)

    def _answers(self, model: Any) -> list[Scored]:
        """The answers of all processes, in order of the rows.

        Every process asks as many questions as the others, so that sharded layers meet; repeated ones are dropped.
        """
        world = distributed.get_world_size() if distributed.is_initialized() else 1
        rank = distributed.get_rank() if world > 1 else 0
        count = -(-len(self.examples) // world)
        own = [self.examples[(rank + world * place) % len(self.examples)] for place in range(count)]
        options = {"synced_gpus": True} if world > 1 else {}
        inner = model.module if hasattr(model, "module") else model
        try:
            answered = list(answer_examples(inner, self.processor, own, processor_kwargs=self.options, **options))
        except EvaluationError as error:
            raise EvaluationError(f"evaluation with {self.evaluation.reader}, {error}") from error
        if world > 1:
            gathered: list[Any] = [None] * world
            distributed.all_gather_object(gathered, answered)
            answered = [each for share in gathered for each in share]
        return [each for _, each in sorted({each.row: each for each in answered}.items())]


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
