"""Pixel values: images are resized, cut into patches and normalised.

An image here is a (height, width, 3) array, uint8 or float (0..1). Source of the arithmetic: the training-time
preprocessing of Molmo2, which resized with torch and **without** antialiasing: a smoother filter would give images
unlike those of training.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from molmo2.configuration import CHANNELS
from molmo2.image.bilinear import MAX_BLOCK_ELEMENTS, MAX_INLINE_ELEMENTS, resize_rows
from molmo2.image.geometry import CropSettings, ImagePlan

logger = logging.get_logger(__name__)

# PIL's numbers for resampling filters, as processor configs store them -> torch's names
INTERPOLATION_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}
RESCALE_FACTOR = 1 / 255  # from uint8 to 0..1

_imported_in = os.getpid()


def leave_threads_of_parent() -> None:
    """Makes torch use one thread in a forked process, as in the workers of its data loaders.

    The threads of its pool stay with the parent: once that has used them, a forked process waits for them for ever
    (`datasets.map(num_proc=2)`).
    """
    global _imported_in
    if os.getpid() == _imported_in:
        return
    _imported_in = os.getpid()
    if torch.get_num_threads() > 1:
        logger.warning(
            "torch runs on one thread in this forked process: it would wait for the threads of its parent for ever. "
            "Start processes with the method 'spawn' where they need more."
        )
        torch.set_num_threads(1)


@dataclass(frozen=True)
class Normalization:
    """What pixels go through after resizing: `(pixels * rescale_factor - mean) / std`.

    Attributes:
        mean, std: one number per channel.
        rescale_factor: for pixels of 0..255; floating point images, of 0..1, are scaled as the same image would be.
            None leaves the values of both kinds as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float | None = RESCALE_FACTOR


@dataclass(frozen=True)
class PixelOptions:
    """How images and frames of videos become pixel values.

    Attributes:
        crops: the size of crops and patches.
        resample: PIL's number of the filter, see `INTERPOLATION_MODES`.
        steps: see `Normalization`.
        do_resize, pixel_dtype, device: see `Molmo2ImageProcessorKwargs`.
    """

    crops: CropSettings
    resample: int
    steps: Normalization
    do_resize: bool
    pixel_dtype: np.dtype
    device: Any

    def empty(self, num_crops: int) -> Tensor:
        """Uninitialised pixel values, (num_crops, P, patch_size * patch_size * 3)."""
        shape = num_crops, self.crops.patches_per_crop, self.crops.patch_size**2 * CHANNELS
        if self.device is None or torch.device(self.device).type == "cpu":
            return torch.from_numpy(np.empty(shape, self.pixel_dtype))  # in huge pages, with few page faults
        return torch.empty(shape, dtype=getattr(torch, self.pixel_dtype.name), device=self.device)


def require_size(image: np.ndarray, height: int, width: int) -> None:
    """For `do_resize=False`: ValueError unless the image has this size already."""
    if image.shape[:2] != (height, width):
        raise ValueError(
            f"do_resize is False, but an image has {image.shape[0]} x {image.shape[1]} pixels (height x width) where "
            f"the model needs {height} x {width}. Resize it before, or leave do_resize at True."
        )


def normalize(pixels: Tensor, steps: Normalization, dtype: np.dtype) -> Tensor:
    """Rescaled and normalised pixels in float32.

    Args:
        pixels: (H, W, 3), overwritten if it is float32.
        dtype: dtype of the image that the pixels come from.
    Returns:
        (H, W, 3) float32.
    """
    with torch.inference_mode():
        pixels = pixels.float()
        if steps.rescale_factor is not None:
            scale = steps.rescale_factor * (1 if dtype == np.uint8 else 255)
            if scale == RESCALE_FACTOR:
                pixels.div_(255)  # as in training; a multiplication rounds differently
            elif scale != 1:
                pixels.mul_(scale)
        rows = pixels.view(len(pixels), -1)  # ten times faster than with a channel axis
        width = rows.shape[1] // CHANNELS
        rows.sub_(_per_value(steps.mean, width, rows.device)).div_(_per_value(steps.std, width, rows.device))
        return pixels


