"""Sums, gathers and exchanges between processes that gradients flow through."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


class Ranks:
    """The processes that share one model: a group of torch.distributed, by default all processes.

    Attributes:
        group: The group.
        size, index: Its number of processes, and the place of this one.
    Raises:
        ValueError: torch.distributed has not been initialised.
    """

    def __init__(self, group: Any = None):
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "torch.distributed is not initialised: call `torch.distributed.init_process_group()` first, in "
                "processes that torchrun started."
            )
        self.group: Any = distributed.group.WORLD if group is None else group
        self.size, self.index = distributed.get_world_size(self.group), distributed.get_rank(self.group)

    def bounds(self, length: int) -> list[tuple[int, int]]:
        """The part (start, end) of a length for each process; the first parts are longer by one if need be."""
        whole, left = divmod(length, self.size)
        ends = [(index + 1) * whole + min(index + 1, left) for index in range(self.size)]
        return list(zip([0, *ends], ends))

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor, by `bounds`."""
        start, end = self.bounds(tensor.shape[dim])[self.index]
        return tensor.narrow(dim, start, end - start)

    def global_rank(self, index: int) -> int:
        """The rank among all processes of one of the group, as calls of torch.distributed name sources and targets."""
        return distributed.get_global_rank(self.group, index)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes; no gradient, and `tensor` itself is kept."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.group)
        return total

    def all_parts(self, part: Tensor, dim: int, sizes: list[int]) -> list[Tensor]:
        """The parts of all processes, which may differ in length along `dim`; no gradient."""
        shape = list(part.shape)
        shape[dim] = max(sizes)
        sent = part.new_zeros(shape)  # all send as much: not every backend takes unequal parts
        sent.narrow(dim, 0, part.shape[dim]).copy_(part.detach())
        received = [torch.empty_like(sent) for _ in sizes]
        distributed.all_gather(received, sent, group=self.group)
        return [each.narrow(dim, 0, size) for each, size in zip(received, sizes)]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, sums_value: bool, sums_gradient: bool) -> Tensor:
        ctx.ranks, ctx.sums_gradient = ranks, sums_gradient
        return ranks.sum(tensor) if sums_value else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return ctx.ranks.sum(gradient) if ctx.sums_gradient else gradient, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks, dim: int, sizes: list[int], sums_gradient: bool) -> Tensor:
        ctx.ranks, ctx.dim, ctx.sizes, ctx.sums_gradient = ranks, dim, sizes, sums_gradient
        return torch.cat(ranks.all_parts(part, dim, sizes), dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = ctx.ranks.sum(gradients[0]) if ctx.sums_gradient else gradients[0]
        start = sum(ctx.sizes[: ctx.ranks.index])
        return gradient.narrow(ctx.dim, start, ctx.sizes[ctx.ranks.index]), None, None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, sent: list[int], received: list[int]) -> Tensor:
        ctx.ranks, ctx.sent, ctx.received = ranks, sent, received
        output = tensor.new_empty(sum(received), *tensor.shape[1:])
        distributed.all_to_all_single(output, tensor.contiguous(), received, sent, group=ranks.group)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Exchange.apply(gradients[0], ctx.ranks, ctx.received, ctx.sent), None, None, None


def clip_to_norm(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> Tensor:
    """Scale gradients in place, so that their norm over all processes, which is `norm`, is at most `max_norm`.

    Returns:
        `norm`, that before.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the margin of torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(factor.to(gradient))
    return norm


def enter_parts(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A tensor that all processes have, as the input of parts: the gradient is the sum over the parts."""
    return _Sum.apply(tensor, ranks, False, True)


def leave_parts(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum of what the parts gave, for a continuation that is the same in all processes."""
    return _Sum.apply(tensor, ranks, True, False)


def sum_parts(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the processes, for continuations that differ: the gradient is a sum as well."""
    return _Sum.apply(tensor, ranks, True, True)


def gather_parts(part: Tensor, ranks: Ranks, dim: int, sizes: list[int], *, sums_gradient: bool) -> Tensor:
    """The parts of all processes side by side.

    Args:
        sizes: Length along `dim` of each process's part.
        sums_gradient: The continuations differ; otherwise they are the same in all processes.
    """
    return _Gather.apply(part, ranks, dim, sizes, sums_gradient)


def exchange(tensor: Tensor, ranks: Ranks, sent: list[int], received: list[int]) -> Tensor:
    """All to all: consecutive rows go to the processes in order.

    Args:
        tensor: (sum of `sent`, ...).
        sent, received: Rows to and from each process.
    Returns:
        (sum of `received`, ...), in the order of the processes.
    """
    return _Exchange.apply(tensor, ranks, sent, received)


def leave_group() -> None:
    """End the process group, if there is one: threads of a group that ends with its process may abort that."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
