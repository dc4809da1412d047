"""llm-compressor's `oneshot` quantises a miniature; saved in compressed-tensors and loaded, it answers as before.

Runs in an environment of its own (`constraints/llm-compressor.txt`). docs/quantization.md has the table: `pytest -s`
prints its rows. Its block is run as it stands on a model of random weights, whose rows are made of groups of 128.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import AutoProcessor

REPOSITORY = Path(__file__).resolve().parent.parent.parent
for place in (REPOSITORY, REPOSITORY / "examples"):
    sys.path.insert(0, str(place))

pytest.importorskip("llmcompressor", reason="quantisation has an environment of its own")

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier  # noqa: E402

import molmo2  # noqa: E402
from miniature import native  # noqa: E402
from miniature.evaluate import FRESH_SEED, answers, examples, judge  # noqa: E402
from molmo2.configuration import Molmo2Config  # noqa: E402
from molmo2.model.modeling import Molmo2ForConditionalGeneration  # noqa: E402
from support.checkpoints import PUBLISHED, read_json  # noqa: E402
from support.quantization import (  # noqa: E402
    PATCH_EMBEDDING,
    fresh_questions,
    linear_layers,
    load,
    require_similar,
    summary,
    weight_bytes,
)
from support.random_miniature import write_miniature  # noqa: E402

LM_HEAD = "lm_head"
VISION = ["re:.*vision_backbone.*"]  # tower and connector
CALIBRATION = 4


def groups(bits: int, group_size: int | None = None) -> dict:
    """Weights alone, in whole rows or in groups; the miniature's rows of 192 are no multiple of the usual 128."""
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, **strategy)
    return {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}}


RECIPES = {
    "W8A16": lambda: QuantizationModifier(**groups(8), ignore=[LM_HEAD]),
    "W8A8": lambda: QuantizationModifier(targets="Linear", scheme="W8A8", ignore=[LM_HEAD]),
    "W4A16 by GPTQ": lambda: GPTQModifier(**groups(4, 64), ignore=[LM_HEAD, PATCH_EMBEDDING]),
}
# Layers that keep their weights, and the bytes of the saved weights, of those in float32, that are allowed.
LEFT_OUT = {
    "W8A16": ({LM_HEAD}, 0.3),
    "W8A8": ({LM_HEAD}, 0.3),
    "W4A16 by GPTQ": ({LM_HEAD, PATCH_EMBEDDING}, 0.21),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return native.to_transformers(native.CHECKPOINT, tmp_path_factory.mktemp("miniature") / "model")


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


def quantized_layers(model) -> set[str]:
    schemes = ((name, getattr(module, "quantization_scheme", None)) for name, module in model.named_modules())
    return {name for name, scheme in schemes if scheme is not None}


def calibration_rows(processor) -> list:
    """Questions about images, as the processor makes them."""
    rows = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*example.parts, {"type": "text", "text": example.question.text}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for example in examples(FRESH_SEED + 2, CALIBRATION)[:CALIBRATION]
    ]
    assert all("pixel_values" in row for row in rows)
    return rows


def calibration(processor) -> DataLoader:
    """`calibration_rows`, one a batch."""
    return DataLoader([dict(row) for row in calibration_rows(processor)], batch_size=None)


def quantize(model, recipe, **options):
    """`trust_remote_code_model`: it reads the configuration again, from the folder."""
    return oneshot(model=model, recipe=recipe, trust_remote_code_model=True, **options)


def stored_types(folder: Path) -> set[str]:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


def packed_layers(folder: Path) -> set[str]:
    """Layers that are stored as packed integers."""
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if file.get_slice(name).get_dtype() == "I32"]  # noqa: SIM118
    return {name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_from_start_to_saved_answers(name, folder, processor, asked, expected, tmp_path):
    options = {}
    if "GPTQ" in name:
        options = {
            "dataset": calibration(processor),
            "num_calibration_samples": CALIBRATION,
            "pipeline": "basic",
        }
    left_out, share = LEFT_OUT[name]
    every_layer = linear_layers(load(folder))
    assert len(every_layer) == 63
    model = quantize(load(folder), RECIPES[name](), **options)
    assert quantized_layers(model) == every_layer - left_out
    found = judge(processor, asked, answers(model, processor, asked))
    print(f"\n{version('llmcompressor')} | {name} | {len(quantized_layers(model))} layers | {summary(found)}")
    require_similar(found, expected, 0.1)

    model.save_pretrained(tmp_path, save_compressed=True)
    print(f"{weight_bytes(tmp_path)} of {weight_bytes(folder)} bytes, {stored_types(tmp_path)}")
    assert weight_bytes(tmp_path) <= share * weight_bytes(folder)
    assert stored_types(tmp_path) & {"I8", "I32"}
    again = load(tmp_path)
    assert again.config.quantization_config.quant_method == "compressed-tensors"
    assert type(again).__module__.startswith("transformers_modules.")
    assert quantized_layers(again) == quantized_layers(model)
    assert answers(again, processor, asked[::4]) == answers(model, processor, asked[::4])


def test_the_vision_part_is_left_out_by_its_name(folder):
    every_layer = linear_layers(load(folder))
    recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=[LM_HEAD, *VISION])
    found = quantized_layers(quantize(load(folder), recipe))
    assert found == {layer for layer in every_layer if layer.startswith("model.transformer.")}
    assert len(found) == 24


