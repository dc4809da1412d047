"""Decoding of video files with the first backend that can; all give the same frames.

A backend refuses what it cannot read reliably (see `molmo2.video.decoding.readers`), and the next one is tried.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from transformers.utils import logging

from molmo2.image.limits import MediaLimitError
from molmo2.video.decoding.readers import BACKENDS, PACKAGES, READERS, Source, VideoReader, isolated
from molmo2.video.decoding.timeline import VideoDecodeError, brief

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def decode_video(
    source: Source, read: Callable[[VideoReader], Result], backend: str | Sequence[str] | None = None
) -> Result:
    """The result of `read(reader)`, from the first backend that does not fail before its end.

    Backends differ in what they can read, and some notice a fault only in the middle of a file. `read` is therefore
    called again with each reader and must not keep anything from an earlier attempt.

    Args:
        source: the video.
        read: reads `timeline` and `frames` and returns the result. It has to close the reader, or to return it open.
        backend: "decord", "torchcodec" or "pyav" to use this one only, or several of them to try in order; None tries
            them in this order, and takes Pillow for animated WebP.

    Raises:
        MediaLimitError: the video is over one of its limits.
        VideoDecodeError: no backend can read it; the message has the reason of each.
        ValueError: `backend` is none of the three, or an empty list. Exceptions of `read` itself are passed on.
    """
    wanted = (backend,) if isinstance(backend, str) else backend
    is_known = isinstance(wanted, Collection) and len(wanted) > 0 and all(name in BACKENDS for name in wanted)
    if wanted is not None and not is_known:
        raise ValueError(f"Unknown video backend {backend!r}. Use one of {', '.join(BACKENDS)}, or None to try all.")
    failures: dict[str, VideoDecodeError] = {}
    by_default = ("pillow",) if source.image_format == "WEBP" else BACKENDS
    for name in by_default if wanted is None else wanted:
        try:
            return read(_open_reader(name, source, only_choice=backend is not None))
        except VideoDecodeError as error:
            logger.info("Video backend %s failed: %s", name, error)
            failures[name] = error
    reasons = "\n".join(f"  {name}: {error.reason}" for name, error in failures.items())
    if source.image_format == "WEBP" and isinstance(backend, str):
        reasons += "\n  Animated WebP is read by Pillow: leave the backend out."
    raise VideoDecodeError(
        f"No video backend could read {source.name}:\n{reasons}\n"
        "Check that the file is complete and has a video track; re-encoding it (ffmpeg -i in.mp4 out.mp4) often "
        f"helps. The backends come with these packages: {', '.join(PACKAGES.values())}; PyAV (av) reads the most."
    ) from list(failures.values())[-1]


def _open_reader(name: str, source: Source, only_choice: bool) -> VideoReader:
    try:
        if source.limits.decode_seconds is None:
            reader = READERS[name](source, only_choice=only_choice)
        else:
            reader = isolated("reader")(name, source, only_choice)
    except MediaLimitError:
        raise
    except Exception as error:  # decoders raise nearly anything
        reason = error.reason if isinstance(error, VideoDecodeError) else brief(error)
        raise VideoDecodeError(f"{name} cannot read {source.name}: {reason}", reason) from error
    timeline = reader.timeline
    try:
        source.limits.check_video(
            source.name, timeline.num_frames, (timeline.height, timeline.width), source.num_bytes
        )
    except MediaLimitError:
        reader.close()
        raise
    return reader
