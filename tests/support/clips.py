"""Clips in files, from frames that were drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from molmo2.video.processing import Molmo2VideoProcessor, SampledVideoMetadata


def load_video(video: Any, **options: Any) -> tuple[np.ndarray, SampledVideoMetadata]:
    """The sampled frames of a file, (F, H, W, 3) uint8, and their metadata; options as for `preprocess`."""
    return Molmo2VideoProcessor().fetch_videos(video, **options)


def write_clip(frames: Sequence[np.ndarray], target: Path, fps: int) -> Path:
    """Encode frames (H, W, 3) uint8 as H.264, with full colours, so that sides may be odd; returns the file."""
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "8"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return target
