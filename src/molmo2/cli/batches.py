"""`molmo2 batch`: its arguments become a source, an engine and a run."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from molmo2.batch.journal import OutputError
from molmo2.batch.pool import WorkerPool
from molmo2.batch.rows import SourceError, open_source
from molmo2.batch.run import Shard, Summary, run_batch
from molmo2.batch.settings import EngineError, EngineSettings
from molmo2.cli import models
from molmo2.tools.media_files import media_in_folder

SOME_FAILED = 1
CONTINUES = "Answers so far are kept: the same command continues."
WINDOWS = 4  # batches that a worker sorts by length together


def run_batch_command(source: str, output: Path, options: dict[str, Any]) -> int:
    """Run the batch and say how it went; see `molmo2 batch --help`.

    Raises:
        ClickException: Arguments do not fit, or the engine cannot work.
    """
    models.require_one(options["model"], options["server"])
    shard_index, shard_count = shard_of(options["shard"], os.environ)
    workers_of(options["workers"])  # wrong ones are said before anything is read
    if options["workers_per_gpu"] is not None and (options["engine"] != "ray" or options["server"] is not None):
        raise click.UsageError(
            "--workers-per-gpu is of --engine ray with a --model: processes of this machine share its GPUs as they "
            "are (--workers), and a server has its own."
        )
    settings = _settings(options)
    identity = {
        "question": options["question"],
        **{name: getattr(settings, name) for name in ("model", "server", "dtype", "generate_options")},
        "processor_kwargs": settings.processor_kwargs,
    }
    try:
        _require_effect(source, options)
        with _progress_bar() as bar:

            def count(result: dict[str, Any]) -> None:
                bar.update(1)
                if result["error"] is not None:
                    errors.append(1)
                    bar.set_postfix(errors=len(errors))

            errors: list[int] = []
            summary: Summary = run_batch(
                open_source(source, options["question"], recursive=options["recursive"]),
                output,
                _engine(options, settings),
                identity=identity,
                shard=Shard(shard_index, shard_count),
                ordered=options["ordered"],
                overwrite=options["overwrite"],
                on_result=count,
            )
    except (SourceError, OutputError, OSError) as error:
        raise click.UsageError(str(error)) from error
    except EngineError as error:
        raise models.ModelError(f"{error} {CONTINUES}") from error
    except KeyboardInterrupt:
        click.echo(CONTINUES, err=True)
        raise
    click.echo(
        f"{summary.rows} rows in {Shard(shard_index, shard_count).output(output)}: {summary.answered} new in "
        f"{summary.seconds:.1f} s, {summary.errors} with an error",
        err=True,
    )
    return SOME_FAILED if summary.errors else 0


def _require_effect(source: str, options: Mapping[str, Any]) -> None:
    """Check that options of the processor concern some file of a folder; what a table names is read later.

    Raises:
        UsageError: One is for videos, and the files are images, or the other way round.
    """
    if models.processor_options(options) and Path(source).is_dir():
        kinds = {file.kind for file in media_in_folder(Path(source), options["recursive"])}
        if kinds:
            models.require_effect(options, kinds)


def _engine(options: Mapping[str, Any], settings: EngineSettings) -> Any:
    min_workers, max_workers = workers_of(options["workers"])
    if options["engine"] == "ray":
        from molmo2.batch.ray_data import RayEngine

        share = options["workers_per_gpu"]
        own = {} if share is None else {"workers_per_gpu": share}
        return RayEngine(settings, (min_workers, max_workers), row_seconds=options["row_timeout"], **own)
    return WorkerPool(settings, max_workers, row_seconds=options["row_timeout"])


def _settings(options: Mapping[str, Any]) -> EngineSettings:
    size = options["batch_size"]
    return EngineSettings(
        model=models.named_model(options["model"], options["server"]),
        server=options["server"],
        device=options["device"],
        dtype=options["dtype"],
        batch_size=size,
        window=size * (1 if options["server"] else WINDOWS),
        processor_kwargs=models.processor_options(options),
        generate_options={"max_new_tokens": options["max_new_tokens"]},
        timeout=options["row_timeout"],
    )


def _progress_bar() -> Any:
    from tqdm import tqdm

    return tqdm(desc="rows", unit="row", disable=None, delay=2)


def shard_of(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(index from 0, count) of "2/8", or of this process under `accelerate launch` and torchrun.

    Raises:
        BadParameter: The text says something else.
    """
    if text is None:
        return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(
            f"{text!r} is not I/N, such as 1/8 for the first of eight parts", param_hint="--shard"
        )
    return int(match[1]) - 1, int(match[2])


def workers_of(text: str) -> tuple[int, int]:
    """(minimum, maximum) of "4" or "2:16".

    Raises:
        BadParameter: The text says something else.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    minimum, maximum = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= minimum <= maximum:
        raise click.BadParameter(f"{text!r} is not a number of workers, such as 4 or 2:16", param_hint="--workers")
    return minimum, maximum
