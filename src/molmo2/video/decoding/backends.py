"""Opening and decoding of video files with the first backend that can; all give the same frames.

    with open_video("clip.mp4") as reader:
        indices = reader.timeline.frames_at([0.0, 0.5, 1.0])
        for frame in reader.frames(indices):  # (H, W, 3) uint8 RGB, one at a time
            ...

A backend refuses what it cannot read reliably (see `molmo2.video.decoding.readers`), and the next one is tried.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers.utils import logging

from molmo2.image.limits import MediaLimitError, MediaLimits
from molmo2.video.decoding.readers import (
    BACKENDS,
    PACKAGES,
    READERS,
    Source,
    VideoReader,
    VideoSource,
    brief,
    isolated,
)
from molmo2.video.decoding.timeline import VideoDecodeError

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def open_video(
    source: VideoSource | Source, backend: str | Sequence[str] | None = None, limits: MediaLimits | None = None
) -> VideoReader:
    """The reader of a video, opened by the first backend that can.

    Use `decode_video` where a failure in the middle of the file should move on to the next backend as well.

    Args:
        source: a path, the bytes of a file, or a file object opened for reading bytes.
        limits: see `MediaLimits`; None for the default ones. A `Source` has its own.
        backend: "decord", "torchcodec" or "pyav" to use this one only, or several of them to try in order; None tries
            them in this order, and takes Pillow for animated WebP.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        MediaLimitError: it is over one of the limits.
        VideoDecodeError: no backend can open it; the message has the reason of each.
        ValueError: `backend` is not one of the three.
        TypeError: `source` is none of these.
    """
    return _first_success(source, backend, limits, lambda reader: reader)


def decode_video(
    source: VideoSource | Source, read: Callable[[VideoReader], Result], backend: str | None = None
) -> Result:
    """The result of `read(reader)`, from the first backend that does not fail before its end.

    Backends differ in what they can read, and some notice a fault only in the middle of a file. `read` is therefore
    called again with each reader and must not keep anything from an earlier attempt.

    Args:
        source, backend: as for `open_video`; a `Source` has limits of its own, the default ones hold for all others.
        read: reads `timeline` and `frames` and returns the result.

    Raises:
        As `open_video`; exceptions of `read` itself are passed on.
    """

    def read_and_close(reader: VideoReader) -> Result:
        with reader:
            return read(reader)

    return _first_success(source, backend, None, read_and_close)


def _first_success(
    source: VideoSource | Source,
    backend: str | Sequence[str] | None,
    limits: MediaLimits | None,
    action: Callable[[VideoReader], Result],
) -> Result:
    """The result of `action` with the first backend that raises no VideoDecodeError."""
    wanted = (backend,) if isinstance(backend, str) else backend
    if wanted is not None and not set(wanted) <= set(BACKENDS):
        raise ValueError(f"Unknown video backend {backend!r}. Use one of {', '.join(BACKENDS)}, or None to try all.")
    readable = source if isinstance(source, Source) else Source.from_input(source, limits)
    failures: dict[str, VideoDecodeError] = {}
    by_default = ("pillow",) if readable.image_format == "WEBP" else BACKENDS
    for name in by_default if wanted is None else wanted:
        try:
            return action(_open_reader(name, readable, only_choice=backend is not None))
        except VideoDecodeError as error:
            logger.info("Video backend %s failed: %s", name, error)
            failures[name] = error
    reasons = "\n".join(f"  {name}: {error.reason}" for name, error in failures.items())
    if readable.image_format == "WEBP" and isinstance(backend, str):
        reasons += "\n  Animated WebP is read by Pillow: leave the backend out."
    raise VideoDecodeError(
        f"No video backend could read {readable.name}:\n{reasons}\n"
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
