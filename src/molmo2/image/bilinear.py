"""Bilinear resizing of uint8 images that gathers the four neighbours of each output pixel.

torch.nn.functional.interpolate takes floating point, so every pixel of an image is converted first, also the three
quarters of a 1080p frame that its resize to 378 x 378 never reads. Here only neighbours are converted, a block of rows
at a time, in the calling thread: other threads may decode meanwhile.

The result is bitwise that of `interpolate` with one thread. With several threads torch takes another kernel, which
sometimes rounds sums halfway between two grey levels the other way; here they are the same on any machine.
"""

from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from molmo2.configuration import CHANNELS

# torch gives tensors of more elements to its thread pool, whose workers then spin for a while on cores that decode.
# Its `round` does so at any size: numpy, which has no threads, does that part.
MAX_INLINE_ELEMENTS = 32768
MAX_BLOCK_ELEMENTS = 2**18  # of a block where nothing is decoded: few steps, and small beside the pixels of a photo


class BilinearTables:
    """Neighbours and weights of each output pixel along both axes.

    Half-pixel centres, no antialiasing, edges repeated: `align_corners=False` of `interpolate`. Positions are rounded
    to float32 once, and a sum is a product and three fused multiply-adds (`addcmul`) in the order of torch's kernel.

    Args:
        source: height and width of the image.
        size: height and width of the result.
    """

    def __init__(self, source: tuple[int, int], size: tuple[int, int]):
        self.source, self.size = source, size
        rows, columns = (_neighbours(*lengths) for lengths in zip(source, size))
        self.upper, self.lower = rows[:2]
        self.left, self.right = columns[:2]
        self.upper_weight, self.lower_weight = (weight[:, None] for weight in rows[2:])
        self.left_weight, self.right_weight = (weight.repeat_interleave(CHANNELS) for weight in columns[2:])

    def rows(self, image: np.ndarray, start: int, stop: int) -> Tensor:
        """Output rows from `start` to `stop`.

        Args:
            image: (H, W, 3) uint8.
        Returns:
            (stop - start, width, 3) float32 from 0 to 255, not rounded.
        """
        upper, lower = self.upper[start:stop], self.lower[start:stop]
        first, last = int(upper[0]), int(lower[-1]) + 1
        if last - first <= 2 * (stop - start):  # neighbours share rows: each is gathered once
            source, upper, lower = image[first:last], upper - first, lower - first
        else:
            source = image.take(torch.cat((upper, lower)).numpy(), axis=0)
            upper, lower = torch.arange(2 * (stop - start)).chunk(2)
        left, right = self._columns(source, is_small=(stop - start) * self.size[1] * CHANNELS <= MAX_INLINE_ELEMENTS)
        upper_weight, lower_weight = self.upper_weight[start:stop], self.lower_weight[start:stop]
        sums = right.index_select(0, upper).float().mul_(upper_weight * self.right_weight)
        sums.addcmul_(upper_weight * self.left_weight, left.index_select(0, upper).float())
        sums.addcmul_(lower_weight * self.left_weight, left.index_select(0, lower).float())
        sums.addcmul_(lower_weight * self.right_weight, right.index_select(0, lower).float())
        return sums.unflatten(1, (-1, CHANNELS))

    def _columns(self, pixels: np.ndarray, is_small: bool) -> tuple[Tensor, Tensor]:
        """The left and the right neighbours in (H, W, 3) pixels, (H, width * 3) each.

        torch gathers with its threads; numpy is faster in a single one.
        """
        if is_small or torch.get_num_threads() == 1:
            taken = (torch.from_numpy(pixels.take(index.numpy(), axis=1)) for index in (self.left, self.right))
            left, right = (columns.flatten(1) for columns in taken)
        else:
            lines = _torch_view(pixels).flatten(1)
            left, right = (lines.gather(1, index.expand(len(lines), -1)) for index in self._value_indices)
        return left, right

    @cached_property
    def _value_indices(self) -> tuple[Tensor, Tensor]:
        """`left` and `right` as indices of values instead of pixels, (width * 3,) each."""
        left, right = (
            (index[:, None] * CHANNELS + torch.arange(CHANNELS)).flatten() for index in (self.left, self.right)
        )
        return left, right


_tables = lru_cache(maxsize=64)(BilinearTables)  # all frames of a clip share theirs, of a few kilobytes


def resize_rows(
    image: np.ndarray, size: tuple[int, int], multiple: int, max_elements: int = MAX_BLOCK_ELEMENTS
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of a resized image: (index of the first row, (rows, width, 3) float32 of whole numbers).

    Args:
        image: (H, W, 3) uint8.
        size: height, a multiple of `multiple`, and width of the result.
        multiple: the number of rows of a block is a multiple of it.
        max_elements: maximum number of elements of a block, unless `multiple` rows have more.
    """
    tables = _tables(tuple(image.shape[:2]), size)
    count = multiple * max(1, max_elements // (multiple * size[1] * CHANNELS))
    for start in range(0, size[0], count):
        with torch.inference_mode():
            rows = tables.rows(image, start, min(size[0], start + count))
        np.rint(rows.numpy(), out=rows.numpy())
        yield start, rows


def _neighbours(source: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The neighbours before and after each position of one axis, int64, and their weights, float32; (size,) each."""
    scale = torch.tensor(source, dtype=torch.float32) / size
    positions = torch.arange(size, dtype=torch.float64) + 0.5
    positions = (scale.double() * positions - 0.5).float().clamp(min=0)
    before = positions.long()
    after = (before + 1).clamp(max=source - 1)
    weight = positions - before
    return before, after, 1 - weight, weight


class _WritableView:
    """Presents a read-only array (such as Pillow's) as writable; silences torch's warning. Never written."""

    def __init__(self, array: np.ndarray):
        self.array = array  # keeps the memory alive
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _torch_view(array: np.ndarray) -> Tensor:
    """A tensor over the memory of an array, or of a copy where torch has no view."""
    if min(array.strides) < 0:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_WritableView(array)))
