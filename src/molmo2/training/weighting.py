"""Loss weights of answers: by message, by style and by length."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LONG_VIDEO_CAPTION = "video_long_caption"
POINT_TAGS = ("<points", "<tracks", "<point ")


@dataclass(frozen=True)
class TokenWeighting:
    """The loss weights of Molmo2's training, which keep long answers from dominating short ones.

    All tokens of an answer, its closing token included, have the same weight. There are two rules: `report()`, the
    default, is that of Molmo2's technical report; `released_trainer()` is what the released training code computes.

    Attributes:
        video_captions: Weight of answers in the style `video_long_caption`.
        pointing: Weight of answers in a pointing style, and of answers in other styles that contain points or tracks.
        scale: All other answers have the weight `scale / sqrt(number of tokens)`.
        divide_by_branches: This weight of other answers is divided by sqrt(number of branches of the message tree).
    """

    video_captions: float = 0.1
    pointing: float = 0.2
    scale: float = 4.0
    divide_by_branches: bool = False

    @classmethod
    def report(cls) -> "TokenWeighting":
        """The rule of the technical report: 0.1, 0.2, and 4 / sqrt(n)."""
        return cls()

    @classmethod
    def released_trainer(cls) -> "TokenWeighting":
        """The rule of the released training code: 0.1, 0.2, and 2 / sqrt(n) / sqrt(branches of the tree)."""
        return cls(scale=2.0, divide_by_branches=True)

    def weight(self, answer: str, style: str | None, num_tokens: int, num_branches: int = 1) -> float:
        """The weight of each token of an answer with `num_tokens` tokens, in a tree of `num_branches`."""
        if style == LONG_VIDEO_CAPTION:
            return self.video_captions
        if is_pointing_style(style) or any(tag in answer for tag in POINT_TAGS):
            return self.pointing
        divisor = max(num_tokens, 1) * (num_branches if self.divide_by_branches else 1)
        return self.scale / divisor**0.5


def is_pointing_style(style: str | None) -> bool:
    """Whether answers in this style are points or tracks; style names are those of `chat_template.jinja`."""
    return style is not None and "point" in style and "without_point" not in style


def style_of(message: Mapping[str, Any]) -> str | None:
    """The style that a message, or one of its text parts, states."""
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else []
    styles = [part.get("style") for part in [message, *parts] if isinstance(part, Mapping)]
    return next((style for style in styles if style), None)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) else content or []
    return " ".join(part if isinstance(part, str) else part.get("text") or "" for part in parts)


def message_weights(
    messages: list[Mapping[str, Any]],
    answer_lengths: list[int],
    weighting: TokenWeighting | None,
    num_branches: int = 1,
) -> list[float] | None:
    """The weight of each answer of a conversation; None if neither the messages nor `weighting` set any.

    Args:
        answer_lengths: Number of tokens of each assistant message.
        weighting: For answers whose message has no `loss_weight`. None gives them 1.
        num_branches: Of the message tree that the conversation is part of.
    Raises:
        ValueError: For a `loss_weight` that is not a finite number from 0, and for a class instead of an instance.
    """
    if isinstance(weighting, type):
        raise ValueError(f"`weighting` is the class {weighting.__name__}; pass an instance, {weighting.__name__}().")
    answers = [(number, message) for number, message in enumerate(messages) if is_answer(message)]
    if weighting is None and all(message.get("loss_weight") is None for _, message in answers):
        return None
    weights = []
    for (number, message), length in zip(answers, answer_lengths):
        own = message.get("loss_weight")
        if own is None:
            style = style_of(message) or (style_of(messages[number - 1]) if number else None)
            own = 1.0 if weighting is None else weighting.weight(text_of(message), style, length, num_branches)
        if isinstance(own, str) or not 0 <= own < math.inf:
            raise ValueError(
                f"Message {number} has `loss_weight` {own!r}: use 0 for an answer that is context only, otherwise "
                "a finite number above it."
            )
        weights.append(float(own))
    return weights


def role_of(message: Mapping[str, Any]) -> str:
    """The role of a message in lower case: "user", "assistant", ...

    Raises:
        ValueError: For a message without a role.
    """
    if message.get("role") is None:
        raise ValueError(
            f"A message with the keys {sorted(message)} has no `role`; expected {{'role': 'user' or 'assistant', "
            "'content': text or a list of parts}. Convert LLaVA's `from` and `value` to such messages: human is the "
            "user, gpt the assistant."
        )
    return str(message["role"]).lower()


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message is from the assistant."""
    return role_of(message) == "assistant"
