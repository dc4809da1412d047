"""From a training checkpoint to a true answer: converts and verifies the trained miniature, loads it the way a user
would, asks it about pictures and a clip, and writes them with its answers drawn on.

Usage: python examples/demo.py [FOLDER]    (default: demo_output)
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from convert.cli import main as convert
from miniature.native import CHECKPOINT
from miniature.world import make_picture

DATA = Path(__file__).resolve().parent / "data"
PICTURE, CLIP = DATA / "world_picture.png", DATA / "world_clip.mp4"
DRAWN_SEED = 6000  # of pictures that are drawn on the spot; training drew from another
DRAWN_KINDS = (("purple", "cross"), ("orange", "digit 4"), ("purple", "cross"), ("green", "cross"))
ENLARGED = 4  # annotated pictures are so many times larger than the miniature's small ones


def describe(inputs: dict) -> None:
    """Print what went into the model."""
    ids, visual = inputs["input_ids"], inputs["token_type_ids"]
    print(f"  tokens: {ids.shape[1]}, of which {int(visual.sum())} stand for pictures")
    for grid, crops in zip(inputs.get("image_grids", []), inputs.get("image_num_crops", []), strict=True):
        low_rows, low_cols, rows, cols = grid.tolist()
        print(f"  image: {int(crops)} crops; {low_rows}x{low_cols} tokens for the whole, {rows}x{cols} for the tiles")
    for grid, timing in zip(inputs.get("video_grids", []), inputs.get("video_metadata", []), strict=True):
        frames, rows, cols = grid.tolist()
        times = ", ".join(f"{seconds:.1f}" for seconds in timing.timestamps)
        print(f"  video: {frames} frames of {rows}x{cols} tokens at {times} s; read with {timing.video_backend}")


def ask(model, processor, question: str, part: dict):
    """One question about one picture or clip; prints and returns the answer as a `Grounding`."""
    messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_metadata=True,
    )
    describe(inputs)
    media = inputs.media
    inputs.pop("video_metadata", None)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    grounding = processor.post_process_grounding(text, media[0])
    print(f"  answer: {text!r}")
    if grounding.none:
        print("  points: none")
    for point in grounding.points:
        when = "" if point.time is None else f" at {point.time:.1f} s"
        print(f"  {point.label} {point.id}{when}: x {point.x:.0f}, y {point.y:.0f}")
    if grounding.count is not None:
        print(f"  count: {grounding.count}")
    return grounding


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo_output")
    folder = target / "miniature_molmo2"
    tokenizer = str(CHECKPOINT / "base_tokenizer")
    if convert([str(CHECKPOINT), str(folder), "--tokenizer", tokenizer, "--overwrite", "--verify"]):
        raise SystemExit("The conversion failed.")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{type(model).__name__} with {parameters / 1e6:.2f} million parameters, trained on drawn pictures\n")

    drawn = Image.fromarray(make_picture(np.random.default_rng(DRAWN_SEED), kinds=DRAWN_KINDS).pixels)
    for picture, name, question in (
        (Image.open(PICTURE).convert("RGB"), "world_picture.png", "How many red circles are there?"),
        (Image.open(PICTURE).convert("RGB"), "world_picture_2.png", "Point to the green letter A."),
        (drawn, "drawn_picture.png", "Point to the purple crosses."),
        (drawn, "drawn_picture_2.png", "What colour is the digit 4?"),
    ):
        print(f"{name}: {question}")
        grounding = ask(model, processor, question, {"type": "image", "image": picture})
        if grounding.points:
            large = picture.resize((ENLARGED * picture.width, ENLARGED * picture.height))
            scaled = processor.post_process_grounding(grounding.text, [large.size])
            processor.draw(large, scaled).save(target / name)
            print(f"  drawn: {target / name}")
        print()
    question = "Track the red ring."
    print(f"{CLIP.name}: {question}")
    grounding = ask(model, processor, question, {"type": "video", "path": str(CLIP)})
    processor.annotate_video(CLIP, grounding, target / CLIP.name)
    print(f"  drawn: {target / CLIP.name}")


if __name__ == "__main__":
    main()
