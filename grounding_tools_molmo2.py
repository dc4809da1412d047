"""What a processor offers around answers - prompts, questions, drawings, files - without any import by hand."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .ask_molmo2 import AnswerPiece, MediaSession, ask, ask_stream
from .drawing_molmo2 import DrawingStyle, contact_sheet, draw_images, draw_points
from .grounding_files_molmo2 import save, to_coco, to_csv, to_json, to_mot
from .grounding_format_molmo2 import format_points, format_tracks
from .grounding_molmo2 import Grounding, GroundingStream
from .prompts_molmo2 import prompts
from .video_drawing_molmo2 import AnnotatedVideo, annotate_video

WRITERS = {"json": to_json, "csv": to_csv, "coco": to_coco, "mot": to_mot}
FORMAT_OF_SUFFIX = {".json": "json", ".csv": "csv", ".txt": "mot"}


class GroundingTools:
    """Methods of `Molmo2Processor` around questions and answers.

    Attributes:
        prompts: The prompts of the training, each with its reader; see `prompts_molmo2`.
    """

    prompts = prompts

    def ask(self, model: Any, question: Any, images: Any = None, videos: Any = None, **options: Any) -> Any:
        """One call from a question, or a batch of them, to `Answer`s; see `ask_molmo2.ask`."""
        return ask(model, self, question, images, videos, **options)

    def ask_stream(
        self, model: Any, question: Any, images: Any = None, videos: Any = None, **options: Any
    ) -> Iterator[AnswerPiece]:
        """An answer and its points while it is written; see `ask_molmo2.ask_stream`."""
        return ask_stream(model, self, question, images, videos, **options)

    def session(self, model: Any, images: Any = None, videos: Any = None, **options: Any) -> MediaSession:
        """Several questions about pictures that are read once; see `ask_molmo2.MediaSession`."""
        return MediaSession(model, self, images, videos, **options)

    format_points = staticmethod(format_points)
    format_tracks = staticmethod(format_tracks)

    @staticmethod
    def grounding_stream(media: Any = None, row: int = 0) -> GroundingStream:
        """A reader for an answer that is still being written.

        Args:
            media: the inputs that it is generated from, or what `grounding_molmo2.media_info` takes.
            row: which row of the inputs.
        """
        return GroundingStream(getattr(media, "media", [media] * (row + 1))[row])

    @staticmethod
    def draw(pictures: Any, grounding: Grounding, style: DrawingStyle | None = None, **style_options: Any) -> Any:
        """Copies of the pictures of a prompt with the points of its answer.

        Args:
            pictures: the image of the prompt, or the list of its images; see `drawing_molmo2.draw_points`.
            style, style_options: a `DrawingStyle`, or its attributes: `draw(image, grounding, radius=8)`.

        Returns:
            A PIL image, or a list of them.
        """
        style = DrawingStyle(**style_options) if style is None else style
        if isinstance(pictures, (list, tuple)):
            return draw_images(pictures, grounding, style)
        return draw_points(pictures, grounding, style)

    @staticmethod
    def draw_frames(frames: Sequence[Any], grounding: Grounding, **options: Any) -> Image.Image:
        """The sampled frames of a video on one sheet with their points; see `drawing_molmo2.contact_sheet`."""
        return contact_sheet(frames, grounding, **options)

    @staticmethod
    def annotate_video(
        source: str | Path, grounding: Grounding, target: str | Path, style: DrawingStyle | None = None
    ) -> AnnotatedVideo:
        """A copy of a video with the points and tracks of an answer; see `video_drawing_molmo2.annotate_video`."""
        return annotate_video(source, grounding, target, style)

    @staticmethod
    def export_grounding(grounding: Grounding, path: str | Path, format: str | None = None, **options: Any) -> Path:
        """Write an answer to a file.

        Args:
            path: the file; its suffix chooses between JSON (.json), CSV (.csv) and MOT (.txt).
            format: "json", "csv", "coco" or "mot"; None goes by the suffix.
            options: of `to_coco` (file_names) and `to_mot` (fps, box_size).
        Raises:
            ValueError: The format is unknown, or cannot hold this answer.
        """
        chosen = FORMAT_OF_SUFFIX.get(Path(path).suffix.lower()) if format is None else format
        if chosen not in WRITERS:
            raise ValueError(
                f"Cannot tell the format of '{path}' (format={format!r}). Pass one of {list(WRITERS)}, or a path that "
                f"ends in one of {list(FORMAT_OF_SUFFIX)}."
            )
        return save(WRITERS[chosen](grounding, **options), path)
