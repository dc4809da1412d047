"""The commands of `molmo2`: arguments in, calls of the package, results out."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from molmo2.cli import models, printing
from molmo2.cli.batches import run_batch_command
from molmo2.cli.doctor import examine, report
from molmo2.cli.long import run_long
from molmo2.cli.models import MODEL_VARIABLE, SERVER_VARIABLE, Asker, ModelError
from molmo2.cli.recipes import run_evaluation, run_training, run_view
from molmo2.cli.serving import ENGINES, ServeError, ServeOptions, choose_engine, serve_command
from molmo2.grounding import prompts
from molmo2.grounding.structured import SECTIONS
from molmo2.tools.media_files import MediaFile, find_media
from molmo2.version import __version__

SOME_FAILED, WRONG_ARGUMENTS, INTERRUPTED = 1, 2, 130
PATIENCE_SECONDS = 2.0  # then progress is shown
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
EXIT_CODES = """\
\b
exit codes:
  0 all answered   1 some files could not be answered   2 wrong arguments
  3 the model cannot be loaded, or the server not be reached   130 interrupted
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code = molmo2.main(None if arguments is None else list(arguments), prog_name="molmo2", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED


class _Group(click.Group):
    """A group that lists its commands in the order in which they are useful, not by the alphabet.

    It exits with 0 when its output is no longer read, as in `molmo2 ... | head`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Group`, which would exit with 1 on a closed pipe."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            with suppress(OSError):  # or Python would complain at its end about what is still to be written
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


@click.group(cls=_Group, context_settings=CONTEXT, epilog=EXIT_CODES)
@click.version_option(__version__, "-V", "--version", prog_name="molmo2")
def molmo2() -> None:
    """Molmo2: models that see images and videos, and point.

    \b
    First steps:
      molmo2 ask "What is in this image?" boats.jpg --model allenai/Molmo2-4B
      molmo2 point boats harbour.jpg --draw marked       # marked/harbour_points.png
      molmo2 count penguins "photos/*.jpg" --format csv > counts.csv
      molmo2 track "red car" street.mp4 --draw marked

    The model is named with --model or the variable MOLMO2_MODEL; a server (vLLM, transformers serve, any OpenAI
    endpoint) with --server or MOLMO2_SERVER. For many files use `molmo2 batch`; when something is slow or odd,
    `molmo2 doctor`.
    """


# --- options that commands share -------------------------------------------------------------------------------------


def _add(options: Sequence[Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _seconds_range(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, float] | None:
    """(start, end) of "1.5:4", in seconds; ":10" begins at 0."""
    if value is None:
        return None
    start, separator, end = value.partition(":")
    try:
        clip = float(start or 0), float(end)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not START:END in seconds, such as 1.5:4 or :10") from None
    if not separator or not 0 <= clip[0] < clip[1]:
        raise click.BadParameter(f"{value!r} has to be START:END in seconds, the start before the end")
    return clip


MODEL_OPTIONS = [
    click.option(
        "-m",
        "--model",
        envvar=MODEL_VARIABLE,
        metavar="FOLDER|REPO",
        help="Checkpoint folder or repository on the Hub.",
    ),
    click.option(
        "-s",
        "--server",
        envvar=SERVER_VARIABLE,
        metavar="URL",
        help="Ask this server instead, such as http://127.0.0.1:8000/v1; its key comes from MOLMO2_API_KEY or "
        "OPENAI_API_KEY.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps"),
    click.option("--dtype", default="auto", show_default=True, help="auto (as stored), bfloat16, float16, float32"),
]
PROCESSOR_OPTIONS = [
    click.option("--num-frames", type=click.IntRange(1), help="Most frames of a video. [default: the checkpoint's]"),
    click.option("--max-crops", type=click.IntRange(1), help="Most crops of an image; 24 for small print."),
    click.option("--clip", callback=_seconds_range, metavar="START:END", help="Only these seconds of a video."),
]
FILE_OPTIONS = [
    click.option("-r", "--recursive", is_flag=True, help="Look into folders of folders too."),
    click.option("--kind", type=click.Choice(["image", "video"]), help="For files whose suffix does not say it."),
    click.option("--together", is_flag=True, help="One question about all images, not one about each file."),
]
OUTPUT_OPTIONS = [
    click.option(
        "-f",
        "--format",
        "form",
        type=click.Choice(printing.FORMATS),
        default="text",
        show_default=True,
        help="text for people, json: one object a line, csv: one line a point",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the answers there.",
    ),
    click.option(
        "--draw",
        "drawings",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="FOLDER",
        help="Save images and videos with their marks there.",
    ),
    click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True),
]
FILES = click.argument("files", nargs=-1, required=True, metavar="FILES...")
QUESTION_OPTIONS = [FILES, *FILE_OPTIONS, *MODEL_OPTIONS, *PROCESSOR_OPTIONS, *OUTPUT_OPTIONS]


# --- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One command's question about files, and where its answers go.

    Attributes:
        requests: The files of each question.
        question: Text or a `Prompt`; of a description it depends on the files.
    """

    requests: list[list[MediaFile]]
    question: Callable[[list[MediaFile]], Any]
    asker: Asker
    processor_kwargs: dict[str, Any]
    max_new_tokens: int
    form: str
    output: Path | None
    drawings: Path | None
    saved: set[Path] = field(default_factory=set)

    def run(self) -> int:
        """Ask everything; files that cannot be answered are named and counted."""
        failed = 0
        with click.open_file(str(self.output or "-"), "w", encoding="utf-8") as stream:
            if self.form == "csv":
                click.echo(",".join(printing.COLUMNS), file=stream)
            for files in _progress(self.requests, "asking"):
                try:
                    answer = self._answer(files, stream)
                except Exception as error:  # decoders raise nearly anything
                    self._end_if_hopeless(error)
                    failed += 1
                    self._report(files, error, stream)
                else:
                    failed += not self._draw(files, answer)
        return SOME_FAILED if failed else 0

    @staticmethod
    def _end_if_hopeless(error: Exception) -> None:
        """Raise what would come again with every file: the output is closed, or no server answers."""
        from molmo2.client.http import ServerUnreachable

        if isinstance(error, BrokenPipeError):
            raise error
        if isinstance(error, ServerUnreachable):
            raise ModelError(str(error)) from error

    def _answer(self, files: list[MediaFile], stream: Any) -> Any:
        """The answer, which is written to the stream."""
        question = self.question(files)
        media = {
            "images": [file.path for file in files if not file.is_video],
            "videos": [file.path for file in files if file.is_video],
        }
        options = {
            **{name: values or None for name, values in media.items()},
            "processor_kwargs": self.processor_kwargs,
            "max_new_tokens": self.max_new_tokens,
        }
        with printing.seconds_shown("asking", PATIENCE_SECONDS) if len(self.requests) == 1 else nullcontext():
            answer = self.asker.ask(question, **options)
        if self.form == "text":
            if len(self.requests) > 1:
                click.secho(", ".join(file.path for file in files), bold=True, file=stream)
            click.echo(printing.as_text(answer), file=stream)
        else:
            write = printing.as_json if self.form == "json" else printing.as_csv
            click.echo(write(printing.as_record(files, str(question), answer)), file=stream)
        return answer

    def _draw(self, files: list[MediaFile], answer: Any) -> bool:
        """Save the marks, where they are wanted; False if that fails, which leaves the answer as it is."""
        if self.drawings is None:
            return True
        try:
            saved = printing.save_marks(files, answer.grounding, self.drawings, self.saved)
        except Exception as error:  # decoders raise nearly anything
            click.echo(f"error: {', '.join(file.path for file in files)}: not drawn: {error}", err=True)
            return False
        for path in saved:
            click.echo(f"wrote {path}", err=True)
        if not saved:
            click.echo(f"{files[0].path}: no points, so nothing to draw", err=True)
        return True

    def _report(self, files: list[MediaFile], error: Exception, stream: Any) -> None:
        """Name a question without an answer; programs find it in its own line."""
        names = [file.path for file in files]
        click.echo(f"error: {', '.join(names)}: {error}", err=True)
        if self.form != "text":
            record = {"files": names, "question": str(self.question(files)), "error": str(error)}
            click.echo((printing.as_json if self.form == "json" else printing.as_csv)(record), file=stream)


def _progress(items: list[Any], title: str) -> Iterator[Any]:
    """The items, with a bar where a person watches and it takes more than two seconds."""
    from tqdm import tqdm

    bar = {"disable": None if len(items) > 1 else True, "delay": PATIENCE_SECONDS, "leave": False}
    yield from tqdm(items, desc=title, **bar)


def _find(files: Sequence[str], recursive: bool, kind: str | None) -> list[MediaFile]:
    try:
        return find_media(files, recursive=recursive, kind=kind)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def _grouped(media: list[MediaFile], together: bool) -> list[list[MediaFile]]:
    """The files of each question.

    Raises:
        UsageError: Several videos, or a video and images, in one question.
    """
    if not together:
        return [[file] for file in media]
    if len(media) > 1 and any(file.is_video for file in media):
        raise click.UsageError("--together is for images: ask about one video at a time.")
    return [media]


def _ask(options: dict[str, Any], question: Callable[[list[MediaFile]], Any]) -> int:
    """What every asking command does once its question is known."""
    models.require_one(options["model"], options["server"])
    printing.require_writable(options["output"])
    requests = _grouped(_find(options["files"], options["recursive"], options["kind"]), options["together"])
    models.require_effect(options, {file.kind for files in requests for file in files})
    for files in requests:
        question(files)  # a wrong one is reported before the model is loaded
    model = models.named_model(options["model"], options["server"])
    asker = models.open_asker(model, options["server"], options["device"], options["dtype"])
    job = Job(
        requests,
        question,
        asker,
        models.processor_options(options),
        options["max_new_tokens"],
        options["form"],
        options["output"],
        options["drawings"],
    )
    return job.run()


def _fixed(write: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[list[MediaFile]], Any]:
    """The same question about all files; a wrong one is an error of its argument."""
    try:
        question = write(*arguments, **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return lambda files: question


@molmo2.command(context_settings=CONTEXT)
@click.argument("question")
@_add(QUESTION_OPTIONS)
def ask(question: str, **options: Any) -> int:
    """Ask anything about images and videos.

    FILES are images, videos, folders, patterns in quotes ("*.jpg") and URLs; each is asked about by itself unless
    --together.

    \b
    examples:
      molmo2 ask "What is written here?" scan.png --max-crops 24
      molmo2 ask "What changed?" before.jpg after.jpg --together
      molmo2 ask "Which animal appears?" clip.mp4 --clip 10:20 --num-frames 64
    """
    if not question.strip():
        raise click.UsageError("The question is empty.")
    return _ask(options, lambda files: question)


@molmo2.command(context_settings=CONTEXT)
@click.argument("what")
@_add(QUESTION_OPTIONS)
def point(what: str, **options: Any) -> int:
    """Point to everything of a kind.

    \b
    examples:
      molmo2 point boats harbour.jpg --draw marked
      molmo2 point "people with hats" photos --format csv -o people.csv
    """
    return _ask(options, _fixed(prompts.point, what))


@molmo2.command(context_settings=CONTEXT)
@click.argument("what")
@_add(QUESTION_OPTIONS)
def count(what: str, **options: Any) -> int:
    """Count everything of a kind.

    \b
    example:
      molmo2 count penguins "photos/*.jpg" --format csv
    """
    return _ask(options, _fixed(prompts.count, what))


@molmo2.command(context_settings=CONTEXT)
@click.argument("what")
@click.option("--fps", type=float, help="Positions a second. [default: 2]")
@_add(QUESTION_OPTIONS)
def track(what: str, fps: float | None, **options: Any) -> int:
    """Follow objects through videos.

    \b
    example:
      molmo2 track "red car" street.mp4 --draw marked     # marked/street_points.mp4; needs PyAV
    """
    return _ask(options, _fixed(prompts.track, what, fps=fps))


@molmo2.command(context_settings=CONTEXT)
@click.option("--structured", is_flag=True, help=f"As JSON with {', '.join(SECTIONS)}; for videos.")
@_add(QUESTION_OPTIONS)
def describe(structured: bool, **options: Any) -> int:
    """Describe images and videos.

    \b
    examples:
      molmo2 describe holiday.jpg
      molmo2 describe race.mp4 --structured --format json
    """

    def question(files: list[MediaFile]) -> Any:
        if structured:
            return prompts.describe_structured()
        return prompts.describe("video" if files[0].is_video else "images" if len(files) > 1 else "image")

    return _ask(options, question)


# --- hours of video --------------------------------------------------------------------------------------------------


@molmo2.group("long", cls=_Group, context_settings=CONTEXT)
def long_video() -> None:
    """Ask about hours of video, window by window.

    The windows overlap, and what they say becomes one result: tracks keep their id, counts have no duplicates. The
    file is opened once and read forwards, in memory that does not grow with it. With --journal a run that was
    interrupted or killed continues where it was when the same command is given again.
    """


JOIN_OPTIONS = [
    click.option(
        "--unique", is_flag=True, help="It exists once ('the dog', not 'cars'): whatever returns is the same."
    ),
    OUTPUT_OPTIONS[2],
]
LONG_OPTIONS = [
    click.argument("video"),
    click.option("--window", type=float, default=30.0, show_default=True, help="Seconds of each window."),
    click.option("--overlap", type=float, default=4.0, show_default=True, help="Seconds that two windows share."),
    click.option("--fps", type=float, default=2.0, show_default=True, help="Frames a second that the model sees."),
    click.option(
        "--key-frame-interval", type=click.IntRange(2), help="Slow-fast windows: frames between these are coarser."
    ),
    click.option(
        "--journal", type=click.Path(dir_okay=False, path_type=Path), help="A .jsonl file with a line for each window."
    ),
    click.option("--overwrite", is_flag=True, help="Begin the journal anew, whatever is there."),
    MODEL_OPTIONS[0],
    *MODEL_OPTIONS[2:],
    *OUTPUT_OPTIONS[:2],
    OUTPUT_OPTIONS[3],
]


@long_video.command("track", context_settings=CONTEXT)
@click.argument("what")
@_add([*LONG_OPTIONS, *JOIN_OPTIONS])
def long_track(what: str, video: str, **options: Any) -> int:
    """Follow objects: when each is there, and where.

    \b
    example:
      molmo2 long track "red car" day.mp4 --journal car.jsonl --format csv -o car.csv
    """
    return run_long("track", what, video, options)


@long_video.command("count", context_settings=CONTEXT)
@click.argument("what")
@_add([*LONG_OPTIONS, *JOIN_OPTIONS])
def long_count(what: str, video: str, **options: Any) -> int:
    """Count different objects; what two windows see counts once.

    \b
    example:
      molmo2 long count penguins colony.mp4 --window 60 --fps 1
    """
    return run_long("count", what, video, options)


@long_video.command("events", context_settings=CONTEXT)
@_add(LONG_OPTIONS)
@click.option("--of", "what", help="Only events of this kind. [default: all]")
def long_events(what: str | None, video: str, **options: Any) -> int:
    """Find when things happen.

    \b
    example:
      molmo2 long events match.mp4 --of "a goal is scored" --format json
    """
    return run_long("events", what, video, options)


@long_video.command("ask", context_settings=CONTEXT)
@click.argument("question")
@_add(LONG_OPTIONS)
def long_ask(question: str, video: str, **options: Any) -> int:
    """Ask anything: one answer, which every window updates.

    The answers about the windows come with it.

    \b
    example:
      molmo2 long ask "What is taught?" lecture.mp4 --window 60
    """
    return run_long("ask", question, video, options)


# --- many files ------------------------------------------------------------------------------------------------------


@molmo2.command(context_settings=CONTEXT)
@click.argument("source", type=click.Path(exists=True))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-q", "--question", help="Asked about every row; {name} stands for that column of a table.")
@_add([*MODEL_OPTIONS, *PROCESSOR_OPTIONS, FILE_OPTIONS[0]])
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--engine",
    type=click.Choice(["process", "ray"]),
    default="process",
    show_default=True,
    help="process: workers on this machine; ray: actors on a cluster, or on a local one.",
)
@click.option("--workers", metavar="N|MIN:MAX", default="1", show_default=True, help="MIN:MAX lets Ray scale.")
@click.option(
    "--workers-per-gpu", type=click.IntRange(1), help="Actors of Ray that share a GPU of a cluster. [default: 1]"
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Rows at a time, each worker."
)
@click.option("--shard", metavar="I/N", help="Only part I of N; under `accelerate launch` it is known.")
@click.option("--ordered", is_flag=True, help="Results in the order of the rows.")
@click.option("--overwrite", is_flag=True, help="Begin anew, whatever is there.")
@click.option("--row-timeout", type=float, default=1800.0, show_default=True, help="Seconds; then a row is given up.")
def batch(source: str, output: Path, **options: Any) -> int:
    """Ask about every row of a table, or every file of a folder.

    SOURCE is a folder, or a table (.jsonl, .csv, .parquet) with the columns question, image or images, video or
    videos, id; OUTPUT ends in .jsonl or .parquet. Every row gets one result: an answer with its points in pixels and
    timings, or an error. The same command continues a run that was interrupted or killed.

    \b
    examples:
      molmo2 batch photos captions.jsonl -q "Describe this image." --model allenai/Molmo2-4B
      molmo2 batch questions.csv answers.parquet --workers 2 --ordered
      molmo2 batch clips.jsonl tracks.jsonl -q "Track the {name}." --server http://gpu:8000/v1
      molmo2 batch clips.parquet tracks.parquet --engine ray --workers 8:64
    """
    return run_batch_command(source, output, options)


# --- before and after asking -----------------------------------------------------------------------------------------


@molmo2.command(context_settings=CONTEXT)
@_add([FILES, *FILE_OPTIONS, MODEL_OPTIONS[0], *PROCESSOR_OPTIONS])
@click.option("--question", default="Describe this.", show_default=True, help="Its tokens count too.")
@click.option("--max-tokens", type=click.IntRange(1), help="Lower frames and crops until this many tokens suffice.")
@click.option("-f", "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def plan(model: str | None, question: str, max_tokens: int | None, form: str, **options: Any) -> int:
    """Say how many tokens a question takes, without asking it.

    Its frames and crops, too. Only the files of the processor are read, no weights, and of images and videos only what
    tells their size.

    \b
    example:
      molmo2 plan lecture.mp4 --max-tokens 8000
    """
    if model is None:
        raise click.UsageError(f"Tokens depend on the model: pass --model, or set {MODEL_VARIABLE}.")
    requests = _grouped(_find(options["files"], options["recursive"], options["kind"]), options["together"])
    models.require_effect(options, {file.kind for files in requests for file in files})
    models.quiet_libraries()
    from molmo2.processing.processor import Molmo2Processor
    from molmo2.registration import require_folder
    from molmo2.tools.plan import plan as plan_request

    try:
        require_folder(model)
        processor = Molmo2Processor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{model}' has no processor of a Molmo2 model: {error}") from error
    failed = 0
    for files in requests:
        parts: list[dict[str, Any]] = [{"type": file.kind, file.kind: file.path} for file in files]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        names = ", ".join(file.path for file in files)
        try:
            planned = plan_request(processor, messages, max_tokens=max_tokens, **models.processor_options(options))
        except Exception as error:  # decoders raise nearly anything
            failed += 1
            click.echo(f"error: {names}: {error}", err=True)
            continue
        if form == "json":
            record = {"files": [file.path for file in files], "tokens": planned.num_tokens}
            record |= {
                "frames": list(planned.num_frames),
                "crops": planned.num_crops,
                "options": dict(planned.options),
            }
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            click.echo(f"{names}\n{planned}" if len(requests) > 1 else planned)
    return SOME_FAILED if failed else 0


@molmo2.command(
    context_settings={**CONTEXT, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Convert a training checkpoint for transformers, or back; as molmo2-convert.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def convert(arguments: tuple[str, ...]) -> int:
    """Convert a training checkpoint for transformers, or back; as molmo2-convert."""
    from molmo2.convert.cli import main

    try:
        return main(list(arguments))
    except SystemExit as end:  # argparse ends like this
        return end.code if isinstance(end.code, int) else WRONG_ARGUMENTS


@molmo2.command(context_settings=CONTEXT)
@_add(MODEL_OPTIONS[:2])
@click.option("-f", "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def doctor(model: str | None, server: str | None, form: str) -> int:
    """Find what is slow or wrong here, and how to mend it.

    Versions, video decoders, GPUs, extras; with --model the checkpoint too, with --server the server. The exit code is
    1 if something is wrong.
    """
    is_wrong = report(examine(models.named_model(model, server), server), form, click.echo)
    return SOME_FAILED if is_wrong else 0


@molmo2.command(context_settings={**CONTEXT, "ignore_unknown_options": True, "allow_interspersed_args": True})
@_add([MODEL_OPTIONS[0]])
@click.option("--engine", type=click.Choice(ENGINES), help="[default: vllm where it is installed]")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in: set a key then.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="auto: the one that the checkpoint is stored in")
@click.option("--max-model-len", type=click.IntRange(1), help="Most tokens of a request, such as 36864 (vLLM).")
@click.option(
    "--images", type=click.IntRange(0), default=16, show_default=True, help="Most images of a request (vLLM)."
)
@click.option(
    "--videos", type=click.IntRange(0), default=1, show_default=True, help="Most videos of a request (vLLM)."
)
@click.option("--dry-run", is_flag=True, help="Print the command, and do not run it.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS OF THE ENGINE]...")
def serve(engine: str | None, dry_run: bool, model: str | None, **options: Any) -> int:
    """Start a server with the flags that Molmo2 needs.

    The engine is vLLM, or else `transformers serve`; further arguments go to it as they are. Both run with the classes
    of this package and execute no code of the checkpoint.

    \b
    examples:
      molmo2 serve --model allenai/Molmo2-4B --max-model-len 36864
      molmo2 serve --model molmo2-hf --port 8001 --dry-run
      molmo2 ask "What is this?" photo.jpg --server http://127.0.0.1:8000/v1
    """
    if model is None:
        raise click.UsageError(f"There is nothing to serve: pass --model, or set {MODEL_VARIABLE}.")
    try:
        command = serve_command(choose_engine(engine), ServeOptions(model, **options))
    except ServeError as error:
        raise click.UsageError(str(error)) from error
    click.echo(shlex.join(command), err=not dry_run)
    if dry_run:
        return 0
    return subprocess.run(command, check=False).returncode


@molmo2.command(context_settings=CONTEXT)
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", help="The folder for checkpoints and the model, instead of the recipe's.")
@click.option("--resume", is_flag=True, help="Continue the run in that folder with the very next row.")
def train(recipe: Path, output: str | None, resume: bool) -> int:
    """Train by a recipe: model, data sets and steps in YAML.

    docs/training.md says what a recipe holds.

    \b
    examples:
      molmo2 train points.yaml
      molmo2 train points.yaml --resume
      torchrun --nproc-per-node 8 -m molmo2.cli train points.yaml
    """
    return run_training(recipe, output, resume)


@molmo2.command("view", context_settings=CONTEXT)
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", metavar="NAME", help="Only this data set of the recipe. [default: all, as they are mixed]")
@click.option("--number", type=click.IntRange(1), default=8, show_default=True, help="Examples on the page.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="examples.html",
    show_default=True,
    help="The page; it is one file.",
)
def view_examples(recipe: Path, data: str | None, number: int, output: Path) -> int:
    """Show the first examples of a recipe on an HTML page.

    What a model would learn: crops, frames with their times and points, tokens with labels, weights and branches, and
    the mask. Weights of the model are not read.

    \b
    examples:
      molmo2 view points.yaml
      molmo2 view points.yaml --data boats --number 20 --output boats.html
    """
    return run_view(recipe, output, data, number)


@molmo2.command("eval", context_settings=CONTEXT)
@click.argument("reader", metavar="SET")
@click.argument("files", nargs=-1, required=True)
@click.option("--media", multiple=True, help="Folder of the media, or a JSON file from names to URLs.")
@click.option("--model", envvar=MODEL_VARIABLE, required=True, help=f"Folder or repository (or {MODEL_VARIABLE}).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="auto", show_default=True, help="Of the weights.")
@click.option("--limit", type=click.IntRange(1), help="Only the first rows.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of an answer, instead of the published limit.")
@click.option("--num-frames", type=click.IntRange(1), help="Maximum number of frames of a video.")
@click.option("--max-crops", type=click.IntRange(1), help="Maximum number of crops of an image.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines with every answer and its scores.")
def evaluate(reader: str, files: tuple[str, ...], media: tuple[str, ...], output: Path | None, **options: Any) -> int:
    """Score a model on an evaluation set, as the release does.

    SET is a name such as allenai/Molmo2-VideoCountEval; FILES hold its rows (.jsonl, .json, .parquet, .arrow).

    \b
    examples:
      molmo2 eval allenai/pixmo-points-eval points.parquet --model molmo2-hf --output answers.jsonl
      molmo2 eval allenai/Molmo2-VideoCountEval rows.jsonl --media videos --limit 100
    """
    return run_evaluation(reader, files, media, output, options)


@molmo2.command(context_settings={**CONTEXT, "ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def app(arguments: tuple[str, ...]) -> int:
    """Start the demo page, which the repository has.

    It is no part of the installed package.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "app" / "__main__.py").is_file():
        raise click.UsageError(
            "The demo app lies in the repository of molmo2-transformers, not in the installed package. Clone it, and "
            "run `make app` there."
        )
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "app", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
