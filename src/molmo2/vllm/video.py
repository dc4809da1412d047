"""Videos of requests go to the processor as they came, so that only the frames that are wanted are decoded."""

import inspect
import logging
from typing import Any

import numpy as np
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VideoLoader

from molmo2.vllm.options import VIDEO_OPTIONS

logger = logging.getLogger("vllm.molmo2")  # vLLM shows what is below "vllm"

# vLLM passes this number where a request has none.
UNASKED_NUM_FRAMES = inspect.signature(VideoMediaIO).parameters["num_frames"].default


class UndecodedVideo(VideoLoader):
    """Takes the place of vLLM's loader, which decodes a whole file to take some frames by index."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """The bytes themselves, and the options for the processor.

        Args:
            data: Of a video file.
            num_frames, options: `media_io_kwargs` of server and request. Those of vLLM's decoders change nothing.
        Returns:
            (bytes,) uint8 and metadata for `is_undecoded`.
        """
        if num_frames not in (-1, UNASKED_NUM_FRAMES):
            options["num_frames"] = num_frames
        unknown = sorted(options.keys() - VIDEO_OPTIONS)
        if unknown:
            logger.warning("molmo2.vllm has no use for %s in media_io_kwargs of videos.", ", ".join(unknown))
        known = {name: value for name, value in options.items() if name in VIDEO_OPTIONS}
        return np.frombuffer(data, dtype=np.uint8), {"options": known}


def is_undecoded(frames: Any) -> bool:
    """Whether these are the bytes of a file, not frames."""
    return isinstance(frames, np.ndarray) and frames.ndim == 1
