"""Which files are images and which are videos: what command lines and batches are pointed at. GIFs are images."""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from molmo2.image.suffixes import IMAGE_SUFFIXES
from molmo2.video.suffixes import VIDEO_SUFFIXES

IMAGE, VIDEO = "image", "video"
URL_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class MediaFile:
    """A path or URL as it was given, and whether it is an "image" or a "video"."""

    path: str
    kind: str

    @property
    def is_video(self) -> bool:
        return self.kind == VIDEO


def is_url(text: str) -> bool:
    """Whether the text is an address on the web."""
    return text.partition("://")[0].lower() in URL_SCHEMES and "://" in text


def kind_of_file(path: str | Path) -> str | None:
    """Whether a path or URL is an "image" or a "video", by its suffix; None if neither."""
    name = urlsplit(str(path)).path if is_url(str(path)) else str(path)
    suffix = os.path.splitext(name)[1].lower()
    return IMAGE if suffix in IMAGE_SUFFIXES else VIDEO if suffix in VIDEO_SUFFIXES else None


def find_media(arguments: Iterable[str], *, recursive: bool = False, kind: str | None = None) -> list[MediaFile]:
    """The images and videos that paths, folders, patterns and URLs name, in order, each once.

    Args:
        recursive: Look into folders of folders too.
        kind: "image" or "video" for files and URLs whose suffix does not say it.
    Raises:
        FileNotFoundError: A path does not exist, or a folder or pattern has no images and videos.
        ValueError: The suffix of a named file is neither that of an image nor that of a video.
    """
    found: dict[str, MediaFile] = {}
    for argument in arguments:
        for media in _matches(argument, recursive, kind):
            found.setdefault(media.path, media)
    return list(found.values())


def _matches(argument: str, recursive: bool, kind: str | None) -> Iterator[MediaFile]:
    path = Path(argument)
    if is_url(argument) or path.is_file():
        yield _named(argument, kind)
    elif path.is_dir():
        yield from _all_of(media_in_folder(path, recursive), f"The folder '{argument}'")
    elif glob.has_magic(argument):
        yield from _all_of(_media_among(sorted(glob.glob(argument, recursive=True))), f"The pattern '{argument}'")
    else:
        raise FileNotFoundError(f"There is no file or folder '{argument}'. Check the path.")


def media_in_folder(folder: Path, recursive: bool = False) -> Iterator[MediaFile]:
    """The images and videos of a folder by name; names that begin with a dot are left out."""
    entries = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    for name in entries:
        path = folder / name
        if path.is_dir():
            if recursive and not path.is_symlink():  # a link may lead back up
                yield from media_in_folder(path, recursive)
        else:
            yield from _media_among([str(path)])


def _media_among(paths: Iterable[str]) -> Iterator[MediaFile]:
    return (MediaFile(path, kind) for path in paths if (kind := kind_of_file(path)) is not None)


def _all_of(media: Iterator[MediaFile], where: str) -> Iterator[MediaFile]:
    first = next(media, None)
    if first is None:
        raise FileNotFoundError(f"{where} has no images or videos ({', '.join(sorted(IMAGE_SUFFIXES))}, .mp4, ...).")
    yield first
    yield from media


def _named(argument: str, kind: str | None) -> MediaFile:
    found = kind_of_file(argument) if kind is None else kind
    if found is None:
        raise ValueError(
            f"The suffix of '{argument}' is neither that of an image nor that of a video. Say which it is: "
            "--kind image or --kind video."
        )
    return MediaFile(argument, found)
