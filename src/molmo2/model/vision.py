"""From pixel patches to vectors of the text model: vision transformer, attention pooling, projector.

Everything is flat: the crops of all images and frames one after the other, and so the pooled tokens.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from molmo2.configuration import PAD_SLOT, UINT8_MEAN, UINT8_STD, Molmo2AdapterConfig, Molmo2VitConfig
from molmo2.model.attention.dispatch import Molmo2AttentionBase, attention_implementation
from molmo2.model.pretrained import Molmo2PreTrainedModel


def normalize_on_device(pixels: Tensor) -> Tensor:
    """uint8 patches normalised to float32 as the processor does it, on their device."""
    return pixels.float().div_(255).sub_(UINT8_MEAN).div_(UINT8_STD)


class Molmo2VisionAttention(Molmo2AttentionBase):
    """Multi-head attention without causality; queries and keys may come from different tokens."""

    def __init__(self, config: Molmo2VitConfig | Molmo2AdapterConfig, input_size: int):
        super().__init__(config, float32_attention=config.float32_attention)
        key_value_size = self.num_key_value_heads * self.head_dim
        self.wq = nn.Linear(input_size, self.num_heads * self.head_dim)
        self.wk = nn.Linear(input_size, key_value_size)
        self.wv = nn.Linear(input_size, key_value_size)
        self.wo = nn.Linear(self.num_heads * self.head_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self, queries: Tensor, keys: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(N, queries, input) attending to (N, keys, input): (N, queries, D), and the weights where computed.

        Args:
            attention_mask: (N, 1, 1, keys) bool, True where a key is present; None when all are.
        """
        query, key, value = self.wq(queries), self.wk(keys), self.wv(keys)
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in (query, key, value)
        )
        implementation = attention_implementation(self.config, False, needs_mask=attention_mask is not None)
        attended, weights = self.attend(query, key, value, attention_mask, implementation)
        return self.dropout(self.wo(attended)), weights


class Molmo2VisionMLP(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, config: Molmo2VitConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(hidden_states)))


