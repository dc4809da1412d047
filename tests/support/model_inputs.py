"""Model inputs for tests: prompts of every kind through the tiny processor, and rows taken out of batches."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.model.vision_inputs import TokenGroup, image_groups, prompt_order
from molmo2.processing.processor import Molmo2Processor
from molmo2.video.processing import Molmo2VideoProcessor
from support.checkpoints import make_image, write_processor


def clip(frames: int = 4) -> np.ndarray:
    """(frames, 50, 70, 3) uint8, no two frames alike."""
    return np.stack([np.asarray(make_image(50, 70, seed)) for seed in range(frames)])


@functools.cache
def processor() -> Molmo2Processor:
    """The processor of the tiny checkpoints, 98-pixel crops."""
    with tempfile.TemporaryDirectory() as folder:
        write_processor(Path(folder))
        return Molmo2Processor(
            image_processor=Molmo2ImageProcessor.from_pretrained(folder),
            video_processor=Molmo2VideoProcessor.from_pretrained(folder),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            use_frame_special_tokens=False,
            use_single_crop_col_tokens=False,
        )


# name -> (prompt, images, videos)
ROWS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "text": ("<|im_start|>user\nWhat is the time?<|im_end|>\n", [], []),
    "image": ("<|image|>What is this?", [make_image(90, 130)], []),
    "two images": ("Image 1<|image|>Image 2<|image|>Compare.", [make_image(60, 60, 1), make_image(200, 40, 2)], []),
    "video": ("<|video|>What happens in this clip?", [], [clip()]),
    "image and video": ("<|image|><|video|>Is it there?", [make_image(70, 100, 3)], [clip(3)]),
    "two videos": ("<|video|><|video|>Which is longer?", [], [clip(2), clip(4)]),
}
MIXED = list(ROWS)


def batch(*names: str, **options: Any) -> dict[str, torch.Tensor]:
    """Inputs of a batch with these rows, padded. They are made once in a process; each call gets its own copy."""
    return {key: value.clone() for key, value in _batch(names, tuple(sorted(options.items()))).items()}


@functools.cache
def _batch(names: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> dict[str, torch.Tensor]:
    prompts = [ROWS[name][0] for name in names]
    images = [image for name in names for image in ROWS[name][1]]
    videos = [video for name in names for video in ROWS[name][2]]
    settings: dict[str, Any] = {"padding": True, "return_tensors": "pt", **dict(options)}
    if videos:
        settings["video_metadata"] = [{"total_num_frames": len(video), "fps": 2.0} for video in videos]
    return dict(processor()(text=prompts, images=images or None, videos=videos or None, **settings))


def owners_of(groups: list[list[TokenGroup]], images: Any = None, videos: Any = None) -> list[list[tuple[str, int]]]:
    """The images and videos of each row in the order of the prompt, by their places in these grids."""
    image_grids = torch.zeros(0, 4, dtype=torch.int64) if images is None else torch.as_tensor(images)
    video_grids = torch.zeros(0, 3, dtype=torch.int64) if videos is None else torch.as_tensor(videos)
    sizes = [("image", image_groups(image_grids).sum(-1)), ("video", video_grids.prod(-1))]
    owners = [(kind, place) for kind, counts in sizes for place, count in enumerate(counts) for _ in range(count)]
    order = prompt_order(groups, image_grids, video_grids).tolist()
    assert sorted(order) == list(range(len(owners)))
    rows = iter(order)
    lengths = [sum(size for size, _ in row) for row in groups]
    return [list(dict.fromkeys(owners[next(rows)] for _ in range(length))) for length in lengths]


def real_tokens(outputs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Per row, the entries of a (B, S, ...) output that belong to real tokens."""
    return [row[mask.bool()] for row, mask in zip(outputs, inputs["attention_mask"], strict=True)]
