"""From a made-up checkpoint to a folder: what is written, when it appears, what survives an interruption."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import save
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import molmo2.convert.conversion
import molmo2.convert.writer
from molmo2.convert import ConversionOptions, OutputError, VerificationError, convert_checkpoint, plan_conversion
from molmo2.convert.cli import build_parser, main, parse_arguments, parse_size
from molmo2.convert.conversion import REMOTE_MODULES, ensure_remote_code, remote_code_files, write_plan
from molmo2.convert.model_card import SIGLIP_SIZES, base_models, card_header
from molmo2.convert.names import TABLE, expected_renames, match
from molmo2.convert.native_config import parse_config
from molmo2.convert.numerics import BlockConverter
from molmo2.convert.probe import probe_folder
from molmo2.convert.reader import Piece, SourceTensor
from molmo2.convert.staging import STATE_FILE, ensure_disjoint, ensure_replaceable
from molmo2.convert.verify import verify_folder
from support.native_checkpoints import (
    ShardLayout,
    native_section,
    native_shapes,
    native_tensors,
    write_base_tokenizer,
    write_config,
    write_sharded,
    write_unsharded,
)
from support.paths import REPOSITORY
from support.tensor_names import native_name, target_name

SEVERAL_SHARDS = 100_000  # bytes per shard, of about 600,000
LAYOUTS = {
    "unsharded": None,
    "one rank": ShardLayout(1, 1),
    "three ranks with optimizer": ShardLayout(3, 2, has_optimizer=True),
    # The norms of heads have 12 rows. Every rank costs a file to open for each of 170 tensors.
    "more ranks than rows": ShardLayout(13, 1, writer_module="torch.distributed.checkpoint.filesystem"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(write_base_tokenizer(tmp_path_factory.mktemp("tokenizer") / "base"))


@pytest.fixture(scope="module")
def section():
    return native_section()


@pytest.fixture(scope="module")
def tensors(section):
    return native_tensors(section)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, section, tensors):
    return write_sharded(tmp_path_factory.mktemp("run") / "step20", section, tensors, ShardLayout(3, 2))


@pytest.fixture(scope="module")
def converted(tmp_path_factory, checkpoint, tokenizer):
    """A float32 folder of several shards that tests may read."""
    output = tmp_path_factory.mktemp("converted") / "folder"
    convert_checkpoint(checkpoint, output, ConversionOptions(tokenizer=tokenizer, max_shard_bytes=SEVERAL_SHARDS))
    return output


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def contents_of_weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# What is read


def test_a_checkpoint_that_torch_wrote_itself(tmp_path, section, tensors, tokenizer, converted):
    """torch's writer notes the folder it writes to, as a path object."""
    write_config(tmp_path / "native", section)
    state = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save(state, checkpoint_id=tmp_path / "native" / "model_and_optim", no_dist=True)
    assert b"pathlib" in (tmp_path / "native" / "model_and_optim" / ".metadata").read_bytes()
    convert_checkpoint(tmp_path / "native", tmp_path / "out", several(tokenizer))
    assert contents_of_weights(tmp_path / "out") == contents_of_weights(converted)


def test_an_empty_piece_where_another_one_begins(tmp_path, section, tensors, tokenizer, converted):
    def add_empty_pieces(metadata):
        for entry in metadata.state_dict_metadata.values():
            for chunk in list(entry.chunks):
                entry.chunks.insert(0, replace(chunk, sizes=torch.Size((0, *chunk.sizes[1:]))))

    folder = write_sharded(tmp_path / "native", section, tensors, ShardLayout(3, 1, edit=add_empty_pieces))
    convert_checkpoint(folder, tmp_path / "out", several(tokenizer))
    assert contents_of_weights(tmp_path / "out") == contents_of_weights(converted)


def test_parameters_in_one_file(tmp_path, section, tensors, tokenizer, converted):
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    convert_checkpoint(write_unsharded(tmp_path / "native", section, parameters), tmp_path / "out", several(tokenizer))
    assert contents_of_weights(tmp_path / "out") == contents_of_weights(converted)


# What is written


# Equal dtypes: `test_there_and_back`.
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_gives_the_same_tensors(tmp_path, section, tensors, tokenizer, layout, stored, dtype):
    source = {name: tensor.to(getattr(torch, stored)) for name, tensor in tensors.items()}
    if LAYOUTS[layout] is None:
        folder = write_unsharded(tmp_path / "native", section, source)
    else:
        folder = write_sharded(tmp_path / "native", section, source, LAYOUTS[layout])
    convert_checkpoint(folder, tmp_path / "out", ConversionOptions(dtype=dtype, tokenizer=tokenizer))
    found = load_all(tmp_path / "out")
    assert {native_name(name) for name in found} == set(source)
    for name, tensor in source.items():
        assert torch.equal(found[target_name(name)], tensor.to(getattr(torch, dtype))), name


def test_tied_and_surplus_layers(tmp_path, tokenizer):
    section = native_section({"llm.weight_tying": True, "vision_backbone.skip_unused_layers": False})
    source = native_tensors(section)
    last = "vision_backbone.image_vit.transformer.resblocks.9.ffn_norm.weight"
    assert last in source
    convert_checkpoint(
        write_unsharded(tmp_path / "native", section, source), tmp_path / "out", ConversionOptions(tokenizer=tokenizer)
    )
    found = load_all(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], source["transformer.wte.embedding"])
    layers = {int(name.split(".")[5]) for name in found if "resblocks" in name}
    assert layers == set(range(8))  # -3 and -9 of 10 are layers 7 and 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vit_config"]["num_hidden_layers"] == 10


