"""Opening of image files: their format and size are checked before a pixel is decoded.

Decoders of videos run in children that import this, so it needs Pillow alone: torch takes two seconds and 0.3 GB.
"""

import warnings
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import ExifTags, Image

from molmo2.image.limits import MediaLimitError, MediaLimits

# How an image is turned upright, by its orientation tag (EXIF 2.3), and where Pillow finds the tag.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_IN = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


def local_path(text: str, scheme: str) -> Path:
    """The file that a text names: that of a URL with `file:`, else the text itself."""
    return Path(url2pathname(urlsplit(text).path)) if scheme == "file" else Path(text)


def open_image(file: Path | IO[bytes], where: str, limits: MediaLimits) -> Image.Image:
    """An image of an accepted format and size, of which only the header is read.

    Raises:
        MediaLimitError: it has more pixels than allowed.
        UnidentifiedImageError: it is of no accepted format. Other errors of Pillow are passed on.
    """
    Image.init()  # registers all formats that Pillow has
    if not isinstance(file, Path) and not _can_seek(file):
        content = file.read(limits.fetch_bytes + 1)
        limits.check("fetch_bytes", len(content), f"{where} is a stream of more than {limits.fetch_bytes:,} bytes")
        file = BytesIO(content)
    webp_pixels = _webp_pixels(file)  # Pillow takes the memory of a WebP as it opens it
    limits.check("image_pixels", webp_pixels, f"{where} is a WebP image of {webp_pixels:,} pixels")
    image = Image.open(file, formats=[name for name in limits.image_formats if name in Image.OPEN])
    try:
        _reduce_jpeg(image, limits)
        check_pixels(image, where, limits)
    except MediaLimitError:
        image.close()
        raise
    return image


def _reduce_jpeg(image: Image.Image, limits: MediaLimits) -> None:
    """Have a JPEG with too many pixels decoded at a half, a quarter or an eighth of its size, if that is accepted.

    A progressive one is left alone: its decoder has all of it in memory at any size. Pillow halves no side below one
    pixel, so that very narrow ones may be refused.
    """
    if not limits.reduce_jpeg or image.format not in ("JPEG", "MPO") or image.info.get("progressive"):
        return
    size = width, height = image.size
    scales = [scale for scale in (1, 2, 4, 8) if -(-width // scale) * -(-height // scale) <= limits.image_pixels]
    if scales and scales[0] > 1:
        image.draft(image.mode, (max(1, width // scales[0]), max(1, height // scales[0])))
        if image.size != size:
            image.original_size = size  # type: ignore[attr-defined]


def _can_seek(file: IO[bytes]) -> bool:
    try:
        return file.seek(0) == 0
    except (AttributeError, OSError):
        return False


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) once it is turned by its orientation tag, of a reduced image before it was reduced."""
    width, height = getattr(image, "original_size", image.size)
    if orientation(image) not in range(5, 9):  # these swap height and width
        return width, height
    if image.format == "TIFF":  # whose `size` is turned already in recent releases of Pillow
        stored: Any = image.tag_v2  # type: ignore[attr-defined]
        width, height = stored[ExifTags.Base.ImageWidth], stored[ExifTags.Base.ImageLength]
    return height, width


def turned_upright(image: Image.Image) -> Image.Image:
    """The decoded image, turned by its orientation tag and without it; itself where that does not turn it.

    Not by `ImageOps.exif_transpose`, which writes all other tags anew and fails where one of them is damaged.
    """
    image.load()  # Pillow turns some formats while it decodes them
    turn = TURNS.get(orientation(image) or 1)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in ORIENTATION_IN:
        turned.info.pop(name, None)
    return turned


def orientation(image: Image.Image) -> int | None:
    """The orientation tag, 1 for upright; None, with a warning, where damage keeps it from being read."""
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # as Pillow does, to find the tag behind the pixels; damage of these is no matter of metadata
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # of a parser: nearly anything
        name = getattr(image, "filename", "") or "an image"
        warnings.warn(f"The EXIF data of {name} cannot be read ({error}); it is taken as upright.", stacklevel=2)
        return None


def check_pixels(image: Image.Image, where: str, limits: MediaLimits) -> None:
    """Raise `MediaLimitError` for an image, decoded or not, of more pixels than allowed."""
    found = f"{where} is an image of {image.height} x {image.width} pixels"
    limits.check("image_pixels", image.height * image.width, found)


def _webp_pixels(file: Path | IO[bytes]) -> int:
    """Pixels that the header of a WebP file announces; 0 for any other file. Layout: RFC 9649."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return _webp_pixels(opened)
    file.seek(0)
    head = file.read(30)
    file.seek(0)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0
    kind, data = head[12:16], head[20:]
    if kind == b"VP8X":
        return (1 + int.from_bytes(data[4:7], "little")) * (1 + int.from_bytes(data[7:10], "little"))
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF))
    return (int.from_bytes(data[6:8], "little") & 0x3FFF) * (int.from_bytes(data[8:10], "little") & 0x3FFF)
