"""Rows of the evaluation sets: what to ask, and what `molmo2.evaluate` needs to judge the answer."""

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from molmo2.data.examples import MAX_NAMED, MISSING, ReadingReport
from molmo2.data.media import MediaReference, Resolver, is_name, name_in_report, source_of, urls
from molmo2.data.queries import FORM_ERRORS, OtherForm, Row, images_of, label_problem, records, text_of, video_of
from molmo2.grounding import prompts

TRACK_FPS = 2
_OBJECT_MASKS = ("the list of masks of an object", "frame_id", "rle")
COUNT_BINS = (0, 5, 10, 15, 20, 25)  # first counts of the bins
TRACK_GROUPS = {
    "APTv2": "animal",
    "dancetrack": "dance",
    "sportsmot": "sports",
    "personpath22": "person",
    "sav": "misc",
}


@dataclass(frozen=True)
class EvaluationExample:
    """A question and its truth.

    Attributes:
        row: Index of its row.
        messages: For `apply_chat_template`; the question and its media.
        metric: Name of the function in `molmo2.evaluate.METRICS`.
        truth: Arguments of that function, behind the answer.
        max_new_tokens: Of the published evaluation.
        groups: Names of the groups in which the score is reported too.
    """

    row: int
    messages: list[dict[str, Any]]
    metric: str
    truth: dict[str, Any]
    max_new_tokens: int
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Asked:
    """A row as it is read: the question and the truth; `options` are those of the video part."""

    question: str
    truth: dict[str, Any]
    groups: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Set:
    """How the rows of an evaluation set are read.

    `read` also takes the sources of the media, of which the first `num_shown` are shown; None for all.
    """

    read: Callable[[Row, Sequence[Any]], _Asked]
    media: Callable[[Row], Sequence[Any]]
    metric: str
    max_new_tokens: int
    num_shown: int | None = None


def count_bin(count: int) -> str:
    """The bin of a true count in which the published evaluation reports it: "0-4", "5-9", ... "25+".

    Raises:
        ValueError: The count is negative.
    """
    if count < 0:
        raise ValueError(f"A count is 0 or more; found {count}.")
    start = max(first for first in COUNT_BINS if first <= count)
    return f"{start}+" if start == COUNT_BINS[-1] else f"{start}-{start + 4}"


