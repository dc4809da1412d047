"""Settings of the engine without which the mask of the training cannot be kept."""

import logging
from dataclasses import replace
from typing import Any

from molmo2.vllm import SUPPORTED

logger = logging.getLogger("vllm.molmo2")  # vLLM shows what is below "vllm"

# Steps whose encoded images may be held at the same time: one that runs, one behind it, one being planned.
STEPS_IN_FLIGHT = 3


def broken_mask(vllm_config: Any) -> str | None:
    """Why the mask of the training cannot be computed, or None."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism: only the first stage knows which tokens are visual"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "prefill context parallelism: no process has the keys of a whole prompt"
    return None


def count_visual_tokens(model_config: Any) -> None:
    """Make the vocabulary of the engine that of the prompts, in place.

    Ids of visual tokens follow those that can be written. A penalty for repetitions counts the ids of the prompt, and
    one that lies past the vocabulary ends the engine.
    """
    text = model_config.hf_config.text_config
    counted = replace(model_config.model_arch_config, vocab_size=text.vocab_size + text.additional_vocab_size)
    model_config.model_arch_config = counted


class EngineSettings:
    """A prompt is computed in one step, and nothing of it is taken from another prompt.

    All visual tokens of a prompt see each other, also later ones. So keys of the first image of a prompt depend on
    its last image: they are of no use to another prompt, and wrong if the last image comes in a later step.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Called before; nothing to change."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Called while an engine's configuration is made; changes it in place."""
        count_visual_tokens(vllm_config.model_config)
        reason = broken_mask(vllm_config)
        if reason is not None:
            logger.warning(
                "molmo2.vllm: NO MASK OF THE TRAINING with %s. Visual tokens see earlier ones only, or those of their "
                "own image or frame: answers differ from those of transformers, those about sets of images and "
                "clips the most. Of 63 answers of a small model 33 and 49 stayed the same (docs/serving.md). "
                "--tensor-parallel-size and --data-parallel-size keep the mask.",
                reason,
            )
            return
        scheduler, longest = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
        changed = []
        if scheduler.enable_chunked_prefill:
            scheduler.enable_chunked_prefill = False
            changed.append("no chunked prefill")
        scheduler.long_prefill_token_threshold = 0
        if scheduler.max_num_batched_tokens < longest:
            scheduler.max_num_batched_tokens = longest
            changed.append(f"max_num_batched_tokens {longest}, the longest prompt")
        # Where no room is left to encode an image, vLLM would compute the prompt up to it.
        scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens
        scheduler.encoder_cache_size = STEPS_IN_FLIGHT * scheduler.max_num_batched_tokens
        if vllm_config.cache_config.enable_prefix_caching:
            vllm_config.cache_config.enable_prefix_caching = False
            changed.append("no prefix caching")
        if changed:
            logger.info("molmo2.vllm, for the mask of the training: %s.", "; ".join(changed))


class RefusedSettings(EngineSettings):
    """No engine under a version of vLLM that the plugin was not written for."""

    version = "of another version"

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Called while an engine's configuration is made.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"molmo2.vllm works with vLLM {' and '.join(SUPPORTED)}; this is vLLM {cls.version}. Install one of these "
            "(pip install 'molmo2-transformers[vllm]'), or set VLLM_PLUGINS=\"\" to serve with vLLM's own Molmo2, "
            "whose answers differ from those of transformers."
        )
