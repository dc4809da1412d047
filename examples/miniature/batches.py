"""Training batches: pictures and clips of the world as message trees.

One sequence holds the pictures once and several question/answer branches behind them. A branch sees the pictures and
itself, and its positions follow on the pictures, so it is what it would be alone:

    pictures | question 1, answer 1 | question 2, answer 2 | ...
    branch 0 |          1           |          2           | ...

Pixels and tokens come from the processor's own parts; `tests/test_miniature.py` compares with whole processor calls.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .layout import CROP, PATCH, PATCHES
from .questions import Question, ask_clip, ask_pictures
from .world import COLOURS, KINDS, Clip, Thing, make_clip, make_picture

NO_TARGET = -1  # this patch is not asked about
EMPTY = 0
ROUNDING_WEIGHT = 0.2  # of the last digit of a coordinate, which is finer than the pixels
COORDINATE = re.compile(r"(?<= )\d{3,4}(?=[ \t\"])")
COLOUR_IDS = {name: number for number, name in enumerate(COLOURS)}
KIND_IDS = {name: number for number, name in enumerate(KINDS)}


@dataclass(frozen=True)
class Mix:
    """How hard the pictures of a batch are."""

    max_things: int = 7
    tiled: float = 0.35
    pictures: int = 1  # of a set
    branches: int = 6


@dataclass
class Rows:
    """Rows under construction: one entry per tree."""

    ids: list[list[int]] = field(default_factory=list)
    branches: list[list[int]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)


class BatchMaker:
    """Makes batches with a processor of the miniature."""

    def __init__(self, processor):
        self.processor = processor
        self.backend = processor.tokenizer.backend_tokenizer
        self.visual = torch.tensor(processor.image_token_ids)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def answer_weights(self, answer: str) -> tuple[list[int], list[float]]:
        """Tokens of an answer and their weights in the loss."""
        encoded = self.backend.encode(answer, add_special_tokens=False)
        light = {match.end() - 1 for match in COORDINATE.finditer(answer)}
        weights = [ROUNDING_WEIGHT if end - 1 in light else 1.0 for _, end in encoded.offsets]
        return encoded.ids, weights

    def add_tree(self, rows: Rows, opening: str, questions: Sequence[Question]) -> None:
        """One sequence: the pictures, then each question with its answer."""
        ids = [self.processor.bos_token_id, *self.encode(opening)]
        shared, count = len(ids), len(ids)
        branches, positions, weights = [0] * count, list(range(count)), [0.0] * count
        for branch, question in enumerate(questions, start=1):
            prompt = self.encode(f"<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer, answer_weights = self.answer_weights(question.answer)
            own = [*prompt, *answer, self.processor.tokenizer.eos_token_id]
            ids += own
            branches += [branch] * len(own)
            positions += range(shared, shared + len(own))
            weights += [*[0.0] * len(prompt), *answer_weights, 1.0]
        rows.ids.append(ids)
        rows.branches.append(branches)
        rows.positions.append(positions)
        rows.weights.append(weights)

    def finish(self, rows: Rows) -> dict[str, Tensor]:
        """(B, S) `input_ids`, `branches`, `position_ids` and `weights`, padded on the right."""
        length = max(len(ids) for ids in rows.ids)

        def padded(values: list[list], filler: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor([row + [filler] * (length - len(row)) for row in values], dtype=dtype)

        return {
            "input_ids": padded(rows.ids, self.processor.tokenizer.pad_token_id, torch.long),
            "branches": padded(rows.branches, -1, torch.long),
            "position_ids": padded(rows.positions, 0, torch.long),
            "weights": padded(rows.weights, 0.0, torch.float32),
        }

    def pictures(self, rng: np.random.Generator, number: int, mix: Mix) -> dict[str, Tensor]:
        """So many trees about single pictures or sets of them."""
        rows, all_pictures, questions = Rows(), [], []
        for _ in range(number):
            count = mix.pictures if mix.pictures == 1 else int(rng.integers(2, mix.pictures + 1))
            most = mix.max_things if count == 1 else min(4, mix.max_things)
            pictures = [make_picture(rng, max_things=most, tiled=mix.tiled) for _ in range(count)]
            all_pictures.append(pictures)
            questions.append(ask_pictures(rng, pictures, mix.branches))
        flat = [picture for pictures in all_pictures for picture in pictures]
        tensors = self.processor.image_processor.preprocess([picture.pixels for picture in flat], return_tensors="pt")
        grids = iter(tensors["image_grids"].tolist())
        for pictures, asked in zip(all_pictures, questions):
            texts = ["".join(self.processor.get_image_tokens(next(grids))) for _ in pictures]
            opening = texts[0] if len(texts) == 1 else "".join(f"Image {i}{text}" for i, text in enumerate(texts, 1))
            self.add_tree(rows, opening, asked)
        crops = tensors["image_num_crops"]
        first = (crops.cumsum(0) - crops).tolist()
        seen = {crop: picture.things for crop, picture in zip(first, flat)}
        dense = dense_targets(len(tensors["pixel_values"]), seen)
        return {**self.finish(rows), **tensors, "dense": dense}

    def clips(self, rng: np.random.Generator, number: int, mix: Mix) -> dict[str, Tensor]:
        """So many trees about one clip each."""
        rows, seen, frames, first = Rows(), {}, [], 0
        clips = [make_clip(rng, max_things=min(3, mix.max_things)) for _ in range(number)]
        metadata = [{"fps": 10.0, "total_num_frames": clip.num_frames} for clip in clips]
        indices = [self.processor.video_processor.sample_frames(entry).tolist() for entry in metadata]
        frames = [np.stack([clip.frame(index) for index in own]) for clip, own in zip(clips, indices)]
        tensors = self.processor.video_processor.preprocess(
            frames,
            video_metadata=[{"fps": 10.0, "frames_indices": own} for own in indices],
            do_sample_frames=False,
            return_tensors="pt",
        )
        for clip, own, grid in zip(clips, indices, tensors["video_grids"].tolist()):
            times = [index / 10 for index in own]
            self.add_tree(
                rows, self.processor.get_video_string(grid, times), self._clip_questions(rng, clip, times, mix)
            )
            for offset, time in enumerate(times):
                seen[first + offset] = [thing for _, thing in clip.seen_at(time)]
            first += len(own)
        return {**self.finish(rows), **tensors, "dense": dense_targets(first, seen)}

    def _clip_questions(self, rng: np.random.Generator, clip: Clip, times: list[float], mix: Mix) -> list[Question]:
        return ask_clip(rng, clip, times, max(2, mix.branches // 2))


def dense_targets(num_crops: int, seen: dict[int, Sequence[Thing]]) -> Tensor:
    """What is at each patch.

    Args:
        seen: Things on the crops that show a whole picture or frame.
    Returns:
        (C, P, 7) int64: `NO_TARGET`, `EMPTY` or 1 with colour, kind, two digits of x, two digits of y.
    """
    side = CROP // PATCH
    targets = np.zeros((num_crops, PATCHES, 7), dtype=np.int64)
    targets[:, :, 0] = NO_TARGET
    for crop, things in seen.items():
        targets[crop, :, 0] = EMPTY
        for thing in things:
            col, row = (min(side - 1, max(0, int(side * place))) for place in (thing.x, thing.y))
            digits = [min(99, max(0, int(100 * place))) for place in (thing.x, thing.y)]
            numbers = [part for value in digits for part in divmod(value, 10)]
            targets[crop, row * side + col] = [1, COLOUR_IDS[thing.colour], KIND_IDS[thing.kind], *numbers]
    return torch.from_numpy(targets)


def tree_mask(branches: Tensor, is_visual: Tensor) -> Tensor:
    """Who may attend to whom: a branch to the pictures and itself, pictures to each other in both directions.

    Args:
        branches: (B, S) int64; 0 for the shared part, -1 for padding on the right.
        is_visual: (B, S) bool.
    Returns:
        (B, 1, S, S) bool; dim 2 is the query, dim 3 the key. Padding attends to padding, so no row is empty.
    """
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = branches[:, :, None] == branches[:, None, :]
    shared = (branches == 0)[:, None, :] & (branches > 0)[:, :, None]
    both_visual = is_visual[:, :, None] & is_visual[:, None, :]
    return ((causal & (same | shared)) | both_visual)[:, None]
