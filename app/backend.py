"""What the app does, without any page: pictures in, answers piece by piece, points drawn, files out.

    conversation = Backend(model, processor).open(["boats.jpg"])
    for update in conversation.answer("Point to the boats"):
        update.text, update.pictures, update.clip, update.files

Whatever goes wrong with what a user gives is a `UserError`, whose text is for them to read.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image

from molmo2.grounding.files import export_grounding
from molmo2.tools.ask import MediaSession
from molmo2.tools.draw import contact_sheet, draw
from molmo2.tools.draw_video import annotate_video

FILES = {"json": "points.json", "csv": "points.csv", "coco": "points_coco.json", "mot": "tracks_mot.txt"}
# Told by name, as tables of media types differ between systems; GIFs count as pictures.
CLIPS = {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
CLIPS |= {".webm", ".wmv"}
SHEET_COLUMNS = 3
SHEET_CELL = 180  # pixels; frames are kept no wider than this


class UserError(Exception):
    """Something that the user can put right; the message says how."""


@dataclass(frozen=True)
class Update:
    """The state of an answer that is being written.

    Attributes:
        text: The answer so far, with "red circles (3 points)" in place of tags.
        raw: The answer so far as the model wrote it.
        pictures: The pictures with the points so far, or the sampled frames on one sheet; None if nothing is new.
        clip: The clip with points and tracks; in the last update of an answer with points.
        files: What can be downloaded, by format; in the last update alone. None if the answer is not about places, so
            that those of an earlier one still hold.
        note: What the answer took; in the last update alone, and never empty there.
    """

    text: str
    raw: str
    pictures: tuple[Image.Image, ...] | None = None
    clip: Path | None = None
    files: dict[str, Path] | None = None
    note: str = ""


@dataclass(frozen=True)
class Backend:
    """A model and how it is asked.

    Attributes:
        num_frames: Most frames that are sampled of a clip.
        max_new_tokens: Most tokens of an answer.
        notice: What every user should know about this model.
    """

    model: Any
    processor: Any
    num_frames: int = 32
    max_new_tokens: int = 512
    notice: str = ""

    def open(self, paths: Sequence[str | Path] | None) -> "Conversation":
        """A conversation about pictures, or about one clip.

        Raises:
            UserError: There is none, there is too much, or a file cannot be read.
        """
        given = [Path(path) for path in paths or []]
        clips = [path for path in given if is_clip(path)]
        if not given:
            raise UserError("Add a picture or a clip first.")
        if clips and len(given) > 1:
            raise UserError("That is too much at once. Add one clip, or any number of pictures.")
        if clips:
            return Conversation(self, (), clips[0], self._frames(clips[0]))
        return Conversation(self, tuple(self._picture(path) for path in given), None, ())

    def _picture(self, path: Path) -> Image.Image:
        try:
            return self.processor.image_processor.fetch_images(str(path))
        except ValueError as error:
            raise UserError(f"“{path.name}” cannot be read as a picture. Is the file complete?") from error

    def _frames(self, path: Path) -> tuple[Image.Image, ...]:
        """The frames that the model will see, small enough for the sheet."""
        try:
            frames, _ = self.processor.video_processor.fetch_videos(str(path), num_frames=self.num_frames)
        except Exception as error:  # decoders raise nearly anything
            raise UserError(f"“{path.name}” cannot be read as a clip. Is the file complete?") from error
        pictures = [Image.fromarray(frame) for frame in frames]
        for picture in pictures:
            picture.thumbnail((SHEET_CELL, 4 * SHEET_CELL))
        return tuple(pictures)


class Conversation:
    """Questions about the same pictures, which are encoded with the first one.

    Attributes:
        images: The pictures; empty for a clip.
        clip: The clip, if it is about one.
        frames: Its sampled frames.
    """

    def __init__(
        self, backend: Backend, images: tuple[Image.Image, ...], clip: Path | None, frames: tuple[Image.Image, ...]
    ):
        self.images, self.clip, self.frames = images, clip, frames
        self._backend, self._session = backend, None
        self._folder = tempfile.TemporaryDirectory(prefix="molmo2_app_")  # goes with the conversation
        self._num_answers = 0
        self._stopped = Event()

    def stop(self) -> None:
        """End the answer that is being written; what there is of it counts."""
        self._stopped.set()

    def answer(self, question: str) -> Iterator[Update]:
        """The answer to the next question, piece by piece. Closing the generator stops the model.

        Raises:
            UserError: There is no question, or the pictures are too many for the model.
        """
        if not question.strip():
            raise UserError("Write a question first, for example “Point to the red circles.”")
        self._stopped = Event()
        try:
            yield from self._updates(question.strip(), self._stopped)
        except ValueError as error:  # such as more tokens than the model can read: these messages say what to do
            raise UserError(str(error)) from error
        finally:
            self.stop()

    def _updates(self, question: str, stopped: Event) -> Iterator[Update]:
        processor = self._backend.processor
        session = self._opened_session()
        empty = processor.post_process_grounding("", session.media)
        raw, points, answer = "", (), None
        pieces = session.chat_stream(
            question,
            max_new_tokens=self._backend.max_new_tokens,
            do_sample=False,
            stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), stopped.is_set(), device=ids.device)],
        )
        for piece in pieces:
            raw, points, answer = raw + piece.text, points + piece.points, piece.answer
            pictures = self._drawn(replace(empty, points=points)) if piece.points else None
            if answer is None:
                yield Update(readable(processor.post_process_grounding(raw, session.media)), raw, pictures)
        grounding, last = (
            answer.grounding,
            Update(readable(answer.grounding), answer.text, note=_note(answer, stopped.is_set())),
        )
        if grounding.points or grounding.none:
            clip, files = self._written(grounding)
            # Drawn once more, as now every label is known.
            last = replace(last, pictures=self._drawn(grounding), clip=clip, files=files)
        yield last

    def _opened_session(self) -> Any:
        """The pictures, read by the model; the first call does it."""
        if self._session is None:
            backend = self._backend
            pictures = {"images": list(self.images)} if self.clip is None else {"videos": str(self.clip)}
            options = {} if self.clip is None else {"num_frames": backend.num_frames}
            self._session = MediaSession(backend.model, backend.processor, **pictures, processor_kwargs=options)
        return self._session

    def _drawn(self, grounding: Any) -> tuple[Image.Image, ...]:
        if self.clip is None:
            return tuple(draw(list(self.images), grounding))
        columns = min(SHEET_COLUMNS, len(self.frames))
        return (contact_sheet(self.frames, grounding, columns=columns, cell_width=SHEET_CELL),)

    def _written(self, grounding: Any) -> tuple[Path | None, dict[str, Path]]:
        """The clip with its marks, and the files of an answer with points."""
        if not grounding.points:
            return self.clip, {}
        self._num_answers += 1
        folder = Path(self._folder.name) / f"answer_{self._num_answers}"
        folder.mkdir()
        clip = None
        if self.clip is not None:
            clip = annotate_video(self.clip, grounding, folder / "clip_with_points.mp4").path
        formats = [name for name in FILES if name != "mot" or self.clip is not None]
        return clip, {name: export_grounding(grounding, folder / FILES[name], format=name) for name in formats}


def is_clip(path: Path) -> bool:
    """Whether the file is shown as a clip, told from its suffix."""
    return path.suffix.lower() in CLIPS


def readable(grounding: Any) -> str:
    """An answer as people read it: each tag becomes its label and the number of its points."""
    text, parts, place = grounding.text, [], 0
    for tag in grounding.tags:
        number = len({point.id for point in tag.points}) if tag.kind == "tracks" else len(tag.points)
        noun = ("track" if tag.kind == "tracks" else "point") + "s" * (number != 1)
        parts += [text[place : tag.span[0]], f"{tag.label} ({number} {noun})".strip()]
        place = tag.span[1]
    return "".join([*parts, text[place:]]).strip()


def _note(answer: Any, was_stopped: bool) -> str:
    """One line about an answer."""
    timings = answer.timings
    seconds = timings.preparing + timings.first_token + timings.decoding
    read = timings.num_prompt_tokens - timings.num_cached_tokens
    cut = "; stopped" if was_stopped else "; more tokens are not allowed" if answer.truncated else ""
    return (
        f"{timings.num_new_tokens} tokens in {seconds:.1f} s; read {read} tokens, {timings.num_cached_tokens} were "
        f"known{cut}"
    )
