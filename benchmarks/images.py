"""Photos: what the image processor costs beside writing its output once."""

from typing import Any

import numpy as np
import torch

from benchmarks.harness import Goal, Side, Work, row
from benchmarks.media import photo
from benchmarks.sides import image_processor

BOUND = "crops written once from a canvas that is resized and normalised already"
SMALL_PEAK = Goal(1.5, "output", "peak")


def _preprocessing(side: Side, photos: list[Any], max_crops: int) -> Work:
    processor = image_processor(side)
    if side.is_bound:
        return _writing(processor, photos, max_crops)
    processor(photo(40, 40), max_crops=1, return_tensors="pt")
    return lambda: dict(processor(photos, max_crops=max_crops, return_tensors="pt"))


def _writing(processor: Any, photos: list[Any], max_crops: int) -> Work:
    plans = [processor.plan(image.height, image.width, max_crops=max_crops) for image in photos]
    settings = plans[0].settings
    patch, rows, cols = settings.patch_size, settings.crop_height, settings.crop_width
    canvases = [torch.rand(plan.canvas_height, plan.canvas_width, 3) for plan in plans]
    shape = (sum(plan.num_crops for plan in plans), settings.patches_per_crop, patch * patch * 3)

    def work() -> torch.Tensor:
        out = torch.from_numpy(np.empty(shape, dtype=np.float32))
        crops = iter(out)
        for plan, canvas in zip(plans, canvases, strict=True):
            places = [(0, 0)]  # the low-resolution view: any crop of its size
            for top in range(plan.tile_rows):
                places += [(top * settings.window_height, c * settings.window_width) for c in range(plan.tile_cols)]
            for top, left in places:
                tile = canvas[top : top + rows, left : left + cols]
                cut = tile.unflatten(1, (-1, patch)).unflatten(0, (-1, patch)).transpose(1, 2)
                next(crops).view(cut.shape).copy_(cut)
        return out

    return work


@row("photo-8", "one 1080p photo, 8 crops", bound=BOUND, goals=(Goal(0.15, "native"), SMALL_PEAK))
def photo_8(side: Side) -> Work:
    return _preprocessing(side, [photo(1080, 1920)], 8)


@row("photo-24", "one 1080p photo, 24 crops", bound=BOUND, goals=(Goal(0.5, "native"), SMALL_PEAK))
def photo_24(side: Side) -> Work:
    return _preprocessing(side, [photo(1080, 1920)], 24)


@row("photos-32", "32 photos of 640x480", bound=BOUND, goals=(Goal(0.5, "native"), SMALL_PEAK))
def photos_32(side: Side) -> Work:
    return _preprocessing(side, [photo(480, 640, seed) for seed in range(side.pick(32, 4))], 8)