def test_shards_and_index(converted):
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in converted.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    for name in files:
        with safe_open(converted / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert sorted(file.keys()) == sorted(key for key, value in index["weight_map"].items() if value == name)
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 (no mapping)
        size = sum(4 * int(np.prod(shape)) for shape in shapes)
        assert size <= SEVERAL_SHARDS or len(shapes) == 1
    assert index["metadata"] == {"total_parameters": 150170, "total_size": 600680}


def test_the_folder_is_complete(converted):
    names = set(contents(converted))
    code = {path.name for path in remote_code_files()}
    assert code == {f"{name}.py" for name in REMOTE_MODULES} | {"chat_template.jinja", "LICENSE"}
    assert {name: (converted / name).read_bytes() for name in code} == {
        name: (REPOSITORY / name).read_bytes() for name in code
    }
    assert {"README.md", "LICENSE", "chat_template.jinja", "config.json", "generation_config.json"} <= names
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_model_card(converted):
    card = (converted / "README.md").read_text()
    for part in ("license: apache-2.0", "library_name: transformers", "/step20", "150,170", "float32"):
        assert part in card
    assert "3 layers of width 40, 4 heads over 2 key/value heads, qwen3 query/key norm" in card
    assert "zero_()" not in card
    assert str(converted.parent.parent) not in card
    header = yaml.safe_load(card.split("---\n")[1])
    published = ("license", "datasets", "language", "base_model", "pipeline_tag", "library_name", "tags")
    assert [name for name in published if name not in header] == ["base_model"]  # its tokenizer has no repository
    assert "add `base_model`" in card
    assert (header["pipeline_tag"], len(header["datasets"])) == ("video-text-to-text", 9)
    assert "@article{molmo2openweightsdata," in card
    _, with_package, pointing, with_remote_code = card.split("```python\n")
    assert "answer.grounding.points" in pointing
    for code in (with_package, pointing, with_remote_code):
        compile(code.split("```")[0], "README.md", "exec")
    assert "pip install molmo2-transformers" in card
    assert "trust_remote_code" not in with_package.split("```")[0]
    assert "trust_remote_code=True" in with_remote_code


@pytest.mark.parametrize(
    ("tokenizer", "sizes", "expected"),
    [
        (
            "Qwen/Qwen3-4B-Instruct-2507",
            SIGLIP_SIZES,
            ["google/siglip-so400m-patch14-384", "Qwen/Qwen3-4B-Instruct-2507"],
        ),
        ("/data/tokenizer", {**SIGLIP_SIZES, "image_num_layers": 12}, []),
        (None, SIGLIP_SIZES, ["google/siglip-so400m-patch14-384"]),
    ],
)
def test_base_models_of_the_card(section, tokenizer, sizes, expected):
    """The first row is what the published card of Molmo2-4B says."""
    config = parse_config(section)
    known = replace(config, tokenizer=tokenizer, vit={**config.vit, **sizes})
    assert base_models(known) == expected
    header = yaml.safe_load(card_header(base_models(known), ("a/b",)))
    assert header.get("base_model", []) == expected
    assert header["datasets"] == ["a/b"]


def test_code_that_was_changed_is_no_verified_folder(converted, tmp_path):
    """Hashes are printed after a conversion, and `--verify` compares what lies in the folder."""
    assert ensure_remote_code(converted) == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in remote_code_files()
    }
    for path in remote_code_files():
        shutil.copy(converted / path.name, tmp_path)
    (tmp_path / "modeling_molmo2.py").write_text("# edited", encoding="utf-8")
    (tmp_path / "LICENSE").unlink()
    with pytest.raises(
        VerificationError, match=r"'modeling_molmo2.py' has SHA-256 .* this installation ships"
    ) as error:
        ensure_remote_code(tmp_path)
    assert "'LICENSE' is missing" in str(error.value)
    assert "configuration_molmo2" not in str(error.value)


def test_an_installed_converter_brings_the_remote_code_along(tmp_path, monkeypatch):
    """What the wheel includes is what is looked for; a missing file is named."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    installed = tmp_path / "molmo2" / "convert" / "remote_code"
    installed.mkdir(parents=True)
    for source, target in included.items():
        shutil.copy(REPOSITORY / source, tmp_path / target)
    names = [path.name for path in remote_code_files()]
    monkeypatch.setattr(molmo2.convert.conversion, "__file__", str(installed.parent / "conversion.py"))
    assert remote_code_files() == [installed / name for name in names]
    assert sorted(included) == sorted(names)
    (installed / "modeling_molmo2.py").unlink()
    with pytest.raises(OutputError, match=r"remote_code lacks \['modeling_molmo2.py'\]"):
        remote_code_files()


def test_nothing_private_travels(converted):
    native = (converted / "native_config.yaml").read_text()
    assert "/nowhere" not in native
    assert "message_format: qwen3" in native


def test_card_of_a_causal_model_says_how_to_use_it(tmp_path, tokenizer):
    section = native_section({"bi_directional_attn": None})
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    convert_checkpoint(folder, tmp_path / "out", ConversionOptions(tokenizer=tokenizer, dtype="bfloat16"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'inputs["token_type_ids"].zero_()' in card
    assert "molmo2-transformers" not in card  # `ask` would let its images attend in both directions
    assert "> bi_directional_attn is null" in card
    assert "rounded to the nearest bfloat16" in card


def test_everything_loads(converted):
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=True).eval()
    image = Image.fromarray(np.arange(60 * 90 * 3, dtype=np.uint8).reshape(60, 90, 3))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert int(inputs["input_ids"][0, 0]) == processor.tokenizer.eos_token_id  # the base has no bos


def test_options_reach_the_files(tmp_path, checkpoint, tokenizer):
    arguments = [str(checkpoint), str(tmp_path / "out"), "--tokenizer", tokenizer, "--dtype", "bfloat16", "--quiet"]
    assert main([*arguments, "--max-model-len", "777", "--attn-implementation", "eager"]) == 0
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.text_config.max_position_embeddings == 777
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {raw[part]["attn_implementation"] for part in ("text_config", "vit_config", "adapter_config")} == {"eager"}
    assert raw["dtype"] == "bfloat16"


def test_offloading_and_device_map(converted, tmp_path):
    """`max_memory` too small for the model: the rest goes to the disk, and the logits stay the same."""
    ids = torch.tensor([[3, 30, 200, 61]])
    options = {"trust_remote_code": True, "dtype": torch.float32}
    with torch.inference_mode():
        expected = AutoModelForImageTextToText.from_pretrained(converted, **options).eval()(input_ids=ids).logits
        model = AutoModelForImageTextToText.from_pretrained(
            converted, device_map="auto", max_memory={"cpu": "250KB"}, offload_folder=tmp_path / "offload", **options
        ).eval()
        assert {"disk"} <= {str(place) for place in model.hf_device_map.values()}
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


LOADING = """
import re, sys, threading, time
import torch
from transformers import AutoModelForImageTextToText
def private():  # bytes; pages of mapped files do not count
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private())
        time.sleep(0.002)
