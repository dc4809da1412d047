"""Reads single frames of a video file, the same ones whichever decoder is installed.

    with open_video("clip.mp4") as reader:
        indices = reader.timeline.frames_at([0.0, 0.5, 1.0])
        for picture in reader.frames(indices):  # (H, W, 3) uint8 RGB, one at a time
            ...

What a decoder cannot read reliably it refuses (see `molmo2.video.decoding.readers`), and the next one is tried.
"""

from collections.abc import Callable
from typing import TypeVar

from transformers.utils import logging

from molmo2.video.decoding.readers import BACKENDS, PACKAGES, READERS, Source, VideoReader, VideoSource, brief
from molmo2.video.decoding.timeline import VideoDecodeError

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def open_video(source: VideoSource, backend: str | None = None) -> VideoReader:
    """Opens a video with the first backend that can.

    Use `decode_video` where a failure in the middle of the file should move on to the next backend as well.

    Args:
        source: a path, the bytes of a file, or a file object opened for reading bytes.
        backend: "decord", "torchcodec" or "pyav" to insist on one; None tries them in this order.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        VideoDecodeError: no backend can open it; the message has the reason of each.
        ValueError: `backend` is not one of the three.
        TypeError: `source` is something else.
    """
    return _first_success(source, backend, lambda reader: reader)


def decode_video(source: VideoSource, use: Callable[[VideoReader], Result], backend: str | None = None) -> Result:
    """Returns `use(reader)`, starting over with the next backend where one fails on the way.

    Backends differ in what they can read, and some notice a fault only in the middle of a file. `use` is therefore
    called anew with each reader and must not keep anything from an earlier attempt.

    Args:
        source, backend: as for `open_video`.
        use: reads `timeline` and `frames` and returns the result.

    Raises:
        As `open_video`; exceptions of `use` itself pass through.
    """

    def use_and_close(reader: VideoReader) -> Result:
        with reader:
            return use(reader)

    return _first_success(source, backend, use_and_close)


def _first_success(source: VideoSource, backend: str | None, action: Callable[[VideoReader], Result]) -> Result:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"Unknown video backend {backend!r}. Use one of {', '.join(BACKENDS)}, or None to try all.")
    readable = Source.of(source)
    failures: dict[str, VideoDecodeError] = {}
    for name in BACKENDS if backend is None else (backend,):
        try:
            return action(_open_reader(name, readable, only_choice=backend is not None))
        except VideoDecodeError as error:
            logger.info("Video backend %s failed: %s", name, error)
            failures[name] = error
    reasons = "\n".join(f"  {name}: {error.reason}" for name, error in failures.items())
    raise VideoDecodeError(
        f"No video backend could read {readable.name}:\n{reasons}\n"
        "Check that the file is complete and has a video track; re-encoding it (ffmpeg -i in.mp4 out.mp4) often "
        f"helps. The backends come with these packages: {', '.join(PACKAGES.values())}; PyAV (av) reads the most."
    ) from list(failures.values())[-1]


def _open_reader(name: str, source: Source, only_choice: bool) -> VideoReader:
    try:
        return READERS[name](source, only_choice=only_choice)
    except Exception as error:  # decoders raise nearly anything
        reason = error.reason if isinstance(error, VideoDecodeError) else brief(error)
        raise VideoDecodeError(f"{name} cannot read {source.name}: {reason}", reason) from error
