"""The hooks of `generate`: media enter with the prefill and follow their row; prompt lookup drafts from the ids."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator

from molmo2.model.attention.dispatch import attention_implementation, is_blockwise, make_attention_mask
from molmo2.model.attention.mask import AttentionSpec, cached_length, starts_sequence
from molmo2.model.cache import use_preallocated_layers
from molmo2.model.compat import CACHE_NAME, takes_cache
from molmo2.model.vision_inputs import MEDIA_INPUTS, REPEAT_FACTOR


class BaseVocabularyProcessors(LogitsProcessorList):
    """Logits processors that see ids of the base vocabulary only.

    Logits cover the base vocabulary; prompts also hold the ids of visual tokens above it, which penalties and n-gram
    bans would use as indices. These are replaced by the last base id, a padding entry that no answer contains.
    """

    def __init__(self, processors: LogitsProcessorList, vocab_size: int):
        super().__init__(processors)
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        shown: Any = input_ids.clamp(max=self.vocab_size - 1)
        return super().__call__(shown, scores, **kwargs)


def latest_continuation(ids: Tensor, max_ngram: int, max_tokens: int) -> Tensor:
    """What followed the latest earlier occurrence of the last tokens, taking as many of these as occur again.

    Args:
        ids: (S,) int64.
        max_ngram: Maximum number of last tokens to look for.
    Returns:
        (drafted,) int64, `max_tokens` at most; empty where not even the last token occurs again.
    """
    known = ids.numpy()  # in one thread: waiting for another one would take longer than the search
    ends, length = (known[:-1] == known[-1:]).nonzero()[0], 1  # where the last token occurs, then the last two, ...
    while len(ends) and length < max_ngram:
        longer = ends[ends >= length]
        longer = longer[known[longer - length] == known[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    is_found = len(ends) and max_ngram > 0
    return ids[ends[-1] + 1 :][: max(0, max_tokens)] if is_found else ids[:0]


class LatestMatchLookup(PromptLookupCandidateGenerator):
    """Prompt lookup that drafts what followed the *latest* occurrence of the last tokens.

    Tracks repeat themselves from frame to frame: the next place of an object is near its latest one, and most of its
    digits are the same. The search of transformers takes the first match, where the object was at the start.

    Args:
        lookup: The generator that transformers made of the generation config.
    """

    def __init__(self, lookup: PromptLookupCandidateGenerator):
        vars(self).update(vars(lookup))

    # Arguments and annotations of the method differ between releases.
    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore
        """(1, S) ids to (1, S + drafted) ids, drafted <= `num_output_tokens`, and None: there are no draft logits.

        A draft stops before the end of an answer and before visual tokens, which have no logits.
        """
        capacity = self.max_length - input_ids.shape[1] - 1  # the model adds a token of its own
        draft = latest_continuation(
            input_ids[0].cpu(), self.max_matching_ngram_size, min(self.num_output_tokens, capacity)
        ).tolist()
        ends = () if self.eos_token_id is None else torch.as_tensor(self.eos_token_id).flatten().tolist()
        vocab_size = float("inf") if self.vocab_size is None else self.vocab_size
        unusable = (place for place, token in enumerate(draft) if token in ends or token >= vocab_size)
        draft = draft[: next(unusable, None)]
        if not draft:
            return input_ids, None
        return torch.cat((input_ids, input_ids.new_tensor([draft])), dim=1), None


def _prompt_length(options: dict[str, Any]) -> int | None:
    """Tokens of a prompt, cached ones included; recent releases leave out masks without padding."""
    described = (options.get(name) for name in ("attention_mask", "position_ids"))
    return next((entry.shape[-1] for entry in described if isinstance(entry, Tensor)), None)


def _restore_next_sequence_length(
    options: dict[str, Any], input_ids: Tensor, past_key_values: Cache | None
) -> dict[str, Any]:
    """`options` with the number of tokens after a given cache, which assisted decoding ignores from 5.8 on."""
    is_missing = options.get("is_first_iteration") and options.get("next_sequence_length", 0) is None
    if not is_missing or _prompt_length(options) != input_ids.shape[1]:
        return options
    num_new = input_ids.shape[1] - int(cached_length(past_key_values))
    return {**options, "next_sequence_length": num_new} if num_new > 0 else options


def can_copy_rows(cache: Cache | None) -> bool:
    """Whether a cache is empty and grows by rows too, so that equal prompts can be read once and copied.

    None is the cache that the model makes itself: some releases leave that of the prefill to it.
    """
    return cache is None or (type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0)


class Molmo2GenerationMixin(GenerationMixin):
    """The hooks of `generate`; a base of `Molmo2ForConditionalGeneration`, which supplies the attributes."""

    model: Any
    config: Any

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one forward pass: media and their token types only while nothing is cached."""
        wants_cache = past_key_values is not None or kwargs.get("use_cache")  # transformers 5.0 lets the pass make it
        if wants_cache and self.model.transformer.drops_cache:
            raise ValueError(
                "`generate` in training mode under gradient checkpointing: passes keep no cache there, so that each "
                "new token would know nothing of the prompt. Call `model.eval()` first, or pass `use_cache=False`."
            )
        packed = [name for name in ("example_ids", "branch_ids") if kwargs.get(name) is not None]
        if packed:
            raise ValueError(
                f"`generate` was given {' and '.join(packed)}, but an answer continues one prompt per row: pass "
                "every example, and every branch with its prefix, as a row of its own."
            )
        media = {name: kwargs.pop(name, None) for name in (*MEDIA_INPUTS, REPEAT_FACTOR)}
        if token_type_ids is None:
            token_type_ids = mm_token_type_ids
        is_prefill = past_key_values is None or bool(cached_length(past_key_values) == 0)
        if is_prefill:
            ids = input_ids if inputs_embeds is None else None
            is_visual = self.model.resolve_visual_mask(token_type_ids, ids, inputs_embeds)
            # `generate` copies the type of the last prompt token, which may end an image, to what it writes or drafts.
            kwargs["token_type_ids"] = is_visual if ids is None else is_visual & self.model.visual_token_mask(ids)
        elif inputs_embeds is None:
            kwargs = _restore_next_sequence_length(kwargs, input_ids, past_key_values)
        library: Any = super()
        model_inputs = library.prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **{CACHE_NAME: past_key_values}, **kwargs
        )
        if is_prefill:
            model_inputs["token_type_ids"] = kwargs["token_type_ids"]  # some releases shift or cut what they are given
            model_inputs.update({name: value for name, value in media.items() if value is not None})
        return model_inputs

    @staticmethod
    @takes_cache
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        input_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The mask of a step, made outside of the compiled forward pass (caches of fixed size).

        Long prefills, which are not compiled, keep the padding mask: the forward pass computes them in blocks.
        """
        embeds: Any = input_embeds if inputs_embeds is None else inputs_embeds
        text_config = config.get_text_config()
        if cache_position is None:
            cache_position = torch.arange(embeds.shape[1], device=embeds.device) + cached_length(past_key_values)
        is_visual = None
        if token_type_ids is not None and starts_sequence(embeds.shape[1], past_key_values):
            is_visual = token_type_ids.bool()
        spec = AttentionSpec(is_visual=is_visual)
        implementation = attention_implementation(text_config, False, not spec.is_empty())
        if is_blockwise(implementation, embeds.shape[1]):
            return attention_mask
        return make_attention_mask(
            text_config, embeds, attention_mask, past_key_values, spec, implementation, cache_position
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        done = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore
        use_preallocated_layers(model_kwargs.get(CACHE_NAME))
        return done

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat every row `expand_size` times (beams, several answers); its prompt and media are still read once."""
        self._require_cached_media(input_ids, model_kwargs)
        media = {name: model_kwargs.pop(name, None) for name in MEDIA_INPUTS}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        media = {name: value for name, value in media.items() if value is not None}
        if expand_size > 1:
            media[REPEAT_FACTOR] = expand_size
        model_kwargs.update(media)
        return input_ids, model_kwargs

    def _require_cached_media(self, input_ids: Tensor | None, model_kwargs: dict[str, Any]) -> None:
        """Refuses media after the tokens of a given cache, which can be continued with text only."""
        cache = model_kwargs.get(CACHE_NAME)
        past_length = int(cached_length(cache)) if isinstance(cache, Cache) else 0
        if past_length == 0 or input_ids is None:
            return
        # Recent releases also take the new tokens alone.
        are_all_new = (_prompt_length(model_kwargs) or 0) > input_ids.shape[1]
        new_slots = int(self.model.patch_token_mask(input_ids if are_all_new else input_ids[:, past_length:]).sum())
        if new_slots:
            raise ValueError(
                f"The prompt has {new_slots} patch token(s) after the {past_length} tokens that the cache holds, but "
                "images and videos can only enter at the start of a sequence. Start without `past_key_values`."
            )

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        """The prefill from transformers 5.0 on."""
        self._require_media_in_one_chunk(input_ids, generation_config.prefill_chunk_size, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore

    def _prefill_chunking(self, input_ids: Tensor, generation_config: Any, **model_kwargs: Any) -> Any:
        """The prefill in chunks before transformers 5.0, which leaves the last token to the first step."""
        chunk_size = min(generation_config.prefill_chunk_size, input_ids.shape[1] - 1)
        self._require_media_in_one_chunk(input_ids, chunk_size, model_kwargs)
        return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)  # type: ignore

    def _require_media_in_one_chunk(
        self, input_ids: Tensor, chunk_size: int | None, model_kwargs: dict[str, Any]
    ) -> None:
        """Refuses a prefill in chunks whose first one does not hold all visual tokens, which see each other."""
        if chunk_size is None or int(cached_length(model_kwargs.get(CACHE_NAME))):
            return
        columns = self.model.visual_token_mask(input_ids).any(0).nonzero()[:, 0].tolist()
        if columns and columns[-1] >= chunk_size:
            raise ValueError(
                f"The first {chunk_size} tokens of the prompt would be read alone (`prefill_chunk_size`), but its "
                f"visual tokens end with token {columns[-1] + 1}, and see each other. Leave `prefill_chunk_size` at "
                "None."
            )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        vocab_size = self.config.get_text_config().vocab_size
        prompt, settings = kwargs.get("encoder_input_ids"), kwargs.get("generation_config")
        names = "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"
        if settings is not None and all(getattr(settings, name, None) in (None, 0, 1.0) for name in names):
            kwargs["encoder_input_ids"] = None  # looking for negative ids in it would be a wait for the device
        elif isinstance(prompt, Tensor) and not prompt.is_floating_point():
            kwargs["encoder_input_ids"] = prompt.clamp(max=vocab_size - 1)
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore
        return BaseVocabularyProcessors(processors, vocab_size) if len(processors) else processors

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore
        return LatestMatchLookup(generator) if isinstance(generator, PromptLookupCandidateGenerator) else generator
