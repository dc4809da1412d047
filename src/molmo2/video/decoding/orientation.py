"""How stored frames are turned and mirrored to be shown upright, the same for every decoder.

Source of the rules: what ffmpeg does by default ("autorotate") with the display matrix of a stream, whose entries are
those of the boxes `mvhd` and `tkhd` of ISO/IEC 14496-12.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from molmo2.video.decoding.timeline import VideoDecodeError

Matrix = tuple[float, float, float, float]  # a, b, c, d of the display matrix

MAX_BOXES = 10_000  # of one file that are looked at
# (box, version) -> bytes into the box
MATRIX_AT = {("mvhd", 0): 36, ("mvhd", 1): 48, ("tkhd", 0): 40, ("tkhd", 1): 52}


def matrix_from_bytes(data: bytes, byte_order: str = "=") -> Matrix:
    """The part of a display matrix that turns, from nine 32-bit numbers: three rows of three."""
    a, b, _, c, d = struct.unpack(f"{byte_order}5i", data[:20])
    return a / 65536, b / 65536, c / 65536, d / 65536


def quarter_turns(matrix: Matrix) -> int | None:
    """Clockwise quarter turns (0 to 3) that a display matrix asks for; None if it mirrors or turns by other angles.

    A matrix without direction, such as one of zeros, asks for nothing.
    """
    a, b, c, d = matrix
    angle = _angle(matrix)
    if angle is None:
        return 0
    turns = round(angle / 90)
    is_mirrored = a * d - b * c < 0
    return None if abs(angle - 90 * turns) >= 1 or is_mirrored else turns % 4


def upright(frame: np.ndarray, matrix: Matrix) -> np.ndarray:
    """The (H, W, 3) frame as it is to be shown, a view.

    Raises:
        VideoDecodeError: the matrix turns by an angle that is no multiple of 90 degrees.
    """
    _, _, c, d = matrix
    angle = _angle(matrix)
    if angle is None:
        return frame
    turns = round(angle / 90)
    if abs(angle - 90 * turns) >= 1:
        raise VideoDecodeError(f"its display matrix turns it by {angle:.0f} degrees, which is no multiple of 90")
    turns %= 4
    if turns == 0:
        return frame[::-1] if d < 0 else frame
    if turns == 1:
        return frame.swapaxes(0, 1) if c > 0 else np.rot90(frame, k=-1)
    if turns == 2:
        frame = frame[:, ::-1] if matrix[0] < 0 else frame
        return frame[::-1] if d < 0 else frame
    return np.rot90(frame, k=-1)[::-1] if c < 0 else np.rot90(frame)


def _angle(matrix: Matrix) -> float | None:
    """Clockwise degrees of the first axis; None without one."""
    a, b, c, d = matrix
    across, down = math.hypot(a, c), math.hypot(b, d)
    if across == 0 or down == 0:
        return None
    return math.degrees(math.atan2(b / down, a / across))


@dataclass(frozen=True)
class Mp4Track:
    """What an MP4 or QuickTime file says about a video track.

    Attributes:
        num_pixels: of all its frames together; 0 where it does not say, as in fragmented files.
    """

    matrix: Matrix
    num_pixels: float


def mp4_tracks(path: str) -> list[Mp4Track]:
    """The video tracks of an MP4 or QuickTime file; of any other file none."""
    with Path(path).open("rb") as file:
        end = file.seek(0, 2)
        head = _read(file, 0, 12)
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"):
            return []
        budget = [MAX_BOXES]
        tracks: list[Mp4Track] = []
        for kind, start, stop in _boxes(file, 0, end, budget):
            if kind == "moov":
                tracks += _movie_tracks(file, start, stop, budget)
        return tracks


def _movie_tracks(file: IO[bytes], start: int, stop: int, budget: list[int]) -> Iterator[Mp4Track]:
    movie: Matrix = (1, 0, 0, 1)
    for kind, first, last in _boxes(file, start, stop, budget):
        if kind == "mvhd":
            movie = _matrix_and_area(file, kind, first)[0] or movie
        elif kind == "trak":
            track, area, num_frames, is_video = None, 0.0, 0, False
            for part, begin, end in _boxes(file, first, last, budget):
                if part == "tkhd":
                    track, area = _matrix_and_area(file, part, begin)
                elif part == "mdia":
                    for name, at, until in _boxes(file, begin, end, budget):
                        if name == "hdlr":
                            is_video = is_video or _read(file, at + 8, 4) == b"vide"
                        elif name == "minf":
                            num_frames = _num_samples(file, at, until, budget)
            if is_video and track is not None:
                a, b, c, d = track
                matrix = (
                    a * movie[0] + b * movie[2],
                    a * movie[1] + b * movie[3],
                    c * movie[0] + d * movie[2],
                    c * movie[1] + d * movie[3],
                )
                yield Mp4Track(matrix, area * num_frames)


def _matrix_and_area(file: IO[bytes], kind: str, start: int) -> tuple[Matrix | None, float]:
    """The matrix of a box, and the width times height that follow it in a `tkhd`."""
    version = _read(file, start, 1)
    data = _read(file, start + MATRIX_AT.get((kind, version[0] if version else 0), 40), 44)
    if len(data) < 44:
        return None, 0.0
    width, height = struct.unpack(">2I", data[36:])
    return matrix_from_bytes(data, ">"), width * height / 65536**2


def _num_samples(file: IO[bytes], start: int, stop: int, budget: list[int]) -> int:
    """How many samples the table of sizes in a box `minf` lists."""
    for kind, first, last in _boxes(file, start, stop, budget):
        if kind == "stbl":
            for part, begin, _ in _boxes(file, first, last, budget):
                if part in ("stsz", "stz2"):
                    return int.from_bytes(_read(file, begin + 8, 4), "big")
    return 0


def _boxes(file: IO[bytes], start: int, stop: int, budget: list[int]) -> Iterator[tuple[str, int, int]]:
    """(type, start and end of the content) of the boxes between two places of a file."""
    while start + 8 <= stop and budget[0] > 0:
        budget[0] -= 1
        head = _read(file, start, 16)
        if len(head) < 8:
            return
        size, header = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:  # up to the end
            size = stop - start
        if size < header:
            return
        yield head[4:8].decode("latin-1"), start + header, min(start + size, stop)
        start += size


def _read(file: IO[bytes], place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
