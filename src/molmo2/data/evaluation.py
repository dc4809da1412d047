"""Rows of the evaluation sets: what to ask, and what `molmo2.evaluate` needs to judge the answer."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from molmo2.data.examples import MAX_NAMED, MISSING, ReadingReport
from molmo2.data.media import MediaReference, Resolver, name_in_report, source_of, urls
from molmo2.data.pointing import positions
from molmo2.data.queries import OtherForm, Row, images_of, records, video_of
from molmo2.grounding import prompts

TRACK_FPS = 2
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


def _video_points(row: Row, sources: Sequence[Any]) -> _Asked:
    times, places = records(row["two_fps_timestamps"]), records(row["points"])
    if not len(times) == len(places) == len(row["masks"]):
        raise OtherForm("there are not as many times or masks as points")
    truth = {
        "size": (row["width"], row["height"]),
        "duration": row["video_duration"],
        "points": [(time, point["x"], point["y"]) for time, point in zip(times, places)],
        "masks": [{entry["frame_id"] / 2: entry["rle"] for entry in records(masks)} for masks in row["masks"]],
    }
    return _Asked(prompts.point(row["label"]).text, truth, {}, {"max_fps": 2})


def _video_count(row: Row, sources: Sequence[Any]) -> _Asked:
    question = row.get("question") or prompts.count(row["label"]).text
    groups = {"category": row["category"]} if row.get("category") else {}
    groups["count"] = count_bin(row["count"])
    return _Asked(question, {"count": row["count"]}, groups, {"max_fps": 2})


def _video_tracks(row: Row, sources: Sequence[Any]) -> _Asked:
    fps = row["fps"]
    length = max((len(entry["points"]) for entry in records(row["points"])), default=0)
    # Of times k / TRACK_FPS, as `frames_of` reads them from an answer, also where the rates do not divide.
    sampled = {round(place / TRACK_FPS * fps) for place in range(int(length / fps * TRACK_FPS) + 2)}
    points: dict[int, dict[Any, tuple[float, float]]] = {}
    for entry in records(row["points"]):
        for frame, at in enumerate(entry["points"]):
            if at is not None and frame in sampled:
                points.setdefault(frame, {})[entry["object_id"]] = (at[0], at[1])
    masks = {entry["object_id"]: dict(enumerate(entry["masks"])) for entry in records(row["masks"])}
    truth = {"size": (row["w"], row["h"]), "fps": fps, "points": points, "masks": masks}
    group = TRACK_GROUPS.get(row.get("video_dataset", ""))
    options = {"frame_sample_mode": "fps", "sampling_fps": TRACK_FPS}
    return _Asked(prompts.track(row["exp"], TRACK_FPS).text, truth, {"group": group} if group else {}, options)


def _image_points(row: Row, sources: Sequence[Any]) -> _Asked:
    masks = [np.asarray(mask, dtype=bool) for mask in row["masks"]]
    if masks:
        height, width = masks[0].shape
    else:  # nothing to point at: the size decides nothing
        width = height = 1
    # In the order of the masks, which `positions` would change.
    places = [positions([point])[0] for point in records(row["points"])]
    if len(places) != len(masks):
        raise OtherForm("there are not as many masks as points")
    points = [(x * width, y * height) for x, y in places]
    truth = {"size": (width, height), "points": points, "masks": masks}
    return _Asked(prompts.point(row["label"]).text, truth)


def _image_count(row: Row, sources: Sequence[Any]) -> _Asked:
    return _Asked(prompts.count(row["label"]).text, {"count": row["count"]}, {"count": str(row["count"])})


def _pointbench(row: Row, sources: Sequence[Any]) -> _Asked:
    pixels: np.ndarray = np.asarray(sources[1])
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "buif":
        raise ValueError(
            f"The mask {repr(sources[1])[:80]} is a {type(sources[1]).__name__}; expected an image or an array (H, W) "
            "or (H, W, channels). `media` has to open masks: it is asked for them with the kind 'mask'."
        )
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
        is_held = value is not None and not isinstance(value, str)
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
        ValueError: There is no such set, a column is missing, a row has another form, or a mask of PointBench is no
            image.
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
    except (OtherForm, TypeError, AttributeError, IndexError) as error:
        found = str(error) if isinstance(error, OtherForm) else f"{type(error).__name__}: {error}"
        raise ValueError(f"Row {index} of {name} has another form: {found}. Mend it, or leave it out.") from error


def _part(reference: Any, source: Any, options: Mapping[str, Any], media: Resolver) -> dict[str, Any]:
    """The part of the question that shows an image or a video."""
    kind = reference.kind if isinstance(reference, MediaReference) else "image"
    clip = getattr(reference, "clip", None)
    is_cut = clip is None or getattr(media, "has_cut_clips", False)
    return {"type": kind, kind: source, **(options if kind == "video" else {}), **({} if is_cut else {"clip": clip})}
