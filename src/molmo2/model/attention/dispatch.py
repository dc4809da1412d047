"""One attention call for the text model, the vision transformer and the pooling, and the mask in the form it takes:

sdpa, longer prompts                       `BlockwiseMask`, computed block by block
sdpa, up to one block, compiled; eager     (B, 1, S, keys) tensor, or None where attention is plainly causal
flex_attention                             BlockMask
flash attention                            padding only; passes that need more run under sdpa
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from molmo2.model.attention.blockwise import BlockwiseMask, blockwise_attention
from molmo2.model.attention.mask import AttentionSpec, cached_length, mask_mod
from molmo2.model.cache import PreallocatedLayer
from molmo2.model.compat import mask_arguments

MAX_GROUPED_QUERIES = 15  # per head; more are as fast in the function of transformers


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention written out; scores and softmax in float32 or wider when query and key are.

    Args:
        query: (B, heads, S, head_dim).
        key, value: (B, key/value heads, keys, head_dim); consecutive query heads share one.
        attention_mask: Broadcastable to (B, heads, S, keys): bool (True = may attend), or added to the scores.
        scaling: Factor of the scores.
        dropout: Probability of dropping a weight.
    Returns:
        (B, S, heads, head_dim) in the dtype of `value`, and the weights (B, heads, S, keys).
    """
    batch, heads, queries, _ = query.shape
    grouped = query.unflatten(1, (key.shape[1], heads // key.shape[1]))
    scores = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)) * scaling
    scores = scores.flatten(1, 2)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout)
    grouped_weights = weights.unflatten(1, (key.shape[1], heads // key.shape[1]))
    attended = torch.matmul(grouped_weights, value[:, :, None]).flatten(1, 2)
    return attended.transpose(1, 2), weights


def flex_attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """flex_attention without its compiler, which generates C++ that does not build when lengths vary (torch 2.13).

    Args: as `eager_attention`; a tensor mask, (B or 1, heads or 1, queries or 1, keys), is added to the scores.
    Returns (B, S, heads, head_dim).
    """
    if dropout > 0:
        raise ValueError(
            f"flex_attention has no dropout, but `attention_dropout` is {dropout}: set it to 0 or train with "
            '`attn_implementation="sdpa"`.'
        )
    added: Any = mask.expand(*query.shape[:3], -1) if isinstance(mask, Tensor) else None

    def add_mask(score: Tensor, batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + added[batch_idx, head_idx, q_idx, kv_idx]

    output = flex_attention(
        query,
        key,
        value,
        score_mod=None if added is None else add_mask,
        block_mask=mask if isinstance(mask, BlockMask) else None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def sdpa_grouped_decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """sdpa of a few new tokens under grouped-query attention, with each key read once.

    Query heads that share a key head become further queries of one head, where transformers repeats keys and values.
    Args: as `eager_attention`; the mask is bool, (B or 1, 1, queries or 1, keys or more), or None. Returns
    (B, S, heads, head_dim).
    """
    groups = query.shape[1] // key.shape[1]
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.shape[2] > 1:
            mask = mask.repeat(1, 1, groups, 1)
    queries = query.unflatten(1, (-1, groups)).flatten(2, 3)
    output = nn.functional.scaled_dot_product_attention(
        queries, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2)


def attention_implementation(config: Any, wants_weights: bool, needs_mask: bool) -> str:
    """The implementation for one forward pass.

    Weights are only computed by eager attention. Flash attention takes no mask but padding, so a pass in which
    visual tokens see each other or examples are packed, and pooling with missing patches, run under sdpa; text-only
    prefills and all later steps stay with flash.
    """
    chosen = config._attn_implementation or "sdpa"
    if wants_weights:
        return "eager"
    if needs_mask and "flash" in chosen:
        return "sdpa"
    return chosen


def is_blockwise(implementation: str, query_length: int) -> bool:
    """Whether attention is computed block by block: under sdpa, where more than one block would be needed.

    Compiled and traced passes keep the tensor mask: the plan of blocks depends on the data.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # asked first: the length must not become a condition
        return False
    return implementation == "sdpa" and query_length > BlockwiseMask.queries_per_block


def make_attention_mask(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    spec: AttentionSpec,
    implementation: str,
    cache_position: Tensor,
) -> Any:
    """The mask of one forward pass, in the form that `implementation` takes.

    Args:
        inputs_embeds: (B, S, ...) queries, in the dtype of the model.
        attention_mask: None, (B, keys) with 0 on padding, or a mask made before (returned as it is).
        spec: What the mask depends on besides padding, in a prefill; empty in later passes.
        cache_position: (S,) slots of the queries in the cache.
    Returns:
        None, a `BlockwiseMask`, a (B, 1, S, keys) tensor, a (B, keys) tensor or a BlockMask.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if attention_mask is not None and len(attention_mask.shape) != 2:
        return attention_mask
    spec = spec.to(inputs_embeds.device)
    if is_blockwise(implementation, inputs_embeds.shape[1]):
        return _blockwise_mask(inputs_embeds, attention_mask, past_key_values, spec)
    is_one_token = inputs_embeds.shape[1] == 1 and implementation == "sdpa" and spec.is_empty()
    if is_one_token and _has_a_column_for_each_key(attention_mask, past_key_values):
        # It sees all that is no padding; asking whether there is any would be a wait for the device.
        return attention_mask.to(inputs_embeds.device)[:, None, None].bool()
    if config._attn_implementation != implementation:
        config = copy.copy(config)
        config._attn_implementation_internal = implementation
    return create_causal_mask(
        config=config,
        attention_mask=attention_mask,
        position_ids=None,
        or_mask_function=None if spec.is_empty() else _every_pair,
        and_mask_function=None if spec.is_empty() else mask_mod(spec),
        **mask_arguments(inputs_embeds, past_key_values, cache_position),
    )


def _every_pair(batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Allows every pair: replaces the causality of transformers, which `mask_mod` brings itself."""
    return (q_idx >= 0) & (kv_idx >= 0)


def _has_a_column_for_each_key(attention_mask: Any, cache: Cache | None) -> bool:
    """Whether a (B, keys) mask describes all that a growing cache holds, and one token more."""
    layers = getattr(cache, "layers", None)
    if attention_mask is None or not layers or type(layers[0]) not in (DynamicLayer, PreallocatedLayer):
        return False
    return attention_mask.shape[1] == cached_length(cache) + 1


def _blockwise_mask(
    inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, spec: AttentionSpec
) -> BlockwiseMask | None:
    """The spec with the padding of the keys, in blocks; None where attention is plainly causal."""
    batch, queries = inputs_embeds.shape[:2]
    first_query = int(cached_length(past_key_values))
    length = first_query + queries
    if attention_mask is not None and not bool(attention_mask.all()):
        spec = replace(spec, is_real=attention_mask.to(inputs_embeds.device)[:, :length].bool())
    if first_query == 0 and spec.is_empty():
        return None
    return BlockwiseMask(spec, batch, first_query, length, inputs_embeds.device)


class Molmo2AttentionBase(nn.Module):
    """Base of the three attention modules: head geometry and the dispatch to an implementation."""

    is_causal = False

    def __init__(self, config: Any, float32_attention: bool = False):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.float32_attention = float32_attention

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, implementation: str
    ) -> tuple[Tensor, Tensor | None]:
        """Scaled dot-product attention.

        With `float32_attention`, query and key are cast to float32; under sdpa and flex, whose three inputs share
        one dtype, the value as well. Flash attention has no float32 and keeps the dtype of the model.

        Args:
            query: (B, heads, S, head_dim).
            key, value: (B, key/value heads, keys, head_dim).
            attention_mask: As the implementation takes it; see `make_attention_mask`.
            implementation: See `attention_implementation`.
        Returns:
            (B, S, heads * head_dim) in the dtype of `query`, and the weights where they were computed.
        """
        dtype = query.dtype
        if self.float32_attention and "flash" not in implementation:
            query, key = query.float(), key.float()
            value = value if implementation == "eager" else value.float()
        is_flex = implementation == "flex_attention"
        if is_flex and isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:  # it adds tensors
            added = torch.zeros(attention_mask.shape, device=query.device)
            attention_mask = added.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
        scaling, dropout = self.scaling, self.attention_dropout if self.training else 0.0
        function = None if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        weights = None
        if function is None:
            output, weights = eager_attention(query, key, value, attention_mask, scaling, dropout)
        elif isinstance(attention_mask, BlockwiseMask):
            output = blockwise_attention(query, key, value, attention_mask, scaling, dropout)
        elif is_flex and query.device.type == "cpu":
            output = flex_attention_on_cpu(query, key, value, attention_mask, scaling, dropout)
        elif function is sdpa_attention_forward and self._is_grouped_decode(query, key, attention_mask):
            output = sdpa_grouped_decode(query, key, value, attention_mask, scaling, dropout)
        else:
            output, weights = function(self, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
        return output.flatten(2).to(dtype), weights

    def _is_grouped_decode(self, query: Tensor, key: Tensor, mask: Any) -> bool:
        """Whether these are a few queries of heads that share keys, and one mask or none says what they see."""
        if query.shape[1] == key.shape[1] or query.shape[2] > MAX_GROUPED_QUERIES:
            return False
        if mask is None:
            return query.shape[2] == 1 or not self.is_causal
        return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape[1] == 1
