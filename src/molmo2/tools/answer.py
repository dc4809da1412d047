"""What asking gives, from a model in this process or from a server: answers, pieces of them, timings."""

from dataclasses import asdict, dataclass, field
from typing import Any

from molmo2.grounding.parse import Grounding, Point
from molmo2.grounding.structured import StructuredAnswer


@dataclass(frozen=True)
class Timings:
    """The time of each step, and the tokens of a row; the rows of a batch share the times.

    Attributes:
        preprocess_seconds: Decoding and cropping images and frames, rendering and tokenizing the prompt.
        time_to_first_token: Seconds from there to the first new token: vision tower and prefill.
        decode_seconds: The other tokens.
        num_prompt_tokens, num_cached_tokens: Tokens of the row's prompt, and those among them that were in the cache.
        num_new_tokens: Tokens of the answer.
    """

    preprocess_seconds: float
    time_to_first_token: float
    decode_seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_new_tokens: int

    @property
    def total_seconds(self) -> float:
        """All three steps together."""
        return self.preprocess_seconds + self.time_to_first_token + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token; 0 if there is only one."""
        is_measured = self.num_new_tokens > 1 and self.decode_seconds > 0
        return (self.num_new_tokens - 1) / self.decode_seconds if is_measured else 0.0


@dataclass(frozen=True)
class Answer:
    """A generated answer and its parsed content.

    Attributes:
        text: The answer without special tokens.
        grounding: Points, tracks and counts in it, in pixels and source frames of the question's images and videos.
        parsed: The result of the `Prompt`'s reader; equal to `grounding` for a question in plain text.
        truncated: The answer was cut off by `max_new_tokens` or `max_length`.
    """

    text: str
    grounding: Grounding
    parsed: Any = field(repr=False)  # what `text` and `grounding` show already
    truncated: bool
    timings: Timings

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class AnswerPiece:
    """A part of an answer that is being generated.

    Attributes:
        text: New text; all pieces together are the answer.
        points: Points that this piece completes.
        answer: The whole answer, in the last piece only.
    """

    text: str
    points: tuple[Point, ...] = ()
    answer: Answer | None = None


def answer_record(answer: Answer) -> dict[str, Any]:
    """An answer as JSON can hold it: one flat row of a table, with its points as a list.

    Returns:
        text, truncated; count (None where nothing was counted); points, each with label, id, x and y in pixels (or
        x_norm and y_norm as fractions where the size is unknown), image (from 0) or time in seconds and frame of the
        source; structured (only for prompts that ask for JSON); timings, in seconds and tokens.
    """
    grounding = answer.grounding
    record: dict[str, Any] = {
        "text": answer.text,
        "truncated": answer.truncated,
        "count": grounding.count,
        "points": [_point_record(point) for point in grounding.points],
    }
    if isinstance(answer.parsed, StructuredAnswer):
        record["structured"] = {name: value for name, value in asdict(answer.parsed).items() if name != "raw"}
    record["timings"] = {name: _rounded(value) for name, value in asdict(answer.timings).items()}
    return record


def readable(grounding: Grounding) -> str:
    """The text of an answer, with each tag replaced by its label and the number of its points."""
    text, position = grounding.text, 0
    parts: list[str] = []
    for tag in grounding.tags:
        number = len({point.id for point in tag.points}) if tag.kind == "tracks" else len(tag.points)
        noun = ("track" if tag.kind == "tracks" else "point") + "s" * (number != 1)
        parts += [text[position : tag.span[0]], f"{tag.label} ({number} {noun})".strip()]
        position = tag.span[1]
    return "".join([*parts, text[position:]]).strip()


def _point_record(point: Point) -> dict[str, Any]:
    record: dict[str, Any] = {"label": point.label, "id": point.id}
    if point.x is None or point.y is None:
        record |= {"x_norm": point.x_norm, "y_norm": point.y_norm}
    else:
        record |= {"x": _rounded(point.x), "y": _rounded(point.y)}
    if point.image_index is not None:
        return {**record, "image": point.image_index}
    return {**record, "time": point.time, "frame": None if point.frame is None else point.frame.source_index}


def _rounded(value: float) -> float:
    """Digits beyond these say nothing, and fill files."""
    return round(value, 3)
