"""One model over several processes: what each of them finds for the same batch.

    python parallel_processes.py OUTPUT RANK WORLD_SIZE MODE:FAMILY [MODE:FAMILY ...]

The processes find one another through a file in the output folder; each writes its report there. One that waits for
longer than `SECONDS` writes where it stands and gives up.
"""

import faulthandler
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import distributed

from molmo2.model.attention.blockwise import BlockwiseMask
from molmo2.training.context_parallel import average_gradients, context_parallel, local_tokens
from molmo2.training.pipeline import Pipeline
from molmo2.training.tensor_parallel import clip_gradients, full_gradients, full_state_dict, tensor_parallel
from support.parallel_cases import ATTENTION, cases, generated, gradients_of, model_of
from support.step_processes import sharded, whole

SECONDS = 300


def in_tensor_parallel(family: str, saved: Path) -> dict:
    model = tensor_parallel(model_of(family))
    found = {}
    for name, batch in cases().items():
        model.zero_grad()
        result = model(**batch)
        result.loss.backward()
        found[name] = {"loss": result.loss.detach(), "logits": result.logits.detach()}
        found[name]["gradients"] = full_gradients(model)
    found["norms"] = [clip_gradients(model, 0.5), clip_gradients(model, 0.5)]
    found["weights"] = full_state_dict(model)
    found["generated"] = generated(model)
    try:
        model.save_pretrained(saved, True, model.state_dict())  # the third one is `state_dict`
        model.save_pretrained(saved / "config.json" / "folder")  # a file
    except (RuntimeError, OSError) as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    try:
        type(model).from_pretrained(saved, tp_plan="auto")
    except ValueError as error:
        found["without a plan"] = str(error)
    found["held"] = sum(parameter.numel() for parameter in model.parameters())
    return found


def in_context_parallel(family: str, saved: Path) -> dict:
    model = context_parallel(model_of(family))
    found: dict = {"generated": generated(model)}
    model.train()
    for attention, blocks in ATTENTION.items():
        model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        BlockwiseMask.queries_per_block = blocks
        if attention == "checkpointed":
            model.gradient_checkpointing_enable()
        for name, batch in cases().items():
            model.zero_grad()
            result = model(**batch)
            result.loss.backward()
            average_gradients(model)
            own = local_tokens(batch["input_ids"].shape[1])
            found[f"{attention}, {name}"] = {
                "loss": result.loss.detach(),
                "logits": result.logits.detach(),
                "own": (own.start, own.stop),
                "gradients": gradients_of(model),
            }
    return found


def in_shards(family: str, saved: Path) -> dict:
    """Rows that processes share, with FSDP2, which averages gradients."""
    model = context_parallel(model_of(family))
    wrapped, found = sharded(model, "fsdp"), {}
    for name, batch in cases().items():
        wrapped.zero_grad()
        loss = wrapped(**batch).loss
        loss.backward()
        gradients = {key: whole(each.grad) for key, each in model.named_parameters() if each.grad is not None}
        found[name] = {"loss": loss.detach(), "gradients": gradients}
    return found


def in_pipeline(family: str, saved: Path) -> dict:
    pipeline = Pipeline(model_of(family))
    found: dict = {}
    for name, batch in cases().items():
        pipeline.model.zero_grad()
        loss = pipeline.forward_backward([batch])
        found[name] = {"loss": loss, "gradients": gradients_of(pipeline.model)}
        with torch.no_grad():
            result = pipeline.forward(batch)[1]
        if pipeline.is_last:
            found[name]["logits"] = result.logits
    found["norms"] = [pipeline.clip_gradients(0.5), pipeline.clip_gradients(0.5)]
    pipeline.model.zero_grad()
    loss = pipeline.forward_backward(list(cases().values()), num_items_in_batch=100.0)
    found["step"] = {"loss": loss, "gradients": gradients_of(pipeline.model)}
    found["weights"] = pipeline.full_state_dict()
    try:
        pipeline.model.save_pretrained(saved)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def main(output: Path, rank: int, world_size: int, wanted: list[str]) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    meeting_point = (output / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=world_size)
    report = {}
    for each in wanted:
        mode, _, family = each.partition(":")
        report[each] = MODES[mode](family, output / family)
    torch.save(report, output / f"{rank}.pt")
    distributed.barrier()  # no process leaves while another one still reads from it
    distributed.destroy_process_group()
    os._exit(0)


MODES = {
    "tensor": in_tensor_parallel,
    "context": in_context_parallel,
    "shards": in_shards,
    "pipeline": in_pipeline,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
