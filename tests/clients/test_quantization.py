"""Quantisation libraries find the linear layers of the model, and a quantised miniature still answers correctly.

They look for modules whose type *is* `nn.Linear`, and say nothing when there are none. What is saved answers the same
after loading, and adapters learn on top. Runs in an environment of its own (`constraints/quantization.txt`).
docs/quantization.md has the table: `pytest -s` prints its rows.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoProcessor

REPOSITORY = Path(__file__).resolve().parent.parent.parent
for place in (REPOSITORY, REPOSITORY / "examples"):
    sys.path.insert(0, str(place))

from clients.test_readme import python_blocks  # noqa: E402
from miniature import native  # noqa: E402
from miniature.evaluate import answers, judge  # noqa: E402
from molmo2.training import DataCollator  # noqa: E402
from support.cookbook import check, cookbook  # noqa: E402
from support.quantization import (  # noqa: E402
    PATCH_EMBEDDING,
    fresh_questions,
    linear_layers,
    load,
    require_similar,
    summary,
    weight_bytes,
)
from support.training_cases import IMAGE, turn  # noqa: E402

ADAPTED = r".*\.(att_proj|ff_proj)"  # 24 matrices of adapters in 12 layers

bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantisation has an environment of its own")
torchao = pytest.importorskip("torchao", reason="quantisation has an environment of its own")
quanto = pytest.importorskip("optimum.quanto", reason="quantisation has an environment of its own")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native.to_transformers(native.CHECKPOINT, tmp_path_factory.mktemp("miniature") / "model")


@dataclass(frozen=True)
class Method:
    """A way to quantise, as the documentation of its library has it.

    Attributes:
        config: `quantization_config`.
        left_out: Linear layers that keep their weights; `lm_head` is left out by transformers.
        tolerance: How much worse a score may be than without, of questions so few that one is several percent.
        max_share: Upper bound of the bytes of the saved weights, of those in float32; None where nothing can be saved.
    """

    config: Callable[[], Any]
    left_out: frozenset[str] = frozenset({"lm_head"})
    tolerance: float = 0.1
    max_share: float | None = None


def _bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def _torchao(bits: int) -> Any:
    """4 bits in the layout that runs anywhere, a byte each; the packed ones want the kernels of a GPU."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if bits == 8:
        return TorchAoConfig(Int8WeightOnlyConfig())
    left_out = ["lm_head", PATCH_EMBEDDING]  # rows of whole groups of 32
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return TorchAoConfig(config, modules_to_not_convert=left_out)


def _quanto() -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


# Kernels of bitsandbytes for 4 bits on the CPU want rows of whole blocks (64).
WHOLE_BLOCKS = frozenset({"lm_head", PATCH_EMBEDDING})
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": sorted(WHOLE_BLOCKS)}
METHODS = {
    "bitsandbytes int8": Method(lambda: _bitsandbytes(load_in_8bit=True), max_share=0.3),
    "bitsandbytes nf4": Method(lambda: _bitsandbytes(**NF4), WHOLE_BLOCKS, tolerance=0.2, max_share=0.25),
    "torchao int8": Method(lambda: _torchao(8), max_share=0.3),
    "torchao int4": Method(lambda: _torchao(4), WHOLE_BLOCKS, tolerance=0.2, max_share=0.5),
    "quanto int8": Method(_quanto),
}


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
    return fresh_questions()


@pytest.fixture(scope="module")
def expected(folder, processor, asked):
    """Scores without quantisation."""
    return judge(processor, asked, answers(load(folder), processor, asked))


@pytest.fixture(scope="module", params=METHODS)
def quantized(request, folder):
    """Name and model."""
    return request.param, load(folder, quantization_config=METHODS[request.param].config(), device_map="cpu")


def quantized_layers(model) -> set[str]:
    return {name for name, module in model.named_modules() if is_quantized(module)}


def test_every_linear_layer_is_quantized(quantized, folder, processor, asked, expected):
    name, model = quantized
    every_layer = linear_layers(load(folder))
    assert len(every_layer) == 63
    assert quantized_layers(model) == every_layer - METHODS[name].left_out
    found = judge(processor, asked, answers(model, processor, asked))
    print(f"\n{version('transformers')} | {name} | {len(quantized_layers(model))} layers | {summary(found)}")
    print(f"without: {summary(expected)}")
    require_similar(found, expected, METHODS[name].tolerance)


def test_what_is_saved_answers_the_same(quantized, folder, processor, asked, tmp_path):
    name, model = quantized
    if METHODS[name].max_share is None or (name.startswith("torchao") and version("transformers") < "5"):
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    share = weight_bytes(tmp_path) / weight_bytes(folder)
    print(f"\n{version('transformers')} | {name} | {weight_bytes(tmp_path)} of {weight_bytes(folder)} bytes")
    assert share <= METHODS[name].max_share
    again = load(tmp_path, device_map="cpu")
    assert quantized_layers(again) == quantized_layers(model)
    assert answers(again, processor, asked[::4]) == answers(model, processor, asked[::4])


@pytest.mark.parametrize("method", METHODS)
def test_adapters_learn_on_top(method, folder, processor):
    """One step: the loss is finite, adapters change, and nothing else does.

    On a model that has not answered yet: on CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights for the first
    answer, and has no gradient through what is packed.
    """
    peft = pytest.importorskip("peft", reason="quantisation has an environment of its own")
    model = load(folder, quantization_config=METHODS[method].config(), device_map="cpu")
    batch = DataCollator(processor)([{"messages": turn("What colour is the ring?", "green", IMAGE)}])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False)).train()
    learning = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert len(learning) == 24
    assert all("lora_" in name for name in learning)
    frozen = {name: value for name, value in adapted.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    before = {name: value.detach().clone() for name, value in learning.items()}
    loss = adapted(**batch).loss
    loss.backward()
    optimizer.step()
    assert bool(loss.isfinite())
    assert [name for name, value in learning.items() if torch.equal(value, before[name])] == []
    assert [name for name, value in frozen.items() if value.grad is not None] == []
    assert float(adapted(**batch).loss) != float(loss)


def test_torchs_own_dynamic_quantization_converts_all(folder, processor, asked, expected):
    every_layer = linear_layers(load(folder))
    model = torch.ao.quantization.quantize_dynamic(load(folder), {nn.Linear}, dtype=torch.qint8)
    assert quantized_layers(model) == every_layer
    require_similar(judge(processor, asked, answers(model, processor, asked)), expected, 0.1)


def test_four_bits_of_torchao_in_packed_layouts_need_a_gpu():
    """They ask for a library of GPU kernels; where this fails, docs/quantization.md has a caveat less."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    with pytest.raises(ImportError, match=r"^Requires mslk >= 1\.0\.0$"):  # torchao 0.18.0
        quantize_(nn.Linear(128, 128, dtype=torch.bfloat16), Int4WeightOnlyConfig(group_size=32))


def test_the_page_of_the_cookbook(tmp_path):
    check("quantized", cookbook.prepare(tmp_path))


def test_the_page_names_what_is_left_out():
    names: dict[str, Any] = {}
    for block in python_blocks(REPOSITORY / "docs" / "quantization.md"):
        exec(compile(block, "quantization.md", "exec"), names)
    assert set(names["four_bits"].llm_int8_skip_modules) == WHOLE_BLOCKS
