"""Locations of tensors inside files written by `torch.save`, found without loading them.

Such a file is a zip archive: `<name>/data.pkl` describes tensors, `<name>/data/<key>` holds the bytes of one storage,
uncompressed. Knowing where they start, a caller streams them from the file itself.
"""

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2.convert.errors import CheckpointError
from molmo2.convert.unpickling import ARCHIVE_GLOBALS, TensorRecord, load_pickle

LOCAL_HEADER_BYTES = 30
DIRECTORY_BUFFER = 4096
LOCAL_HEADER_MAGIC = b"PK\x03\x04"
ITEM_BYTES = {
    **dict.fromkeys(("float64", "int64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
}


@dataclass(frozen=True)
class StoredTensor:
    """Location of the bytes of one tensor, in row-major order.

    Attributes:
        path: The file.
        start: First byte, counted from the start of the file.
        num_bytes: Length.
        crc32: Checksum of exactly these bytes; None where the file has none for them.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    crc32: int | None


@dataclass(frozen=True)
class _Storage:
    dtype: str
    num_items: int
    start: int
    num_bytes: int
    crc32: int | None


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file of its own."""

    def __init__(self, file: io.RawIOBase, start: int, length: int):
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        number = self._file.readinto(memoryview(buffer)[:room]) if room else 0
        self._position += 0 if number is None else number
        return 0 if number is None else number


class TorchArchive:
    """One archive: a whole file, or the slice of a `.distcp` file that holds one piece.

    Args:
        path: The file.
        start: First byte of the archive.
        length: Its length in bytes; None: up to the end of the file.
    Raises:
        CheckpointError: If the bytes are not such an archive, or its structure is damaged.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None):
        self.path = path
        size = path.stat().st_size
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise CheckpointError(
                f"{path} has {size} bytes, but bytes {start} to {start + length} are needed: the file is truncated. "
                "Copy the checkpoint again."
            )
        self._start, self._length = start, length
        self.label = str(path) if length == size else f"{path} (bytes {start} to {start + length})"

    def read(self) -> tuple[Any, dict[str, _Storage]]:
        """The unpickled description and the storages it refers to."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                window = _Window(file, self._start, self._length)
                with zipfile.ZipFile(io.BufferedReader(window, DIRECTORY_BUFFER)) as archive:
                    return self._read(archive, window)
        except CheckpointError:
            raise
        except Exception as error:  # damaged bytes can make the zip reader raise anything
            raise CheckpointError(
                f"{self.label} is not a readable torch archive ({type(error).__name__}: {error}). "
                "It is damaged or incomplete; copy it again."
            ) from None

    def _read(self, archive: zipfile.ZipFile, window: _Window) -> tuple[Any, dict[str, _Storage]]:
        entries = {info.filename: info for info in archive.infolist()}
        roots = [name[: -len("data.pkl")] for name in entries if name.endswith("data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise CheckpointError(f"{self.label} holds {len(roots)} `data.pkl`; expected one, as `torch.save` writes.")
        root = roots[0]
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder").strip() != b"little":
            raise CheckpointError(
                f"{self.label} was written on a big-endian machine; only little-endian is supported."
            )
        storages: dict[str, _Storage] = {}

        def storage(pid: Any) -> str:
            kind, dtype, key, _, num_items = pid
            name = f"{root}data/{key}"
            if kind != "storage" or not isinstance(dtype, str) or dtype not in ITEM_BYTES or name not in entries:
                raise CheckpointError(f"{self.label} refers to {str(pid)[:120]}, which it does not hold.")
            storages[str(key)] = self._locate(entries[name], window, dtype, int(num_items))
            return str(key)

        return load_pickle(archive.read(f"{root}data.pkl"), self.label, ARCHIVE_GLOBALS, storage), storages

    def _locate(self, entry: zipfile.ZipInfo, window: _Window, dtype: str, num_items: int) -> _Storage:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"{self.label}: {entry.filename} is compressed or encrypted; torch stores it plainly."
            )
        window.seek(entry.header_offset)
        header = window.read(LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        offset = entry.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if header[:4] != LOCAL_HEADER_MAGIC or offset + entry.file_size > self._length:
            raise CheckpointError(
                f"{self.label}: {entry.filename} is not where the archive's directory says. Copy it again."
            )
        if entry.file_size != num_items * ITEM_BYTES[dtype]:
            raise CheckpointError(
                f"{self.label}: {entry.filename} has {entry.file_size} bytes; expected {num_items} x {dtype}."
            )
        # torch writes 0 when told not to compute checksums.
        return _Storage(dtype, num_items, self._start + offset, entry.file_size, entry.CRC if entry.CRC else None)

    def tensor(self, value: Any, storages: dict[str, _Storage], name: str) -> StoredTensor:
        """Turn what `read` returned for one tensor into its place.

        Raises:
            CheckpointError: If `value` is not a tensor, or not a contiguous one.
        """
        if not isinstance(value, TensorRecord) or len(value.arguments) < 4:
            raise CheckpointError(f"{self.label}: '{name}' is a {type(value).__name__}; expected a tensor.")
        key, first_item, shape, stride = value.arguments[:4]
        numbers = [first_item, *shape, *stride] if isinstance(shape, tuple) and isinstance(stride, tuple) else [None]
        is_sound = all(type(number) is int and number >= 0 for number in numbers) and len(numbers) == 1 + 2 * len(
            shape
        )
        if not is_sound or not isinstance(key, str) or key not in storages:
            raise CheckpointError(f"{self.label}: the description of '{name}' is damaged. Copy the checkpoint again.")
        storage = storages[key]
        num_items = math.prod(shape)
        wanted, step = [], 1
        for size in reversed(shape):
            wanted.append(step)
            step *= size
        if any(size > 1 and have != want for size, have, want in zip(shape, stride, reversed(wanted), strict=True)):
            raise CheckpointError(
                f"{self.label}: '{name}' of shape {shape} is stored with strides {tuple(stride)}. "
                "Save it with `.contiguous()`."
            )
        if first_item + num_items > storage.num_items:
            raise CheckpointError(f"{self.label}: '{name}' of shape {shape} reaches past the end of its storage.")
        item = ITEM_BYTES[storage.dtype]
        is_whole = num_items == storage.num_items
        return StoredTensor(
            path=self.path,
            dtype=storage.dtype,
            shape=shape,
            start=storage.start + first_item * item,
            num_bytes=num_items * item,
            crc32=storage.crc32 if is_whole else None,
        )
