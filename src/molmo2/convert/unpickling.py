"""Safe reader of the pickles inside a checkpoint: nothing that they name is ever called.

A pickle is a program: a plain loader imports and calls whatever it names. Here every name is looked up in a whitelist
and replaced by an inert class of this module, so that the result is plain data. Any other name ends the conversion.

Nor can such a program run for long or fill the memory: the machine below knows only the instructions that checkpoints
need (`pickletools` of the standard library describes all of them), each does a constant amount of work or reads its
argument from the file, and keys of dictionaries are strings or records, which never hash what is inside them.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from molmo2.convert.errors import CheckpointError, shown

MAX_PICKLE_BYTES = 256_000_000  # bytes; a piece needs about 100
MAX_INSTRUCTIONS = 12_000_000  # each may make an object, in all 1 GB; about 75 per piece
MAX_ARGUMENTS = 16  # of a call, dimensions of a shape included: calls copy them
MAX_INTEGER_BYTES = 8  # bytes


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

    def __new__(cls, sizes: tuple[int, ...] = ()) -> "Size":
        """Of at most `MAX_ARGUMENTS` dimensions, from a tuple."""
        if not isinstance(sizes, tuple) or len(sizes) > MAX_ARGUMENTS:
            raise ValueError(f"the shape {shown(sizes)}")
        return super().__new__(cls, sizes)


class Dictionary(dict):
    """collections.OrderedDict, without its attributes (module versions)."""

    def __init__(self) -> None:
        """Empty: the items come one by one."""
        super().__init__()

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


class _Mark:
    """Start of a group of values on the stack; as inert as every other value."""


_MARK = _Mark()
_NO_RECORD = "which is no dictionary, list or record"


class _Machine:
    """Runs one pickle; see `load_pickle`."""

    def __init__(self, data: bytes, source: str, allowed: Mapping[tuple[str, str], Any], persistent: Callable | None):
        self._data, self._source, self._allowed, self._persistent = data, source, allowed, persistent
        self._position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value that the pickle leaves."""
        table, data, stop = _INSTRUCTIONS, self._data, ord(".")
        for _ in range(MAX_INSTRUCTIONS):
            code = data[self._position]
            self._position += 1
            if code == stop:
                return self._pop()
            instruction = table.get(code)
            if instruction is None:
                raise ValueError(f"instruction {bytes([code])!r} at byte {self._position - 1}")
            instruction(self)
        raise ValueError(f"more than {MAX_INSTRUCTIONS:,} instructions")

    def _take(self, number: int) -> bytes:
        """The next bytes."""
        taken = self._data[self._position : self._position + number]
        if len(taken) != number:
            raise ValueError("it ends too early")
        self._position += number
        return taken

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _pop(self) -> Any:
        return self._stack.pop()

    def _group(self) -> list[Any]:
        """The values above the last mark."""
        stack, start = self._stack, len(self._stack) - 1
        while stack[start] is not _MARK:  # IndexError if there is none
            start -= 1
        values = stack[start + 1 :]
        del stack[start:]
        return values

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def frame(self) -> None:
        self._take(8)  # its length, which only helps readers of streams

    def signed(self, size: int) -> None:
        if size > MAX_INTEGER_BYTES:
            raise ValueError(f"an integer of {size} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def text(self, size: int) -> None:
        self._push(str(self._take(self._number(size)), "utf-8", "surrogatepass"))

    def put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def get(self, size: int) -> None:
        self._push(self._memo[self._number(size)])

    def line(self) -> str:
        end = self._data.index(b"\n", self._position)
        return str(self._take(end + 1 - self._position)[:-1], "utf-8")

    def extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError(f"items for {shown(self._stack[-1])}, {_NO_RECORD}")
        self._stack[-1].extend(values)

    def fill(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, Dictionary) or len(values) % 2:
            raise ValueError(f"items for {shown(target)}, {_NO_RECORD}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str and not isinstance(key, Record):
                raise ValueError(f"the key {shown(key)}; expected a string or a record")
            target[key] = value

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError(f"the name {shown((module, name))}")
        if (module, name) not in self._allowed:
            raise CheckpointError(
                f"{self._source} asks for `{shown(module)[1:-1]}.{shown(name)[1:-1]}`, which no checkpoint of the "
                "trainer needs. Nothing of it was executed. Do not load this file with other tools; get the "
                "checkpoint from a source you trust."
            )
        self._push(self._allowed[module, name])

    def call(self) -> None:
        """One of our own stand-ins, with few arguments."""
        arguments, stand_in = self._pop(), self._pop()
        if not callable(stand_in) or type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
            raise ValueError(f"a call of {shown(stand_in)} with {shown(arguments)}")
        self._push(stand_in(*arguments))

    def build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if not isinstance(target, (Record, Dictionary)):
            raise ValueError(f"a state for {shown(target)}, {_NO_RECORD}")
        target.__setstate__(state)

    def refer(self) -> None:
        pid = self._pop()
        if self._persistent is None:
            raise CheckpointError(f"{self._source} refers to data outside itself ({shown(pid)}); expected none.")
        self._push(self._persistent(pid))

    def stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        self.name(module, name)


_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    code[0]: run
    for code, run in {
        b"\x80": lambda m: m._take(1),  # the protocol; instructions show what is used of it
        b"\x95": _Machine.frame,
        b"(": lambda m: m._push(_MARK),
        b"0": _Machine._pop,
        b"N": lambda m: m._push(None),
        b"\x88": lambda m: m._push(True),
        b"\x89": lambda m: m._push(False),
        b"K": lambda m: m._push(m._number(1)),
        b"M": lambda m: m._push(m._number(2)),
        b"J": lambda m: m.signed(4),
        b"\x8a": lambda m: m.signed(m._number(1)),
        b"G": lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
        b"X": lambda m: m.text(4),
        b"\x8c": lambda m: m.text(1),
        b"\x8d": lambda m: m.text(8),
        b"B": lambda m: m._push(m._take(m._number(4))),
        b"C": lambda m: m._push(m._take(m._number(1))),
        b"]": lambda m: m._push([]),
        b"a": lambda m: m.extend([m._pop()]),
        b"e": lambda m: m.extend(m._group()),
        b"}": lambda m: m._push({}),
        b"s": lambda m: m.fill([m._pop(), m._pop()][::-1]),
        b"u": lambda m: m.fill(m._group()),
        b")": lambda m: m._push(()),
        b"t": lambda m: m._push(tuple(m._group())),
        b"\x85": lambda m: m._push((m._pop(),)),
        b"\x86": lambda m: m._push((m._pop(), m._pop())[::-1]),
        b"\x87": lambda m: m._push((m._pop(), m._pop(), m._pop())[::-1]),
        b"q": lambda m: m.put(m._number(1)),
        b"r": lambda m: m.put(m._number(4)),
        b"\x94": lambda m: m.put(len(m._memo)),
        b"h": lambda m: m.get(1),
        b"j": lambda m: m.get(4),
        b"c": lambda m: m.name(m.line(), m.line()),
        b"\x93": _Machine.stack_name,
        b"R": _Machine.call,
        b"\x81": _Machine.call,  # a new object: the stand-ins have no other way to make one
        b"b": _Machine.build,
        b"Q": _Machine.refer,
    }.items()
}


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
        return _Machine(data, source, allowed, persistent).run()
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes can make the machine raise anything
        raise CheckpointError(
            f"{source} cannot be read ({type(error).__name__}: {shown(str(error), 300)[1:-1]}). It is damaged or was "
            "written by an unknown version; copy the checkpoint again."
        ) from None
