"""Context parallelism after Ulysses (Jacobs et al. 2023): each process holds a part of every row.

    distributed.init_process_group()        # in processes that torchrun started
    model = context_parallel(model)
    loss = model(**batch).loss              # of the same batch in all processes: the same loss in all of them
    loss.backward()                         # the average of the gradients, as DDP and FSDP2 take it, is that of one

A layer sees the tokens of its process. Around attention, an exchange gives each process some of the heads for all
tokens, and another one gives all heads for its own tokens back, so the mask is that of the whole row: visual tokens
see each other in both directions. Images are shared out by their tokens: a process encodes the crops that its share
of the tokens is pooled from.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import IterableDataset

from molmo2.model.loss import IGNORED, kept_label_fraction, shift_labels, weighted_loss
from molmo2.model.packing import packed_rows
from molmo2.training.collectives import Ranks, exchange, gather_parts, sum_parts

RANKS = "molmo2_context_ranks"  # attribute of a model whose rows are shared out
BUCKET_BYTES = 25 << 20  # of gradients that are averaged at once


def context_parallel(model: nn.Module, group: Any = None) -> nn.Module:
    """Let processes share the tokens of every row, and its crops, in training mode.

    All processes of the group must get the same batches. The loss is that of the whole batch, logits are those of the
    tokens in `local_tokens`. Gradients that DDP, FSDP2 or `average_gradients` averages over the group are those of one
    process. In evaluation mode nothing is shared, so each process may generate on its own.

    Args:
        model: `Molmo2ForConditionalGeneration`, with or without adapters and gradient checkpointing. Wrap or shard it
            afterwards.
        group: The processes that share rows, by default all.
    Returns:
        `model` itself.
    Raises:
        ValueError: torch.distributed is not initialised, heads cannot be shared out, or rows are shared already.
    """
    ranks = Ranks(group)
    whole: Any = model
    inner: Any = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # without PEFT's wrapper
    if hasattr(inner, RANKS):
        raise ValueError("The rows of this model are shared out already.")
    if ranks.size == 1:
        return model
    text, vision = inner.model.transformer, inner.model.vision_backbone
    for layer in text.blocks:
        _require_heads(layer.self_attn, ranks)

    def shared(own: Callable, otherwise: Callable) -> Callable:
        """What is done in training mode, and otherwise."""

        @functools.wraps(otherwise)
        def call(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs) if inner.training else otherwise(*args, **kwargs)

        return call

    for layer in text.blocks:
        attention = layer.self_attn
        attention.attend = shared(functools.partial(_attend, ranks, attention, attention.attend), attention.attend)
    arguments = text._layer_arguments
    text._layer_arguments = shared(functools.partial(_layer_arguments, ranks, arguments), arguments)
    text.emb_drop.register_forward_hook(
        shared(lambda _, __, states: ranks.part(states, 1), lambda _, __, states: None)
    )
    vision.forward = shared(functools.partial(_encode, ranks, vision.forward), vision.forward)
    inner.forward = shared(functools.partial(_forward, ranks, inner, inner.forward), inner.forward)
    setattr(inner, RANKS, ranks)
    return model


def local_tokens(length: int, group: Any = None) -> slice:
    """The columns of rows of this length that the process has under `context_parallel`."""
    ranks = Ranks(group)
    return slice(*ranks.bounds(length)[ranks.index])


def context_group(processes: int) -> Any:
    """The group of this process, if `processes` with neighbouring ranks share rows; all processes must call it.

    Raises:
        ValueError: torch.distributed is not initialised, or the number does not divide that of all processes.
    """
    ranks = Ranks()
    if processes < 1 or ranks.size % processes:
        raise ValueError(f"{ranks.size} process(es) cannot be divided into groups of {processes} that share rows.")
    groups = [list(range(first, first + processes)) for first in range(0, ranks.size, processes)]
    return [distributed.new_group(members) for members in groups][ranks.index // processes]


class RepeatedRows(IterableDataset):
    """Each batch of a stream of rows several times, so that accelerate gives it to each process of a `context_group`.

    Rows at the end that do not fill a batch are dropped: accelerate would fill it up from the copies that follow, and
    the processes of a group would get different rows.

    Args:
        rows: The stream.
        processes: Of a group.
        batch: Rows of a process in a forward pass.
    """

    def __init__(self, rows: Iterable[Any], processes: int, batch: int):
        self.rows, self.processes, self.batch = rows, processes, batch

    def __iter__(self) -> Iterator[Any]:
        rows = iter(self.rows)
        while len(own := list(itertools.islice(rows, self.batch))) == self.batch:
            for _ in range(self.processes):
                yield from own


def average_gradients(model: nn.Module, group: Any = None) -> None:
    """Average gradients over processes, where neither DDP nor FSDP does; all processes must call it."""
    ranks = Ranks(group)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in trained if parameter.grad is not None]):
        joined = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(joined, group=ranks.group)
        joined /= ranks.size
        for gradient, mean in zip(bucket, joined.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in runs of one kind, of `BUCKET_BYTES` or of one tensor: a message each, as for DDP."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        kind, num_bytes = (tensor.dtype, tensor.device), sum(each.nbytes for each in bucket)
        if bucket and (kind != (bucket[0].dtype, bucket[0].device) or num_bytes + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _require_heads(attention: Any, ranks: Ranks) -> None:
    heads, key_heads = attention.num_heads, attention.num_key_value_heads
    if heads % ranks.size or (key_heads % ranks.size and ranks.size % key_heads):
        raise ValueError(
            f"{ranks.size} processes cannot share {heads} heads with {key_heads} key heads: their number has to "
            "divide the heads, and to divide the key heads or be a multiple of them."
        )


# --- attention -------------------------------------------------------------------------------------------------------


def _layer_arguments(
    ranks: Ranks, arguments: Callable, inputs_embeds: Tensor, *args: Any
) -> tuple[dict, list[Tensor]]:
    """The mask of whole rows, the rotary tables of the process's tokens, and how many tokens each process has."""
    found, rotary = arguments(inputs_embeds, *args)
    parts = {id(table): ranks.part(table, 1) for table in rotary}
    lengths = [end - start for start, end in ranks.bounds(inputs_embeds.shape[1])]
    return {**found, "lengths": lengths}, [parts[id(table)] for table in rotary]


