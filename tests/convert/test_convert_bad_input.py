"""Checkpoints that must be refused: each with its message, and with the output as it was."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from molmo2.convert.cli import main
from molmo2.convert.reader import find_checkpoint
from support.native_checkpoints import (
    ShardLayout,
    native_section,
    native_tensors,
    write_base_tokenizer,
    write_config,
    write_sharded,
    write_unsharded,
)

CHECKPOINT_ERROR, UNSUPPORTED = 3, 4
EMBEDDING = "model.transformer.wte.embedding"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_base_tokenizer(tmp_path_factory.mktemp("tokenizer") / "base")


@pytest.fixture
def refused(tmp_path, tokenizer, capsys):
    """Runs the command line and returns its message, after checking the exit code and that nothing was written."""

    def run(checkpoint: Path, exit_code: int, *options: str) -> str:
        parent = tmp_path / "results"
        parent.mkdir()
        output = parent / "output"
        arguments = [str(checkpoint), str(output), "--tokenizer", str(tokenizer), "--quiet", *options]
        assert main(arguments) == exit_code
        assert list(parent.iterdir()) == []
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    return run


def sharded(folder: Path, **layout) -> Path:
    section = native_section()
    return write_sharded(folder, section, native_tensors(section), ShardLayout(**layout))


def place_of(metadata: Metadata, name: str, number: int = 0):
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name and index.index == number)


def index_of(metadata: Metadata, name: str, number: int = 0) -> MetadataIndex:
    return next(index for index in metadata.storage_data if index.fqn == name and index.index == number)


# Choosing a directory


def test_no_directory(tmp_path, refused):
    assert "does not exist; expected the directory of a checkpoint" in refused(tmp_path / "nowhere", CHECKPOINT_ERROR)


def test_a_file(tmp_path, refused):
    (tmp_path / "model.pt").write_bytes(b"")
    assert "is a file; expected the directory" in refused(tmp_path / "model.pt", CHECKPOINT_ERROR)


def test_no_checkpoint_in_the_directory(tmp_path, refused):
    (tmp_path / "run" / "step300-tmp" / "model_and_optim").mkdir(parents=True)
    (tmp_path / "run" / "step300-tmp" / "model_and_optim" / ".metadata").write_bytes(b"")
    message = refused(tmp_path / "run", CHECKPOINT_ERROR)
    assert "is not a checkpoint: expected `model.pt`" in message
    assert "found step300-tmp" in message


def test_latest_step_is_empty(tmp_path, refused):
    section = native_section()
    write_unsharded(tmp_path / "run" / "step9", section, native_tensors(section))
    (tmp_path / "run" / "step10").mkdir()
    message = refused(tmp_path / "run", CHECKPOINT_ERROR)
    assert "step10 is the latest step but has neither" in message
    assert "Name the step directory" in message


def filled(folder: Path, sharded: bool) -> None:
    target = folder / "model_and_optim" if sharded else folder
    target.mkdir(parents=True)
    (target / (".metadata" if sharded else "model.pt")).write_bytes(b"x")


def test_steps_count_as_integers_and_sharded_wins(tmp_path):
    for name, is_sharded in (("step9", True), ("step100-unsharded", False), ("step100", True), ("step99", True)):
        filled(tmp_path / name, is_sharded)
    filled(tmp_path / "step1000-tmp", True)
    filled(tmp_path / "notstep2000", True)
    location = find_checkpoint(tmp_path)
    assert (location.folder.name, location.step, location.is_sharded) == ("step100", 100, True)


def test_unsharded_step_and_the_file_in_a_double_directory(tmp_path):
    filled(tmp_path / "step7-unsharded", False)
    location = find_checkpoint(tmp_path)
    assert (location.folder.name, location.step, location.is_sharded) == ("step7-unsharded", 7, False)
    filled(tmp_path / "both", True)
    (tmp_path / "both" / "model.pt").write_bytes(b"x")
    assert not find_checkpoint(tmp_path / "both").is_sharded


# config.yaml


def test_config_is_missing(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    (folder / "config.yaml").unlink()
    assert "config.yaml is missing" in refused(folder, CHECKPOINT_ERROR)


def test_config_without_model_section(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    (folder / "config.yaml").write_text("seed: 1\noptimizer: {name: adamw}\n")
    message = refused(folder, CHECKPOINT_ERROR)
    assert "has no section `model`" in message
    assert "['optimizer', 'seed']" in message


def test_config_is_no_yaml(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    (folder / "config.yaml").write_text("model: [unclosed\n")
    assert "is not readable YAML" in refused(folder, CHECKPOINT_ERROR)


def test_config_cannot_run_code(tmp_path, refused):
    folder, mark = sharded(tmp_path / "native"), tmp_path / "mark"
    (folder / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{mark}']\n")
    assert "is not readable YAML" in refused(folder, CHECKPOINT_ERROR)
    assert not mark.exists()


# Damaged files


def test_truncated_piece_file(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    path = folder / "model_and_optim" / "__1_1.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(folder, CHECKPOINT_ERROR)
    assert "__1_1.distcp" in message
    assert "the file is truncated" in message


def test_missing_piece_file(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    (folder / "model_and_optim" / "__1_0.distcp").unlink()
    message = refused(folder, CHECKPOINT_ERROR)
    assert "__1_0.distcp is missing; copy it there" in message


def test_missing_metadata(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    (folder / "model_and_optim" / ".metadata").unlink()
    assert ".metadata is missing (a hidden file" in refused(folder, CHECKPOINT_ERROR)


def test_truncated_metadata(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    path = folder / "model_and_optim" / ".metadata"
    path.write_bytes(path.read_bytes()[:-20])
    assert ".metadata cannot be read" in refused(folder, CHECKPOINT_ERROR)


def test_metadata_of_something_else(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    (folder / "model_and_optim" / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    assert "does not hold the metadata of a sharded checkpoint" in refused(folder, CHECKPOINT_ERROR)


def test_flipped_byte_is_found_by_its_checksum(tmp_path, refused):
    """In the data of a piece: the structure is sound, so it shows only while weights are copied."""
    tensors = {}
    folder = sharded(tmp_path / "native", edit=lambda metadata: tensors.update(metadata.storage_data))
    place = next(place for index, place in tensors.items() if index.fqn == EMBEDDING)
    path = folder / "model_and_optim" / place.relative_path
    content = bytearray(path.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    path.write_bytes(content)
    message = refused(folder, CHECKPOINT_ERROR)
    assert f"{path} is damaged" in message
    assert "'transformer.wte.embedding'" in message
    assert "was stored. Copy the checkpoint again." in message


def test_flipped_byte_in_the_single_file(tmp_path, refused):
    section = native_section()
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    with zipfile.ZipFile(folder / "model.pt") as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray((folder / "model.pt").read_bytes())
    content[entry.header_offset + entry.file_size // 2] ^= 16
    (folder / "model.pt").write_bytes(content)
    assert "model.pt is damaged" in refused(folder, CHECKPOINT_ERROR)


def test_single_file_is_truncated(tmp_path, refused):
    section = native_section()
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    content = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[: len(content) // 2])
    assert "is not a readable torch archive" in refused(folder, CHECKPOINT_ERROR)


def test_compressed_entries(tmp_path, refused):
    section = native_section()
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    with zipfile.ZipFile(folder / "model.pt") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert "is compressed or encrypted; torch stores it plainly" in refused(folder, CHECKPOINT_ERROR)


# Pieces that do not make up their tensor


def chunks_of(metadata: Metadata) -> list[ChunkStorageMetadata]:
    return metadata.state_dict_metadata[EMBEDDING].chunks


def remove_a_piece(metadata: Metadata) -> None:
    del chunks_of(metadata)[0]
    del metadata.storage_data[index_of(metadata, EMBEDDING)]


def lose_the_place_of_a_piece(metadata: Metadata) -> None:
    del metadata.storage_data[index_of(metadata, EMBEDDING, 1)]


def overlap(metadata: Metadata) -> None:
    chunks, place = chunks_of(metadata), place_of(metadata, EMBEDDING, 1)
    del metadata.storage_data[index_of(metadata, EMBEDDING, 1)]
    chunks[1] = ChunkStorageMetadata(torch.Size([100, 40]), chunks[1].sizes)
    metadata.storage_data[MetadataIndex(EMBEDDING, torch.Size([100, 0]), 1)] = place
    chunks[1] = ChunkStorageMetadata(torch.Size([100, 0]), chunks[1].sizes)


def wrong_piece_size(metadata: Metadata) -> None:
    chunks = chunks_of(metadata)
    chunks[1] = ChunkStorageMetadata(chunks[1].offsets, torch.Size([chunks[1].sizes[0] - 1, 40]))


def cut_along_columns(metadata: Metadata) -> None:
    chunks = chunks_of(metadata)
    chunks[0] = ChunkStorageMetadata(chunks[0].offsets, torch.Size([chunks[0].sizes[0], 20]))


def larger_tensor(metadata: Metadata) -> None:
    metadata.state_dict_metadata[EMBEDDING].size = torch.Size([278, 40])


def announce_nothing(metadata: Metadata) -> None:
    del chunks_of(metadata)[1]


def other_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[EMBEDDING].properties.dtype = torch.bfloat16


def claim_the_bytes_of_another(metadata: Metadata) -> None:
    """Of a tensor with the same shape: nothing else would tell them apart."""
    place_of(metadata, "model.transformer.ff_out.weight").__dict__.update(place_of(metadata, EMBEDDING).__dict__)


BROKEN = {
    "bytes of another tensor": (claim_the_bytes_of_another, "overlaps one of 'transformer."),
    "missing piece": (remove_a_piece, "rows 0 to 139 are missing"),
    "piece without place": (lose_the_place_of_a_piece, "the piece at row 139 is in no file"),
    "overlap": (overlap, "rows 100 to 139 are covered twice: pieces overlap"),
    "wrong piece size": (wrong_piece_size, "holds float32 (138, 40); the metadata announces float32 (137, 40)"),
    "cut along columns": (cut_along_columns, "only pieces cut along dimension 0 are supported"),
    "tensor longer than its pieces": (larger_tensor, "rows 277 to 278 are missing"),
    "piece that is not announced": (announce_nothing, "files hold pieces at [(139, 0)]"),
    "other dtype": (other_dtype, "the metadata announces bfloat16"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_pieces_must_cover_their_tensor(tmp_path, refused, name):
    edit, expected = BROKEN[name]
    message = refused(sharded(tmp_path / "native", edit=edit), CHECKPOINT_ERROR)
    assert "do not make up the tensors" in message
    assert f"'{EMBEDDING[6:]}'" in message
    assert expected in message


def test_all_broken_tensors_are_reported_together(tmp_path, refused):
    def edit(metadata):
        remove_a_piece(metadata)
        for index in [index for index in metadata.storage_data if index.fqn == "model.transformer.ln_f.weight"]:
            del metadata.storage_data[index]

    message = refused(sharded(tmp_path / "native", edit=edit), CHECKPOINT_ERROR)
    assert message.count("  - '") == 2


@pytest.mark.parametrize(
    "name", ["../secret.distcp", "/etc/passwd", "..", "", "sub/__0_0.distcp", "..\\secret", "C:x", "a\0b"]
)
def test_path_tricks(tmp_path, refused, name):
    folder = sharded(
        tmp_path / "native", edit=lambda metadata: setattr(place_of(metadata, EMBEDDING), "relative_path", name)
    )
    (folder / "secret.distcp").write_bytes((folder / "model_and_optim" / "__0_0.distcp").read_bytes())
    message = refused(folder, CHECKPOINT_ERROR)
    assert f"names the file {name!r}" in message
    assert "do not use the checkpoint" in message


def test_other_dtypes_are_refused_by_name(tmp_path, refused):
    section = native_section()
    tensors = native_tensors(section)
    tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"].half()
    message = refused(write_unsharded(tmp_path / "native", section, tensors), CHECKPOINT_ERROR)
    assert "'transformer.ln_f.weight' is float16" in message


def test_transposed_tensors_are_refused(tmp_path, refused):
    section = native_section()
    tensors = native_tensors(section)
    name = "transformer.wte.embedding"
    tensors[name] = tensors[name].T.contiguous().T
    message = refused(write_unsharded(tmp_path / "native", section, tensors), CHECKPOINT_ERROR)
    assert f"'{name}' of shape (277, 40) is stored with strides (1, 277)" in message


# Tensors that do not fit the configuration


def test_names_and_shapes_are_reported_together(tmp_path, refused):
    section = native_section()
    tensors = native_tensors(section)
    tensors["transformer.blocks.0.q_norm.weight"] = torch.ones(13)
    tensors["transformer.blocks.3.q_norm.weight"] = torch.ones(12)
    tensors["adapter.lora_A"] = torch.ones(2, 2)
    del tensors["transformer.ln_f.weight"], tensors["vision_backbone.image_projector.w2.weight"]
    message = refused(write_sharded(tmp_path / "native", section, tensors), UNSUPPORTED)
    assert "'transformer.ln_f.weight' is missing; expected shape (40,)" in message
    assert "'vision_backbone.image_projector.w2.weight' is missing; expected shape (40, 56)" in message
    assert "'transformer.blocks.0.q_norm.weight' has shape (13,); the configuration makes it (12,)" in message
    assert "'transformer.blocks.3.q_norm.weight' of shape (12,) is unknown" in message
    assert "'adapter.lora_A' of shape (2, 2) is unknown" in message
    assert message.count("  - ") == 5


def test_bias_that_the_configuration_does_not_have(tmp_path, refused):
    with_bias = native_section({"llm.qkv_bias": True})
    folder = write_unsharded(tmp_path / "native", with_bias, native_tensors(with_bias))
    write_config(folder, native_section())
    assert "'transformer.blocks.0.att_proj.bias' of shape (96,) is unknown" in refused(folder, UNSUPPORTED)


# Pickles that want to run code


class Hostile:
    """Would make a directory when unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_payload_works(tmp_path):
    """Without this the tests below would prove nothing."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


def assert_refused_unread(message: str, mark: Path, file_name: str) -> None:
    assert file_name in message
    assert f"asks for `{os.mkdir.__module__}.mkdir`" in message
    assert "Nothing of it was executed" in message
    assert not mark.exists()


def test_hostile_metadata(tmp_path, refused):
    mark = tmp_path / "mark"
    folder = sharded(tmp_path / "native", edit=lambda metadata: setattr(metadata, "version", Hostile(mark)))
    assert_refused_unread(refused(folder, CHECKPOINT_ERROR), mark, ".metadata")


def test_hostile_piece(tmp_path, refused):
    mark = tmp_path / "mark"
    folder = tmp_path / "native"
    places = {}
    sharded(folder, edit=lambda metadata: places.update(metadata.storage_data))
    stream = io.BytesIO()
    torch.save(Hostile(mark), stream)

    def edit(metadata):
        place = place_of(metadata, EMBEDDING)
        place.relative_path, place.offset, place.length = "__9_0.distcp", 0, stream.getbuffer().nbytes

    other = sharded(tmp_path / "other", edit=edit)
    (other / "model_and_optim" / "__9_0.distcp").write_bytes(stream.getvalue())
    assert_refused_unread(refused(other, CHECKPOINT_ERROR), mark, "__9_0.distcp")


def test_hostile_single_file(tmp_path, refused):
    mark = tmp_path / "mark"
    section = native_section()
    tensors = {**native_tensors(section), "extra": Hostile(mark)}
    assert_refused_unread(
        refused(write_unsharded(tmp_path / "native", section, tensors), CHECKPOINT_ERROR), mark, "model.pt"
    )


def test_hostile_optimizer_and_trainer_files_are_never_opened(tmp_path, tokenizer):
    mark = tmp_path / "mark"
    section = native_section()
    folder = write_sharded(tmp_path / "native", section, native_tensors(section), ShardLayout(has_optimizer=True))
    torch.save(Hostile(mark), folder / "train" / "rank0.pt")
    torch.save(Hostile(mark), folder / "optim.pt")
    assert main([str(folder), str(tmp_path / "output"), "--tokenizer", str(tokenizer), "--quiet"]) == 0
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "hub.load"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("os", "system"),
        ("pathlib", "Path.home"),
        ("olmo.train.remote_filesystem", "upload"),
    ],
)
def test_only_listed_globals_resolve(tmp_path, refused, module, name):
    folder = sharded(tmp_path / "native")
    text = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93."
    (folder / "model_and_optim" / ".metadata").write_bytes(text.encode("latin-1"))
    assert f"asks for `{module}.{name}`" in refused(folder, CHECKPOINT_ERROR)


def test_state_cannot_be_set_on_the_stand_ins(tmp_path, refused):
    """BUILD on a class would change it for the rest of the process."""
    folder = sharded(tmp_path / "native")
    attack = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x05field\x8c\x01xs\x86b."
    (folder / "model_and_optim" / ".metadata").write_bytes(attack)
    assert "cannot be read" in refused(folder, CHECKPOINT_ERROR)
    from molmo2.convert.unpickling import Metadata as StandIn

    assert callable(StandIn.field)


def test_the_trainer_is_not_imported(tmp_path, tokenizer):
    """Nor is torch needed to read and write: the tokenizer is what brings transformers in."""
    folder = sharded(tmp_path / "native")
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # importing it fails
        "import molmo2.convert, molmo2.convert.cli, molmo2.convert.hub, molmo2.convert.to_native\n"
        "import molmo2.convert.verify, molmo2.convert.probe\n"
        f"source = molmo2.convert.ConversionOptions().open_source({str(folder)!r})\n"
        "print(len(source.renames), sorted(name for name in ('olmo', 'transformers') if name in sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "170 []"


def test_tokenizer_of_the_wrong_size(tmp_path, refused):
    section = native_section({"llm.vocab_size": 270})
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    message = refused(folder, UNSUPPORTED)
    assert "<im_start> would get id 270, but `wte.embedding` has 277 rows" in message


def test_tokenizer_with_too_many_tokens(tmp_path, refused):
    section = native_section({"llm.vocab_size": 200, "llm.embedding_size": 200})
    folder = write_unsharded(tmp_path / "native", section, native_tensors(section))
    message = refused(folder, UNSUPPORTED)
    assert "has 259 tokens; expected a base tokenizer of at most 200" in message


# Settings that only the target's own configuration refuses, and words of the refusal.
REFUSED_BY_THE_TARGET = {
    "heads": (
        {"vision_backbone.vit.image_num_key_value_heads": 2},
        "vision_backbone.vit: 3 attention heads over 2 key/value heads; `image_num_heads` must be a multiple of "
        "`image_num_key_value_heads`",
    ),
    "positions": (
        {"vision_backbone.vit.image_num_pos": 50},
        "vision_backbone.vit: `image_num_pos` is 50; expected a square number or the 49 patches",
    ),
    "activation": (
        {"vision_backbone.vit.image_mlp_activations": "foo"},
        "vision_backbone.vit: `image_mlp_activations` is 'foo'; expected an activation known to transformers",
    ),
    "odd head": ({"llm.head_dim": 9}, "llm: `head_dim` is 9; rotary embeddings rotate pairs"),
    "linear": ({"llm.rope_type": "linear"}, "llm: the rotary scaling of type 'linear' lacks ['factor']"),
    "yarn": ({"llm.rope_type": "yarn"}, "llm: the rotary scaling of type 'yarn' lacks ['factor']"),
    "llama3": (
        {"llm.rope_type": "llama3", "llm.rope_factor": 8.0, "llm.rope_high_freq_factor": 4.0},
        "llm: the rotary scaling of type 'llama3' lacks ['low_freq_factor', 'original_max_position_embeddings']",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_THE_TARGET)
def test_settings_that_the_targets_configuration_refuses(tmp_path, refused, case):
    changes, expected = REFUSED_BY_THE_TARGET[case]
    section = native_section(changes)
    message = refused(write_unsharded(tmp_path / "native", section, native_tensors(section)), UNSUPPORTED)
    assert "This checkpoint cannot be converted to Molmo2:\n  - " + expected in message


def test_tokenizer_that_cannot_be_found(tmp_path, refused):
    folder = sharded(tmp_path / "native")
    message = refused(folder, CHECKPOINT_ERROR, "--tokenizer", str(tmp_path / "nowhere"))
    assert "cannot be loaded" in message
    assert "what --tokenizer says, or else llm.tokenizer.identifier" in message
    assert "--tokenizer PATH" in message
