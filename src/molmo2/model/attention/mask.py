"""Which form the mask of a forward pass takes, and where tokens stand.

The rule itself is `molmo2.model.attention.blockwise.allowed_pairs`: text is causal, while all visual tokens of a sequence
see each other in both directions, across pictures and frames (training-time mask); packed examples do not see each
other. It applies where pictures and examples enter, in the prefill; later steps are causal and see everything before.

    sdpa, longer prompts                       the rule and small tables, computed block by block
    sdpa, up to one block, compiled; eager     (B, 1, S, keys) tensor, or None where plain causality is all
    flex_attention                             BlockMask
    flash attention                            padding only; passes that need the rule run under sdpa
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from molmo2.model.attention.blockwise import BlockwiseMask, TokenTables, allowed_pairs
from molmo2.model.compat import make_causal_mask
from molmo2.model.packing import PackedRows, examples_of_positions


def cached_length(past_key_values: Cache | None) -> int | Tensor:
    """Tokens already in the cache; a 0-d tensor from caches that keep the count on the device."""
    return 0 if past_key_values is None else past_key_values.get_seq_length()


def starts_sequence(query_length: int, past_key_values: Cache | None) -> bool:
    """Whether these queries are a prefill, where visual tokens see each other. One query alone has no other to see."""
    return query_length > 1 and bool(cached_length(past_key_values) == 0)


def require_empty_cache(past_key_values: Cache | None) -> None:
    """Packed rows begin with their examples; what a cache holds belongs to none of them."""
    past_length = int(cached_length(past_key_values))
    if past_length:
        raise ValueError(
            f"`example_ids` and `branch_ids` describe whole rows, but the cache holds {past_length} tokens already. "
            "Run packed rows in one pass, without `past_key_values`; generate from unpacked prompts."
        )


def token_tables(is_visual: Tensor | None, packed_rows: PackedRows | None) -> TokenTables:
    """What the rule needs of a prefill, padding aside."""
    if packed_rows is None:
        return TokenTables(is_visual=is_visual)
    has_branches = bool(packed_rows.branches.any())
    return TokenTables(
        is_visual=is_visual,
        example_ids=packed_rows.examples,
        branch_ids=packed_rows.branches if has_branches else None,
    )


def separated_by_positions(tables: TokenTables, position_ids: Tensor, batch: int) -> TokenTables:
    """Positions that restart mark packed examples, a convention of the library; (B, S), or (1, S) for all rows."""
    examples = examples_of_positions(position_ids)
    is_one_example = not torch.compiler.is_compiling() and not bool(examples.any())
    if is_one_example or tables.example_ids is not None:
        return tables
    return replace(tables, example_ids=examples.expand(batch, -1))


def attention_implementation(config: Any, wants_weights: bool, needs_rule: bool) -> str:
    """The implementation for one forward pass.

    Weights are only computed by eager attention. Flash attention takes no mask but padding, so a pass in which
    visual tokens see each other or examples are packed runs under sdpa; text-only prefills and all later steps stay
    with flash.
    """
    chosen = config._attn_implementation
    if chosen is None:
        chosen = "sdpa"
    if wants_weights:
        return "eager"
    if needs_rule and "flash" in chosen:
        return "sdpa"
    return chosen


def takes_blocks(implementation: str, query_length: int) -> bool:
    """Whether attention is computed block by block: under sdpa, where more than one block would be needed.

    Compiled and traced passes keep the tensor mask: the plan of blocks depends on the data.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return implementation == "sdpa" and query_length > BlockwiseMask.queries_per_block and not is_traced


def make_attention_mask(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    tables: TokenTables,
    implementation: str,
    cache_position: Tensor,
) -> Any:
    """The mask of one forward pass, in the form that `implementation` takes.

    Args:
        inputs_embeds: (B, S, ...) queries.
        attention_mask: None, (B, keys) with 0 on padding, or a mask made before (returned as it is).
        tables: What the rule needs besides padding, of a prefill; empty in later passes.
        cache_position: (S,) places of the queries.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is not None and len(attention_mask.shape) != 2:
        return attention_mask
    tables = tables.to(inputs_embeds.device)
    if takes_blocks(implementation, inputs_embeds.shape[1]):
        return _blockwise_mask(inputs_embeds, attention_mask, past_key_values, tables)
    if config._attn_implementation != implementation:
        config = copy.copy(config)
        config._attn_implementation_internal = implementation
    rule = None if tables.is_empty() else allowed_pairs(tables)
    return make_causal_mask(config, inputs_embeds, attention_mask, past_key_values, cache_position, rule)


def _blockwise_mask(
    inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, tables: TokenTables
) -> BlockwiseMask | None:
    """The rule with its tables, padding among them; None where plain causal attention is all there is to do."""
    batch, queries = inputs_embeds.shape[:2]
    first_query = int(cached_length(past_key_values))
    length = first_query + queries
    if attention_mask is not None and not bool(attention_mask.all()):
        tables = tables.with_padding(attention_mask.to(inputs_embeds.device)[:, :length].bool())
    if first_query == 0 and tables.is_empty():
        return None
    return BlockwiseMask(tables, batch, first_query, length, inputs_embeds.device)


def make_position_ids(attention_mask: Any, cache_position: Tensor, query_length: int) -> Tensor:
    """Positions counted over real tokens: left padding does not count.

    Args:
        attention_mask: (B, keys) with 0 on padding, one column for each place, those of queries and maybe of places
            that are not filled yet; otherwise the cache position is the position.
        cache_position: (S,) places of the queries.
    Returns:
        (B, S) or (1, S) int64; padding gets 0.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        counted = attention_mask.long().cumsum(dim=-1) - 1
        if counted.shape[1] == query_length:
            return counted.clamp(min=0)
        places = cache_position.to(counted.device).clamp(max=counted.shape[1] - 1)
        return counted.index_select(1, places).clamp(min=0)
    return cache_position[None]
