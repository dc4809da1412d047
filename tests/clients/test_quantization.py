"""Quantisation libraries find the linear layers of the model, and a quantised miniature still answers correctly.

They look for modules whose type *is* `nn.Linear`, and say nothing when there are none. Runs in an environment of its
own (`constraints/quantization.txt`).
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

REPOSITORY = Path(__file__).resolve().parent.parent.parent
for place in (REPOSITORY, REPOSITORY / "examples"):
    sys.path.insert(0, str(place))

from miniature import native  # noqa: E402
from miniature.evaluate import FRESH_SEED, LOW_IS_GOOD, TARGETS, answers, examples, judge  # noqa: E402

# Kernels of bitsandbytes for 4 bits on the CPU want rows of whole blocks (64); a patch has 588 numbers.
PATCH_EMBEDDING = "model.vision_backbone.image_vit.patch_embedding"
QUESTIONS = 12  # about single images; sets and clips come on top
# How much worse a score may be than without quantisation, of questions so few that one is several percent.
TOLERANCE = {"int8": 0.1, "nf4": 0.2}

bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantisation has an environment of its own")
torchao = pytest.importorskip("torchao", reason="quantisation has an environment of its own")
quanto = pytest.importorskip("optimum.quanto", reason="quantisation has an environment of its own")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native.to_transformers(native.CHECKPOINT, tmp_path_factory.mktemp("miniature") / "model")


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options).eval()


def load_quantized(folder, method):
    """The miniature with its linear layers quantised, as the documentation of each library has it."""
    from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    if method == "quantize_dynamic":
        return torch.ao.quantization.quantize_dynamic(load(folder), {nn.Linear}, dtype=torch.qint8)
    if method == "bitsandbytes int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif method == "bitsandbytes nf4":
        left_out = ["lm_head", PATCH_EMBEDDING]
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=left_out)
    elif method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = QuantoConfig(weights="int8")
    return load(folder, quantization_config=config, device_map="cpu")


def is_quantized(module) -> bool:
    """Whether a layer holds a weight of fewer bits; the class alone would say so before anything is packed."""
    weight = getattr(module, "weight", None)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return weight.dtype == torch.int8
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return weight.dtype == torch.uint8
    if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
        return module.weight().dtype == torch.qint8
    return isinstance(weight, (torchao.utils.TorchAOBaseTensor, quanto.QTensor))


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def asked():
    return examples(FRESH_SEED + 1, QUESTIONS)


@pytest.fixture(scope="module")
def expected(folder, processor, asked):
    """Scores without quantisation."""
    return judge(processor, asked, answers(load(folder), processor, asked))


def linear_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


@pytest.mark.parametrize("method", ["bitsandbytes int8", "bitsandbytes nf4", "torchao", "quanto", "quantize_dynamic"])
def test_every_linear_layer_is_quantized(folder, processor, asked, expected, method):
    every_layer = linear_layers(load(folder))
    model = load_quantized(folder, method)
    left_out = set() if method == "quantize_dynamic" else {"lm_head"}  # by transformers
    left_out |= {PATCH_EMBEDDING} if method == "bitsandbytes nf4" else set()
    assert len(every_layer) == 63
    assert {name for name, module in model.named_modules() if is_quantized(module)} == every_layer - left_out
    found = judge(processor, asked, answers(model, processor, asked))
    tolerance = TOLERANCE["nf4" if method.endswith("nf4") else "int8"]
    for name in TARGETS.keys() & expected.keys():  # so few questions leave out some kinds
        worse = found[name] - expected[name] if name in LOW_IS_GOOD else expected[name] - found[name]
        assert worse <= tolerance, f"{name}: {found[name]:.2f} instead of {expected[name]:.2f}"
