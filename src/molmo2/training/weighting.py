"""How much the tokens of an answer count in the loss."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LONG_VIDEO_CAPTION = "video_long_caption"
POINT_TAGS = ("<points", "<tracks", "<point ")


@dataclass(frozen=True)
class TokenWeighting:
    """Weights of the training recipe: long answers must not outweigh short ones.

    Every token of an answer, its closing token included, has the same weight. Source: the token weighting of Molmo2's
    training, as its technical report states it.

    Attributes:
        video_captions: Of answers in the style `video_long_caption`.
        pointing: Of answers in a style of pointing, and of answers in other styles that hold points or tracks.
        scale: All others get `scale / sqrt(number of tokens)`.
    """

    video_captions: float = 0.1
    pointing: float = 0.2
    scale: float = 4.0

    def weight(self, answer: str, style: str | None, num_tokens: int) -> float:
        """The weight of each token of an answer of so many tokens."""
        if style == LONG_VIDEO_CAPTION:
            return self.video_captions
        if is_pointing_style(style) or any(tag in answer for tag in POINT_TAGS):
            return self.pointing
        return self.scale / max(num_tokens, 1) ** 0.5


def is_pointing_style(style: str | None) -> bool:
    """Whether answers in this style are points or tracks; the names are those of `chat_template.jinja`."""
    return style is not None and "point" in style and "without_point" not in style


def style_of(message: Mapping[str, Any]) -> str | None:
    """What a message says about its style, itself or in one of its text parts."""
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
    messages: list[Mapping[str, Any]], answer_lengths: list[int], weighting: TokenWeighting | None
) -> list[float] | None:
    """The weight of each answer of a conversation; None where nothing asks for weights.

    Args:
        answer_lengths: Tokens of each message of the assistant.
        weighting: For answers whose message has no `loss_weight` of its own. None gives them 1.
    Raises:
        ValueError: For a `loss_weight` that is no number from 0 on, and a class in the place of a weighting.
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
            own = 1.0 if weighting is None else weighting.weight(text_of(message), style, length)
        if isinstance(own, str) or not 0 <= own < math.inf:
            raise ValueError(
                f"Message {number} has `loss_weight` {own!r}: use 0 for an answer that is not to be learnt, otherwise "
                "a finite number above it."
            )
        weights.append(float(own))
    return weights


def role_of(message: Mapping[str, Any]) -> str:
    """ "user", "assistant", ...

    Raises:
        ValueError: For a message without a role.
    """
    if message.get("role") is None:
        raise ValueError(
            f"A message with the keys {sorted(message)} has no `role`; expected {{'role': 'user' or 'assistant', "
            "'content': text or a list of parts}. Of LLaVA's `from` and `value` make such messages: human is the "
            "user, gpt the assistant."
        )
    return str(message["role"]).lower()


def is_answer(message: Mapping[str, Any]) -> bool:
    return role_of(message) == "assistant"
