"""Safe reader of the pickles inside a checkpoint: nothing that they name is ever called.

A pickle is a program: a plain loader imports and calls whatever it names. Here every name is looked up in a whitelist
and replaced by an inert class of this module, so that the result is plain data. Any other name ends the conversion.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from molmo2.convert.errors import CheckpointError


class Record:
    """Inert stand-in for an object of the trainer or of torch; it only stores the state that it is given."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """One field of the state; None if there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Metadata(Record):
    """`.metadata` as a whole."""


class TensorEntry(Record):
    """Size, dtype and chunks of one tensor."""


class BytesEntry(Record):
    """An entry that is not a tensor."""


class ChunkEntry(Record):
    """Offsets and sizes of one chunk."""


class PropertiesEntry(Record):
    """dtype and layout of one tensor."""

    @property
    def dtype(self) -> Any:
        """Recent releases of torch write a tuple that opens with the dtype, older ones a dictionary."""
        return self.state[0] if isinstance(self.state, tuple) and self.state else self.field("dtype")


class IndexEntry(Record):
    """Name and chunk offset: the key of `storage_data`."""


class StorageEntry(Record):
    """File, byte offset and byte length of one chunk."""


class Ignored(Record):
    """A value that does not describe weights."""

    def __init__(self, *_: Any):
        pass


class Size(tuple):
    """torch.Size."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise TypeError("torch.Size has no state")


class Dictionary(dict):
    """collections.OrderedDict, without its attributes (module versions)."""

    def __setstate__(self, state: Any) -> None:
        pass


class TensorRecord(Record):
    """The arguments with which torch would rebuild a tensor."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments


DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
# The folder that a checkpoint was saved to, as torch's own writer notes it; Python 3.13 names the module differently.
_PATHS = {
    (module, name): Ignored
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}
_CHECKPOINT = "torch.distributed.checkpoint.metadata"

METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    (_CHECKPOINT, "Metadata"): Metadata,
    (_CHECKPOINT, "TensorStorageMetadata"): TensorEntry,
    (_CHECKPOINT, "BytesStorageMetadata"): BytesEntry,
    (_CHECKPOINT, "ChunkStorageMetadata"): ChunkEntry,
    (_CHECKPOINT, "TensorProperties"): PropertiesEntry,
    (_CHECKPOINT, "MetadataIndex"): IndexEntry,
    (_CHECKPOINT, "StorageMeta"): Ignored,
    (_CHECKPOINT, "_MEM_FORMAT_ENCODING"): Ignored,
    ("torch.serialization", "_get_layout"): Ignored,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageEntry,
    ("olmo.train.remote_filesystem", "_StorageInfo"): StorageEntry,
    ("torch", "Size"): Size,
    **_PATHS,
    **{("torch", name): name for name in DTYPE_NAMES},
}


def _parameter(data: Any, *_: Any) -> Any:
    """An nn.Parameter is the tensor in it."""
    return data


ARCHIVE_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): TensorRecord,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): Dictionary,
    **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, source: str, allowed: Mapping[tuple[str, str], Any], persistent: Callable | None):
        super().__init__(io.BytesIO(data))
        self._source, self._allowed, self._persistent = source, allowed, persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise CheckpointError(
                f"{self._source} asks for `{module}.{name}`, which no checkpoint of the trainer needs. Nothing of it "
                "was executed. Do not load this file with other tools; get the checkpoint from a source you trust."
            )
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise CheckpointError(f"{self._source} refers to data outside itself ({str(pid)[:80]!r}); expected none.")
        return self._persistent(pid)


def load_pickle(
    data: bytes,
    source: str,
    allowed: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Unpickle with a whitelist.

    Args:
        data: The pickle.
        source: Its name in messages: a path.
        allowed: (module, name) to the inert object that takes its place.
        persistent: Resolves references to storages; None refuses them.
    Raises:
        CheckpointError: For a name that is not in `allowed`, and for damaged data.
    """
    try:
        return _Unpickler(data, source, allowed, persistent).load()
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        raise CheckpointError(
            f"{source} cannot be read ({type(error).__name__}: {error}). It is damaged or was written by an unknown "
            "version; copy the checkpoint again."
        ) from None
