"""Images and videos as parts of a message, and what is known of them: sizes and times, with which answers are read."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from molmo2.grounding.parse import IMAGE, MULTI_IMAGE, MediaInfo, media_info
from molmo2.image.limits import MediaLimits, checked_limits
from molmo2.image.loading import fetch_images, is_encoded, load_images
from molmo2.image.measuring import measure_images
from molmo2.image.opening import orientation
from molmo2.tools.media_files import is_url
from molmo2.video.loading import SampledVideoMetadata, VideoItem, read_video
from molmo2.video.processing import Molmo2VideoProcessor

SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
VIDEO_TYPES = {".mkv": "video/x-matroska", ".mov": "video/quicktime", ".webm": "video/webm"}


def message_parts(
    images: Sequence[Any], videos: Sequence[Any], options: Mapping[str, Any], limits: MediaLimits | None = None
) -> tuple[list[dict[str, Any]], MediaInfo]:
    """Parts of a user message, images first as in training, and what they show.

    Args:
        options: Of the processor; those of sampling decide which frames of a video an answer is about.
        limits: Of videos, which are opened here for their times.
    """
    parts = [{"type": "image_url", "image_url": {"url": image_url(image)}} for image in images]
    parts += [{"type": "video_url", "video_url": {"url": video_url(video)}} for video in videos]
    sizes = tuple((width, height) for image in images for height, width in measure_images([image]))
    infos = [media_info(sampled_metadata(video, options, limits)) for video in videos]
    if infos and infos[0] is not None:
        others = tuple(info for info in infos[1:] if info is not None)
        return parts, replace(infos[0], image_sizes=sizes, more_videos=others)
    return parts, MediaInfo(MULTI_IMAGE if len(sizes) > 1 else IMAGE, sizes)


def image_url(image: Any) -> str:
    """A data URL. Files that every server reads alike are sent as they are, all others as PNG, upright and in RGB.

    Raises:
        FileNotFoundError, TypeError, ValueError: As `load_images`; also what is over its limits is not sent.
    """
    content = _file_content(image)
    if content is not None:
        media_type = fetch_images(image, finish=_type_to_send)
        if media_type is not None:
            return _data_url(media_type, content)
    (pixels,) = load_images([image])
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return _data_url("image/png", buffer.getvalue())


def _type_to_send(image: Image.Image) -> str | None:
    """The media type of a file that is sent as it is; None for others."""
    return SENT_AS_THEY_ARE.get(image.format or "") if image.mode == "RGB" and orientation(image) == 1 else None


def video_url(video: Any) -> str:
    """A data URL of a file; the URL where that is what was passed: the server fetches it.

    Raises:
        TypeError: It is no encoded video.
    """
    if isinstance(video, str) and (is_url(video) or video.startswith("data:")):
        return video
    content = _file_content(video)
    if content is None:
        raise TypeError(
            f"A server takes videos as files, but this is a {type(video).__name__} or a path that does not exist "
            f"({str(video)[:80]!r}). Pass a path, a URL or the bytes of a file."
        )
    suffix = Path(video).suffix.lower() if not isinstance(video, (bytes, bytearray, memoryview)) else ""
    return _data_url(VIDEO_TYPES.get(suffix, "video/mp4"), content)


def sampled_metadata(
    video: Any, options: Mapping[str, Any], limits: MediaLimits | None = None
) -> SampledVideoMetadata:
    """Size and times of the frames that the model sees, without decoding them."""
    if not is_encoded(video):
        video_url(video)  # raises
    own = {name: value for name, value in options.items() if name in ("clip", *Molmo2VideoProcessor.DEFAULTS)}
    reading = replace(Molmo2VideoProcessor()._options(own).reading, limits=checked_limits(limits))
    return read_video(VideoItem("videos[0]", video), reading, lambda frames, count: None)[1]


def _file_content(media: Any) -> bytes | None:
    """The bytes of a file on disk, or bytes; None for anything else."""
    if isinstance(media, (bytes, bytearray, memoryview)):
        return bytes(media)
    if isinstance(media, (str, Path)) and not is_url(str(media)) and len(str(media)) < 4096 and Path(media).is_file():
        return Path(media).read_bytes()
    return None


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
