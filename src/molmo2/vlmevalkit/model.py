"""The model as VLMEvalKit asks it: one message of images, videos and texts in, one answer out."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

from molmo2.recipes import harness

ROLES = ("system", "user", "assistant")


class Molmo2(BaseModel):
    """Molmo2 in VLMEvalKit, with the classes of this package; no code of the checkpoint is executed.

    Videos are passed whole. The runner asks one question at a time, so there are no batches.

    Args:
        pretrained: Folder or repository.
        max_new_tokens: Of an answer.
        options: Further ones of `molmo2.recipes.harness.HarnessModel`.
    Raises:
        OSError, TypeError, ValueError: The model cannot be loaded, or an option is unknown.
    """

    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(self, pretrained: str, max_new_tokens: int | None = None, **options: Any):
        super().__init__()
        self.generation = harness.generation_options({"max_new_tokens": max_new_tokens})
        self.asked = harness.HarnessModel(pretrained, **options)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to one message, greedily.

        Raises:
            ValueError: A role is unknown, or a part is neither text, image nor video.
        """
        (answer,) = self.asked.answers([messages_of(message)], **self.generation)
        return answer

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a conversation of several turns, each of them a role and parts.

        Raises:
            ValueError: A role is unknown, or a part is neither text, image nor video.
        """
        conversation = [
            {"role": checked_role(turn["role"]), "content": [message_part(part) for part in turn["content"]]}
            for turn in message
        ]
        (answer,) = self.asked.answers([conversation], **self.generation)
        return answer


def messages_of(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation of the parts: neighbours of one role are one message; a part without a role is the user's.

    Raises:
        ValueError: A role is unknown, or a part is neither text, image nor video.
    """
    messages: list[dict[str, Any]] = []
    for part in parts:
        role = checked_role(part.get("role") or "user")
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        messages[-1]["content"].append(message_part(part))
    return messages


def checked_role(role: str) -> str:
    """The role of a turn or part.

    Raises:
        ValueError: It is none of `ROLES`.
    """
    if role not in ROLES:
        raise ValueError(f"A turn has the role {role!r}; expected one of {', '.join(ROLES)}.")
    return role


def message_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message as our processor reads it; hints for the inputs of other models are left out.

    Raises:
        ValueError: It is neither text, image nor video.
    """
    kind = part["type"]
    if kind not in ("text", "image", "video"):
        raise ValueError(f"Molmo2 has no input for a part of type {kind!r}; it takes text, image and video.")
    return {"type": kind, kind: part["value"]}
