"""The processor of the golden cases, and the texts it should produce.

Unit tests take `build_processor`, whose classes are the package's; golden tests take `generated_processor`, the same
from the generated files. Nothing may ask what class an object of the other kind is.
"""

import functools
from typing import Any

from transformers import AutoTokenizer

from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.processing.processor import Molmo2Processor
from molmo2.video.processing import Molmo2VideoProcessor
from support.generated import generated
from support.golden_cases import GOLDEN, default_settings
from support.paths import REPOSITORY

CHAT_TEMPLATE = REPOSITORY / "chat_template.jinja"


@functools.cache
def tokenizer() -> Any:
    """The tiny tokenizer, one for all tests of a process."""
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


def build_processor(settings: dict[str, Any]) -> Molmo2Processor:
    """The default processor of the cases with the constructor overrides that a case.json (or table row) names."""
    return _built(settings, Molmo2Processor, Molmo2ImageProcessor, Molmo2VideoProcessor)


def generated_processor(settings: dict[str, Any]) -> Any:
    """`build_processor` with the classes of the generated files."""
    return _built(
        settings,
        generated("processing_molmo2").Molmo2Processor,
        generated("image_processing_molmo2").Molmo2ImageProcessor,
        generated("video_processing_molmo2").Molmo2VideoProcessor,
    )


def _built(settings: dict[str, Any], processor: type, image_processor: type, video_processor: type) -> Any:
    tokenizer().padding_side = settings.get("padding_side", "left")
    return processor(
        image_processor=image_processor(
            **{**default_settings("preprocessor"), **settings.get("image_processor_init", {})}
        ),
        video_processor=video_processor(
            **{**default_settings("video_preprocessor"), **settings.get("video_processor_init", {})}
        ),
        tokenizer=tokenizer(),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        **{**default_settings("processor"), **settings.get("processor_init", {})},
    )


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def decode(ids: Any) -> str:
    return tokenizer().decode(ids, clean_up_tokenization_spaces=False)


def with_bos(text: str) -> list[int]:
    """One row of the prompt: the ids of the text, BOS in front if it is not there yet."""
    bos = tokenizer().bos_token_id
    ids = encode(text)
    return ids if ids[:1] == [bos] else [bos, *ids]


def corrected(text: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """A chat text of the original with two corrections.

    The stray blank in front of an assistant turn goes, and a finished last assistant turn is closed.
    """
    text = text.replace("<|im_end|>\n <|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant\n")
    if messages[-1]["role"].lower() != "assistant":
        return text
    if not add_generation_prompt:
        return text + "<|im_end|>"
    prompt = "<|im_start|>assistant\n"
    return text.removesuffix(prompt) + "<|im_end|>\n" + prompt
