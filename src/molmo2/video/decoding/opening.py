"""A video that stays open, for those who go back to it.

with open_video("clip.mp4") as reader:
    indices = reader.timeline.frames_at([0.0, 0.5, 1.0])
    for frame in reader.frames(indices):  # (H, W, 3) uint8 RGB, one at a time
        ...
"""

from collections.abc import Sequence

from molmo2.image.limits import MediaLimits, checked_limits
from molmo2.video.decoding.backends import decode_video
from molmo2.video.decoding.readers import Source, VideoReader, VideoSource


def open_video(
    source: VideoSource | Source, backend: str | Sequence[str] | None = None, limits: MediaLimits | None = None
) -> VideoReader:
    """The reader of a video, opened by the first backend that can.

    Use `decode_video` where a failure in the middle of the file should move on to the next backend as well.

    Args:
        source: A path, the bytes of a file, or a file object opened for reading bytes.
        backend: "decord", "torchcodec" or "pyav" to use this one only, or several of them to try in order; None tries
            them in this order, and takes Pillow for animated WebP.
        limits: See `MediaLimits`; None for the default ones. A `Source` has its own.
    Raises:
        FileNotFoundError, IsADirectoryError: There is no such file.
        MediaLimitError: It is over one of the limits.
        VideoDecodeError: No backend can open it; the message has the reason of each.
        ValueError: `backend` is none of the three, or an empty list.
        TypeError: `source` is none of these.
    """
    readable = source if isinstance(source, Source) else Source.from_input(source, checked_limits(limits))
    return decode_video(readable, lambda reader: reader, backend)
