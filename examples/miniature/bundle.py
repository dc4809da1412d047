"""Writes the images and the clip that come with the examples: python -m miniature.bundle FOLDER

All are drawn from seeds that neither training nor scores use.
"""

import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image

from .world import CLIP_FPS, Clip, DrawnImage, Mover, Thing, make_clip, make_image

BUNDLE_SEED = 5000
IMAGE_KINDS = (
    ("red", "circle"),
    ("blue", "square"),
    ("red", "circle"),
    ("green", "ring"),
    ("red", "circle"),
    ("yellow", "letter A"),
)
PAIR_KINDS = (
    (("blue", "square"), ("green", "ring"), ("red", "circle")),
    (("blue", "square"), ("yellow", "triangle"), ("blue", "square"), ("red", "circle")),
)


def image() -> DrawnImage:
    """Three red circles among other objects; larger than one crop."""
    return make_image(np.random.default_rng([BUNDLE_SEED, 0]), tiled=1.0, kinds=IMAGE_KINDS)


def pair() -> tuple[DrawnImage, ...]:
    """One and two blue squares, and a red circle each: like most sets, of small images with few objects."""
    return tuple(
        make_image(np.random.default_rng([BUNDLE_SEED, seed]), tiled=0.0, kinds=kinds)
        for seed, kinds in zip((3, 2), PAIR_KINDS)
    )


def clip() -> Clip:
    """A red ring crosses a blue square; a green triangle leaves. 2.4 seconds of 112 x 112 pixels."""
    movers = (
        Mover(Thing("blue", "square", 0.75, 0.35, 0.12), -0.2, 0.0),
        Mover(Thing("red", "ring", 0.2, 0.3, 0.13), 0.22, 0.12),
        Mover(Thing("green", "triangle", 0.3, 0.75, 0.12), 0.36, 0.02),
    )
    ground = make_clip(np.random.default_rng([BUNDLE_SEED, 1])).ground
    ground = np.asarray(Image.fromarray(ground).resize((112, 112)))
    return Clip(movers, 24, ground)


def write_clip(moving: Clip, target: Path) -> None:
    """Encode a clip as H.264 with little loss."""
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS)
        stream.height, stream.width = moving.ground.shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "8"}
        for frame in moving.frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    folder = Path(sys.argv[1])
    Image.fromarray(image().pixels).save(folder / "world_single.png", optimize=True)
    for number, other in enumerate(pair(), 1):
        Image.fromarray(other.pixels).save(folder / f"world_pair_{number}.png", optimize=True)
    write_clip(clip(), folder / "world_clip.mp4")


if __name__ == "__main__":
    main()
