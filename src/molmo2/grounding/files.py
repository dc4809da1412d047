"""Answers as files that other tools read, and back: JSON, CSV, COCO keypoints, MOT.

    save(to_csv(grounding), "boats.csv")

What each keeps: JSON everything. CSV every point with all its numbers, but not the text, tags or count. COCO the
points in pixels with labels, kinds of tags and images or frames; ids of objects as `track_id`. MOT the points of one
video in pixels, by source frame and object, but no labels. Reading gives a `Grounding` with what the format holds.
"""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from molmo2.grounding.parse import (
    IMAGE,
    MULTI_IMAGE,
    VIDEO,
    Grounding,
    MediaInfo,
    Point,
    SampledFrame,
    Tag,
    Track,
    kind_of,
    tracks_of,
)

Place = TypeVar("Place")
JSON_VERSION = 2
CSV_COLUMNS = (
    *("tag", "label", "alt", "key", "id", "x", "y", "x_norm", "y_norm", "image_index"),
    *("time", "sampled_index", "source_index", "source_time", "file_time"),
)
MOT_CONFIDENCE = 1
VISIBLE = 2  # COCO: labelled and visible
NO_SPAN = (0, 0)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its suffix: what is written there replaces `path`, or is deleted on errors."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(content: str | Mapping[str, Any], path: str | Path) -> Path:
    """Write what one of the functions below returned; the file appears when it is complete.

    Args:
        content: text, or a dictionary to be written as JSON.
    """
    path = Path(path)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


# --- JSON ------------------------------------------------------------------------------------------------------------


def to_json(grounding: Grounding) -> dict[str, Any]:
    """The whole answer as a dictionary of plain values."""
    return {"format": "molmo2-grounding", "version": JSON_VERSION, **grounding.as_dict()}


def from_json(content: str | Mapping[str, Any]) -> Grounding:
    """The inverse of `to_json`, from the dictionary or its text; equal to what was written.

    Raises:
        ValueError: it is something else, or of a newer version.
    """
    values = json.loads(content) if isinstance(content, str) else dict(content)
    if values.get("format") != "molmo2-grounding" or values.get("version") != JSON_VERSION:
        raise ValueError(
            f"Found format {values.get('format')!r}, version {values.get('version')!r}; expected 'molmo2-grounding', "
            f"version {JSON_VERSION}. Pass what `to_json` wrote."
        )
    return _rebuilt(Grounding, values)


# Which class the dictionaries and lists of an attribute are made of.
PARTS = {
    "points": Point,
    "tracks": Track,
    "tags": Tag,
    "media": MediaInfo,
    "sampled_frames": SampledFrame,
    "frame": SampledFrame,
    "more_videos": MediaInfo,
}


def _rebuilt(kind: type, values: Mapping[str, Any]) -> Any:
    return kind(**{field.name: _value(PARTS.get(field.name), values[field.name]) for field in fields(kind)})


def _value(kind: type | None, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(kind, item) for item in value)
    return _rebuilt(kind, value) if kind is not None and isinstance(value, Mapping) else value


# --- CSV -------------------------------------------------------------------------------------------------------------


def to_csv(grounding: Grounding) -> str:
    """One line per point, with the column names in the first; empty where a number is unknown."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")  # RFC 4180
    writer.writerow(CSV_COLUMNS)
    for point in grounding.points:
        frame = point.frame
        known: list[float | None] = [None] * 5
        if frame is not None:
            known = [frame.time, frame.sampled_index, frame.source_index, frame.source_time, frame.file_time]
        row = [point.tag, point.label, point.alt, point.key, point.id, point.x, point.y, point.x_norm, point.y_norm]
        writer.writerow(["" if value is None else value for value in [*row, point.image_index, *known]])
    return text.getvalue()


def from_csv(text: str) -> Grounding:
    """The points of `to_csv`; an empty alt text becomes None, and spans are (0, 0).

    Raises:
        ValueError: columns are missing, or a value is no number.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or [])]
    if missing:
        raise ValueError(f"The columns {missing} are missing; found {reader.fieldnames}. Pass what `to_csv` wrote.")
    points = []
    for row in reader:
        is_video = row["image_index"] == ""
        frame = None
        if row["sampled_index"]:
            frame = SampledFrame(
                float(row["time"]),
                int(row["sampled_index"]),
                _number(int, row["source_index"]),
                _number(float, row["source_time"]),
                _number(float, row["file_time"]),
            )
        points.append(
            Point(
                tag=row["tag"],
                label=row["label"],
                alt=row["alt"] or None,
                key=float(row["key"]) if is_video else int(row["key"]),
                id=int(row["id"]),
                x=_number(float, row["x"]),
                y=_number(float, row["y"]),
                x_norm=float(row["x_norm"]),
                y_norm=float(row["y_norm"]),
                image_index=None if is_video else int(row["image_index"]),
                frame=frame,
                span=NO_SPAN,
            )
        )
    return from_points(points)


