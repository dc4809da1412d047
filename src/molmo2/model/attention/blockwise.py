"""Attention under a mask that never exists as a whole: blocks of queries, each with the keys that it may see.

A mask of S x S entries outgrows every activation of a long prompt (36,864 tokens: 1.4 GB as bool, 5.4 GB as float32).
Here it stays an `AttentionSpec`, a few values per token. Queries are taken in blocks; which keys a block can see is
bounded from the smallest and largest of these values (`plan_blocks`), and the part of the mask that a block needs is
made when the block is computed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from molmo2.model.attention.mask import AttentionSpec, mask_mod


@dataclass(frozen=True)
class QueryBlock:
    """Queries that are computed together: columns `start` to `end` of the sequence.

    Attributes:
        first_key, last_key: Columns that one of the queries may see lie from the first up to, not including, the last.
        is_masked: Some of these pairs are forbidden.
    """

    start: int
    end: int
    first_key: int
    last_key: int
    is_masked: bool


def _may_be_equal(low: Tensor, high: Tensor) -> Tensor:
    """(B, query blocks, key blocks): some entry of one may equal some entry of the other; bounds are (B, blocks)."""
    return (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])


def _are_equal(low: Tensor, high: Tensor) -> Tensor:
    """(B, query blocks, key blocks): all entries of both are equal."""
    return (low[:, :, None] == high[:, None]) & (high[:, :, None] == low[:, None])


def plan_blocks(spec: AttentionSpec, batch: int, first_query: int, length: int, size: int) -> tuple[QueryBlock, ...]:
    """The keys that each block of queries needs, from the smallest and largest entries of the spec in each block.

    Bounds may be generous (a mask where none was needed, a key block too many), never too small.

    Args:
        first_query: Columns before it are cached keys without queries.
        length: Columns of queries and keys together.
        size: Columns per block.
    """

    def bounds(table: Tensor | None, missing: int) -> tuple[Tensor, Tensor]:
        """Smallest and largest entry of each block of columns, both (B, blocks); None is filled with `missing`."""
        table = torch.full((batch, length), missing) if table is None else table.long().cpu()
        table = torch.cat((table, table[:, -1:].expand(-1, -length % size)), dim=1).unflatten(1, (-1, size))
        return table.amin(-1), table.amax(-1)

    all_real, any_real = bounds(spec.is_real, 1)
    all_visual, any_visual = bounds(spec.is_visual, 0)
    example, branch = bounds(spec.example_ids, 0), bounds(spec.branch_ids, 0)
    index = torch.arange(all_real.shape[1])
    earlier, same = index[:, None] > index, index[:, None] == index  # (query blocks, key blocks)
    both_visual = (any_visual[:, :, None] & any_visual[:, None]).bool()
    both_all_visual = (all_visual[:, :, None] & all_visual[:, None]).bool()
    shared, all_shared = ((bound == 0)[:, None] for bound in branch)
    possible = (earlier | same | both_visual) & _may_be_equal(*example) & (shared | _may_be_equal(*branch))
    possible = (possible & any_real.bool()[:, None]).any(0)
    certain = (earlier | both_all_visual) & _are_equal(*example) & (all_shared | _are_equal(*branch))
    certain = (certain & all_real.bool()[:, None]).all(0)
    blocks = []
    for block in range(first_query // size, len(index)):
        keys = possible[block].nonzero()[:, 0].tolist() or [block]  # queries that are all padding see nothing
        first, last = keys[0], keys[-1] + 1
        start, end = max(block * size, first_query), min((block + 1) * size, length)
        is_masked = not bool(certain[block, first:last].all())
        blocks.append(QueryBlock(start, end, first * size, min(last * size, length), is_masked))
    return tuple(blocks)


class BlockwiseMask:
    """The mask of one forward pass, for `blockwise_attention`; shared by all layers.

    `queries_per_block` bounds the working memory: up to that many queries have a mask in one piece, more are computed
    in blocks of that size. The result does not depend on it.

    Args:
        spec: Entries for `length` columns.
        batch: Rows.
        first_query: Column of the first query; the columns before it are in the cache.
        length: Columns of cache and queries together; keys past it are ignored.
        device: Of the entries.
    """

    queries_per_block = 512

    def __init__(self, spec: AttentionSpec, batch: int, first_query: int, length: int, device: torch.device):
        self.allowed = mask_mod(spec)
        self.batch = batch
        self.first_query = first_query
        self.device = device
        self.blocks = plan_blocks(spec, batch, first_query, length, self.queries_per_block)

    def part(self, block: QueryBlock, device: torch.device) -> Tensor | None:
        """(B, 1, queries, keys) bool, True = may attend; None where every pair is allowed."""
        if not block.is_masked:
            return None
        batch_idx = torch.arange(self.batch, device=self.device)[:, None, None, None]
        q_idx = torch.arange(block.start, block.end, device=self.device)[:, None]
        kv_idx = torch.arange(block.first_key, block.last_key, device=self.device)
        mask = self.allowed(batch_idx, torch.zeros_like(batch_idx), q_idx, kv_idx)
        return mask.expand(self.batch, 1, -1, -1).to(device)


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockwiseMask, scaling: float, dropout: float
) -> Tensor:
    """Scaled dot-product attention, block after block; memory grows with S times the queries of a block.

    In training each block is computed again in the backward pass, so that no part of the mask is kept.

    Args: as `eager_attention`; keys past the end of the sequence are ignored. Returns (B, S, heads, head_dim).
    """
    shares_heads = query.shape[1] != key.shape[1]
    if shares_heads and query.device.type != "cpu":
        # Kernels that take a mask want as many key heads as query heads there.
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        shares_heads = False

    def attend(block: QueryBlock, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask.part(block, queries.device),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=shares_heads,
        )

    recomputes = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    parts = []
    for block in mask.blocks:
        queries = query[:, :, block.start - mask.first_query : block.end - mask.first_query]
        keys, values = (states[:, :, block.first_key : block.last_key] for states in (key, value))
        if recomputes:
            parts.append(checkpoint(attend, block, queries, keys, values, use_reentrant=False))
        else:
            parts.append(attend(block, queries, keys, values))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1)