small, large = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(small, trust_remote_code=True)  # everything is imported by now
done, peak, before = threading.Event(), [0], private()
watcher = threading.Thread(target=watch)
watcher.start()
options = {"dtype": torch.float32, "device_map": "auto"}
model = AutoModelForImageTextToText.from_pretrained(large, trust_remote_code=True, **options)
done.set()
watcher.join()
print((peak[0] - before) / sum(tensor.nbytes for tensor in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted on Linux only")
def test_loading_holds_no_second_copy(tmp_path, converted, tokenizer):
    section = native_section({"llm.d_model": 1024, "llm.n_layers": 8, "llm.mlp_hidden_size": 6144})
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    options = ConversionOptions(tokenizer=tokenizer, max_shard_bytes=60_000_000)
    plan = convert_checkpoint(folder, tmp_path / "large", options)
    assert len(plan.shards) > 3
    command = [sys.executable, "-c", LOADING, str(converted), str(tmp_path / "large")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout.splitlines()[-1]) < 1.3  # of the weights


# Names


def test_the_table_reads_both_ways():
    rows = [row for row in TABLE if row.when != "tied"]
    assert len({row.native for row in rows}) == len({row.target for row in rows}) == len(rows)
    for row in rows:
        assert target_name(row.native.format(3)) == row.target.format(3)
        assert native_name(row.target.format(3)) == row.native.format(3)
    assert target_name("transformer.blocks.12.att_proj.bias") == "model.transformer.blocks.12.self_attn.att_proj.bias"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"llm.weight_tying": True},
        {"llm.qkv_bias": True, "llm.attention_layer_norm": False},
        {"llm.attention_layer_norm_type": "olmo", "llm.embedding_size": None},
        {"vision_backbone.skip_unused_layers": False, "vision_backbone.vit_layers": [4, -8]},
        {"vision_backbone.vit.image_num_key_value_heads": 1, "vision_backbone.vit.image_patch_size": 7},
    ],
)
def test_every_tensor_is_used_once(changes):
    section = native_section(changes)
    config, shapes = parse_config(section), native_shapes(section)
    renames = match(shapes, config)
    assert renames == expected_renames(config)
    assert len({rename.target for rename in renames}) == len(renames)
    unused = set(shapes) - {rename.native for rename in renames}
    deepest = max(layer % 10 for layer in section["vision_backbone"]["vit_layers"])
    assert all(int(name.split(".")[4]) > deepest for name in unused)
    assert bool(unused) is not section["vision_backbone"]["skip_unused_layers"]


# Numbers


def source_of(path: Path, content: bytes, dtype: str, num_items: int) -> SourceTensor:
    path.write_bytes(b"head" + content)
    return SourceTensor("x", (num_items,), dtype, (Piece(path, 4, len(content), None),))


def streamed(source: SourceTensor, dtype: str) -> bytes:
    return b"".join(bytes(block) for block in BlockConverter(dtype).stream(source))


def test_rounding_equals_torch_for_every_kind_of_number(tmp_path):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 700_001, dtype=np.uint32)  # more than one block
    special = [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x3F807FFF, 1]
    bits[: len(special)] = special
    bits = bits[~np.isnan(bits.view(np.float32))]
    source = source_of(tmp_path / "x", bits.tobytes(), "float32", bits.size)
    expected = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy()
    assert streamed(source, "bfloat16") == expected.tobytes()
    assert streamed(source, "float32") == bits.tobytes()


@pytest.mark.parametrize("pattern", [0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7FFF8000, 0xFF80FFFF])
def test_nan_stays_nan(tmp_path, pattern):
    source = source_of(tmp_path / "x", struct.pack("<3I", 0x3F800000, pattern, 0x40000000), "float32", 3)
    values = torch.frombuffer(bytearray(streamed(source, "bfloat16")), dtype=torch.bfloat16)
    assert values[[0, 2]].tolist() == [1.0, 2.0]
    assert values[1].isnan()


def test_widening_is_exact(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16)
    source = source_of(tmp_path / "x", bits.tobytes(), "bfloat16", bits.size)
    wide = np.frombuffer(streamed(source, "float32"), np.uint32)
    assert np.array_equal(wide, bits.astype(np.uint32) << 16)


# Verification


def test_verify_names_what_differs(tmp_path, converted, checkpoint, tokenizer):
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    source = plan_conversion(checkpoint, ConversionOptions(tokenizer=tokenizer)).source
    result = verify_folder(source, folder)
    assert (result.num_tensors, result.num_bytes, result.dtype) == (170, 600680, "float32")
    path = folder / "model-00002-of-00009.safetensors"
    path = path if path.exists() else sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    with pytest.raises(VerificationError, match="has SHA-256") as caught:
        verify_folder(source, folder)
    message = str(caught.value)
    assert message.count("  - ") == 1
    assert any(f"'{name}'" in message for name in names)


def test_verify_on_the_command_line(tmp_path, converted, checkpoint, tokenizer, section, capsys):
    assert main([str(checkpoint), str(converted), "--verify"]) == 0
    assert "exists and is left as it is" in capsys.readouterr().out
    other = write_unsharded(tmp_path / "other", section, native_tensors(section, seed=1))
    assert main([str(other), str(converted), "--verify"]) == 6
    assert "differs from other" in capsys.readouterr().err
    larger = native_section({"llm.n_layers": 4})
    other = write_unsharded(tmp_path / "larger", larger, native_tensors(larger))
    assert main([str(other), str(converted), "--verify"]) == 6
    assert "'model.transformer.blocks.3.ff_norm.weight' is missing" in capsys.readouterr().err


