"""Long videos, window by window: asked, kept in a journal, merged.

    tracks = track_long(model, processor, "day.mp4", "dog", journal="dog.jsonl", progress=True)
    for partial in stream_long(model, processor, "day.mp4", TrackTask("dog")):
        print(partial.record["end"], len(partial.result.tracks))

The model is behind one callable (`Ask`), so that anything that answers a prompt about frames can take its place.
"""

import json
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm.auto import tqdm
from transformers import GenerationConfig

from molmo2.batch.journal import FORMATS, Journal, OutputError
from molmo2.image.limits import MediaLimits
from molmo2.long_video.source import Clip, LiveVideo, LongVideo
from molmo2.long_video.tasks import (
    Ask,
    AskTask,
    CountTask,
    LocalizeTask,
    LongAnswer,
    LongCount,
    LongEvents,
    LongTracks,
    Merger,
    Record,
    Reply,
    Task,
    TrackTask,
)
from molmo2.long_video.tracks import JoinSettings
from molmo2.long_video.windows import Cutting
from molmo2.tools.ask import Request, user_turn
from molmo2.tools.plan import RequestPlan, plan

SAMPLING_OPTIONS = frozenset(
    ("num_frames", "max_fps", "sampling_fps", "fps", "frame_sample_mode", "clip", "do_sample_frames")
)

R = TypeVar("R")
Video = LongVideo | LiveVideo


@dataclass(frozen=True)
class Partial(Generic[R]):
    """What is known after a window.

    Attributes:
        record: What was kept of it: its number (`row`), `start` and `end` in seconds of the whole video, the `text` of
            the answer, and what was read in it.
        result: For the video so far.
        num_windows: Of the whole video; None for a live one.
    """

    record: Record
    result: R
    num_windows: int | None


def run_windows(
    video: Video,
    task: Task[R],
    ask_model: Ask,
    *,
    journal: str | Path | None = None,
    overwrite: bool = False,
    settings: Record | None = None,
    progress: bool = False,
) -> Generator[Partial[R], None, None]:
    """Ask about each window of a video in order, and merge the answers.

    Args:
        ask_model: From a prompt and a window to an answer; without a window the prompt is text alone.
        journal: A JSONL file (.jsonl, .ndjson) with one line for each window. While the run lasts it is
            JOURNAL.journal, beside JOURNAL.run.json; a run that ended at whatever moment continues where it was when
            it is started again, and the windows that are there are merged as if they had just been answered.
        overwrite: Begin the journal anew.
        settings: What else decides the answers, as JSON has it: a journal of other settings is refused.
        progress: Show a bar.
    Raises:
        OutputError: The journal is no JSONL file, belongs to another run, or cannot be written.
    """
    merger = task.merger()
    total = video.num_windows
    kept = nullcontext(None) if journal is None else _journal(video, task, Path(journal), settings, overwrite)
    with kept as lines, tqdm(total=total, unit="window", disable=not progress) as bar:
        num_done = 0
        for record in [] if lines is None else lines.results():
            yield _merged(record, merger, total)
            num_done += 1
            bar.update()
        if lines is not None and lines.is_complete:
            return
        for clip in video.clips(num_done):
            record = {"row": clip.window.index, "error": None, **task.read(clip, ask_model, merger)}
            if lines is not None:
                lines.write(record)
            yield _merged(record, merger, total)
            bar.update()
        if lines is not None:
            lines.finish(ordered=False, summary={"rows": len(lines.done), "errors": 0})


def _journal(video: Video, task: Task[Any], path: Path, settings: Record | None, overwrite: bool) -> Journal:
    if FORMATS.get(path.suffix.lower()) != "jsonl":
        accepted = " or ".join(suffix for suffix, kind in FORMATS.items() if kind == "jsonl")
        raise OutputError(
            f"The journal is '{path}', but it holds lines of JSON. Name a file that ends with {accepted}."
        )
    identity = {"video": video.identity(), "task": task.identity(), "settings": {} if settings is None else settings}
    return Journal(path, identity, overwrite=overwrite)