def _number(value: Any, what: str) -> float:
    """A finite number of a row, as it is.

    Raises:
        OtherForm: It is none.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise OtherForm(f"{what} is {value!r:.60}; expected a number")
    return value  # type: ignore[return-value]


def _above_zero(row: Row, column: str) -> float:
    value = _number(row[column], f"`{column}`")
    if value <= 0:
        raise OtherForm(f"`{column}` is {value!r}; expected a number above 0")
    return value


def _count(row: Row) -> int:
    count = _number(row["count"], "`count`")
    if count < 0 or count % 1:
        raise OtherForm(f"`count` is {count!r}; expected a whole number from 0 on")
    return int(count)


def _label(row: Row, column: str = "label") -> str:
    """What is asked for.

    Raises:
        OtherForm: There is none, or it contains a tag.
    """
    if problem := label_problem(row[column]):
        raise OtherForm(problem)
    return row[column]


def _entries(value: Any, what: str, *names: str) -> list[Any]:
    """The entries of a list, as by `records`; a null would be scored as if there were nothing.

    Raises:
        OtherForm: It is null, or an entry lacks a name.
    """
    if value is None:
        raise OtherForm(f"{what} is null; expected a list, which may be empty")
    return records(value, *names)


def _point(point: Mapping[str, Any]) -> tuple[float, float]:
    """(x, y) as they are.

    Raises:
        OtherForm: One is missing or no number.
    """
    try:
        x, y = point["x"], point["y"]
    except KeyError as error:
        raise OtherForm(f"a point has no {error}") from error
    return _number(x, "x of a point"), _number(y, "y of a point")


def _video_points(row: Row, sources: Sequence[Any]) -> _Asked:
    times, places, masks = (_entries(row[name], f"`{name}`") for name in ("two_fps_timestamps", "points", "masks"))
    if not len(times) == len(places) == len(masks):
        raise OtherForm("there are not as many times or masks as points")
    truth = {
        "size": (_above_zero(row, "width"), _above_zero(row, "height")),
        "duration": _above_zero(row, "video_duration"),
        "points": [(_number(time, "a time"), *_point(point)) for time, point in zip(times, places)],
        "masks": [
            {_number(entry["frame_id"], "`frame_id`") / 2: entry["rle"] for entry in _entries(each, *_OBJECT_MASKS)}
            for each in masks
        ],
    }
    return _Asked(prompts.point(_label(row)).text, truth, {}, {"max_fps": 2})


def _video_count(row: Row, sources: Sequence[Any]) -> _Asked:
    is_worded, count = text_of(row.get("question")), _count(row)
    question = row["question"] if is_worded else prompts.count(_label(row)).text
    groups = {"category": row["category"]} if text_of(row.get("category")) else {}
    groups["count"] = count_bin(count)
    return _Asked(question, {"count": count}, groups, {"max_fps": 2})


def _by_object(row: Row, column: str) -> dict[Any, list[Any]]:
    """The lists of a column of tracks by the id of their object."""
    entries = _entries(row[column], f"`{column}`", "object_id", column)
    found = {entry["object_id"]: _entries(entry[column], f"`{column}` of an object") for entry in entries}
    if len(found) < len(entries):
        raise OtherForm(f"an object has several entries in `{column}`")
    return found


def _video_tracks(row: Row, sources: Sequence[Any]) -> _Asked:
    fps, places, masks = _above_zero(row, "fps"), _by_object(row, "points"), _by_object(row, "masks")
    if places.keys() != masks.keys():
        raise OtherForm(f"there are points of the objects {list(places)}, and masks of {list(masks)}")
    length = max(map(len, places.values()), default=0)
    # Of times k / TRACK_FPS, as `frames_of` reads them from an answer, also where the rates do not divide.
    sampled = {round(place / TRACK_FPS * fps) for place in range(int(length / fps * TRACK_FPS) + 2)}
    points: dict[int, dict[Any, tuple[float, float]]] = {}
    for name, track in places.items():
        for frame, at in enumerate(track):
            if at is not None and frame in sampled:
                points.setdefault(frame, {})[name] = (_number(at[0], "x of a point"), _number(at[1], "y of a point"))
    truth = {
        "size": (_above_zero(row, "w"), _above_zero(row, "h")),
        "fps": fps,
        "points": points,
        "masks": {name: dict(enumerate(each)) for name, each in masks.items()},
    }
    group = TRACK_GROUPS.get(row.get("video_dataset", ""))
    options = {"frame_sample_mode": "fps", "sampling_fps": TRACK_FPS}
    return _Asked(prompts.track(_label(row, "exp"), TRACK_FPS).text, truth, {"group": group} if group else {}, options)


def _pixels(mask: Any) -> np.ndarray:
    """A mask as an array of bool; columns of arrays may have arrays of arrays."""
    pixels = np.asarray(mask)
    if pixels.dtype == object:
        pixels = np.array([np.asarray(line, dtype=bool) for line in pixels])
    return pixels.astype(bool)


def _image_points(row: Row, sources: Sequence[Any]) -> _Asked:
    masks = [_pixels(mask) for mask in _entries(row["masks"], "`masks`")]
    if len({mask.shape for mask in masks}) > 1 or any(mask.ndim != 2 for mask in masks):
        raise OtherForm(f"the masks have the shapes {[mask.shape for mask in masks][:5]}; expected one (H, W) for all")
    height, width = masks[0].shape if masks else (1, 1)  # nothing to point at: the size decides nothing
    places = [_point(point) for point in _entries(row["points"], "`points`")]  # in the order of the masks
    if len(places) != len(masks):
        raise OtherForm("there are not as many masks as points")
    points = [(x / 100 * width, y / 100 * height) for x, y in places]
    truth = {"size": (width, height), "points": points, "masks": masks}
    return _Asked(prompts.point(_label(row)).text, truth)


def _image_count(row: Row, sources: Sequence[Any]) -> _Asked:
    count = _count(row)
    return _Asked(prompts.count(_label(row)).text, {"count": count}, {"count": str(count)})


def _pointbench(row: Row, sources: Sequence[Any]) -> _Asked:
    pixels: np.ndarray = np.asarray(sources[1])
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "buif":
        raise ValueError(
            f"The mask {repr(sources[1])[:80]} is a {type(sources[1]).__name__}; expected an image or an array (H, W) "
            "or (H, W, channels). `media` has to open masks: it is asked for them with the kind 'mask'."
        )
    if not text_of(row["user_input"]) or not text_of(row["category"]):
        raise OtherForm("there is no `user_input`, or no `category`")
    if pixels.ndim == 3:
        num_colors = pixels.shape[-1] - (pixels.shape[-1] in (2, 4))  # without alpha
        pixels = np.asarray(pixels[..., :num_colors].any(axis=-1))
    mask = pixels.astype(bool)
    truth = {"size": mask.shape[::-1], "mask": mask}
    return _Asked(row["user_input"], truth, {"category": row["category"]})


def _image_and_mask(row: Row) -> list[Any]:
    """The image and the mask of a row of PointBench: held, or the names of their files."""
    found = []
    for kind in ("image", "mask"):
        given = [row[name] for name in (kind, f"{kind}_filename", f"{kind}_path") if name in row]
        if not given:
            raise KeyError(kind)
        value: Any = next((each for each in given if each is not None), None)
        is_held = value is not None and not is_name(value)
        found.append(value if is_held else MediaReference(kind, value, None, row))
    return found


def _track_video(row: Row) -> list[MediaReference]:
    return [MediaReference("video", row.get("clip") or row["video"], None, row)]


EVALUATION_SETS: dict[str, _Set] = {
    "allenai/Molmo2-VideoPointEval": _Set(_video_points, video_of, "video_pointing", 2048),
    "allenai/Molmo2-VideoCountEval": _Set(_video_count, video_of, "video_counting", 2048),
    "allenai/Molmo2-VideoTrackEval": _Set(_video_tracks, _track_video, "tracking", 4096),
    "allenai/pixmo-points-eval": _Set(_image_points, images_of, "pointing", 192),
    "allenai/pixmo-count": _Set(_image_count, images_of, "image_counting", 192),
    "PointArena/pointarena-data": _Set(_pointbench, _image_and_mask, "pointbench", 256, 1),
}


def evaluation_examples(
    name: str, rows: Sequence[Row], media: Resolver = urls
) -> tuple[list[EvaluationExample], ReadingReport]:
    """The questions of an evaluation set, and a report of rows whose media are missing.

        examples, report = evaluation_examples("allenai/Molmo2-VideoCountEval", rows, Folder("videos"))
        scores = [METRICS[example.metric](answer, **example.truth) for example, answer in zip(examples, answers)]

    Args:
        name: A key of `EVALUATION_SETS`.
        rows: As for `Examples`.
        media: As for `Examples`. Masks of PointBench are asked for with the kind "mask"; return an image or an array.
    Raises:
        ValueError: There is no such set, a column is missing, a row has another form or a null where its score needs
            a value, or a mask of PointBench is no image.
    """
    if name not in EVALUATION_SETS:
        raise ValueError(f"There is no reader for {name!r}. There are readers for {', '.join(EVALUATION_SETS)}.")
    reader, report, examples = EVALUATION_SETS[name], ReadingReport(name), []
    for index, row in enumerate(rows):
        report.rows += 1
        with _row_of(name, index, row):
            references = list(reader.media(row))
        sources = [source_of(each, media) for each in references]
        absent = [name_in_report(each, index) for each, found in zip(references, sources) if found is None]
        if absent:
            report.left_out[MISSING] += 1
            report.missing = [*report.missing, *absent][:MAX_NAMED]
            continue
        with _row_of(name, index, row):
            asked = reader.read(row, sources)
        shown = list(zip(references, sources))[: reader.num_shown]
        content = [*(_part(*pair, asked.options, media) for pair in shown), {"type": "text", "text": asked.question}]
        messages = [{"role": "user", "content": content}]
        examples.append(
            EvaluationExample(index, messages, reader.metric, asked.truth, reader.max_new_tokens, asked.groups)
        )
    report.examples = len(examples)
    return examples, report


@contextlib.contextmanager
def _row_of(name: str, index: int, row: Row) -> Iterator[None]:
    """What fails at the form of a row is an error that names it: without the row the score would be another one."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"Row {index} of {name} has no column {error}; it has {sorted(row)}.") from None
    except FORM_ERRORS as error:
        found = str(error) if isinstance(error, OtherForm) else f"{type(error).__name__}: {error}"
        raise ValueError(f"Row {index} of {name} has another form: {found}. Mend it, or leave it out.") from error


def _part(reference: Any, source: Any, options: Mapping[str, Any], media: Resolver) -> dict[str, Any]:
    """The part of the question that shows an image or a video."""
    kind = reference.kind if isinstance(reference, MediaReference) else "image"
    clip = getattr(reference, "clip", None)
    is_cut = clip is None or getattr(media, "has_cut_clips", False)
    return {"type": kind, kind: source, **(options if kind == "video" else {}), **({} if is_cut else {"clip": clip})}
