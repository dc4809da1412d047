"""Images and clips drawn from seeds: coloured shapes, letters and digits on textured grounds.

    rng = np.random.default_rng([seed, index])
    image = make_image(rng)      # DrawnImage: pixels and the objects on them
    clip = make_clip(rng)            # Clip: frames at 10 per second and where each object is at any time

Positions are fractions of width and height; (x, y), as in the model's notation.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (240, 225, 60),
    "green": (45, 165, 70),
    "blue": (45, 85, 220),
    "purple": (150, 50, 190),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
LETTERS, DIGITS = ("A", "E", "H", "K", "S", "T"), ("2", "4", "7")
KINDS = (*SHAPES, *(f"letter {name}" for name in LETTERS), *(f"digit {name}" for name in DIGITS))
HELD_OUT_SHAPES = ("star", "diamond")  # drawn on request only: no training image, question or answer has them
CLIP_FPS = 10
MAX_THINGS = 7


@dataclass(frozen=True)
class Thing:
    """Something on an image.

    Attributes:
        colour: A key of `COLOURS`.
        kind: One of `KINDS`, or a held-out shape.
        x, y: Centre, as fractions of width and height.
        radius: As a fraction of the geometric mean of the sides.
    """

    colour: str
    kind: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class DrawnImage:
    """`pixels` (H, W, 3) uint8 and what is on it."""

    pixels: np.ndarray
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Mover:
    """A object of a clip: where it is at time 0, and how it moves per second."""

    thing: Thing
    dx: float
    dy: float

    def at(self, seconds: float) -> Thing:
        thing = self.thing
        place = thing.x + seconds * self.dx, thing.y + seconds * self.dy
        return Thing(thing.colour, thing.kind, *place, thing.radius)


@dataclass(frozen=True)
class Clip:
    """A clip that can be drawn at any of its frames.

    Attributes:
        num_frames: At `CLIP_FPS`.
        ground: (H, W, 3) uint8, the same behind every frame.
    """

    movers: tuple[Mover, ...]
    num_frames: int
    ground: np.ndarray

    def frame(self, index: int) -> np.ndarray:
        return draw(self.ground, [mover.at(index / CLIP_FPS) for mover in self.movers])

    def frames(self) -> np.ndarray:
        """(F, H, W, 3) uint8."""
        return np.stack([self.frame(index) for index in range(self.num_frames)])

    def seen_at(self, seconds: float) -> list[tuple[int, Thing]]:
        """Number and place of the movers whose centre is inside the frame."""
        placed = [(number, mover.at(seconds)) for number, mover in enumerate(self.movers)]
        return [(number, thing) for number, thing in placed if 0 <= thing.x <= 1 and 0 <= thing.y <= 1]


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A dull texture: stripes, checks, a gradient or plain, with noise."""
    hue, saturation, value = rng.random(), 0.25 * rng.random(), rng.choice([rng.uniform(0, 0.3), rng.uniform(0.6, 1)])
    base = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    rows, cols = np.mgrid[0:height, 0:width]
    period = rng.integers(4, 20)
    slopes, rises = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
    kind = rng.integers(4)
    if kind == 0:
        pattern = np.zeros((height, width))
    elif kind == 1:
        pattern = np.sin((rows * slopes[0] + cols * slopes[1]) * 6.28 / period)
    elif kind == 2:
        pattern = ((rows // period + cols // period) % 2) * 2.0 - 1
    else:
        pattern = rows / height * rises[0] + cols / width * rises[1]
    noise = rng.normal(0, rng.uniform(0, 8), (height, width, 1))
    return np.clip(base + pattern[..., None] * rng.uniform(0, 18) + noise, 0, 255).astype(np.uint8)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _corners(x: float, y: float, radii: Sequence[float], first_degrees: float) -> list[tuple[float, float]]:
    angles = np.deg2rad(first_degrees + 360 * np.arange(len(radii)) / len(radii))
    return [(x + radius * np.cos(angle), y + radius * np.sin(angle)) for radius, angle in zip(radii, angles)]


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, width: int, height: int) -> None:
    x, y, radius = thing.x * width, thing.y * height, thing.radius * (width * height) ** 0.5
    colour = COLOURS[thing.colour]
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.kind == "circle":
        canvas.ellipse(box, fill=colour)
    elif thing.kind == "ring":
        canvas.ellipse(box, outline=colour, width=max(2, round(0.4 * radius)))
    elif thing.kind == "square":
        side = 0.85 * radius
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif thing.kind == "triangle":
        canvas.polygon(_corners(x, y, [1.15 * radius] * 3, -90), fill=colour)
    elif thing.kind == "cross":
        thick = 0.3 * radius
        canvas.rectangle((x - radius, y - thick, x + radius, y + thick), fill=colour)
        canvas.rectangle((x - thick, y - radius, x + thick, y + radius), fill=colour)
    elif thing.kind == "star":
        canvas.polygon(_corners(x, y, [1.2 * radius, 0.5 * radius] * 5, -90), fill=colour)
    elif thing.kind == "diamond":
        canvas.polygon(_corners(x, y, [1.15 * radius, 0.8 * radius] * 2, -90), fill=colour)
    else:
        font, text = _font(max(10, round(2.5 * radius))), thing.kind[-1]
        canvas.text((x, y), text, fill=colour, font=font, anchor="mm", stroke_width=max(1, round(radius / 10)))


def draw(ground: np.ndarray, things: Sequence[Thing]) -> np.ndarray:
    """(H, W, 3) uint8: the objects on a copy of the ground, the last one on top."""
    image = Image.fromarray(ground)
    canvas = ImageDraw.Draw(image)
    for thing in things:
        _draw_thing(canvas, thing, *image.size)
    return np.asarray(image)


def _sides(rng: np.random.Generator, tiled: float) -> tuple[int, int]:
    """Height and width: small enough for one crop of 98 pixels, or, with probability `tiled`, for several."""
    if rng.random() >= tiled:
        return int(rng.integers(72, 99)), int(rng.integers(72, 99))
    long, short = int(rng.integers(105, 169)), int(rng.integers(84, 169))
    short = max(short, int(long / 1.7))
    return (long, short) if rng.random() < 0.5 else (short, long)


def choose_kinds(rng: np.random.Generator, number: int) -> list[tuple[str, str]]:
    """Colours and kinds of `number` objects; several alike more often than chance would have it."""
    colours, chosen = list(COLOURS), []
    alike = int(rng.integers(1, 6)) if rng.random() < 0.6 else 1
    for index in range(number):
        colour = colours[rng.integers(len(colours))]
        kind = SHAPES[rng.integers(len(SHAPES))] if rng.random() < 0.7 else KINDS[rng.integers(len(KINDS))]
        if chosen and index < alike:
            colour, kind = chosen[0]
            colour = colours[rng.integers(len(colours))] if rng.random() < 0.2 else colour
        elif chosen and rng.random() < 0.4:  # something like another one in one respect
            other = chosen[rng.integers(len(chosen))]
            colour, kind = (other[0], kind) if rng.random() < 0.5 else (colour, other[1])
        chosen.append((colour, kind))
    return chosen


def _place(
    rng: np.random.Generator, kinds: Sequence[tuple[str, str]], shape: tuple[int, int], radii: tuple[float, float]
) -> list[Thing]:
    """Things beside each other; those for which no room is found are left out."""
    height, width = shape
    scale = (height * width) ** 0.5
    things: list[Thing] = []
    for colour, kind in kinds:
        smallest = radii[0] if kind in SHAPES or kind in HELD_OUT_SHAPES else radii[0] + 0.015
        radius = rng.uniform(smallest, radii[1])
        for _ in range(20):
            across, down = 1.1 * radius * scale / width, 1.1 * radius * scale / height
            x, y = rng.uniform(across, 1 - across), rng.uniform(down, 1 - down)
            gaps = [
                np.hypot((x - other.x) * width, (y - other.y) * height) / scale - 1.2 * (radius + other.radius)
                for other in things
            ]
            if min(gaps, default=1) > 0:
                things.append(Thing(colour, kind, x, y, radius))
                break
    return things


def make_image(
    rng: np.random.Generator,
    *,
    max_things: int = MAX_THINGS,
    tiled: float = 0.35,
    kinds: Sequence[tuple[str, str]] | None = None,
) -> DrawnImage:
    """One image.

    Args:
        max_things: Maximum number of objects; at least one.
        tiled: Probability that it is larger than one crop.
        kinds: Colours and kinds instead of drawn ones.
    """
    shape = _sides(rng, tiled)
    kinds = choose_kinds(rng, int(rng.integers(1, max_things + 1))) if kinds is None else kinds
    things = _place(rng, kinds, shape, (0.075, 0.12))
    return DrawnImage(draw(_ground(rng, *shape), things), tuple(things))


def make_clip(
    rng: np.random.Generator, *, max_things: int = 3, kinds: Sequence[tuple[str, str]] | None = None
) -> Clip:
    """One clip of 1 to 2.5 seconds: objects that rest, move, cross each other, leave and enter.

    Args:
        max_things: Maximum number of objects; at least one.
        kinds: Colours and kinds instead of drawn ones.
    """
    shape = int(rng.integers(80, 130)), int(rng.integers(80, 130))
    kinds = choose_kinds(rng, int(rng.integers(1, max_things + 1))) if kinds is None else kinds
    num_frames = int(rng.integers(10, 27))
    seconds = (num_frames - 1) / CLIP_FPS
    movers = []
    for thing in _place(rng, kinds, shape, (0.1, 0.15)):
        x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9)
        if rng.random() < 0.15:  # past the edge
            x, y = (
                (x, float(rng.choice([-0.25, 1.25]))) if rng.random() < 0.5 else (float(rng.choice([-0.25, 1.25])), y)
            )
        if rng.random() < 0.15:
            x, y = thing.x, thing.y
        mover = Mover(thing, (x - thing.x) / seconds, (y - thing.y) / seconds)
        if rng.random() < 0.2:  # the same path backwards: it may enter
            end = mover.at(seconds)
            mover = Mover(end, -mover.dx, -mover.dy)
        movers.append(mover)
    return Clip(tuple(movers), num_frames, _ground(rng, *shape))
