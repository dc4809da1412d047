"""The model as lmms-eval asks it: messages of tasks in, answers out, in batches."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from molmo2.recipes.scoring import answer_conversations
from molmo2.registration import load

GENERATION = ("do_sample", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p", "until")
MAX_NEW_TOKENS = 1024  # where a task says nothing
# What chat tasks add to a part for other models.
CLIP = ("start_time", "end_time")


class Molmo2(lmms):
    """Molmo2 in lmms-eval, with the classes of this package; no code of the checkpoint is executed.

    Args:
        pretrained: Folder or repository.
        device: "auto" is a GPU if there is one; under `accelerate launch` that of the process.
        dtype: Of the weights; "auto" is the one they are stored in.
        batch_size: Questions of one call of `generate`.
        max_crops, num_frames, max_fps: Of the processor; those of a task's own message parts come before them.
        system_prompt: For every conversation without one.
        options: `attn_implementation` and others of `molmo2.load`.
    Raises:
        OSError, TypeError, ValueError: The model cannot be loaded, or an option is unknown.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        *,
        max_crops: int | None = None,
        num_frames: int | None = None,
        max_fps: float | None = None,
        system_prompt: str | None = None,
        **options: Any,
    ):
        super().__init__()
        self.batch_size = _number_of_questions(batch_size)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self._world_size > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
        given = {"max_crops": max_crops, "num_frames": num_frames, "max_fps": max_fps}
        self.processor_kwargs = {name: value for name, value in given.items() if value is not None}
        self.system_prompt = system_prompt
        model, processor = load(pretrained, dtype=dtype, **options)
        self.model: Any = model
        self.processor: Any = processor
        if "device_map" not in options:
            self.model.to(self._device(device))

    @property
    def tokenizer(self) -> Any:
        """That of the processor."""
        return self.processor.tokenizer

    @property
    def device(self) -> Any:
        """That of the model; several processes exchange their numbers of questions there."""
        return self.model.device

    def _device(self, wanted: str) -> Any:
        if wanted != "auto":
            return wanted
        if self._world_size > 1:
            return self.accelerator.device
        return "cuda" if torch.cuda.is_available() else "cpu"

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
        messages = [
            {"role": message["role"], "content": [message_part(part) for part in message["content"]]}
            for message in doc_to_messages(self.task_dict[task][split][doc_id])
        ]
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        return messages

    def _answers(self, conversations: list[list[dict[str, Any]]], options: Mapping[str, Any]) -> list[str]:
        texts = answer_conversations(
            self.model, self.processor, conversations, self.processor_kwargs, **generation_options(options)
        )
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
    options = {name: given[name] for name in GENERATION if given.get(name) is not None and name != "until"}
    options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    samples = options.setdefault("do_sample", options.get("temperature", 0) > 0)
    if not samples:
        for name in ("temperature", "top_k", "top_p"):
            options.pop(name, None)
    return options


def cut_at(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first of these ends."""
    ends = [until] if isinstance(until, str) else list(until or [])
    places = [place for place in (text.find(end) for end in ends if end) if place >= 0]
    return text[: min(places, default=len(text))]
