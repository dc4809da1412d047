"""What a request costs on a card: time and memory from shapes and two speeds, checked against what is measured here.

    python -m benchmarks.cost --tables                 # the tables of docs/cost.md: 4B and 8B on 24, 48 and 80 GB
    python -m benchmarks.cost --check                  # prediction and measurement on this machine, one thread

Bytes are those of `molmo2.tools.memory`. Time is the larger of two: multiplications over the speed of matrix products,
and bytes over that of memory. Both speeds are measured for the check, and data sheets times a usual share for cards.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import REPOSITORY, Settings, Side
from molmo2.configuration import Molmo2Config
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from molmo2.processing.prompt_tokens import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from molmo2.tools.memory import RequestShape, estimate_memory
from molmo2.tools.plan import plan

PUBLISHED = REPOSITORY / "tests" / "data" / "published"
KERNELS_PER_LAYER, OTHER_KERNELS = 18, 40  # of a decoded token; see tests/unit/test_launches.py
SECONDS_PER_KERNEL = 5e-6  # that the host takes to launch one
DECODED_ROWS = (1, 4)  # of the check


@dataclass(frozen=True)
class Speeds:
    """Of a machine, as reached: multiply-adds and bytes a second, and bytes of memory."""

    name: str
    products: float
    bytes: float
    memory: float = float("inf")
    launch: float = SECONDS_PER_KERNEL
    few_rows: dict[int, float] = field(default_factory=dict)  # number of rows -> multiply-adds a second


# Dense bfloat16 and memory of data sheets; 60 % and 80 % of them are reached in practice.
CARDS = (
    Speeds("24 GB (RTX 4090)", 0.6 * 165e12 / 2, 0.8 * 1008e9, 24e9),
    Speeds("48 GB (L40S)", 0.6 * 362e12 / 2, 0.8 * 864e9, 48e9),
    Speeds("80 GB (H100)", 0.6 * 989e12 / 2, 0.8 * 3350e9, 80e9),
)


@dataclass(frozen=True)
class Request:
    """A question about a 1080p photo in this many crops, or about a clip of this many frames; the same in each row."""

    title: str
    max_crops: int = 0
    frames: int = 0
    rows: int = 1
    new_tokens: int = 128

    def shape(self, processor: Any) -> RequestShape:
        """As `molmo2.plan` counts it."""
        images, videos, text = None, None, "What is this? " * 4
        if self.max_crops:
            images, text = [Image.new("RGB", (1920, 1080))] * self.rows, IMAGE_PLACEHOLDER + text
        if self.frames:
            frame, times = np.zeros((2, 2, 3), np.uint8), [0.5 * place for place in range(self.frames)]
            videos = [([frame] * self.frames, {"timestamps": times})] * self.rows
            text = VIDEO_PLACEHOLDER + text
        options = {"max_crops": self.max_crops or 1, "num_frames": self.frames or 1, "max_fps": None}
        options["frame_sample_mode"] = "uniform_last_frame"
        planned = plan(processor, [text] * self.rows, images, videos, max_new_tokens=self.new_tokens, **options)
        return planned.shape  # type: ignore[return-value]  # planned ones have it


REQUESTS = (
    Request("text"),
    Request("photo, 8 crops and the whole", max_crops=8),
    Request("photo, 24 crops and the whole", max_crops=24),
    Request("clip, 64 frames", frames=64),
    Request("clip, 128 frames", frames=128),
    Request("clip, 384 frames", frames=384),
    Request("16 photos, 8 crops each, one batch", max_crops=8, rows=16),
)


@dataclass(frozen=True)
class Work:
    """Of one step: multiply-adds, bytes that are read, kernels."""

    products: float
    bytes: float
    kernels: int = 0
    rows: int = 0  # of the products of a new token

    def seconds(self, speeds: Speeds) -> float:
        products = speeds.few_rows.get(self.rows, speeds.products)
        return max(self.products / products, self.bytes / speeds.bytes, self.kernels * speeds.launch)


def matrices(module: torch.nn.Module) -> int:
    """Weights of the linear layers: multiply-adds for each row."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))


