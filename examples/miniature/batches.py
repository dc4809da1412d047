"""Training batches: images and clips of the world as message trees.

A sequence contains the images once, followed by several question/answer branches. A branch attends to the images and
to itself, and its positions continue those of the images, so it equals a sequence of its own:

    images | question 1, answer 1 | question 2, answer 2 | ...
    branch 0 |          1           |          2           | ...

Pixels and tokens come from the processor's parts; tests compare them with whole processor calls.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

from molmo2.processing.prompt_tokens import IMAGE_PATCH

from .layout import CROP, PATCH, PATCHES
from .questions import Place, Question, ask_clip, ask_images, clip_key, image_number
from .world import COLOURS, KINDS, Clip, Thing, make_clip, make_image

MAX_CACHED = 4096  # texts whose tokens are cached
PROMPT_TAIL = 6  # tokens from the end token of a question to its answer
NO_TARGET = -1  # this patch has no target
EMPTY = 0
ROUNDING_WEIGHT = 0.2  # of the last digit of a coordinate, which is finer than the pixels
COORDINATE = re.compile(r"(?<= )\d{3,4}(?=[ \t\"])")
TRIPLE = re.compile(r"\d+ (\d{3,4} \d{3,4})(?=[ \t\"])")
COLOUR_IDS = {name: number for number, name in enumerate(COLOURS)}
KIND_IDS = {name: number for number, name in enumerate(KINDS)}


@dataclass(frozen=True)
class Mix:
    """The difficulty of the images of a batch."""

    max_things: int = 7
    tiled: float = 0.35
    images: int = 1  # of a set
    branches: int = 6


@dataclass
class Segment:
    """The images of a tree, or one question with its answer.

    `named` and `written` give, for some of its tokens, the image tokens that an attention head should attend to: for
    the end of a question every object that it asks about, for a token before a coordinate the object it belongs to.
    """

    ids: list[int]
    branch: int
    positions: range
    weights: list[float]
    named: dict[int, list[int]] = field(default_factory=dict)
    written: dict[int, list[int]] = field(default_factory=dict)


Trees = list[list[Segment]]


class BatchMaker:
    """A factory of batches, with a processor of the miniature."""

    def __init__(self, processor):
        self.processor = processor
        self.backend = processor.tokenizer.backend_tokenizer
        self.known: dict[str, Encoding] = {}  # few texts, many times
        (self.patch_id,) = self.encode(IMAGE_PATCH)

    def encode(self, text: str) -> list[int]:
        return self.encoding(text).ids

    def encoding(self, text: str) -> Encoding:
        if text not in self.known:
            if len(self.known) == MAX_CACHED:
                self.known.clear()
            self.known[text] = self.backend.encode(text, add_special_tokens=False)
        return self.known[text]

    def answer_weights(self, answer: str) -> tuple[list[int], list[float]]:
        """Tokens of an answer and their weights in the loss."""
        encoded = self.encoding(answer)
        light = {match.end() - 1 for match in COORDINATE.finditer(answer)}
        usual = 4 / (len(encoded.ids) + 1) ** 0.5  # the recipe's: one word counts more than a word among many
        weights = [usual * (ROUNDING_WEIGHT if end - 1 in light else 1.0) for _, end in encoded.offsets]
        return encoded.ids, weights

    def coordinates(self, question: Question) -> list[tuple[int, Place]]:
        """Tokens of an answer that write a coordinate, and the place it belongs to."""
        spans = [match.span(1) for match in TRIPLE.finditer(question.answer)]
        offsets = self.encoding(question.answer).offsets
        return [
            (number, place)
            for (first, last), place in zip(spans, question.places)
            for number, (start, end) in enumerate(offsets)
            if first - 1 <= start and end <= last
        ]

    def tree(
        self, opening: str, questions: Sequence[Question], patches: Mapping[tuple, int], pooling: np.ndarray
    ) -> list[Segment]:
        """One sequence: the images, then each question with its answer, the longest first.

        Args:
            patches: (key, number) of a object -> the patch of its centre.
            pooling: (tokens of these images, K) their patches.
        """
        ids = [self.processor.bos_token_id, *self.encode(opening)]
        shared = len(ids)
        slots = np.flatnonzero(np.array(ids) == self.patch_id)
        spots = {place: slots[(pooling == patch).any(1)].tolist() for place, patch in patches.items()}
        branches = []
        for question in questions:
            prompt = self.encode(f"<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer, weights = self.answer_weights(question.answer)
            own = [*prompt, *answer, self.processor.tokenizer.eos_token_id]
            meant = [spot for place in question.places for spot in spots.get((place.key, place.number), [])] or [0]
            last = len(prompt) - 1
            places = {last + offset: place for offset, place in self.coordinates(question)}
            written = {number: spots.get((place.key, place.number)) or [0] for number, place in places.items()}
            branches.append(
                Segment(
                    own,
                    len(branches) + 1,
                    range(shared, shared + len(own)),
                    [*[0.0] * len(prompt), *weights, max(weights)],
                    {len(prompt) - PROMPT_TAIL: meant},
                    {last: meant, **written},
                )
            )
        branches.sort(key=lambda branch: -len(branch.ids))
        return [Segment(ids, 0, range(shared), [0.0] * shared), *branches]

    def finish(self, trees: Trees) -> dict[str, Tensor]:
        """Trees as rows, padded so that the n-th longest branches of all of them start at one place.

        Returns:
            (B, S) `input_ids`, `branches`, `position_ids` and `weights`; (B, S, S) bool `named` and `written`;
            `slots`, where the images and the branches start, and S.
        """
        number = max(len(tree) for tree in trees)
        widths = [max(len(tree[index].ids) for tree in trees if index < len(tree)) for index in range(number)]
        slots = [0, *np.cumsum(widths).tolist()]
        shape = len(trees), slots[-1]
        ids = np.full(shape, self.processor.tokenizer.pad_token_id)
        branches, positions, weights = np.full(shape, -1), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        looks = {name: np.zeros((*shape, shape[1]), dtype=bool) for name in ("named", "written")}
        for row, tree in enumerate(trees):
            for start, segment in zip(slots, tree):
                own = row, slice(start, start + len(segment.ids))
                ids[own], branches[own] = segment.ids, segment.branch
                positions[own], weights[own] = segment.positions, segment.weights
                for name, wanted in looks.items():
                    for position, spots in getattr(segment, name).items():
                        wanted[row, start + position, spots] = True
        parts = {"input_ids": ids, "branches": branches, "position_ids": positions, "weights": weights, **looks}
        return {"slots": torch.tensor(slots), **{name: torch.from_numpy(part) for name, part in parts.items()}}

    def images(self, rng: np.random.Generator, number: int, mix: Mix) -> dict[str, Tensor]:
        """Message trees about single images or sets of images.

        Args:
            number: Number of trees.
        """
        trees, all_images, questions = [], [], []
        for _ in range(number):
            count = mix.images if mix.images == 1 else int(rng.integers(2, mix.images + 1))
            max_things = mix.max_things if count == 1 else min(4, mix.max_things)
            images = [make_image(rng, max_things=max_things, tiled=mix.tiled) for _ in range(count)]
            all_images.append(images)
            questions.append(ask_images(rng, images, mix.branches))
        flat = [image for images in all_images for image in images]
        tensors = self.processor.image_processor.preprocess([image.pixels for image in flat], return_tensors="pt")
        grids = iter(tensors["image_grids"].tolist())
        crops = tensors["image_num_crops"]
        first = (crops.cumsum(0) - crops).tolist()
        tables = iter(_per_image(tensors["image_token_pooling"], tensors["image_grids"], crops))
        for images, asked in zip(all_images, questions):
            texts = ["".join(self.processor.get_image_tokens(next(grids))) for _ in images]
            opening = texts[0] if len(texts) == 1 else "".join(f"Image {i}{text}" for i, text in enumerate(texts, 1))
            patches, pooling, shift = {}, [], 0
            for key, image in enumerate(images, start=1):
                table, size = next(tables)
                pooling.append(np.where(table < 0, NO_TARGET, table + shift))
                for number, thing in enumerate(image.things):
                    patches[key, image_number(key, number)] = shift + patch_of(thing)
                shift += size
            trees.append(self.tree(opening, asked, patches, np.concatenate(pooling)))
        seen = {crop: image.things for crop, image in zip(first, flat)}
        dense = dense_targets(len(tensors["pixel_values"]), seen)
        return {**self.finish(trees), **tensors, "dense": dense}

    def clips(self, rng: np.random.Generator, number: int, mix: Mix) -> dict[str, Tensor]:
        """Message trees about one clip each.

        Args:
            number: Number of trees.
        """
        trees, seen, frames, first = [], {}, [], 0
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
        sizes = tensors["video_grids"].prod(1).tolist()
        for clip, own, grid, table in zip(
            clips, indices, tensors["video_grids"].tolist(), tensors["video_token_pooling"].split(sizes)
        ):
            times = [index / 10 for index in own]
            patches = {
                (clip_key(time), number): offset * PATCHES + patch_of(thing)
                for offset, time in enumerate(times)
                for number, thing in clip.seen_at(time)
            }
            opening = self.processor.get_video_string(grid, times)
            trees.append(self.tree(opening, self._clip_questions(rng, clip, times, mix), patches, table.numpy()))
            for offset, time in enumerate(times):
                seen[first + offset] = [thing for _, thing in clip.seen_at(time)]
            first += len(own)
        return {**self.finish(trees), **tensors, "dense": dense_targets(first, seen)}

    def _clip_questions(self, rng: np.random.Generator, clip: Clip, times: list[float], mix: Mix) -> list[Question]:
        return ask_clip(rng, clip, times, max(2, mix.branches // 2))


def patch_of(thing: Thing) -> int:
    """The patch of a whole view that has the centre of a object."""
    side = CROP // PATCH
    col, row = (min(side - 1, max(0, int(side * place))) for place in (thing.x, thing.y))
    return row * side + col


def _per_image(pooling: Tensor, grids: Tensor, crops: Tensor) -> list[tuple[np.ndarray, int]]:
    """Pooling rows of each image, with patches counted from its first crop, and how many patches it has."""
    tokens = (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).tolist()
    return [(table.numpy(), PATCHES * size) for table, size in zip(pooling.split(tokens), crops.tolist())]


def dense_targets(num_crops: int, seen: dict[int, Sequence[Thing]]) -> Tensor:
    """Targets of the dense heads: the object at each patch.

    Args:
        seen: Things on the crops that show a whole image or frame.
    Returns:
        (C, P, 7) int64: `NO_TARGET`, `EMPTY` or 1 with colour, kind, two digits of x, two digits of y.
    """
    targets = np.zeros((num_crops, PATCHES, 7), dtype=np.int64)
    targets[:, :, 0] = NO_TARGET
    for crop, things in seen.items():
        targets[crop, :, 0] = EMPTY
        for thing in things:
            digits = [min(99, max(0, int(100 * place))) for place in (thing.x, thing.y)]
            numbers = [part for value in digits for part in divmod(value, 10)]
            targets[crop, patch_of(thing)] = [1, COLOUR_IDS[thing.colour], KIND_IDS[thing.kind], *numbers]
    return torch.from_numpy(targets)


def tree_mask(branches: Tensor, is_visual: Tensor) -> Tensor:
    """Attention mask: a branch attends to the images and itself, images attend to each other in both directions.

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
