"""Made-up checkpoints in the published layout, written once into the cache folder: real widths, few layers.

`python -m benchmarks.checkpoints NAME FOLDER` writes one of `SHAPES`.
"""

import json
import math
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.harness import REPOSITORY, Side
from support.random_miniature import CHAT_TOKENS, MOLMO2_TOKENS, write_json

PUBLISHED = REPOSITORY / "tests" / "data" / "published" / "Molmo2-4B"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
POOL_ITEMS = 1 << 24
FORMAT = "2"  # of the files: others in the cache are written anew
PUBLISHED_VOCABULARY = 151_936


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; heads are 128 wide in the text model and 72 in the vision tower, as in the published ones."""

    width: int
    heads: int
    key_value_heads: int
    mlp: int
    layers: int
    vision_width: int = 144
    vision_mlp: int = 288
    vision_layers: int = 2
    vocab_size: int = 512
    dtype: torch.dtype = torch.float32

    def quick(self) -> "Shape":
        return replace(self, layers=1, vision_layers=2)


SHAPES = {
    # Attention and feed-forward of the 4B, four layers: 1.6 GB in float32.
    "decoder": Shape(2560, 32, 8, 9728, layers=4),
    "thin": Shape(1024, 8, 2, 3584, layers=2),
    "session": Shape(1024, 8, 2, 3584, layers=4),
    # The vision tower of all published models, three of its layers; hardly any text model.
    "vision": Shape(256, 2, 1, 512, layers=1, vision_width=1152, vision_mlp=4304, vision_layers=3),
    # The vocabulary of the 4B, hardly any weights.
    "start": Shape(128, 1, 1, 256, layers=1, vocab_size=PUBLISHED_VOCABULARY, dtype=torch.bfloat16),
    "4b": Shape(
        2560, 32, 8, 9728, 36, vision_width=1152, vision_mlp=4304, vision_layers=25, vocab_size=PUBLISHED_VOCABULARY,
        dtype=torch.bfloat16,
    ),
}  # fmt: skip


def checkpoint(side: Side, name: str) -> Path:
    """Folder of a checkpoint for one side, with its code; weights are shared by all sides."""
    name = f"{name}-quick" if side.settings.quick else name
    weights = side.settings.cache / "weights" / name
    version = weights / "format"
    if not version.exists() or version.read_text() != FORMAT:
        shutil.rmtree(weights, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "benchmarks.checkpoints", name, str(weights)], cwd=REPOSITORY, check=True
        )
        version.write_text(FORMAT)
    if side.name == "native":
        return weights
    code = Path(side.name) if Path(side.name).is_dir() else REPOSITORY
    folder = side.settings.cache / "folders" / f"{code.name}_{abs(hash_of(str(code)))}" / name.replace("-", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in weights.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    for file in [*code.glob("*_molmo2.py"), *code.glob("chat_template.*")]:
        (folder / file.name).unlink(missing_ok=True)
        shutil.copy(file, folder)
    return folder


def hash_of(text: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(text.encode()[-16:], "big") % 10**8


def write_checkpoint(name: str, folder: Path) -> None:
    """Everything but code; the weights last, so that a folder that has them is whole."""
    shape = SHAPES[name.removesuffix("-quick")]
    shape = shape.quick() if name.endswith("-quick") else shape
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", settings_of(shape))
    write_json(folder / "generation_config.json", {"bos_token_id": 258, "eos_token_id": 258, "pad_token_id": 256})
    for file in PROCESSOR_FILES:
        shutil.copy(PUBLISHED / file, folder)
    shutil.copy(REPOSITORY / "chat_template.jinja", folder)
    write_tokenizer(folder, shape.vocab_size)
    write_weights(folder, shape)


def settings_of(shape: Shape) -> dict:
    """The published config.json with these sizes; the ids of visual tokens follow the vocabulary."""
    config = json.loads((PUBLISHED / "config.json").read_text(encoding="utf-8"))
    text, vision, adapter = config["text_config"], config["vit_config"], config["adapter_config"]
    shift = shape.vocab_size - text["vocab_size"]
    config.update({name: value + shift for name, value in config.items() if name.endswith("_id")})
    text.update(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocab_size,
        max_position_embeddings=65536,
    )
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), shape.vision_width // 72)
    vision.update(heads, hidden_size=shape.vision_width, intermediate_size=shape.vision_mlp)
    vision.update(num_hidden_layers=shape.vision_layers)
    adapter.update(heads, hidden_size=shape.vision_width, text_hidden_size=shape.width, vit_layers=[-1, -2])
    adapter.update(intermediate_size=shape.mlp)
    config["auto_map"]["AutoModel"] = "modeling_molmo2.Molmo2Model"
    return config


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Bytes, chat tokens, entries that fill the vocabulary up, and Molmo2's tokens after it.

    A vocabulary of the published size has as many merges as the published one, since they take most of its loading;
    they join capitals alone, so that texts without two in a row have as many tokens as with other vocabularies.
    """
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *CHAT_TOKENS]
    merges = list(islice(_merges(), vocab_size - len(entries))) if vocab_size >= PUBLISHED_VOCABULARY else []
    entries += [left + right for left, right in merges]
    entries += [f"filler{number}" for number in range(vocab_size - len(entries))]
    tokenizer = Tokenizer(models.BPE(vocab={entry: number for number, entry in enumerate(entries)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in [*CHAT_TOKENS, *MOLMO2_TOKENS]]
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"bos_token": "<|im_end|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of entries that become one, by entries that are there already."""
    words = list(string.ascii_uppercase)
    while True:
        pairs = [(word, letter) for word in words for letter in string.ascii_uppercase]
        yield from pairs
        words = [left + right for left, right in pairs]


def write_weights(folder: Path, shape: Shape) -> None:
    """Weights cut from one seeded pool of random numbers, each at another place, scaled by their fan-in."""
    code = folder / "code"
    code.mkdir(exist_ok=True)
    for module in REPOSITORY.glob("*_molmo2.py"):
        shutil.copy(module, code)
    shutil.copy(folder / "config.json", code)
    config = AutoConfig.from_pretrained(code, trust_remote_code=True)
    with torch.device("meta"):
        shapes = AutoModelForImageTextToText.from_config(config, trust_remote_code=True).state_dict()
    shutil.rmtree(code)
    pool = torch.randn(POOL_ITEMS, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for turn, (name, tensor) in enumerate(shapes.items()):
        is_norm = "norm" in name or ".ln_f" in name
        start = turn * 7919 % (POOL_ITEMS // 2)
        piece = pool[start:]
        noise = piece.repeat(math.ceil(tensor.numel() / len(piece)))[: tensor.numel()].reshape(tensor.shape)
        fan_in = tensor.shape[-1] if tensor.dim() > 1 and "embedding" not in name else 1
        values = (
            1 + 0.1 * noise if is_norm and name.endswith("weight") else noise * (fan_in**-0.5 if fan_in > 1 else 0.1)
        )
        tensors[name] = values.to(shape.dtype).contiguous()
    partial = folder / "weights.part"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")


if __name__ == "__main__":
    write_checkpoint(sys.argv[1], Path(sys.argv[2]))
