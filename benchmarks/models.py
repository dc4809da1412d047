"""The model: vision, prefill, decode and loading beside the products, and the bytes, that they cannot do without."""

from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from benchmarks.bounds import Products, causal_attention, weight_reads
from benchmarks.checkpoints import checkpoint
from benchmarks.harness import Goal, Side, Work, row
from benchmarks.media import photo
from benchmarks.sides import chat_inputs, load_model

FRAME_TOKENS, TIME_TOKENS = 83, 7  # of a frame: 9x9 tokens with start and end; then the text of its time


def image_inputs(side: Side, shape: str, max_crops: int) -> dict[str, torch.Tensor]:
    """A question about one 1080p photo."""
    content = [{"type": "image", "image": photo(1080, 1920)}, {"type": "text", "text": "What is this?"}]
    return chat_inputs(side, shape, content, max_crops=max_crops)


def clip_and_text(side: Side, length: int) -> dict[str, torch.Tensor]:
    """A row of which three quarters are frames and the rest is text, without pixels: the text model's part."""
    place = torch.arange(length)
    types = ((place % (FRAME_TOKENS + TIME_TOKENS) < FRAME_TOKENS) & (place < length * 3 // 4))[None]
    name = "mm_token_type_ids" if side.name == "native" else "token_type_ids"
    return {"input_ids": (place % 256)[None], "attention_mask": torch.ones_like(types).long(), name: types.long()}


@row(
    "vision",
    "vision encoder and connector, 9 crops (3 layers of full width)",
    bound="the same matrix products and attention products alone",
    goals=(Goal(1.2, "bound"),),
)
def vision(side: Side) -> Work:
    """Through the whole model, whose text part is negligibly small: the one call that all sides have."""
    model, inputs = load_model(side, "vision"), image_inputs(side, "vision", side.pick(8, 1))

    def work() -> torch.Tensor:
        return model(**inputs, logits_to_keep=1).logits

    return Products.from_forward(model, work).work() if side.is_bound else work


def _prefill(side: Side, length: int) -> Work:
    model, inputs = load_model(side, "thin"), clip_and_text(side, length)

    def work() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    if not side.is_bound:
        short = {name: value[:, :64] for name, value in inputs.items()}
        model(**short, use_cache=True, logits_to_keep=1)
        return work
    short_length = 128
    short = clip_and_text(side, short_length)
    traced = Products.from_forward(model, lambda: model(**short, use_cache=True, logits_to_keep=1), attention=False)
    scaled = tuple((rows if rows == 1 else rows * length // short_length, weight) for rows, weight in traced.linear)
    products = Products(scaled, ()).work()
    attention = causal_attention(model.config.get_text_config(), length)

    def bound() -> None:
        products()
        attention()

    return bound


PREFILL_BOUND = "the same matrix products and plain causal attention"


@row("prefill-4k", "prefill, 4,096 tokens", bound=PREFILL_BOUND, goals=(Goal(1.3, "bound"),))
def prefill_4k(side: Side) -> Work:
    return _prefill(side, side.pick(4096, 1024))


@row("prefill-16k", "prefill, 16,384 tokens", bound=PREFILL_BOUND)
def prefill_16k(side: Side) -> Work:
    return _prefill(side, side.pick(16384, 2048))


@row("prefill-36k", "prefill, 36,864 tokens", bound=PREFILL_BOUND, max_rounds=1)
def prefill_36k(side: Side) -> Work:
    return _prefill(side, side.pick(36864, 4096))


def _decode(side: Side, dtype: torch.dtype) -> Work:
    model, tokens = load_model(side, "decoder", dtype), side.pick(24, 4)
    if side.is_bound:
        return weight_reads(model, tokens)
    ids = torch.tensor([[65]])  # a prompt of one token: its prefill is a step like the others

    def work() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)

    return work


READING = "the weights of decoder layers and output matrix read once per token"


@row("decode-float32", "decode, float32", bound=READING, goals=(Goal(1.15, "bound"),))
def decode_float32(side: Side) -> Work:
    return _decode(side, torch.float32)


@row("decode-bfloat16", "decode, bfloat16", bound=READING, goals=(Goal(1.15, "bound"),))
def decode_bfloat16(side: Side) -> Work:
    return _decode(side, torch.bfloat16)


@row("decode-cached", "decode, float32, 16,384 tokens cached", bound=f"{READING}, and so are keys and values")
def decode_cached(side: Side) -> Work:
    """As after a long clip; the cached states are random numbers."""
    model, tokens, length = load_model(side, "decoder", torch.float32), side.pick(24, 4), side.pick(16384, 1024)
    config = model.config.get_text_config()
    shape = 2, 1, config.num_key_value_heads, length, config.head_dim
    layers = [torch.rand(shape) for _ in range(config.num_hidden_layers)]
    if side.is_bound:
        return weight_reads(model, tokens, layers)
    ids = torch.full((1, length + 1), 65)

    def work() -> None:
        cache = DynamicCache()
        for place, (keys, values) in enumerate(layers):
            cache.update(keys, values, place)
        settings = {"max_new_tokens": tokens, "do_sample": False, "past_key_values": cache}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    return work


@row(
    "loading",
    "from_pretrained, 1.9 GB",
    bound="the file read once from the page cache",
    goals=(Goal(1.1, "output", "peak"), Goal(1.0, "native")),
)
def loading(side: Side) -> Work:
    """Every weight is read once after loading, because files are mapped: without it nothing would be in memory."""
    load_model(side, "thin")  # code and libraries are imported by then
    if not side.is_bound:
        return lambda: load_model(side, "decoder")
    path: Path = checkpoint(Side("native", side.settings), "decoder") / "model.safetensors"
    return lambda: np.fromfile(path, dtype=np.uint8)
