"""Limits for media that come from strangers: what is fetched, opened and decoded, and what is refused instead.

    limits = MediaLimits(image_pixels=20_000_000, sources=("https", "data"))
    processor(images=image, text=text, limits=limits)  # or processor.limits = limits

They belong to a program, not to a model: no processor file holds them, and none can raise them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from molmo2.values import is_number

SOURCES = ("path", "file", "data", "base64", "http", "https")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")  # Pillow's names


class MediaLimitError(ValueError):
    """An image or a video is over a limit of `MediaLimits`. The message names the limit and how to raise it."""


@dataclass(frozen=True)
class MediaLimits:
    """What is accepted of images and videos. `MediaLimits(image_pixels=...)` changes one limit.

    Attributes:
        image_pixels: height times width of an image.
        reduce_jpeg: decode a JPEG with more pixels than that at 1/2, 1/4 or 1/8 of its size instead of refusing it;
            tokens and points stay those of its own size. Not for progressive ones, which would take all the memory.
        image_formats: formats that are opened, by Pillow's names; HEIF where a package has registered it.
        video_frames: frames of a video file, sampled or not.
        video_frame_pixels: height times width of a video.
        video_pixels_per_byte: pixels of all frames together for each byte of the file, for videos of more than a
            billion pixels. Films have 10 to 10,000, a file made to fill memory or time has millions.
        decode_seconds: longest wait for the decoder of a video; with one every decoder runs in a process of its own,
            which is ended in time. None (no limit) for files that are trusted. Needs the package.
        visual_tokens: visual tokens of one image or video.
        sources: where media may come from: "path" (of a local file), "file" and "data" (URLs), "base64" (text),
            "http" and "https". Bytes, open files, arrays and PIL images are always accepted. A server that passes on
            what its users write has no use for the first two.
        allow_private_hosts: also fetch from private, loopback and link-local addresses.
        fetch_bytes: bytes of a download or a data URL, decompressed, and of an open file that is copied: a video, or
            a stream that cannot seek.
        connect_seconds, read_seconds: longest wait for a connection, and for the next bytes.
        total_seconds: longest time of a download, redirects included.
        redirects: redirects that are followed.

    Raises:
        ValueError: a limit is no finite number of 0 or more, or of seconds apart no whole one, or a source is unknown.
    """

    image_pixels: int = 100_000_000
    reduce_jpeg: bool = False
    image_formats: tuple[str, ...] = IMAGE_FORMATS
    video_frames: int = 2_000_000
    video_frame_pixels: int = 36_000_000
    video_pixels_per_byte: int = 250_000
    decode_seconds: float | None = None
    visual_tokens: int = 131_072
    sources: tuple[str, ...] = SOURCES
    allow_private_hosts: bool = False
    fetch_bytes: int = 1 << 30
    connect_seconds: float = 10
    read_seconds: float = 30
    total_seconds: float = 300
    redirects: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(field.default, tuple):
                names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
                if names is None or not all(isinstance(name, str) for name in names):
                    raise ValueError(f"MediaLimits: {field.name} is {value!r}. Pass a tuple of names.")
                object.__setattr__(self, field.name, names)
            elif isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"MediaLimits: {field.name} is {value!r}. Pass True or False.")
            elif not is_number(value) or value < 0:
                raise ValueError(f"MediaLimits: {field.name} is {value!r}. Pass a finite number of 0 or more.")
            elif not field.name.endswith("_seconds"):
                if value != int(value):
                    raise ValueError(f"MediaLimits: {field.name} is {value!r}. Pass a whole number.")
                object.__setattr__(self, field.name, int(value))
        unknown = sorted(set(self.sources) - set(SOURCES))
        if unknown:
            raise ValueError(f"MediaLimits: unknown source(s) {unknown}. Choose from {', '.join(SOURCES)}.")

    def check(self, name: str, found: float, what: str) -> None:
        """Refuse `what`, of which there are `found`, if that is over the limit `name`.

        Raises:
            MediaLimitError: it is.
        """
        limit = getattr(self, name)
        if found > limit:
            raise MediaLimitError(f"{what}, over the limit {name}={limit:,}. {_advice(name)}")

    def check_source(self, source: str, where: str) -> None:
        """Refuse media from a source that is not among `sources`."""
        if source not in self.sources:
            raise MediaLimitError(
                f"{where} is given as {_SOURCE_TEXTS[source]}, which is not among the accepted sources "
                f"({', '.join(self.sources) or 'none'}). Pass the bytes of the file. {_advice('sources')}"
            )

    def check_frames(self, where: str, num_frames: int) -> None:
        """Refuse a video with too many frames."""
        self.check("video_frames", num_frames, f"{where} has {num_frames:,} frames")

    def check_video(self, where: str, num_frames: int, size: tuple[int, int], num_bytes: int) -> None:
        """Refuse a video with too many frames or pixels; size is (height, width)."""
        height, width = size
        self.check("video_frame_pixels", height * width, f"{where} has frames of {height} x {width} pixels")
        self.check_frames(where, num_frames)
        pixels = num_frames * height * width
        if pixels > FREE_VIDEO_PIXELS:
            ratio = pixels // max(1, num_bytes)
            found = f"{where} has {num_frames:,} frames of {height} x {width} pixels in {num_bytes:,} bytes"
            self.check("video_pixels_per_byte", ratio, f"{found} ({ratio:,} pixels per byte)")


FREE_VIDEO_PIXELS = 1_000_000_000  # up to which the size of the file does not matter
_SOURCE_TEXTS = {
    "path": "the path of a file",
    "base64": "base64 text",
    **{scheme: f"a URL of the scheme {scheme}:" for scheme in ("file", "data", "http", "https")},
}


def _advice(name: str) -> str:
    return (
        f"If it is to be trusted, pass limits=MediaLimits({name}=...) (from molmo2), or set the processor's `limits`."
    )


def checked_limits(value: Any) -> MediaLimits:
    """The limits to use: those passed, or the default ones for None.

    Raises:
        TypeError: `value` is something else.
    """
    if value is None:
        return MediaLimits()
    if not isinstance(value, MediaLimits):
        names = [field.name for field in fields(MediaLimits)]
        if all(hasattr(value, name) for name in names):  # of another copy of this file, as remote code has one
            return MediaLimits(**{name: getattr(value, name) for name in names})
        raise TypeError(f"limits is {value!r} of type {type(value).__name__}. Pass a MediaLimits (from molmo2).")
    return value
