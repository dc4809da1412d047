"""The real ms-swift trains on rows with images and clips, by the template of this repository and by its own.

Runs in an environment of its own (`constraints/ms-swift.txt`), on a CPU. docs/training.md says what follows.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("swift", reason="ms-swift has an environment of its own")

from swift.model import get_processor
from swift.template import TemplateInputs, get_template

import molmo2
from molmo2.training import DataCollator
from support.checkpoints import REPOSITORY, make_image, read_json, write_checkpoint

PLUGIN = REPOSITORY / "examples" / "ms_swift_template.py"
CLIP = REPOSITORY / "examples" / "data" / "nasa_clip.mp4"
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "torch_dtype": "float32",
    "logging_steps": 1,
    "report_to": "none",
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "output_dir": "out",
}


@pytest.fixture(scope="module")
def plugin():
    """The template, as `--external_plugins` imports it."""
    spec = spec_from_file_location("ms_swift_template", PLUGIN)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command of the page finds: a checkpoint, rows of four kinds, and the template."""
    folder = tmp_path_factory.mktemp("training")
    write_checkpoint(folder / "Molmo2-4B", "qwen3")
    for seed, name in enumerate(("boats.png", "harbour.png")):
        make_image(70, 90, seed).save(folder / name)
    shutil.copy(CLIP, folder / "clip.mp4")
    shutil.copy(PLUGIN, folder)
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows()))
    return folder


def rows():
    """Rows in the form of ms-swift."""

    def turns(*texts):
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts)]

    return [
        {"messages": turns("<image>What is this?", "A red boat."), "images": ["boats.png"], "videos": []},
        {
            "messages": turns("<image>Compare<image> them.", "The second one is smaller.", "Sure?", "Yes."),
            "images": ["boats.png", "harbour.png"],
            "videos": [],
        },
        {"messages": turns("<video>What happens?", "A rocket starts."), "images": [], "videos": ["clip.mp4"]},
        {"messages": turns("What is the time?", "Half past two."), "images": [], "videos": []},
    ]


def ours(folder):
    """The same rows, as this package takes them."""

    def part(kind, name):
        return {"type": kind, kind: str(folder / name)}

    def turns(content, *texts):
        return [
            {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, (content, *texts))
        ]

    def said(text):
        return {"type": "text", "text": text}

    two = [part("image", "boats.png"), said("Compare"), part("image", "harbour.png"), said(" them.")]
    return [
        {"messages": turns([part("image", "boats.png"), said("What is this?")], "A red boat.")},
        {"messages": turns(two, "The second one is smaller.", "Sure?", "Yes.")},
        {"messages": turns([part("video", "clip.mp4"), said("What happens?")], "A rocket starts.")},
        {"messages": turns("What is the time?", "Half past two.")},
    ]


def page_command() -> list[str]:
    """`swift sft` of docs/training.md."""
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S) if "swift sft" in block)
    return shlex.split(block.replace("\\\n", " "))


def train(folder, *options, command=None):
    """Run the command in the folder: what it logged at each step, and its last checkpoint."""
    program, *arguments = page_command() if command is None else command
    given = [*arguments, *options, *(f"--{name}={value}" for name, value in SETTINGS.items())]
    shutil.rmtree(folder / "out", ignore_errors=True)
    done = subprocess.run(
        [Path(sys.executable).parent / program, *given],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "MODELSCOPE_CACHE": str(folder / "modelscope")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (checkpoint,) = folder.glob("out/*/checkpoint-2")
    history = read_json(checkpoint / "trainer_state.json")["log_history"]
    return [entry for entry in history if "loss" in entry], checkpoint


@pytest.fixture(scope="module")
def first_loss(folder):
    model, processor = molmo2.load(folder / "Molmo2-4B")
    with torch.no_grad():
        return float(model(**DataCollator(processor)(ours(folder))).loss)


def test_the_command_of_the_page_trains_adapters_from_our_loss(folder, first_loss):
    steps, checkpoint = train(folder)
    assert steps[0]["loss"] == pytest.approx(first_loss, abs=1e-4)
    assert steps[1]["loss"] < steps[0]["loss"] - 1e-2
    adapters = load_file(checkpoint / "adapter_model.safetensors")
    assert len(adapters) == 24  # two matrices for four layers of three blocks
    assert all(".transformer.blocks." in name for name in adapters)
    assert all(bool(tensor.any()) for tensor in adapters.values())


def test_all_weights_of_the_text_model(folder, first_loss):
    """Without adapters: vision tower and connector stay as they are, and what was saved loads here."""
    steps, checkpoint = train(folder, "--tuner_type", "full")
    assert steps[0]["loss"] == pytest.approx(first_loss, abs=1e-4)
    before = molmo2.load(folder / "Molmo2-4B")[0].state_dict()
    model, processor = molmo2.load(checkpoint)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "vision_backbone" not in name}
    with torch.no_grad():
        assert float(model(**DataCollator(processor)(ours(folder))).loss) < first_loss - 1e-2


