"""Mutated checkpoints: each is refused with a documented error, or converted without a changed value.

    for case in itertools.islice(cases(seed), 5000):
        run(case)

Needs `src` and `tests` on the path. A case is a kind and a seed, so that it can be run again alone. The caller bounds
time and memory of each.
"""

import copy
import json
import os
import random
import shutil
import struct
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from molmo2.convert import ConversionError, ConversionOptions, convert_checkpoint
from molmo2.convert.to_native import write_native
from support.native_checkpoints import (
    ShardLayout,
    native_section,
    native_tensors,
    write_base_tokenizer,
    write_sharded,
    write_unsharded,
)

Case = tuple[str, int]
SMALL = {
    "llm.n_layers": 1,
    "vision_backbone.vit.image_num_layers": 3,
    "vision_backbone.vit_layers": [-1, -2],
    "llm.full_attention_layers": None,
}
MAX_SECONDS = 10.0
MAX_MESSAGE_CHARACTERS = 20_000

HOSTILE_VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**63, 2**64, -(2**70), 1.5, -0.0, 1e-300, 1e300, float("nan"), float("inf")),
    *(
        None,
        True,
        False,
        "",
        "1e309",
        "nan",
        "x" * 5000,
        "\x1b[31mred",
        "a\nwarning: b",
        "\u202eabc",
        "../../etc/passwd",
    ),
    *([], {}, [[]], [None], [1, "a"], list(range(1000)), {"a": {"b": {"c": 1}}}, [10**12], [-1], {"": None}, {1: 2}),
)


@cache
def _home() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-checkpoints-"))
    write_base_tokenizer(folder / "tokenizer")
    section = native_section({name: value for name, value in SMALL.items() if "full_att" not in name})
    tensors = native_tensors(section)
    write_sharded(folder / "sharded", section, tensors, ShardLayout(ranks=2, files_per_rank=1))
    write_unsharded(folder / "unsharded", section, tensors)
    options = ConversionOptions(tokenizer=str(folder / "tokenizer"), max_shard_bytes=100_000)
    convert_checkpoint(folder / "sharded", folder / "converted", options)
    torch.save(tensors, folder / "tensors.pt")
    return folder


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return torch.load(_home() / "tensors.pt", weights_only=True)


# Bytes


def _mutated(data: bytes, rng: random.Random, places: range | None = None) -> bytes:
    """A few bytes changed, removed, repeated or exchanged, or the end missing."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        places = range(len(content)) if places is None or rng.random() < 0.2 else places
        if not places or not content:
            break
        at = min(rng.choice(places), len(content) - 1)
        action = rng.randrange(8)
        if action < 3:
            content[at] ^= 1 << rng.randrange(8)
        elif action == 3:
            content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action == 4:
            del content[at : at + rng.choice((1, 1, 4, 100))]
        elif action == 5:
            content[at:at] = content[at : at + rng.choice((1, 4, 64))]
        elif action == 6:
            content[at : at + 8] = struct.pack("<q", rng.choice((-1, 0, 2**31, 2**40, 2**62, len(content))))
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def _bytes_of(path: Path, rng: random.Random, places: range | None = None) -> None:
    path.write_bytes(_mutated(path.read_bytes(), rng, places))


# Structures


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(HOSTILE_VALUES))  # later changes may go inside


def _somewhere(content: Any, rng: random.Random) -> None:
    """Another value somewhere in nested dictionaries and lists."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        action = rng.random()
        if not keys or action < 0.05:
            if isinstance(content, dict):
                content[rng.choice(("new", "\x1b]0;x\x07", "a.b", "__metadata__"))] = _value(rng)
            else:
                content.append(_value(rng))
            return
        key = rng.choice(keys)
        if isinstance(content[key], (dict, list)) and action < 0.9:
            content = content[key]
            continue
        if action > 0.97:
            del content[key]
        else:
            content[key] = _value(rng)
        return


def _settings(folder: Path, rng: random.Random) -> None:
    path = folder / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for _ in range(rng.choice((1, 1, 2, 4))):
        _somewhere(
            content["model"] if rng.random() < 0.95 and isinstance(content.get("model"), dict) else content, rng
        )
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _yaml_text(folder: Path, rng: random.Random) -> None:
    path, depth, width = folder / "config.yaml", rng.choice((5, 12, 60, 2000)), rng.choice((2, 9))
    text = path.read_text(encoding="utf-8")
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
    kinds = {
        "aliases": "\n".join(lines) + f"\nmodel: {{llm: *a{depth - 1}}}\n",
        "merges": "a0: &a0 {k: 1}\n"
        + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * width)}], k{n}: 1}}\n" for n in range(1, depth)),
        "itself": "model: &m {llm: *m}\n",
        "deep": "model: " + "[" * depth + "]" * rng.choice((0, depth)),
        "deep block": "model:\n" + "".join(" " * n + "a:\n" for n in range(1, depth)),
        "integer": text.replace(
            "d_model: 40", "d_model: " + rng.choice(("9" * 5000, "1" + ":1" * 2000, "0x" + "f" * 999))
        ),
        "date": text.replace("d_model: 40", "d_model: 2001-99-99"),
        "binary": text.replace("d_model: 40", "d_model: !!binary '='"),
        "tag": text.replace("d_model: 40", "d_model: !!python/object/apply:os.getcwd []"),
        "surrogate": text.replace("tiny-base-tokenizer", '"\\ud800\\0"'),
        "long": text + "\n# " + "x" * rng.choice((10, 2_000_000)),
        "keys": text + "? [a, b]\n: 1\n" + "1: 2\nnull: 3\n",
    }
    path.write_text(kinds[rng.choice(sorted(kinds))], encoding="utf-8")


