"""From a training checkpoint to an answer: writes a native miniature, converts it, loads it the way a user would and
asks it about a photo and a clip.

Usage: python examples/demo.py [FOLDER]    (default: a temporary folder)
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.cli import main as convert
from random_miniature import write_native_miniature

DATA = Path(__file__).resolve().parent / "data"
PHOTO, CLIP = DATA / "nasa_frame.jpg", DATA / "nasa_clip.mp4"


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


def ask(model, processor, question: str, picture: dict, **options) -> str:
    """One question about one picture; the answer as text, or as ids where random weights spell none."""
    messages = [{"role": "user", "content": [{"type": "text", "text": question}, picture]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_metadata=True,
        **options,
    )
    describe(inputs)
    inputs.pop("video_metadata", None)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(answer, skip_special_tokens=True)
    return text if text.isprintable() and "\ufffd" not in text else f"tokens {answer.tolist()}"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        checkpoint, tokenizer = write_native_miniature(scratch)
        folder = scratch / "miniature_molmo2"
        if convert([str(checkpoint), str(folder), "--tokenizer", str(tokenizer), "--overwrite", "--verify"]):
            raise SystemExit("The conversion failed.")
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"\n{type(model).__name__} with {parameters / 1e6:.2f} million parameters drawn from a seed,")
        print("so the answers below are noise; everything before them is what a published checkpoint would see.\n")

        for question, kind, path in (
            ("Point to the technician in the lift.", "image", PHOTO),
            ("What happens?", "video", CLIP),
        ):
            print(f"{path.name}: {question}")
            print(f"  answer: {ask(model, processor, question, {'type': kind, 'path': str(path)})}\n")


if __name__ == "__main__":
    main()
