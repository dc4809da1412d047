"""Who may attend to whom in the text model, and where tokens stand.

`allowed(query, key) = (key <= query or (visual(query) and visual(key))) and not padding(key)`: text is causal, while
all visual tokens of a sequence see each other in both directions, across pictures and frames (training-time mask).
The visual part applies where the pictures enter, in the prefill; later steps are causal and see everything before.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .compat_molmo2 import make_causal_mask


def visual_pairs(is_visual: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The pairs that the causal mask lacks: both ends visual.

    Args:
        is_visual: (B, S) bool.
    Returns:
        `(batch, head, query, key) -> bool` on index tensors; keys past S (an allocated cache) are not visual.
    """
    length = is_visual.shape[1]

    def both_visual(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        inside = (q_idx < length) & (kv_idx < length)
        query_visual = is_visual[batch_idx, torch.where(q_idx < length, q_idx, 0)]
        key_visual = is_visual[batch_idx, torch.where(kv_idx < length, kv_idx, 0)]
        return inside & query_visual & key_visual

    return both_visual


def cached_length(past_key_values: Cache | None) -> int | Tensor:
    """Tokens already in the cache; a 0-d tensor from caches that keep the count on the device."""
    return 0 if past_key_values is None else past_key_values.get_seq_length()


def starts_sequence(query_length: int, past_key_values: Cache | None) -> bool:
    """Whether these queries are a prefill, where visual tokens see each other. One query alone has no other to see."""
    return query_length > 1 and bool(cached_length(past_key_values) == 0)


def attention_implementation(config: Any, wants_weights: bool, has_visual_pairs: bool) -> str:
    """The implementation for one forward pass.

    Weights are only computed by eager attention. Flash attention takes no mask but padding, so a prefill in which
    visual tokens see each other runs under sdpa; text-only prefills and all later steps stay with flash.
    """
    chosen = config._attn_implementation
    if chosen is None:
        chosen = "sdpa"
    if wants_weights:
        return "eager"
    if has_visual_pairs and "flash" in chosen:
        return "sdpa"
    return chosen


def make_attention_mask(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    is_visual: Tensor | None,
    implementation: str,
    cache_position: Tensor,
    packed_position_ids: Tensor | None = None,
) -> Any:
    """The mask of one forward pass, in the form that `implementation` takes.

    Args:
        inputs_embeds: (B, S, ...) queries.
        attention_mask: None, (B, keys) with 0 on padding, or a mask made before (returned as it is).
        is_visual: (B, S) bool in a prefill, else None.
        cache_position: (S,) places of the queries.
        packed_position_ids: (B, S) only if the caller gave them; restarts separate packed sequences.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is not None and len(attention_mask.shape) != 2:
        return attention_mask
    if config._attn_implementation != implementation:
        config = copy.copy(config)
        config._attn_implementation_internal = implementation
    return make_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        packed_position_ids,
        cache_position,
        None if is_visual is None else visual_pairs(is_visual.to(inputs_embeds.device)),
    )


def make_position_ids(attention_mask: Any, cache_position: Tensor, query_length: int) -> Tensor:
    """Positions counted over real tokens: left padding does not count.

    Args:
        attention_mask: (B, keys) with 0 on padding, whose last columns are the queries; otherwise the cache position
            is the position.
        cache_position: (S,) places of the queries.
    Returns:
        (B, S) or (1, S) int64; padding gets 0.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        counted = attention_mask.long().cumsum(dim=-1) - 1
        return counted[:, -query_length:].clamp(min=0)
    return cache_position[None]
