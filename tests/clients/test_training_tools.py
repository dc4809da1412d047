"""What Unsloth reads of the processor, by its own files; the package wants a GPU and dozens of others.

Runs in the environment of the tools (`constraints/tools.txt`). docs/training.md says what follows.
"""

# ruff: noqa: E402  (an installed torchvision has to be importable first)

import ast
import runpy
from importlib.metadata import files

import pytest

try:
    UNSLOTH = files("unsloth-zoo")
except ImportError:
    pytest.skip("tools have an environment of their own", allow_module_level=True)

from benchmarks.torchvision_peer import make_importable

make_importable()

from molmo2 import load
from support.checkpoints import write_checkpoint


def installed(package, ending: str):
    (file,) = (file.locate() for file in package if str(file).endswith(ending))
    return file


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(write_checkpoint(tmp_path_factory.mktemp("tiny") / "molmo2", "qwen3"))


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
