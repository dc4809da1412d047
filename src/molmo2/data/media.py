"""Where the images and videos of a data set are: most data sets name them only.

A resolver is a function from a `MediaReference` to what the processor reads (a path, URL, image, ...), or None if it
is missing. `Folder` and `UrlMapping` are two; `first_of` asks several.
"""

import hashlib
import io
import json
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo2.image.suffixes import IMAGE_SUFFIXES
from molmo2.video.suffixes import ANIMATION_SUFFIX, VIDEO_SUFFIXES

CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGB with alpha


@dataclass(frozen=True)
class MediaReference:
    """What a row says about one of its images or its video.

    Attributes:
        kind: "image", "video" or "mask".
        name: A YouTube id, a path or a URL, as in the row; of a whole number or a `pathlib.Path` there its text. Where
            a row has none, no resolver is asked.
        clip: The part that is used, in seconds; None for the whole video.
        row: The row, for resolvers that need more of it, such as `video_source`.
    """

    kind: str
    name: str
    clip: tuple[float, float | None] | None = None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if is_name(self.name):
            object.__setattr__(self, "name", name_text(self.name))


Resolver = Callable[[MediaReference], Any]


def is_name(value: Any) -> bool:
    """Whether a value in a row can name a file: a text, a path or a whole number; an empty text names none."""
    is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_number or isinstance(value, (str, os.PathLike))


def name_text(name: Any) -> str:
    """The text of what `is_name` takes."""
    return os.fsdecode(name) if isinstance(name, (str, os.PathLike)) else str(int(name))


def is_named(reference: Any) -> bool:
    """Whether a row names this image or video; null, True, a fraction and empty text are no names."""
    return isinstance(reference, MediaReference) and is_name(reference.name) and bool(reference.name)


def source_of(reference: Any, media: Resolver) -> Any:
    """What the processor reads of an image or a video that a row names or holds; None if it is missing.

    Args:
        reference: A `MediaReference`, or what the row holds: an image, {"bytes", "path"}, None.
        media: Asked for what has a name.
    """
    if isinstance(reference, MediaReference):
        return media(reference) if is_named(reference) else None
    is_file = isinstance(reference, Mapping) and reference.keys() <= {"bytes", "path"}
    return None if is_file and all(value is None for value in reference.values()) else reference


def name_in_report(reference: Any, row: int) -> str:
    """How a report names an image or a video that is missing: its name, or else its row."""
    if is_named(reference):
        return reference.name
    kind, name = getattr(reference, "kind", "image"), getattr(reference, "name", reference)
    return f"row {row} ({kind}: {name!r})"


class Folder:
    """A folder of files, found by their name, with or without a suffix, or by the SHA-256 of a URL.

    Files are not opened: an .avif or .heic is found also where Pillow cannot decode it, so that its row is not missing
    but fails when its example is built. AVIF needs Pillow 11.3 or newer, HEIC a package such as `pillow-heif`.

    Args:
        path: The folder.
        has_cut_clips: The files are the clips themselves, `clip_name(reference)`, as `Examples` then expects: their
            times start at 0.
    """

    def __init__(self, path: str | Path, *, has_cut_clips: bool = False):
        self.path, self.has_cut_clips = Path(path), has_cut_clips

    def __call__(self, reference: MediaReference) -> Path | None:
        # The row says that a video is meant, so a GIF is one, unlike elsewhere.
        suffixes = ("", *((*VIDEO_SUFFIXES, ANIMATION_SUFFIX) if reference.kind == "video" else IMAGE_SUFFIXES))
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
        source: A PIL image, an array (H, W), (H, W, channels) or (channels, H, W) with 1, 3 or 4 channels, a path, a
            URL with `file:` or `data:`, the bytes of a file, or {"bytes", "path"}.
    Returns:
        None where that is not known: for a URL with `http:` or `https:`, which is not fetched; base64 text that is no
        URL; an open file, which reading may use up; arrays of other shapes, also batches; files that are missing, of
        none of the formats or over one of the limits that `MediaLimits()` has, or damaged; and for what is no image.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return source.size
    if hasattr(source, "shape") and not isinstance(source, memoryview):
        return _array_size(tuple(source.shape))
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    try:
        return _file_size(source)
    except Exception:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        return None


def _array_size(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(width, height) of an array; (H, W, channels) where its shape could also be (channels, H, W)."""
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in CHANNEL_COUNTS):
        return shape[1], shape[0]
    return (shape[2], shape[1]) if len(shape) == 3 and shape[0] in CHANNEL_COUNTS else None


def _file_size(source: Any) -> tuple[int, int] | None:
    """(width, height) of a file, turned upright; None where there is no file. Errors of decoders are passed on."""
    from molmo2.image.fetching import data_url_bytes, scheme_of
    from molmo2.image.limits import MediaLimits
    from molmo2.image.opening import local_path, open_image, upright_size

    where, limits = "the image", MediaLimits()
    file: Path | io.BytesIO
    if isinstance(source, (bytes, bytearray, memoryview)):
        file = io.BytesIO(source)
    elif not isinstance(source, (str, os.PathLike)):
        return None
    elif scheme_of(text := os.fsdecode(source)) == "data":
        file = io.BytesIO(data_url_bytes(text, where, limits))
    else:
        file = local_path(text, scheme_of(text))
        if not os.path.isfile(file):
            return None
    with open_image(file, where, limits) as image:
        return upright_size(image)
