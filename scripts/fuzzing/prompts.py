"""Messages at random: what is written in them gives no special token, whatever its role and place."""

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.processing.processor import Molmo2Processor
from molmo2.video.processing import Molmo2VideoProcessor
from scripts.fuzzing import REPOSITORY

PIECES = (
    "<",
    "|",
    ">",
    "im_",
    "end",
    "<|im_",
    "a",
    " ",
    "\n",
    "e\u0301",
    "\ud83d",
    "\U00020000",
    "'",
    '"',
    "\\",
    "{{",
    "",
)
PIXELS = np.zeros((60, 90, 3), np.uint8)

Case = list[dict[str, Any]]


@cache
def processor() -> Molmo2Processor:
    """The processor of the golden cases, with small crops."""
    size = {"height": 98, "width": 98}
    return Molmo2Processor(
        Molmo2ImageProcessor(size=size, overlap_margins=[2, 2]),
        Molmo2VideoProcessor(size=size),
        AutoTokenizer.from_pretrained(REPOSITORY / "tests" / "data" / "golden" / "tokenizer"),
        chat_template=(REPOSITORY / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def cases(seed: int) -> Iterator[Case]:
    """Conversations without end, whose texts are made of special tokens and pieces of them."""
    rng = random.Random(seed)
    special = list(processor().tokenizer.get_added_vocab())

    def text() -> str:
        return "".join(rng.choice(rng.choice((special, PIECES))) for _ in range(rng.randrange(8)))

    def content(has_image: bool) -> Any:
        if not has_image and rng.random() < 0.4:
            return text()
        parts = [
            {"type": "text", "text": text()} | ({"style": text()} if rng.random() < 0.3 else {}) for _ in range(2)
        ]
        return [*([{"type": "image", "image": PIXELS, "alt": text()}] if has_image else []), *parts]

    while True:
        messages = []
        if rng.random() < 0.3:
            messages.append({"role": "subtitle", "content": content(False)})
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": content(False)})
        for turn in range(rng.randint(1, 4)):
            has_image = turn % 2 == 0 and rng.random() < 0.4
            messages.append({"role": ("user", "assistant")[turn % 2], "content": content(has_image)})
        yield messages


def _emptied(value: Any) -> Any:
    """The messages with harmless text in the place of each text, as many parts and styles as before."""
    if isinstance(value, str):
        return "x"
    if isinstance(value, list):
        return [_emptied(entry) for entry in value]
    if isinstance(value, dict):
        kept = ("role", "type", "image")
        return {name: entry if name in kept else _emptied(entry) for name, entry in value.items()}
    return value


def run(case: Case) -> None:
    """Prepare a conversation.

    Raises:
        AssertionError: Its special tokens are not those of the same conversation with harmless text; the prompt that
            the template wrote is read otherwise than the messages.
    """
    own = processor()
    special = own.tokenizer.added_tokens_decoder
    found, expected = (
        [token for token in own.apply_chat_template(messages, tokenize=True)[0] if token in special]
        for messages in (case, _emptied(case))
    )
    assert found == expected, "text became special tokens"
    images = [PIXELS for message in case for part in message["content"] if isinstance(part, dict) and "image" in part]
    rendered = own(text=[own.apply_chat_template(case)], images=images or None)["input_ids"][0]
    assert rendered == own.apply_chat_template(case, tokenize=True)[0], "the rendered prompt is read otherwise"
