"""One attention call for the text model, the vision transformer and the pooling, whatever implementation is chosen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from molmo2.model.attention.blockwise import BlockwiseMask, blockwise_attention
from molmo2.model.attention.cpu import FEWEST_QUERIES, attends_by_products, attention_by_products


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention written out; scores and softmax in float32 or wider when query and key are.

    Args:
        query: (B, heads, S, head_dim).
        key, value: (B, key/value heads, keys, head_dim); consecutive query heads share one.
        attention_mask: Broadcastable to (B, heads, S, keys): bool (True = may attend), or added to the scores.
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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """flex_attention without its compiler, which generates C++ that does not build when lengths vary (torch 2.13).

    Args and returns: as the attention functions of transformers; a tensor mask, (B or 1, heads or 1, queries, keys),
    is added to the scores, or tells by True which keys are seen.
    """
    if dropout > 0:
        raise ValueError(
            f"flex_attention has no dropout, but `attention_dropout` is {dropout}: set it to 0 or train with "
            '`attn_implementation="sdpa"`.'
        )
    block_mask = attention_mask if isinstance(attention_mask, BlockMask) else None
    added = attention_mask if isinstance(attention_mask, Tensor) else None
    if added is not None:
        if added.dtype == torch.bool:
            added = torch.zeros_like(added, dtype=query.dtype).masked_fill(~added, torch.finfo(query.dtype).min)
        added = added.expand(*query.shape[:2], -1, -1)

    def add_mask(score: Tensor, batch_idx: Tensor, head_idx: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + added[batch_idx, head_idx, q_idx, kv_idx]

    output = flex_attention(
        query,
        key,
        value,
        score_mod=None if added is None else add_mask,
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2), None


def sdpa_by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float,
    **kwargs,
) -> tuple[Tensor, None]:
    """`attention_by_products`, called as the attention functions of transformers are; it has no dropout."""
    is_causal = module.is_causal and attention_mask is None
    output = attention_by_products(query, key, value, attention_mask, scaling, is_causal)
    return output.transpose(1, 2), None


def sdpa_of_few(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float,
    **kwargs,
) -> tuple[Tensor, None]:
    """sdpa of a few new tokens: keys are neither repeated for the heads that share them nor read once for each.

    These heads become further queries of one head. Called as the attention functions of transformers are, which
    repeat keys and values where there is a mask.
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.shape[2] > 1:
            attention_mask = attention_mask.repeat(1, 1, groups, 1)
    queries = query.unflatten(1, (-1, groups)).flatten(2, 3)
    output = nn.functional.scaled_dot_product_attention(
        queries, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2), None


class Molmo2AttentionBase(nn.Module):
    """What the three kinds of attention share: head geometry and the dispatch to an implementation."""

    is_causal = False

    def __init__(self, config, float32_attention: bool = False):
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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask=None,
        implementation: str | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Scaled dot-product attention.

        With `float32_attention`, query and key are taken to float32; under sdpa and flex, whose three inputs share
        one dtype, the value as well. Flash attention has no float32 and keeps the dtype of the model.

        Args:
            query: (B, heads, S, head_dim).
            key, value: (B, key/value heads, keys, head_dim).
            attention_mask: As the implementation takes it; see `molmo2.model.attention.mask`.
            implementation: Overrides the configured one.
        Returns:
            (B, S, heads * head_dim) in the dtype of `query`, and the weights where they were computed.
        """
        implementation = self.config._attn_implementation if implementation is None else implementation
        implementation = "sdpa" if implementation is None else implementation
        dtype = query.dtype
        is_flash = "flash" in implementation
        if self.float32_attention and not is_flash:
            query, key = query.float(), key.float()
        dropout = self.attention_dropout if self.training else 0.0
        if implementation == "eager":
            output, weights = eager_attention(query, key, value, attention_mask, self.scaling, dropout)
        elif isinstance(attention_mask, BlockwiseMask):
            output, weights = blockwise_attention(query, key, value, attention_mask, self.scaling, dropout), None
        else:
            if self.float32_attention and not is_flash:
                value = value.float()
            function = ALL_ATTENTION_FUNCTIONS[implementation]
            if implementation == "flex_attention" and query.device.type == "cpu":
                function = flex_attention_on_cpu
            elif function is sdpa_attention_forward:
                function = self._sdpa_for(query, key, value, attention_mask, dropout)
            output, weights = function(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return output.flatten(2).to(dtype), weights

    def _sdpa_for(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float) -> Callable:
        """The library's function, or one that is faster for these and gives the same."""
        is_causal = mask is None and self.is_causal and query.shape[2] > 1
        if is_causal and query.shape[2] != key.shape[2]:
            return sdpa_attention_forward
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape[1] == 1):
            return sdpa_attention_forward
        if attends_by_products(query, key, value, dropout):
            return sdpa_by_products
        if query.shape[1] > key.shape[1] and query.shape[2] < FEWEST_QUERIES and not is_causal:
            return sdpa_of_few
        return sdpa_attention_forward
