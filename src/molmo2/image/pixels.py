"""From pictures to the numbers the vision tower reads: resize, cut into patches, normalise.

A picture here is an (height, width, 3) array, uint8 or float (0..1). Source of the arithmetic: the training-time
preprocessing of Molmo2, which resized with torch and **without** antialiasing: a smoother filter would show the model
pictures unlike those it learned from.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2.configuration import CHANNELS
from molmo2.image.bilinear import MOST_ELEMENTS, MOST_INLINE, looked_up, torch_view

FLOAT_DTYPES = (np.float16, np.float32, np.float64)

# PIL's numbers for resampling filters, as processor configs store them -> torch's names
INTERPOLATION_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}
UNSUPPORTED_FILTERS = {1: "lanczos", 4: "box", 5: "hamming"}


def interpolation_mode(resample: int) -> str:
    """Torch's name of a PIL resampling filter: 0 nearest, 2 bilinear, 3 bicubic.

    Raises:
        ValueError: for the filters that torch lacks without antialiasing, and for anything else.
    """
    mode = INTERPOLATION_MODES.get(resample)
    if mode is None:
        name = UNSUPPORTED_FILTERS.get(resample)
        found = repr(resample) if name is None else f"{int(resample)} ({name})"
        raise ValueError(
            f"resample is {found}, which is not supported. Use 2 (bilinear, what the published checkpoints expect), "
            "3 (bicubic) or 0 (nearest)."
        )
    return mode


def resize(image: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resizes a picture with half-pixel centres and no antialiasing.

    Args:
        image: (H, W, 3), uint8 or floating point.
        height, width: the wanted size.
        resample: PIL's number of the filter, see `interpolation_mode`.

    Returns:
        (height, width, 3) in the dtype of `image`. uint8 is resized in float32, rounded and clamped to 0..255; floats
        are clipped to 0..1 (float64 is resized in float64, smaller floats in float32).

    Raises:
        ValueError: the filter is not supported, or `image` is no such array.
    """
    _require_picture(image)
    if _is_looked_up(image, resample):
        pixels = torch.cat([rows for _, rows in looked_up(image, (height, width), 1)])
    else:
        pixels = _resized(_planes(image), (height, width), resample, image.dtype)
    return pixels.numpy().astype(image.dtype, order="C")


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: np.dtype) -> Tensor:
    """`(pixels - mean) / std` per channel in float32; what was uint8 is divided by 255 before.

    Args:
        pixels: (H, W, 3), overwritten where it is float32 already.
        mean, std: one number per channel.
    Returns:
        (H, W, 3) float32.
    """
    with torch.inference_mode():
        pixels = pixels.float()
        if dtype == np.uint8:
            pixels.div_(255)
        rows = pixels.view(len(pixels), -1)  # with the channel as an axis of its own this takes ten times longer
        width = rows.shape[1] // CHANNELS
        rows.sub_(_per_value(tuple(mean), width, rows.device)).div_(_per_value(tuple(std), width, rows.device))
        return pixels


@lru_cache(maxsize=16)
def _per_value(per_channel: tuple[float, ...], width: int, device: torch.device) -> Tensor:
    """A number per channel, repeated for each pixel of a row: (width * 3,) float32."""
    if len(per_channel) != CHANNELS:
        raise ValueError(f"There are {len(per_channel)} numbers, {list(per_channel)}, for {CHANNELS} channels.")
    return torch.tensor(per_channel, dtype=torch.float32, device=device).repeat(width)


def write_patches(crops: Tensor, out: Tensor, patch_size: int) -> None:
    """Cuts crops into square patches, row by row; the numbers of a patch run over row, column, channel.

    Args:
        crops: (..., H, W, 3); H and W are multiples of `patch_size`.
        out: (..., P, patch_size * patch_size * 3), or with P as two axes, rows and columns; filled.
            P = H // patch_size * (W // patch_size).
    """
    cut = crops.unflatten(-2, (-1, patch_size)).unflatten(-4, (-1, patch_size)).transpose(-4, -3)
    with torch.inference_mode():
        out.view(cut.shape).copy_(cut)


