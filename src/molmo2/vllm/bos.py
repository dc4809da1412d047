"""The first token of prompts without images and videos, which vLLM does not pass through a model's processor."""

import functools
from typing import Any

from vllm.renderers.base import BaseRenderer

from molmo2.processing.prompt_tokens import insert_bos
from molmo2.vllm import ARCHITECTURE

MARK = "begins_molmo2_prompts"


def _begun(renderer: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with exactly one BOS in front, if the renderer is one of Molmo2; others as they are."""
    if renderer.model_config.architecture != ARCHITECTURE or prompt.get("multi_modal_data"):
        return prompt
    tokenizer = renderer.get_tokenizer()
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return {**prompt, "prompt_token_ids": insert_bos(list(prompt["prompt_token_ids"]), bos)}


def begin_prompts() -> None:
    """Let renderers of Molmo2 put BOS in front of prompts; a second call changes nothing."""
    for name in ("_process_tokens", "_process_tokens_async"):
        original = getattr(BaseRenderer, name)
        if not hasattr(original, MARK):
            setattr(BaseRenderer, name, _wrapped(original))


def _wrapped(original: Any) -> Any:
    @functools.wraps(original)
    def process(self: Any, prompt: dict[str, Any], **options: Any) -> Any:
        return original(self, _begun(self, prompt), **options)

    setattr(process, MARK, True)
    return process
