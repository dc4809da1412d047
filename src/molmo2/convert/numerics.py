"""Conversion between float32 and bfloat16, block by block, in buffers that are allocated once."""

from collections.abc import Iterator

import numpy as np

from molmo2.convert.reader import Piece, SourceTensor, stream_piece

# Small enough to stay in the processor's cache between reading, checksum, rounding and writing.
BLOCK_BYTES = 1 << 20
ROUND_HALF = np.uint32(0x7FFF)
QUIET_BIT = np.uint16(0x40)


def count_non_finite(block: memoryview | bytes, dtype: str) -> int:
    """Number of NaN and infinite values among the bytes of float32 or bfloat16 numbers."""
    if dtype == "bfloat16":
        bits = np.frombuffer(block, np.uint16) & np.uint16(0x7FFF)
        return int(np.count_nonzero(bits >= 0x7F80)) if bits.size and bits.max() >= 0x7F80 else 0
    values = np.frombuffer(block, np.float32)
    # Both are NaN if one value is.
    is_finite = not values.size or (np.isfinite(values.max()) and np.isfinite(values.min()))
    return 0 if is_finite else int(np.count_nonzero(~np.isfinite(values)))


def non_finite_note(name: str, number: int) -> str:
    """What to say about a tensor with such values."""
    return f"'{name}' holds {number} NaN or infinite value(s)"


class BlockConverter:
    """Streams tensors in another dtype. Each thread needs its own.

    Args:
        dtype: Of the output: "float32" or "bfloat16".
    """

    def __init__(self, dtype: str):
        self.dtype = dtype
        self._buffer = np.empty(BLOCK_BYTES, np.uint8).data
        self._scratch = np.empty(BLOCK_BYTES // 2, np.uint32)

    def stream(self, tensor: SourceTensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in order, little-endian; each block is overwritten by the next."""
        for piece in tensor.pieces:
            yield from self.stream_piece(tensor, piece)

    def stream_piece(self, tensor: SourceTensor, piece: Piece) -> Iterator[memoryview]:
        """The same for one piece of the tensor."""
        for block in stream_piece(piece, tensor.name, self._buffer):
            if tensor.dtype == self.dtype:
                yield block
            elif self.dtype == "bfloat16":
                yield self._round(np.frombuffer(block, np.uint32))
            else:
                yield self._widen(np.frombuffer(block, np.uint16))

    def _round(self, bits: np.ndarray) -> memoryview:
        """float32 to bfloat16, to nearest, ties to even; NaN stays NaN."""
        rounded = self._scratch[: bits.size]
        np.right_shift(bits, 16, out=rounded)
        rounded &= 1
        rounded += ROUND_HALF
        rounded += bits
        upper = np.ascontiguousarray(rounded.view(np.uint16)[1::2])
        values = bits.view(np.float32)
        if values.size and np.isnan(values.max()):  # the carry could have turned a NaN into infinity or zero
            is_nan = np.isnan(values)
            upper[is_nan] = (bits[is_nan] >> 16).astype(np.uint16) | QUIET_BIT
        return upper.data.cast("B")

    def _widen(self, halves: np.ndarray) -> memoryview:
        """bfloat16 to float32, exactly."""
        wide = self._scratch[: halves.size]
        np.left_shift(halves, 16, out=wide, dtype=np.uint32)
        return wide.data.cast("B")