def _number(kind: Any, text: str) -> Any:
    return kind(text) if text else None


def from_points(points: Sequence[Point], media: MediaInfo | None = None) -> Grounding:
    """An answer that consists of points alone."""
    return Grounding("", kind_of(points), tuple(points), tracks_of(points), (), None, False, False, media)


# --- COCO keypoints --------------------------------------------------------------------------------------------------


def to_coco(grounding: Grounding, file_names: Sequence[str] | None = None) -> dict[str, Any]:
    """A dictionary in the format of COCO keypoints: each point is an annotation with one keypoint.

    A video becomes one image for each frame with points; `frame_index` is its place in the source, `seconds` its time.
    Images beside a video follow its frames.

    Args:
        file_names: of the images of the prompt; of the video alone for an answer about one. None for numbered names.

    Raises:
        ValueError: the size of an image or of the video is unknown, or there are not as many names.
    """
    require_pixels(grounding.points, "COCO")
    sizes = () if grounding.media is None else grounding.media.sizes
    if grounding.points and not sizes:
        raise ValueError("COCO files hold the sizes of images, which this answer does not know. Write CSV or JSON.")
    is_video = grounding.kind == VIDEO
    entries = _coco_frames(grounding, file_names) if is_video else {}
    entries |= _coco_images(grounding, None if is_video else file_names)
    images = [{"id": number, **entry} for number, entry in enumerate(entries.values(), start=1)]
    place = {key: number for number, key in enumerate(entries, start=1)}
    labels = list(dict.fromkeys(point.label for point in grounding.points))
    annotations = [
        {
            "id": number,
            "image_id": place[_coco_key(point)],
            "category_id": labels.index(point.label) + 1,
            "track_id": point.id,
            "tag": point.tag,
            "keypoints": [point.x, point.y, VISIBLE],
            "num_keypoints": 1,
            "bbox": [point.x, point.y, 0.0, 0.0],
            "area": 0.0,
            "iscrowd": 0,
        }
        for number, point in enumerate(grounding.points, start=1)
    ]
    categories = [
        {"id": number, "name": label, "supercategory": "", "keypoints": ["point"], "skeleton": []}
        for number, label in enumerate(labels, start=1)
    ]
    info = {"description": grounding.text, "kind": grounding.kind}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _coco_key(point: Point) -> tuple[str, float]:
    """The image or frame of the video that a point is in."""
    return ("second", float(point.key)) if point.image_index is None else ("image", point.image_index)


def _coco_frames(grounding: Grounding, file_names: Sequence[str] | None) -> dict[tuple[str, float], dict[str, Any]]:
    """The frames with points."""
    points = [point for point in grounding.points if point.image_index is None]
    if grounding.media is None or not points:
        return {}
    width, height = grounding.media.sizes[0]
    stem = Path(file_names[0]).stem if file_names else "frame"
    frames: dict[tuple[str, float], dict[str, Any]] = {}
    for point in sorted(points, key=lambda point: float(point.key)):
        key = float(point.key)
        frame: dict[str, Any] = {"file_name": f"{stem}_{key:.1f}s", "seconds": key, "width": width, "height": height}
        if point.frame is not None and point.frame.source_index is not None:
            frame["frame_index"] = point.frame.source_index
        frames.setdefault(_coco_key(point), frame)
    return frames


