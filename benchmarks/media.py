"""Made-up photos and clips: smooth noise, which gives files of realistic size without repeated regions."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import Side

FRAMES_PER_SECOND = 30
PAN = 1200  # columns that the view moves over, in pixels


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB image drawn from the seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((image + rng.integers(-6, 7, image.shape)).clip(0, 255).astype(np.uint8))


def clip(side: Side, height: int, width: int, seconds: int = 64) -> Path:
    """A video file of a view that moves over a photo; written once into the cache folder (H.264, 30 frames a second).

    A key frame every two seconds, as streaming services have it.
    """
    path = side.settings.cache / "clips" / f"{width}x{height}_{seconds}s.mp4"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.mp4")
        _write_clip(partial, height, width, seconds)
        partial.rename(path)
    return path


def _write_clip(path: Path, height: int, width: int, seconds: int) -> None:
    import av

    view = np.asarray(photo(height, width + PAN))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "g": str(2 * FRAMES_PER_SECOND), "crf": "28"}
        for number in range(seconds * FRAMES_PER_SECOND):
            left = abs((3 * number) % (2 * PAN) - PAN)
            frame = np.ascontiguousarray(view[:, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
