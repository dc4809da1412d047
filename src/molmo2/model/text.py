"""The text model: a decoder with fused projections and an embedding table in two pieces."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from molmo2.configuration import Molmo2TextConfig
from molmo2.model.attention.dispatch import Molmo2AttentionBase, attention_implementation, make_attention_mask
from molmo2.model.attention.mask import (
    AttentionSpec,
    cached_length,
    make_position_ids,
    split_examples_by_position_ids,
)
from molmo2.model.cache import use_preallocated_layers
from molmo2.model.compat import CACHE_NAME, takes_cache, update_cache
from molmo2.model.embedding import Molmo2Embedding
from molmo2.model.packing import PackedRows
from molmo2.model.pretrained import Molmo2PreTrainedModel
from molmo2.model.rotary import Molmo2RotaryEmbedding, rotate


class Molmo2RMSNorm(nn.RMSNorm):
    """Root-mean-square norm in float32, cast back before the weight (Zhang & Sennrich 2019); one kernel on a GPU."""

    def forward(self, states: Tensor) -> Tensor:
        size = self.weight.shape
        if states.dtype == self.weight.dtype == torch.float32:
            return nn.functional.rms_norm(states, size, self.weight, self.eps)
        wide = states.float() if states.dtype == torch.float64 else states  # narrower types are widened inside
        return self.weight * nn.functional.rms_norm(wide, size, None, self.eps).to(states.dtype)


class Molmo2Attention(Molmo2AttentionBase):
    """Causal self-attention; `att_proj` holds the rows of q, k and v, in this order."""

    is_causal = True

    def __init__(self, config: Molmo2TextConfig, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx
        self.widths = (
            self.num_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
        )
        self.att_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.qkv_bias)
        self.attn_out = nn.Linear(self.widths[0], config.hidden_size, bias=False)
        self.norms_heads = config.qk_norm_type == "qwen3"
        self.q_norm: Molmo2RMSNorm | None = None
        self.k_norm: Molmo2RMSNorm | None = None
        if config.use_qk_norm:
            query_size, key_size = (self.head_dim, self.head_dim) if self.norms_heads else self.widths[:2]
            self.q_norm = Molmo2RMSNorm(query_size, config.layer_norm_eps)
            self.k_norm = Molmo2RMSNorm(key_size, config.layer_norm_eps)

    def _normed(self, query_key: Tensor) -> Tensor:
        """Queries and keys side by side, (B, S, width of both), with their norms."""
        if self.q_norm is None or self.k_norm is None:
            return query_key
        query, key = query_key.split(self.widths[:2], dim=-1)
        if self.norms_heads:
            query, key = (states.unflatten(-1, (-1, self.head_dim)) for states in (query, key))
        return torch.cat((self.q_norm(query), self.k_norm(key)), dim=2)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        cache_position: Tensor,
        implementation: str,
        **kwargs: Any,  # of the `attend` that context parallelism puts here
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) to (B, S, D) and the attention weights where they were computed."""
        query_key, value = self.att_proj(hidden_states).split((sum(self.widths[:2]), self.widths[2]), dim=-1)
        query_key = self._normed(query_key).flatten(2).unflatten(-1, (-1, self.head_dim))
        heads = rotate(query_key, rotary), value.unflatten(-1, (-1, self.head_dim))
        query_key, value = (states.transpose(1, 2) for states in heads)  # (B, heads, S, head_dim)
        query, key = query_key.split((self.num_heads, self.num_key_value_heads), dim=1)
        if past_key_values is not None:
            key, value = update_cache(past_key_values, key, value, self.layer_idx, cache_position)
        attended, weights = self.attend(query, key, value, attention_mask, implementation, **kwargs)
        return self.attn_out(attended), weights


class Molmo2MLP(nn.Module):
    """Gated feed-forward; the first half of `ff_proj` is the value, the second the gate."""

    def __init__(self, config: Molmo2TextConfig):
        super().__init__()
        self.ff_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.ff_out = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        value, gate = self.ff_proj(hidden_states).chunk(2, dim=-1)
        return self.ff_out(self.act(gate) * value)


class Molmo2DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward with residuals, normed before (`norm_after` False) or after each of them."""

    def __init__(self, config: Molmo2TextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Molmo2Attention(config, layer_idx)
        self.mlp = Molmo2MLP(config)
        self.attn_norm = Molmo2RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.ff_norm = Molmo2RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.norm_after = config.norm_after

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) to (B, S, D) and the attention weights; the arguments are those of `Molmo2Attention`."""
        if self.norm_after:
            attended, weights = self.self_attn(hidden_states, **kwargs)
            hidden_states = hidden_states + self.dropout(self.attn_norm(attended))
            return hidden_states + self.dropout(self.ff_norm(self.mlp(hidden_states))), weights
        attended, weights = self.self_attn(self.attn_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.ff_norm(hidden_states))), weights


