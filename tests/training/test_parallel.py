"""One model over two or four processes has the losses, logits and gradients of one."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from molmo2.registration import load
from molmo2.training import Pipeline, RepeatedRows, context_parallel, full_state_dict, tensor_parallel
from molmo2.training.tensor_parallel import head_spans
from support.checkpoints import build_model, write_processor
from support.parallel_cases import ATTENTION, alone, cases, model_of
from support.paths import REPOSITORY
from support.ranks import run_ranks

PROGRAM = REPOSITORY / "tests" / "support" / "parallel_processes.py"


WANTED = {
    2: ("tensor:qwen3", "tensor:qwen2", "tensor:olmo3", "context:qwen3", "shards:qwen3", "pipeline:qwen3"),
    4: ("tensor:for four", "context:qwen3", "shards:qwen3", "pipeline:for four"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {count: tmp_path_factory.mktemp(f"processes_{count}") for count in WANTED}


@pytest.fixture(scope="module")
def reports(folders):
    """What each process found, by what they did, for a number of processes: they are started once."""
    return functools.cache(lambda count: in_processes(count, WANTED[count], folders[count]))


def in_processes(count: int, wanted: tuple[str, ...], folder: Path) -> dict[str, list[dict]]:
    found = run_ranks(PROGRAM, folder, count, wanted, seconds=320)
    return {each: [report[each] for report in found] for each in wanted}


def require_equal(found: dict, expected: dict) -> None:
    """Loss and gradients; where one process has none, as of a text for the vision backbone, several have zeros."""
    torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-5, rtol=1e-5)
    assert found["gradients"].keys() >= expected["gradients"].keys()
    for name, gradient in found["gradients"].items():
        own = expected["gradients"].get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, own, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: name + text)


def test_buckets_of_gradients(monkeypatch):
    module = sys.modules[context_parallel.__module__]
    monkeypatch.setattr(module, "BUCKET_BYTES", 100)
    sizes = {torch.float32: (10, 15, 40, 5), torch.bfloat16: (4, 60)}
    gradients = [torch.zeros(size, dtype=dtype) for dtype, own in sizes.items() for size in own]
    found = [[len(gradient) for gradient in bucket] for bucket in module._buckets([*gradients, torch.zeros(1)])]
    assert found == [[10, 15], [40], [5], [4], [60], [1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "family"), [(2, "qwen3"), (2, "qwen2"), (2, "olmo3"), (4, "for four")], ids=lambda value: str(value)
)
def test_tensor_parallel(count, family, reports, folders):
    """Grouped-query attention, norms per head and over all heads, biases; in four processes key heads are shared."""
    own = reports(count)[f"tensor:{family}"]
    expected = alone(family)
    for report in own:
        for name in cases():
            require_equal(report[name], expected[name])
            torch.testing.assert_close(report[name]["logits"], expected[name]["logits"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(report["norms"][0], expected["norm"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(report["norms"][1], torch.tensor(0.5), atol=1e-5, rtol=1e-5)
        assert report["generated"].equal(expected["generated"])
        assert report["weights"].keys() == expected["weights"].keys()
        assert all(report["weights"][name].equal(tensor) for name, tensor in expected["weights"].items())
    errors = [report["refused"] for report in own]
    assert "config.json/folder" in errors[0]
    assert errors[1:] == [f"RuntimeError: The first process could not save the model: {errors[0]}"] * (count - 1)
    assert all("has no `tp_plan`" in report["without a plan"] for report in own)  # docs/training.md says so
    whole = sum(tensor.numel() for tensor in expected["weights"].values())
    assert max(report["held"] for report in own) < whole * (1.2 / count + 0.1)
    again, _ = load(write_processor(folders[count] / family))
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in expected["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_context_parallel(count, reports):
    """Rows that do not divide; in four processes key heads are needed by two. Every process generates on its own."""
    found = reports(count)["context:qwen3"]
    expected = alone("qwen3")
    for attention in ATTENTION:
        for name, batch in cases().items():
            covered = []
            for report in found:
                own = report[f"{attention}, {name}"]
                require_equal(own, expected[name])
                columns = range(*own["own"])
                covered += columns
                torch.testing.assert_close(own["logits"], expected[name]["logits"][:, columns], atol=1e-4, rtol=1e-4)
            assert covered == list(range(batch["input_ids"].shape[1]))
    assert all(report["generated"].equal(expected["generated"]) for report in found)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_rows_are_shared_under_fsdp(count, reports):
    expected = alone("qwen3")
    for report in reports(count)["shards:qwen3"]:
        for name in cases():
            require_equal(report[name], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "family"), [(2, "qwen3"), (4, "for four")])
def test_pipeline(count, family, reports):
    """Images, trees and text in a step of several batches; each stage has the gradients of its own layers."""
    stages = reports(count)[f"pipeline:{family}"]
    expected = alone(family)
    for name in (*cases(), "step"):
        joined = {key: gradient for report in stages for key, gradient in report[name]["gradients"].items()}
        assert sum(len(report[name]["gradients"]) for report in stages) == len(joined)
        for report in stages:
            require_equal({"loss": report[name]["loss"], "gradients": joined}, expected[name])
        if name != "step":
            torch.testing.assert_close(stages[-1][name]["logits"], expected[name]["logits"], atol=1e-4, rtol=1e-4)
    for report in stages:
        torch.testing.assert_close(report["norms"][0], expected["norm"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(report["norms"][1], torch.tensor(0.5), atol=1e-5, rtol=1e-5)
        assert report["weights"].keys() == expected["weights"].keys()
        assert all(report["weights"][name].equal(tensor) for name, tensor in expected["weights"].items())
        assert report["refused"] == "This process holds some of the layers only: save `pipeline.full_state_dict()`."


def test_the_pipeline_plan_of_transformers():
    """The pieces in order, by names of modules; before transformers 5 a model forgets that of its own class."""
    model = build_model("qwen3")
    plan = [f"model.transformer.{name}" for name in ("wte", "blocks", "ln_f")]
    assert [name for name in model._pp_plan if name != "lm_head"] == plan
    assert list(model.model.transformer._pp_plan) == ["wte", "blocks", "ln_f"]
    assert list(type(model)._pp_plan) == ["lm_head"]
    assert all(model.get_submodule(name) is not None for name in [*plan, "lm_head"])


# --- what must be refused --------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """A group of this process alone, which counts itself as one of several: enough for what is refused."""
    init = (tmp_path / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    yield lambda count: monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: count)
    torch.distributed.destroy_process_group()


def with_dropout(model):
    model.config.text_config.residual_dropout = 0.1
    return model


def with_another_layer(model):
    model.model.transformer.blocks[1].mlp.ff_out = torch.nn.Identity()
    return model


class PackedWeight(torch.Tensor):
    """As torchao has them: a layer that is still nn.Linear, with a weight of another class."""


def with_packed_weight(model):
    layer = model.model.transformer.blocks[1].mlp.ff_out
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(PackedWeight))
    return model


@pytest.mark.parametrize(
    ("count", "prepare", "message"),
    [
        (4, build_model, "resblocks.0.attention has 3 query heads and 3 key heads, which 4 processes cannot share"),
        (2, lambda name: with_dropout(build_model(name)), "set {'residual_dropout': 0.1} to 0"),
        (2, lambda name: with_another_layer(build_model(name)), "blocks.1.mlp.ff_out' is a Identity; expected nn.Lin"),
        (2, lambda name: with_packed_weight(build_model(name)), "blocks.1.mlp.ff_out.weight' is a PackedWeight; expe"),
        (2, lambda _: torch.nn.Linear(2, 2), "Nothing to cut was found in a Linear"),
    ],
)
def test_models_that_cannot_be_cut(count, prepare, message, one_process):
    model = prepare("qwen3")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one_process(count)
    with pytest.raises(ValueError, match=re.escape(message)):
        tensor_parallel(model)
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())  # nothing was changed


def test_what_a_model_in_parts_refuses(one_process):
    one_process(2)
    model = tensor_parallel(build_model("qwen3"))
    with pytest.raises(ValueError, match="cut over processes already"):
        tensor_parallel(model)
    with pytest.raises(ValueError, match="resize it before `tensor_parallel`"):
        model.resize_token_embeddings(2000)
    with pytest.raises(ValueError, match=r"call `tensor_parallel\(model\)` first"):
        full_state_dict(build_model("qwen3"))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.blocks.0.self_attn", "att_proj"),
        ("transformer.blocks.0.self_attn", "attn_out"),
        ("transformer.blocks.0.mlp", "ff_out"),
        ("vision_backbone.image_pooling_2d", "wo"),
        ("vision_backbone.image_projector", "w2"),
    ],
)
def test_layers_that_were_replaced_after_cutting(name, layer, one_process):
    """As by adapters, whose sum over the processes would not be taken."""
    one_process(2)
    model = tensor_parallel(build_model("qwen3"))
    module = model.model.get_submodule(name)
    setattr(module, layer, torch.nn.Sequential(getattr(module, layer)))
    with pytest.raises(ValueError, match=f"'{layer}' of a {type(module).__name__} became a Sequential after"):
        module(torch.zeros(1, 2, 40))


@pytest.mark.parametrize(("count", "family"), [(2, "qwen3"), (4, "for four")])
def test_frozen_parts_are_cut(count, family, one_process):
    """Norms of heads, whose gradients are sums, and in four processes shared keys: none of them wants a gradient."""
    one_process(count)
    model = model_of(family)
    model.model.transformer.requires_grad_(False)
    cut = tensor_parallel(model)
    assert not any(parameter.requires_grad for parameter in cut.model.transformer.parameters())
    assert all(parameter.requires_grad for parameter in cut.model.vision_backbone.parameters())
    with pytest.raises(ValueError, match="cut over processes already"):
        tensor_parallel(model)


def test_rows_that_do_not_fill_a_batch_are_dropped():
    """Else processes of a group would get different rows."""
    assert list(RepeatedRows(range(5), processes=2, batch=2)) == [0, 1, 0, 1, 2, 3, 2, 3]


def test_rows_that_cannot_be_shared(one_process):
    one_process(3)
    with pytest.raises(ValueError, match="3 processes cannot share 4 heads with 2 key heads"):
        context_parallel(build_model("qwen3"))
    one_process(2)
    model = context_parallel(build_model("qwen3")).train()
    with pytest.raises(ValueError, match="shared out already"):
        context_parallel(model)
    refused = {
        "use_cache": True,
        "past_key_values": DynamicCache(),
        "cache": DynamicCache(),
        "logits_to_keep": torch.tensor([0, 1]),
    }
    for name, value in refused.items():
        with pytest.raises(ValueError, match=re.escape(f"there is no `{name}`; call `model.eval()` first")):
            model(torch.zeros(1, 2, dtype=torch.int64), **{name: value})


def test_layers_of_a_pipeline_add_up(one_process):
    with pytest.raises(ValueError, match=r"`layers` is \[2\]; expected a positive number for each of 1 process"):
        Pipeline(build_model("qwen3"), layers=[2])


def test_a_model_in_a_pipeline_is_not_called_directly(one_process):
    pipeline = Pipeline(build_model("qwen3"))
    batch = cases()["weighted"]
    for _ in range(2):
        for call in (pipeline.model, pipeline.model.model):
            with pytest.raises(ValueError, match=re.escape("call `pipeline.forward` or `pipeline.forward_backward`")):
                call(input_ids=batch["input_ids"])
        with pytest.raises(ValueError, match=re.escape("from `pipeline.full_state_dict()` to generate")):
            pipeline.model.generate(input_ids=batch["input_ids"])
        assert pipeline.forward(batch)[1].loss > 0  # and it refuses afterwards as well


def test_a_group_of_processes_is_needed():
    with pytest.raises(ValueError, match="is not initialised: call"):
        tensor_parallel(build_model("qwen3"))


@pytest.mark.parametrize(
    ("heads", "key_heads", "processes", "queries", "keys"),
    [
        (8, 4, 2, ["0-4", "4-8"], ["0-2", "2-4"]),
        (6, 3, 2, ["0-4", "4-6"], ["0-2", "2-3"]),
        (8, 2, 4, ["0-2", "2-4", "4-6", "6-8"], ["0-1", "0-1", "1-2", "1-2"]),
    ],
)
def test_heads_of_each_process(heads, key_heads, processes, queries, keys):
    found = head_spans(heads, key_heads, processes, "attention")
    assert [[f"{start}-{end}" for ((start, end),) in spans] for spans in found] == [queries, keys]
