"""The demo, from a training checkpoint to drawn points: converts the trained miniature, loads it, asks it about images
and a clip, and writes annotated copies.

Usage: python examples/demo.py [FOLDER]    (default: demo_output)
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molmo2 import annotate_video, ask, draw, load
from molmo2.convert.cli import main as convert

EXAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLES))

from miniature.native import CHECKPOINT  # noqa: E402
from miniature.questions import ask_images  # noqa: E402
from miniature.world import make_image  # noqa: E402

IMAGE, CLIP = EXAMPLES / "data" / "world_single.png", EXAMPLES / "data" / "world_clip.mp4"
DRAWN_SEED = 7000  # of new images; training, scores and the bundled images use others


class Demo:
    """A converted checkpoint that answers questions; annotated files go into `output`."""

    def __init__(self, folder: Path, output: Path):
        self.model, self.processor = load(folder)
        self.output = output

    def ask(self, question: str, **media: Any) -> Any:
        """Ask a question, print and return the answer."""
        answer = ask(self.model, self.processor, question, **media)
        print(f"  {question}\n    {answer.text}")
        for point in answer.grounding.points[:8]:
            when = "" if point.time is None else f" at {point.time:.1f} s"
            print(f"    {point.label} {point.id}: x {point.x:.0f}, y {point.y:.0f} of {self._size(answer)}{when}")
        if answer.grounding.count is not None:
            print(f"    count: {answer.grounding.count}")
        return answer

    @staticmethod
    def _size(answer: Any) -> str:
        return "{}x{}".format(*answer.grounding.media.sizes[0])

    def save(self, image: Image.Image, name: str) -> None:
        image.save(self.output / name)
        print(f"    wrote {self.output / name}")

    def bundled_image(self) -> None:
        """Questions about the bundled image."""
        print(f"\n{IMAGE.name}")
        answer = self.ask("Point to the red circles.", images=IMAGE)
        self.save(draw(IMAGE, answer.grounding), "points.png")
        for question in ("How many red circles are there?", "What colour is the ring?", "Point to the green squares."):
            self.ask(question, images=IMAGE)

    def clip(self) -> None:
        """A tracked object in the bundled clip."""
        print(f"\n{CLIP.name}")
        answer = self.ask("Track the red ring.", videos=CLIP)
        drawn = annotate_video(CLIP, answer.grounding, self.output / "track.mp4")
        print(f"    wrote {drawn.path}")

    def drawn_images(self, seeds: Sequence[int]) -> None:
        """Newly drawn images, with the correct answer to each question."""
        for seed in seeds:
            rng = np.random.default_rng([DRAWN_SEED, seed])
            image = make_image(rng)
            print(f"\nan image drawn from seed {seed}")
            for question in ask_images(rng, [image], 2):
                self.ask(question.text, images=image.pixels)
                print(f"    the truth: {question.answer}")


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo_output")
    output.mkdir(parents=True, exist_ok=True)
    folder = output / "miniature"
    tokenizer = CHECKPOINT / "base_tokenizer"
    if convert([str(CHECKPOINT), str(folder), "--tokenizer", str(tokenizer), "--overwrite", "--verify"]):
        raise SystemExit("The conversion failed.")
    demo = Demo(folder, output)
    print(f"\nA {type(demo.model).__name__} with {demo.model.num_parameters() / 1e6:.1f} million parameters")
    demo.bundled_image()
    demo.clip()
    demo.drawn_images(range(3))


if __name__ == "__main__":
    main()
