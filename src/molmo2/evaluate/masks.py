"""Masks of objects: arrays, or COCO's run lengths, of which single pixels are read without decoding the whole."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def run_lengths(rle: Mapping[str, Any]) -> np.ndarray:
    """(R,) int64 lengths of alternating runs, the first one outside of the object, column by column.

    Args:
        rle: COCO's `{"size": (height, width), "counts": ...}`: a list, or the compressed text or bytes.
    Raises:
        ValueError: The runs do not add up to the size, or the text is damaged.
    """
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    lengths = np.asarray(_decompressed(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    height, width = rle["size"]
    if lengths.sum() != height * width or (lengths < 0).any():
        raise ValueError(
            f"The runs of a mask of {height}x{width} pixels add up to {lengths.sum()}; expected {height * width}. "
            "`size` is (height, width)."
        )
    return lengths


def _decompressed(text: str) -> list[int]:
    """Run lengths of COCO's text: numbers of 5-bit digits, lowest first; from the fourth on minus the last but one."""
    lengths: list[int] = []
    number = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise ValueError(f"{character!r} is no digit of a compressed mask.")
        number |= (digit & 31) << shift
        shift += 5
        if not digit & 32:  # the last digit; its highest bit is the sign
            number -= (digit & 16) << (shift - 4)
            lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("A compressed mask ends within a number.")
    return lengths


def mask_array(mask: Any) -> np.ndarray:
    """(H, W) bool of a mask: an array or nested list, or COCO's run lengths."""
    if not isinstance(mask, Mapping):
        return np.asarray(mask).astype(bool)
    lengths = run_lengths(mask)
    height, width = mask["size"]
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def contains(mask: Any, x: int, y: int) -> bool:
    """Whether the pixel lies in the mask; False outside of the image, and for a mask that is None."""
    if mask is None:
        return False
    if not isinstance(mask, Mapping):
        mask = np.asarray(mask)
        return 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and bool(mask[y, x])
    height, width = mask["size"]
    if not (0 <= y < height and 0 <= x < width):
        return False
    ends = np.cumsum(run_lengths(mask))
    return int(np.searchsorted(ends, x * height + y, side="right")) % 2 == 1