def _coco_images(grounding: Grounding, file_names: Sequence[str] | None) -> dict[tuple[str, float], dict[str, Any]]:
    """The images of the prompt, with points or without; also those beside a video."""
    media = grounding.media
    sizes = () if media is None else media.image_sizes if media.kind == VIDEO else media.sizes
    names = [f"image_{number}" for number in range(1, len(sizes) + 1)] if file_names is None else list(file_names)
    if len(names) != len(sizes):
        raise ValueError(f"There are {len(sizes)} image(s), but {len(names)} file name(s). Pass one for each.")
    return {
        ("image", index): {"file_name": name, "width": width, "height": height}
        for index, (name, (width, height)) in enumerate(zip(names, sizes, strict=True))
    }


def from_coco(content: str | Mapping[str, Any]) -> Grounding:
    """The points of `to_coco`, and single keypoints of other COCO files (every visible one counts as a point)."""
    values = json.loads(content) if isinstance(content, str) else content
    images = {image["id"]: image for image in values["images"]}
    still = [image_id for image_id, image in images.items() if "seconds" not in image]
    order = {image_id: index for index, image_id in enumerate(still)}
    labels = {category["id"]: category["name"] for category in values["categories"]}
    points = []
    for annotation in values["annotations"]:
        image = images[annotation["image_id"]]
        flat = annotation.get("keypoints", [])
        for x, y, visibility in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            if visibility:
                points.append(
                    _coco_point(x, y, image, order.get(image["id"]), annotation, labels[annotation["category_id"]])
                )
    frames = [image for image in images.values() if "seconds" in image]
    sizes = tuple((images[image_id]["width"], images[image_id]["height"]) for image_id in still)
    if frames:
        media = MediaInfo(VIDEO, ((frames[0]["width"], frames[0]["height"]),), image_sizes=sizes)
    else:
        media = MediaInfo(MULTI_IMAGE if len(sizes) > 1 else IMAGE, sizes)
    return from_points(points, media)


def _coco_point(
    x: float, y: float, image: Mapping[str, Any], index: int | None, annotation: Mapping[str, Any], label: str
) -> Point:
    return Point(
        tag=annotation.get("tag", "points"),
        label=label,
        alt=None,
        key=float(image["seconds"]) if index is None else index + 1,
        id=annotation.get("track_id", annotation["id"]),
        x=x,
        y=y,
        x_norm=x / image["width"],
        y_norm=y / image["height"],
        image_index=index,
        frame=None if "frame_index" not in image else SampledFrame(float(image["seconds"]), -1, image["frame_index"]),
        span=NO_SPAN,
    )


# --- MOT -------------------------------------------------------------------------------------------------------------


def to_mot(grounding: Grounding, *, fps: float | None = None, box_size: float = 0.0) -> str:
    """Lines `frame, id, left, top, width, height, confidence, -1, -1, -1`, frames and pixels counted from 1.

    Each object has one number in the file: its id, or a free one where an object before it has that already under
    another label. Of several points of an object in one frame the one whose printed time is nearest counts.

    Args:
        fps: rate of the video, to compute frame numbers where the answer was read without the frames of the source.
        box_size: side in pixels of the box around each point, whose centre is the point; 0 for boxes without extent.

    Raises:
        ValueError: the answer is about images, or neither source frames nor `fps` are known.
    """
    if any(point.image_index is not None for point in grounding.points):
        raise ValueError("MOT files are about one video, but the answer is about images. Write COCO, CSV or JSON.")
    require_pixels(grounding.points, "MOT")
    placed = points_by_frame(grounding.points, fps)
    lines = []
    for (frame, number), point in placed.items():
        left, top = (float(place or 0) - box_size / 2 + 1 for place in (point.x, point.y))
        lines.append(f"{frame + 1},{number},{left:g},{top:g},{box_size:g},{box_size:g},{MOT_CONFIDENCE},-1,-1,-1\n")
    return "".join(lines)


