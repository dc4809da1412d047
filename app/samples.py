"""Example images, videos and questions."""

from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"


@dataclass(frozen=True)
class Sample:
    """A question about files."""

    label: str
    paths: tuple[Path, ...]
    question: str


SAMPLES = (
    Sample("Point in an image", (DATA / "world_single.png",), "Point to the red circles."),
    Sample("Count", (DATA / "world_single.png",), "How many red circles are there?"),
    Sample(
        "Point in several images",
        (DATA / "world_pair_1.png", DATA / "world_pair_2.png"),
        "Point to the blue squares.",
    ),
    Sample("Track in a video", (DATA / "world_clip.mp4",), "Track the red ring."),
    Sample("Ask", (DATA / "world_single.png",), "What colour is the ring?"),
)
