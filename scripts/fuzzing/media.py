"""Images and videos with changed bytes, by every way in, and what backends make of them."""

import io
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from molmo2.image.limits import MediaLimits
from molmo2.image.loading import load_images
from molmo2.video.decoding.opening import open_video
from molmo2.video.decoding.timeline import VideoDecodeError
from support.clips import load_video
from support.hostile_media import (
    CONTAINERS,
    clip,
    gif_of_size,
    image_bytes,
    mutated,
    png_of_size,
    tiff_of_size,
    webp_of_size,
    with_far_offset,
    with_frame_count,
    with_matrix,
)

IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_AGREED_DIFFERENCE = 0  # of pixels, between backends that both read a file
ISOLATED, ISOLATED_EVERY = MediaLimits(decode_seconds=30), 8  # of the videos, by their bytes, whatever the seed draws
FOLDER = Path(tempfile.mkdtemp(prefix="molmo2_fuzz_"))


def prepare() -> None:
    """Start a process that decodes, which is no part of the first case."""
    load_video(clip(), num_frames=1, limits=ISOLATED)


def cases(seed: int) -> Iterator[tuple[str, str, bytes]]:
    """(kind, way in, bytes) without end."""
    rng = np.random.default_rng(seed)
    while True:
        is_crafted = rng.random() < 0.08
        if rng.random() < 0.5:
            content = _large_image(rng) if is_crafted else image_bytes(str(rng.choice(IMAGES)))
            yield "image", str(rng.choice(["path", "bytes", "file"])), mutated(content, rng)
        else:
            content = _odd_clip(rng) if is_crafted else clip(str(rng.choice(list(CONTAINERS))))
            yield "video", str(rng.choice(["path", "bytes", "file", "both"])), mutated(content, rng)


def _large_image(rng: np.random.Generator) -> bytes:
    """A few bytes that announce a size of any order of magnitude."""
    width, height = (int(2 ** rng.uniform(0, 31)) for _ in range(2))
    makers = (
        lambda: png_of_size(width, height, int(rng.choice([1, 8, 16])), int(rng.choice([0, 2, 3, 6]))),
        lambda: gif_of_size(width % 65_536, height % 65_536, int(2 ** rng.uniform(0, 12))),
        lambda: webp_of_size(1 + width % 16_384, 1 + height % 16_384),
        lambda: tiff_of_size(width, height),
    )
    return makers[int(rng.integers(len(makers)))]()


def _odd_clip(rng: np.random.Generator) -> bytes:
    """A clip whose header lies about its frames or their places, or turns them in any way."""
    number = int(2 ** rng.uniform(0, 32)) - 1
    makers = (
        lambda: with_frame_count(clip(str(rng.choice(["mp4", "avi"]))), number),
        lambda: with_far_offset(clip(), number),
        lambda: with_matrix(clip(), tuple(rng.choice([-1, 0, 1, rng.uniform(-2, 2)], 4).tolist())),
    )
    return makers[int(rng.integers(len(makers)))]()


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
            is_isolated = zlib.crc32(content) % ISOLATED_EVERY == 0
            load_video(reference, num_frames=4, limits=ISOLATED if is_isolated else MediaLimits())
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
