"""What the readers of rows share: questions with answers, settings, and the draw of one example."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo2.data.media import MediaReference, image_size, is_name, name_text
from molmo2.grounding.format import TAG_EDGE
from molmo2.values import is_number, is_whole

Row = Mapping[str, Any]
MAX_TRACK_FPS = 10  # times in answers have one decimal
Conversation = list[dict[str, Any]]
Size = tuple[float, float]  # (width, height) in pixels
OTHER_FORM = "the row has another form"
FORM_ERRORS = (TypeError, AttributeError, IndexError, ValueError, ArithmeticError)  # of readers, at such a row


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
        excluded_ids: Values of `video_id` that are left out, such as those of corrupt files; a list or a set.
        use_unsure: Use points of annotators who said that they were unsure.
        p_multi_turn: How often the questions about a clip are turns of one conversation instead of branches.
        max_captions: Captions of a video.
        max_images: Rows with more images are left out; of images with points a part is drawn.
        max_clip_seconds: Longer clips with points are left out; with `math.inf` none is.
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
        TypeError: A value is of another type.
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
        for names, is_right, expected in _TYPES:
            for name in names:
                if not is_right(getattr(self, name)):
                    raise TypeError(f"`Settings.{name}` is {getattr(self, name)!r}; expected {expected}.")
        for name, is_in_range, expected in _RANGES:
            if not is_in_range(getattr(self, name)):
                raise ValueError(f"`Settings.{name}` is {getattr(self, name)!r}; expected {expected}.")
        object.__setattr__(self, "excluded_ids", frozenset(map(name_text, self.excluded_ids)))
        if self.subtitle_mode == "frame_1" and self.frame_times is None:
            raise ValueError("`subtitle_mode='frame_1'` needs `frame_times`, the times of the sampled frames.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(map(is_name, value))


def _is_number_or_infinite(value: Any) -> bool:
    return is_number(value) or (isinstance(value, float) and math.isinf(value))


# Names of settings, what is right, and what an error says of it.
_TYPES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("config", "subtitle_mode", "point_mark", "explanation_style"), _is_text, "a text"),
    (("min_score", "p_multi_turn", "sampling_fps"), is_number, "a number"),
    (("max_clip_seconds",), _is_number_or_infinite, "a number of seconds, or math.inf for no limit"),
    (("max_captions", "max_images"), is_whole, "a whole number"),
    (("excluded_ids",), _are_names, "a list or a set of values of `video_id`"),
    (("use_unsure",), lambda value: isinstance(value, bool), "True or False"),
    (("frame_times",), lambda value: value is None or callable(value), "a function, or None"),
    (("image_size",), callable, "a function"),
)
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("p_multi_turn", lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    ("sampling_fps", lambda value: 0 < value <= MAX_TRACK_FPS, f"a number above 0 and up to {MAX_TRACK_FPS}"),
    ("max_captions", lambda value: value >= 1, "1 or more"),
    ("max_images", lambda value: value >= 1, "1 or more"),
    ("max_clip_seconds", lambda value: value > 0, "a number above 0"),
    ("subtitle_mode", lambda value: value in ("all", "frame_1"), "'all' or 'frame_1'"),
    ("point_mark", bool, "a text that is not empty"),
    ("explanation_style", bool, "a text that is not empty"),
)


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


def records(value: Any, *names: str) -> list[Any]:
    """The entries of a list, an array or None; `datasets` may give it as one row of lists.

    Args:
        names: What each entry that is a mapping has to have.
    Raises:
        OtherForm: The lists of that row differ in length, or an entry lacks a name.
        TypeError: The value, or one of that row, is a text or no list at all.
    """
    for each in value.values() if isinstance(value, Mapping) else (value,):
        if isinstance(each, (str, bytes)):
            raise TypeError(f"Expected a list; found {each!r:.60}.")
    if isinstance(value, Mapping):
        if len(set(map(len, value.values()))) > 1:
            raise OtherForm(f"the lists of {', '.join(map(str, value))} differ in length")
        entries = [dict(zip(value, entries)) for entries in zip(*value.values())]
    else:
        entries = [] if value is None else list(value)
    for name in names:
        if any(isinstance(entry, Mapping) and name not in entry for entry in entries):
            raise OtherForm(f"an entry of a list has no {name!r}")
    return entries


def text_of(value: Any) -> str:
    """A text without blanks at its ends; "" for None.

    Raises:
        TypeError: It is neither.
    """
    if not isinstance(value, (str, type(None))):
        raise TypeError(f"Expected a text; found {value!r:.60}.")
    return (value or "").strip()


def label_problem(label: str | None) -> str | None:
    """Why a label cannot stand in a prompt and in a tag, or None.

    Raises:
        TypeError: It is neither a text nor None.
    """
    if not text_of(label):
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
        # An image itself is an array of two or three dimensions.
        is_list = held is None or isinstance(held, (list, tuple)) or getattr(held, "ndim", None) in (1, 4)
        if images := records(held) if is_list else [held]:
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
