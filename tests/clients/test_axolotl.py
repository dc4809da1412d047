"""The real axolotl trains on rows with images, with the plugin of this repository and the settings of the page.

Runs in an environment of its own (`constraints/axolotl.txt`), on a CPU and without triton. docs/training.md says what
follows.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

pytest.importorskip("axolotl", reason="axolotl has an environment of its own")

import molmo2
from molmo2.training import DataCollator
from support.checkpoints import REPOSITORY, make_image, read_json, write_checkpoint

PROGRAM = REPOSITORY / "tests" / "support" / "axolotl_program.py"
SETTINGS = {"max_steps": 2, "micro_batch_size": 3, "optimizer": "adamw_torch", "lr_scheduler": "constant"}
SETTINGS |= {"logging_steps": 1, "learning_rate": 0.01, "bf16": False, "fp16": False, "output_dir": "out"}
SETTINGS |= {"gradient_accumulation_steps": 1}


def page_settings() -> dict:
    """The settings for axolotl in docs/training.md."""
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S) if "Molmo2Plugin" in block)
    return yaml.safe_load(block)


def rows() -> list:
    """One image, two, and text with two turns."""

    def turns(parts, *texts):
        first = [*({"type": "image", "path": name} for name in parts), {"type": "text", "text": texts[0]}]
        contents = [first, *([{"type": "text", "text": text}] for text in texts[1:])]
        return {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, contents)]}

    return [
        turns(["boats.png"], "What is this?", "A red boat."),
        turns(["boats.png", "harbour.png"], "Compare.", "The second one is smaller."),
        turns([], "What is the time?", "Half past two.", "Sure?", "Yes."),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_checkpoint(folder / "Molmo2-4B", "qwen3")
    for seed, name in enumerate(("boats.png", "harbour.png")):
        make_image(70, 90, seed).save(folder / name)
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows()))
    return folder


def train(folder, **changes):
    """What axolotl wrote to its standard error, its exit status, and the losses of its steps."""
    settings = {**page_settings(), **SETTINGS, **changes}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    shutil.rmtree(folder / "out", ignore_errors=True)
    places = os.pathsep.join([str(REPOSITORY / "examples"), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, PROGRAM, "train", "settings.yaml", "--launcher", "python"],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    state = folder / "out" / "checkpoint-2" / "trainer_state.json"
    losses = [entry["loss"] for entry in read_json(state)["log_history"] if "loss" in entry] if state.exists() else []
    return done, losses


def our_loss(folder, model, processor) -> float:
    messages = rows()
    for row in messages:
        for part in row["messages"][0]["content"]:
            if "path" in part:
                part["path"] = str(folder / part["path"])
    with torch.no_grad():
        return float(model(**DataCollator(processor)(messages)).loss)


def test_the_settings_of_the_page_train_from_our_loss(folder):
    done, losses = train(folder)
    assert done.returncode == 0, done.stderr[-6000:]
    first = our_loss(folder, *molmo2.load(folder / "Molmo2-4B"))
    assert losses[0] == pytest.approx(first, abs=1e-4)
    assert losses[1] < first - 0.1
    assert our_loss(folder, *molmo2.load(folder / "out")) < first - 0.1


def test_its_own_role_boundaries_do_not_come_through(folder):
    """Where this fails, docs/training.md has a caveat less."""
    roles = [{"role": "assistant", "start": "<|im_start|>assistant\n", "end": "<|im_end|>"}]
    done, _ = train(folder, role_boundaries=roles)
    assert done.returncode != 0
    assert "TypeError: 'NoneType' object is not callable" in done.stderr


def test_without_the_plugin_it_takes_a_text_model(folder):
    """And then looks for no processor in the folder; where this fails, docs/training.md has a caveat less."""
    done, losses = train(folder, plugins=[])
    assert done.returncode != 0
    assert "in load_processor" in done.stderr
    assert losses == []
