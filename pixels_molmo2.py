"""From pictures to the numbers the vision tower reads: resize, cut into patches, normalise.

A picture here is an (height, width, 3) array, uint8 or float (0..1). Source of the arithmetic: the training-time
preprocessing of Molmo2, which resized with torch and **without** antialiasing: a smoother filter would show the model
pictures unlike those it learned from.
"""

from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

CHANNELS = 3
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
    return _resize_to_sizes(image, [(height, width)], resample)[0]


def to_patches(crops: np.ndarray, patch_size: int) -> np.ndarray:
    """Cuts crops into square patches, row by row.

    Args:
        crops: (C, H, W, 3); H and W are multiples of `patch_size`.

    Returns:
        (C, P, patch_size * patch_size * 3), same dtype, with P = H // patch_size * (W // patch_size); the numbers of a
        patch run over row, column, channel, channel fastest.
    """
    num_crops, height, width, channels = crops.shape
    rows, cols, row_length = height // patch_size, width // patch_size, patch_size * channels
    patches = crops.reshape(num_crops, rows, patch_size, cols, row_length).swapaxes(2, 3)
    return patches.reshape(num_crops, rows * cols, patch_size * row_length)


def normalize(
    pixels: np.ndarray, mean: Sequence[float], std: Sequence[float], out: np.ndarray | None = None
) -> np.ndarray:
    """`(pixels - mean) / std` per channel in float32, after uint8 is divided by 255 and floats are taken as they are.

    Args:
        pixels: (..., n * 3), uint8 or float; whole pixels along the last axis, channel fastest.
        mean, std: one number per channel.
        out: where to write; a new array by default.

    Returns:
        float32 of the shape of `pixels`.
    """
    if out is None:
        out = np.empty(pixels.shape, dtype=np.float32)
    if pixels.dtype == np.uint8:
        np.divide(pixels, np.float32(255), out=out, dtype=np.float32)
    else:
        out[...] = pixels
    repeats = pixels.shape[-1] // CHANNELS
    out -= np.tile(np.asarray(mean, dtype=np.float32), repeats)
    out /= np.tile(np.asarray(std, dtype=np.float32), repeats)
    return out


def write_image_pixel_values(
    image: np.ndarray, plan: Any, out: np.ndarray, *, resample: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Writes the crops of one picture: the low-resolution view, then the tiles of the canvas row by row.

    Args:
        image: (H, W, 3), uint8 or float.
        plan: the `ImagePlan` of the picture.
        out: (plan.num_crops, P, patch_size * patch_size * 3) float32, filled in place.
        resample, mean, std: see `resize` and `normalize`.
    """
    settings = plan.settings
    sizes = [(settings.crop_height, settings.crop_width), (plan.canvas_height, plan.canvas_width)]
    low_res, canvas = _resize_to_sizes(image, sizes, resample)
    crops = [low_res]
    for top in range(0, plan.tile_rows * settings.window_height, settings.window_height):
        for left in range(0, plan.tile_cols * settings.window_width, settings.window_width):
            crops.append(canvas[top : top + settings.crop_height, left : left + settings.crop_width])
    for crop, crop_out in zip(crops, out, strict=True):
        normalize(to_patches(crop[None], settings.patch_size)[0], mean, std, out=crop_out)


def frame_pixel_values(
    frames: Iterable[np.ndarray],
    settings: Any,
    *,
    resample: int,
    mean: Sequence[float],
    std: Sequence[float],
    num_frames: int | None = None,
) -> np.ndarray:
    """The pixel values of video frames, one crop each; one frame is held at a time besides the result.

    Args:
        frames: (H, W, 3) arrays, uint8 or float; any iterable, a generator of decoded frames included.
        settings: the `CropSettings` of the video.
        resample, mean, std: see `resize` and `normalize`.
        num_frames: how many frames come, if `frames` has no length; saves a second copy of the result.

    Returns:
        (F, P, patch_size * patch_size * 3) float32.

    Raises:
        ValueError: `num_frames` is wrong.
    """
    if num_frames is None:
        frames = frames if isinstance(frames, Sized) else list(frames)
        num_frames = len(frames)
    patch_length = settings.patch_size * settings.patch_size * CHANNELS
    out = np.empty((num_frames, settings.patches_per_crop, patch_length), dtype=np.float32)
    found = 0
    for found, frame in enumerate(frames, start=1):
        if found > num_frames:
            break
        crop = resize(frame, settings.crop_height, settings.crop_width, resample)
        normalize(to_patches(crop[None], settings.patch_size)[0], mean, std, out=out[found - 1])
    if found != num_frames:
        raise ValueError(
            f"{num_frames} frame(s) were announced, but {'more' if found > num_frames else found} came. Pass the "
            "number of frames that the iterable really yields."
        )
    return out


def _resize_to_sizes(image: np.ndarray, sizes: Sequence[tuple[int, int]], resample: int) -> list[np.ndarray]:
    """`resize` to several sizes; the picture is turned into floating point only once."""
    mode = interpolation_mode(resample)
    align_corners = None if mode == "nearest" else False
    is_uint8 = image.dtype == np.uint8
    if image.ndim != 3 or image.shape[2] != CHANNELS or not (is_uint8 or image.dtype in FLOAT_DTYPES):
        raise ValueError(
            f"A picture of shape {image.shape} and dtype {image.dtype} cannot be resized. Pass (height, width, 3), as "
            f"uint8 or one of {', '.join(dtype.__name__ for dtype in FLOAT_DTYPES)}."
        )
    source = np.array(image, dtype=np.float64 if image.dtype == np.float64 else np.float32, order="C")
    channels_first = torch.from_numpy(source).permute(2, 0, 1)[None]  # (1, 3, H, W), a view
    resized = []
    with torch.inference_mode():
        for size in sizes:
            pixels = F.interpolate(channels_first, size=size, mode=mode, align_corners=align_corners)
            pixels = pixels.round_().clamp_(0, 255) if is_uint8 else pixels.clamp_(0, 1)
            resized.append(pixels[0].permute(1, 2, 0).numpy().astype(image.dtype, copy=False))
    return resized
