"""`molmo2 train`, `molmo2 view` and `molmo2 eval`."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from molmo2.cli import models


def run_training(path: Path, output: str | None, resume: bool) -> int:
    """Train by the recipe in a file.

    Raises:
        ClickException: The recipe cannot be followed, or the model not be loaded.
    """
    from molmo2.recipes.recipe import RecipeError, read_recipe

    changes = {} if output is None else {"output": str(Path(output).resolve())}
    try:
        recipe = read_recipe(path, **changes)
        from molmo2.recipes.run import train
        from molmo2.training.collectives import leave_group

        folder = train(recipe, resume=resume, say=lambda line: click.echo(line, err=True))
        leave_group()
    except (RecipeError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise models.ModelError(str(error)) from error
    click.echo(folder)
    return 0


def run_view(path: Path, output: Path, data: str | None, number: int) -> int:
    """Show the examples that a run by the recipe in a file begins with.

    Raises:
        ClickException: The recipe cannot be followed, a row makes no example, the processor cannot be loaded, or the
            page not be written.
    """
    from molmo2.recipes.recipe import RecipeError, read_recipe

    if not output.absolute().parent.is_dir():
        raise click.UsageError(f"--output: there is no folder '{output.absolute().parent}'.")
    try:
        recipe = read_recipe(path)
        models.quiet_libraries()
        from molmo2.recipes.run import first_examples
        from molmo2.tools.view import view

        examples, processor = first_examples(recipe, number, data=data, say=lambda line: click.echo(line, err=True))
    except (RecipeError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise models.ModelError(str(error)) from error
    try:
        page = view(examples, processor, output, title=f"{path.name}: {len(examples)} examples")
    except OSError as error:
        raise click.UsageError(f"--output: '{output}' cannot be written: {error}") from error
    except Exception as error:  # a row that was built elsewhere may hold anything
        raise click.UsageError(f"There is no page of these examples: {str(error) or repr(error)}") from error
    click.echo(page)
    return 0


def run_evaluation(
    reader: str, files: Sequence[str], media: Sequence[str], output: Path | None, options: Mapping[str, Any]
) -> int:
    """Answer the questions of an evaluation set, and print the scores; `options` are the others of `molmo2 eval`.

    Raises:
        ClickException: There is no such set or file, the model cannot be loaded, or a row makes no question.
    """
    from tqdm import tqdm

    from molmo2.data.evaluation import evaluation_examples
    from molmo2.recipes.rows import media_resolver, read_rows
    from molmo2.recipes.scoring import EvaluationError, answer_examples, score

    try:
        rows = list(itertools.islice(read_rows(files, Path()), options["limit"]))
        examples, report = evaluation_examples(reader, rows, media_resolver(media, Path()))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(str(report), err=True)
    if not examples:
        raise click.UsageError("No row is usable.")
    if output is not None and not output.absolute().parent.is_dir():
        raise click.UsageError(f"--output: there is no folder '{output.absolute().parent}'.")
    loaded, processor = models.load_model(options["model"], options["device"], options["dtype"])
    given = {name: options[name] for name in ("num_frames", "max_crops") if options[name] is not None}
    answers = answer_examples(
        loaded, processor, examples, max_new_tokens=options["max_new_tokens"], processor_kwargs=given
    )
    try:
        scored = _kept(tqdm(answers, total=len(examples), desc="questions", disable=None, delay=2), output)
    except EvaluationError as error:
        raise click.UsageError(f"{str(error).rstrip('.')}. Mend or remove it.") from error
    overall, groups = score(scored)
    for name, estimate in overall.items():
        click.echo(f"{name}: {estimate}")
    for group, members in groups.items():
        for member, scores in members.items():
            click.echo(f"{group} {member}: " + ", ".join(f"{name} {each}" for name, each in scores.items()))
    return 0


def _kept(answers: Iterable[Any], output: Path | None) -> list[Any]:
    """The scored answers, each of them a line of JSON in `output` as it comes."""
    scored = []
    with contextlib.nullcontext() if output is None else output.open("w", encoding="utf-8") as file:
        for each in answers:
            scored.append(each)
            if file is not None:
                record = {"row": each.row, "answer": each.answer, "scores": each.scores, "groups": each.groups}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return scored
