"""Growth curves of ours: time and peak memory over frames, crops, tokens, rows of a batch, hours and tracks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Side, Work
from benchmarks.long_video import write_long
from benchmarks.media import clip, photo
from benchmarks.models import clip_and_text
from benchmarks.sides import chat_inputs, image_processor, load_model, video_processor
from molmo2.grounding.format import format_tracks
from molmo2.grounding.parse import parse_grounding
from molmo2.long_video import Cutting, LongVideo, TrackPoint, WindowTrack, WindowTracks, stitch


@dataclass(frozen=True)
class Curve:
    """A measurement repeated with a growing size.

    Attributes:
        unit: What the size counts.
        linear: Which of "seconds" and "peak_bytes" should grow at most linearly.
        prepare: As of a row, with the size as `point`.
    """

    title: str
    unit: str
    points: tuple[int, ...]
    linear: tuple[str, ...]
    prepare: Callable[..., Work]


def _frames(side: Side, point: int) -> Work:
    processor, path = video_processor(side), str(clip(side, 720, 1280, side.pick(64, 8)))
    processor(path, num_frames=1)
    return lambda: dict(processor(path, num_frames=point, max_fps=8, return_tensors="pt"))


def _encoding(side: Side, point: int) -> Work:
    model = load_model(side, "session")
    pixels = torch.zeros(point, 729, 588)
    pooling = torch.arange(point * 729).unflatten(0, (-1, 9))
    return lambda: model.vision_backbone(pixels, pooling)


def _crops(side: Side, point: int) -> Work:
    processor, (rows, columns) = image_processor(side), TILES[point]
    image = photo(112 + rows * 266, 112 + columns * 266)  # 378 pixels a tile, of which neighbours share 112
    processor(image, max_crops=1)
    return lambda: dict(processor(image, max_crops=point - 1, return_tensors="pt"))


def _tokens(side: Side, point: int) -> Work:
    model, inputs = load_model(side, "thin"), clip_and_text(side, point)
    model(**clip_and_text(side, 64), logits_to_keep=1)
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1)


def _batch(side: Side, point: int) -> Work:
    model = load_model(side, "session")
    inputs = chat_inputs(side, "session", [{"type": "text", "text": "Describe what you see in a few words."}])
    inputs = {name: value.repeat(point, 1) for name, value in inputs.items()}
    return lambda: model.generate(**inputs, max_new_tokens=side.pick(32, 4), do_sample=False)


def _hours(side: Side, point: int) -> Work:
    """All windows of a file of a frame a second, 64x64: what grows with its length alone."""
    hours = side.pick(point, point / 60)
    path = side.settings.cache / f"long_{hours:g}h.mp4"
    if not path.exists():
        write_long(path.with_suffix(".part.mp4"), hours * 60, 1, 64, 64).rename(path)

    def work() -> int:
        with LongVideo(path, window=60.0, overlap=4.0, fps=0.5) as video:
            return sum(1 for found in video.clips() for _ in found.frames)

    return work


def _tracks(side: Side, point: int) -> Work:
    """Objects, this many at once, through 20 windows: their answers read and stitched."""
    rng = np.random.default_rng(0)
    cutting = Cutting(window=30.0, overlap=4.0, fps=2.0)
    places = np.cumsum(rng.normal(0, 0.005, (point, cutting.step * 20 + cutting.size, 2)), 1) + rng.random(
        (point, 1, 2)
    )
    places = places.clip(0, 1)
    answers = []
    for window in range(20):
        first = window * cutting.step
        tracks = {
            number + 1: {place / 2: tuple(path[first + place]) for place in range(cutting.size)}
            for number, path in enumerate(places)
        }
        answers.append((first / 2, format_tracks(tracks, "thing")))

    def work() -> int:
        windows = []
        for start, text in answers:
            found = parse_grounding(text).tracks
            own = [
                WindowTrack("thing", tuple(TrackPoint(start + p.time, p.x_norm, p.y_norm) for p in track.points))
                for track in found
            ]
            windows.append(WindowTracks(start, start + (cutting.size - 1) / 2, tuple(own)))
        return len(stitch(windows))

    return work


BOTH = ("seconds", "peak_bytes")
TILES = {2: (1, 1), 5: (2, 2), 10: (3, 3), 17: (4, 4), 25: (4, 6)}  # beside the low-resolution view
CURVES: dict[str, Curve] = {
    "frames": Curve("Preprocessing a 64 s clip", "frames", (1, 48, 96, 192, 288, 384), BOTH, _frames),
    "encoding": Curve("Encoding frames", "frames", (1, 48, 96, 192, 384), BOTH, _encoding),
    "crops": Curve("Preprocessing a photo", "crops", tuple(TILES), BOTH, _crops),
    "tokens": Curve("Prefill", "tokens", (1024, 2048, 4096, 8192, 16384, 36864), ("peak_bytes",), _tokens),
    "batch": Curve("Answers in a batch", "rows", (1, 2, 4, 8, 16, 32, 64), BOTH, _batch),
    "hours": Curve("Reading a long video in windows", "hours", (1, 2, 4, 7, 10), BOTH, _hours),
    "tracks": Curve("Reading and stitching ten minutes", "tracks at once", (1, 2, 4, 8, 16, 32), (), _tracks),
}


def exponent(points: Sequence[int], values: Sequence[float]) -> float | None:
    """Slope of log(value) over log(number) in the upper half of the curve: 1 where it grows linearly, less below."""
    upper = [(n, value) for n, value in zip(points, values, strict=True) if value > 0][-3:]
    if len(upper) < 2:
        return None
    xs, ys = [math.log(n) for n, _ in upper], [math.log(value) for _, value in upper]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def linear_fit(points: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Least squares `values = start + slope * number`, and the fraction of the variation that it explains."""
    mean_x, mean_y = sum(points) / len(points), sum(values) / len(values)
    spread = sum((x - mean_x) ** 2 for x in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(points, values, strict=True)) / spread
    start = mean_y - slope * mean_x
    missed = sum((y - start - slope * x) ** 2 for x, y in zip(points, values, strict=True))
    total = sum((y - mean_y) ** 2 for y in values)
    return {"start": start, "slope": slope, "explained": 1 - missed / total if total else 1.0}


def growth(curve: Curve, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a curve: values, exponent and linear fit of time and memory."""
    result: dict[str, Any] = {"title": curve.title, "unit": curve.unit, "linear": list(curve.linear)}
    result["points"] = [entry["point"] for entry in found]
    for key in BOTH:
        values = [entry[key] for entry in found]
        if None in values:
            continue
        result[key] = values
        result[f"{key}_exponent"] = exponent(result["points"], values)
        result[f"{key}_fit"] = linear_fit(result["points"], values)
    return result
