"""Answers as Label Studio's pre-annotations, and corrected ones back.

    tasks = to_label_studio(grounding, ["https://example.org/boats.jpg"])
    save(json.dumps(tasks), "tasks.json")             # to be imported into a project
    save(label_studio_config(["boats"]), "labels.xml")  # the project's labelling interface
    grounding = from_label_studio(exported_json)

Images have key points, in percent of their size. Label Studio has no key points in videos: there, objects become
`VideoRectangle` tracks, boxes of a size that you choose, whose centres are the points.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any
from xml.sax.saxutils import quoteattr

from molmo2.grounding.files import NO_SPAN, from_points, require_pixels
from molmo2.grounding.parse import IMAGE, MULTI_IMAGE, VIDEO, Grounding, MediaInfo, Point, SampledFrame
from molmo2.interop.objects import label_of, object_tracks, require_names, size_of

MODEL_VERSION = "molmo2"
POINTS, TRACKS = "points", "tracks"  # names of the controls, which regions refer to
KEY_POINT_WIDTH = 0.5  # percent: how large a point is drawn
OBJECT_ID = re.compile(r"object (\d+)")


def label_studio_config(labels: Sequence[str], *, is_video: bool = False) -> str:
    """The labelling interface, XML, that regions of `to_label_studio` belong to."""
    control = (
        f'<Labels name="labels" toName="{VIDEO}">'
        if is_video
        else f'<KeyPointLabels name="{POINTS}" toName="{IMAGE}">'
    )
    entries = "".join(f"\n    <Label value={quoteattr(label)}/>" for label in labels)
    if is_video:
        lines = [
            f'  <Video name="{VIDEO}" value="${VIDEO}"/>',
            f'  <VideoRectangle name="{TRACKS}" toName="{VIDEO}"/>',
            f"  {control}{entries}\n  </Labels>",
        ]
    else:
        lines = [f'  <Image name="{IMAGE}" value="${IMAGE}"/>', f"  {control}{entries}\n  </KeyPointLabels>"]
    return "\n".join(["<View>", *lines, "</View>", ""])


def to_label_studio(
    grounding: Grounding,
    sources: Sequence[str],
    *,
    box_size: float | None = None,
    fps: float | None = None,
    num_frames: int | None = None,
) -> list[dict[str, Any]]:
    """Tasks with predictions: one for each image of the prompt, or one for the video.

    Args:
        sources: Address or storage path of each image, or of the video, as Label Studio is to load it.
        box_size: Videos: side in pixels of the boxes around the points.
        fps: Videos: frame rate.
        num_frames: Videos: number of frames of the whole file.

    Raises:
        ValueError: sizes are unknown, there are not as many sources as images, or one of the three is missing for a
            video.
    """
    if grounding.kind == VIDEO:
        return [_video_task(grounding, sources, box_size, fps, num_frames)]
    require_pixels(grounding.points, "Label Studio")
    sizes = require_names(grounding, sources)
    return [_image_task(grounding, index, sizes[index], source) for index, source in enumerate(sources)]


def _task(source_name: str, source: str, data: Mapping[str, Any], regions: list[dict[str, Any]]) -> dict[str, Any]:
    prediction = {"model_version": MODEL_VERSION, "result": regions}
    return {"data": {source_name: source, **data}, "predictions": [prediction]}


def _image_task(grounding: Grounding, index: int, size: tuple[float, float], source: str) -> dict[str, Any]:
    width, height = size
    regions = [
        {
            "id": f"{POINTS}{number}",
            "from_name": POINTS,
            "to_name": IMAGE,
            "type": "keypointlabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "meta": {"text": [f"object {point.id}"]},
            "value": {
                "x": point.x_norm * 100,
                "y": point.y_norm * 100,
                "width": KEY_POINT_WIDTH,
                "keypointlabels": [label_of(point)],
            },
        }
        for number, point in enumerate(grounding.points, start=1)
        if point.image_index == index
    ]
    return _task(IMAGE, source, {"width": width, "height": height}, regions)


def _video_task(
    grounding: Grounding, sources: Sequence[str], box_size: float | None, fps: float | None, num_frames: int | None
) -> dict[str, Any]:
    if box_size is None or fps is None or num_frames is None:
        raise ValueError(
            "Label Studio has no key points in videos, only boxes with frames, times and the length of the video. "
            "Pass `box_size` (pixels), `fps` and `num_frames` for boxes around the points, or write CVAT's tracks of "
            "points: to_cvat."
        )
    if len(sources) != 1:
        raise ValueError(f"The answer is about one video, but there are {len(sources)} source(s). Pass one.")
    size = size_of(grounding, "Label Studio")
    regions = []
    for track in object_tracks(grounding, "Label Studio", fps):
        sequence = [
            {
                "frame": entry.frame + 1,  # counted from 1
                "time": (entry.frame + 1) / fps,
                "enabled": not entry.is_last,  # whether the box lasts until the next key frame
                "rotation": 0,
                **_box(entry.point, size, box_size),
            }
            for entry in track.appearances
        ]
        value = {
            "framesCount": num_frames,
            "duration": num_frames / fps,
            "sequence": sequence,
            "labels": [track.label],
        }
        regions.append(
            {
                "id": f"{TRACKS}{track.number}",
                "from_name": TRACKS,
                "to_name": VIDEO,
                "type": "videorectangle",
                "meta": {"text": [f"object {track.number}"]},
                "value": value,
            }
        )
    return _task(VIDEO, sources[0], {"width": size[0], "height": size[1], "fps": fps}, regions)


def _box(point: Point, size: tuple[float, float], box_size: float) -> dict[str, float]:
    """A box in percent. At an edge of the image it is smaller, so that its centre stays the point."""
    found = {}
    for place, side, name, extent in (
        (point.x_norm, size[0], "x", "width"),
        (point.y_norm, size[1], "y", "height"),
    ):
        half = min(box_size / side / 2, place, 1 - place)
        found[name], found[extent] = (place - half) * 100, half * 200
    return found


def from_label_studio(content: str | Sequence[Mapping[str, Any]]) -> Grounding:
    """The points of tasks, with people's annotations in the place of predictions where there are any.

    Key points of images, or the key frames of `VideoRectangle` tracks in one video; regions of other kinds are left
    out with a warning. Cancelled annotations do not count, and of several the first does.

    Args:
        content: A JSON export ("JSON", not "JSON-MIN"), or what `to_label_studio` returned.

    Raises:
        ValueError: it is no such export; sizes or, for a video, its rate are not in `data`; several videos.
    """
    tasks = json.loads(content) if isinstance(content, str) else list(content)
    is_list = isinstance(tasks, list) and all(isinstance(task, Mapping) and "data" in task for task in tasks)
    if not is_list:
        raise ValueError(
            "Expected a list of tasks with `data`. Export from Label Studio as JSON, not as JSON-MIN or CSV."
        )
    videos = [task for task in tasks if VIDEO in task["data"]]
    if videos and len(tasks) > 1:
        raise ValueError(
            f"There are {len(tasks)} tasks, {len(videos)} of them about videos. Pass one video at a time."
        )
    if videos:
        return _read_video(videos[0])
    numbered: list[tuple[Mapping[str, Any], int, tuple[float, float]]] = []
    sizes = []
    for index, task in enumerate(tasks):
        regions = _regions(task, "keypointlabels")
        size = _stored_size(task, regions)
        sizes.append(size)
        numbered.extend((region, index, size) for region in regions)
    numbers = _object_ids([region for region, _, _ in numbered])
    points = [_read_key_point(*entry, number) for entry, number in zip(numbered, numbers)]
    return from_points(points, MediaInfo(MULTI_IMAGE if len(sizes) > 1 else IMAGE, tuple(sizes)))


def _regions(task: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """Regions of one kind in the annotation that counts."""
    annotations = [entry for entry in task.get("annotations") or [] if not entry.get("was_cancelled")]
    chosen = [*annotations, *(task.get("predictions") or [])][:1]
    found = chosen[0].get("result", []) if chosen else []
    others = sorted({str(region.get("type")) for region in found} - {kind})
    if others:
        warnings.warn(f"Regions of these kinds are not read: {', '.join(others)}; expected '{kind}'.", stacklevel=3)
    return [region for region in found if region.get("type") == kind]


def _stored_size(task: Mapping[str, Any], regions: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    for holder, names in (
        (task["data"], ("width", "height")),
        *((region, ("original_width", "original_height")) for region in regions),
    ):
        if all(holder.get(name) for name in names):
            return holder[names[0]], holder[names[1]]
    raise ValueError(f"The size of {task['data']!r:.100} is unknown. Add `width` and `height` (pixels) to its `data`.")


def _object_ids(regions: Sequence[Mapping[str, Any]]) -> list[int]:
    """The stored id of each region; regions without one, which people added, get the next free numbers."""
    stored = []
    for region in regions:
        texts = (region.get("meta") or {}).get("text") or []
        match = OBJECT_ID.fullmatch(" ".join([texts] if isinstance(texts, str) else texts))
        stored.append(None if match is None else int(match[1]))
    free = count(max((number for number in stored if number is not None), default=0) + 1)
    return [next(free) if number is None else number for number in stored]


def _read_key_point(region: Mapping[str, Any], index: int, size: tuple[float, float], object_id: int) -> Point:
    value = region["value"]
    x, y = value["x"] / 100, value["y"] / 100
    label = next(iter(value.get("keypointlabels") or []), "")
    return Point(POINTS, label, None, index + 1, object_id, x * size[0], y * size[1], x, y, index, None, NO_SPAN)


def _read_video(task: Mapping[str, Any]) -> Grounding:
    regions = _regions(task, "videorectangle")
    width, height = _stored_size(task, ())
    fps = task["data"].get("fps")
    if not fps:
        raise ValueError("The frame rate of the video is unknown. Add `fps` to the `data` of its task.")
    points = []
    for region, object_id in zip(regions, _object_ids(regions)):
        value = region["value"]
        label = next(iter(value.get("labels") or []), "")
        for box in value["sequence"]:
            index = box["frame"] - 1
            x, y = (box["x"] + box["width"] / 2) / 100, (box["y"] + box["height"] / 2) / 100
            frame = SampledFrame(index / fps, -1, index, index / fps)
            points.append(
                Point(
                    *(TRACKS, label, None, frame.time, object_id, x * width, y * height, x, y),
                    *(None, frame, NO_SPAN),
                )
            )
    return from_points(points, MediaInfo(VIDEO, ((width, height),)))