def encoded(folder, name, row):
    """What a template of ms-swift makes of a row for training."""
    template = get_template(get_processor(str(folder / "Molmo2-4B"), model_type="molmo2"), template_type=name)
    template.set_mode("train")
    media = {kind: [str(folder / file) for file in row[kind]] for kind in ("images", "videos")}
    return template, template.encode(TemplateInputs.from_dict({**row, **media}))


def test_rows_are_those_of_the_collator(folder, plugin):
    _, processor = molmo2.load(folder / "Molmo2-4B")
    for row, own in zip(rows(), ours(folder), strict=True):
        template, found = encoded(folder, plugin.NAME, row)
        batch, expected = template.data_collator([found]), DataCollator(processor)([own])
        assert set(expected) - {"loss_weights"} <= set(batch)
        for name in set(expected) - {"loss_weights"}:
            torch.testing.assert_close(batch[name].to(expected[name].dtype), expected[name], rtol=0, atol=0)


def test_its_own_template_makes_other_rows(folder):
    """Where this fails, docs/training.md has a caveat less."""
    _, processor = molmo2.load(folder / "Molmo2-4B")
    tokenizer = processor.tokenizer
    (start, end), newline = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]), tokenizer.encode("\n")
    _, found = encoded(folder, "molmo2", rows()[0])
    expected = DataCollator(processor)([ours(folder)[0]])
    ids, right = found["input_ids"], expected["input_ids"][0].tolist()
    visual = [place for place, token in enumerate(ids) if token in processor.image_token_ids]
    assert (right[0], ids[0]) == (end, start)  # the first token is missing
    assert right[1 : 1 + len(visual)] == [ids[place] for place in visual]  # the image, which comes first, is
    assert tokenizer.decode(ids[: visual[0]]) == "<|im_start|>user\n"  # within the turn
    assert sorted(ids) == sorted([*right[1:], *newline])
    learned = [label for label in found["labels"] if label != -100]
    assert learned == [*expected["labels"][0][expected["labels"][0] != -100].tolist(), *newline]
    _, two = encoded(folder, "molmo2", rows()[1])
    assert "Image 1" in tokenizer.decode(DataCollator(processor)([ours(folder)[1]])["input_ids"][0])
    assert "Image 1" not in tokenizer.decode(two["input_ids"])


REFUSED = {
    "inference": "is for training",
    "weights of turns": "leave out `--packing`",
    "packing": "leave out `--packing`",
    "left": "`--truncation_strategy` is 'left'",
    "right": "`--truncation_strategy` is 'right'",
    "split": "`--truncation_strategy` is 'split'",
    "objects": "A row has `objects`; expected none",
    "audios": "A row has `audios`; expected none",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_the_template_does_not_do_is_refused(folder, plugin, change):
    template, _ = encoded(folder, plugin.NAME, rows()[0])
    row = rows()[3]
    if change in ("left", "right", "split"):
        template.truncation_strategy = change
    elif change == "objects":
        row["messages"][0]["content"] = "<image>Where is it?"
        row["messages"][1]["content"] = "The <ref-object> is at <bbox>."
        row["images"] = [str(folder / "boats.png")]
        row["objects"] = {"ref": ["boat"], "bbox": [[1, 2, 30, 40]]}
    elif change == "audios":
        row["audios"] = ["horn.wav"]
    elif change == "inference":
        template.set_mode("transformers")
    elif change == "packing":
        template.padding_free = True
    else:
        row["messages"][1]["loss"] = False
    with pytest.raises(ValueError, match=REFUSED[change]):
        template.encode(TemplateInputs.from_dict(row))


def test_no_image_of_a_row_gets_lost(folder, plugin):
    """One in the system's text is shown; other numbers of tags than of media are refused."""
    row = rows()[0]
    row["messages"] = [{"role": "system", "content": "Look at <image>."}, *row["messages"]]
    row["images"] = ["boats.png", "harbour.png"]
    _, processor = molmo2.load(folder / "Molmo2-4B")
    _, found = encoded(folder, plugin.NAME, row)
    assert len(found["image_grids"]) == 2
    text = processor.tokenizer.decode(found["input_ids"])
    assert "<image>" not in text
    assert re.search(r"system\nLook at +\.<", text)
    row["messages"][1]["content"] += "<image>"
    with pytest.raises(ValueError, match=r"3 tag\(s\) `<image>` in its texts and 2 image\(s\)"):
        encoded(folder, plugin.NAME, row)
    clip = rows()[2]
    clip["messages"][1]["content"] = "<video>"
    with pytest.raises(ValueError, match=r"2 tag\(s\) `<video>` in its texts and 1 video\(s\)"):
        encoded(folder, plugin.NAME, clip)
    few = SimpleNamespace(system=None, messages=rows()[3]["messages"], images=["boats.png"], videos=[])
    with pytest.raises(ValueError, match=r"0 tag\(s\) `<image>` in its texts and 1 image\(s\)"):
        plugin.conversation(few)  # ms-swift itself adds tags that are missing
