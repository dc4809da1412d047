"""Tiny models made from seeds, against what transformers' native class computed for them: numbers for any machine.

Recorded by `support/record_native.py` on a release that has the native class; the golden checkpoints beside the
checkout hold more, and come from the original code.
"""

import functools

import pytest
import torch
from safetensors.torch import load_file

from support.generated import generated
from support.model_inputs import batch
from support.native_oracle import write_native
from support.record_native import BATCHES, FILE, NUM_LAST, NUM_NEW, RECORDED_SHAPES, numbers_of

TOLERANCE = 1e-4  # float32 on another machine
CLEAR_MARGIN = 5e-3  # greedy steps are comparable while the best token leads by at least this much
modeling = generated("modeling_molmo2")
RECORDED = load_file(FILE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Where the checkpoint of a shape lies."""
    return functools.cache(lambda shape: write_native(tmp_path_factory.mktemp("recorded"), shape))


def recorded(shape, name):
    start = f"{shape}/{name}/"
    return {key.removeprefix(start): value for key, value in RECORDED.items() if key.startswith(start)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "blockwise"])
@pytest.mark.parametrize("shape", RECORDED_SHAPES)
def test_recorded_numbers(checkpoint, shape, implementation, monkeypatch):
    attention = implementation
    if implementation == "blockwise":
        monkeypatch.setattr(modeling.BlockwiseMask, "queries_per_block", 7)
        attention = "sdpa"
    model = modeling.Molmo2ForConditionalGeneration.from_pretrained(
        checkpoint(shape), attn_implementation=attention, dtype=torch.float32
    ).eval()
    compared = 0
    for name, rows in BATCHES.items():
        inputs, expected = batch(*rows), recorded(shape, name)
        assert torch.equal(inputs["input_ids"], expected["input_ids"].long()), name
        real, found = inputs["attention_mask"].bool(), numbers_of(model, inputs)
        for key in ("logits", "logsumexp"):
            kept = real[:, -NUM_LAST:] if key == "logits" else real
            torch.testing.assert_close(found[key][kept], expected[key][kept], atol=TOLERANCE, rtol=0)
        assert torch.equal(found["argmax"][real], expected["argmax"][real])
        assert expected["logits"].std() > 0.5
        new = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None)
        new = new[:, inputs["input_ids"].shape[1] :]
        clear = (expected["margins"] >= CLEAR_MARGIN).long().cumprod(1).bool()
        compared += int(clear.sum())
        assert torch.equal(new[clear], expected["new"].long()[clear])
    assert compared >= 20
