"""The tiny golden checkpoints, loaded in the published layout: logits, loss, image features and greedy generation.

Tolerances are those of the recording: float32 on another machine. The set lies beside the checkout only (no weights in
git), so these tests skip without it; `test_recorded_models.py` has numbers for anywhere. All cases run under sdpa,
those chosen for their masks under every implementation; the rest is for the night: `-m nightly`.
"""

import functools
import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch

from support.generated import generated
from support.golden_cases import GoldenCase, model_cases, to_numpy

LOGIT_TOLERANCE = 1e-3
LOSS_TOLERANCE = 1e-4
HIDDEN_STATE_TOLERANCE = 2e-5  # relative to the largest value
CLEAR_MARGIN = 5e-3  # greedy steps are comparable while the best token leads by at least this much
PAD_TOKEN_ID, EOS_TOKEN_ID = 1000, 1002
BLOCKWISE = "blockwise"  # sdpa, in blocks of a few queries
IMPLEMENTATIONS = ("sdpa", BLOCKWISE, "eager", "flex_attention")
# Left padding, several images, images beside text, several frames; with and without a mask in the pooling.
CHOSEN = {
    "olmo3_98/batch_text_and_video_left_padded",
    "olmo3_98/text",
    "olmo3_98_square/batch_images_left_padded",
    "qwen2_98/batch_mixed_left_padded",
    "qwen2_98/video",
    "qwen3_98/batch_mixed_left_padded",
    "qwen3_98/batch_two_videos",
    "qwen3_98/three_images",
}

modeling = generated("modeling_molmo2")
CASES = model_cases()
pytestmark = pytest.mark.skipif(not CASES, reason="the golden checkpoints lie beside the checkout, and are not there")


@functools.lru_cache(maxsize=1)
def load_model(checkpoint: str, implementation: str) -> Any:
    attention = "sdpa" if implementation == BLOCKWISE else implementation
    return modeling.Molmo2ForConditionalGeneration.from_pretrained(checkpoint, attn_implementation=attention).eval()


@pytest.fixture(autouse=True)
def paths_on_and_off(request, monkeypatch):
    chosen = request.getfixturevalue("implementation") if "implementation" in request.fixturenames else "sdpa"
    if chosen == BLOCKWISE:
        monkeypatch.setattr(modeling.BlockwiseMask, "queries_per_block", 7)


@functools.lru_cache(maxsize=1)
def load_processor(checkpoint: str) -> Any:
    return generated("processing_molmo2").Molmo2Processor.from_pretrained(checkpoint)


def processed(case: GoldenCase) -> dict[str, torch.Tensor]:
    """What our processor makes of the texts and media of a case."""
    processor = load_processor(str(case.checkpoint))
    processor.tokenizer.padding_side = case.json["padding_side"]
    media = {kind: case.media(kind) for kind in ("images", "videos") if case.json.get(kind)}
    if "metadata" in case.json:
        media["video_metadata"] = case.json["metadata"]
    return dict(processor(text=case.json["text"], padding=True, return_tensors="pt", **media))


def recorded_inputs(case: GoldenCase) -> dict[str, torch.Tensor]:
    """Exactly the tensors that the original model was given, as the recorded checksums prove."""
    inputs = {}
    for name, recorded in case.json["inputs"].items():
        if f"input.{name}" in case.tensors:
            values = case.tensors[f"input.{name}"].astype(recorded["dtype"])
        else:
            values = recorded_pixels(case, name)
            assert hashlib.sha256(values.tobytes()).hexdigest() == recorded["sha256"]
        assert list(values.shape) == recorded["shape"]
        inputs[name] = torch.from_numpy(values)
    return inputs


def recorded_pixels(case: GoldenCase, name: str) -> np.ndarray:
    """Pixel values: stored as bytes, or rebuilt from the images with the stored rounding of values half-way."""
    if f"input.{name}_u8" in case.tensors:
        return pixel_values_of(case.tensors[f"input.{name}_u8"])
    values = to_numpy(processed(case)[name]).copy()
    values.reshape(-1)[case.tensors[f"input.{name}_tie_index"]] = pixel_values_of(case.tensors[f"input.{name}_tie_u8"])
    return values


