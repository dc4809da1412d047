"""Probe: loads a converted folder with transformers and compares its logits with those of the native tensors."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2.convert.errors import VerificationError, listing
from molmo2.convert.native_config import NativeConfig
from molmo2.convert.numerics import BlockConverter
from molmo2.convert.source import NativeSource

TOLERANCE = 1e-3  # absolute, on logits; a wrong name moves them by whole units
QUESTION = "What is in the image? Count to 3."


def probe_folder(source: NativeSource, folder: Path) -> float:
    """Run the folder on a fixed prompt and image, then the same model filled directly from the checkpoint.

    The second model is the first one, emptied (every value NaN) and filled tensor by tensor: no second copy is in
    memory, and a tensor left unfilled cannot go unnoticed.

    Returns:
        The largest difference between logits.
    Raises:
        VerificationError: If it is larger than `TOLERANCE`, if the model does not load or run, if it has other
            tensors than the source, or if the prompt is longer than the model's longest sequence.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    with _must_work(f"{folder} does not load with transformers"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    longest = source.config.max_positions
    length = _least_length(source.config)
    if length <= longest:
        inputs = probe_inputs(tokenizer, source.config)
        length = inputs["input_ids"].shape[1]
    if length > longest:
        raise VerificationError(
            f"{folder} is complete but was not probed: the probe's prompt has {length} tokens, and the longest "
            f"sequence is set to {longest}. Leave --probe out, or raise --max-model-len."
        )
    with _must_work(f"{folder} does not load with transformers"):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=True, dtype="auto", attn_implementation="sdpa"
        ).eval()
    with torch.inference_mode():
        with _must_work(f"The model in {folder} does not run"):
            converted = model(**inputs).logits.float()
        _refill(model, source)
        native = model(**inputs).logits.float()
    difference = float((converted - native).abs().max())
    if not math.isfinite(difference) or difference > TOLERANCE:
        raise VerificationError(
            f"Logits of {folder} differ from those of the native tensors by {difference:.3g}; "
            f"expected at most {TOLERANCE}."
        )
    return difference


@contextmanager
def _must_work(failure: str) -> Iterator[None]:
    """Context for calls into the folder's own code, which may raise anything."""
    try:
        yield
    except Exception as error:
        raise VerificationError(f"{failure}: {type(error).__name__}: {error}") from error


def _least_length(config: NativeConfig) -> int:
    """Visual tokens of the probe's image."""
    sides = [side // config.vit["image_patch_size"] for side in config.vit["image_default_input_size"]]
    windows = [-(-side // config.image[f"pooling_{name}"]) for side, name in zip(sides, "hw", strict=True)]
    return 2 * math.prod(windows)


def probe_inputs(tokenizer: Any, config: NativeConfig) -> dict[str, Any]:
    """A prompt with one image: a view of the whole and one crop, each a smooth pattern, pooled window by window.

    Made without the processor, whose settings decide how images of any size are cut: only the model is tested.
    """
    import torch

    height, width = config.vit["image_default_input_size"]
    patch = config.vit["image_patch_size"]
    rows, cols = height // patch, width // patch
    windows = _windows(rows, cols, config.image["pooling_h"], config.image["pooling_w"])
    pooled_rows, pooled_cols = -(-rows // config.image["pooling_h"]), -(-cols // config.image["pooling_w"])
    pixels = torch.sin(torch.arange(2 * rows * cols * patch * patch * 3, dtype=torch.float32) / 7)
    view = "<im_patch>" * len(windows)
    image = f"<low_res_im_start>{view}<im_end><im_start>{view}<im_end>"
    prompt = f"<|im_start|>user\n{image}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.reshape(2, rows * cols, -1),
        "image_token_pooling": torch.tensor(
            windows + [[-1 if index < 0 else index + rows * cols for index in window] for window in windows]
        ),
        "image_grids": torch.tensor([[pooled_rows, pooled_cols] * 2]),
        "image_num_crops": torch.tensor([2]),
    }
    is_visual = (ids >= config.embedding_rows) & config.has_two_way_images
    return {**inputs, "token_type_ids": is_visual.long()}


def _windows(rows: int, cols: int, height: int, width: int) -> list[list[int]]:
    """Patches of each pooling window of a grid, row by row; -1 past the edge."""
    return [
        [
            row * cols + col if row < rows and col < cols else -1
            for row in range(top, top + height)
            for col in range(left, left + width)
        ]
        for top in range(0, rows, height)
        for left in range(0, cols, width)
    ]


def _refill(model: Any, source: NativeSource) -> None:
    import torch

    parameters = dict(model.named_parameters())
    expected = {rename.target for rename in source.renames}
    if set(parameters) != expected:
        wrong = sorted(set(parameters) ^ expected)
        raise VerificationError(f"The model and the source have different tensors:\n{listing(wrong)}")
    for parameter in parameters.values():
        parameter.data = torch.full_like(parameter.data, math.nan)
    for rename in source.renames:
        data = parameters[rename.target].data
        converter = BlockConverter(str(data.dtype).removeprefix("torch."))
        target, position = data.view(-1).view(torch.uint8), 0
        for block in converter.stream(source.tensors[rename.native]):
            target[position : position + len(block)] = torch.frombuffer(block, dtype=torch.uint8)
            position += len(block)