def vision(model: Any, shape: RequestShape) -> Work:
    """Vision tower and connector."""
    backbone, config = model.model.vision_backbone, model.config
    tower = config.vit_config
    height, width = tower.image_default_input_size
    patches = (height // tower.image_patch_size) * (width // tower.image_patch_size)
    layers = len([part for part in backbone.image_vit.modules() if type(part).__name__.endswith("Block")])
    attention = 2 * layers * patches**2 * tower.num_attention_heads * tower.head_dim
    crops = shape.num_crops * (patches * matrices(backbone.image_vit) + attention)
    pooling = matrices(backbone.image_pooling_2d)
    connector = shape.pooled_tokens * (shape.window * pooling + matrices(backbone.image_projector))
    return Work(crops + connector, 0)


def prefill(model: Any, shape: RequestShape) -> Work:
    """The text model over the prompt: tokens see those before them, visual ones also all visual ones behind them.

    Marks of frames and rows of crops, which see as far, are not in `pooled_tokens`: 2 of 83 tokens of a frame.
    """
    text = model.config.text_config
    decoder = model.get_decoder()
    attention = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * shape.rows * pairs(shape)
    element = next(model.parameters()).element_size()
    return Work(shape.rows * shape.row_tokens * matrices(decoder) + attention, element * matrices(decoder))


def pairs(shape: RequestShape) -> float:
    """Queries with the keys that they see, in a row of the prompt."""
    tokens, visual = shape.row_tokens, shape.pooled_tokens / max(shape.rows, 1)
    return tokens * (tokens + 1) / 2 + visual * (visual - 1) / 2


def decode(model: Any, shape: RequestShape) -> Work:
    """One token of each row: weights once, keys and values of each row."""
    text, decoder = model.config.text_config, model.get_decoder()
    element = next(model.parameters()).element_size()
    weights = matrices(decoder) + matrices(model.lm_head)
    length = shape.row_tokens + shape.new_tokens / 2
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * length * shape.rows
    per_key = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * length * shape.rows
    kernels = KERNELS_PER_LAYER * text.num_hidden_layers + OTHER_KERNELS
    return Work(shape.rows * weights + per_key, element * (weights + cached), kernels, shape.rows)


# The text model of the 8B is that of Qwen3-8B; the vision tower is the same.
TEXT_OF_8B = {"hidden_size": 4096, "intermediate_size": 12288}


def published(name: str) -> Any:
    """A model of the published shape without weights, in bfloat16."""
    settings = json.loads((PUBLISHED / "Molmo2-4B" / "config.json").read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    if name == "Molmo2-8B":
        settings["text_config"].update(TEXT_OF_8B)
        settings["adapter_config"].update(text_hidden_size=4096, intermediate_size=12288)
    with torch.device("meta"):
        return Molmo2ForConditionalGeneration(Molmo2Config(**settings)).to(torch.bfloat16)


def weight_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def tables() -> str:
    from benchmarks.sides import processor

    lines, counting = [], processor(Side("ours", replace(Settings(), quick=True)), "thin")
    for name in ("Molmo2-4B", "Molmo2-8B"):
        model = published(name)
        own = weight_bytes(model)
        lines += [f"**{name}**, bfloat16, weights {own / 1e9:.1f} GB:", ""]
        heads = [f"{card.name}: vision, prefill, token (eager)" for card in CARDS]
        lines += [f"| request | tokens | memory | {' | '.join(heads)} |", "|---" * (3 + len(CARDS)) + "|"]
        for request in REQUESTS:
            shape = request.shape(counting)
            needed = own + estimate_memory(model, shape).total
            cells = [_cell(model, shape, card, needed) for card in CARDS]
            lines.append(f"| {request.title} | {shape.row_tokens:,} | {needed / 1e9:.1f} GB | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(model: Any, shape: RequestShape, card: Speeds, needed: float) -> str:
    if needed > 0.92 * card.memory:  # CUDA and fragments take the rest
        return "does not fit"
    compiled = Speeds(card.name, card.products, card.bytes, launch=0)
    times = [part(model, shape).seconds(compiled) for part in (vision, prefill, decode)]
    eager = decode(model, shape).seconds(card)
    return f"{times[0]:.2f} s, {times[1]:.2f} s, {times[2] * 1e3:.1f} ms ({eager * 1e3:.1f})"


# --- the check -------------------------------------------------------------------------------------------------------


def taken(work: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of this thread: other programs on the machine do not count."""
    work()
    found = []
    for _ in range(repeats):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return min(found)


def measured_speeds() -> Speeds:
    """Of one thread in float32: a product of the shape of a long prompt, and a product with one row."""
    rows, weight = torch.randn(1024, 2048), torch.randn(8192, 2048)
    large = [torch.randn(2048, 8192) for _ in range(8)]  # 0.5 GB, beyond any cache
    vector = torch.zeros(8192)
    products = rows.numel() * weight.shape[0] / taken(lambda: torch.mm(rows, weight.t()))
    read = sum(part.numel() * 4 for part in large) / taken(lambda: [torch.mv(part, vector) for part in large])
    few = {rows: few_products(rows) for rows in DECODED_ROWS}
    return Speeds("this machine, one thread", products, read, launch=0, few_rows=few)


def few_products(rows: int) -> float:
    """Multiply-adds a second of products with this many rows, over weights beyond any cache.

    A GPU reads the weights once for all rows and multiplies while it reads. A CPU does not where its library computes
    few rows one by one, or with the tiles of many of which most are empty.
    """
    weights = [torch.randn(8192, 2048) for _ in range(8)]
    given = torch.randn(rows, 2048)
    took = taken(lambda: [torch.nn.functional.linear(given, weight) for weight in weights])
    return rows * sum(weight.numel() for weight in weights) / took


def check(settings: Settings) -> str:
    """Predicted and measured seconds of each part, with small models of real widths."""
    from benchmarks.models import clip_and_text
    from benchmarks.sides import load_model

    side = Side("ours", settings)
    speeds = measured_speeds()
    few = ", ".join(f"{speed / 1e9:.1f} G with {rows} row(s)" for rows, speed in speeds.few_rows.items())
    lines = [f"{speeds.products / 1e9:.1f} G multiply-adds ({few}) and {speeds.bytes / 1e9:.1f} GB a second.", ""]
    lines += ["| part | predicted | measured | measured / predicted |", "|---|---|---|---|"]

    def add(title: str, work: Work, run: Callable[[], Any], repeats: int = 1) -> None:
        predicted, found = work.seconds(speeds), taken(run, repeats)
        lines.append(f"| {title} | {predicted:.3g} s | {found:.3g} s | {found / predicted:.2f} |")

    with torch.inference_mode():
        tower = load_model(side, "vision")
        crops = side.pick(2, 1)
        pixels, pooling = torch.zeros(crops, 729, 588), torch.arange(crops * 729).unflatten(0, (-1, 9))
        shape = RequestShape(crops, crops * 81, 9, 1, 0)
        add(f"vision, {crops} frames", vision(tower, shape), lambda: tower.model.vision_backbone(pixels, pooling))
        model = load_model(side, "thin")
        for length in side.pick((512, 2048, 4096), (256,)):
            given = clip_and_text(side, length)  # without pixels: its visual tokens are all in the text model
            shape = RequestShape(0, int(given["token_type_ids"].sum()), 0, 1, length)
            run = lambda given=given: model(**given, use_cache=True, logits_to_keep=1)  # noqa: E731
            add(f"prefill, {length:,} tokens", prefill(model, shape), run)
        for rows in DECODED_ROWS:
            ids = torch.full((rows, 1), 65)
            tokens = side.pick(16, 4)
            shape = RequestShape(0, 0, 0, rows, 1, tokens)
            one = decode(model, shape)
            work = Work(one.products * tokens, one.bytes * tokens, rows=rows)
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
            run = lambda ids=ids, options=options: model.generate(input_ids=ids, **options)  # noqa: E731
            add(f"decode, {rows} row(s), {tokens} tokens", work, run)
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.cost", description=__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small sizes: tries the check, measures nothing")
    parser.add_argument("--cache", type=Path, default=Settings().cache, metavar="DIR")
    arguments = parser.parse_args(given)
    if arguments.tables:
        print(tables())
    if arguments.check:
        torch.set_num_threads(1)
        print(check(Settings(quick=arguments.quick, threads=1, cache=arguments.cache.resolve())))


if __name__ == "__main__":
    main()
