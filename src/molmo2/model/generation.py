"""What `generate` needs to know about pictures: when they enter, and that they follow their own row."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator

from molmo2.model.attention.blockwise import TokenTables
from molmo2.model.attention.mask import (
    attention_implementation,
    cached_length,
    make_attention_mask,
    starts_sequence,
    takes_blocks,
)
from molmo2.model.cache import let_grow
from molmo2.model.prompt_lookup import LatestMatchLookup
from molmo2.model.vision_inputs import ENCODED_INPUTS

PICTURE_INPUTS = (*ENCODED_INPUTS["image"], *ENCODED_INPUTS["video"], "image_features", "video_features")


class BaseVocabularyProcessors(LogitsProcessorList):
    """Logits processors that are shown base-vocabulary ids only.

    Logits cover the base vocabulary, prompts also hold the ids of visual tokens above it, which penalties and n-gram
    bans would use as indices. They are shown as the last base id, a padding entry that no answer contains.
    """

    def __init__(self, processors: LogitsProcessorList, vocab_size: int):
        super().__init__(processors)
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return super().__call__(input_ids.clamp(max=self.vocab_size - 1), scores, **kwargs)


def _num_places(options: dict[str, Any]) -> int | None:
    """Tokens of a prompt, cached ones among them; recent releases leave out masks without padding."""
    described = (options.get(name) for name in ("attention_mask", "position_ids"))
    return next((entry.shape[-1] for entry in described if isinstance(entry, Tensor)), None)


def _behind_kept_cache(options: dict[str, Any], input_ids: Tensor, past_key_values: Cache | None) -> dict[str, Any]:
    """Decoding with candidates forgets, from 5.8 on, that a kept cache holds a part of the prompt already."""
    is_forgotten = options.get("is_first_iteration") and options.get("next_sequence_length", 0) is None
    if not is_forgotten or _num_places(options) != input_ids.shape[1]:
        return options
    num_new = input_ids.shape[1] - int(cached_length(past_key_values))
    return {**options, "next_sequence_length": num_new} if num_new > 0 else options


def _without_guesses(marks: Tensor, found: Tensor) -> Tensor:
    """Marks, (B, S), without those at the end that are on no visual token, as `found` by id.

    `generate` gives tokens that it writes or guesses the type of the last one, and that may be the end of a picture.
    """
    is_settled = ~marks | found
    reaches_on = is_settled.flip(-1).cumsum(-1).flip(-1) > 0  # here or further on something is settled
    return marks & reaches_on


class Molmo2GenerationMixin(GenerationMixin):
    """The hooks of `generate`; the model class supplies `self.model` and `self.config`."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Inputs of one forward pass: pictures and their token types only while nothing is cached."""
        packed = [name for name in ("example_ids", "branch_ids") if kwargs.get(name) is not None]
        if packed:
            raise ValueError(
                f"`generate` was given {' and '.join(packed)}, but an answer goes on from one prompt a row: pass "
                "every example, and every branch with its prefix, as a row of its own."
            )
        pictures = {name: kwargs.pop(name, None) for name in (*PICTURE_INPUTS, "picture_repeats")}
        if token_type_ids is None:
            token_type_ids = mm_token_type_ids
        is_prefill = past_key_values is None or bool(cached_length(past_key_values) == 0)
        if is_prefill:
            ids = input_ids if inputs_embeds is None else None
            is_visual = self.model.marked_as_visual(token_type_ids, ids, inputs_embeds)
            kwargs["token_type_ids"] = (
                is_visual if ids is None else _without_guesses(is_visual, self.model.is_visual(ids))
            )
        elif inputs_embeds is None:
            kwargs = _behind_kept_cache(kwargs, input_ids, past_key_values)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, *args, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if is_prefill:
            model_inputs["token_type_ids"] = kwargs["token_type_ids"]  # some releases shift or cut what they are given
            model_inputs.update({name: value for name, value in pictures.items() if value is not None})
        return model_inputs

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        input_embeds: Tensor | None = None,
        **kwargs,
    ) -> Any:
        """The mask of a step, made outside of the compiled forward pass (caches of fixed size).

        Long prefills, which are not compiled, keep the padding mask: the forward pass computes them in blocks.
        """
        embeds = input_embeds if inputs_embeds is None else inputs_embeds
        text_config = config.get_text_config()
        if token_type_ids is None:
            token_type_ids = mm_token_type_ids
        if token_type_ids is not None and not starts_sequence(embeds.shape[1], past_key_values):
            token_type_ids = None
        if cache_position is None:
            cache_position = torch.arange(embeds.shape[1], device=embeds.device) + cached_length(past_key_values)
        tables = TokenTables(is_visual=None if token_type_ids is None else token_type_ids.bool())
        implementation = attention_implementation(text_config, False, not tables.is_empty())
        if takes_blocks(implementation, embeds.shape[1]):
            return attention_mask
        return make_attention_mask(
            text_config, embeds, attention_mask, past_key_values, tables, implementation, cache_position
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args, **kwargs
    ) -> Any:
        done = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        let_grow(model_kwargs.get("past_key_values"))
        return done

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat every row `expand_size` times (beams, several answers); its pictures are still encoded once."""
        self._require_cached_pictures(input_ids, model_kwargs)
        pictures = {name: model_kwargs.pop(name, None) for name in PICTURE_INPUTS}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        pictures = {name: value for name, value in pictures.items() if value is not None}
        if pictures and expand_size > 1:
            pictures["picture_repeats"] = expand_size
        model_kwargs.update(pictures)
        return input_ids, model_kwargs

    def _require_cached_pictures(self, input_ids: Tensor | None, model_kwargs: dict[str, Any]) -> None:
        """A kept cache can be continued with text; pictures after it would be left out silently."""
        cache = model_kwargs.get("past_key_values")
        past_length = int(cached_length(cache)) if isinstance(cache, Cache) else 0
        if past_length == 0 or input_ids is None:
            return
        # Recent releases also take the new tokens alone.
        are_all_new = (_num_places(model_kwargs) or 0) > input_ids.shape[1]
        new_slots = int(self.model.is_patch(input_ids if are_all_new else input_ids[:, past_length:]).sum())
        if new_slots:
            raise ValueError(
                f"The prompt has {new_slots} patch token(s) after the {past_length} tokens that the cache holds, but "
                "pictures can only enter at the start of a sequence. Start without `past_key_values`."
            )

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        vocab_size = self.config.get_text_config().vocab_size
        if isinstance(kwargs.get("encoder_input_ids"), Tensor) and not kwargs["encoder_input_ids"].is_floating_point():
            kwargs["encoder_input_ids"] = kwargs["encoder_input_ids"].clamp(max=vocab_size - 1)
        processors = super()._get_logits_processor(*args, **kwargs)
        return BaseVocabularyProcessors(processors, vocab_size) if len(processors) else processors

    def _get_candidate_generator(self, *args, **kwargs) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)
        return LatestMatchLookup(generator) if isinstance(generator, PromptLookupCandidateGenerator) else generator
