"""Frames encoded as they are decoded: the model sees a few while the decoder works on the next.

A clip of 384 frames takes 660 MB as pixels and a twentieth of that as vectors. With a `frame_encoder` the pixels of a
whole clip never exist: at any time one chunk of frames is being encoded and another is being decoded and cut.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo2.image.geometry import FrameRun, VideoPlan, video_token_pooling

FRAMES_PER_CHUNK = 16  # as many as the vision tower encodes at a time

# (F, P, pixels), (T, K) and (1, 3), as `get_video_features` takes them -> (T, text width)
FrameEncoder = Callable[[Tensor, Tensor, Tensor], Tensor]


def encode_frames(
    frames: Iterator[np.ndarray],
    plan: VideoPlan,
    cut: Callable[[Iterator[np.ndarray], int], Tensor],
    encoder: FrameEncoder,
) -> Tensor:
    """Vectors of a video's visual tokens, (T, text width), frame after frame.

    Args:
        frames: the sampled frames, `plan.num_frames` of them; read in another thread, one chunk ahead.
        plan: how the video is cut.
        cut: (frames, how many) -> their pixels, (F, P, pixels).
        encoder: see `FrameEncoder`; `model.encode_frames` moves its arguments to the model.

    Raises:
        Whatever reading, cutting or encoding raises.
    """
    chunks = list(_chunks(plan))
    vectors = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="molmo2-frames") as ahead:

        def read(chunk: FrameRun) -> Any:
            return ahead.submit(cut, islice(frames, chunk.num_frames), chunk.num_frames)

        coming = read(chunks[0])
        for number, chunk in enumerate(chunks):
            pixels = coming.result()
            if number + 1 < len(chunks):
                coming = read(chunks[number + 1])
            one_run = VideoPlan(chunk.num_frames, chunk.settings)
            vectors.append(
                encoder(pixels, torch.from_numpy(video_token_pooling(one_run)), torch.tensor(one_run.grids))
            )
    if next(frames, None) is not None:  # also reads to the end, where some faults of a file show
        raise ValueError(f"{plan.num_frames} frame(s) were announced, but more came.")
    return torch.cat(vectors)


def _chunks(plan: VideoPlan) -> Iterator[FrameRun]:
    """The runs of a video in pieces of at most `FRAMES_PER_CHUNK` frames."""
    for run in plan.runs:
        for start in range(0, run.num_frames, FRAMES_PER_CHUNK):
            yield FrameRun(min(FRAMES_PER_CHUNK, run.num_frames - start), run.settings)
