"""Scores of the miniature on fresh seeds: python -m miniature.evaluate [FOLDER] [--number 200]

    pointing        share of the objects asked for that have a point within 3 % of the picture's size
    count           share of right totals, of one to five objects ("How many ... are there?")
    track error     mean distance of tracked points, as a share of the picture's size; a point left out counts 50 %
    colour, what    share of right answers about colours and kinds
    none            share of questions about absent things that are answered "There are none."
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .questions import NONE, Question, ask_clip, ask_pictures
from .world import CLIP_FPS, make_clip, make_picture

NEAR = 0.03
MISSING_DISTANCE = 0.5
TOTAL = re.compile(r"total of (\d+)\.")


@dataclass(frozen=True)
class Example:
    """A question with the picture parts of its message."""

    question: Question
    parts: tuple[dict[str, Any], ...]

    def message(self) -> list[dict]:
        return [{"role": "user", "content": [*self.parts, {"type": "text", "text": self.question.text}]}]


def _video(clip) -> dict[str, Any]:
    metadata = {"fps": float(CLIP_FPS), "total_num_frames": clip.num_frames}
    return {"type": "video", "video": clip.frames(), "video_metadata": metadata}


def examples(seed: int, number: int) -> list[Example]:
    """Questions about fresh pictures (three fifths), sets and clips (one fifth each), in turn.

    Args:
        number: Of questions about single pictures; a third as many of either other kind.
    """
    made: list[Example] = []
    for index in range(number // 2):
        rng = np.random.default_rng([seed, 0, index])
        picture = make_picture(rng)
        parts = ({"type": "image", "image": picture.pixels},)
        made += [Example(question, parts) for question in ask_pictures(rng, [picture], 2)]
    for index in range(number // 6):
        rng = np.random.default_rng([seed, 1, index])
        pictures = [make_picture(rng, max_things=4, tiled=0.1) for _ in range(rng.integers(2, 4))]
        parts = tuple({"type": "image", "image": picture.pixels} for picture in pictures)
        made += [Example(question, parts) for question in ask_pictures(rng, pictures, 2)]
    for index in range(number // 4):
        rng = np.random.default_rng([seed, 2, index])
        clip = make_clip(rng)
        times = sampled_times(clip.num_frames)
        made += [Example(question, (_video(clip),)) for question in ask_clip(rng, clip, times, 2)]
    return made


def sampled_times(num_frames: int) -> list[float]:
    """Two frames a second, and the last one: what the miniature's processor shows of a clip."""
    step, last = CLIP_FPS // 2, num_frames - 1
    indices = list(range(0, last, step))
    return [index / CLIP_FPS for index in [*indices, last]]


def answers(
    model, processor, asked: Sequence[Example], *, batch_size: int = 32, max_new_tokens: int = 160, **options
) -> list[str]:
    """The model's greedy answers; questions of like pictures share a batch."""
    order = sorted(range(len(asked)), key=lambda index: [part["type"] for part in asked[index].parts])
    texts = [""] * len(asked)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = processor.apply_chat_template(
            [asked[index].message() for index in chosen],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(model.dtype)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
        written = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, written):
            texts[index] = text
    return texts


@dataclass
class Tally:
    """Sums behind the scores; pairs of (share or distance, number)."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in sorted(self.values.items())}


COORDS = re.compile(r'coords="([^"]*)')
TRIPLE = re.compile(r"(\d+) (\d{3,4}) (\d{3,4})")


def read_points(text: str) -> list[tuple[float, int, float, float]]:
    """(key, id, x, y) of an answer, x and y as fractions."""
    points = []
    for coords in COORDS.findall(text):
        for group in coords.split("\t"):
            key, _, rest = group.partition(" ")
            for number, x, y in TRIPLE.findall(rest):
                try:
                    points.append((float(key), int(number), int(x) / 1000, int(y) / 1000))
                except ValueError:
                    continue
    return points


def _near_share(question: Question, text: str, tally: Tally, name: str) -> None:
    """Each object takes the nearest point of its key that no other object has taken."""
    free = read_points(text)
    for place in question.places:
        gaps = [
            (np.hypot(point[2] - place.thing.x, point[3] - place.thing.y), number)
            for number, point in enumerate(free)
            if abs(point[0] - place.key) < 0.05
        ]
        gap, number = min(gaps, default=(MISSING_DISTANCE, None))
        tally.add(name, gap <= NEAR)
        if gap <= NEAR:
            free.pop(number)
    tally.add(f"{name} superfluous", len(free) / max(1, len(question.places)))


def _track_error(question: Question, text: str, tally: Tally) -> None:
    """Identities are those of the answer: each object is compared with the point of its own id."""
    found = {(round(key, 1), number): (x, y) for key, number, x, y in read_points(text)}
    ids: dict[int, int] = {}
    firsts = sorted(question.places, key=lambda place: place.key)
    seen: dict[int, Any] = {}
    for place in firsts:
        seen.setdefault(place.number, place)
    ordered = sorted(seen.values(), key=lambda place: (place.key, round(1000 * place.thing.x), place.thing.y))
    for place in ordered:
        ids.setdefault(place.number, len(ids) + 1)
    for place in question.places:
        point = found.get((round(place.key, 1), ids[place.number]))
        distance = MISSING_DISTANCE if point is None else np.hypot(point[0] - place.thing.x, point[1] - place.thing.y)
        tally.add("track error", min(distance, MISSING_DISTANCE))
        tally.add("track found", point is not None)


def judge(asked: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """Scores of answers; see the module."""
    tally = Tally()
    for example, text in zip(asked, texts, strict=True):
        question, kinds = example.question, {part["type"] for part in example.parts}
        group = "clip" if "video" in kinds else "set" if len(example.parts) > 1 else "picture"
        number = len({place.number for place in question.places})
        tally.add(f"exact {group} {question.task}", text == question.answer)
        if question.task in ("point", "count", "track") and number == 0:
            tally.add("none" if group == "picture" else f"none in {group}", text == question.answer)
        elif question.task == "track":
            _track_error(question, text, tally)
        elif question.task in ("point", "count"):
            _near_share(question, text, tally, "pointing" if group == "picture" else f"pointing in {group}")
        if question.task == "count" and 0 < number <= 5:
            stated = TOTAL.search(text)
            right = stated is not None and int(stated.group(1)) == number
            tally.add("count" if group == "picture" else f"count in {group}", right)
        if question.task in ("colour", "what", "where", "number") and group == "picture":
            tally.add(question.task, text == question.answer)
    return tally.means()


def score(model, processor, *, seed: int, number: int, batch_size: int = 32, **options) -> dict[str, float]:
    """Scores on the world's `seed`; options go to `generate`."""
    asked = examples(seed, number)
    return judge(asked, answers(model, processor, asked, batch_size=batch_size, **options))


def main() -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="converted folder")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--number", type=int, default=300, help="questions about single pictures")
    arguments = parser.parse_args()
    processor = AutoProcessor.from_pretrained(arguments.folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(arguments.folder, trust_remote_code=True).eval()
    print(json.dumps(score(model, processor, seed=arguments.seed, number=arguments.number), indent=2))


__all__ = ["NONE", "Example", "answers", "examples", "judge", "score"]

if __name__ == "__main__":
    main()
