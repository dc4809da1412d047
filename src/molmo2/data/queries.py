"""What the readers of rows share: questions with answers, settings, and the draw of one example."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo2.data.media import MediaReference, image_size
from molmo2.grounding.format import TAG_EDGE

Row = Mapping[str, Any]
MAX_TRACK_FPS = 10  # times in answers have one decimal
Conversation = list[dict[str, Any]]
Size = tuple[float, float]  # (width, height) in pixels
OTHER_FORM = "the row has another form"


class OtherForm(ValueError):
    """A row, or a part of it, has another form than those of its data set; the message is a reason for a report."""


@dataclass(frozen=True)
class Query:
    """A question and its answer.

    Attributes:
        style: What kind of answer it is, as `chat_template.jinja` and the loss weights know it.
        is_styled: The question names its style itself, so that the template must not prepend it.
    """

    style: str
    question: str
    answer: str
    is_styled: bool = False


@dataclass(frozen=True)
class Item:
    """The questions about the media of one example.

    Attributes:
        branches: Conversations of one or several turns, which do not see each other.
        system, subtitle: Text before the first question; "" for none.
        kept: Which of the media are shown, by index; None for all.
    """

    branches: Sequence[Sequence[Query]]
    system: str = ""
    subtitle: str = ""
    kept: Sequence[int] | None = None


@dataclass(frozen=True)
class Settings:
    """How rows become examples; the defaults are those of Molmo2's training, but for `subtitle_mode`.

    Attributes:
        config: The configuration of a data set that has several, such as "chart" of SynMultiImageQA, whose reader
            refuses unknown ones.
        min_score: Rows of captions with a lower `annotation_score` are left out.
        excluded_ids: Values of `video_id` that are left out, such as those of corrupt files.
        use_unsure: Use points of annotators who said that they were unsure.
        p_multi_turn: How often the questions about a clip are turns of one conversation instead of branches.
        max_captions: Captions of a video.
        max_images: Rows with more images are left out; of images with points a part is drawn.
        max_clip_seconds: Longer clips with points are left out.
        sampling_fps: Rate of tracks; rows whose frame rate it does not divide are left out.
        subtitle_mode: "all", or "frame_1" as in Molmo2's training, see `subtitle_text`. "frame_1" is not the default
            as it needs `frame_times`.
        frame_times: From the reference and the source of a video to the times of its sampled frames.
        image_size: From the source of an image to its (width, height), None where it is not known; for sets with
            points in pixels. The default reads files and does not fetch URLs. A side of 0 counts as not known.
        point_mark: What stands for a tag in `parsed_response` of pixmo-point-explanations. An assumption: the
            description that the readers follow does not say. Rows with another number of marks are left out.
        explanation_style: The style of pixmo-point-explanations. An assumption likewise.
    Raises:
        ValueError: A value is out of its range.
    """

    config: str = ""
    min_score: float = 3
    excluded_ids: frozenset[str] = frozenset()
    use_unsure: bool = False
    p_multi_turn: float = 0.2
    max_captions: int = 4
    max_images: int = 5
    max_clip_seconds: float = 63.0
    sampling_fps: float = 2
    subtitle_mode: str = "all"
    frame_times: Callable[[MediaReference, Any], Sequence[float]] | None = None
    image_size: Callable[[Any], Size | None] = image_size
    point_mark: str = "<|POINT|>"
    explanation_style: str = "point_qa"

    def __post_init__(self) -> None:
        is_rate = 0 < self.sampling_fps <= MAX_TRACK_FPS
        if not 0 <= self.p_multi_turn <= 1 or not is_rate or min(self.max_captions, self.max_images) < 1:
            raise ValueError(
                "Expected `p_multi_turn` from 0 to 1, `sampling_fps` above 0 and up to 10, `max_captions` and "
                f"`max_images` of 1 or more; found {self.p_multi_turn}, {self.sampling_fps}, {self.max_captions} and "
                f"{self.max_images}."
            )
        if not self.point_mark or not self.explanation_style:
            raise ValueError("`point_mark` and `explanation_style` are texts; found an empty one.")
        if self.subtitle_mode == "frame_1" and self.frame_times is None:
            raise ValueError("`subtitle_mode='frame_1'` needs `frame_times`, the times of the sampled frames.")


@dataclass(frozen=True)
class Draw:
    """What is drawn and known while one example is made.

    Attributes:
        has_cut_clips: Files of clips begin at 0; otherwise times are those of the whole video.
        times: Of the sampled frames, if the settings can tell.
        sizes: Of the images, for families with a `size_problem`.
    """

    rng: random.Random
    settings: Settings
    has_cut_clips: bool = False
    times: Sequence[float] | None = None
    sizes: Sequence[Size] = ()


def records(value: Any) -> list[Any]:
    """The entries of a list, an array or None; `datasets` may give it as one row of lists.

    Raises:
        OtherForm: The lists of that row differ in length.
    """
    if isinstance(value, Mapping):
        if len(set(map(len, value.values()))) > 1:
            raise OtherForm(f"the lists of {', '.join(map(str, value))} differ in length")
        return [dict(zip(value, entries)) for entries in zip(*value.values())]
    return [] if value is None else list(value)


def label_problem(label: str | None) -> str | None:
    """Why a label cannot stand in a prompt and in a tag, or None."""
    if not (label or "").strip():
        return "there is no label"
    return "the label contains a tag" if TAG_EDGE.search(str(label)) else None


def no_problem(row: Row, settings: Settings) -> str | None:
    """Every row is used."""
    return None


def no_requirement(settings: Settings) -> None:
    """Any settings will do."""


def no_options(row: Row, settings: Settings) -> dict[str, Any]:
    """The video is sampled as the processor does by default."""
    return {}


@dataclass(frozen=True)
class Family:
    """How the rows of a kind of data set are read.

    Attributes:
        read: From the rows of one example to its questions.
        media: The images, or the video, of a row: references, or images that it holds.
        group_by: Columns; rows with the same values become one example.
        problem: Why a row is left out, or None. A row at whose form it fails is left out too.
        video_options: Options of the video part.
        size_problem: For rows with points in pixels: why one is left out, from the sizes of its images, or None.
        require: Raises a ValueError for settings that the family cannot be read with.
    """

    read: Callable[[Sequence[Row], Draw], Item]
    media: Callable[[Row], Sequence[Any]]
    group_by: tuple[str, ...] = ()
    problem: Callable[[Row, Settings], str | None] = no_problem
    video_options: Callable[[Row, Settings], dict[str, Any]] = field(default=no_options)
    size_problem: Callable[[Row, Sequence[Size]], str | None] | None = None
    require: Callable[[Settings], None] = no_requirement


def video_of(row: Row) -> list[MediaReference]:
    """The video of a row with `video_id`, and its clip if it has one."""
    start, end = row.get("video_start", row.get("clip_start")), row.get("video_end", row.get("clip_end"))
    clip = None if start is None and end is None else (start or 0.0, end)
    return [MediaReference("video", row["video_id"], clip, row)]


def images_of(row: Row) -> list[Any]:
    """The images of a row: those it holds, or references to its URLs; one without a name where its columns are empty.

    Raises:
        KeyError: It has no column for images.
    """
    for name in ("images", "image"):
        held = row.get(name)
        images = list(held) if isinstance(held, (list, tuple)) else [] if held is None else [held]
        if images:
            return images
    urls = records(row.get("image_urls")) or [row.get("image_url")]
    if urls[0] is None and not {"images", "image", "image_urls", "image_url"} & set(row):
        raise KeyError("image_url")
    return [MediaReference("image", url, None, row) for url in urls]


def no_media(row: Row) -> list[Any]:
    """Rows of text alone."""
    return []


def conversations(item: Item) -> list[Conversation]:
    """The branches of an item as messages, without their media."""
    leading: Conversation = [{"role": "subtitle", "content": item.subtitle}] * bool(item.subtitle)
    leading += [{"role": "system", "content": item.system}] * bool(item.system)
    return [[*leading, *(message for query in turns for message in _turn(query))] for turns in item.branches]


def _turn(query: Query) -> Conversation:
    part: dict[str, Any] = {"type": "text", "text": query.question}
    if not query.is_styled:
        part["style"] = query.style
    user: dict[str, Any] = {"role": "user", "content": [part]}
    if query.is_styled:  # for the loss weights; the template reads styles of parts only
        user["style"] = query.style
    return [user, {"role": "assistant", "content": [{"type": "text", "text": query.answer}]}]