def test_groups_want_rows_of_whole_groups(folder):
    """The usual scheme has groups of 128; the layers that do not fit are named."""
    with pytest.raises(ValueError, match="not divisible by group_size") as error:
        quantize(load(folder), QuantizationModifier(targets="Linear", scheme="W4A16", ignore=[LM_HEAD]))
    assert f"{PATCH_EMBEDDING} (columns=588" in str(error.value)


def test_the_remote_code_has_to_be_allowed(folder):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        oneshot(model=load(folder), recipe=RECIPES["W8A16"]())


def test_layer_by_layer_calibration_is_refused(folder, processor):
    """It cuts the forward pass by tracing it; where this fails, docs/quantization.md has a caveat less."""
    with pytest.raises(ValueError, match="does not implement `forward`"):
        quantize(
            load(folder),
            RECIPES["W4A16 by GPTQ"](),
            dataset=calibration(processor),
            num_calibration_samples=CALIBRATION,
        )


def test_a_model_of_the_package_is_quantized_too(folder):
    """Loaded by `molmo2.load`, with the same names of layers."""
    model, _ = molmo2.load(folder)
    assert type(model).__module__ == "molmo2.model.modeling"
    assert len(quantized_layers(quantize(model, RECIPES["W8A16"]()))) == 62
    assert model.get_output_embeddings().weight.dtype == torch.float32


# --- the page's block, with groups of 128


# As in the published checkpoints, all rows but those of patches and of the tower's MLP are multiples of 128.
WIDTHS = {
    "text_config": {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256},
    "vit_config": {"hidden_size": 128, "head_dim": 32, "intermediate_size": 176},
    "adapter_config": {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "text_hidden_size": 128},
}
TOWER = "model.vision_backbone.image_vit."


def page_block() -> str:
    """The block of docs/quantization.md that uses llm-compressor."""
    text = (REPOSITORY / "docs" / "quantization.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"^```py\n(.*?)^```", text, re.M | re.S) if "llmcompressor" in block)
    return block


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("wide") / "model", sizes=WIDTHS)


def test_the_block_of_the_page_as_written(wide, tmp_path, monkeypatch):
    model, processor = molmo2.load(wide)
    every_layer, rows = linear_layers(model), calibration_rows(processor)
    with torch.no_grad():
        before = model(**rows[0]).logits
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "processor": processor, "rows": rows}
    exec(compile(page_block(), "quantization.md", "exec"), names)

    in_groups = {layer for layer in every_layer if layer != LM_HEAD and not layer.startswith(TOWER)}
    quantized = names["model"]
    assert quantized_layers(quantized) == in_groups
    for name in in_groups:
        layer = quantized.get_submodule(name)
        weights = layer.quantization_scheme.weights
        assert (weights.num_bits, weights.group_size) == (4, 128)
        assert layer.weight_scale.shape == (layer.out_features, layer.in_features // 128)
    assert (len(every_layer), len(in_groups)) == (69, 19)  # 7 of the connector, 12 of the text model

    with torch.no_grad():
        after = quantized(**rows[0]).logits
    saved = tmp_path / "Molmo2-4B-W4A16"
    assert packed_layers(saved) == in_groups
    again, again_processor = molmo2.load(saved)
    assert quantized_layers(again) == in_groups
    inputs = calibration_rows(again_processor)[0]
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, after, rtol=0, atol=1e-4)
    # 4 bits change the numbers, and not by much: without the quantised weights they would be others altogether.
    assert 0.01 < float((after - before).norm() / before.norm()) < 0.2


@pytest.mark.parametrize("name", ["Molmo2-4B", "Molmo2-8B", "Molmo2-O-7B"])
def test_groups_of_128_fit_the_published_checkpoints_but_for_the_tower(name):
    """By the shapes of their configurations; no weights are made."""
    config = Molmo2Config.from_dict(read_json(PUBLISHED / name / "config.json"))
    with torch.device("meta"):
        model = Molmo2ForConditionalGeneration(config)
    misfits = {
        layer: model.get_submodule(layer).in_features
        for layer in linear_layers(model)
        if model.get_submodule(layer).in_features % 128
    }
    assert all(layer.startswith(TOWER) for layer in misfits)
    assert set(misfits.values()) == {588, 4304}


def test_groups_of_128_fit_no_rows_of_the_tower(wide):
    """What the page says of the published checkpoints: their tower is left out because some of its rows do not fit."""
    model, _ = molmo2.load(wide)
    with pytest.raises(ValueError, match="not divisible by group_size") as error:
        quantize(model, QuantizationModifier(targets="Linear", scheme="W4A16", ignore=[LM_HEAD]))
    named = set(re.findall(r"(\S+) \(columns=", str(error.value)))
    assert named == {
        layer
        for layer in linear_layers(model)
        if layer == PATCH_EMBEDDING or (layer.startswith(TOWER) and layer.endswith("feed_forward.w2"))
    }