class Molmo2VisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: Molmo2VitConfig):
        super().__init__()
        self.attention = Molmo2VisionAttention(config, config.hidden_size)
        self.feed_forward = Molmo2VisionMLP(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.attention(normed, normed)[0]
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class Molmo2VisionBlocks(nn.Module):
    """Holds the blocks under the name they have on disk."""

    def __init__(self, config: Molmo2VitConfig, num_layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList([Molmo2VisionBlock(config) for _ in range(num_layers)])


class Molmo2VisionTransformer(Molmo2PreTrainedModel):
    """The vision tower up to the last layer whose output is wanted.

    Args:
        feature_layers: Layers whose outputs are returned; negative values count from `config.num_hidden_layers`.
            By default the last one.
    """

    config_class = Molmo2VitConfig
    config: Molmo2VitConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: Molmo2VitConfig, feature_layers: list[int] | tuple[int, ...] = (-1,)):
        super().__init__(config)
        depth = config.num_hidden_layers
        self.feature_layers = [layer % depth for layer in feature_layers]
        num_positions: Any = config.image_num_pos  # the configuration fills it in where it is None
        self.positional_embedding = nn.Parameter(torch.empty(num_positions, config.hidden_size))
        self.patch_embedding = nn.Linear(config.image_patch_size**2 * 3, config.hidden_size)
        self.transformer = Molmo2VisionBlocks(config, max(self.feature_layers) + 1)
        self.gradient_checkpointing = False
        self.post_init()

    def _positions(self) -> Tensor:
        """(P, D) position vectors; a stored grid of another size is resized (bicubic, antialiased)."""
        table = self.positional_embedding
        rows, cols = self.config.image_num_patch
        side = round(table.shape[0] ** 0.5)
        if (rows, cols) == (side, side) or table.shape[0] == rows * cols != side * side:
            return table
        grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(
            grid.float(), size=(rows, cols), mode="bicubic", align_corners=False, antialias=True
        )
        return grid.permute(0, 2, 3, 1).reshape(rows * cols, -1).to(table.dtype)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Encode crops.

        Args:
            pixel_values: (C, P, patch * patch * 3), patch pixels flattened row, column, channel.
        Returns:
            For each of the feature layers, in their order, (C, P, D).
        """
        # Device and dtype of this module's own tensor: a submodule's may be elsewhere while weights are offloaded.
        positions = self.positional_embedding
        pixel_values = pixel_values.to(positions.device)
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize_on_device(pixel_values)
        hidden_states = self.patch_embedding(pixel_values.to(positions.dtype))
        hidden_states = hidden_states + self._positions().to(hidden_states.dtype)
        kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.transformer.resblocks):
            hidden_states = block(hidden_states)
            if index in self.feature_layers:
                kept[index] = hidden_states
        return [kept[layer] for layer in self.feature_layers]


class Molmo2Pooling(Molmo2VisionAttention):
    """One query per token, the mean of its patches, attending to these patches."""

    def __init__(self, config: Molmo2AdapterConfig):
        super().__init__(config, input_size=config.hidden_size * len(config.vit_layers))
        self.masks_missing = config.pooling_attention_mask
        self.feature_dropout = nn.Dropout(config.image_feature_dropout)

    def forward(self, features: Tensor, token_pooling: Tensor) -> Tensor:  # type: ignore[override]  # no weights
        """Pool patches into tokens.

        Args:
            features: (patches, layers * D) of all crops, flat.
            token_pooling: (T, K) int64 rows of `features`, -1 where a window has no patch, -2 behind its end.
        Returns:
            (T, D).
        """
        present = token_pooling >= 0  # (T, K)
        gathered = self.feature_dropout(features[token_pooling.clamp(min=0)])
        gathered = gathered * present[..., None].to(gathered.dtype)
        counted = present if self.masks_missing else token_pooling > PAD_SLOT
        if not self.masks_missing and bool(counted.all()):
            return super().forward(gathered.mean(1, keepdim=True), gathered)[0][:, 0]
        count = counted.sum(-1, keepdim=True).clamp(min=1).to(gathered.dtype)
        query = (gathered.sum(1) / count)[:, None]
        return super().forward(query, gathered, counted[:, None, None])[0][:, 0]


class Molmo2Projector(nn.Module):
    """Gated feed-forward into the width of the text model."""

    def __init__(self, config: Molmo2AdapterConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.text_hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(hidden_states)) * self.w3(hidden_states))


def pooling_schedule(
    token_pooling: Tensor, patches_per_crop: int, chunk_ends: list[int]
) -> tuple[Tensor, list[int], list[int]]:
    """Which tokens can be pooled after which chunk of crops, so that features can be freed early.

    Args:
        token_pooling: (T, K) int64, -1 for none, at least one patch in each row.
        chunk_ends: Crops encoded after each chunk.
    Returns:
        (T,) tokens in the order in which they are ready; for each chunk, how many are ready after it, and the first
        crop that tokens still need.
    """
    last = token_pooling.amax(-1) // patches_per_crop
    first = torch.where(token_pooling >= 0, token_pooling, token_pooling.amax(-1, keepdim=True)).amin(-1)
    last, order = last.sort(stable=True)
    ends = torch.tensor(chunk_ends)
    ready = torch.searchsorted(last, ends)
    # The smallest first crop of this token and all later ones; after the last token nothing is needed.
    needed = (first // patches_per_crop)[order].flip(0).cummin(0).values.flip(0)
    needed = torch.cat((needed, ends[-1:]))[ready]
    return order, ready.tolist(), torch.minimum(needed, ends).tolist()


class Molmo2VisionBackbone(Molmo2PreTrainedModel):
    """Vision transformer and connector.

    `crops_per_chunk` and `tokens_per_chunk`, the numbers of crops encoded and of tokens pooled at a time,
    bound the working memory, which does not grow with the number of crops. None means all at once. The result does not
    depend on them.
    """

    config_class = Molmo2AdapterConfig
    config: Molmo2AdapterConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, vit_config: Molmo2VitConfig, adapter_config: Molmo2AdapterConfig):
        super().__init__(adapter_config)
        self.image_vit = Molmo2VisionTransformer(vit_config, adapter_config.vit_layers)
        self.image_pooling_2d = Molmo2Pooling(adapter_config)
        self.image_projector = Molmo2Projector(adapter_config)
        self.crops_per_chunk: int | None = 16
        self.tokens_per_chunk: int | None = 4096
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.image_vit.patch_embedding

    @staticmethod
    def _chunks(tensor: Tensor, size: int | None) -> tuple[Tensor, ...]:
        if size is not None and size < 1:
            raise ValueError(f"A chunk of {size} was asked for; expected at least 1, or None for all at once.")
        return (tensor,) if size is None or len(tensor) <= size else tensor.split(size)

    def encode_crops(self, pixel_values: Tensor) -> Tensor:
        """(C, P, pixels) to the concatenated features of the chosen layers, (C * P, layers * D), in one go.

        Nothing is kept for a backward pass where nothing of the tower is trained, even if hooks on its embedding
        (`enable_input_require_grads`, as adapters on the text model call it) ask for gradients.
        """
        trains = pixel_values.requires_grad or any(own.requires_grad for own in self.image_vit.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            return torch.cat(self.image_vit(pixel_values), dim=-1).flatten(0, 1)

    def forward(self, pixel_values: Tensor, token_pooling: Tensor) -> Tensor:
        """Encode crops and pool them into tokens of the text model.

        Features are held only until the last token that needs them is pooled: a chunk of crops and, for large images,
        the crops before it that share a token with it.

        Args:
            pixel_values: (C, P, patch * patch * 3) float, or uint8 not normalised yet; crops of all images, one after
                the other. They may be on another device; a chunk is moved at a time.
            token_pooling: (T, K) int64; patches of each token as indices into the C * P patches, -1 for none.
        Returns:
            (valid rows of `token_pooling`, text width): rows without any patch are dropped.
        Raises:
            ValueError: For an index past the last patch, and for vectors that float16 cannot hold.
        """
        patches = pixel_values.shape[1]
        # Planned on the CPU, to which the table is copied once; the parts that chunks need are moved back with them.
        token_pooling = token_pooling.cpu()
        token_pooling = token_pooling[(token_pooling >= 0).any(-1)]
        if token_pooling.numel() and bool(token_pooling.max() >= len(pixel_values) * patches):
            raise ValueError(
                f"`token_pooling` points at patch {int(token_pooling.max())}, but {len(pixel_values)} crop(s) hold "
                f"{len(pixel_values) * patches} patches. Pass the pooling table that was made with these pixels."
            )
        if not token_pooling.numel():
            return torch.zeros(0, self.config.text_hidden_size, device=self.device, dtype=self.dtype)
        chunks = self._chunks(pixel_values, self.crops_per_chunk)
        ends = list(itertools.accumulate(len(chunk) for chunk in chunks))
        order, ready_tokens, first_crops = pooling_schedule(token_pooling, patches, ends)
        token_pooling = token_pooling[order]
        held, held_from, done, vectors = None, 0, 0, []
        for chunk, end, ready, first_crop in zip(chunks, ends, ready_tokens, first_crops):
            held = self.encode_crops(chunk) if held is None else torch.cat((held, self.encode_crops(chunk)))
            if ready > done:
                vectors += self._pooled(held, token_pooling[done:ready], held_from * patches)
            # A copy, so that the memory of what is no longer needed is freed.
            held = held[(first_crop - held_from) * patches :].clone() if first_crop < end else None
            held_from, done = first_crop, ready
        joined = torch.cat(vectors)
        if joined.dtype == torch.float16 and not bool(joined.isfinite().all()):
            raise ValueError(
                "Vectors of an image are not finite in float16, whose largest number is 65504; every token after them "
                "would be nonsense. Load the model in bfloat16 or float32: `dtype=torch.bfloat16`."
            )
        is_in_order = bool((order[1:] > order[:-1]).all())
        return joined if is_in_order else joined[order.argsort().to(joined.device)]

    def _pooled(self, features: Tensor, token_pooling: Tensor, first_patch: int) -> list[Tensor]:
        """Vectors of tokens, chunk by chunk; `features` begin at patch `first_patch`."""
        token_pooling = token_pooling.to(features.device)
        token_pooling = torch.where(token_pooling >= 0, token_pooling - first_patch, token_pooling)
        chunks = self._chunks(token_pooling, self.tokens_per_chunk)
        return [self.image_projector(self.image_pooling_2d(features, chunk)) for chunk in chunks]


def is_distributed_training(module: nn.Module) -> bool:
    """Whether this module is being trained by several processes."""
    if not (module.training and torch.is_grad_enabled() and torch.distributed.is_available()):
        return False
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        return False
    return any(parameter.requires_grad for parameter in module.parameters())


def zero_vision_loss(vision_backbone: Any) -> Tensor:
    """A dummy forward pass for DDP: zero, computed from all vision parameters with one black crop.

    Processes average their gradients tensor by tensor, so each must have one for every tensor, also the process whose
    batch has no image.
    """
    config = vision_backbone.image_vit.config
    device, dtype = vision_backbone.image_vit.device, vision_backbone.image_vit.dtype
    rows, cols = config.image_num_patch
    crop = torch.zeros(1, rows * cols, 3 * config.image_patch_size**2, device=device, dtype=dtype)
    return 0.0 * vision_backbone(crop, torch.zeros(1, 1, dtype=torch.int64, device=device)).sum()
