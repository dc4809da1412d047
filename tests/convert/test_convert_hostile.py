"""Checkpoints and folders made to harm: refused at once, and nothing of anybody else is touched."""

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import molmo2.convert.hub as hub_module
import molmo2.convert.staging as staging_module
from molmo2.convert import ConversionOptions, OutputError, convert_checkpoint, plan_conversion
from molmo2.convert.cli import main
from molmo2.convert.conversion import write_plan
from molmo2.convert.deadlines import DeadlineExceeded, within_deadline
from molmo2.convert.errors import CheckpointError, ConversionError, UnsupportedError, printable, shown
from molmo2.convert.folder import read_folder
from molmo2.convert.hub import HubError, push_folder
from molmo2.convert.native_config import parse_config
from molmo2.convert.numerics import count_non_finite
from molmo2.convert.small_files import MAX_DEPTH, MAX_YAML_BYTES, read_json, read_model_section
from molmo2.convert.staging import STATE_FILE, Staging
from molmo2.convert.torch_archive import TorchArchive
from molmo2.convert.unpickling import ARCHIVE_GLOBALS, METADATA_GLOBALS, load_pickle
from support.native_checkpoints import native_section, native_tensors, write_base_tokenizer, write_unsharded

GIVEN = Path(__file__).resolve().parents[3] / "shared" / "hostile" / "checkpoints"
SECONDS = 5.0  # of CPU, for what must be refused at once


@pytest.fixture
def at_once():
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


# Pickles

METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
SIZE = b"ctorch\nSize\n"
DOUBLED, NESTED = b")" + b"q\x00h\x00\x86" * 70, b")" + b"\x85" * 300_000
PICKLES = {
    "doubled tuple as a key": b"}" + DOUBLED + b"Ns",
    "doubled tuple as a key, by duplication": b"})" + b"2\x86" * 80 + b"Ns",
    "nested tuple as a key": b"}" + NESTED + b"Ns",
    "nested tuple in a set": b"\x8f(" + NESTED + b"\x90",
    "doubled tuple as a name": DOUBLED + b"X\x01\x00\x00\x00a\x93",
    "doubled tuple as a reference": DOUBLED + b"Q",
    "a list as a shape": SIZE + b"](" + b"K\x01" * 1000 + b"e\x85R",
    "colliding keys": b"}("
    + b"".join(b"\x8a\x08" + struct.pack("<q", n * (2**31 - 1)) + b"N" for n in range(9))
    + b"u",
    "a huge integer": b"\x8b" + struct.pack("<I", 100_000) + b"\xff" * 100_000,
    "a place far beyond the memo": b"N\x94r\xff\xff\xff\xffj\xfe\xff\xff\xff",
    "many arguments": SIZE + b"(" + b"K\x01" * 100 + b"tR",
    "a class with a state": METADATA + b"N}X\x01\x00\x00\x00aNs\x86b",
    "an unknown instruction": b"2",
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.usefixtures("at_once")
def test_programs_that_would_run_long_or_crash(name):
    with pytest.raises(CheckpointError, match=r"^here (cannot be read|refers to)") as caught:
        load_pickle(b"\x80\x04" + PICKLES[name] + b".", "here", METADATA_GLOBALS)
    assert len(str(caught.value)) < 600


@pytest.mark.usefixtures("at_once")
def test_a_limit_on_instructions(monkeypatch):
    monkeypatch.setattr("molmo2.convert.unpickling.MAX_INSTRUCTIONS", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 instructions"):
        load_pickle(b"}" * 1001 + b".", "here", METADATA_GLOBALS)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["doubled_tuple_key.metadata", "nested_tuple_key.metadata"])
def test_given_metadata(name):
    if not GIVEN.is_dir():
        pytest.skip("the given files are not here; the same kinds are above")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pickle((GIVEN / name).read_bytes(), "here", METADATA_GLOBALS)


def archive(path: Path, data: bytes = b"N.", method: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a/data.pkl", data)
        for name, content in more.items():
            file.writestr(f"a/{name}", content)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"method": zipfile.ZIP_DEFLATED, "data": b"\0" * 50_000_000}, "is compressed or encrypted"),
        ({"data": b"\0" * 17_000_000}, "has 17,000,000 bytes; expected 16,000,000"),
        ({"byteorder": b"little" + b" " * 100}, "has 106 bytes; expected 16"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data": b"(" + DOUBLED + b"N" * 4 + b"tQ."}, "refers to "),
    ],
)
@pytest.mark.usefixtures("at_once")
def test_archives(tmp_path, content, expected):
    with pytest.raises(CheckpointError, match=expected):
        TorchArchive(archive(tmp_path / "a.pt", **content)).read()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(tmp_path):
    path = archive(tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a/data.pkl", b"N.")
    with pytest.raises(CheckpointError, match="several entries of one name"):
        TorchArchive(path).read()


def test_dictionaries_with_order_are_still_read():
    data = b"ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00aK\x01u."
    assert load_pickle(data, "here", ARCHIVE_GLOBALS) == {"a": 1}


# YAML and JSON


def doubling(merged: bool) -> str:
    start = "a0: &a0 {k: 1}\n" if merged else "a0: &a0 [x, x]\n"
    line = "a{0}: &a{0} {{<<: [*a{1}, *a{1}], k{0}: 1}}\n" if merged else "a{0}: &a{0} [*a{1}, *a{1}]\n"
    return start + "".join(line.format(n, n - 1) for n in range(1, 60)) + "model: {llm: *a59}\n"


YAML = {
    "aliases": (doubling(False), "more than 100,000 values, repeated ones included"),
    "merged": (doubling(True), "more than 100,000 values, repeated ones included"),
    "in itself": ("model: &m {llm: *m}\n", "contains itself"),
    "deep": ("model: " + "[" * 5000, f"nested more than {MAX_DEPTH} deep"),
    "integer": ("model: {n_layers: " + "9" * 5000 + "}", "an integer of 5,000 characters"),
    "sexagesimal": ("model: {n_layers: 1" + ":1" * 60 + "}", "an integer of 121 characters"),
    "date": ("model: {n_layers: 2001-99-99}", "month must be in 1..12"),
    "text": ("model: {n_layers: " + "x" * 200_000 + "}", "a value of 200,000 characters"),
    "size": ("#" * (MAX_YAML_BYTES + 1), "has more than 1,000,000 bytes"),
    "bytes": ("model: \0", "is not readable YAML"),
}


@pytest.mark.parametrize("name", YAML)
@pytest.mark.usefixtures("at_once")
def test_yaml(tmp_path, name):
    text, expected = YAML[name]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_model_section(tmp_path / "config.yaml")
    assert len(str(caught.value)) < 600


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["alias_bomb.yaml", "big_integer.yaml"])
def test_given_yaml(tmp_path, name):
    if not GIVEN.is_dir():
        pytest.skip("the given files are not here; the same kinds are above")
    (tmp_path / "config.yaml").write_bytes((GIVEN / name).read_bytes())
    with pytest.raises(CheckpointError, match="is not readable YAML"):
        read_model_section(tmp_path / "config.yaml")