NAMES = (
    b"torch.distributed.checkpoint.metadata\nMetadata\n",
    b"torch\nSize\n",
    b"os\nsystem\n",
    b"collections\nOrderedDict\n",
)


def _program(rng: random.Random) -> bytes:
    """A pickle of random instructions, some of them repeated very often."""
    pieces = [b"\x80", bytes([rng.randrange(6)])]
    single = b"(0N]}).aesutbR\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x932d1lo\x94Q"
    for _ in range(rng.choice((5, 30, 200))):
        kind = rng.randrange(9)
        pieces.append(
            (
                bytes([rng.choice(single)]),
                bytes([rng.choice(single)]),
                b"c" + rng.choice(NAMES),
                b"q" + bytes([rng.randrange(4)]),
                b"h" + bytes([rng.randrange(4)]),
                b"X" + struct.pack("<I", rng.choice((0, 3, 2**31))) + b"abc",
                b"K" + bytes([rng.randrange(256)]),
                rng.choice((b"r\xff\xff\xff\xff", b"\x8a\xff", b"\x8b\xff\xff\xff\x7f", b"\x96" + b"\xff" * 8)),
                bytes([rng.choice(single)]) * rng.choice((2, 100, 300_000)),
            )[kind]
        )
    return b"".join(pieces) + b"."


def _bomb(rng: random.Random) -> bytes:
    """Tuples in tuples, as values, keys, names, shapes, references and states."""
    depth, wide = rng.choice((10, 64, 100_000)), rng.random() < 0.5
    step = rng.choice((b"2\x86", b"q\x00h\x00\x86")) if wide else b"\x85"
    nested = rng.choice((b")", b"N", b"]", b"K\x07")) + step * min(depth, 20_000)
    metadata = b"ctorch.distributed.checkpoint.metadata\n"
    uses = (
        b"}" + nested + b"Ns",
        b"(" + nested + b"\x90",
        b"ctorch\nSize\n" + nested + b"\x85R",
        nested + b"Q",
        metadata + b"Metadata\n)\x81" + nested + b"b",
        nested + nested + b"\x93",
        metadata
        + b"Metadata\n)\x81}(X\x13\x00\x00\x00state_dict_metadata}X\x0c\x00\x00\x00storage_data}"
        + metadata
        + b"MetadataIndex\n)\x81}(X\x03\x00\x00\x00fqnX\x07\x00\x00\x00model.aX\x06\x00\x00\x00offset"
        + nested
        + b"ubNsub",
    )
    return b"\x80\x04" + rng.choice(uses) + b"."


def _metadata(folder: Path, rng: random.Random) -> None:
    path = folder / "model_and_optim" / ".metadata"
    choice = rng.random()
    if choice < 0.6:
        _bytes_of(path, rng)
    else:
        path.write_bytes(_program(rng) if choice < 0.8 else _bomb(rng))


def _pieces(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted((folder / "model_and_optim").glob("*.distcp")))
    data = path.read_bytes()
    # Around the headers of archives, more often than in the numbers.
    marks = [at for at in range(len(data) - 4) if data[at : at + 2] == b"PK"] if rng.random() < 0.7 else []
    at = rng.choice(marks) if marks else 0
    path.write_bytes(_mutated(data, rng, range(at, min(len(data), at + 80)) if marks else None))


def _archive(folder: Path, rng: random.Random) -> None:
    path = folder / "model.pt"
    if rng.random() < 0.5:
        data = path.read_bytes()
        _bytes_of(path, rng, rng.choice((range(2000), range(len(data) - 20_000, len(data)), range(len(data)))))
        return
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = rng.randrange(len(entries))
    name, content = next(entry for entry in entries if entry[0].endswith("data.pkl"))
    changes: tuple[Callable[[], Any], ...] = (
        lambda: entries.__setitem__(entries.index((name, content)), (name, _mutated(content, rng))),
        lambda: entries.__setitem__(entries.index((name, content)), (name, _program(rng))),
        lambda: entries.__setitem__(entries.index((name, content)), (name, _bomb(rng))),
        lambda: entries.append(entries[number]),
        lambda: entries.pop(number),
        lambda: entries.append(("other/data.pkl", b"N.")),
        lambda: entries.append((name.replace("data.pkl", "byteorder"), b"big" * rng.choice((1, 100_000)))),
        lambda: entries.extend((f"x{n}", b"") for n in range(3_000)),
    )
    rng.choice(changes)()
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w", kind) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about entries of one name
        for entry_name, entry in entries:
            archive.writestr(zipfile.ZipInfo(entry_name), entry, kind)