class Molmo2TextModel(Molmo2PreTrainedModel):
    """The decoder without its output matrix."""

    config_class = Molmo2TextConfig
    config: Molmo2TextConfig
    _input_embed_layer = "wte"

    def __init__(self, config: Molmo2TextConfig):
        super().__init__(config)
        self.wte = Molmo2Embedding(config.vocab_size, config.additional_vocab_size, config.hidden_size)
        self.emb_drop = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList([Molmo2DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = Molmo2RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.rotary_emb = Molmo2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, S, D) of ids, among which -1 counts as 0 (padding in native data), or as given; not both."""
        if input_ids is not None and inputs_embeds is None:
            return self.wte(input_ids.clamp(min=0))
        if input_ids is not None or inputs_embeds is None:
            found = "neither" if input_ids is None else "both"
            raise ValueError(f"Pass either `input_ids` or `inputs_embeds`: found {found}.")
        return inputs_embeds

    @property
    def drops_cache(self) -> bool:
        """Whether passes return no cache, whatever is asked for: checkpointing would write to it twice."""
        return self.gradient_checkpointing and self.training

    def _require_positions(self, prompt_length: int, attention_mask: Any = None) -> None:
        """Refuses prompts beyond `max_position_embeddings`; padding does not count."""
        limit = self.config.max_position_embeddings
        if prompt_length > limit and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            prompt_length = int((attention_mask != 0).sum(-1).max())
        if prompt_length > limit:
            raise ValueError(
                f"The prompt has {prompt_length} tokens, {prompt_length - limit} more than the model's "
                f"`max_position_embeddings` = {limit}. Lower `num_frames` (each frame costs its pooled tokens plus a "
                "timestamp) or `max_crops` (images) by that much, or shorten the text."
            )

    def _layer_arguments(
        self,
        inputs_embeds: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        is_visual: Tensor | None,
        packed_rows: PackedRows | None,
        wants_weights: bool,
        cache_position: Tensor | None,
    ) -> tuple[dict, list[Tensor]]:
        """What every layer is called with, and the rotary table of each."""
        query_length = inputs_embeds.shape[1]
        past_length = cached_length(past_key_values)
        spec = AttentionSpec(is_visual=is_visual)
        if packed_rows is not None:
            branches = packed_rows.branches if bool(packed_rows.branches.any()) else None
            spec = AttentionSpec(is_visual=is_visual, example_ids=packed_rows.examples(), branch_ids=branches)
            position_ids = packed_rows.positions() if position_ids is None else position_ids
            self._require_positions(int(position_ids.max()) + 1)
        else:
            if position_ids is not None and attention_mask is None and past_key_values is None:
                spec = split_examples_by_position_ids(spec, position_ids, len(inputs_embeds))
            if isinstance(past_length, int) and past_length == 0:
                self._require_positions(query_length, attention_mask)
        if cache_position is None:
            cache_position = torch.arange(query_length, device=inputs_embeds.device) + past_length
        implementation = attention_implementation(self.config, wants_weights, not spec.is_empty())
        mask = make_attention_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, spec, implementation, cache_position
        )
        if position_ids is None:
            position_ids = make_position_ids(attention_mask, cache_position, query_length)
        rotary = self.rotary_emb(position_ids.to(inputs_embeds.device), inputs_embeds.dtype)
        arguments = {
            "attention_mask": mask,
            "past_key_values": past_key_values,
            "cache_position": cache_position,
            "implementation": implementation,
        }
        return arguments, rotary

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        is_visual: Tensor | None = None,
        packed_rows: PackedRows | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, S) int64, -1 counts as 0. Either these or `inputs_embeds`.
            attention_mask: (B, keys) with 0 on padding, or a mask prepared by `molmo2.model.attention.mask`.
            position_ids: (B, S); by default counted over real tokens.
            inputs_embeds: (B, S, D).
            is_visual: (B, S) bool in a prefill with media: these tokens see each other in both directions.
            packed_rows: Examples and branches that do not see each other. Without these, without a mask and with
                `use_cache=False`, examples are told by `position_ids` that restart.
        Raises:
            ValueError: Neither or both of ids and embeddings, more tokens than `max_position_embeddings`, or a cache
                with tokens under gradient checkpointing.
        """
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        output_attentions = self._setting("output_attentions", output_attentions)
        output_hidden_states = self._setting("output_hidden_states", output_hidden_states)
        if use_cache is None:
            use_cache = self.config.use_cache and packed_rows is None
        if self.drops_cache:  # also for layers of releases that drop it by another name only
            if past_key_values is not None and cached_length(past_key_values) > 0:
                raise ValueError("Tokens in a cache cannot be continued under gradient checkpointing in training.")
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = use_preallocated_layers(DynamicCache(config=self.config))

        arguments, rotary = self._layer_arguments(
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            is_visual,
            packed_rows,
            output_attentions,
            kwargs.get("cache_position"),
        )
        hidden_states = self.emb_drop(inputs_embeds)
        all_states, all_weights = [hidden_states], []
        for layer, table in zip(self.blocks, rotary):
            hidden_states, weights = layer(hidden_states, rotary=table, **arguments)
            all_weights.append(weights)
            if output_hidden_states:
                all_states.append(hidden_states)
        hidden_states = self.ln_f(hidden_states)
        all_states[-1] = hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
            **{CACHE_NAME: past_key_values if use_cache else None},
        )
