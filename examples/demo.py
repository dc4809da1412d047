"""From a training checkpoint to drawn points: converts the trained miniature, loads it the way a user would, asks it
about pictures and a clip, and writes what it saw.

Usage: python examples/demo.py [FOLDER]    (default: demo_output)
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from molmo2.convert.cli import main as convert
from molmo2.tools.ask import ask
from molmo2.tools.draw import draw
from molmo2.tools.draw_video import annotate_video

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]

from miniature.native import CHECKPOINT  # noqa: E402
from miniature.questions import ask_pictures  # noqa: E402
from miniature.world import make_picture  # noqa: E402

PICTURE, CLIP = EXAMPLES / "data" / "world_picture.png", EXAMPLES / "data" / "world_clip.mp4"
DRAWN_SEED = 7000  # of pictures drawn anew; training, scores and the bundled pictures have others


class Demo:
    """A converted folder at work; what it draws goes into `output`."""

    def __init__(self, folder: Path, output: Path):
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        self.output = output

    def ask(self, question: str, **media: Any) -> Any:
        """Ask and print; returns the answer."""
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

    def bundled_picture(self) -> None:
        print(f"\n{PICTURE.name}")
        answer = self.ask("Point to the red circles.", images=PICTURE)
        self.save(draw(PICTURE, answer.grounding), "points.png")
        for question in ("How many red circles are there?", "What colour is the ring?", "Point to the green squares."):
            self.ask(question, images=PICTURE)

    def clip(self) -> None:
        print(f"\n{CLIP.name}")
        answer = self.ask("Track the red ring.", videos=CLIP)
        drawn = annotate_video(CLIP, answer.grounding, self.output / "track.mp4")
        print(f"    wrote {drawn.path}")

    def drawn_pictures(self, seeds: Sequence[int]) -> None:
        """Pictures that nobody has seen before, with the true answer of each question."""
        for seed in seeds:
            rng = np.random.default_rng([DRAWN_SEED, seed])
            picture = make_picture(rng)
            print(f"\na picture drawn from seed {seed}")
            for question in ask_pictures(rng, [picture], 2):
                self.ask(question.text, images=picture.pixels)
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
    demo.bundled_picture()
    demo.clip()
    demo.drawn_pictures(range(3))


if __name__ == "__main__":
    main()