def test_repeated_parts_are_still_read(tmp_path):
    content = {"model": {"first": [1, 2], "second": {"a": 1}}}
    content["model"]["again"] = content["model"]["first"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert "*" in (tmp_path / "config.yaml").read_text()
    assert read_model_section(tmp_path / "config.yaml") == content["model"]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"a": ' + "9" * 5000 + "}", '{"a"'])
def test_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is not readable JSON|holds \[\]"):
        read_json(tmp_path / "config.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.usefixtures("at_once")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "header",
    [
        {key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in "ab"},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": 5},
    ],
)
def test_headers_of_safetensors(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError, match="damaged header"):
        read_folder(tmp_path)


# Settings


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("llm.n_layers", 10**12, "llm.n_layers is 1000000000000; expected at most 10000"),
        ("llm.n_layers", 9_999, "llm.n_layers asks for 9999 layers, but there are"),
        ("llm.vocab_size", 10**15, "llm.vocab_size is 1000000000000000; expected at most"),
        ("llm.vocab_size", 900_000, "llm.vocab_size asks for 900000 tokens, but `wte.embedding` has 277 rows"),
        ("llm.layer_norm_eps", 1e30, "llm.layer_norm_eps is 1e+30; expected 0 or more, at most 1"),
        ("llm.rope_theta", float("inf"), "llm.rope_theta is inf; expected a number"),
        ("vision_backbone.vit.image_default_input_size", [14 * 10**9] * 2, "image_default_input_size is [140000"),
        ("mm_preprocessor.image.max_crops", 10**9, "max_crops is 1000000000; expected at most 10000"),
        ("mm_preprocessor.video.max_frames", 10**12, "max_frames is 1000000000000; expected at most"),
        ("model_name", ["video_olmo"], "model_name is ['video_olmo']; expected"),
        ("\x1b[31mname", "\x1b]0;title\x07", "'\\x1b[31mname' is unknown"),
    ],
)
def test_absurd_settings_are_named(tmp_path, name, value, expected):
    section = native_section()
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    changed = native_section({name: value})
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": changed}))
    tokenizer = str(write_base_tokenizer(tmp_path / "tokenizer"))
    started = time.process_time()
    with pytest.raises(UnsupportedError) as caught:
        plan_conversion(folder, ConversionOptions(tokenizer=tokenizer))
    assert expected in str(caught.value) or expected.replace("'", "") in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert time.process_time() - started < SECONDS


def test_unhashable_and_strange_values_name_their_field():
    for value in ({}, [], [[1]], 10**4000, "\ud800", b"x", {1: {2: 3}}):
        with pytest.raises(UnsupportedError, match=r"llm\.d_model"):
            parse_config(native_section({"llm.d_model": value}))


# Weights


def test_numbers_that_are_none_are_counted():
    values = np.array([1, np.nan, np.inf, -np.inf, 3e38], np.float32)
    assert count_non_finite(values.tobytes(), "float32") == 3
    assert count_non_finite(values.view(np.uint16)[1::2].tobytes(), "bfloat16") == 3
    assert count_non_finite(b"", "float32") == count_non_finite(b"", "bfloat16") == 0
    assert count_non_finite(np.float32([1, -2]).tobytes(), "float32") == 0


