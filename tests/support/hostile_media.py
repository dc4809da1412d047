"""Small media, and changes of them that decoders stumble over: for the tests, and for `make fuzz`."""

import io
import struct
import zlib
from fractions import Fraction
from functools import lru_cache

import av
import numpy as np
from PIL import Image

CONTAINERS = {
    "mp4": ("mp4", "libx264", "yuv420p"),
    "avi": ("avi", "mpeg4", "yuv420p"),
    "mkv": ("matroska", "libx264", "yuv420p"),
    "flv": ("flv", "flv", "yuv420p"),
    "ts": ("mpegts", "libx264", "yuv420p"),
    "gif": ("gif", "gif", "rgb8"),
}
ROTATIONS = {  # a, b, c, d of a display matrix -> what ffmpeg's autorotation makes of a frame
    (1, 0, 0, 1): lambda frame: frame,
    (0, 0, 0, 0): lambda frame: frame,
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),
    (-1, 0, 0, -1): lambda frame: frame[::-1, ::-1],
    (0, -1, 1, 0): lambda frame: np.rot90(frame),
    (-1, 0, 0, 1): lambda frame: frame[:, ::-1],
    (1, 0, 0, -1): lambda frame: frame[::-1],
    (0, 1, 1, 0): lambda frame: frame.swapaxes(0, 1),
    (0, -1, -1, 0): lambda frame: frame[::-1, ::-1].swapaxes(0, 1),
}


@lru_cache
def clip(kind: str = "mp4", *, num_frames: int = 12, size: tuple[int, int] = (48, 64), first: int = 0) -> bytes:
    """A clip at 10 frames per second whose corners differ; `first` is the time of its first frame, in frames."""
    container_format, codec, pixels = CONTAINERS[kind]
    height, width = size
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if codec == "libx264":
            stream.options = {"bf": "0"}
        rows, cols = np.mgrid[0:height, 0:width]
        for index in range(num_frames):
            image = np.stack([cols * 255 // width, rows * 255 // height, (cols + 9 * index) % 256], axis=-1)
            frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = first + index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def patched(data: bytes, tag: bytes, offset: int, new: bytes) -> bytes:
    """`data` with bytes replaced behind the first `tag`."""
    place = data.index(tag) + len(tag) + offset
    return data[:place] + new + data[place + len(new) :]


def with_matrix(data: bytes, matrix: tuple[float, float, float, float]) -> bytes:
    """An MP4 file with this display matrix (a, b, c, d)."""
    a, b, c, d = (round(65536 * number) for number in matrix)
    return patched(data, b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


def with_frame_count(data: bytes, count: int) -> bytes:
    """An MP4 or AVI file that announces this number of frames."""
    if data[:4] == b"RIFF":
        return patched(data, b"vids", 28, struct.pack("<I", count))
    return patched(data, b"stts", 8, struct.pack(">I", count))


def with_far_offset(data: bytes, place: int = 1 << 31) -> bytes:
    """An MP4 file whose first chunk is said to lie at this place."""
    return patched(data, b"stco", 8, struct.pack(">I", place))


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with a few bytes changed, most of them in its headers, or cut off."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        end = len(changed) if rng.random() < 0.5 else min(len(changed), 2048)
        place = (
            int(rng.integers(0, end)) if rng.random() < 0.7 else max(0, len(changed) - 1 - int(rng.integers(0, 2048)))
        )
        value = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(0, 256))]))
        changed[place : place + int(rng.choice([1, 1, 2, 4]))] = bytes([value]) * int(rng.choice([1, 1, 2, 4]))
    if rng.random() < 0.15:
        del changed[int(rng.integers(1, len(changed))) :]
    return bytes(changed)


# --- images ----------------------------------------------------------------------------------------------------------


@lru_cache
def image_bytes(kind: str, mode: str = "RGB") -> bytes:
    """A small image in a format of Pillow."""
    rows, cols = np.mgrid[0:40, 0:60]
    image = Image.fromarray(np.stack([rows * 6, cols * 4, rows + cols], axis=-1).astype(np.uint8))
    file = io.BytesIO()
    image.convert(mode).save(file, kind)
    return file.getvalue()


def png_of_size(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG of a few bytes that announces any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def gif_of_size(width: int, height: int, num_frames: int = 1) -> bytes:
    """A GIF whose screen has any size and whose frames have one pixel."""
    head = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff"
    delay = b"\x21\xf9\x04\x04\x0a\x00\x00\x00"
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\x00\x02\x02\x44\x01\x00"
    return head + (delay + frame) * num_frames + b"\x3b"


def webp_of_size(width: int, height: int) -> bytes:
    """A lossless WebP of 34 bytes that announces any size."""
    bits = (width - 1) | (height - 1) << 14
    content = b"VP8L" + struct.pack("<I", 13) + b"\x2f" + struct.pack("<I", bits) + bytes(9)
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def tiff_of_size(width: int, height: int) -> bytes:
    """A bilevel TIFF whose only strip is empty."""
    tags = [(256, width), (257, height), (258, 1), (259, 1), (262, 1), (273, 8), (278, height), (279, 0)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
