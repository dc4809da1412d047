"""Sizes of images that are not decoded, for what is decided before they are: plans, messages, sums of pixels."""

from typing import Any

import numpy as np
from PIL import Image

from molmo2.image.limits import MediaLimits
from molmo2.image.loading import channels_last, fetch_images, flattened
from molmo2.image.opening import upright_size


def measure_images(images: Any, limits: MediaLimits | None = None) -> list[tuple[int, int]]:
    """(height, width) of every image, in the order of `load_images`; of files only the header is read.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_images`, as far as a header tells.
    """
    items = flattened(fetch_images(images, finish=_upright_placeholder, limits=limits), "images")
    return [
        (item.height, item.width) if isinstance(item, Image.Image) else channels_last(item, where, None).shape[:2]
        for where, item in items
    ]


def _upright_placeholder(image: Image.Image) -> np.ndarray:
    """An array of zeros, without memory of its own, of the size that an image has once it is turned upright."""
    width, height = upright_size(image)
    return np.broadcast_to(np.uint8(0), (height, width, 3))