def test_weights_that_are_no_numbers_are_named(tmp_path, capsys):
    section = native_section()
    tensors = native_tensors(section)
    tensors["transformer.ln_f.weight"][3] = float("nan")
    tensors["transformer.blocks.1.ff_norm.weight"][:2] = torch.tensor([3.4e38, 1.0])  # infinite once rounded
    folder = write_unsharded(tmp_path / "native", section, tensors)
    tokenizer = str(write_base_tokenizer(tmp_path / "tokenizer"))
    arguments = [str(folder), str(tmp_path / "out"), "--tokenizer", tokenizer, "--quiet", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    message = capsys.readouterr().err
    assert "'model.transformer.ln_f.weight' holds 1 NaN or infinite value(s)" in message
    assert "'model.transformer.blocks.1.ff_norm.weight' holds 1 NaN" in message
    with pytest.warns(UserWarning, match="transformer.ln_f.weight"):
        convert_checkpoint(folder, tmp_path / "other", ConversionOptions(tokenizer=tokenizer))
    assert main([str(tmp_path / "out"), str(tmp_path / "native2"), "--to-native", "--quiet"]) == 0
    assert "'transformer.ln_f.weight' holds 1 NaN" in capsys.readouterr().err


# Messages


def test_messages_are_short_and_steer_no_terminal():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    doubled: tuple = ()
    for _ in range(200):
        doubled = (doubled, doubled)
    for value in (nested, doubled, 10**10_000, "x" * 10**6, list(range(10**6)), {"a": doubled}, b"x" * 10**6):
        assert len(shown(value)) < 200
    assert shown((1, "a")) == repr((1, "a"))
    assert printable("a\x1b[31m\u202e\ud800\nb") == "a\\x1b[31m\\u202e\\ud800\nb"
    assert str(ConversionError("\x07")) == "\\x07"
    secret = "hf_abcdefGHIJ https://me:pass@host/x?token=abc Authorization: Bearer xyz"
    assert printable(secret) == "hf_... https://...@host/x?token=... Authorization: Bearer ..."


# Other people's folders


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    section = native_section()
    write_unsharded(folder / "native", section, native_tensors(section))
    tokenizer = str(write_base_tokenizer(folder / "tokenizer"))
    return plan_conversion(folder / "native", ConversionOptions(tokenizer=tokenizer, max_shard_bytes=200_000))


@pytest.fixture
def precious(tmp_path):
    """Somebody's folder, which must stay as it is."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "file.txt").write_text("keep me")
    yield folder
    assert [path.read_text() for path in folder.iterdir()] == ["keep me"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", [".out.partial", ".out.replaced", ".out.lock"])
def test_planted_links_are_refused(tmp_path, plan, precious, name, overwrite):
    (tmp_path / name).symlink_to(precious / "file.txt" if name == ".out.lock" else precious)
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for resume in (True, False):
        with pytest.raises(OutputError, match=r"does not come from a conversion|is not a regular file"):
            write_plan(plan, tmp_path / "out", overwrite=overwrite, resume=resume)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_folders_without_our_mark_are_refused(tmp_path, plan, precious, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    precious.rename(tmp_path / name)
    with pytest.raises(OutputError, match=f"{name} does not come from a conversion.*Nothing was written"):
        write_plan(plan, tmp_path / "out", overwrite=True)
    (tmp_path / name).rename(precious)
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_a_link_to_a_filled_folder_is_not_replaced(tmp_path, plan, precious):
    (tmp_path / "out").symlink_to(precious)
    with pytest.raises(OutputError, match=r"is a link to .*name it as OUTPUT"):
        write_plan(plan, tmp_path / "out", overwrite=True)


def test_linked_shards_are_not_adopted(tmp_path, plan):
    write_plan(plan, tmp_path / "first")
    partial, shard = tmp_path / ".out.partial", plan.shards[0]
    partial.mkdir()
    content = (tmp_path / "first" / shard.file_name).read_bytes()
    segments = [[len(content), zlib.crc32(content)]]
    state = {"fingerprint": plan.fingerprint(), "shards": {shard.file_name: segments}}
    (partial / STATE_FILE).write_text(json.dumps(state))
    (partial / shard.file_name).symlink_to(tmp_path / "first" / shard.file_name)
    write_plan(plan, tmp_path / "out", resume=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_nothing_incomplete_is_moved_into_place(tmp_path, plan):
    """Another process takes a finished shard away."""

    def on_progress(_):
        for path in (tmp_path / ".out.partial").glob("*-00001-of-*"):
            if STATE_FILE in os.listdir(path.parent) and path.name in (path.parent / STATE_FILE).read_text():
                path.unlink()

    with pytest.raises(OutputError, match=r"were changed by another process: \['model-00001"):
        write_plan(plan, tmp_path / "out", on_progress=on_progress)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("step", [40, 76, 84, 92])
def test_killed_before_any_step(tmp_path, plan, step):
    """At each of its calls to the file system; in the last ones the old folder is exchanged."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    child = os.fork()
    if child == 0:
        left = step

        def count(event, _):
            nonlocal left
            left -= event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            write_plan(plan, tmp_path / "out", overwrite=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    old = [path for path in (tmp_path / "out" / "old", tmp_path / ".out.replaced" / "folder" / "old") if path.exists()]
    assert len(old) == 1 or (tmp_path / "out" / "config.json").exists()
    write_plan(plan, tmp_path / "out", overwrite=True, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(read_folder(tmp_path / "out")) == {rename.target for rename in plan.source.renames}


def replace(output, content, overwrite=True, meanwhile=lambda: None):
    """Put a folder with one file at `output`, as a conversion does."""
    staging = Staging(output, "", overwrite=overwrite)
    with staging.cleanup_on_error():
        staging.open()
        staging.write_text("model", content)
        meanwhile()
        staging.commit({"model": None})


def test_what_others_put_at_the_output_meanwhile_is_kept(tmp_path):
    output = tmp_path / "out"

    def interfere():
        output.mkdir()
        (output / "theirs").write_text("keep me")

    with pytest.raises(OutputError, match="out is not empty"):
        replace(output, "new", overwrite=False, meanwhile=interfere)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


@pytest.mark.parametrize("kill_at", ["folder", "out"])
@pytest.mark.parametrize("present", ["nothing", "empty", "theirs", "theirs of the same number", "file"])
def test_the_replaced_folder_survives_a_kill(tmp_path, monkeypatch, kill_at, present):
    """A kill before the second rename or after it; then there is something else at the output, or not."""
    output, old = tmp_path / "out", tmp_path / ".out.replaced" / "folder" / "model"
    replace(output, "old")
    renamed = Path.rename

    def kill(self, target):
        renamed(self, target)
        if target.name == kill_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(KeyboardInterrupt):
            replace(output, "new")
    assert old.read_text() == "old"
    if kill_at == "out" and present == "nothing":
        replace(output, "newer")  # the new one was in its place
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "model"]
        return
    if output.exists():
        output.rename(tmp_path / "moved")
    if present == "file":
        output.write_text("keep me")
    elif present != "nothing":
        output.mkdir()
    if present.startswith("theirs"):
        (output / "theirs").write_text("keep me")
    if present == "theirs of the same number":
        mark = old.parent.parent / STATE_FILE
        status = output.stat()
        mark.write_text(json.dumps({**json.loads(mark.read_text()), "new": [status.st_dev, status.st_ino]}))
    if present in ("nothing", "empty"):
        Staging(output, "", overwrite=True).open()
        assert (output / "model").read_text() == "old"
    else:
        with pytest.raises(OutputError, match=r"replaced/folder is what was at .*Move one of the two away"):
            replace(output, "newer")
        assert old.read_text() == "old"
        assert output.is_file() or (output / "theirs").read_text() == "keep me"


def test_a_folder_that_appears_between_the_renames_stays_beside_the_replaced_one(tmp_path, monkeypatch):
    output = tmp_path / "out"
    replace(output, "old")
    renamed = Path.rename

    def interfere(self, target):
        renamed(self, target)
        if target.name == "folder":
            output.mkdir()
            (output / "theirs").write_text("keep me")

    monkeypatch.setattr(Path, "rename", interfere)
    with pytest.raises(OutputError, match="replaced/folder is what was at"):
        replace(output, "new")
    assert (output / "theirs").read_text() == "keep me"
    assert (tmp_path / ".out.replaced" / "folder" / "model").read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_four_at_once(tmp_path, plan):
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            code = 9
            try:
                write_plan(plan, tmp_path / "out", resume=number % 2 == 0)
                code = 0
            except OutputError:
                code = 5
            finally:
                os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 5, 5, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(read_folder(tmp_path / "out")) == {rename.target for rename in plan.source.renames}


def test_other_systems_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(staging_module, "fcntl", None)
    assert main([str(tmp_path), str(tmp_path / "out")]) == 5
    assert capsys.readouterr().err.strip() == (
        "error: The converter needs a POSIX system (Linux, macOS, or WSL on Windows)."
    )


# The Hub


def test_deadlines():
    assert within_deadline(lambda: 5, 10, "late") == 5
    with pytest.raises(KeyError, match="inside"):
        within_deadline(lambda: {}["inside"], 10, "late")
    stop = threading.Event()
    with pytest.raises(DeadlineExceeded, match=r"late within 0\.05 seconds"):
        within_deadline(stop.wait, 0.05, "late")
    stop.set()


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        monkeypatch.setattr(hub_module, "files_to_publish", lambda folder: [])
        monkeypatch.setattr(hub_module, "ANSWER_SECONDS", 0.3)
        monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", False)
        endpoint = f"http://me:secret@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(hub_module, "HfApi", lambda token: _api(endpoint, token))
        with pytest.raises(HubError, match=r"The Hub did not answer within 0\.3 seconds") as caught:
            push_folder(tmp_path, "tester/model", token="hf_abcdefghijkl")
    assert "secret" not in str(caught.value)
    assert "hf_abc" not in str(caught.value)


def _api(endpoint: str, token: str):
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token=token)