def test_verify_on_the_command_line_reads_the_code_too(tmp_path, converted, checkpoint, capsys):
    folder = tmp_path / "edited"
    shutil.copytree(converted, folder)
    with (folder / "processing_molmo2.py").open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    assert main([str(checkpoint), str(folder), "--verify"]) == 6
    found = capsys.readouterr()
    assert "170 tensors" in found.out  # they are as they were
    assert re.search(r"'processing_molmo2\.py' has SHA-256 [0-9a-f]+", found.err)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {}),
        (["--create-pr"], {"create_pr": True}),
        (["--private"], {"private": True}),
        (["--revision", "refs/pr/3"], {"revision": "refs/pr/3"}),
    ],
    ids=["plain", "pull request", "private", "revision"],
)
def test_options_of_an_upload_reach_it(tmp_path, converted, checkpoint, monkeypatch, capsys, options, expected):
    calls = []

    def push_folder(folder, repo_id, *, log, warn, **given):
        calls.append((str(folder), repo_id, given))
        return "https://hub/pr/1"

    monkeypatch.setattr("molmo2.convert.hub.push_folder", push_folder)
    assert main([str(checkpoint), str(converted), "--push-to-hub", "owner/name", *options]) == 0
    given = {"private": False, "revision": None, "create_pr": False, **expected}
    assert calls == [(str(converted), "owner/name", given)]
    assert "Uploaded: https://hub/pr/1" in capsys.readouterr().out


def test_probe_finds_exchanged_tensors(tmp_path, converted, checkpoint, tokenizer):
    source = plan_conversion(checkpoint, ConversionOptions(tokenizer=tokenizer)).source
    assert probe_folder(source, converted) <= 1e-6
    folder = tmp_path / "exchanged"
    convert_checkpoint(checkpoint, folder, ConversionOptions(tokenizer=tokenizer))
    path = folder / "model.safetensors"
    first, second = (f"model.vision_backbone.image_projector.{name}.weight".encode() for name in ("w1", "w3"))
    content = path.read_bytes()
    path.write_bytes(content.replace(first, first.upper()).replace(second, first).replace(first.upper(), second))
    with pytest.raises(VerificationError, match=r"Logits of .* differ from those of the native tensors by"):
        probe_folder(source, folder)


def test_probe_trusts_the_code_that_was_just_written(converted, checkpoint, tokenizer, monkeypatch):
    """Releases that are not told so ask a question on the terminal."""
    trusted = []
    for loader in (AutoTokenizer, AutoModelForImageTextToText):
        load = loader.from_pretrained

        def recorded(*args, load=load, **options):
            trusted.append(options.get("trust_remote_code"))
            return load(*args, **options)

        monkeypatch.setattr(loader, "from_pretrained", recorded)
    probe_folder(plan_conversion(checkpoint, ConversionOptions(tokenizer=tokenizer)).source, converted)
    assert trusted == [True, True]


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({"tokenizer_config.json": "{", "tokenizer.json": "{"}, r"out does not load with transformers: \w+: "),
        (
            {"configuration_molmo2.py": "raise KeyError('here')"},
            r"out does not load with transformers: KeyError: 'here'",
        ),
    ],
    ids=["tokenizer", "code"],
)
def test_probe_of_a_folder_that_does_not_load(tmp_path, converted, checkpoint, tokenizer, capsys, broken, expected):
    folder = tmp_path / "out"
    shutil.copytree(converted, folder)
    for name, text in broken.items():
        (folder / name).write_text(text)
    assert main([str(checkpoint), str(folder), "--tokenizer", tokenizer, "--probe", "--quiet"]) == 6
    assert re.search(expected, capsys.readouterr().err)


def test_a_model_too_short_for_the_probe(tmp_path, checkpoint, tokenizer, capsys):
    options = ["--tokenizer", tokenizer, "--max-model-len", "40", "--probe", "--quiet"]
    assert main([str(checkpoint), str(tmp_path / "out"), *options]) == 6
    assert re.search(r"was not probed: the probe's prompt has \d+ tokens, .* is set to 40", capsys.readouterr().err)
    assert (tmp_path / "out" / "config.json").is_file()


# When it appears


