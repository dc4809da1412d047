"""A model as harnesses of evaluation ask it: loaded by name, with the options that all of them take."""

from collections.abc import Sequence
from typing import Any

import torch

from molmo2.recipes.scoring import answer_conversations
from molmo2.registration import load

MAX_NEW_TOKENS = 1024  # where a task says nothing


class HarnessModel:
    """A model and its processor, with the classes of this package; no code of the checkpoint is executed.

    Args:
        pretrained: Folder or repository.
        device: "auto" is a GPU if there is one.
        dtype: Of the weights; "auto" is the one they are stored in.
        max_crops, num_frames, max_fps: Of the processor; those of a message's own parts come before them.
        system_prompt: For every conversation without one.
        options: `attn_implementation` and others of `molmo2.load`.
    Raises:
        OSError, TypeError, ValueError: The model cannot be loaded, or an option is unknown.
    """

    def __init__(
        self,
        pretrained: str,
        device: Any = "auto",
        dtype: str = "auto",
        *,
        max_crops: int | None = None,
        num_frames: int | None = None,
        max_fps: float | None = None,
        system_prompt: str | None = None,
        **options: Any,
    ):
        given = {"max_crops": max_crops, "num_frames": num_frames, "max_fps": max_fps}
        self.processor_kwargs = {name: value for name, value in given.items() if value is not None}
        self.system_prompt = system_prompt
        loaded: Any = load(pretrained, dtype=dtype, **options)
        self.model, self.processor = loaded
        if "device_map" not in options:
            target: Any = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            self.model.to(target)

    def answers(self, conversations: Sequence[list[dict[str, Any]]], **generate_options: Any) -> list[str]:
        """The answers to conversations, in one call of `generate`."""
        asked = [self._with_system_prompt(messages) for messages in conversations]
        return answer_conversations(self.model, self.processor, asked, self.processor_kwargs, **generate_options)

    def _with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}, *messages]


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate`: greedy unless a temperature or `do_sample` asks for samples, and a longest answer."""
    options = {name: value for name, value in given.items() if value is not None}
    options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    samples = options.setdefault("do_sample", options.get("temperature", 0) > 0)
    if not samples:
        for name in ("temperature", "top_k", "top_p"):
            options.pop(name, None)
    return options
