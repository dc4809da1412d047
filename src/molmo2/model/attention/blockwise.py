"""Attention under a mask that never exists as a whole: blocks of queries, each with the keys that it may see.

A mask of S x S entries outgrows every activation of a long prompt (36,864 tokens: 1.4 GB as bool, 5.4 GB as numbers).
Here it stays a rule on small tables per token. Queries are taken in blocks; what the rule can allow is bounded block
by block from the tables (`plan_blocks`), and the part of the mask that a block needs is made when it is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from molmo2.model.attention.cpu import attends_by_products, attention_by_products, dense

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TokenTables:
    """What decides who may attend to whom, one entry per token. None: the same for all tokens.

    Attributes:
        is_real: (B, S) bool, False on padding.
        is_visual: (B, S) bool: these tokens see each other in both directions.
        example_ids: (B, S) int64: tokens see their own example only.
        branch_ids: (B, S) int64: 0 for the prefix that all branches of an example share; other branches are unseen.
    """

    is_real: Tensor | None = None
    is_visual: Tensor | None = None
    example_ids: Tensor | None = None
    branch_ids: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """The tables that are there, by name."""
        return {name: table for name, table in vars(self).items() if table is not None}

    def is_empty(self) -> bool:
        """Whether plain causality is all there is."""
        return not self.present()

    def to(self, device: torch.device) -> "TokenTables":
        return replace(self, **{name: table.to(device) for name, table in self.present().items()})

    def with_padding(self, is_real: Tensor) -> "TokenTables":
        return replace(self, is_real=is_real)


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


def allowed_pairs(tables: TokenTables) -> Rule:
    """The rule of this model: `(batch, head, query, key) -> bool` on index tensors that broadcast.

        (key <= query or (visual(query) and visual(key)))
        and example(query) == example(key) and branch(key) in (0, branch(query)) and real(key)

    Indices are columns of the sequence; keys past its end (an allocated cache) come after every query.
    """
    present = tables.present()
    length = next(iter(present.values())).shape[1] if present else 0

    def allowed(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        pair = kv_idx <= q_idx
        if not present:
            return pair
        query, key = torch.where(q_idx < length, q_idx, 0), torch.where(kv_idx < length, kv_idx, 0)
        if tables.is_visual is not None:
            query_visual = tables.is_visual[batch_idx, query] & (q_idx < length)
            pair = pair | (query_visual & (tables.is_visual[batch_idx, key] & (kv_idx < length)))
        if tables.example_ids is not None:
            pair = pair & (tables.example_ids[batch_idx, query] == tables.example_ids[batch_idx, key])
        if tables.branch_ids is not None:
            branch = tables.branch_ids[batch_idx, key]
            pair = pair & ((branch == 0) | (branch == tables.branch_ids[batch_idx, query]))
        if tables.is_real is not None:
            pair = pair & tables.is_real[batch_idx, key]
        return pair

    return allowed


@dataclass(frozen=True)
class _Range:
    """Smallest and largest entry of a table in each block of columns, both (B, blocks)."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, table: Tensor | None, batch: int, length: int, size: int, missing: int) -> "_Range":
        """Of an absent table, every entry is `missing`."""
        if table is None:
            table = torch.full((batch, length), missing)
        table = table.long().cpu()
        table = torch.cat((table, table[:, -1:].expand(-1, -length % size)), dim=1).unflatten(1, (-1, size))
        return cls(table.amin(-1), table.amax(-1))

    def overlaps(self) -> Tensor:
        """(B, query blocks, key blocks): some entry of one may equal some entry of the other."""
        return (self.low[:, :, None] <= self.high[:, None]) & (self.low[:, None] <= self.high[:, :, None])

    def equals(self) -> Tensor:
        """(B, query blocks, key blocks): all entries of both are equal."""
        return (self.low[:, :, None] == self.high[:, None]) & (self.high[:, :, None] == self.low[:, None])


def plan_blocks(tables: TokenTables, batch: int, first_query: int, length: int, size: int) -> tuple[QueryBlock, ...]:
    """Which keys each block of queries needs, from the smallest and largest entries of the tables in each block.

    Bounds may be generous (a mask where none was needed, a key block too many), never too small.

    Args:
        first_query: Columns before it are cached keys without queries.
        length: Columns of queries and keys together.
        size: Columns per block.
    """

    def span(table: Tensor | None, missing: int) -> _Range:
        return _Range.of(table, batch, length, size, missing)

    real, visual = span(tables.is_real, 1), span(tables.is_visual, 0)
    example, branch = span(tables.example_ids, 0), span(tables.branch_ids, 0)
    index = torch.arange(real.low.shape[1])
    earlier, same = index[:, None] > index, index[:, None] == index  # (query blocks, key blocks)
    both_visual = (visual.high[:, :, None] & visual.high[:, None]).bool()
    all_visual = (visual.low[:, :, None] & visual.low[:, None]).bool()
    shared, all_shared = (branch.low == 0)[:, None], (branch.high == 0)[:, None]
    possible = (earlier | same | both_visual) & example.overlaps() & (shared | branch.overlaps())
    possible = (possible & real.high.bool()[:, None]).any(0)
    certain = (earlier | all_visual) & example.equals() & (all_shared | branch.equals())
    certain = (certain & real.low.bool()[:, None]).all(0)
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

    `queries_per_block` bounds the working memory: prompts up to it have a mask in one piece, longer ones are computed
    in blocks of so many queries. The result does not depend on it.

    Args:
        tables: Entries for `length` columns.
        batch: Rows.
        first_query: Column of the first query; the columns before it are in the cache.
        length: Columns of cache and queries together; keys past it are ignored.
        device: Where the tables are.
    """

    queries_per_block = 512

    def __init__(self, tables: TokenTables, batch: int, first_query: int, length: int, device: torch.device):
        self.allowed = allowed_pairs(tables)
        self.batch = batch
        self.first_query = first_query
        self.device = device
        self.blocks = plan_blocks(tables, batch, first_query, length, self.queries_per_block)

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

    Args:
        query: (B, heads, S, head_dim).
        key, value: (B, key/value heads, keys, head_dim); keys past the end of the sequence are ignored.
        dropout: Probability of dropping a weight.
    Returns:
        (B, S, heads, head_dim).
    """
    shares_heads = query.shape[1] != key.shape[1]
    if shares_heads and query.device.type != "cpu":
        # Kernels that take a mask want as many key heads as query heads there.
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        shares_heads = False
    by_products = attends_by_products(query, key, value, dropout)
    if by_products:  # which wants them so: here once, not for each block
        key, value = dense(key), dense(value)

    def attend(block: QueryBlock, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if by_products:
            return attention_by_products(queries, keys, values, mask.part(block, queries.device), scaling)
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
