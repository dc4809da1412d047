"""What vectors of the miniature find: python -m miniature.embeddings [FOLDER] [--number 3]

Images of one object each, in six colours and five shapes, on a ground and at a place of its own. It prints the share
of images whose nearest other image has the same colour, and the same shape, by pooling and question; then the same
for texts that look for an image, and the share of clips in which an image finds the moment with an object of its
colour.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molmo2 import embed, nearest

from . import native
from .evaluate import load
from .world import COLOURS, SHAPES, make_image

SEED = 3000
FRAME_SIDE, FRAME_RATE = 98, 2.0
QUESTIONS = ("Describe this image.", "What colour is the object?", "What is the object?")
COLOUR_QUESTION = QUESTIONS[1]
Kind = tuple[str, str]  # colour and shape


def drawn(kind: Kind, seed: Sequence[int], tiled: float = 0.35) -> np.ndarray:
    """(H, W, 3) uint8: one object of a colour and a shape."""
    return make_image(np.random.default_rng(seed), max_things=1, kinds=[kind], tiled=tiled).pixels


def world(number: int) -> tuple[list[Kind], list[np.ndarray]]:
    """`number` images of each kind of object."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES for _ in range(number)]
    return kinds, [drawn(kind, [SEED, place]) for place, kind in enumerate(kinds)]


def agreement(asked: Sequence[Kind], found: Sequence[Kind]) -> tuple[float, float]:
    """Shares of equal colours and of equal shapes."""
    equal = np.array([[mine == theirs for mine, theirs in zip(*pair)] for pair in zip(asked, found)])
    return float(equal[:, 0].mean()), float(equal[:, 1].mean())


def neighbours(rows: np.ndarray, kinds: Sequence[Kind]) -> tuple[float, float]:
    """`agreement` of each image with the one that is nearest to it."""
    found = nearest(rows, rows, k=2).indices
    others = [next(place for place in own if place != query) for query, own in enumerate(found.tolist())]
    return agreement(kinds, [kinds[place] for place in others])


def slides(rng: np.random.Generator, number: int = 6) -> tuple[list[str], np.ndarray]:
    """A clip that shows one object of each colour, half a second each: colours and frames."""
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))][:number]
    images = [drawn((colour, str(rng.choice(SHAPES))), rng.integers(1 << 30, size=2), tiled=0) for colour in colours]
    frames = [Image.fromarray(pixels).resize((FRAME_SIDE, FRAME_SIDE)) for pixels in images]
    return colours, np.stack([np.asarray(frame) for frame in frames])


def find_moment(model: Any, processor: Any, clip: np.ndarray, image: np.ndarray, **options: Any) -> float:
    """The time, in seconds, of the frame that is most like an image in what the question asks about."""
    rows, times = embed(model, processor, videos=(clip, {"fps": FRAME_RATE}), per_frame=True, **options)
    query = embed(model, processor, images=image, **options)
    return float(times[nearest(query[0], rows, k=1).indices[0]])


def moments(model: Any, processor: Any, number: int, **options: Any) -> float:
    """Share of clips in which an image of a colour finds the half second with an object of this colour."""
    right = 0
    for index in range(number):
        rng = np.random.default_rng([SEED, 1, index])
        colours, clip = slides(rng)
        place = int(rng.integers(len(colours)))
        image = drawn((colours[place], str(rng.choice(SHAPES))), [SEED, 2, index])
        right += find_moment(model, processor, clip, image, **options) == place / FRAME_RATE
    return right / number


def scores(model: Any, processor: Any, number: int) -> dict[str, tuple[float, ...]]:
    """Every line of the table: shares for colour and shape, or of moments."""
    kinds, images = world(number)
    lines: dict[str, tuple[float, ...]] = {"chance": (1 / len(COLOURS), 1 / len(SHAPES))}
    rows = {}
    for question in QUESTIONS:
        for pooling in ("mean", "max", "last"):
            options = {"pooling": pooling, "prompt": question, "batch_size": 24}
            rows[pooling, question] = embed(model, processor, images=images, **options)
            lines[f"{pooling:5}{question}"] = neighbours(rows[pooling, question], kinds)
    asked = sorted(set(kinds))
    for pooling in ("mean", "last"):
        texts = embed(model, processor, texts=[" ".join(kind) for kind in asked], pooling=pooling, batch_size=24)
        found = nearest(texts, rows[pooling, QUESTIONS[0]], k=1).indices[:, 0]
        lines[f"{pooling:5}a text finds an image"] = agreement(asked, [kinds[place] for place in found])
    lines["moments: chance"] = (1 / len(COLOURS),)
    for pooling in ("mean", "last"):
        share = moments(model, processor, 10 * number, pooling=pooling, prompt=COLOUR_QUESTION)
        lines[f"moments: {pooling:5}{COLOUR_QUESTION}"] = (share,)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=native.CHECKPOINT)
    parser.add_argument("--number", type=int, default=3, help="images of each kind of object (default: 3)")
    arguments = parser.parse_args()
    model, processor = load(arguments.folder)
    print(f"{'':45}colour   shape")
    for name, shares in scores(model, processor, arguments.number).items():
        print(f"{name:45}" + "".join(f"{share:6.0%}  " for share in shares))


if __name__ == "__main__":
    main()
