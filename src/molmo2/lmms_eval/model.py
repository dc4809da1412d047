"""The model as lmms-eval asks it: messages of tasks in, answers out, in batches."""

import atexit
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from tqdm import tqdm

from molmo2.recipes import harness
from molmo2.training.collectives import leave_group

GENERATION = ("do_sample", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p", "until")
# What chat tasks add to a part for other models.
CLIP = ("start_time", "end_time")


class Molmo2(lmms):
    """Molmo2 in lmms-eval, with the classes of this package; no code of the checkpoint is executed.

    Args:
        pretrained: Folder or repository.
        device: "auto" is a GPU if there is one; under `accelerate launch` that of the process.
        batch_size: Questions of one call of `generate`.
        options: Further ones of `molmo2.recipes.harness.HarnessModel`.
    Raises:
        OSError, TypeError, ValueError: The model cannot be loaded, or an option is unknown.
    """

    is_simple = False

    def __init__(self, pretrained: str, device: str = "auto", batch_size: int | str = 1, **options: Any):
        super().__init__()
        self.batch_size = _number_of_questions(batch_size)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        target: Any = device
        if self._world_size > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            atexit.register(leave_group)  # which nobody else does
            target = self.accelerator.device if device == "auto" else device
        self.asked = harness.HarnessModel(pretrained, target, **options)
        self.model, self.processor = self.asked.model, self.asked.processor

    @property
    def tokenizer(self) -> Any:
        """That of the processor."""
        return self.processor.tokenizer

    @property
    def device(self) -> Any:
        """That of the model; several processes exchange their numbers of questions there."""
        return self.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests.

        Raises:
            ValueError: A message has a part that Molmo2 has no input for.
        """
        answers: list[str] = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="questions", disable=self.rank != 0)
        for places in _batches([request.args[2] for request in requests], self.batch_size):
            asked = [self._messages(requests[place].args) for place in places]
            options = requests[places[0]].args[2]
            for place, answer in zip(places, self._answers(asked, options)):
                answers[place] = answer
                self.cache_hook.add_partial("generate_until", (requests[place].args[0], options), answer)
            bar.update(len(places))
        bar.close()
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Raises: NotImplementedError: Always."""
        raise NotImplementedError("Tasks of several rounds are not supported: ask each round as a task of its own.")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Raises: NotImplementedError: Always."""
        raise NotImplementedError(
            "Tasks by log-likelihood are not supported. Use the task's variant with generated answers."
        )

    def _messages(self, arguments: Sequence[Any]) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = arguments
        return [
            {"role": message["role"], "content": [message_part(part) for part in message["content"]]}
            for message in doc_to_messages(self.task_dict[task][split][doc_id])
        ]

    def _answers(self, conversations: list[list[dict[str, Any]]], options: Mapping[str, Any]) -> list[str]:
        texts = self.asked.answers(conversations, **generation_options(options))
        return [cut_at(text, options.get("until")).strip() for text in texts]


def _number_of_questions(batch_size: int | str) -> int:
    number = int(batch_size) if str(batch_size).isdecimal() else 0
    if number < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number of 1 or more.")
    return number


def _batches(options: Sequence[Mapping[str, Any]], size: int) -> list[list[int]]:
    """Places of up to `size` requests with the same options of generation."""
    groups: dict[str, list[int]] = {}
    for place, given in enumerate(options):
        groups.setdefault(repr(sorted(given.items())), []).append(place)
    return [places[start : start + size] for places in groups.values() for start in range(0, len(places), size)]


def message_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message as our processor reads it.

    Tasks name media under `url`; times of a clip become `clip`, other keys stay.

    Raises:
        ValueError: It is neither text, image nor video.
    """
    kind = part["type"]
    if kind not in ("text", "image", "video"):
        raise ValueError(f"Molmo2 has no input for a part of type {kind!r}; it takes text, image and video.")
    if kind == "text":
        return dict(part)
    own = {name: value for name, value in part.items() if name not in ("url", *CLIP)}
    if "url" in part:
        own[kind] = part["url"]
    start, end = (part.get(name) for name in CLIP)
    if start is not None or end is not None:
        own["clip"] = (start or 0.0, end)
    return own


def generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate` for those of a task; greedy unless it samples."""
    unknown = sorted(set(given) - set(GENERATION))
    if unknown:
        warnings.warn(f"The task's generation_kwargs {', '.join(unknown)} are ignored.", stacklevel=2)
    return harness.generation_options({name: given.get(name) for name in GENERATION if name != "until"})


def cut_at(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first of these ends."""
    ends = [until] if isinstance(until, str) else list(until or [])
    places = [place for place in (text.find(end) for end in ends if end) if place >= 0]
    return text[: min(places, default=len(text))]