@lru_cache(maxsize=16)
def _per_value(per_channel: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """A number per channel, repeated for each pixel of a row: (width * 3,) float32."""
    return torch.tensor(per_channel, dtype=torch.float32, device=device).repeat(width)


def write_patches(crops: Tensor, out: Tensor, patch_size: int) -> None:
    """Cuts crops into square patches, row by row; the values of a patch run over row, column, channel.

    Args:
        crops: (..., H, W, 3); H and W are multiples of `patch_size`.
        out: (..., P, patch_size * patch_size * 3), or with P as two axes, rows and columns; filled.
            P = H // patch_size * (W // patch_size).
    """
    cut = crops.unflatten(-2, (-1, patch_size)).unflatten(-4, (-1, patch_size)).transpose(-4, -3)
    with torch.inference_mode():
        out.view(cut.shape).copy_(cut)


def write_image_pixel_values(image: np.ndarray, plan: ImagePlan, out: Tensor, options: PixelOptions) -> None:
    """Writes the pixel values of one image: the low-resolution view, then the tiles of the canvas row by row.

    Rows of the canvas are normalised before they are cut, so that overlaps of the tiles are computed once.

    Args:
        image: (H, W, 3), uint8 or float.
        plan: the plan of the image.
        out: (plan.num_crops, P, patch_size * patch_size * 3), filled in place.
    """
    settings = plan.settings
    patch = settings.patch_size
    resizer = _Resizer(image, out, options)
    rows, columns = plan.tile_rows, plan.tile_cols
    views = out.unflatten(1, (settings.crop_height // patch, -1))
    for top, pixels in resizer.row_blocks((settings.crop_height, settings.crop_width), patch):
        write_patches(pixels, views[0, top // patch : (top + len(pixels)) // patch], patch)
    for start, pixels in resizer.row_blocks((plan.canvas_height, plan.canvas_width), patch):
        for row in range(rows):
            top, crop = row * settings.window_height, 1 + row * columns
            first, last = max(start, top), min(start + len(pixels), top + settings.crop_height)
            if first < last:
                tiles = pixels[first - start : last - start].unfold(1, settings.crop_width, settings.window_width)
                own = views[crop : crop + columns, (first - top) // patch : (last - top) // patch]
                write_patches(tiles.permute(1, 0, 3, 2), own, patch)


def as_output(pixels: Tensor) -> np.ndarray | Tensor:
    """Pixels on the CPU as an array over the same memory; others unchanged."""
    return pixels.numpy() if pixels.device.type == "cpu" else pixels


def frame_pixel_values(frames: Iterable[np.ndarray], num_frames: int, options: PixelOptions) -> Tensor:
    """The pixel values of video frames, one crop each; one frame is in memory at a time besides the result.

    Args:
        frames: (H, W, 3) arrays, uint8 or float; any iterable, a generator of decoded frames included.
        num_frames: length of `frames`.

    Returns:
        (num_frames, P, patch_size * patch_size * 3).

    Raises:
        ValueError: `num_frames` is wrong, a frame has not its size where nothing is resized, or floating point frames
            are asked for as uint8.
    """
    out = options.empty(num_frames)
    found = 0
    patch, size = options.crops.patch_size, (options.crops.crop_height, options.crops.crop_width)
    views = out.unflatten(1, (size[0] // patch, -1))
    for found, frame in enumerate(frames, start=1):
        if found > num_frames:
            break
        if not options.do_resize:
            require_size(frame, *size)
        for top, pixels in _Resizer(frame, out, options).row_blocks(size, patch, MAX_INLINE_ELEMENTS):
            write_patches(pixels, views[found - 1, top // patch : (top + len(pixels)) // patch], patch)
    if found != num_frames:
        raise ValueError(
            f"num_frames is {num_frames}, but the iterable gave {'more' if found > num_frames else found}. Pass the "
            "number of frames that it really yields."
        )
    return out


class _Resizer:
    """An image to be resized, once or twice, to pixel values on the device of `out`.

    uint8 is resized in blocks of rows by gathering where that gives the same values, which is less work; otherwise
    torch resizes the whole image as floating point.
    """

    def __init__(self, image: np.ndarray, out: Tensor, options: PixelOptions):
        leave_threads_of_parent()
        self.image, self.steps = image, options.steps
        self.mode = INTERPOLATION_MODES[options.resample]
        self.keeps_uint8 = out.dtype == torch.uint8  # for the model to normalise
        if self.keeps_uint8 and image.dtype != np.uint8:
            raise ValueError(
                f"pixel_dtype is uint8, but there is an image of dtype {image.dtype}. Pass uint8 images, or leave "
                "pixel_dtype at float32."
            )
        gathers = out.device.type == "cpu" and image.dtype == np.uint8 and self.mode == "bilinear"
        self.planes = None if gathers else _planes(image, out.device)

    def row_blocks(
        self, size: tuple[int, int], multiple: int, max_elements: int = MAX_BLOCK_ELEMENTS
    ) -> Iterator[tuple[int, Tensor]]:
        """The image at this (height, width) as (index of the first row, (rows, width, 3)); see `resize_rows`."""
        if self.planes is None:
            blocks = resize_rows(self.image, size, multiple, max_elements)
        else:
            blocks = iter([(0, _resized(self.planes, size, self.mode, self.image.dtype))])
        for row, pixels in blocks:
            yield row, pixels if self.keeps_uint8 else normalize(pixels, self.steps, self.image.dtype)


def _planes(image: np.ndarray, device: Any = None) -> Tensor:
    """An image as (1, 3, H, W) floating point: float64 stays, everything else becomes float32, of the same range.

    Its memory layout is (H, W, 3), which torch resizes several times faster, to the same values.
    """
    pixels = torch.from_numpy(np.array(image, order="C"))  # a copy: torch has no view of read-only arrays
    dtype = torch.float64 if image.dtype == np.float64 else torch.float32
    return pixels.to(device, dtype)[None].permute(0, 3, 1, 2)


def _resized(planes: Tensor, size: tuple[int, int], mode: str, dtype: np.dtype) -> Tensor:
    """Resized (1, 3, H, W) planes: (height, width, 3), rounded or clipped to the value range of `dtype`.

    Half-pixel centres, no antialiasing.
    """
    with torch.inference_mode():
        align_corners = None if mode == "nearest" else False
        pixels = F.interpolate(planes, size=size, mode=mode, align_corners=align_corners)[0].permute(1, 2, 0)
        if dtype == np.uint8:
            return pixels.round_().clamp_(0, 255)
        return pixels.clamp_(0, 1).to(torch.float16 if dtype == np.float16 else pixels.dtype)
