"""Images and videos with changed bytes, by every way in, and what backends make of them."""

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from molmo2.image.loading import load_images
from molmo2.video.decoding.backends import VideoDecodeError, open_video
from molmo2.video.processing import load_video
from support.hostile_media import CONTAINERS, clip, mutated, picture

IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_AGREED_DIFFERENCE = 0  # of pixels, between backends that both read a file
FOLDER = Path(tempfile.mkdtemp(prefix="molmo2_fuzz_"))


def cases(seed: int) -> Iterator[tuple[str, str, bytes]]:
    rng = np.random.default_rng(seed)
    while True:
        if rng.random() < 0.5:
            yield "image", str(rng.choice(["path", "bytes", "file"])), mutated(picture(str(rng.choice(IMAGES))), rng)
        else:
            kind = str(rng.choice(list(CONTAINERS)))
            yield "video", str(rng.choice(["path", "bytes", "file", "both"])), mutated(clip(kind), rng)


def run(case: tuple[str, str, bytes]) -> str:
    media, way, content = case
    if way == "path":
        reference: object = FOLDER / "media"
        FOLDER.joinpath("media").write_bytes(content)
    else:
        reference = content if way in ("bytes", "both") else io.BytesIO(content)
    if way == "both":
        return _agreement(content)
    try:
        if media == "image":
            load_images(reference)
        else:
            load_video(reference, num_frames=4)
    except (ValueError, TypeError):  # what is documented; other errors are passed on
        return "refused"
    return "ok"


def _agreement(content: bytes) -> str:
    """Whether decord and PyAV show the same where both read a file."""
    shown = []
    for backend in ("decord", "pyav"):
        try:
            with open_video(content, backend) as reader:
                indices = np.linspace(0, reader.timeline.num_frames - 1, 4).astype(int)
                shown.append((reader.timeline, list(reader.frames(indices))))
        except VideoDecodeError:
            return "refused"
        except ValueError:  # a limit
            return "refused"
    (first, frames), (second, others) = shown
    if first.num_frames != second.num_frames or not np.allclose(first.start_seconds, second.start_seconds, atol=2e-3):
        return f"wrong: decord has {first.num_frames} frames, PyAV {second.num_frames}, or other times"
    for frame, other in zip(frames, others, strict=True):
        if frame.shape != other.shape or np.abs(frame.astype(int) - other).max() > MAX_AGREED_DIFFERENCE:
            return f"wrong: decord and PyAV show different frames ({frame.shape} and {other.shape})"
    return "ok"
