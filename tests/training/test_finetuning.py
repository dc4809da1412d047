"""Parts of the model: frozen, with rates of their own, with adapters, and sharded over processes."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from molmo2.training import LearningRates, freeze, fsdp_config, lora_targets, parameter_groups, unfreeze
from molmo2.training.finetuning import FSDP_UNITS, LORA_TARGETS, PARTS, part_from_name
from support.checkpoints import FAMILIES, build_model
from support.fresh_process import run
from support.paths import REPOSITORY
from support.ranks import run_ranks
from support.training_cases import CONVERSATIONS, collate, example, gradients


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build_model(request.param)


@pytest.fixture(scope="module")
def qwen3():
    return build_model("qwen3")


@pytest.fixture(scope="module")
def inputs():
    return collate([example(CONVERSATIONS["image"]), example(CONVERSATIONS["video"])])


def names_of(model, part: str) -> set[str]:
    modules = {
        "vision": ["model.vision_backbone.image_vit"],
        "connector": ["model.vision_backbone.image_pooling_2d", "model.vision_backbone.image_projector"],
        "text": ["model.transformer", "lm_head"],
    }[part]
    return {f"{module}.{name}" for module in modules for name, _ in model.get_submodule(module).named_parameters()}


def test_every_parameter_is_in_one_part(model):
    names = {name for name, _ in model.named_parameters()}
    parts = {part: {name for name in names if part_from_name(name) == part} for part in PARTS}
    assert parts == {part: names_of(model, part) for part in PARTS}
    assert set().union(*parts.values()) == names


@pytest.mark.parametrize("frozen", [("vision",), ("text",), ("vision", "connector"), ("vision", "text")])
def test_frozen_parts_get_no_gradients(qwen3, inputs, frozen):
    model = copy.deepcopy(qwen3)
    freeze(model, *frozen)
    _, found = gradients(model, inputs)
    assert set(found) == set().union(*(names_of(model, part) for part in PARTS if part not in frozen))
    _, everything = gradients(qwen3, inputs)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, everything[name], atol=1e-6, rtol=1e-4)
    unfreeze(model, *frozen)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parts_that_do_not_exist(qwen3):
    for act in (partial(freeze, qwen3), partial(unfreeze, qwen3), lora_targets):
        with pytest.raises(ValueError, match=r"Parts of the model are \['vision', .*found \['audio'\]"):
            act("audio")
    with pytest.raises(ValueError, match="found none"):
        freeze(qwen3)


def test_each_part_has_its_rate(qwen3, inputs):
    model = copy.deepcopy(qwen3)
    rates = LearningRates(vision=1e-3, connector=2e-3, text=4e-3)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, rates))
    model(**inputs).loss.backward()
    optimizer.step()
    for name, value in model.named_parameters():
        expected = before[name] - getattr(rates, part_from_name(name)) * value.grad
        torch.testing.assert_close(value.detach(), expected, atol=1e-7, rtol=1e-6)


def test_groups_hold_what_is_trained(qwen3):
    model = copy.deepcopy(qwen3)
    freeze(model, "text")
    groups = parameter_groups(model)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("vision", 5e-6, 0.0),
        ("connector", 5e-6, 0.0),
    ]
    assert sum(len(group["params"]) for group in groups) == len(
        names_of(model, "vision") | names_of(model, "connector")
    )


# --- adapters --------------------------------------------------------------------------------------------------------


def linear_modules(model, part: str) -> set[str]:
    """Linear layers inside the layers of a part: neither the output matrix nor the embedding of patches."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_from_name(name) == part
        and not name.endswith(("lm_head", "patch_embedding"))
    }


@pytest.mark.parametrize("parts", [("text",), ("connector",), ("vision",), ("text", "connector"), ()])
def test_targets_of_adapters(model, parts):
    pattern = re.compile(lora_targets(*parts))
    found = {name for name, _ in model.named_modules() if pattern.fullmatch(name)}
    assert found == set().union(*(linear_modules(model, part) for part in parts or PARTS))


