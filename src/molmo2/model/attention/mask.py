"""Who may attend to whom, as a function of ids, and where tokens stand.

Text is causal, while all visual tokens of a sequence see each other in both directions, across images and frames (the
mask that the published models were trained with); packed examples do not see each other. Visual tokens and examples
enter in the prefill; later steps are causal and see everything before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) indices to bool


@dataclass(frozen=True)
class AttentionSpec:
    """What decides which keys a query may see, one entry per token. None: the same for all tokens.

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

    def given(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        return {name: entries for name, entries in vars(self).items() if entries is not None}

    def is_empty(self) -> bool:
        """Whether the mask is plainly causal."""
        return not self.given()

    def to(self, device: torch.device) -> "AttentionSpec":
        return replace(self, **{name: entries.to(device) for name, entries in self.given().items()})


def mask_mod(spec: AttentionSpec) -> MaskMod:
    """The mask as a function of index tensors that broadcast, as flex_attention takes it; True = may attend.

        (key <= query or (visual(query) and visual(key)))
        and example(query) == example(key) and branch(key) in (0, branch(query)) and real(key)

    Indices are columns of the sequence; keys past its end (an allocated cache) come after every query.
    """
    given = spec.given()
    length = next(iter(given.values())).shape[1] if given else 0

    def allowed(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        pair = kv_idx <= q_idx
        if not given:
            return pair
        query, key = torch.where(q_idx < length, q_idx, 0), torch.where(kv_idx < length, kv_idx, 0)
        if spec.is_visual is not None:
            query_visual = spec.is_visual[batch_idx, query] & (q_idx < length)
            pair = pair | (query_visual & (spec.is_visual[batch_idx, key] & (kv_idx < length)))
        if spec.example_ids is not None:
            pair = pair & (spec.example_ids[batch_idx, query] == spec.example_ids[batch_idx, key])
        if spec.branch_ids is not None:
            branch = spec.branch_ids[batch_idx, key]
            pair = pair & ((branch == 0) | (branch == spec.branch_ids[batch_idx, query]))
        if spec.is_real is not None:
            pair = pair & spec.is_real[batch_idx, key]
        return pair

    return allowed


def cached_length(past_key_values: Cache | None) -> int | Tensor:
    """Tokens already in the cache; a 0-d tensor from caches that keep the count on the device."""
    return 0 if past_key_values is None else past_key_values.get_seq_length()


def starts_sequence(query_length: int, past_key_values: Cache | None) -> bool:
    """Whether these queries are a prefill, in which visual tokens see each other; one query alone sees no other."""
    return query_length > 1 and bool(cached_length(past_key_values) == 0)


def require_empty_cache(past_key_values: Cache | None, found: str, advice: str) -> None:
    """Refuses what enters at the start of a sequence behind cached tokens, which would not belong to it."""
    past_length = int(cached_length(past_key_values))
    if past_length:
        raise ValueError(f"{found} belong to whole rows, but the cache holds {past_length} tokens already. {advice}.")


def split_examples_by_position_ids(spec: AttentionSpec, position_ids: Tensor, batch: int) -> AttentionSpec:
    """Adds packed examples told by positions that do not go up by one, the convention of transformers.

    Args:
        position_ids: (B, S), or (1, S) for all rows.
    """
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not torch.compiler.is_compiling() and not bool(restarts.any()):
        return spec
    return replace(spec, example_ids=nn.functional.pad(restarts.long().cumsum(-1), (1, 0)).expand(batch, -1))


def make_position_ids(attention_mask: Any, cache_position: Tensor, query_length: int) -> Tensor:
    """Positions counted over real tokens: left padding does not count.

    Args:
        attention_mask: (B, keys) with 0 on padding, one column for each cache slot, those of the queries and maybe
            slots that are not filled yet; otherwise the cache position is the position.
        cache_position: (S,) slots of the queries in the cache.
    Returns:
        (B, S) or (1, S) int64; padding gets 0.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        counted = attention_mask.long().cumsum(dim=-1) - 1
        if counted.shape[1] == query_length:
            return counted.clamp(min=0)
        slots = cache_position.to(counted.device).clamp(max=counted.shape[1] - 1)
        return counted.index_select(1, slots).clamp(min=0)
    return cache_position[None]
