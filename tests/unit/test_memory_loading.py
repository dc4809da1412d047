"""`from_pretrained` holds the weights once: no copy of them, no initial values that are then overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from molmo2.configuration import Molmo2Config
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from support.checkpoints import copy_remote_code, fill_weights, published_config, write_json

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# Loads the small checkpoint, so that code and libraries are there, then the large one; prints the peak over what was
# resident before. All weights are read, because files are mapped, and come into memory only then.
LOAD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from transformers import AutoModelForImageTextToText
from benchmarks.memory import PeakMemory, held_bytes
def load(folder, dtype):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype))
    for tensor in model.state_dict().values():
        tensor.sum()
    return model
load(sys.argv[2], sys.argv[4])
memory = PeakMemory("cpu")
model = load(sys.argv[3], sys.argv[4])
print(json.dumps([memory.peak_bytes(), held_bytes(model)]))
"""


def write(folder: Path, mlp_size: int) -> Path:
    """A checkpoint whose weights are nearly all in its feed-forward layers."""
    folder.mkdir()
    config = published_config("qwen3")
    config["text_config"]["intermediate_size"] = mlp_size
    write_json(folder / "config.json", config)
    model = Molmo2ForConditionalGeneration(Molmo2Config.from_dict(config))
    fill_weights(model)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    copy_remote_code(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is the Linux kernel's")
def test_weights_are_held_once(tmp_path):
    small, large = write(tmp_path / "small", 64), write(tmp_path / "large", 800_000)
    command = [sys.executable, "-c", LOAD, str(REPOSITORY), str(small), str(large), "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peak, weights = json.loads(done.stdout)
    assert weights > 1e9
    assert 0.95 * weights < peak < 1.1 * weights