def _files(folder: Path, rng: random.Random) -> None:
    """Other things where files are expected."""
    path = rng.choice([path for path in folder.rglob("*") if path.is_file() and path.parent.name != "train"])
    path.unlink()
    choice = rng.randrange(6)
    if choice == 0:
        path.mkdir()
    elif choice == 1:
        os.mkfifo(path)
    elif choice == 2:
        path.symlink_to("/dev/zero")
    elif choice == 3:
        path.symlink_to(path.name)
    elif choice == 4:
        path.write_bytes(b"")
    else:
        with open(path, "wb") as file:
            file.truncate(rng.choice((100, 10**9, 10**12)))


def _json_of(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.4:
        _bytes_of(path, rng)
    elif rng.random() < 0.1:
        path.write_text(rng.choice(("[" * 100_000, '{"a":' * 100_000, "1" * 5000, '"\\ud800"', "NaN", "[]", "")))
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        for _ in range(rng.choice((1, 1, 3))):
            _somewhere(content, rng)
        path.write_text(json.dumps(content), encoding="utf-8")


def _tokenizer(folder: Path, rng: random.Random) -> None:
    _json_of(rng.choice(sorted((folder / "tokenizer").iterdir())), rng)


def _weights(path: Path, rng: random.Random) -> None:
    """A header of safetensors."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.4:
        header = _mutated(data[: 8 + length], rng)
    else:
        content = json.loads(data[8 : 8 + length])
        _somewhere(content, rng)
        text = json.dumps(content).encode()
        header = struct.pack("<Q", len(text)) + text
    path.write_bytes(header + data[8 + length :])


def _converted(folder: Path, rng: random.Random) -> None:
    names = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    choice = rng.random()
    if choice < 0.3:
        _weights(rng.choice(sorted(folder.glob("*.safetensors"))), rng)
    elif choice < 0.45:
        _json_of(folder / "model.safetensors.index.json", rng)
    elif choice < 0.6:
        shutil.copy(folder / "native_config.yaml", folder / "config.yaml")
        (_settings if rng.random() < 0.5 else _yaml_text)(folder, rng)
        (folder / "config.yaml").replace(folder / "native_config.yaml")
    else:
        _json_of(folder / rng.choice(names), rng)


MUTATIONS: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "settings": ("unsharded", _settings),
    "yaml bytes": ("unsharded", lambda folder, rng: _bytes_of(folder / "config.yaml", rng)),
    "yaml text": ("unsharded", _yaml_text),
    "metadata": ("sharded", _metadata),
    "pieces": ("sharded", _pieces),
    "archive": ("unsharded", _archive),
    "files": ("sharded", _files),
    "tokenizer": ("unsharded", _tokenizer),
    "converted": ("converted", _converted),
}


def prepare() -> None:
    """Everything that cases have in common; once, before processes are forked for them."""
    _tensors()


def cases(seed: int) -> Iterator[Case]:
    """Without end."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(sorted(MUTATIONS)), rng.getrandbits(48)


def run(case: Case) -> str:
    """Try one case.

    Returns:
        "converted" or "refused".
    Raises:
        AssertionError: For a wrong result; any other exception is one too.
    """
    kind, seed = case
    home, (source, mutate) = _home(), MUTATIONS[kind]
    _tensors()
    with tempfile.TemporaryDirectory(prefix="fuzz-case-") as scratch:
        folder, results = Path(scratch, source), Path(scratch, "results")
        results.mkdir()
        shutil.copytree(home / source, folder)
        shutil.copytree(home / "tokenizer", folder / "tokenizer")
        mutate(folder, random.Random(seed))
        started, message = time.process_time(), StringIO()
        try:
            with redirect_stderr(message):
                result = _convert(folder, results / "out")
        except ConversionError as error:
            result = "refused"
            _check_message(str(error))
            left = [path.name for path in results.iterdir()]
            assert left == [], f"a refusal left {left}"
        seconds = time.process_time() - started
        assert seconds < MAX_SECONDS, f"{seconds:.1f} s of CPU"
    return result


def _convert(folder: Path, output: Path) -> str:
    if folder.name == "converted":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_native(folder, output)
        found = torch.load(output / "model.pt", weights_only=True)
        assert _same(found, _tensors()), "a tensor has changed"
        return "converted"
    options = ConversionOptions(tokenizer=str(folder / "tokenizer"))
    plan = convert_checkpoint(folder, output, options, warn=lambda text: _check_message(text))
    found = load_file(output / "model.safetensors")
    wanted = {rename.target: _tensors()[rename.native] for rename in plan.source.renames}
    assert _same(found, wanted), "a tensor has changed"
    assert {path.name for path in output.parent.iterdir()} == {"out"}, "something is left beside the output"
    return "converted"


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def _check_message(text: str) -> None:
    assert len(text) < MAX_MESSAGE_CHARACTERS, f"a message of {len(text)} characters"
    assert all(char.isprintable() or char == "\n" for char in text), f"a message with control characters: {text!r}"