def test_output_with_content_is_refused(tmp_path, checkpoint, tokenizer, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("keep me")
    arguments = [str(checkpoint), str(output), "--tokenizer", tokenizer, "--quiet"]
    assert main(arguments) == 5
    assert "is not empty. Choose another folder, or replace it with --overwrite" in capsys.readouterr().err
    assert contents(output) == {"precious.txt": b"keep me"}
    assert main([*arguments, "--overwrite"]) == 0
    assert "precious.txt" not in contents(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_that_is_a_file(tmp_path, checkpoint, tokenizer, capsys):
    (tmp_path / "out").write_text("a file")
    assert main([str(checkpoint), str(tmp_path / "out"), "--tokenizer", tokenizer, "--quiet", "--overwrite"]) == 5
    assert "is a file; expected a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file"


def test_an_empty_output_is_filled(tmp_path, checkpoint, tokenizer):
    (tmp_path / "out").mkdir()
    convert_checkpoint(checkpoint, tmp_path / "out", ConversionOptions(tokenizer=tokenizer))
    assert (tmp_path / "out" / "config.json").is_file()


def test_refused_overwrite_keeps_the_old_folder(tmp_path, tokenizer):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("keep me")
    broken = write_sharded(tmp_path / "native", native_section(), native_tensors(native_section()))
    (broken / "model_and_optim" / "__0_0.distcp").unlink()
    assert main([str(broken), str(output), "--tokenizer", tokenizer, "--quiet", "--overwrite"]) == 3
    assert contents(output) == {"precious.txt": b"keep me"}


# How OUTPUT may lead to what is read, all in one folder: its path in there, and further options.
OVER_ITS_SOURCE = {
    "the checkpoint": ("runs/step20",),
    "its save folder": ("runs",),
    "under another name": ("alias",),
    "the weights alone": ("runs/step20/model_and_optim",),
    "weights behind a link": ("elsewhere",),
    "the tokenizer": ("base", "--tokenizer", "base/tokenizer"),
    "dry run": ("base", "--tokenizer", "base/tokenizer", "--dry-run"),
}


def all_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", OVER_ITS_SOURCE)
def test_overwrite_spares_what_is_read(tmp_path, checkpoint, tokenizer, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "runs/step20")
    shutil.copytree(tokenizer, "base/tokenizer")
    Path("alias").symlink_to("runs", target_is_directory=True)
    Path("elsewhere").mkdir()
    if case == "weights behind a link":
        shutil.move("runs/step20/model_and_optim", "elsewhere/weights")
        Path("runs/step20/model_and_optim").symlink_to(tmp_path / "elsewhere" / "weights", target_is_directory=True)
    before = all_files(tmp_path)
    output, *options = OVER_ITS_SOURCE[case]
    arguments = ["runs/step20", output, "--tokenizer", tokenizer, "--overwrite", "--quiet", *options]
    assert main(arguments) == 5
    assert re.search(r"Replacing .* would delete .*, which this conversion reads\. Choose", capsys.readouterr().err)
    assert all_files(tmp_path) == before


def test_overwrite_spares_what_is_read_from_python(tmp_path, checkpoint, tokenizer):
    run = Path(shutil.copytree(checkpoint, tmp_path / "runs" / "step20")).parent
    before = all_files(tmp_path)
    options = ConversionOptions(tokenizer=tokenizer)
    for output in (run, run / "step20"):
        with pytest.raises(OutputError, match="would delete"):
            convert_checkpoint(run, output, options, overwrite=True)
    with pytest.raises(OutputError, match="would delete"):
        write_plan(plan_conversion(run, options), run, overwrite=True)
    assert all_files(tmp_path) == before


@pytest.mark.parametrize("left", [".out.partial", ".out.replaced"])
def test_what_an_earlier_attempt_left_is_not_cleared_if_it_is_read(tmp_path, checkpoint, tokenizer, left):
    source = Path(shutil.copytree(checkpoint, tmp_path / left / "step20"))
    before = all_files(tmp_path)
    with pytest.raises(OutputError, match="would delete"):
        convert_checkpoint(source, tmp_path / "out", ConversionOptions(tokenizer=tokenizer))
    assert all_files(tmp_path) == before


def test_an_output_inside_the_checkpoint(tmp_path, checkpoint, tokenizer):
    source = Path(shutil.copytree(checkpoint, tmp_path / "step20"))
    before = all_files(source)
    for _ in range(2):
        convert_checkpoint(source, source / "hf", ConversionOptions(tokenizer=tokenizer), overwrite=True)
        assert (source / "hf" / "config.json").is_file()
        assert before.items() <= all_files(source).items()


def test_overwrite_on_the_way_back_spares_what_is_read(tmp_path, converted, checkpoint, capsys):
    folder = Path(shutil.copytree(converted, tmp_path / "runs" / "hf"))
    settings = tmp_path / "settings"
    settings.mkdir()
    shutil.copy(checkpoint / "config.yaml", settings)
    before = all_files(tmp_path)
    options = ["--to-native", "--overwrite", "--quiet", "--native-config", str(settings / "config.yaml")]
    for output in (folder, folder.parent, settings):
        assert main([str(folder), str(output), *options]) == 5
        assert "would delete" in capsys.readouterr().err
        assert all_files(tmp_path) == before


def test_dry_run_writes_nothing(tmp_path, checkpoint, tokenizer, capsys):
    assert main([str(checkpoint), str(tmp_path / "out"), "--tokenizer", tokenizer, "--dry-run"]) == 0
    output = capsys.readouterr().out
    for line in ("step              20", "parameters        150,170 in 170 tensors", "peak memory       about 0."):
        assert line in output
    assert list(tmp_path.iterdir()) == []


def several(tokenizer: str) -> ConversionOptions:
    return ConversionOptions(tokenizer=tokenizer, max_shard_bytes=SEVERAL_SHARDS)


class Interruption:
    """Raises once this number of bytes was reported."""

    def __init__(self, after: int, error: BaseException):
        self.left, self.error, self.reported = after, error, []

    def __call__(self, num_bytes: int) -> None:
        self.reported.append(num_bytes)
        self.left -= num_bytes
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_then_resumed(tmp_path, checkpoint, tokenizer, converted, error):
    output = tmp_path / "out"
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    with pytest.raises(expected):
        convert_checkpoint(checkpoint, output, several(tokenizer), on_progress=Interruption(350_000, error))
    assert not output.exists()
    partial = tmp_path / ".out.partial"
    finished = json.loads((partial / STATE_FILE).read_text())["shards"]
    assert finished
    times = {name: (partial / name).stat().st_mtime_ns for name in finished}
    convert_checkpoint(checkpoint, output, several(tokenizer), resume=True)
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == times
    assert contents(output) == contents(converted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_says_what_is_left(tmp_path, checkpoint, tokenizer):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match=r"No space left on device.*Nothing is left behind") as caught:
        convert_checkpoint(checkpoint, tmp_path / "out", several(tokenizer), on_progress=Interruption(0, full))
    assert "Nothing was changed at" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match=r"finished file\(s\) wait in .*\.out\.partial: continue with --resume"):
        convert_checkpoint(checkpoint, tmp_path / "out", several(tokenizer), on_progress=Interruption(350_000, full))


def test_a_disk_that_is_really_full(tmp_path, checkpoint, tokenizer, monkeypatch, capsys):
    """A write that takes part of a block and then refuses, as a disk does while it fills up."""
    space, write = 300_000, os.pwrite

    def limited(descriptor, block, position):
        nonlocal space
        if space <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        number = write(descriptor, block[: min(len(block), 1000, space)], position)
        space -= number
        return number

    monkeypatch.setattr(molmo2.convert.writer.os, "pwrite", limited)
    arguments = [str(checkpoint), str(tmp_path / "out"), "--tokenizer", tokenizer, "--quiet"]
    assert main(arguments) == 5
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    space = 10_000_000
    assert main([*arguments, "--verify"]) == 0


def test_too_little_space_is_seen_before(tmp_path, checkpoint, tokenizer, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"has 0\.00 GB free, but 0\.00 GB are needed\. Free some space"):
        convert_checkpoint(checkpoint, tmp_path / "out", ConversionOptions(tokenizer=tokenizer))
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_place(tmp_path, checkpoint, tokenizer, converted, capsys):
    """The second one is refused while the first one writes, and leaves its files alone."""
    arguments = [str(checkpoint), str(tmp_path / "out"), "--tokenizer", tokenizer, "--quiet"]
    codes = []

    def second(_):
        if not codes:
            codes.append(main([*arguments, "--resume"]))

    convert_checkpoint(checkpoint, tmp_path / "out", several(tokenizer), on_progress=second)
    assert codes == [5]
    message = capsys.readouterr().err
    assert re.search(r"Another conversion is writing into .*\.out\.partial: wait for it", message)
    assert message.endswith("Nothing was written.\n")
    assert contents(tmp_path / "out") == contents(converted)


def test_a_failure_at_the_very_end_can_be_resumed(tmp_path, checkpoint, tokenizer, converted, monkeypatch):
    """What was to be replaced is still there."""
    rename = Path.rename

    def refuse(path, target):
        if path.name == ".out.partial":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rename(path, target)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match=r"Device or resource busy.*finished file\(s\) wait in"):
        convert_checkpoint(checkpoint, tmp_path / "out", several(tokenizer), overwrite=True)
    monkeypatch.setattr(Path, "rename", rename)
    assert contents(tmp_path / "out") == {"old.txt": b"old"}
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert len(times) > 1
    convert_checkpoint(checkpoint, tmp_path / "out", several(tokenizer), resume=True, overwrite=True)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times
    assert contents(tmp_path / "out") == contents(converted)