def _attend(
    ranks: Ranks,
    module: Any,
    attend: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    lengths: list[int],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of some heads over all tokens, between the two exchanges."""
    copies = max(1, ranks.size // key.shape[1])  # of key heads that several processes need
    if copies > 1:
        key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
    query, key, value = (_tokens_to_heads(states, ranks, lengths) for states in (query, key, value))
    groups = module.num_key_value_groups
    module.num_key_value_groups = query.shape[1] // key.shape[1]  # transformers' functions repeat keys by it
    try:
        attended, _ = attend(query, key, value, *args, **kwargs)
    finally:
        module.num_key_value_groups = groups
    return _heads_to_tokens(attended, ranks, lengths), None


def _tokens_to_heads(states: Tensor, ranks: Ranks, lengths: list[int]) -> Tensor:
    """(B, heads, own tokens, D) to (B, own heads, tokens, D)."""
    by_process = states.unflatten(1, (ranks.size, -1)).permute(1, 3, 0, 2, 4)  # process, own token, B, own head, D
    sent = [lengths[ranks.index]] * ranks.size
    return exchange(by_process.flatten(0, 1), ranks, sent, lengths).permute(1, 2, 0, 3)


def _heads_to_tokens(states: Tensor, ranks: Ranks, lengths: list[int]) -> Tensor:
    """(B, tokens, own heads * D) to (B, own tokens, heads * D)."""
    received = [lengths[ranks.index]] * ranks.size
    by_process = exchange(states.transpose(0, 1), ranks, lengths, received)  # process and own token, B, own heads * D
    return by_process.unflatten(0, (ranks.size, -1)).permute(2, 1, 0, 3).flatten(2)


# --- images and loss -------------------------------------------------------------------------------------------------


def _encode(ranks: Ranks, encode: Callable, pixel_values: Tensor, token_pooling: Tensor) -> Tensor:
    """The vectors of all tokens; each process encodes the crops that its share of the tokens is pooled from."""
    patches = pixel_values.shape[1]
    pooling = token_pooling.cpu()
    pooling = pooling[(pooling >= 0).any(-1)]
    if not len(pooling) or int(pooling.max()) >= len(pixel_values) * patches:
        return encode(pixel_values, token_pooling)  # nothing to share, or an error in all processes
    own = ranks.part(pooling, 0)
    if len(own):
        first = int(own[own >= 0].min()) // patches
        crops = pixel_values[first : int(own.max()) // patches + 1]
        vectors = encode(crops, torch.where(own >= 0, own - first * patches, own))
    else:  # takes part in the gradients of all parameters
        vectors = encode(pixel_values[:1], torch.zeros(1, 1, dtype=torch.int64))[:0]
    sizes = [end - start for start, end in ranks.bounds(len(pooling))]
    return gather_parts(vectors, ranks, 0, sizes, sums_gradient=True)


def _forward(
    ranks: Ranks,
    model: Any,
    forward: Callable,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    loss_weights: Tensor | None = None,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> Any:
    """Logits of the process's tokens, and the loss of the whole batch."""
    names = ("past_key_values", "cache", "output_attentions", "use_cache", "logits_to_keep")
    given = ((name, kwargs.get(name)) for name in names)  # neither tensors nor empty caches are False
    taken = [name for name, value in given if value is not None and not (isinstance(value, int) and value == 0)]
    if taken:
        raise ValueError(f"In training under `context_parallel` there is no `{taken[0]}`; call `model.eval()` first.")
    outputs = forward(input_ids, **{**kwargs, "use_cache": False, "return_dict": True})
    if labels is None:
        return outputs
    targets = model.learnable_labels(labels)
    packed = packed_rows(
        kwargs.get("attention_mask"), kwargs.get("example_ids"), kwargs.get("branch_ids"), labels.shape
    )
    shifted = shift_labels(targets, packed)
    divisor = num_items_in_batch
    if loss_weights is None:
        loss_weights = torch.ones_like(labels, dtype=torch.float32)
        if divisor is not None:
            divisor = divisor * kept_label_fraction(targets, labels)
    weights = nn.functional.pad(loss_weights[:, 1:], (0, 1))
    if divisor is None:
        divisor = (weights * (shifted != IGNORED).to(weights)).sum().clamp(min=torch.finfo(torch.float32).tiny)
    own = weighted_loss(outputs.logits, ranks.part(shifted, 1), ranks.part(weights, 1), divisor)
    outputs.loss = sum_parts(own, ranks)
    return outputs
