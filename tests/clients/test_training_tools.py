"""What axolotl and Unsloth read of the processor, by their own files; the packages want a GPU and dozens of others.

Runs in the environment of the tools (`constraints/tools.txt`). docs/training.md says what follows.
"""

# ruff: noqa: E402  (axolotl reads processors of transformers that want torchvision importable first)

import ast
import logging
import runpy
import sys
from importlib.metadata import files
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import pytest
import torch

try:
    AXOLOTL, UNSLOTH = files("axolotl"), files("unsloth-zoo")
except ImportError:
    pytest.skip("tools have an environment of their own", allow_module_level=True)

from benchmarks.torchvision_peer import make_importable

make_importable()

from molmo2 import load
from molmo2.training import DataCollator
from support.checkpoints import make_image, write_checkpoint
from support.training_cases import turn

ROLES = [  # `role_boundaries` of axolotl's file of settings
    {"role": "user", "start": "<|im_start|>user\n", "end": "<|im_end|>"},
    {"role": "assistant", "start": "<|im_start|>assistant\n", "end": "<|im_end|>"},
]
ROW = {"messages": turn("What is this?", "A red boat.", {"type": "image", "image": make_image(70, 90)})}


def installed(package, ending: str):
    (file,) = (file.locate() for file in package if str(file).endswith(ending))
    return file


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(write_checkpoint(tmp_path_factory.mktemp("tiny") / "molmo2", "qwen3"))


@pytest.fixture
def axolotl(monkeypatch):
    """Its module with the strategies and its collator, with stand-ins for its logging and one helper."""
    parts = {
        "axolotl": {},
        "axolotl.utils": {},
        "axolotl.utils.dict": {"remove_none_values": lambda row: row},
        "axolotl.utils.logging": {"get_logger": logging.getLogger},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    found = {}
    for name, ending in (
        ("axolotl.processing_strategies", "axolotl/processing_strategies.py"),
        ("axolotl.utils.collators.mm_chat", "axolotl/utils/collators/mm_chat.py"),
    ):
        spec = spec_from_file_location(name, installed(AXOLOTL, ending))
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        found.update(vars(module))
    return found


def axolotl_batch(axolotl, processor, **options):
    strategy = axolotl["ProcessingStrategy"](processor, processor.chat_template, **options)
    return axolotl["MultiModalChatDataCollator"](processor.tokenizer, strategy)([ROW])


def test_axolotl_with_the_roles_learns_the_answer_alone(axolotl, loaded):
    """Its tensors are ours, and its labels too: the answer and its end."""
    model, processor = loaded
    found = axolotl_batch(axolotl, processor, role_boundaries_override=ROLES)
    expected = DataCollator(processor)([ROW])
    for name in expected.keys() - {"loss_weights"}:
        assert torch.equal(found[name], expected[name]), name
    with torch.no_grad():
        assert torch.equal(model(**found).loss, model(**expected).loss)


def test_axolotl_without_the_roles_learns_questions_too(axolotl, loaded):
    """It knows the placeholder, not the tokens that it becomes: labels on those are dropped by the model."""
    model, processor = loaded
    strategy = axolotl["ProcessingStrategy"](processor)
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image|>")
    assert (strategy.image_token, strategy.image_token_id) == ("<|image|>", image_token)
    found = axolotl_batch(axolotl, processor)
    visual = model.model.visual_token_mask(found["input_ids"])
    assert bool(visual.any())
    assert torch.equal(found["labels"], found["input_ids"])
    with torch.no_grad():
        loss, answer_alone = model(**found).loss, model(**DataCollator(processor)([ROW])).loss
        found["labels"] = found["labels"].masked_fill(visual, -100)
        assert torch.equal(loss, model(**found).loss)
    assert abs(float(loss - answer_alone)) > 1e-3


def test_unsloth_knows_the_placeholders_alone(loaded):
    """Its list of tokens that are never learned has ours for images and videos, not those that they become."""
    _, processor = loaded
    names = runpy.run_path(str(installed(UNSLOTH, "unsloth_zoo/vlm_tokens.py")))["IMAGE_TOKENS"]
    assert {processor.image_token, processor.video_token} <= set(names)
    assert {"<im_patch>", "<im_col>", "<im_start>", "<im_end>", "<im_low>"} & set(names) == set()


def test_unsloth_makes_every_image_one_crop_unless_told_otherwise(loaded):
    """The default of its collator, "min", takes the size of images from our configuration: that of a crop."""
    model, _ = loaded
    source = installed(UNSLOTH, "unsloth_zoo/vision_utils.py").read_text(encoding="utf-8")
    (collator,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "UnslothVisionDataCollator")
    (start,) = (node for node in collator.body if getattr(node, "name", "") == "__init__")
    defaults = dict(zip([entry.arg for entry in start.args.args[::-1]], start.args.defaults[::-1]))
    assert ast.literal_eval(defaults["resize"]) == "min"
    assert ast.literal_eval(defaults["train_on_responses_only"]) is False
    assert "model.config.vision_config.image_size" in ast.unparse(start)
    assert list(model.config.vision_config.image_size) == list(model.config.vit_config.image_default_input_size)