def test_resumed_under_another_spelling_of_the_path(tmp_path, checkpoint, tokenizer, monkeypatch):
    interruption = Interruption(350_000, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path / "out", several(tokenizer), on_progress=interruption)
    finished = json.loads((tmp_path / ".out.partial" / STATE_FILE).read_text())["shards"]
    times = {name: (tmp_path / ".out.partial" / name).stat().st_mtime_ns for name in finished}
    monkeypatch.chdir(checkpoint.parent)
    convert_checkpoint(checkpoint.name, tmp_path / "out", several(tokenizer), resume=True)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == times


def test_a_mounted_disk_is_no_output(tmp_path, checkpoint, tokenizer, monkeypatch, capsys):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    assert main([str(checkpoint), str(tmp_path / "disk"), "--tokenizer", tokenizer, "--quiet"]) == 5
    assert "is the root of a mounted disk, which cannot be exchanged. Choose a folder in it" in capsys.readouterr().err
    assert main([str(checkpoint), str(tmp_path / "disk" / "out"), "--tokenizer", tokenizer, "--quiet"]) == 0


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs the right to mount")
def test_on_a_tiny_file_system(tmp_path, checkpoint, tokenizer, capsys):
    mount = tmp_path / "tiny"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        assert main([str(checkpoint), str(mount / "out"), "--tokenizer", tokenizer, "--quiet"]) == 5
        assert "are needed. Free some space" in capsys.readouterr().err
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", mount], check=True)