def pixel_values_of(grey_levels: np.ndarray) -> np.ndarray:
    return (grey_levels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def recorded_outputs(case: GoldenCase, implementation: str) -> dict[str, np.ndarray]:
    """The recorded outputs that an implementation has to reproduce.

    The original's eager path forgets the mask of the pooling attention, so sdpa is the truth wherever there is one.
    """
    source = "eager" if implementation == "eager" and not has_pooling_mask(case) else "sdpa"
    return {key.split(".", 1)[1]: value for key, value in case.tensors.items() if key.startswith(f"{source}.")}


def has_pooling_mask(case: GoldenCase) -> bool:
    config = json.loads((case.checkpoint / "config.json").read_text(encoding="utf-8"))
    return config["adapter_config"]["pooling_attention_mask"]


def grouped(cases: list[GoldenCase]) -> list[Any]:
    """Parameters (case, implementation), ordered and grouped so that a worker loads each model once."""
    rows = sorted(
        ((case, implementation) for case in cases for implementation in IMPLEMENTATIONS),
        key=lambda row: (row[0].checkpoint.name, row[1]),
    )
    parameters = []
    for case, implementation in rows:
        marks = [pytest.mark.xdist_group(f"{case.checkpoint.name}-{implementation}")]
        if implementation == "flex_attention":
            marks.append(pytest.mark.slow)
        if implementation != "sdpa" and case.name not in CHOSEN:
            marks.append(pytest.mark.nightly)
        parameters.append(pytest.param(case, implementation, id=f"{case.name}-{implementation}", marks=marks))
    return parameters


def test_the_chosen_cases_exist():
    assert {case.name for case in CASES} >= CHOSEN


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_processor_makes_the_recorded_inputs(case):
    output = processed(case)
    assert sorted(output) == sorted(case.json["inputs"])
    for name, recorded in recorded_inputs(case).items():
        assert output[name].dtype == recorded.dtype
        if name.startswith("pixel_values"):
            off = (output[name] - recorded).abs()
            assert off.max() <= 2 / 255 + 1e-6  # one grey level, where rounding was half-way
            assert (off > 1e-5).float().mean() <= 0.01
        else:
            assert torch.equal(output[name], recorded), name


@pytest.mark.parametrize(("case", "implementation"), grouped(CASES))
@torch.no_grad()
def test_forward(case, implementation):
    model = load_model(str(case.checkpoint), implementation)
    inputs = recorded_inputs(case)
    labels = torch.from_numpy(case.tensors["labels"]).long()
    expected = recorded_outputs(case, implementation)

    outputs = model(**inputs, labels=labels)

    attended = case.tensors["input.attention_mask"].astype(bool)
    last = attended[:, -8:]
    logits = to_numpy(outputs.logits)
    np.testing.assert_allclose(logits[:, -8:][last], expected["last8_logits"][last], rtol=0, atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(
        to_numpy(outputs.logits.logsumexp(-1))[attended], expected["logsumexp"][attended], rtol=0, atol=LOGIT_TOLERANCE
    )
    np.testing.assert_array_equal(logits.argmax(axis=-1)[attended], expected["argmax"][attended])
    if attended.all():
        assert abs(outputs.loss.item() - expected["loss"].item()) <= LOSS_TOLERANCE
    if "image_hidden_states" in case.json:
        recorded = case.json["image_hidden_states"]
        features = to_numpy(outputs.image_hidden_states)
        assert list(features.shape) == recorded["shape"]
        sample = expected["image_hidden_states_sub"]
        limit = HIDDEN_STATE_TOLERANCE * np.abs(sample).max()
        np.testing.assert_allclose(features.reshape(-1)[:: recorded["stride"]], sample, rtol=0, atol=limit)


@pytest.mark.parametrize(("case", "implementation"), grouped(CASES))
@torch.no_grad()
def test_generate(case, implementation):
    model = load_model(str(case.checkpoint), implementation)
    inputs = recorded_inputs(case)
    expected = recorded_outputs(case, implementation)

    generated = model.generate(**inputs, max_new_tokens=case.json["max_new_tokens"], do_sample=False)

    new = to_numpy(generated[:, inputs["input_ids"].shape[1] :])
    new = np.pad(new, [(0, 0), (0, case.json["max_new_tokens"] - new.shape[1])], constant_values=PAD_TOKEN_ID)
    for ids, recorded, margins in zip(new, expected["generated"], expected["generated_margin"], strict=True):
        steps = comparable_steps(recorded, margins)
        assert ids[:steps].tolist() == recorded[:steps].tolist()


def comparable_steps(recorded: np.ndarray, margins: np.ndarray) -> int:
    """Number of greedy steps before the first one that rounding could decide; after the end token none can."""
    ends = np.flatnonzero(recorded == EOS_TOKEN_ID)
    undecided = np.flatnonzero(margins[: ends[0] + 1 if len(ends) else None] < CLEAR_MARGIN)
    return undecided[0] if len(undecided) else len(recorded)
