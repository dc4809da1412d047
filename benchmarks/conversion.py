"""Conversion: memory and speed on made-up checkpoints of growing size, up to the shapes of Molmo2-4B.

Usage: python -m benchmarks.conversion [--sizes 0.4 1.6 6 18] [--folder SCRATCH]

Each checkpoint is sharded over 8 ranks, float32, filled from a seed, and converted to bfloat16 by the command line in
a process of its own. Before and after it, half of the same files are copied by `cp` and `sync`. Both are measured in
bytes read plus bytes written per second, with the page cache emptied before (where permitted). The scratch folder
needs twice the size; everything in it is deleted afterwards. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import REPOSITORY
from support.native_checkpoints import ShardedWriter, ShardLayout, native_section, native_shapes, write_config

RANKS, FILES_PER_RANK = 8, 2
FILLER_TOKENS = 267  # as between the base tokenizer and the vocabulary of the published 4B
POOL_ITEMS = 1 << 24
# The kernel's own mark: what `getrusage` tells includes the process from which this one was started.
CHILD = """
import re, sys
from molmo2.convert.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
sys.exit(code)
"""
SCRATCH_FACTOR = 2.1


@dataclass(frozen=True)
class Size:
    """A model with the layers of Molmo2-4B (the smallest one with half its width)."""

    width: int
    heads: int
    num_layers: int
    vit_layers: int
    vocab_size: int


SIZES = {
    0.4: Size(width=1280, heads=16, num_layers=2, vit_layers=2, vocab_size=8192),
    1.6: Size(width=2560, heads=32, num_layers=2, vit_layers=4, vocab_size=32768),
    6: Size(width=2560, heads=32, num_layers=7, vit_layers=25, vocab_size=151936),
    18: Size(width=2560, heads=32, num_layers=36, vit_layers=25, vocab_size=151936),
}


@dataclass(frozen=True)
class Result:
    source_bytes: int
    output_bytes: int
    peak_bytes: int
    seconds: float
    copy_rate: float

    @property
    def rate(self) -> float:
        """Bytes read and written per second."""
        return (self.source_bytes + self.output_bytes) / self.seconds


def section_of(size: Size) -> dict:
    """The `model` section of `config.yaml`."""
    return native_section(
        {
            "llm.d_model": size.width,
            "llm.n_heads": size.heads,
            "llm.n_kv_heads": size.heads // 4,
            "llm.head_dim": 128,
            "llm.n_layers": size.num_layers,
            "llm.mlp_hidden_size": size.width * 38 // 5,
            "llm.vocab_size": size.vocab_size,
            "llm.embedding_size": size.vocab_size,
            "llm.additional_vocab_size": 128,
            "llm.weight_tying": True,
            "vision_backbone.vit.image_default_input_size": [378, 378],
            "vision_backbone.vit.image_emb_dim": 1152,
            "vision_backbone.vit.image_num_heads": 16,
            "vision_backbone.vit.image_num_key_value_heads": 16,
            "vision_backbone.vit.image_head_dim": 72,
            "vision_backbone.vit.image_mlp_dim": 4304,
            "vision_backbone.vit.image_num_pos": 729,
            "vision_backbone.vit.image_num_layers": size.vit_layers,
            "vision_backbone.vit_layers": [-1, -2],
            "mm_preprocessor.image.overlap_margins": [4, 4],
        }
    )


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """A base tokenizer of realistic size."""
    folder.mkdir()
    vocabulary = {f"token{number}": number for number in range(num_tokens - 1)}
    end = {"id": num_tokens - 1, "content": "<|im_end|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end],
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_checkpoint(folder: Path, section: dict) -> None:
    """Pieces are cut from one seeded pool of random numbers, each at another place."""
    pool = torch.from_numpy(np.random.default_rng(0).standard_normal(POOL_ITEMS, dtype=np.float32))
    turn = 0

    def rows(shape: tuple[int, ...], number: int) -> torch.Tensor:
        nonlocal turn
        turn += 1
        items = number * int(np.prod(shape[1:]))
        start = turn * 7919 % (POOL_ITEMS // 2)
        repeats = -(-items // (POOL_ITEMS - start))
        return pool[start:].repeat(repeats)[:items].reshape(number, *shape[1:])

    write_config(folder, section)
    with ShardedWriter(folder / "model_and_optim", ShardLayout(RANKS, FILES_PER_RANK)) as writer:
        for name, shape in native_shapes(section).items():
            writer.add(f"model.{name}", shape, torch.float32, lambda _, number, shape=shape: rows(shape, number))


def empty_page_cache() -> bool:
    """Whether later reads come from the disk."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def copy_seconds(files: list[Path], target: Path) -> float:
    """How long `cp` and `sync` take."""
    target.mkdir()
    empty_page_cache()
    start = time.perf_counter()
    subprocess.run(["cp", *files, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(checkpoint: Path, output: Path, tokenizer: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of the command line."""
    options = ["--dtype", "bfloat16", "--tokenizer", tokenizer, "--quiet"]
    command = [sys.executable, "-c", CHILD, checkpoint, output, *options]
    empty_page_cache()
    start = time.perf_counter()
    result = subprocess.run([*map(str, command)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        raise SystemExit(f"The conversion ended with exit code {result.returncode}.")
    return seconds, int(result.stdout) * 1024


def measure(size: Size, scratch: Path) -> Result:
    """Make, copy and convert one checkpoint."""
    section = section_of(size)
    write_tokenizer(scratch / "tokenizer", size.vocab_size - FILLER_TOKENS)
    write_checkpoint(scratch / "native", section)
    files = sorted((scratch / "native" / "model_and_optim").glob("*.distcp"))
    half = files[::2]
    copying = copy_seconds(half, scratch / "copy")
    seconds, peak = convert(scratch / "native", scratch / "converted", scratch / "tokenizer")
    copying += copy_seconds(half, scratch / "copy")
    rate = 4 * sum(file.stat().st_size for file in half) / copying  # twice read and twice written
    written = sum(file.stat().st_size for file in (scratch / "converted").glob("*.safetensors"))
    return Result(sum(file.stat().st_size for file in files), written, peak, seconds, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", choices=list(SIZES), default=list(SIZES), metavar="GB")
    parser.add_argument("--folder", type=Path, help="scratch space (default: the system's)")
    arguments = parser.parse_args()
    is_cold = empty_page_cache()
    print(f"page cache {'emptied before each measurement' if is_cold else 'as it is (no permission to empty it)'}")
    print("| GB float32 | read | written | peak RSS | time | rate | cp + sync | of cp |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="conversion") as folder:
            free = shutil.disk_usage(folder).free
            if free < name * SCRATCH_FACTOR * 1e9:
                print(
                    f"| {name:g} | needs {name * SCRATCH_FACTOR:.0f} GB of scratch space, {free / 1e9:.0f} are free |"
                )
                continue
            result = measure(SIZES[name], Path(folder))
        print(
            f"| {name:g} | {result.source_bytes / 1e9:.2f} GB | {result.output_bytes / 1e9:.2f} GB "
            f"| {result.peak_bytes / 1e6:.0f} MB | {result.seconds:.1f} s | {result.rate / 1e6:.0f} MB/s "
            f"| {result.copy_rate / 1e6:.0f} MB/s | {result.rate / result.copy_rate:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
