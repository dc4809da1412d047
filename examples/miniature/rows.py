"""Clips of the world as rows of the published data sets: columns, units and masks are theirs."""

import dataclasses
from typing import Any

import numpy as np

from .questions import matches, noun
from .world import CLIP_FPS, Clip, Mover, Thing

GRID_FPS = 2  # of the annotations
Row = dict[str, Any]
Target = tuple[str | None, str | None]


def even_sides(clip: Clip) -> Clip:
    """The clip with sides that a video encoder takes."""
    height, width = (side // 2 * 2 for side in clip.ground.shape[:2])
    return dataclasses.replace(clip, ground=clip.ground[:height, :width])


def mask_of(thing: Thing, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the disc around an object."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    inside = (x - thing.x * width) ** 2 + (y - thing.y * height) ** 2
    return inside <= (thing.radius * min(shape)) ** 2


def run_lengths(mask: np.ndarray) -> Row:
    """A mask in COCO's run lengths, as a list: column by column, the first run outside of the object."""
    pixels = np.concatenate([[False], mask.T.ravel()])
    ends = np.flatnonzero(pixels[1:] != pixels[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *ends, mask.size]).tolist()}


def _seen(mover: Mover, seconds: float) -> Thing | None:
    """The object at this time, if its centre is inside the frame."""
    thing = mover.at(seconds)
    return thing if 0 <= thing.x <= 1 and 0 <= thing.y <= 1 else None


def _first_seen(clip: Clip, target: Target) -> list[tuple[Mover, dict[int, Thing]]]:
    """The objects that match, in the order in which they are seen, and where they are on the grid."""
    grid = range(GRID_FPS * (clip.num_frames - 1) // CLIP_FPS + 1)
    found = []
    for mover in clip.movers:
        places = {n: thing for n in grid if (thing := _seen(mover, n / GRID_FPS)) is not None}
        if matches(mover.thing, target) and places:
            found.append((mover, places))
    return sorted(found, key=lambda entry: min(entry[1]))


def training_row(clip: Clip, name: str, target: Target) -> Row:
    """A row of Molmo2-VideoPoint: each object where it is seen first, in per cent."""
    first = [(min(places), places[min(places)]) for _, places in _first_seen(clip, target)]
    times = sorted({number for number, _ in first})
    return {
        "video_id": name,
        "video_duration": clip.num_frames / CLIP_FPS,
        "clip_start": None,
        "clip_end": None,
        "label": noun(target, True),
        "question": f"How many {noun(target, True)} are there?",
        "two_fps_timestamps": [number / GRID_FPS for number in times],
        "points": [[{"x": 100 * at.x, "y": 100 * at.y} for n, at in first if n == number] for number in times],
        "annotator_unsure": False,
    }


def evaluation_rows(clip: Clip, name: str, target: Target) -> dict[str, Row]:
    """Rows of the three video evaluations about the objects that match, by the names of the data sets."""
    height, width = clip.ground.shape[:2]
    seen, label = _first_seen(clip, target), noun(target, True)
    same = [mover for mover in clip.movers if matches(mover.thing, target)]
    first = [(min(places), places[min(places)]) for _, places in seen]
    by_frame = [[_seen(mover, n / CLIP_FPS) for n in range(clip.num_frames)] for mover in same]
    points = {
        "video_id": name,
        "label": label,
        "width": width,
        "height": height,
        "video_duration": clip.num_frames / CLIP_FPS,
        "two_fps_timestamps": [number / GRID_FPS for number, _ in first],
        "points": [{"x": at.x * width, "y": at.y * height} for _, at in first],
        "masks": [
            [{"frame_id": n, "rle": run_lengths(mask_of(at, (height, width)))} for n, at in places.items()]
            for _, places in seen
        ],
    }
    tracks = {
        "video": name,
        "exp": label,
        "fps": float(CLIP_FPS),
        "w": width,
        "h": height,
        "points": [
            {"object_id": n, "points": [None if at is None else [at.x * width, at.y * height] for at in own]}
            for n, own in enumerate(by_frame)
        ],
        "masks": [
            {
                "object_id": n,
                "masks": [None if at is None else run_lengths(mask_of(at, (height, width))) for at in own],
            }
            for n, own in enumerate(by_frame)
        ],
    }
    count = {"video_id": name, "label": label, "question": "", "count": len(seen), "category": target[1] or "any"}
    return {
        "allenai/Molmo2-VideoPointEval": points,
        "allenai/Molmo2-VideoCountEval": count,
        "allenai/Molmo2-VideoTrackEval": tracks,
    }