def points_by_frame(points: Iterable[Point], fps: float | None = None) -> dict[tuple[int, int], Point]:
    """Points of a video by source frame, from 0, and number of the object; both ascending.

    Of several points of an object in one frame the one whose printed time is nearest counts.

    Args:
        fps: As for `to_mot`.

    Raises:
        ValueError: neither source frames nor `fps` are known.
    """
    points = list(points)
    numbers = object_numbers(points)
    placed = []
    for point in points:
        known = None if point.frame is None else point.frame.source_index
        if known is None and fps is None:
            raise ValueError(
                f"The source frame of the point at {point.key} s is unknown. Read the answer with what the processor "
                "returned for the video, or pass `fps`."
            )
        frame = round(float(point.time or 0) * float(fps or 0)) if known is None else known
        distance = point.seconds_to_frame
        if known is None:
            distance = round(abs(float(point.key) - frame / float(fps or 1)), 6)
        placed.append(((frame, numbers[object_key(point)]), point, distance))
    return dict(sorted(nearest_points(placed).items()))


def nearest_points(placed: Iterable[tuple[Place, Point, float]]) -> dict[Place, Point]:
    """One point for each place, in the order in which places come: the nearest, of equally near ones the first.

    Args:
        placed: Place (an object in a frame, say), point, and how far its time is from that of the place.
    """
    found: dict[Place, tuple[Point, float]] = {}
    for place, point, distance in placed:
        if place not in found or distance < found[place][1]:
            found[place] = point, distance
    return {place: point for place, (point, _) in found.items()}


def object_key(point: Point) -> tuple[str, str, int]:
    """What tells objects apart, as in `Grounding.tracks`."""
    return point.tag, point.label, point.id


def object_numbers(points: Iterable[Point]) -> dict[tuple[str, str, int], int]:
    """One number per object: the model's own, or a free one where an earlier object has it."""
    objects = list(dict.fromkeys(map(object_key, points)))
    free = count(max((number for *_, number in objects), default=0) + 1)
    numbers: dict[tuple[str, str, int], int] = {}
    used: set[int] = set()
    for entry in objects:
        numbers[entry] = next(free) if entry[-1] in used else entry[-1]
        used.add(entry[-1])
    return numbers


def from_mot(text: str, size: tuple[float, float], fps: float, label: str = "") -> Grounding:
    """Tracks out of MOT lines: the centre of each box.

    Args:
        size: (width, height) of the video in pixels.
        fps: its frame rate, which turns frame numbers into times.
        label: name for all objects, which MOT does not store.

    Raises:
        ValueError: a line has fewer than six numbers.
    """
    points = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        values = line.replace(",", " ").split()
        if len(values) < 6:
            raise ValueError(f"Line {number} is {line!r}; expected frame, id, left, top, width, height, ...")
        index, object_id = int(float(values[0])) - 1, int(float(values[1]))
        left, top, width, height = (float(value) for value in values[2:6])
        x, y = left - 1 + width / 2, top - 1 + height / 2
        time = index / fps
        frame = SampledFrame(time, -1, index, time)
        points.append(
            Point("tracks", label, None, time, object_id, x, y, x / size[0], y / size[1], None, frame, NO_SPAN)
        )
    return from_points(points, MediaInfo(VIDEO, ((size[0], size[1]),)))


def require_pixels(points: Iterable[Point], name: str) -> None:
    """Raise a ValueError that names the format if a point has no pixels."""
    if any(point.x is None for point in points):
        raise ValueError(
            f"{name} files hold pixels, but the size of the image or video is unknown. Read the answer with the "
            "processor's output, or with sizes: parse_grounding(text, [(width, height)])."
        )


WRITERS: dict[str, Any] = {"json": to_json, "csv": to_csv, "coco": to_coco, "mot": to_mot}
FORMAT_OF_SUFFIX = {".json": "json", ".csv": "csv", ".txt": "mot"}


def export_grounding(grounding: Grounding, path: str | Path, format: str | None = None, **options: Any) -> Path:
    """Write an answer to a file.

    Args:
        path: The file; its suffix chooses between JSON (.json), CSV (.csv) and MOT (.txt).
        format: "json", "csv", "coco" or "mot"; None takes that of the suffix.
        options: Of `to_coco` (file_names) and `to_mot` (fps, box_size).
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
