"""Points and tracks drawn on images, with PIL alone.

    draw_points("boats.jpg", grounding).save("boats_with_points.png")

The colour of an object depends on its label and id alone, so it is the same in every image, frame and run. Marks scale
with the image, so that they can be seen at 100 pixels and at 8,000; captions stay inside the image, and are left out
where they would be larger than the image. Arguments are never modified.
"""

import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import ceil, sqrt
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from molmo2.image.opening import turned_upright

Color = tuple[int, int, int]
Position = tuple[float, float]  # x, y

# Okabe and Ito's palette, safe for all kinds of colour vision, without its black, which outlines use.
PALETTE: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
SHADES = (0.0, 0.45, -0.4)  # of each round through the palette: plain, lightened, darkened
SUPERSAMPLING = 4  # discs are drawn this much larger and scaled down, for smooth edges
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class DrawingStyle:
    """The look of marks.

    Attributes:
        radius: Of a disc, in pixels; None for 1.2 % of the shorter side, at least 2.
        text_size: Font size in pixels; None for 2.6 % of the shorter side, at least 10.
        show_ids: Write the id beside each disc; None for answers with more than one object only.
        show_labels: Write the label beside the first disc of each label.
        trail_seconds: Length of trails in videos; 0 for none.
        palette: Colours to choose from.
    """

    radius: float | None = None
    text_size: int | None = None
    show_ids: bool | None = None
    show_labels: bool = True
    trail_seconds: float = 2.0
    palette: tuple[Color, ...] = PALETTE

    def __post_init__(self) -> None:
        if not self.palette:
            raise ValueError("The palette is empty. Pass at least one (red, green, blue) colour of 0..255.")
        for name in ("radius", "text_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}, but it has to be a positive number of pixels, or None.")

    def for_answer(self, grounding: Any) -> "DrawingStyle":
        """The style with `show_ids` decided for a whole answer, so that all its images look alike.

        Raises:
            TypeError: `grounding` has no points: it is an `Answer`, or an image.
        """
        if not hasattr(grounding, "points"):
            found = type(grounding).__name__
            meant = " Pass its `grounding`." if hasattr(grounding, "grounding") else ""
            raise TypeError(f"Points are drawn from a `Grounding`, after the image or video; found {found!r}.{meant}")
        if self.show_ids is not None:
            return self
        return replace(self, show_ids=len({(point.label, point.id) for point in grounding.points}) > 1)

    def color(self, label: str, object_id: int) -> Color:
        """The colour of an object: consecutive ids differ, and so do equal ids of most labels."""
        offset = max(object_id - 1, 0)
        start = zlib.crc32(label.encode(errors="surrogatepass"))
        red, green, blue = self.palette[(start + offset) % len(self.palette)]
        shade = SHADES[offset // len(self.palette) % len(SHADES)]
        target = 255 if shade > 0 else 0

        def shaded(channel: int) -> int:
            return round(channel + (target - channel) * abs(shade))

        return shaded(red), shaded(green), shaded(blue)


@dataclass(frozen=True)
class Mark:
    """A disc to draw.

    Attributes:
        x, y: Position as a fraction of width and height, 0..1.
        caption: Text beside it; "" for none.
        trail: Earlier positions of the object, the oldest first, as fractions too.
    """

    x: float
    y: float
    color: Color
    caption: str = ""
    trail: tuple[Position, ...] = ()


def draw(images: Any, grounding: Any, style: DrawingStyle | None = None, **style_options: Any) -> Any:
    """Copies of the images of a prompt with the points of its answer.

    Args:
        images: The image of the prompt, or the list of its images; see `draw_points`.
        style: A `DrawingStyle`.
        style_options: Its attributes, instead of those of `style`: `draw(image, grounding, radius=8)`.
    Returns:
        A PIL image, or a list of them.
    """
    style = replace(DrawingStyle() if style is None else style, **style_options)
    if isinstance(images, (list, tuple)):
        return draw_images(images, grounding, style)
    return draw_points(images, grounding, style)


def draw_points(
    image: Any,
    grounding: Any,
    style: DrawingStyle | None = None,
    *,
    image_index: int | None = None,
    sampled_index: int | None = None,
) -> Image.Image:
    """A copy of an image or frame with the points of an answer.

    Args:
        image: a PIL image, an array (H, W, 3) or (H, W), or a path; the EXIF orientation of files is applied, as in
            the processor.
        grounding: the result of `post_process_grounding` or `parse_grounding`.
        image_index: index of this image in the prompt, from 0; None for the first.
        sampled_index: for answers about a video: index of this frame among the sampled ones, from 0.

    Returns:
        An RGB image of the same size.
    """
    style = DrawingStyle() if style is None else style
    image_index = 0 if image_index is None and sampled_index is None else image_index
    style = style.for_answer(grounding)
    return draw_marks(image, marks_of(_points_of(grounding, image_index, sampled_index), style), style)


def draw_images(images: Sequence[Any], grounding: Any, style: DrawingStyle | None = None) -> list[Image.Image]:
    """Copies of all images of a prompt, each with its points; see `draw_points`."""
    return [draw_points(image, grounding, style, image_index=index) for index, image in enumerate(images)]


def contact_sheet(
    frames: Sequence[Any],
    grounding: Any,
    style: DrawingStyle | None = None,
    *,
    times: Sequence[float] | None = None,
    columns: int | None = None,
    cell_width: int = 320,
) -> Image.Image:
    """The sampled frames of a video in a grid, each with its points and its time.

    Args:
        frames: the sampled frames in order, in any form that `draw_points` accepts, all of one shape.
        times: seconds to write below the frames; None for those in `grounding.media`.
        columns: frames per row; None makes the sheet about square.
        cell_width: width of one frame on the sheet, in pixels.

    Raises:
        ValueError: there are no frames, or another number of times.
    """
    if not len(frames):
        raise ValueError("There are no frames to draw. Pass the sampled frames of the video.")
    if times is None:
        sampled = () if grounding.media is None else grounding.media.sampled_frames
        times = [frame.time for frame in sampled] if len(sampled) == len(frames) else None
    if times is not None and len(times) != len(frames):
        raise ValueError(f"There are {len(frames)} frames, but {len(times)} times. Pass one time per frame, or none.")
    first = to_rgb(frames[0])
    cell_height = max(1, round(cell_width * first.height / first.width))
    columns = min(len(frames), columns or max(1, round(sqrt(len(frames) * cell_height / cell_width))))
    strip = 0 if times is None else max(14, cell_height // 12)
    rows = ceil(len(frames) / columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * (cell_height + strip)), (24, 24, 24))
    for index, frame in enumerate(frames):
        cell = to_rgb(frame).resize((cell_width, cell_height), Image.Resampling.LANCZOS)
        left, top = index % columns * cell_width, index // columns * (cell_height + strip)
        sheet.paste(draw_points(cell, grounding, style, sampled_index=index), (left, top))
        if times is not None:
            _write(sheet, f"{times[index]:.1f} s", (left + 4, top + cell_height), strip * 3 // 4, WHITE)
    return sheet


def marks_of(points: Sequence[Any], style: DrawingStyle) -> list[Mark]:
    """The marks of points, at their own positions."""
    return [
        Mark(point.x_norm, point.y_norm, style.color(point.label, point.id), caption)
        for point, caption in zip(points, captions_of(points, style), strict=True)
    ]


def captions_of(points: Iterable[Any], style: DrawingStyle) -> list[str]:
    """The caption of each point in one image: its id, and the label at the first point that has it; see the style."""
    labelled: set[str] = set()
    captions = []
    for point in points:
        words = [str(point.id)] if style.show_ids else []
        if style.show_labels and point.label and point.label not in labelled:
            labelled.add(point.label)
            words.append(" ".join(point.label.split()))
        captions.append(" ".join(words))
    return captions


def draw_marks(image: Any, marks: Sequence[Mark], style: DrawingStyle | None = None) -> Image.Image:
    """A copy of an image with these marks: trails at the bottom, then discs, then captions."""
    style = DrawingStyle() if style is None else style
    canvas = to_rgb(image).copy()
    shorter = min(canvas.size)
    radius = max(2.0, shorter * 0.012) if style.radius is None else style.radius
    centres = [_pixel(mark.x, mark.y, canvas.size) for mark in marks]
    for mark, centre in zip(marks, centres, strict=True):
        trail = [_pixel(x, y, canvas.size) for x, y in mark.trail]
        _draw_trail(canvas, [*trail, centre], mark.color, radius)
    for mark, centre in zip(marks, centres, strict=True):
        _draw_disc(canvas, centre, mark.color, radius)
    text_size = max(10, round(shorter * 0.026)) if style.text_size is None else style.text_size
    occupied = np.array([_disc_box(centre, radius) for centre in centres]).reshape(-1, 4)
    for mark, centre in zip(marks, centres, strict=True):
        if mark.caption:
            occupied = _draw_caption(canvas, mark, centre, radius, text_size, occupied)
    return canvas


def to_rgb(image: Any) -> Image.Image:
    """An image in RGB, from a PIL image of any mode, an array (H, W, 3) or (H, W) of uint8, or a path.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if hasattr(image, "__array__"):
        return Image.fromarray(np.asarray(image)).convert("RGB")
    try:
        with Image.open(image) as opened:
            return turned_upright(opened).convert("RGB")
    except AttributeError as error:
        raise TypeError(
            f"{type(image).__name__} is not an image. Pass a PIL image, an array of uint8 or a path."
        ) from error


def _points_of(grounding: Any, image_index: int | None, sampled_index: int | None) -> list[Any]:
    if sampled_index is None:
        return [point for point in grounding.points if point.image_index == image_index]
    return [
        point for point in grounding.points if point.frame is not None and point.frame.sampled_index == sampled_index
    ]


def _pixel(x: float, y: float, size: tuple[int, int]) -> Position:
    """Pixel coordinates of a fractional position; the right and lower border belong to the last pixel."""
    return min(x * size[0], size[0] - 1.0), min(y * size[1], size[1] - 1.0)


# --- discs and trails ------------------------------------------------------------------------------------------------


def _disc_box(position: Position, radius: float) -> tuple[float, float, float, float]:
    reach = _reach(radius)
    return position[0] - reach, position[1] - reach, position[0] + reach, position[1] + reach


def _reach(radius: float) -> int:
    """Outer radius of a disc with its white and dark rings, in pixels."""
    return ceil(radius * 1.6) + 1


@lru_cache(maxsize=256)
def _disc(color: Color, radius: float) -> Image.Image:
    """A disc with a white and a dark ring, which stand out on any background: RGBA, odd side, centred."""
    reach, scale = _reach(radius), SUPERSAMPLING
    side = (2 * reach + 1) * scale
    disc = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(disc)
    for factor, fill in ((1.6, (*BLACK, 200)), (1.35, (*WHITE, 255)), (1.0, (*color, 255))):
        extent = radius * factor * scale
        draw.ellipse([side / 2 - extent, side / 2 - extent, side / 2 + extent - 1, side / 2 + extent - 1], fill)
    return disc.resize((2 * reach + 1,) * 2, Image.Resampling.BOX)


def _draw_disc(canvas: Image.Image, position: Position, color: Color, radius: float) -> None:
    disc, reach = _disc(color, radius), _reach(radius)
    canvas.paste(disc, (int(position[0]) - reach, int(position[1]) - reach), disc)


def _draw_trail(canvas: Image.Image, positions: Sequence[Position], color: Color, radius: float) -> None:
    """A line through the positions that fades towards the oldest."""
    if len(positions) < 2:
        return
    width = max(1, round(radius * 0.6))
    margin = width + 2
    left, top = (max(0, int(min(position[axis] for position in positions)) - margin) for axis in (0, 1))
    right, bottom = (
        min(canvas.size[axis], int(max(position[axis] for position in positions)) + margin + 1) for axis in (0, 1)
    )
    cover = Image.new("L", (right - left, bottom - top), 0)
    draw = ImageDraw.Draw(cover)
    shifted = [(x - left, y - top) for x, y in positions]
    segments = list(pairwise(shifted))
    for number, (start, end) in enumerate(segments, start=1):
        opacity = round(60 + 160 * number / len(segments))
        draw.line([start, end], fill=opacity, width=width)
        draw.ellipse([end[0] - width / 2, end[1] - width / 2, end[0] + width / 2, end[1] + width / 2], opacity)
    canvas.paste(color, (left, top, right, bottom), cover)


# --- captions --------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]  # left, top, right, bottom
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # no font can show it


@lru_cache(maxsize=64)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _write(canvas: Image.Image, text: str, position: tuple[float, float], size: int, color: Color) -> None:
    ImageDraw.Draw(canvas).text(position, text, fill=color, font=_font(size))


def _draw_caption(
    canvas: Image.Image, mark: Mark, position: Position, radius: float, size: int, occupied: np.ndarray
) -> np.ndarray:
    """Draws a caption on a dark plate beside its disc, where it overlaps least with discs and other captions.

    Args:
        occupied: (N, 4) boxes of discs and captions.

    Returns:
        These boxes, and that of the caption if it was drawn.
    """
    font = _font(size)
    text = _shortened(LONE_SURROGATE.sub("\ufffd", mark.caption), font, canvas.width)
    if not text:
        return occupied
    left, top, right, bottom = ImageDraw.Draw(canvas).textbbox((0, 0), text, font=font)
    pad = max(2, size // 4)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    if width > canvas.width or height > canvas.height:
        return occupied
    options = np.array(
        [_inside(corner, width, height, canvas.size) for corner in _corners(position, radius, width, height)]
    )
    box = options[np.argmin(_overlaps(options, occupied).sum(axis=1))]
    plate = Image.new("L", (round(width), round(height)), 0)
    ImageDraw.Draw(plate).rounded_rectangle([0, 0, plate.width - 1, plate.height - 1], radius=pad, fill=215)
    canvas.paste(tuple(part // 5 for part in mark.color), (round(box[0]), round(box[1])), plate)
    _write(canvas, text, (round(box[0]) + pad - left, round(box[1]) + pad - top), size, WHITE)
    return np.vstack([occupied, box])


def _shortened(text: str, font: Any, width: int) -> str:
    """The caption, with an ellipsis if it is wider than 60 % of the image; "" if not even one letter fits."""
    limit = 0.6 * width
    if len(text) <= limit and font.getlength(text) <= limit:
        return text
    longest = min(len(text), int(limit))  # measuring is slow, and no letter is narrower than a pixel
    fitting = bisect_right(range(1, longest + 1), limit, key=lambda count: font.getlength(text[:count] + "\u2026"))
    return f"{text[:fitting]}\u2026" if fitting else ""


def _corners(position: Position, radius: float, width: float, height: float) -> list[tuple[float, float]]:
    """Upper left corners of a plate by preference: right, left, above, below, then the diagonals."""
    x, y = position
    gap = _reach(radius) + 2
    right, left, above, below = x + gap, x - gap - width, y - gap - height, y + gap
    middle_x, middle_y = x - width / 2, y - height / 2
    return [
        (right, middle_y),
        (left, middle_y),
        (middle_x, above),
        (middle_x, below),
        (right, above),
        (right, below),
        (left, above),
        (left, below),
    ]


def _inside(corner: tuple[float, float], width: float, height: float, size: tuple[int, int]) -> Box:
    """The box with this upper left corner, moved into the image."""
    left = min(max(0.0, corner[0]), size[0] - width)
    top = min(max(0.0, corner[1]), size[1] - height)
    return left, top, left + width, top + height


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Overlap areas of boxes (N, 4) and others (M, 4): (N, M)."""
    first, last = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    return np.clip(last - first, 0, None).prod(axis=2)