def test_resume_distrusts_changed_shards(tmp_path, checkpoint, tokenizer, converted):
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(
            checkpoint, tmp_path / "out", several(tokenizer), on_progress=Interruption(350_000, KeyboardInterrupt())
        )
    partial = tmp_path / ".out.partial"
    name = sorted(json.loads((partial / STATE_FILE).read_text())["shards"])[0]
    content = bytearray((partial / name).read_bytes())
    content[len(content) // 2] ^= 1
    (partial / name).write_bytes(content)
    convert_checkpoint(checkpoint, tmp_path / "out", several(tokenizer), resume=True)
    assert contents(tmp_path / "out") == contents(converted)


@pytest.mark.parametrize("resume", [True, False])
def test_shards_of_another_conversion_are_not_taken_over(tmp_path, checkpoint, tokenizer, resume):
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(
            checkpoint, tmp_path / "out", several(tokenizer), on_progress=Interruption(350_000, KeyboardInterrupt())
        )
    options = ConversionOptions(tokenizer=tokenizer, max_shard_bytes=SEVERAL_SHARDS, dtype="bfloat16")
    plan = convert_checkpoint(checkpoint, tmp_path / "out", options, resume=resume)
    verify_folder(plan.source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {s.file_name for s in plan.shards}


KILLED = """
import sys, time
from molmo2.convert import ConversionOptions, convert_checkpoint
def on_progress(number, total=[0]):
    total[0] += number
    if total[0] > 350_000:
        print("now", flush=True)
        time.sleep(60)
convert_checkpoint(sys.argv[1], sys.argv[2], ConversionOptions(tokenizer=sys.argv[3], max_shard_bytes=100_000),
                   on_progress=on_progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_killed_then_resumed(tmp_path, checkpoint, tokenizer, converted):
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(output), tokenizer]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock", ".out.partial"}
    finished = set(json.loads((tmp_path / ".out.partial" / STATE_FILE).read_text())["shards"])
    before = time.time_ns()
    arguments = [str(checkpoint), str(output), "--tokenizer", tokenizer, "--max-shard-size", "100KB", "--quiet"]
    assert main([*arguments, "--resume", "--verify"]) == 0
    kept = {path.name for path in output.glob("*.safetensors") if path.stat().st_mtime_ns < before}
    assert kept == finished
    assert finished
    assert contents(output) == contents(converted)


def test_killed_between_the_two_renames_of_a_replacement(tmp_path, checkpoint, tokenizer):
    """The old folder waits under another name; the next run puts it back first."""
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "precious.txt").write_text("keep me")
    with pytest.raises(OutputError, match="is not empty"):
        write_plan(plan_conversion(checkpoint, ConversionOptions(tokenizer=tokenizer)), tmp_path / "out")
    assert contents(tmp_path / "out") == {"precious.txt": b"keep me"}


# The way back


def same_tensors(native: Path, expected: dict[str, torch.Tensor]) -> None:
    found = torch.load(native / "model.pt", weights_only=True, mmap=True)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


ROUND_TRIPS = {
    "untied": {},
    "tied": {"llm.weight_tying": True},
    "olmo": {
        "llm.attention_layer_norm_type": "olmo",
        "llm.norm_after": True,
        "llm.rope_type": "yarn",
        "llm.rope_factor": 8.0,
        "llm.full_attention_layers": [2],
        "llm.sliding_attention_rope_scaling": True,
    },
    "qwen2": {"llm.qkv_bias": True, "llm.attention_layer_norm": False, "bi_directional_attn": None},
    "filled to the embedding": {"llm.vocab_size": 270, "llm.fix_pad_tokenizer": True},
}


@pytest.mark.parametrize(("case", "dtype"), [*((case, "float32") for case in ROUND_TRIPS), ("untied", "bfloat16")])
def test_there_and_back(tmp_path, tokenizer, case, dtype):
    section = native_section(ROUND_TRIPS[case])
    source = native_tensors(section, dtype=getattr(torch, dtype))
    folder = write_sharded(tmp_path / "native", section, source)
    options = ["--tokenizer", tokenizer, "--max-shard-size", "200KB", "--quiet"]
    assert main([str(folder), str(tmp_path / "hf"), "--dtype", dtype, *options]) == 0
    assert main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to-native", "--quiet"]) == 0
    same_tensors(tmp_path / "back", source)
    assert main([str(tmp_path / "back"), str(tmp_path / "again"), "--dtype", dtype, *options]) == 0
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert load_all(tmp_path / "again").keys() == load_all(tmp_path / "hf").keys()


def test_there_and_back_with_a_field_of_ones_own(tmp_path, tokenizer):
    section = native_section()
    section["llm"]["new_switch"] = True
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    options = ["--tokenizer", tokenizer, "--ignore-field", "llm.new_switch", "--quiet"]
    assert main([str(folder), str(tmp_path / "hf"), *options]) == 0
    assert main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to-native", *options]) == 0
    assert yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())["model"]["llm"]["new_switch"] is True


def test_back_in_another_dtype(tmp_path, section, tensors, tokenizer, checkpoint):
    convert_checkpoint(checkpoint, tmp_path / "hf", ConversionOptions(tokenizer=tokenizer))
    arguments = [str(tmp_path / "hf"), str(tmp_path / "back"), "--to-native", "--quiet", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    same_tensors(tmp_path / "back", {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_a_tied_model_that_was_tuned_comes_back_untied(tmp_path, tokenizer):
    section = native_section({"llm.weight_tying": True})
    source = native_tensors(section)
    folder = write_unsharded(tmp_path / "native", section, source)
    convert_checkpoint(folder, tmp_path / "hf", ConversionOptions(tokenizer=tokenizer))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    with torch.no_grad():
        model.lm_head.weight[5] += 1
    model.save_pretrained(tmp_path / "tuned")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    processor.save_pretrained(tmp_path / "tuned")
    config = str(folder / "config.yaml")
    arguments = [str(tmp_path / "tuned"), str(tmp_path / "back"), "--to-native", "--quiet", "--native-config", config]
    assert main(arguments) == 0
    head = source["transformer.wte.embedding"].clone()
    head[5] += 1
    same_tensors(tmp_path / "back", {**source, "transformer.ff_out.weight": head})
    assert main([str(tmp_path / "back"), str(tmp_path / "again"), "--tokenizer", tokenizer, "--quiet", "--probe"]) == 0


@pytest.mark.skipif("molmo2" not in CONFIG_MAPPING, reason="this release has no native Molmo2")
@pytest.mark.parametrize("case", ["untied", "tied", "olmo"])
def test_back_from_a_folder_that_the_librarys_own_class_saved(tmp_path, tokenizer, case):
    """Its names of settings, its single processor file, its embedding cut into halves."""
    section = native_section(ROUND_TRIPS[case])
    source = native_tensors(section)
    convert_checkpoint(
        write_unsharded(tmp_path / "native", section, source), tmp_path / "hf", ConversionOptions(tokenizer=tokenizer)
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    assert type(model).__module__.startswith("transformers.models.")
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    processors = json.loads((tmp_path / "hf" / "processor_config.json").read_text())
    for part in ("image_processor", "video_processor"):
        name = {"image_processor": "preprocessor_config", "video_processor": "video_preprocessor_config"}[part]
        processors[part] = json.loads((tmp_path / "hf" / f"{name}.json").read_text())
    (tmp_path / "saved" / "processor_config.json").write_text(json.dumps(processors))
    if case == "tied":  # what the trainer's settings alone say
        shutil.copy(tmp_path / "hf" / "native_config.yaml", tmp_path / "saved")
    assert main([str(tmp_path / "saved"), str(tmp_path / "back"), "--to-native", "--quiet"]) == 0
    same_tensors(tmp_path / "back", source)
    assert main([str(tmp_path / "back"), str(tmp_path / "again"), "--tokenizer", tokenizer, "--quiet"]) == 0
    first, second = (load_all(tmp_path / name) for name in ("hf", "again"))
    assert first.keys() == second.keys()


@pytest.mark.parametrize("changes", [{}, {"vision_backbone.image_feature_dropout": 0.1}], ids=["plain", "dropout"])
def test_without_native_settings_the_defaults_are_used(tmp_path, tensors, tokenizer, changes):
    checkpoint = write_unsharded(tmp_path / "native", native_section(changes), tensors)
    convert_checkpoint(checkpoint, tmp_path / "hf", ConversionOptions(tokenizer=tokenizer))
    (tmp_path / "hf" / "native_config.yaml").unlink()
    arguments = [str(tmp_path / "hf"), str(tmp_path / "back"), "--to-native", "--tokenizer", tokenizer, "--quiet"]
    assert main(arguments) == 0
    same_tensors(tmp_path / "back", tensors)
    assert main([str(tmp_path / "back"), str(tmp_path / "again"), "--quiet", "--verify"]) == 0
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again"))
    assert first == second


def test_settings_that_no_native_file_can_say(tmp_path, converted, capsys):
    folder = tmp_path / "hf"
    shutil.copytree(converted, folder)
    config = json.loads((folder / "config.json").read_text())
    config["adapter_config"]["num_key_value_heads"] = 1
    config["text_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    assert main([str(folder), str(tmp_path / "back"), "--to-native", "--quiet"]) == 4
    message = capsys.readouterr().err
    assert "config.json: text_config.hidden_act is 'gelu'; natively it would be 'silu'" in message
    assert "config.json: adapter_config.num_key_value_heads is 1; natively it would be 3" in message
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("value", [[3], [], 3, None, {"height": 3}, "33"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_wrong_sizes_on_the_way_back(tmp_path, converted, capsys, name, value):
    shutil.copytree(converted, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / name).read_text())
    (tmp_path / "hf" / name).write_text(json.dumps({**settings, "pooling_size": value}))
    assert main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to-native", "--quiet"]) in (3, 4)
    assert "Traceback" not in (message := capsys.readouterr().err)
    assert message.startswith("error: ")
    assert not (tmp_path / "back").exists()


def test_a_resized_model_has_no_native_form(tmp_path, converted, tokenizer, capsys):
    """Its tables are one; the trainer's are two, with the visual tokens in the second."""
    folder = tmp_path / "resized"
    shutil.copytree(converted, folder)
    (folder / "native_config.yaml").unlink()
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    model = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=True)
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 2)
    model.save_pretrained(folder)
    assert main([str(folder), str(tmp_path / "back"), "--to-native", "--tokenizer", tokenizer, "--quiet"]) == 4
    assert "llm.additional_vocab_size is 0" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_no_folder_to_go_back_from(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "back"), "--to-native", "--quiet"]) == 3
    assert "model.safetensors is missing" in capsys.readouterr().err


