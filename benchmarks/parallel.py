"""Memory of one training step over several processes: python -m benchmarks.parallel [--mode tensor]

One row, a clip and a long text, goes forward and backward through a small model in float32 on gloo processes of one
thread. `peak` is the most memory that the step takes in a process beyond what it held before (largest of the
processes), `time` the longest of their steps; processes share the cores of one machine, so times say nothing about
several machines.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from benchmarks.harness import REPOSITORY  # makes `support` importable
from benchmarks.memory import PeakMemory
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from molmo2.training import context_parallel, tensor_parallel
from support.checkpoints import tiny_config
from support.training_cases import collate, example, turn

FRAMES = 96
MODES = {"context": context_parallel, "tensor": tensor_parallel}


def model() -> Any:
    """Eight heads, four key heads, six layers of width 384, and a vision tower of width 192."""
    config = tiny_config("qwen3")
    sizes = {"hidden_size": 384, "intermediate_size": 1152, "num_attention_heads": 8, "num_key_value_heads": 4}
    vars(config.text_config).update(sizes, head_dim=48, num_hidden_layers=6, max_position_embeddings=1 << 20)
    vars(config.vit_config).update(hidden_size=192, intermediate_size=576, num_attention_heads=4, head_dim=48)
    config.vit_config.num_key_value_heads = 4
    adapter = {"hidden_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 48}
    vars(config.adapter_config).update(adapter, text_hidden_size=384)
    torch.manual_seed(0)
    return Molmo2ForConditionalGeneration(config).train()


def batch(tokens: int, frames: int) -> dict[str, torch.Tensor]:
    """One row of this many tokens: a clip, and an answer that fills it up."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 98, 98, 3), dtype=np.uint8)
    clip = {"type": "video", "video": pixels, "video_metadata": {"fps": 2.0, "total_num_frames": frames}}
    row = example(turn("What happens?", "a " * tokens, clip), num_frames=frames, max_length=tokens)
    return collate([row])


def step(folder: Path, rank: int, size: int, mode: str, tokens: int) -> None:
    """What one process does; it writes its figures."""
    torch.set_num_threads(1)
    if size > 1:
        meeting = (folder / "rendezvous").as_uri()
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    own = model() if size == 1 else MODES[mode](model())
    small, large = batch(300, 4), batch(tokens, FRAMES)
    own(**small).loss.backward()  # gradients, and what libraries allocate once
    memory = PeakMemory("cpu")
    began = time.perf_counter()
    loss = own(**large).loss
    loss.backward()
    figures = {"seconds": time.perf_counter() - began, "peak": memory.peak_bytes(), "loss": float(loss.detach())}
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    if size > 1:
        distributed.barrier()


def measure(size: int, mode: str, tokens: int) -> dict[str, float]:
    """The largest figures of the processes of one step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.parallel", "--tokens", str(tokens), "--mode", mode]
        running = [
            subprocess.Popen([*command, "--child", folder, str(rank), str(size)], cwd=REPOSITORY)
            for rank in range(size)
        ]
        if any(process.wait() for process in running):
            raise RuntimeError(f"A process of {size} failed; see above.")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
    return {name: max(each[name] for each in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--mode", choices=MODES, default="context")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        folder, rank, size = given.child
        step(Path(folder), int(rank), int(size), given.mode, given.tokens)
        return
    print(f"| {given.mode} parallel, {given.tokens} tokens | peak of a process | of one | time | loss |")
    print("|---|---|---|---|---|")
    first = None
    for size in given.processes:
        found = measure(size, given.mode, given.tokens)
        first = found["peak"] if first is None else first
        print(
            f"| {size} | {found['peak'] / 1e6:.0f} MB | {found['peak'] / first:.2f} | {found['seconds']:.1f} s "
            f"| {found['loss']:.6f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
