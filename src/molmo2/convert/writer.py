"""Writer of safetensors files: pieces of the source stream to their places, several at a time."""

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from molmo2.convert.numerics import BlockConverter, count_non_finite, non_finite_note
from molmo2.convert.reader import Piece, SourceTensor
from molmo2.convert.shards import SAFETENSORS_DTYPES, Shard
from molmo2.convert.staging import Segment, Staging, flush
from molmo2.convert.torch_archive import ITEM_BYTES

# Reading, checksums, rounding and writing all release the interpreter, and some threads wait for the disk.
NUM_WORKERS = min(4, (os.cpu_count() or 1) + 2)


# A shard that is being flushed: its task, file name, segments, and what is to be said about it.
_Written = tuple[Future, str, list[Segment], list[str]]


@dataclass(frozen=True)
class Placement:
    """One piece of the source and the bytes [start, start + num_bytes) of a shard that it becomes.

    Attributes:
        target: Converted name of the tensor.
    """

    target: str
    tensor: SourceTensor
    piece: Piece
    start: int
    num_bytes: int


def placements(shard: Shard, sources: Mapping[str, SourceTensor], dtype: str) -> Iterator[Placement]:
    """Place of each piece in a shard, in file order; together they fill it after the header."""
    start, item = len(shard.header), SAFETENSORS_DTYPES[dtype][1]
    for rename in shard.tensors:
        tensor = sources[rename.native]
        for piece in tensor.pieces:
            num_bytes = piece.num_bytes // ITEM_BYTES[tensor.dtype] * item
            yield Placement(rename.target, tensor, piece, start, num_bytes)
            start += num_bytes


class WeightWriter:
    """Writes the shards of a plan into a staging folder.

    Args:
        sources: Native tensors by name.
        dtype: Of the output.
        on_progress: Called with the number of bytes after each finished piece.
    """

    def __init__(
        self, staging: Staging, sources: Mapping[str, SourceTensor], dtype: str, on_progress: Callable[[int], object]
    ):
        self._staging, self._sources, self._dtype, self._on_progress = staging, sources, dtype, on_progress
        self._stop = threading.Event()
        self._of_thread = threading.local()
        self._counting = threading.Lock()
        self._non_finite: dict[str, int] = {}  # values that are NaN or infinite as written, by converted name

    def write(self, shards: list[Shard]) -> None:
        """Write all shards that are not finished yet. One is flushed while the next is computed.

        Raises:
            CheckpointError: If the source turns out to be damaged.
            OSError: If the disk does not take it.
        """
        flushing: _Written | None = None
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            for shard in shards:
                if shard.file_name in self._staging.finished:
                    self._on_progress(shard.num_bytes)
                    continue
                segments = self._write_shard(pool, shard)
                self._record(flushing)
                flushed = pool.submit(flush, self._staging.folder / shard.file_name)
                names = sorted({rename.target for rename in shard.tensors} & set(self._non_finite))
                notes = [non_finite_note(name, self._non_finite[name]) for name in names]
                flushing = (flushed, shard.file_name, segments, notes)
            self._record(flushing)

    def _record(self, flushing: _Written | None) -> None:
        if flushing is not None:
            flushed, file_name, segments, notes = flushing
            flushed.result()
            self._staging.record(file_name, segments, notes)

    def _write_shard(self, pool: ThreadPoolExecutor, shard: Shard) -> list[Segment]:
        """Write one file; the segments are its header and its pieces."""
        places = list(placements(shard, self._sources, self._dtype))
        segments = [Segment(len(shard.header), zlib.crc32(shard.header))]
        with open(self._staging.folder / shard.file_name, "xb", buffering=0) as file:
            _write_at(file.fileno(), shard.header, 0)
            self._on_progress(len(shard.header))
            futures = [pool.submit(self._write_piece, file.fileno(), place) for place in places]
            try:
                for future, place in zip(futures, places, strict=True):
                    segments.append(Segment(place.num_bytes, future.result()))
                    self._on_progress(place.num_bytes)
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                wait(futures)  # the file must stay open until all writes have ended
                raise
        return segments

    def _write_piece(self, descriptor: int, place: Placement) -> int:
        """CRC32 of what was written."""
        if not hasattr(self._of_thread, "converter"):
            self._of_thread.converter = BlockConverter(self._dtype)
        crc, position = 0, place.start
        for block in self._of_thread.converter.stream_piece(place.tensor, place.piece):
            if self._stop.is_set():
                break  # another piece failed, and that will be reported
            _write_at(descriptor, block, position)
            crc = zlib.crc32(block, crc)
            position += len(block)
            number = count_non_finite(block, self._dtype)
            if number:
                with self._counting:
                    self._non_finite[place.target] = self._non_finite.get(place.target, 0) + number
        return crc


def _write_at(descriptor: int, block: bytes | memoryview, position: int) -> None:
    """`pwrite` may stop early, for instance on a disk that is filling up."""
    rest = memoryview(block)
    while rest:
        written = os.pwrite(descriptor, rest, position)
        rest, position = rest[written:], position + written
