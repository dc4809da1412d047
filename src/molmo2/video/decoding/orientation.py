"""How stored frames are turned and mirrored to be shown upright, the same for every decoder.

Source of the rules: what ffmpeg does by default ("autorotate") with the display matrix of a stream, whose entries are
those of the boxes `mvhd` and `tkhd` of ISO/IEC 14496-12.
"""

import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from molmo2.video.decoding.timeline import VideoDecodeError

Matrix = tuple[float, float, float, float]  # a, b, c, d of the display matrix
UPRIGHT: Matrix = (1, 0, 0, 1)

MAX_BOXES = 40_000  # of one file that are looked at
MATRIX_AT = {b"mvhd": 36, b"tkhd": 40}  # bytes into a box of version 0; in version 1 there are 12 more before it


def matrix_from_bytes(data: bytes, byte_order: str = "=") -> Matrix:
    """The part of a display matrix that turns, from nine 32-bit numbers: three rows of three."""
    a, b, _, c, d = struct.unpack(f"{byte_order}5i", data[:20])
    return a / 65536, b / 65536, c / 65536, d / 65536


def upright(frame: np.ndarray, matrix: Matrix) -> np.ndarray:
    """The (H, W, 3) frame as it is to be shown, a view.

    Raises:
        VideoDecodeError: the matrix turns by an angle that is no multiple of 90 degrees.
    """
    angle = _angle(matrix)
    if angle is None:
        return frame
    turns = round(angle / 90)
    if abs(angle - 90 * turns) >= 1:
        raise VideoDecodeError(f"its display matrix turns it by {angle:.0f} degrees, which is no multiple of 90")
    a, b, c, d = matrix  # a pixel (x, y) is shown at (a x + c y, b x + d y)
    if turns % 2:
        frame, a, d = frame.swapaxes(0, 1), c, b
    return frame[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _angle(matrix: Matrix) -> float | None:
    """Clockwise degrees of the first axis; None without one."""
    a, b, c, d = matrix
    across, down = math.hypot(a, c), math.hypot(b, d)
    if across == 0 or down == 0:
        return None
    return math.degrees(math.atan2(b / down, a / across))


class Mp4Track(NamedTuple):
    """What an MP4 or QuickTime file says about a video track."""

    matrix: Matrix
    num_pixels: float  # of all its frames together; 0 where it does not say, as in fragmented files


def require_plain_turns(tracks: Iterable[Mp4Track]) -> None:
    """Leave mirrored videos to PyAV: decord and torchcodec turn by quarters and know nothing of mirrors."""
    for matrix, _ in tracks:
        angle, (a, b, c, d) = _angle(matrix), matrix
        if angle is not None and (abs(angle - 90 * round(angle / 90)) >= 1 or a * d - b * c < 0):
            raise VideoDecodeError("its display matrix mirrors it or turns it by no multiple of 90 degrees")


def mp4_tracks(path: str) -> list[Mp4Track]:
    """The video tracks of an MP4 or QuickTime file; of any other file none."""
    tracks = []
    with Path(path).open("rb") as opened:
        file = _Mp4File(opened)
        if file.read(4, 4) not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"):
            return []
        for movie in file.boxes((0, opened.seek(0, 2)), b"moov"):
            turn_of_all, _ = file.matrix_and_area(movie, b"mvhd")
            for track in file.boxes(movie, b"trak"):
                turn, area = file.matrix_and_area(track, b"tkhd")
                handlers = [file.read(start + 8, 4) for start, _ in file.boxes(track, b"mdia", b"hdlr")]
                tables = file.boxes(track, b"mdia", b"minf", b"stbl", (b"stsz", b"stz2"))
                num_frames = [int.from_bytes(file.read(start + 8, 4), "big") for start, _ in tables]
                if turn is not None and b"vide" in handlers:
                    product = np.reshape(turn, (2, 2)) @ np.reshape(turn_of_all or UPRIGHT, (2, 2))
                    tracks.append(Mp4Track(tuple(product.ravel().tolist()), area * next(iter(num_frames), 0)))
    return tracks


class _Mp4File:
    """The boxes of an MP4 or QuickTime file; a span is (start, end) of the content of one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._num_left = file, MAX_BOXES

    def read(self, place: int, count: int) -> bytes:
        self._file.seek(place)
        return self._file.read(count)

    def boxes(self, span: tuple[int, int], kinds: bytes | tuple[bytes, ...], *inner: Any) -> Iterator[tuple[int, int]]:
        """The spans of the boxes of these kinds in a span; with `inner`, of the boxes of those kinds in them."""
        start, stop = span
        while start + 8 <= stop and self._num_left > 0:
            self._num_left -= 1
            head = self.read(start, 16)
            if len(head) < 8:
                return
            size, header = int.from_bytes(head[:4], "big"), 8
            if size == 1:
                size, header = int.from_bytes(head[8:16], "big"), 16
            elif size == 0:  # up to the end
                size = stop - start
            if size < header:
                return
            if head.startswith(kinds, 4):
                content = start + header, min(start + size, stop)
                yield from self.boxes(content, *inner) if inner else [content]
            start += size

    def matrix_and_area(self, span: tuple[int, int], kind: bytes) -> tuple[Matrix | None, float]:
        """The matrix of the last box of this kind, and the width times height that follow it in a `tkhd`."""
        found: tuple[Matrix | None, float] = None, 0.0
        for start, _ in self.boxes(span, kind):
            data = self.read(start + MATRIX_AT[kind] + 12 * (self.read(start, 1) == b"\1"), 44)
            if len(data) == 44:
                width, height = struct.unpack(">2I", data[36:])
                found = matrix_from_bytes(data, ">"), width * height / 65536**2
        return found
