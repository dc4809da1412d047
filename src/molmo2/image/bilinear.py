"""Bilinear resizing of uint8 pictures by looking up the four neighbours of each pixel that is wanted.

torch.nn.functional.interpolate takes floating point, so every pixel of a picture is converted first, read or not; of
a 1080p frame that becomes 378 x 378 three quarters are not. Here only neighbours are converted, a few rows at a time,
in the thread that calls: other threads may decode meanwhile.

The numbers are those of `interpolate` with one thread, to the last bit. With several it takes another kernel, which
rounds sums that lie halfway between two grey levels the other way now and then; here they are the same on any machine.
"""

from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from molmo2.configuration import CHANNELS

# torch hands pieces of more elements to its pool of threads, whose workers then spin for a while on cores that decode.
# Its `round` does so with pieces of any size: numpy, which has no threads, does that part.
MOST_INLINE = 32768
MOST_ELEMENTS = 2**18  # of a piece where nothing else is going on: few steps, and small beside the pixels of a photo


class BilinearTables:
    """Where each pixel of the result looks, and how much each of its neighbours weighs.

    Half-pixel centres, no antialiasing, edges repeated: `align_corners=False` of `interpolate`. Positions are rounded
    to float32 once, and a sum is a product and three fused multiply-adds (`addcmul`) in the order of torch's kernel.

    Args:
        source: height and width of the picture.
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
        """Rows of the result.

        Args:
            image: (H, W, 3) uint8.
        Returns:
            (stop - start, width, 3) float32 from 0 to 255, not rounded.
        """
        upper, lower = self.upper[start:stop], self.lower[start:stop]
        first, last = int(upper[0]), int(lower[-1]) + 1
        if last - first <= 2 * (stop - start):  # neighbours share rows: each is looked up once
            source, upper, lower = image[first:last], upper - first, lower - first
        else:
            source = image.take(torch.cat((upper, lower)).numpy(), axis=0)
            upper, lower = torch.arange(2 * (stop - start)).chunk(2)
        left, right = self._columns(source, is_small=(stop - start) * self.size[1] * CHANNELS <= MOST_INLINE)
        upper_weight, lower_weight = self.upper_weight[start:stop], self.lower_weight[start:stop]
        sums = right.index_select(0, upper).float().mul_(upper_weight * self.right_weight)
        sums.addcmul_(upper_weight * self.left_weight, left.index_select(0, upper).float())
        sums.addcmul_(lower_weight * self.left_weight, left.index_select(0, lower).float())
        sums.addcmul_(lower_weight * self.right_weight, right.index_select(0, lower).float())
        return sums.unflatten(1, (-1, CHANNELS))

    def _columns(self, pixels: np.ndarray, is_small: bool) -> tuple[Tensor, Tensor]:
        """The left and the right neighbours in (H, W, 3) pixels, (H, width * 3) each.

        torch looks them up with its threads; numpy is faster in one.
        """
        if is_small or torch.get_num_threads() == 1:
            taken = (torch.from_numpy(pixels.take(places.numpy(), axis=1)) for places in (self.left, self.right))
            left, right = (columns.flatten(1) for columns in taken)
        else:
            lines = torch_view(pixels).flatten(1)
            left, right = (lines.gather(1, values.expand(len(lines), -1)) for values in self._values)
        return left, right

    @cached_property
    def _values(self) -> tuple[Tensor, Tensor]:
        """`left` and `right` in numbers of values instead of pixels, (width * 3,) each."""
        left, right = (
            (places[:, None] * CHANNELS + torch.arange(CHANNELS)).flatten() for places in (self.left, self.right)
        )
        return left, right


def looked_up(
    image: np.ndarray, size: tuple[int, int], multiple: int, most_elements: int = MOST_ELEMENTS
) -> Iterator[tuple[int, Tensor]]:
    """A resized picture in pieces: (number of the first row, (rows, width, 3) float32 of whole numbers).

    Args:
        image: (H, W, 3) uint8.
        size: height, a multiple of `multiple`, and width of the result.
        multiple: Rows of a piece are a multiple of it.
        most_elements: Of a piece, if that many rows have no more.
    """
    tables = bilinear_tables(tuple(image.shape[:2]), size)
    count = multiple * max(1, most_elements // (multiple * size[1] * CHANNELS))
    for start in range(0, size[0], count):
        with torch.inference_mode():
            rows = tables.rows(image, start, min(size[0], start + count))
        np.rint(rows.numpy(), out=rows.numpy())
        yield start, rows


@lru_cache(maxsize=64)
def bilinear_tables(source: tuple[int, int], size: tuple[int, int]) -> BilinearTables:
    """The same tables for every frame of a clip; they take a few kilobytes."""
    return BilinearTables(source, size)


def _neighbours(source: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The neighbours before and after each place of one axis, int64, and their weights, float32; (size,) each."""
    scale = torch.tensor(source, dtype=torch.float32) / size
    places = torch.arange(size, dtype=torch.float64) + 0.5
    places = (scale.double() * places - 0.5).float().clamp(min=0)
    before = places.long()
    after = (before + 1).clamp(max=source - 1)
    weight = places - before
    return before, after, 1 - weight, weight


class _Unlocked:
    """Says that memory may be written, which nobody does: torch warns of read-only arrays, as Pillow's are."""

    def __init__(self, array: np.ndarray):
        self.array = array  # whose memory it is
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def torch_view(array: np.ndarray) -> Tensor:
    """The same memory, or a copy where torch cannot look at it: negative strides, foreign byte order."""
    if min(array.strides) < 0 or not array.dtype.isnative:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Unlocked(array)))