def write_image_pixel_values(
    image: np.ndarray, plan: Any, out: Tensor, *, resample: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Writes the crops of one picture: the low-resolution view, then the tiles of the canvas row by row.

    Rows of the canvas are normalised before they are cut, so that what the tiles share is computed once.

    Args:
        image: (H, W, 3), uint8 or float.
        plan: the `ImagePlan` of the picture.
        out: (plan.num_crops, P, patch_size * patch_size * 3), filled in place; float32, or uint8 for pixels that are
            not normalised. The work is done on its device.
        resample: see `resize`.
        mean, std: one number per channel, see `normalize`.
    """
    settings = plan.settings
    patch = settings.patch_size
    picture = _Picture(image, out, resample, mean, std)
    rows, columns = plan.tile_rows, plan.tile_cols
    views = out.unflatten(1, (settings.crop_height // patch, -1))
    for top, pixels in picture.pieces((settings.crop_height, settings.crop_width), patch):
        write_patches(pixels, views[0, top // patch : (top + len(pixels)) // patch], patch)
    for start, pixels in picture.pieces((plan.canvas_height, plan.canvas_width), patch):
        for row in range(rows):
            top, crop = row * settings.window_height, 1 + row * columns
            first, last = max(start, top), min(start + len(pixels), top + settings.crop_height)
            if first < last:
                tiles = pixels[first - start : last - start].unfold(1, settings.crop_width, settings.window_width)
                own = views[crop : crop + columns, (first - top) // patch : (last - top) // patch]
                write_patches(tiles.permute(1, 0, 3, 2), own, patch)


def empty_pixels(shape: tuple[int, ...], dtype: Any, device: Any = None) -> Tensor:
    """Memory for pixels, not yet filled; `dtype` is numpy's.

    numpy asks for huge pages where memory is large, which saves most of the page faults.
    """
    if device is None or torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape, dtype=dtype))
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), device=device)


def as_output(pixels: Tensor) -> np.ndarray | Tensor:
    """Pixels as an array over the same memory, where they are on the CPU."""
    return pixels.numpy() if pixels.device.type == "cpu" else pixels


def frame_pixel_values(
    frames: Iterable[np.ndarray],
    settings: Any,
    *,
    resample: int,
    mean: Sequence[float],
    std: Sequence[float],
    num_frames: int | None = None,
    dtype: Any = np.float32,
    device: Any = None,
) -> Tensor:
    """The pixel values of video frames, one crop each; one frame is held at a time besides the result.

    Args:
        frames: (H, W, 3) arrays, uint8 or float; any iterable, a generator of decoded frames included.
        settings: the `CropSettings` of the video.
        resample, mean, std: see `resize` and `normalize`.
        num_frames: how many frames come, if `frames` has no length; saves a second copy of the result.
        dtype: float32, or uint8 for pixels that are not normalised.
        device: where they are resized, and returned; None for the CPU.

    Returns:
        (F, P, patch_size * patch_size * 3) in `dtype`.

    Raises:
        ValueError: `num_frames` is wrong, or floating point frames are asked for as uint8.
    """
    if num_frames is None:
        frames = frames if isinstance(frames, Sized) else list(frames)
        num_frames = len(frames)
    patch_length = settings.patch_size * settings.patch_size * CHANNELS
    out = empty_pixels((num_frames, settings.patches_per_crop, patch_length), dtype, device)
    found, planes = 0, None
    patch, size = settings.patch_size, (settings.crop_height, settings.crop_width)
    views = out.unflatten(1, (size[0] // patch, -1))
    for found, frame in enumerate(frames, start=1):
        if found > num_frames:
            break
        picture = _Picture(frame, out, resample, mean, std, planes)
        for top, pixels in picture.pieces(size, patch, MOST_INLINE):
            write_patches(pixels, views[found - 1, top // patch : (top + len(pixels)) // patch], patch)
        planes = picture.planes
    if found != num_frames:
        raise ValueError(
            f"{num_frames} frame(s) were announced, but {'more' if found > num_frames else found} came. Pass the "
            "number of frames that the iterable really yields."
        )
    return out


def _is_raw(wanted: torch.dtype, found: np.dtype) -> bool:
    """Whether pixels stay 0..255."""
    if wanted == torch.uint8 and found != np.uint8:
        raise ValueError(
            f"pixel_dtype is uint8, but there is a picture of dtype {found}. Pass uint8 pictures, or leave "
            "pixel_dtype at float32."
        )
    return wanted == torch.uint8


def _is_looked_up(image: np.ndarray, resample: int) -> bool:
    return image.dtype == np.uint8 and interpolation_mode(resample) == "bilinear"


class _Picture:
    """A picture that is resized, once or twice, into the numbers that go where `out` is.

    Where the neighbours of wanted pixels can be looked up, that is done, a few rows at a time: the same numbers for
    less work. Otherwise torch resizes the whole as floating point.

    Attributes:
        planes: The picture as floating point, where torch resizes; its memory may serve the next one.
    """

    def __init__(
        self,
        image: np.ndarray,
        out: Tensor,
        resample: int,
        mean: Sequence[float],
        std: Sequence[float],
        former: Tensor | None = None,
    ):
        _require_picture(image)
        self.image, self.resample, self.mean, self.std = image, resample, mean, std
        self.is_raw = _is_raw(out.dtype, image.dtype)
        is_looked_up = out.device.type == "cpu" and _is_looked_up(image, resample)
        self.planes = None if is_looked_up else _planes(image, former, out.device)

    def pieces(
        self, size: tuple[int, int], multiple: int, most_elements: int = MOST_ELEMENTS
    ) -> Iterator[tuple[int, Tensor]]:
        """The number of a first row, and so many rows, a multiple of `multiple`, until the size is complete."""
        if self.planes is None:
            parts = looked_up(self.image, size, multiple, most_elements)
        else:
            parts = iter([(0, _resized(self.planes, size, self.resample, self.image.dtype))])
        for row, pixels in parts:
            yield row, pixels if self.is_raw else normalize(pixels, self.mean, self.std, self.image.dtype)


def _require_picture(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != CHANNELS or image.dtype not in (np.uint8, *FLOAT_DTYPES):
        raise ValueError(
            f"A picture of shape {image.shape} and dtype {image.dtype} cannot be resized. Pass (height, width, 3), as "
            f"uint8 or one of {', '.join(dtype.__name__ for dtype in FLOAT_DTYPES)}."
        )


def _planes(image: np.ndarray, former: Tensor | None = None, device: Any = None) -> Tensor:
    """A picture as (1, 3, H, W) floating point: float64 stays, everything else becomes float32, of the same range.

    It lies in memory as (H, W, 3), which torch resizes several times faster, to the same numbers. The memory of
    `former` planes is used again where it fits.
    """
    _require_picture(image)
    source = torch_view(image)
    dtype = np.dtype(np.float64 if image.dtype == np.float64 else np.float32)
    wanted = getattr(torch, dtype.name), source.shape[:2]
    if former is not None and (former.dtype, former.shape[2:]) == wanted:
        planes = former
    else:
        planes = empty_pixels((1, *source.shape), dtype, device).permute(0, 3, 1, 2)
    planes[0].permute(1, 2, 0).copy_(source)
    return planes


def _resized(planes: Tensor, size: tuple[int, int], resample: int, dtype: np.dtype) -> Tensor:
    """`resize` of (1, 3, H, W) planes: (height, width, 3), rounded or clipped to the values that `dtype` has."""
    mode = interpolation_mode(resample)
    with torch.inference_mode():
        align_corners = None if mode == "nearest" else False
        pixels = F.interpolate(planes, size=size, mode=mode, align_corners=align_corners)[0].permute(1, 2, 0)
        if dtype == np.uint8:
            return pixels.round_().clamp_(0, 255)
        return pixels.clamp_(0, 1).to(torch.float16 if dtype == np.float16 else pixels.dtype)
