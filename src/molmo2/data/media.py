"""Where the images and videos of a data set are: most data sets name them only.

A resolver is a function from a `MediaReference` to what the processor reads (a path, URL, image, ...), or None if it
is missing. `Folder` and `UrlMapping` are two; `first_of` asks several.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
ORIENTATION, FIRST_ON_ITS_SIDE = 0x0112, 5  # the tag of EXIF, and its first value that swaps width and height


@dataclass(frozen=True)
class MediaReference:
    """What a row says about one of its images or its video.

    Attributes:
        kind: "image", "video" or "mask".
        name: A YouTube id, a path or a URL, as in the row.
        clip: The part that is used, in seconds; None for the whole video.
        row: The row, for resolvers that need more of it, such as `video_source`.
    """

    kind: str
    name: str
    clip: tuple[float, float | None] | None = None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


Resolver = Callable[[MediaReference], Any]


class Folder:
    """A folder of files, found by their name, with or without a suffix, or by the SHA-256 of a URL.

    Args:
        path: The folder.
        has_cut_clips: The files are the clips themselves, `clip_name(reference)`, as `Examples` then expects: their
            times start at 0.
    """

    def __init__(self, path: str | Path, *, has_cut_clips: bool = False):
        self.path, self.has_cut_clips = Path(path), has_cut_clips

    def __call__(self, reference: MediaReference) -> Path | None:
        suffixes = ("", *(VIDEO_SUFFIXES if reference.kind == "video" else IMAGE_SUFFIXES))
        name = clip_name(reference) if self.has_cut_clips else reference.name
        # A name in a row must not lead out of the folder; links in it may.
        is_inside = "://" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
        names = [name] * is_inside + [hashlib.sha256(name.encode()).hexdigest()]
        candidates = (self.path / f"{own}{suffix}" for own in names for suffix in suffixes)
        return next((path for path in candidates if path.is_file()), None)


def clip_name(reference: MediaReference) -> str:
    """Name of the file of a clip, without suffix: "dQw4w9WgXcQ_12.0_75.0"; of a whole video its own name."""
    if reference.clip is None:
        return reference.name
    start, end = reference.clip
    return f"{reference.name}_{start:.1f}_{'end' if end is None else f'{end:.1f}'}"


class UrlMapping:
    """URLs by name: a mapping, or a file such as `youtube_id_to_urls_mapping.json` of the data sets.

    Values are URLs, or mappings and lists of them; of several the first that is no YouTube page is taken.
    """

    mapping: Mapping[str, Any]

    def __init__(self, mapping: Any):
        is_mapping = isinstance(mapping, Mapping)
        self.mapping = mapping if is_mapping else json.loads(Path(mapping).read_text(encoding="utf-8"))

    def __call__(self, reference: MediaReference) -> str | None:
        return _file_url(self.mapping.get(reference.name))


def _file_url(value: Any) -> str | None:
    if isinstance(value, (Mapping, list, tuple)):
        values = value.values() if isinstance(value, Mapping) else value
        return next((url for url in map(_file_url, values) if url), None)
    is_page = isinstance(value, str) and any(host in value for host in ("youtube.com/", "youtu.be/"))
    return value if isinstance(value, str) and "://" in value and not is_page else None


def urls(reference: MediaReference) -> str | None:
    """The resolver of data sets that name URLs: the URL itself."""
    return reference.name if reference.name.startswith(("http://", "https://", "data:", "file:")) else None


def first_of(*resolvers: Resolver) -> Resolver:
    """A resolver that asks these, one after the other.

    Raises:
        ValueError: Some have cut clips and others have whole videos.
    """
    kinds = {bool(getattr(resolver, "has_cut_clips", False)) for resolver in resolvers}
    if len(kinds) > 1:
        raise ValueError("Some of these resolvers give cut clips and others whole videos; use one kind.")

    def resolve(reference: MediaReference) -> Any:
        return next((found for found in (resolver(reference) for resolver in resolvers) if found is not None), None)

    resolve.has_cut_clips = kinds == {True}  # type: ignore[attr-defined]
    return resolve


def image_size(source: Any) -> tuple[int, int] | None:
    """(width, height) of an image as the processor shows it: of a file its header alone, turned upright.

    Args:
        source: A PIL image, an array (H, W) or (H, W, channels), a path, the bytes of a file, or {"bytes", "path"}.
    Returns:
        None where that is not known: for a URL, which is not fetched, and for what is no image.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return source.size
    if hasattr(source, "shape"):
        is_known = len(source.shape) == 2 or (len(source.shape) == 3 and source.shape[2] in (1, 3, 4))
        return (source.shape[1], source.shape[0]) if is_known else None
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if not isinstance(source, (str, Path, bytes)):
        return None
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            is_turned = image.getexif().get(ORIENTATION, 1) >= FIRST_ON_ITS_SIDE
            return (height, width) if is_turned else (width, height)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
