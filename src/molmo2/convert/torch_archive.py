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

from molmo2.convert.errors import CheckpointError, shown
from molmo2.convert.unpickling import ARCHIVE_GLOBALS, MAX_ARGUMENTS, TensorRecord, load_pickle

LOCAL_HEADER_BYTES = 30
DIRECTORY_BUFFER = 4096
LOCAL_HEADER_MAGIC = b"PK\x03\x04"
MAX_DIRECTORY_BYTES = 8_000_000  # bytes of the list of entries; a model of 1,000 tensors has 100,000
MAX_DESCRIPTION_BYTES = 16_000_000  # bytes of data.pkl; a model of 1,000 tensors has 200,000
MAX_BYTEORDER_BYTES = 16
UTF8 = 0x800  # flag of an entry: the encoding of its name
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
        self.left = MAX_DIRECTORY_BYTES  # bytes that may be read

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
        number = 0 if number is None else number
        self._position, self.left = self._position + number, self.left - number
        if self.left < 0:
            raise OSError("its directory is too long")
        return number


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
        if len(entries) != len(archive.infolist()):
            raise CheckpointError(f"{self.label} holds several entries of one name; it is not clear which counts.")
        roots = [name[: -len("data.pkl")] for name in entries if name.endswith("data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise CheckpointError(f"{self.label} holds {len(roots)} `data.pkl`; expected one, as `torch.save` writes.")
        root = roots[0]
        window.left = MAX_DESCRIPTION_BYTES + MAX_DIRECTORY_BYTES + len(entries) * DIRECTORY_BUFFER

        def small(name: str, limit: int) -> bytes:
            entry = entries[f"{root}{name}"]
            self._ensure_plain(entry)
            if entry.file_size > limit:
                raise CheckpointError(
                    f"{self.label}: {entry.filename} has {entry.file_size:,} bytes; expected {limit:,}."
                )
            return archive.read(entry)

        if f"{root}byteorder" in entries and small("byteorder", MAX_BYTEORDER_BYTES).strip() != b"little":
            raise CheckpointError(
                f"{self.label} was written on a big-endian machine; only little-endian is supported."
            )
        storages: dict[str, _Storage] = {}

        def storage(pid: Any) -> str:
            kind, dtype, key, _, num_items = pid if type(pid) is tuple and len(pid) == 5 else (None,) * 5
            is_sound = kind == "storage" and all(isinstance(name, str) for name in (dtype, key))
            entry = entries.get(f"{root}data/{key}") if is_sound else None
            if entry is None or key is None or dtype not in ITEM_BYTES or type(num_items) is not int:
                raise CheckpointError(f"{self.label} refers to {shown(pid)}, which it does not hold.")
            if key not in storages:
                storages[key] = self._locate(entry, window, dtype, num_items)
            if (storages[key].dtype, storages[key].num_items) != (dtype, num_items):
                raise CheckpointError(f"{self.label} describes storage {shown(key)} twice, and differently.")
            return key

        return load_pickle(small("data.pkl", MAX_DESCRIPTION_BYTES), self.label, ARCHIVE_GLOBALS, storage), storages

    def _ensure_plain(self, entry: zipfile.ZipInfo) -> None:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"{self.label}: {entry.filename} is compressed or encrypted; torch stores it plainly."
            )

    def _locate(self, entry: zipfile.ZipInfo, window: _Window, dtype: str, num_items: int) -> _Storage:
        self._ensure_plain(entry)
        window.seek(entry.header_offset)
        header = window.read(LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        offset = entry.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        encoding = "utf-8" if entry.flag_bits & UTF8 else "cp437"
        is_named = window.read(name_bytes) == entry.orig_filename.encode(encoding)
        if header[:4] != LOCAL_HEADER_MAGIC or not is_named or offset + entry.file_size > self._length:
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
            raise CheckpointError(f"{self.label}: '{name}' is {shown(value)}; expected a tensor.")
        key, first_item, shape, stride = value.arguments[:4]
        is_sound = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
        numbers = [first_item, *shape, *stride] if is_sound and len(shape) <= MAX_ARGUMENTS else [None]
        is_sound = all(type(number) is int and number >= 0 for number in numbers)
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