# The command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1000", 1000), ("1.5 kb", 1500)],
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-shard-size", "large"], "'large' is not a size; write 5GB"),
        (["--max-shard-size", "0"], "'0' is not a size"),
        (["--max-model-len", "-1"], "'-1' is not a positive integer"),
        (["--max-model-len", "0"], "'0' is not a positive integer"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--to-native", "--dry-run", "--verify"], "--dry-run, --verify: not available with --to-native"),
        (["--to-native", "--push-to-hub", "me/it"], "--push-to-hub: not available with --to-native"),
        (["--native-config", "config.yaml"], "--native-config: only available with --to-native"),
    ],
)
def test_wrong_arguments(arguments, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["checkpoint", "output", *arguments])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_help_explains_every_option():
    parser = build_parser()
    assert all(action.help for action in parser._actions if action.option_strings)
    text = parser.format_help()
    assert "exit codes:" in text
    assert "appears complete or not at all" in text


def test_module_entry_point(tmp_path, checkpoint, tokenizer):
    command = [
        sys.executable,
        "-m",
        "molmo2.convert",
        str(checkpoint),
        str(tmp_path / "out"),
        "--tokenizer",
        tokenizer,
    ]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"Wrote {tmp_path / 'out'}."
    printed = re.findall(r"^sha256 ([0-9a-f]{64})  (\S+)$", result.stdout, re.M)
    assert {name: digest for digest, name in printed} == ensure_remote_code(tmp_path / "out")
    assert result.stderr == ""  # no progress bar outside of a terminal
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|vit_loc|>") == 277 + 13


def test_installed_script(monkeypatch):
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {
        "molmo2": "molmo2.cli:main",
        "molmo2-convert": "molmo2.convert.cli:main",
    }  # `main` is what all tests here call
    for path, name in (("/usr/bin/molmo2-convert", "molmo2-convert"), ("cli.py", "python -m molmo2.convert")):
        monkeypatch.setattr(sys, "argv", [path])
        assert build_parser().prog == name


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"attn_implementation": "flash"}, {"max_model_len": 0}, {"max_shard_bytes": -1}]
)
def test_options_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .*; expected"):
        ConversionOptions(**options)


PEAK = """
import re, sys
from pathlib import Path
from molmo2.convert import ConversionOptions
from molmo2.convert.shards import plan_shards
from molmo2.convert.staging import Staging
from molmo2.convert.writer import WeightWriter
def peak():  # the kernel's own mark: `getrusage` includes the process from which this one was started
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
source = ConversionOptions().open_source(sys.argv[1])
staging = Staging(Path(sys.argv[2]), "")
staging.open()
before = peak()
WeightWriter(staging, source.tensors, "bfloat16", lambda _: None).write(plan_shards(source.renames, "bfloat16", 10**9))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in kilobytes on Linux only")
def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """Two models, the second eight times as large: writing takes the same few megabytes, less than one tensor."""
    used = {}
    for width in (256, 2048):
        section = native_section({"llm.d_model": width, "llm.vocab_size": 8192, "llm.embedding_size": 8192})
        folder = write_unsharded(tmp_path / f"native{width}", section, native_tensors(section))
        command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / f"out{width}")]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        used[width] = int(result.stdout)
    embedding = 8192 * 2048 * 4
    assert used[2048] < embedding / 2
    assert used[2048] < used[256] + 16_000_000


def test_folders_that_another_conversion_removes_meanwhile(tmp_path, monkeypatch):
    output, is_dir = tmp_path / "out", Path.is_dir

    def and_gone(path):
        found = is_dir(path)
        if path == output and found:
            output.rmdir()
        return found

    monkeypatch.setattr(Path, "is_dir", and_gone)
    for check in (lambda: ensure_disjoint([output], [tmp_path]), lambda: ensure_replaceable(output, overwrite=False)):
        output.mkdir()
        check()
        assert not output.exists()
