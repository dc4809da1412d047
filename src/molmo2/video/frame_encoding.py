"""Frames decoded ahead of their use, and encoded by the model while the next are decoded.

A clip of 384 frames takes 660 MB as pixel values and a twentieth of that as features. With a `frame_encoder` the pixel
values of a whole clip are never in memory: one chunk of frames is encoded while another is decoded and cut.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from molmo2.image.geometry import VideoPlan, video_token_pooling

FRAMES_PER_CHUNK = 16  # as many as the vision tower encodes at a time

Item = TypeVar("Item")
# (F, P, values), (T, K) and (1, 3), as `get_video_features` takes them -> (T, text width)
FrameEncoder = Callable[[Tensor, Tensor, Tensor], Tensor]


def read_ahead(items: Iterator[Item], count: int) -> Generator[Item, None, None]:
    """The same items, of which up to `count` are made in another thread while an earlier one is in use.

    An error of `items` is raised here, after the items before it. Closing this iterator early stops the thread and
    waits for it, so that the source of the items may be closed next: wrap it in `contextlib.closing`.
    """
    end: Any = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="molmo2-read-ahead") as executor:
        pending = deque(executor.submit(next, items, end) for _ in range(count))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(executor.submit(next, items, end))
                yield item
        finally:
            for future in pending:
                future.cancel()


def encode_frames(
    frames: Iterator[np.ndarray],
    plan: VideoPlan,
    cut: Callable[[Iterator[np.ndarray], int], Tensor],
    encoder: FrameEncoder,
) -> Tensor:
    """Features of the visual tokens of a video, (T, text width), frame after frame.

    Args:
        frames: the sampled frames, `plan.num_frames` of them; read in another thread, one chunk ahead.
        plan: the plan of the video.
        cut: (frames, their number) -> pixel values, (F, P, values).
        encoder: see `FrameEncoder`; `model.encode_frames` moves its arguments to the model.

    Raises:
        ValueError: there are more frames than planned. Errors of reading, cutting and encoding are passed on.
    """
    chunks = list(_chunks(plan))
    pixel_values = (cut(islice(frames, chunk.num_frames), chunk.num_frames) for chunk in chunks)
    features = []
    with closing(read_ahead(pixel_values, 1)) as ahead:
        for chunk, pixels in zip(chunks, ahead):
            pooling, grids = torch.from_numpy(video_token_pooling(chunk)), torch.tensor(chunk.grids)
            features.append(encoder(pixels, pooling, grids))
    if next(frames, None) is not None:  # also reads to the end, where some faults of a file show
        raise ValueError(f"There are more frames than the {plan.num_frames} of the plan.")
    return torch.cat(features)


def _chunks(plan: VideoPlan) -> Iterator[VideoPlan]:
    """The runs of a video, split so that none has more than `FRAMES_PER_CHUNK` frames."""
    for run in plan.runs:
        for start in range(0, run.num_frames, FRAMES_PER_CHUNK):
            yield VideoPlan(min(FRAMES_PER_CHUNK, run.num_frames - start), run.settings)
