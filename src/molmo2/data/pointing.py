"""Rows with points: VideoPoint, MultiImagePoint, CoSyn-point and PixMo's sets.

Coordinates are per cent of the size; those of pixmo-count are pixels.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from molmo2.data.media import MediaReference, is_name
from molmo2.data.queries import (
    Draw,
    Family,
    Item,
    OtherForm,
    Query,
    Row,
    Settings,
    Size,
    images_of,
    label_problem,
    records,
    text_of,
)
from molmo2.data.styles import COUNT_FORMS, draw_prompt
from molmo2.grounding.format import NO_POINTS, TAG_EDGE, format_points
from molmo2.grounding.parse import Point

GRID_SECONDS = 0.5  # points of videos are at two frames a second
VIDEO_STYLES = ("video_point", "video_point_count", "video_count", "video_count_point")
IMAGE_SET_STYLES = (
    "multi_image_pointing",
    "multi_image_point_then_count",
    "multi_image_counting",
    "multi_image_count_then_point",
)
OUTSIDE = "a point lies outside of its image"

Position = tuple[float, float]


def positions(points: Any, size: Size = (100, 100)) -> list[Position]:
    """Points as fractions sorted by (x, y); they are in per cent, or in pixels of an image of `size`.

    Args:
        points: A list of {"x", "y"}, or {"x": list, "y": list}; arrays and other containers with a length are lists.
    Raises:
        OtherForm: A point has no x or no y, or there are not as many of them.
        TypeError, IndexError: They have another form, or a coordinate is no number.
    """
    try:
        pairs = _pairs(points)
    except KeyError as error:
        raise OtherForm(f"a point has no {error}") from error
    return sorted((x / size[0], y / size[1]) for x, y in pairs)


def _pairs(points: Any) -> list[tuple[Any, Any]]:
    """(x, y) of points, as they are."""
    if not isinstance(points, Mapping):
        return [(point["x"], point["y"]) for point in ([] if points is None else points)]
    x, y = points["x"], points["y"]
    if x is None and y is None:
        return []
    if not hasattr(x, "__len__") or isinstance(x, (str, bytes, Mapping)):
        return [(x, y)]
    if len(x) != len(y):
        raise OtherForm("a list of points has not as many x as y")
    return list(zip(x, y))


def are_inside(points: list[Position]) -> bool:
    """Whether all points lie in the image, given as fractions."""
    return all(0 <= x <= 1 and 0 <= y <= 1 for x, y in points)


def point_answer(style: str, points: Mapping[Any, Sequence[Position]], label: str) -> str:
    """The answer of a pointing or counting style; "There are none." without points."""
    total = sum(map(len, points.values()))
    if COUNT_FORMS[style] == "only":
        return str(total) if total else NO_POINTS
    return format_points(points, label, count=COUNT_FORMS[style])


def _plain(label: str) -> str:
    """A label as it stands in tags and prompts: on one line, without blanks at its ends."""
    return " ".join(label.split())


# --- videos ----------------------------------------------------------------------------------------------------------


def clip_of(row: Row) -> tuple[float, float | None] | None:
    """The clip of a row of VideoPoint; it starts on the grid of two frames a second."""
    start, end = row.get("clip_start"), row.get("clip_end")
    if start is None and end is None:
        return None
    return math.ceil((start or 0.0) / GRID_SECONDS - 1e-6) * GRID_SECONDS, end


def _video(row: Row) -> list[MediaReference]:
    return [MediaReference("video", row["video_id"], clip_of(row), row)]


def _video_problem(row: Row, settings: Settings) -> str | None:
    start, end = clip_of(row) or (0.0, None)
    end = row["video_duration"] if end is None else end
    times, points = records(row["two_fps_timestamps"]), records(row["points"])
    if row.get("annotator_unsure") and not settings.use_unsure:
        return "the annotator was unsure"
    if end - start > settings.max_clip_seconds + 1e-6:
        return f"the clip is longer than {settings.max_clip_seconds:g} s"
    if len(times) != len(points):
        return "there are not as many times as lists of points"
    if any(abs(time / GRID_SECONDS - round(time / GRID_SECONDS)) > 1e-6 for time in times):
        return "a time is not on the grid of two frames a second"
    if any(not start <= time <= end for time in times):
        return "a time lies outside of the clip"
    if not are_inside([at for each in points for at in positions(each)]):
        return OUTSIDE
    text_of(row.get("question"))
    return label_problem(row["label"])


def _video_query(row: Row, draw: Draw) -> Query:
    style, label = draw.rng.choice(VIDEO_STYLES), _plain(row["label"])
    clip = clip_of(row)
    start = clip[0] if clip is not None and draw.has_cut_clips else 0.0
    pairs = zip(records(row["two_fps_timestamps"]), records(row["points"]))
    points = {time - start: positions(at) for time, at in pairs}
    written = row["question"] if style != "video_point" and text_of(row.get("question")) else None
    return Query(style, written or draw_prompt(style, draw.rng, label=label), point_answer(style, points, label))


def _read_video_points(rows: Sequence[Row], draw: Draw) -> Item:
    queries = [_video_query(row, draw) for row in rows]
    draw.rng.shuffle(queries)
    return as_turns_or_branches(queries, draw)


def as_turns_or_branches(queries: list[Query], draw: Draw) -> Item:
    """Questions about one clip: branches, or now and then turns of one conversation."""
    if draw.rng.random() < draw.settings.p_multi_turn:
        return Item([queries])
    return Item([[query] for query in queries])


def _two_fps(row: Row, settings: Settings) -> dict[str, Any]:
    return {"max_fps": 1 / GRID_SECONDS}


# --- images ----------------------------------------------------------------------------------------------------------


def _image_problem(row: Row, settings: Settings) -> str | None:
    return label_problem(row["label"]) if are_inside(positions(row["points"])) else OUTSIDE


def _read_image_points(rows: Sequence[Row], draw: Draw) -> Item:
    branches = []
    for row in rows:
        label = _plain(row["label"])
        style = "point_count" if row.get("collection_method") == "counting" else "pointing"
        answer = point_answer(style, {1: positions(row["points"])}, label)
        branches.append([Query(style, draw_prompt(style, draw.rng, label=label), answer)])
    return Item(branches)


def _count_problem(row: Row, settings: Settings) -> str | None:
    """Rows of the validation and test splits of pixmo-count have no points, so that no answer can be made of them."""
    if len(positions(row["points"])) != row["count"]:
        return "there are not as many points as it counts"
    return label_problem(row["label"])


def _count_size_problem(row: Row, sizes: Sequence[Size]) -> str | None:
    return None if are_inside(positions(row["points"], sizes[0])) else OUTSIDE


def _read_image_counts(rows: Sequence[Row], draw: Draw) -> Item:
    """Points, then their number, as in counting rows of pixmo-points: the single-image style with a count."""
    branches = []
    for row in rows:
        label = _plain(row["label"])
        answer = point_answer("point_count", {1: positions(row["points"], draw.sizes[0])}, label)
        branches.append([Query("point_count", draw_prompt("point_count", draw.rng, label=label), answer)])
    return Item(branches)


def _explained(row: Row, mark: str) -> str:
    """The answer of a row of pixmo-point-explanations: a tag in place of each mark, points numbered throughout."""
    first, *pieces = row["parsed_response"].split(mark)
    texts, number = [first], 0
    for piece, points, label, alt in zip(pieces, records(row["points"]), *_texts(row)):
        label, alt = _plain(label or ""), _plain(alt or "") or None
        numbered = []
        for x, y in positions(points):
            number += 1
            numbered.append(
                Point(
                    tag="points",
                    label=label,
                    alt=alt,
                    key=1,
                    id=number,
                    x=None,
                    y=None,
                    x_norm=x,
                    y_norm=y,
                    image_index=0,
                    frame=None,
                    span=(0, 0),
                )
            )
        texts += [format_points(numbered), piece]
    return "".join(texts).strip()


def _texts(row: Row) -> tuple[list[Any], list[Any]]:
    """`inline_text` and `alt_text` of a row of pixmo-point-explanations, each one text or None per list of points."""
    columns = row["inline_text"], row["alt_text"]
    if any(isinstance(column, str) for column in columns):
        raise TypeError("Expected lists of texts; found a text.")
    inline, alt = map(records, columns)
    return inline, alt


def _explanation_problem(row: Row, settings: Settings) -> str | None:
    answer, points = text_of(row["parsed_response"]), records(row["points"])
    if not answer or not text_of(row["question"]):
        return "there is no question, or no answer"
    if TAG_EDGE.search(answer.replace(settings.point_mark, " ")):
        return "the answer contains a tag"
    if any(len(texts) != len(points) for texts in _texts(row)):
        return "there are not as many texts as lists of points"
    if answer.count(settings.point_mark) != len(points):
        return f"the answer has not one {settings.point_mark} for each list of points"
    if not all(map(positions, points)):
        return "a list of points is empty"
    if not all(are_inside(positions(each)) for each in points):
        return OUTSIDE
    try:
        _explained(row, settings.point_mark)
    except ValueError:
        return "a text cannot stand in a tag"
    return None


def _read_explanations(rows: Sequence[Row], draw: Draw) -> Item:
    style, mark = draw.settings.explanation_style, draw.settings.point_mark
    return Item([[Query(style, row["question"].strip(), _explained(row, mark))] for row in rows])


def _read_cosyn_points(rows: Sequence[Row], draw: Draw) -> Item:
    return Item(
        [
            [Query("cosyn_point", question, point_answer("cosyn_point", {1: positions(points)}, _plain(name)))]
            for row in rows
            for question, points, name in zip(*_cosyn_lists(row))
        ]
    )


def _cosyn_lists(row: Row) -> tuple[list[Any], list[Any], list[Any]]:
    """Questions, lists of points and names."""
    return records(row["questions"]), records(row["answer_points"]), records(row["names"])


def _cosyn_problem(row: Row, settings: Settings) -> str | None:
    questions, answers, names = _cosyn_lists(row)
    if not len(questions) == len(answers) == len(names) > 0:
        return "there are not as many questions as answers and names"
    if not all(map(text_of, questions)):
        return "there is no question"
    if not all(are_inside(positions(points)) for points in answers):
        return OUTSIDE
    return next(filter(None, map(label_problem, names)), None)


def _same_label(label: str) -> str:
    """A label without what tells "the dogs" from "Dog"."""
    return re.sub(r"^(?:the|a|an) ", "", _plain(label).lower()).removesuffix("s")


def _matching_images(labels: Sequence[str], number: int, label: str) -> list[int]:
    """Of a number of images those annotated under this label; labels are those of the images, or names of one kind."""
    if len(labels) != number:
        return list(range(number))
    return [image for image in range(number) if _same_label(labels[image]) == _same_label(label)]


def _image_set_problem(row: Row, settings: Settings) -> str | None:
    if row["image_urls"] is None:
        return None  # missing, as its media say
    labels, points = records(row["labels"]), records(row["points"])
    if not labels or len(records(row["image_urls"])) != len(points):
        return "there is no label, or not one list of points per image"
    problem = next(filter(None, map(label_problem, labels)), None)
    if not problem and max(len(_matching_images(labels, len(points), label)) for label in labels) < 2:
        return "no two images share a label"
    return problem if all(are_inside(positions(each)) for each in points) else OUTSIDE


def _read_image_set_points(rows: Sequence[Row], draw: Draw) -> Item:
    (row,) = rows
    rng, style = draw.rng, draw.rng.choice(IMAGE_SET_STYLES)
    labels, lists = records(row["labels"]), records(row["points"])
    by_label = [(label, _matching_images(labels, len(lists), label)) for label in labels]
    label, matching = rng.choice([pair for pair in by_label if len(pair[1]) > 1])
    max_images = max(2, min(len(matching), draw.settings.max_images))
    kept = sorted(rng.sample(matching, rng.randint(2, max_images)))
    points = {number: positions(lists[image]) for number, image in enumerate(kept, 1)}
    question = draw_prompt(style, rng, label=_plain(label))
    return Item([[Query(style, question, point_answer(style, points, _plain(label)))]], kept=kept)


def _local_images(row: Row) -> list[Any]:
    """The images of a row of molmo2-pixmo-multi-points: references to files, or images that it holds."""
    images: list[Any] = [None] if row["images"] is None else records(row["images"])
    return [MediaReference("image", each, None, row) if is_name(each) else each for each in images]


def _as_image_set(row: Row) -> Row:
    """A row of molmo2-pixmo-multi-points in the columns of its published form, MultiImagePoint."""
    columns = {"image_urls": "images", "labels": "normalized_labels", "points": "points"}
    return {name: records(row[column]) for name, column in columns.items()}


def _local_set_problem(row: Row, settings: Settings) -> str | None:
    if row["images"] is None:
        return None  # missing, as its media say
    columns = _as_image_set(row)
    labels = columns["labels"]
    if len(labels) != len(columns["image_urls"]) or not all(isinstance(label, str) for label in labels):
        return "there is not one label per image"
    return _image_set_problem(columns, settings)


def _read_local_set_points(rows: Sequence[Row], draw: Draw) -> Item:
    return _read_image_set_points([_as_image_set(row) for row in rows], draw)


VIDEO_POINTS = Family(_read_video_points, _video, ("video_id", "clip_start", "clip_end"), _video_problem, _two_fps)
IMAGE_POINTS = Family(_read_image_points, images_of, ("image_url",), _image_problem)
IMAGE_SET_POINTS = Family(_read_image_set_points, images_of, (), _image_set_problem)
LOCAL_SET_POINTS = Family(_read_local_set_points, _local_images, (), _local_set_problem)
IMAGE_COUNTS = Family(_read_image_counts, images_of, ("image_url",), _count_problem, size_problem=_count_size_problem)
EXPLANATIONS = Family(_read_explanations, images_of, ("image_url",), _explanation_problem)
COSYN_POINTS = Family(_read_cosyn_points, images_of, (), _cosyn_problem)