def _merged(record: Record, merger: Merger[R], num_windows: int | None) -> Partial[R]:
    merger.add(record)
    return Partial(record, merger.result(), num_windows)


def stream_long(
    model: Any,
    processor: Any,
    source: Any,
    task: Task[R],
    *,
    journal: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    processor_kwargs: dict[str, Any] | None = None,
    **generate_options: Any,
) -> Iterator[Partial[R]]:
    """A task over a long video, with the result so far after each window.

    Args:
        source: A `LongVideo` or `LiveVideo`; or a path, URL, bytes or an open file, which becomes a `LongVideo` with
            its default windows, within the `limits` of `processor_kwargs` or of the processor.
        task: `TrackTask`, `CountTask`, `LocalizeTask`, `AskTask`, or your own.
        journal, overwrite, progress: As of `run_windows`. A journal of other options is refused; those that JSON does
            not hold, such as functions, are known by their types.
        processor_kwargs: Options of the processor for each window, such as `key_frame_interval=4` for slow-fast.
        generate_options: As of `ask`.
    Raises:
        ValueError: `processor_kwargs` would sample anew; and as `ask`, `LongVideo` and `run_windows`.
    """
    options = {} if processor_kwargs is None else dict(processor_kwargs)
    limits = _video_options(options).get("limits")
    limits = processor.video_processor.limits if limits is None else limits
    asked = model_call(model, processor, options, generate_options)
    settings = None if journal is None else _journal_settings(model, options, generate_options)
    with _opened(source, limits) as video:
        kept: dict[str, Any] = {"journal": journal, "overwrite": overwrite, "settings": settings}
        with closing(run_windows(video, task, asked, progress=progress, **kept)) as partials:
            yield from partials


