"""Attention on the CPU as two products per head: in float32 faster than torch's kernel, which multiplies with MKL."""

import torch
from torch import Tensor

from molmo2.model.linear import is_for_onednn, product

SCORES_AT_ONCE = 2**20  # they stay in the cache from one product to the next
FEWEST_QUERIES = 16  # fewer do not repay a call per head


def attends_by_products(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether `attention_by_products` can do it, and is wanted."""
    return (
        query.shape[2] >= FEWEST_QUERIES and not dropout and is_for_onednn(query, key) and is_for_onednn(query, value)
    )


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention, a few queries at a time.

    Args:
        query: (B, heads, Q, head_dim) float32.
        key, value: (B, key/value heads, K, head_dim) float32; consecutive query heads share one.
        mask: (B or 1, 1, Q or 1, K or more) bool, True = may attend; None where every pair is allowed.
        is_causal: Queries see no later keys; Q = K then.
    Returns:
        (B, heads, Q, head_dim); zeros for queries that see no key, as of torch's kernel.
    """
    batch, key_heads, keys, _ = key.shape
    key, value = dense(key), dense(value)
    queries = query.unflatten(1, (key_heads, -1)) * scaling
    attended = torch.empty_like(queries)
    count = max(FEWEST_QUERIES, SCORES_AT_ONCE // (queries.shape[2] * keys))
    hidden = None if mask is None else ~mask[..., :keys].expand(batch, 1, query.shape[2], keys)
    for start in range(0, query.shape[2], count):
        end = min(start + count, query.shape[2])
        seen = end if is_causal else keys
        later = torch.ones(end - start, seen, dtype=torch.bool).triu(start + 1) if is_causal else None
        for row in range(batch):
            for head in range(key_heads):
                scores = product(queries[row, head, :, start:end], key[row, head, :seen])
                blocked = later if hidden is None else hidden[row, :, start:end]
                if blocked is not None:
                    scores.masked_fill_(blocked, torch.finfo(scores.dtype).min)
                attended[row, head, :, start:end] = product(scores.softmax(dim=-1), value[row, head, :seen].t())
    if hidden is not None:
        attended.masked_fill_(hidden.all(dim=-1)[:, None, :, :, None], 0)
    return attended.flatten(1, 2)


def dense(states: Tensor) -> Tensor:
    """(B, heads, S, head_dim) with each matrix in one piece: oneDNN takes others too, a thousand times slower."""
    return states if states.stride()[2:] == (states.shape[3], 1) else states.contiguous()
