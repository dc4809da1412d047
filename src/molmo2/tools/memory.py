"""Memory of a request besides the weights: a formula of the shapes, tested against counted allocations."""

from dataclasses import dataclass, fields
from typing import Any

from molmo2.model.attention.blockwise import BlockwiseMask
from molmo2.model.cache import capacity_for

PIXEL_BYTES = 4  # pixel values are float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose.

    Attributes:
        pixels: patches of all crops, as the processor returns them.
        vision: features of a chunk of crops and of those kept for the next chunk, and the working memory of one chunk,
            of crops or of pooled tokens.
        prefill: hidden states and the widest layer over the whole prompt, masks and scores of one block of queries.
        cache: keys and values of the prompt and of the new tokens, and spare capacity to append to.
    """

    pixels: int
    vision: int
    prefill: int
    cache: int

    @property
    def total(self) -> int:
        """Peak: the vision tower is done before the text model starts."""
        return self.pixels + max(self.vision, self.prefill + self.cache)

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {getattr(self, part.name) / 1e6:.0f} MB" for part in fields(self))
        return f"about {self.total / 1e6:.0f} MB besides the weights ({parts})"


@dataclass(frozen=True)
class RequestShape:
    """The properties of a request that determine its memory.

    Attributes:
        num_crops: crops of all images and frames of all videos.
        pooled_tokens: visual tokens that carry a feature vector.
        window: maximum number of patches per token.
        rows: rows of the batch, beams and returned sequences counted.
        row_tokens: length of a row after padding.
        new_tokens: tokens to generate.
    """

    num_crops: int
    pooled_tokens: int
    window: int
    rows: int
    row_tokens: int
    new_tokens: int = 0


def estimate_memory(model: Any, shape: RequestShape) -> MemoryEstimate:
    """The peak memory of `model.generate` for a request of this shape.

    Args:
        model: Molmo2ForConditionalGeneration (or its `model`); its configuration, dtype and chunk sizes count.
    """
    config, backbone = model.config, model.vision_backbone
    vit, adapter, text = config.vit_config, config.adapter_config, config.text_config
    element = next(model.parameters()).element_size()
    height, width = vit.image_default_input_size
    patches = (height // vit.image_patch_size) * (width // vit.image_patch_size)
    chunk = shape.num_crops if backbone.crops_per_chunk is None else min(shape.num_crops, backbone.crops_per_chunk)

    # Features are kept for the chunk and for earlier crops that share a token with it: rarely more than another chunk.
    features = min(shape.num_crops, 2 * chunk) * patches * len(adapter.vit_layers) * vit.hidden_size
    widest_vit = max(vit.intermediate_size * 2, vit.num_attention_heads * vit.head_dim * 4)
    encoding = chunk * patches * (vit.hidden_size * (2 + len(adapter.vit_layers)) + widest_vit)
    tokens = shape.pooled_tokens
    tokens = tokens if backbone.tokens_per_chunk is None else min(tokens, backbone.tokens_per_chunk)
    pooled = 2 * len(adapter.vit_layers) * vit.hidden_size + 3 * adapter.num_attention_heads * adapter.head_dim
    pooling = tokens * shape.window * pooled
    vectors = shape.pooled_tokens * text.hidden_size

    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    widest_text = max(text.intermediate_size * 4, heads * text.head_dim * 2)
    tokens = shape.rows * shape.row_tokens
    keys_and_values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    queries = min(shape.row_tokens, BlockwiseMask.queries_per_block)
    # The mask of a block of queries as bool, what it is made of, and the mask in the dtype of the scores.
    attention = (3 + element) * shape.rows * queries * shape.row_tokens
    kept = capacity_for(shape.row_tokens + shape.new_tokens) if shape.new_tokens else shape.row_tokens
    return MemoryEstimate(
        pixels=shape.num_crops * patches * 3 * vit.image_patch_size**2 * PIXEL_BYTES,
        vision=(2 * features + max(encoding, pooling) + 2 * vectors) * element if shape.num_crops else 0,
        prefill=(tokens * (4 * text.hidden_size + widest_text) + vectors) * element + attention,
        cache=shape.rows * kept * keys_and_values * element,
    )