def test_every_published_name_is_a_target(qwen3):
    names = {
        "text": "att_proj attn_out ff_proj ff_out",
        "connector": "wq wk wv wo w1 w2 w3",
        "vision": "wq wk wv wo w1 w2",
    }
    for part, expected in names.items():
        assert {name.rpartition(".")[2] for name in linear_modules(qwen3, part)} == set(expected.split())
        assert all(re.search(rf"\b{name}\b", LORA_TARGETS[part]) for name in expected.split())


@pytest.mark.parametrize("parts", [("text",), ("connector",), ("vision",), ()])
def test_adapters_are_trained_and_nothing_else(qwen3, inputs, parts, tmp_path):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(qwen3)
    expected_logits = model(**inputs).logits.detach()
    config = peft.LoraConfig(r=2, target_modules=lora_targets(*parts), init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    wanted = set().union(*(linear_modules(qwen3, part) for part in parts or PARTS))
    assert set(adapted.targeted_module_names) == wanted
    adapted(**inputs).loss.backward()
    trained = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert len(trained) == 2 * len(wanted)
    assert all(".lora_" in name for name in trained)
    assert {group["name"] for group in parameter_groups(model)} == set(parts or PARTS)

    logits = adapted.eval()(**inputs).logits.detach()
    assert not torch.allclose(logits, expected_logits, atol=1e-2)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(qwen3), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits.detach(), logits)
    again = again.double()  # merging rounds, and adapters this large pass that on
    logits = again(**inputs).logits.detach()
    torch.testing.assert_close(again.merge_and_unload()(**inputs).logits.detach(), logits)


# --- several processes -----------------------------------------------------------------------------------------------


def test_the_trainer_shards_with_fsdp2_and_saves_whole_checkpoints(qwen3, tmp_path):
    """In the environment that `docs/training.md` gives for releases before 5.17."""
    needed = {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    env = needed if Version(transformers.__version__) < Version("5.17") else None
    found = run("fsdp_plugin", tmp_path, env=env, output=tmp_path / "out", settings=fsdp_config())
    assert found == {"version": 2, "state_dict": "FULL_STATE_DICT", "units": list(FSDP_UNITS)}


def in_processes(mode: str, folder: Path, count: int) -> list[dict]:
    """What each process reports after one step."""
    return run_ranks(REPOSITORY / "tests" / "support" / "step_processes.py", folder, count, (mode,), seconds=240)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count"), [("fsdp", 2), ("ddp", 2), ("fsdp", 4), ("ddp", 4)])
def test_several_processes_take_the_step_of_one(mode, count, tmp_path):
    """The first reads packed rows, trees and clips in several chunks, the second a line of text, others more."""
    from support.step_processes import PARTS as ROWS
    from support.step_processes import RATE, number_of_labels

    reports = in_processes(mode, tmp_path, count)
    alone = build_model("qwen3").train()
    losses = [alone(**collate(part), num_items_in_batch=number_of_labels(count)).loss for part in ROWS[:count]]
    sum(losses).backward()
    for report, loss in zip(reports, losses, strict=True):
        torch.testing.assert_close(report["loss"] / count, loss.detach(), atol=1e-5, rtol=1e-5)
    layers = alone.config.text_config.num_hidden_layers
    assert len(reports[0]["units"]) == (layers + 1 if mode == "fsdp" else 0)  # text layers, and all the rest
    expected = dict(alone.named_parameters())
    assert reports[0]["weights"].keys() == expected.keys()
    assert reports[0]["gradients"].keys() == {name for name, value in expected.items() if value.grad is not None}
    for name, value in expected.items():
        gradient = reports[0]["gradients"].get(name)
        if gradient is not None:
            torch.testing.assert_close(gradient, value.grad, atol=2e-5, rtol=1e-3, msg=lambda t, n=name: n + t)
            value = value - RATE * value.grad
        torch.testing.assert_close(reports[0]["weights"][name], value.detach(), atol=2e-6, rtol=1e-4)
