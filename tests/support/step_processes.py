"""One step of training in several processes, each with its own part of the batch.

    python step_processes.py OUTPUT RANK WORLD_SIZE MODE      (MODE: fsdp, ddp)

Each process writes its loss, process 0 the gradients and the updated weights too. They find one another through a file
in the output folder: a port that was free a moment ago may not be so any more. A process that waits for longer than
`SECONDS` writes where it stands and gives up.
"""

import faulthandler
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from molmo2.training import fsdp_config
from support.checkpoints import build_model
from support.training_cases import CONVERSATIONS, TREES, collate, example

# What each process reads. The second one sees no image at all, others have fewer crops than the first.
PARTS = (
    [[example(TREES["image"]), example(CONVERSATIONS["video"])], example(CONVERSATIONS["two images"])],
    [example(CONVERSATIONS["text"])],
    [example(CONVERSATIONS["two images"])],
    [example(CONVERSATIONS["text"]), example(CONVERSATIONS["video"])],
)
RATE = 0.05
SECONDS = 200


def number_of_labels(world_size: int) -> int:
    return sum(int((collate(part)["labels"] != -100).sum()) for part in PARTS[:world_size])


def sharded(model, mode: str):
    """The model as accelerate shards it, or in DDP."""
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    settings = fsdp_config()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"],
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=settings["transformer_layer_cls_to_wrap"],
        reshard_after_forward=True,
    )
    # An Accelerator offers FSDP where there are GPUs; its function that shards runs on any device.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=True,
    )
    return fsdp2_prepare_model(accelerator, model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(output: Path, rank: int, world_size: int, mode: str) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    meeting_point = (output / "rendezvous").as_uri()
    distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=world_size)
    model = build_model("qwen3").train()
    model.vision_backbone.crops_per_chunk = 2  # so that processes have unlike numbers of chunks
    wrapped = sharded(model, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    # Gradients are averaged over processes, hence the factor.
    loss = wrapped(**collate(PARTS[rank]), num_items_in_batch=number_of_labels(world_size) / world_size).loss
    loss.backward()
    gradients = {name: whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}
    optimizer.step()
    weights = {name: whole(value.detach()) for name, value in model.named_parameters()}
    units = [type(module).__name__ for module in model.modules() if type(module).__name__.startswith("FSDP")]
    report = {"loss": loss.detach(), "units": units}
    torch.save({**report, "gradients": gradients, "weights": weights} if rank == 0 else report, output / f"{rank}.pt")
    distributed.barrier()  # no process leaves while another one still reads from it
    distributed.destroy_process_group()
    os._exit(0)  # the step is what is tested, not how the threads of gloo and of autograd end


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