def _video_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the processor that videos see, flat.

    Raises:
        ValueError: They would sample anew.
    """
    found = {**(options.get("common_kwargs") or {}), **options, **(options.get("videos_kwargs") or {})}
    refused = sorted(found.keys() & SAMPLING_OPTIONS)
    if refused:
        raise ValueError(
            f"The options of the processor have {refused}, but the windows decide what is sampled. Use "
            "LongVideo(source, window=..., fps=...)."
        )
    return found


def _opened(source: Any, limits: MediaLimits) -> AbstractContextManager[Video]:
    """The video; closed in the end if it was opened here."""
    return nullcontext(source) if isinstance(source, LongVideo | LiveVideo) else LongVideo(source, limits=limits)


def model_call(
    model: Any,
    processor: Any,
    processor_kwargs: dict[str, Any] | None = None,
    generate_options: dict[str, Any] | None = None,
) -> Ask:
    """A model and its processor as `run_windows` takes them."""
    options = {} if generate_options is None else generate_options

    def asked(prompt: Any, clip: Clip | None) -> Reply:
        conversation = user_turn(prompt, [], [] if clip is None else [clip.video])
        own = None if clip is None else processor_kwargs
        request = Request.from_conversations(model, processor, [prompt], [conversation], own, options)
        answer = request.answer(0, request.generate(model))
        return Reply(answer.text, answer.truncated)

    return asked


# --- one call for a result -------------------------------------------------------------------------------------------


def ask_long(model: Any, processor: Any, source: Any, question: str, **options: Any) -> LongAnswer:
    """Answer a question about a long video: the answers about its windows, and a summary that each brings up to date.

    Args:
        options: As of `stream_long`.
    """
    return _last(stream_long(model, processor, source, AskTask(question), **options), LongAnswer())


def track_long(
    model: Any,
    processor: Any,
    source: Any,
    what: str,
    *,
    fps: float | None = None,
    joins: JoinSettings | None = None,
    **options: Any,
) -> LongTracks:
    """Follow objects through a long video, with the same id from window to window.

    Args:
        what: Their name.
        fps: Positions a second to ask for, as of `prompts.track`; what is sampled is a matter of the `LongVideo`.
        joins: When two tracks are one object; `JoinSettings(unique=True)` for something that exists once.
        options: As of `stream_long`.
    """
    task = TrackTask(what, fps, JoinSettings() if joins is None else joins)
    return _last(stream_long(model, processor, source, task, **options), LongTracks())


def count_long(
    model: Any,
    processor: Any,
    source: Any,
    what: str,
    *,
    fps: float | None = None,
    joins: JoinSettings | None = None,
    **options: Any,
) -> LongCount:
    """How many different objects of a kind there are in a long video. Arguments as of `track_long`."""
    task = CountTask(what, fps, JoinSettings() if joins is None else joins)
    return _last(stream_long(model, processor, source, task, **options), LongCount())


def localize_long(model: Any, processor: Any, source: Any, what: str | None = None, **options: Any) -> LongEvents:
    """When things happen in a long video; those that two windows see are one.

    Args:
        what: The events to look for; None for all.
        options: As of `stream_long`.
    """
    return _last(stream_long(model, processor, source, LocalizeTask(what), **options), LongEvents())


def _last(partials: Iterator[Partial[R]], nothing: R) -> R:
    result = nothing
    for partial in partials:
        result = partial.result
    return result


# --- limits and settings ---------------------------------------------------------------------------------------------


def fit_windows(
    video: Video,
    processor: Any,
    question: Any,
    *,
    max_tokens: int | None = None,
    max_memory: int | None = None,
    model: Any = None,
    max_new_tokens: int = 0,
    **options: Any,
) -> RequestPlan:
    """Plan the windows of a video, and give them as few samples a second as a limit demands.

    Args:
        video: Its `fps` is lowered if a window would not fit.
        question: What is asked of each window: text or a `Prompt`.
        max_tokens, max_memory, model, max_new_tokens, options: As of `molmo2.plan`; the limits hold for one window.
    Returns:
        The plan of one whole window.
    Raises:
        ValueError: Not even one sample fits, or `options` would sample anew; and as `molmo2.plan`.
    """
    _video_options(options)
    cutting = video.cutting
    times = [cutting.seconds(sample) for sample in range(cutting.size)]
    frames = [np.zeros((2, 2, 3), dtype=np.uint8)] * len(times)  # frames of any size become as many tokens
    found = plan(
        processor,
        user_turn(question, [], [(frames, {"timestamps": times})]),
        max_tokens=max_tokens,
        max_memory=max_memory,
        model=model,
        max_new_tokens=max_new_tokens,
        **{**options, "num_frames": len(frames), "max_fps": None, "frame_sample_mode": "uniform_last_frame"},
    )
    if found.reduced:
        video.cutting = _thinned(cutting, found.num_frames[0])
    return found


def _thinned(cutting: Cutting, num_frames: int) -> Cutting:
    """The same windows with at most `num_frames` samples.

    Raises:
        ValueError: Fewer samples than make a window and an overlap.
    """
    rate = num_frames / cutting.window
    for fps in (rate, *(rate * share / 100 for share in range(99, 0, -1))):  # rounding may add a sample
        fitting = replace(cutting, fps=fps)
        if fitting.size <= num_frames:
            return fitting
    raise ValueError(f"{num_frames} frames are too few for windows of {cutting.window:g} s. Pass shorter ones.")


def _journal_settings(model: Any, options: dict[str, Any], generate_options: dict[str, Any]) -> Record:
    name = getattr(getattr(model, "config", None), "name_or_path", None) or getattr(model, "name_or_path", None)
    plain = {key: _as_json(value) for key, value in sorted({**options, **generate_options}.items())}
    return {"model": str(name), **plain}


def _as_json(value: Any) -> Any:
    """A value as JSON has it, the same in each process; what it cannot hold is the name of its type."""

    def plain(other: Any) -> Any:
        return other.to_dict() if isinstance(other, GenerationConfig) else type(other).__name__

    try:
        return json.loads(json.dumps(value, default=plain, allow_nan=False))
    except (TypeError, ValueError):  # keys that are no text, NaN, cycles
        return type(value).__name__
