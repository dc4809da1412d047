"""Loading of images: files, URLs, bytes, PIL images, arrays and tensors become (height, width, 3) arrays.

An ambiguous layout or value range is refused or warned about, never guessed silently, and every error names the item
of the list that it is about. Source of the PIL rules (PIL's own `convert("RGB")`,
orientation tags applied to files but not to images that are already open): the training-time preprocessing of Molmo2.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from molmo2.image.fetching import base64_bytes, data_url_bytes, fetch, masked, scheme_of
from molmo2.image.limits import MediaLimitError, MediaLimits, checked_limits
from molmo2.image.opening import check_pixels, local_path, open_image, turned_upright, upright_size

logger = logging.get_logger(__name__)

ACCEPTED_IMAGES = (
    "a PIL image, a numpy array, a torch tensor, a path, a URL (http, https, file, data), base64 text, "
    "the bytes of an image file, an open binary file or a row {'bytes', 'path'} of an undecoded column"
)
CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGB with alpha
LAYOUTS = ("channels_last", "channels_first")
CLIPPING_PIL_MODES = ("I", "F")  # modes (also "I;16" and its kin) with values above 255, which PIL's conversion clips
FLOAT_TOLERANCE = 0.01  # how far a float image may exceed 0..1 (filters overshoot a little) without a warning
MAX_QUOTED_CHARACTERS = 80  # of a path or text in an error
MIN_BASE64_CHARACTERS = 32  # no image file is smaller; shorter text is a path
# Of an image that is converted in one piece, and of the strips of larger ones.
MAX_WHOLE_PIXELS, STRIP_PIXELS = 1 << 24, 1 << 20


class ReducedImage(np.ndarray):
    """A JPEG that was decoded at a part of its size, which was `original_size` (height, width)."""

    original_size: tuple[int, int] | None = None  # also of arrays made of one: they are of their own shape


def original_size(image: np.ndarray) -> tuple[int, int]:
    """(height, width) of an image as it was given; plans, tokens and points are made for it."""
    return getattr(image, "original_size", None) or image.shape[:2]


def upright(image: Image.Image) -> Image.Image:
    """The decoded image, turned by its orientation tag; itself where that does not turn it, which saves a copy."""
    turned = turned_upright(image)
    if turned is image:
        return image.copy() if image.format == "WEBP" else image  # which keeps its decoder and two canvases
    if hasattr(image, "original_size"):
        turned.original_size = upright_size(image)  # type: ignore[attr-defined]
    return turned


def load_images(
    images: Any,
    *,
    do_convert_rgb: bool = True,
    input_data_format: str | None = None,
    limits: MediaLimits | None = None,
) -> list[np.ndarray]:
    """The images in `images` as RGB arrays, nested lists and 4-D batches flattened, in order.

    Args:
        images: one image or a (nested) list of them. An image is a PIL image of any mode (of an animation, the
            frame that is shown); a numpy array or torch tensor, (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4
            channels, or a batch with one more axis in front; a path or URL; base64 text; the bytes of an image file
            or an open one; a row {"bytes", "path"} of a column that `datasets` left undecoded.
            Arrays may be uint8, bool (0 and 255), any other integer type with values in 0..255, or floating point
            with values in 0..1. A fourth channel is dropped, as PIL does.
        do_convert_rgb: False refuses images that are not RGB.
        input_data_format: "channels_last" or "channels_first"; None takes the last axis as channels if it has 1, 3
            or 4 entries, else the first.
        limits: see `MediaLimits`; None for the default ones.

    Returns:
        (H, W, 3) arrays, uint8 or floating point.

    Raises:
        FileNotFoundError: there is no such file.
        MediaLimitError: an image is over one of the limits; it is a ValueError too.
        TypeError: the type of an item is none of these.
        ValueError: an image cannot be decoded, is empty, or has the shape, dtype or values of no image.
    """
    layout, limits = _parse_layout(input_data_format), checked_limits(limits)
    items = flattened(fetch_images(images, limits=limits), "images")
    return [_rgb_array(item, where, do_convert_rgb, layout, limits) for where, item in items]


def fetch_images(
    images: Any,
    where: str = "images",
    finish: Callable[[Image.Image], Any] = upright,
    limits: MediaLimits | None = None,
) -> Any:
    """`images` with paths, URLs, base64 text, bytes and open files loaded; other items and the nesting are kept.

    Args:
        images: see `load_images`.
        where: name of `images` in errors.
        finish: makes the result from an opened file before that is closed.
        limits: see `MediaLimits`; None for the default ones.

    Returns:
        `images` with an upright PIL image (orientation tag applied) in place of each encoded one.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_images`.
    """
    if isinstance(images, (list, tuple)):
        return [fetch_images(item, f"{where}[{index}]", finish, limits) for index, item in enumerate(images)]
    images = stored_file(images)
    if is_encoded(images):
        return _open(images, where, finish, checked_limits(limits))
    if isinstance(images, Image.Image) or hasattr(images, "__array__"):  # numpy, torch and similar
        return images
    found = f"{shortened(repr(images))} of type {type(images).__name__}"
    raise TypeError(f"{where} is {found}, which is no image. Pass {ACCEPTED_IMAGES}.")


def flattened(images: Any, where: str) -> Iterator[tuple[str, Image.Image | np.ndarray]]:
    """(name for errors, image) of every image of what `fetch_images` returned."""
    if isinstance(images, list):
        for index, item in enumerate(images):
            yield from flattened(item, f"{where}[{index}]")
    elif isinstance(images, Image.Image):
        yield where, images
    else:
        array = _as_numpy(images, where)
        if array.ndim == 4:
            yield from ((f"{where}[{index}]", item) for index, item in enumerate(array))
        else:
            yield where, array


# --- opening files, URLs and bytes -----------------------------------------------------------------------------------


def is_encoded(item: Any) -> bool:
    """True for an encoded image or video: a path, URL or other text, the bytes of a file, or an open file."""
    return isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview)) or _is_open_file(item)


def is_stored_file(item: Any) -> bool:
    """True for a row of a column of images or videos that `datasets` did not decode, {"bytes", "path"}."""
    return isinstance(item, Mapping) and item.keys() == {"bytes", "path"}


def stored_file(item: Any) -> Any:
    """The bytes, or else the path, of a row {"bytes", "path"}; any other item as it is."""
    if not is_stored_file(item):
        return item
    return item["path"] if item["bytes"] is None else item["bytes"]


def _is_open_file(item: Any) -> bool:
    return callable(getattr(item, "read", None))


def shortened(text: str) -> str:
    """The text, or where it is long both of its ends and its length, for errors."""
    if len(text) <= MAX_QUOTED_CHARACTERS:
        return text
    kept = MAX_QUOTED_CHARACTERS // 2  # of either end: the end of a path says most
    return f"{text[:kept]}...{text[-kept:]} ({len(text)} characters)"


def named_file(
    reference: str | os.PathLike[str], where: str, limits: MediaLimits
) -> tuple[str, Path | bytes | IO[bytes]]:
    """What a path, URL or other text stands for: its name in errors, and a path, bytes or an open download.

    The path may be that of no file; whether there is one shows only where paths are accepted. Text that names no file
    is read as base64, unless it is too short for any.

    Raises:
        MediaLimitError: its source is not accepted, or it is too large.
        ValueError: it cannot be downloaded, or is a data URL that cannot be read.
    """
    text = os.fsdecode(reference)
    scheme = scheme_of(text)
    if scheme in ("http", "https"):
        return f"the answer to {masked(text)}", fetch(text, where, limits)
    name = f"'{shortened(text)}', read as base64,"
    if scheme == "data":
        return name, data_url_bytes(text, where, limits)
    path = local_path(text, scheme)
    is_there = (scheme or "path") in limits.sources and os.path.isfile(path)
    if not is_there and isinstance(reference, str) and len(text) >= MIN_BASE64_CHARACTERS:
        content = base64_bytes(text)
        if content is not None:
            limits.check_source("base64", where)
            return name, content
    limits.check_source(scheme or "path", where)
    return f"the file '{path}'", path


def _open(reference: Any, where: str, finish: Callable[[Image.Image], Any], limits: MediaLimits) -> Any:
    """The image of a path, URL, text, bytes or open file, in its own mode, passed through `finish`."""
    if _is_open_file(reference):
        return _decode(where, f"the open file {reference!r}", reference, finish, limits)
    if isinstance(reference, (str, os.PathLike)):
        name, file = named_file(reference, where, limits)
    else:
        name, file = f"{len(reference)} bytes", reference
    if isinstance(file, Path):
        if os.path.isfile(file):
            return _decode(where, name, file, finish, limits)
        text = shortened(os.fsdecode(reference))
        if os.path.isdir(file):
            raise FileNotFoundError(f"{where} is '{text}', which is a folder. Pass the images in it.")
        raise FileNotFoundError(
            f"{where} is '{text}', but there is no such file. Check the path and the working folder; URLs start with "
            "http://, https://, file:// or data:."
        )
    with BytesIO(file) if isinstance(file, (bytes, bytearray, memoryview)) else file as opened:
        return _decode(where, name, opened, finish, limits)


def _decode(
    where: str, source: str, file: Path | IO[bytes], finish: Callable[[Image.Image], Any], limits: MediaLimits
) -> Any:
    """The finished image; any error of a decoder becomes one ValueError."""
    try:
        with open_image(file, where, limits) as image:
            return finish(image)
    except MediaLimitError:
        raise
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        advice = "Check that it is a complete file in a format that PIL reads."
        if isinstance(error, UnidentifiedImageError):  # its text is the name of the file once more
            error = UnidentifiedImageError("unknown format")
            names = ", ".join(limits.image_formats)
            advice = (
                f"Check that it is a complete file in one of the formats {names}. Others have to be in "
                "MediaLimits(image_formats=...)."
            )
        elif isinstance(error, Image.DecompressionBombError):
            advice = "If it is to be trusted, raise Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS."
        raise ValueError(
            f"{where}: {source} cannot be decoded as an image ({type(error).__name__}: {error}). {advice}"
        ) from error


# --- images to arrays ------------------------------------------------------------------------------------------------


def _rgb_array(
    item: Image.Image | np.ndarray, where: str, do_convert_rgb: bool, layout: str | None, limits: MediaLimits
) -> np.ndarray:
    """(H, W, 3), uint8 or native floating point."""
    if isinstance(item, Image.Image):
        check_pixels(item, where, limits)  # its file may be open and not yet decoded
        pixels = _pil_to_rgb(item, where, do_convert_rgb)
        if hasattr(item, "original_size"):
            reduced = pixels.view(ReducedImage)
            reduced.original_size = item.original_size[::-1]
            return reduced
        return pixels
    image = channels_last(item, where, layout)
    found = f"{where} is an array of {image.shape[0]} x {image.shape[1]} pixels"
    limits.check("image_pixels", image.shape[0] * image.shape[1], found)
    channels = image.shape[2]
    if channels != 3 and not do_convert_rgb:
        raise ValueError(_not_rgb(where, f"an array with {channels} channel(s)"))
    image = _checked_values(image[:, :, :3], where)
    return np.repeat(image, 3, axis=2) if channels == 1 else image


def _pil_to_rgb(image: Image.Image, where: str, do_convert_rgb: bool) -> np.ndarray:
    if min(image.size) == 0:
        raise ValueError(f"{where} is empty: {image.height} x {image.width} pixels. Pass an image with pixels.")
    if image.mode != "RGB":
        if not do_convert_rgb:
            raise ValueError(_not_rgb(where, f"a PIL image of mode '{image.mode}'"))
        if image.mode in CLIPPING_PIL_MODES or image.mode.startswith("I;"):
            logger.warning_once(
                f"A PIL image has mode '{image.mode}': converting it to RGB clips its values to 0..255. Scale "
                "them to 0..255 (or pass a float array in 0..1) if they reach further."
            )
    try:
        if image.width * image.height <= MAX_WHOLE_PIXELS:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        image.load()
        pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
        rows = max(1, STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):  # the same values, without the whole image in a second form
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            pixels[top : top + rows] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
        return pixels
    except Exception as error:  # opened lazily by the caller, decoded only now; decoders raise nearly anything
        raise ValueError(
            f"{where} cannot be read as RGB ({error}). Check that its file is complete, or convert it to RGB first."
        ) from error


def _not_rgb(where: str, found: str) -> str:
    return f"{where} is {found}, but `do_convert_rgb` is False. Set it to True, or convert the image to RGB first."


def _as_numpy(item: Any, where: str) -> np.ndarray:
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = item.float() if item.dtype == torch.bfloat16 else item  # numpy has no bfloat16
    array = np.asarray(item)
    if array.ndim not in (2, 3, 4):
        raise ValueError(
            f"{where} has shape {array.shape}. Pass (height, width), (height, width, channels), (channels, height, "
            "width) or a batch with one more axis in front."
        )
    return array


def _parse_layout(input_data_format: Any) -> str | None:
    if input_data_format is None:
        return None
    layout = str(getattr(input_data_format, "value", input_data_format))
    if layout not in LAYOUTS:
        raise ValueError(
            f"input_data_format is {input_data_format!r}. Use one of {', '.join(LAYOUTS)}, or None to detect it."
        )
    return layout


def channels_last(array: np.ndarray, where: str, layout: str | None) -> np.ndarray:
    """(H, W, C) with 1, 3 or 4 channels, a view where possible."""
    if array.size == 0:
        raise ValueError(f"{where} is empty: its shape is {array.shape}. Pass an image with pixels.")
    if array.ndim == 2:
        return array[:, :, None]
    fits_last, fits_first = array.shape[2] in CHANNEL_COUNTS, array.shape[0] in CHANNEL_COUNTS
    if layout is None and not (fits_last or fits_first):
        raise ValueError(
            f"{where} has shape {array.shape}: neither its last nor its first axis has 1, 3 or 4 channels. Pass "
            "(height, width, channels) or (channels, height, width); a batch needs one more axis in front."
        )
    if layout is None and fits_last and fits_first:
        logger.warning_once(
            f"An array of shape {array.shape} could be (height, width, channels) or (channels, height, width); it is "
            "taken as (height, width, channels). Pass input_data_format='channels_first' if it is not."
        )
    if layout is None:
        layout = "channels_last" if fits_last else "channels_first"
    image = array if layout == "channels_last" else np.moveaxis(array, 0, 2)
    if image.shape[2] not in CHANNEL_COUNTS:
        raise ValueError(
            f"{where} has shape {array.shape}, which as '{layout}' means {image.shape[2]} channels, but 1, 3 or 4 "
            "were expected. Check `input_data_format`."
        )
    return image


def _checked_values(image: np.ndarray, where: str) -> np.ndarray:
    """The image as uint8 or native floating point; values that are no grey levels are refused."""
    kind = image.dtype.kind
    if image.dtype == np.uint8:
        return image
    if kind == "b":
        return image.astype(np.uint8) * np.uint8(255)
    if kind not in "iuf" or image.dtype.itemsize > 8:
        raise ValueError(f"{where} has dtype {image.dtype}. Use uint8 (0..255) or floating point (0..1).")
    low, high = image.min(), image.max()
    if kind in "iu":
        if low < 0 or high > 255:
            raise ValueError(
                f"{where} has dtype {image.dtype} and values from {low} to {high}, but integers must lie in 0..255. "
                "Scale them, or divide by their largest possible value to pass floats in 0..1."
            )
        return image.astype(np.uint8)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(
            f"{where} holds values that are not finite (NaN or infinity). Replace them by numbers in 0..1."
        )
    if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
        logger.warning_once(
            "An image in floating point has values outside 0..1, which are clipped. Divide by 255 (or cast to uint8) "
            "if they are grey levels from 0 to 255; undo the normalisation if it is normalised already."
        )
    return image.astype(image.dtype.newbyteorder("="), copy=False)
