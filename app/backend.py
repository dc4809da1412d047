"""The app without its page: images or a video in, streamed answers with drawn points, files out.

    conversation = Backend(LocalEngine(model, processor)).open(["boats.jpg"])
    for update in conversation.answer("Point to the boats."):
        update.text, update.images, update.video, update.files

Invalid input is a `UserError`, whose message is shown to the user.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
from PIL import Image

from molmo2 import Answer, Grounding, MediaLimitError, MediaLimits, annotate_video, contact_sheet, draw, prompts
from molmo2.grounding import Point, export_grounding, parse_grounding
from molmo2.image.loading import fetch_images
from molmo2.image.measuring import measure_images
from molmo2.tools.answer import readable
from molmo2.video.decoding.isolation import call_isolated
from molmo2.video.loading import ReadingOptions, VideoItem, read_video
from molmo2.video.probing import probe_videos
from molmo2.video.sampling import SamplingSettings
from molmo2.video.suffixes import VIDEO_SUFFIXES

from . import MAX_FRAMES
from .engines import Engine, EngineError, EngineSession

FILES = {"json": "points.json", "csv": "points.csv", "coco": "points_coco.json", "mot": "tracks_mot.txt"}
# Uploads of strangers: narrower than what a program accepts of its own files. Nothing is fetched.
LIMITS = MediaLimits(
    image_pixels=50_000_000,
    video_frames=200_000,
    video_frame_pixels=9_000_000,
    visual_tokens=32_768,
    sources=("path",),
    decode_seconds=60,
)
MAX_PIXELS = 200_000_000  # of all images of a conversation together, which are kept decoded
MAX_QUESTION_CHARACTERS = 4000
# How a question is worded: as it stands, or as the prompt for the thing that was typed.
TASKS: dict[str, Callable[[str], Any]] = {
    "Ask": str,
    "Point": prompts.point,
    "Count": prompts.count,
    "Track": prompts.track,
}
CLOSING_SECONDS = 30.0  # of an answer whose conversation has ended: a step of a large model on a CPU takes seconds
WAITING_SECONDS = 5  # of a question for the end of the answer before it
SHEET_COLUMNS = 3
SHEET_CELL_WIDTH = 180  # pixels; frames are stored no wider than this

log = logging.getLogger(__name__)


class UserError(Exception):
    """An error that the user can fix; the message says how."""


@dataclass(frozen=True)
class Update:
    """The state of an answer that is being generated.

    Attributes:
        text: The answer so far, with "red circles (3 points)" in place of tags.
        raw: The answer so far as generated.
        images: The images with the points so far, or a sheet of the sampled frames; None if unchanged.
        video: The video with points and tracks; in the last update of an answer with points.
        files: Files to download, by format; in the last update only. None if the answer has no positions, so that the
            files of an earlier answer stay.
        note: Tokens and seconds of the answer; in the last update only, and never empty there.
    """

    text: str
    raw: str
    images: tuple[Image.Image, ...] | None = None
    video: Path | None = None
    files: dict[str, Path] | None = None
    note: str = ""


@dataclass(frozen=True)
class Backend:
    """A model and its settings.

    Attributes:
        num_frames: Maximum number of frames of a video, unless the user chooses another or the engine takes none.
        max_new_tokens: Maximum number of tokens of an answer.
        max_seconds: Longest time of an answer, after which it ends as if it had been stopped; and once more of
            drawing its points into a video, so that an answer that ended late is drawn too.
        notice: A text about the model, shown to all users.
        limits: What is refused of uploads.
    """

    engine: Engine
    num_frames: int = 32
    max_new_tokens: int = 512
    max_seconds: float = 300
    notice: str = ""
    limits: MediaLimits = LIMITS

    def open(
        self, paths: Sequence[str | Path] | None, num_frames: float | None = None, max_fps: float | None = None
    ) -> "Conversation":
        """A conversation about images, or about one video.

        Args:
            num_frames: Maximum number of frames of the video; None for that of the backend.
            max_fps: Maximum number of frames a second; None for that of the checkpoint.
        Raises:
            UserError: There is no file, there are several videos or a video beside images, a file cannot be read or
                is too large, or the frames are no numbers within the limits or cannot be chosen here.
        """
        options = self._sampling(num_frames, max_fps)
        files = [Path(path) for path in paths or []]
        videos = [path for path in files if is_video(path)]
        if not files:
            raise UserError("Add an image or a video first.")
        if videos and len(files) > 1:
            raise UserError("These are too many files. Add one video, or any number of images.")
        video = videos[0] if videos else None
        if not videos:
            self._check_together(files)
        images = () if videos else tuple(self._image(path) for path in files)
        try:
            self.engine.check(images, video)
        except EngineError as error:
            raise UserError(str(error)) from error
        if video is None:
            return Conversation(self, images, None, (), {})
        return Conversation(self, (), video, self._frames(video, options), options)

    def _sampling(self, num_frames: float | None, max_fps: float | None) -> dict[str, Any]:
        """Options of the processor for a video: only those that the engine takes."""
        taken = self.engine.sampling_options
        chosen = {"num_frames": num_frames, "max_fps": max_fps}
        if any(value is not None and name not in taken for name, value in chosen.items()):
            raise UserError(
                "The frames of a video cannot be chosen here: the server decides. Leave their number empty."
            )
        if not taken:
            return {}
        frames = self.num_frames if num_frames is None else num_frames
        if not (1 <= frames <= MAX_FRAMES and frames == int(frames)):
            raise UserError(
                f"{frames:g} is not valid: the number of frames must be a whole number from 1 to {MAX_FRAMES}."
            )
        options: dict[str, Any] = {"num_frames": int(frames)}
        if max_fps is not None:
            if not 0 < max_fps < float("inf"):
                raise UserError(f"{max_fps:g} is not valid: the frames per second must be a number above 0.")
            options["max_fps"] = float(max_fps)
        return options

    def _check_together(self, files: Sequence[Path]) -> None:
        """Refuse images that have too many pixels together, by their headers."""
        sizes = [size for path in files for size in self._of_image(path, measure_images)]
        num_pixels = sum(height * width for height, width in sizes)
        if num_pixels > MAX_PIXELS:
            raise UserError(
                f"These images are too large together: {num_pixels:,} pixels, and at most {MAX_PIXELS:,} fit here. "
                "Use fewer or smaller ones."
            )

    def _image(self, path: Path) -> Image.Image:
        return self._of_image(path, fetch_images)

    def _of_image(self, path: Path, read: Callable[..., Any]) -> Any:
        try:
            return read(path, limits=self.limits)
        except MediaLimitError as error:
            raise UserError(f"“{path.name}” is too large for this app.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"“{path.name}” cannot be read as an image. Is the file complete?") from error

    def _frames(self, path: Path, options: dict[str, Any]) -> tuple[Image.Image, ...]:
        """The sampled frames, scaled down for the sheet one by one: at full size they may take gigabytes."""
        processor, limits = self.engine.video_processor, self.limits
        try:
            (probe,) = probe_videos(processor, str(path), limits=limits)
            plan, times = probe(**options)
            limits.check("visual_tokens", plan.num_pooled_tokens, f"{path.name} has {plan.num_pooled_tokens} tokens")
            reading = ReadingOptions(
                SamplingSettings(len(times)),
                backend=processor.video_backend,
                sample_timestamps_fn=lambda metadata: times,
                limits=limits,
            )
            return read_video(VideoItem(path.name, str(path)), reading, _thumbnails)[0]
        except MediaLimitError as error:
            raise UserError(f"“{path.name}” is too large for this app, or takes too long to decode.") from error
        except Exception as error:  # decoders raise exceptions of many types
            raise UserError(f"“{path.name}” cannot be read as a video. Is the file complete?") from error


class Conversation:
    """Questions about the same images or video, which are encoded with the first question.

    Attributes:
        images: The images; empty for a video.
        video: The video, or None.
        frames: The sampled frames of the video.
        name: Random; no other conversation has it.
        turns: (question, answer) of each answer that has ended, as the page shows them.
    """

    def __init__(
        self,
        backend: Backend,
        images: tuple[Image.Image, ...],
        video: Path | None,
        frames: tuple[Image.Image, ...],
        options: dict[str, Any],
    ):
        self.images, self.video, self.frames = images, video, frames
        self._backend, self._options = backend, options
        self._session: EngineSession | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="molmo2_app_")  # deleted with the conversation
        self.name = Path(self._folder.name).name
        self.turns: list[tuple[str, str]] = []
        self._num_answers = 0
        self._stopped, self._idle, self._lock = Event(), Event(), Lock()
        self._idle.set()
        self._closed = False

    @property
    def is_answering(self) -> bool:
        """Whether an answer is being generated or drawn."""
        return not self._idle.is_set()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def stop(self) -> None:
        """End the answer that is being generated; its text so far becomes the answer."""
        self._stopped.set()

    def close(self, seconds: float = CLOSING_SECONDS) -> None:
        """End the conversation: no answer begins any more, and one that runs ends without another update.

        Args:
            seconds: Longest time to wait for its end, which comes with the next token, or once its points are drawn.
        """
        self._closed = True
        self.stop()
        if not self._idle.wait(seconds):
            log.warning("An answer still runs %g s after the end of its conversation.", seconds)

    def answer(self, question: str, task: str = "Ask") -> Generator[Update, None, None]:
        """The answer to the next question, piece by piece. Closing the generator stops the model.

        The first update is empty: the question is taken, and not refused.

        Args:
            task: One of `TASKS`: all but "Ask" take the name of a thing in place of a question.
        Raises:
            UserError: There is no question, or it or the prompt is too long, the server gives no answer, or another
                answer has not ended.
        """
        if task not in TASKS:
            raise UserError(f"“{task}” is not a task. Choose one of {', '.join(TASKS)}.")
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise UserError(f"The question has {len(question):,} characters. Use at most {MAX_QUESTION_CHARACTERS:,}.")
        if not question.strip():
            example = "“Point to the red circles.”" if task == "Ask" else "“red circles”"
            raise UserError(f"Write a question first, for example {example}")
        with self._lock:
            if not self._idle.wait(WAITING_SECONDS):  # its pieces and this question would mix in the session
                raise UserError("Another answer has not ended. Wait for its end, or stop it, and ask again.")
            self._idle.clear()
            self._stopped = Event()
        try:
            if not self._closed:  # from here on, closing sets the new event
                yield Update("", "")
                if self._closed:
                    return
                # The model has ended when this has: who waits for `_idle` finds no thread that still generates.
                with closing(self._updates(TASKS[task](question.strip()), self._stopped)) as updates:
                    for update in updates:
                        if self._closed:
                            return
                        yield update
        except (EngineError, ValueError) as error:  # such as a prompt that is too long; these messages say what to do
            raise UserError(str(error)) from error
        finally:
            self.stop()
            self._idle.set()

    def _updates(self, question: Any, stopped: Event) -> Generator[Update, None, None]:
        session = self._opened_session()
        empty = parse_grounding("", session.media)
        raw = ""
        points: tuple[Point, ...] = ()
        answer: Answer | None = None
        deadline = time.monotonic() + self._backend.max_seconds

        def should_stop() -> bool:
            if time.monotonic() >= deadline:
                stopped.set()
            return stopped.is_set()

        for piece in session.stream(question, self._backend.max_new_tokens, should_stop):
            raw, points, answer = raw + piece.text, points + piece.points, piece.answer
            drawn = self._draw(replace(empty, points=points)) if piece.points else None
            if answer is None:
                yield Update(readable(parse_grounding(raw, session.media)), raw, drawn)
        if answer is None or self._closed:
            return
        grounding = answer.grounding
        last = Update(readable(grounding), answer.text, note=_note(answer, stopped.is_set()))
        if grounding.points or grounding.says_none:
            video, files = self._export(grounding)
            if grounding.points and video is not None and video == self.video:
                last = replace(last, note=f"{last.note}; drawing into the video failed or took too long")
            # Drawn once more, as now every label is known.
            last = replace(last, images=self._draw(grounding), video=video, files=files)
        yield last

    def _opened_session(self) -> EngineSession:
        """The session about the images or the video; the first call encodes them."""
        if self._session is None:
            backend = self._backend
            self._session = backend.engine.open(self.images, self.video, self._options, backend.limits)
        return self._session

    def _draw(self, grounding: Grounding) -> tuple[Image.Image, ...]:
        if self.video is None:
            return tuple(draw(list(self.images), grounding))
        columns = min(SHEET_COLUMNS, len(self.frames))
        return (contact_sheet(self.frames, grounding, columns=columns, cell_width=SHEET_CELL_WIDTH),)

    def _export(self, grounding: Grounding) -> tuple[Path | None, dict[str, Path]]:
        """The annotated video, and the files of an answer with points."""
        if not grounding.points:
            return self.video, {}
        self._num_answers += 1
        folder = Path(self._folder.name) / f"answer_{self._num_answers}"
        folder.mkdir()
        video = None
        if self.video is not None:
            video = self._annotated(grounding, folder / "video_with_points.mp4")
        formats = [name for name in FILES if name != "mot" or self.video is not None]
        return video, {name: export_grounding(grounding, folder / FILES[name], format=name) for name in formats}

    def _annotated(self, grounding: Grounding, target: Path) -> Path | None:
        """The video with its points, decoded in another process; the video itself where that takes too long."""
        try:
            call_isolated(annotate_video, self.video, grounding, target, seconds=self._backend.max_seconds)
        except ValueError:  # its errors are of decoders and encoders; the answer itself is whole
            log.exception("Drawing into %s failed.", self.video)
            return self.video
        return target


def is_video(path: Path) -> bool:
    """Whether the file is a video, by its suffix; a GIF is an image."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def _thumbnails(frames: Iterator[np.ndarray], num_frames: int) -> tuple[Image.Image, ...]:
    """Frames (H, W, 3) at the size of the sheet."""
    images = []
    for frame in frames:
        image = Image.fromarray(frame)
        image.thumbnail((SHEET_CELL_WIDTH, 4 * SHEET_CELL_WIDTH))
        images.append(image)
    return tuple(images)


def _note(answer: Answer, was_stopped: bool) -> str:
    """One line about the cost of an answer. Counts of 0 are left out: a server need not count."""
    timings = answer.timings
    new, cached = timings.num_prompt_tokens - timings.num_cached_tokens, timings.num_cached_tokens
    seconds = f"{timings.total_seconds:.1f} s"
    tokens = f"{timings.num_new_tokens} tokens in {seconds}" if timings.num_new_tokens else seconds
    counts = [f"{count} {kind}" for count, kind in ((new, "new tokens"), (cached, "cached")) if count]
    prompt = f"; prompt: {', '.join(counts)}" if counts else ""
    end = "; stopped" if was_stopped else "; the maximum number of tokens is reached" if answer.truncated else ""
    return f"{tokens}{prompt}{end}"
