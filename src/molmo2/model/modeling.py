"""Molmo2: a text model that reads images and videos. The path of one image:

pixels -> `vision_backbone` (vision transformer, pooling, projector) -> one vector per patch token -> added to the
embeddings of the prompt's patch tokens -> `transformer`, under a mask in which visual tokens see each other ->
`lm_head`.

Parameter names are those of the published checkpoints.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from molmo2.configuration import Molmo2Config
from molmo2.model.attention.mask import require_empty_cache, starts_sequence
from molmo2.model.compat import CACHE_NAME, takes_cache
from molmo2.model.embedding import Molmo2Embedding
from molmo2.model.generation import Molmo2GenerationMixin, can_copy_rows
from molmo2.model.loss import IGNORED, kept_label_fraction, shift_labels, weighted_loss
from molmo2.model.packing import packed_rows, require_packed_layout
from molmo2.model.pretrained import Molmo2PreTrainedModel
from molmo2.model.text import Molmo2TextModel
from molmo2.model.vision import Molmo2VisionBackbone, is_distributed_training, zero_vision_loss
from molmo2.model.vision_inputs import MEDIA_INPUTS, REPEAT_FACTOR, Molmo2VisionInputsMixin, refuse_unknown_inputs


@dataclass
class Molmo2ModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `Molmo2Model`, that of a text model and the vectors of images and videos.

    Attributes:
        last_hidden_state: (B, S, D).
        image_hidden_states: (T, D) vectors added to the patch tokens, in the order of the prompts; None without media.
    """

    image_hidden_states: Tensor | None = None


@dataclass
class Molmo2CausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `Molmo2ForConditionalGeneration`; see `Molmo2ModelOutputWithPast`.

    Attributes:
        loss: Scalar, when labels were given.
        logits: (B, kept positions, vocab_size).
    """

    image_hidden_states: Tensor | None = None


class Molmo2Model(Molmo2PreTrainedModel, Molmo2VisionInputsMixin):
    """Vision backbone and text model, without the output matrix."""

    def __init__(self, config: Molmo2Config):
        super().__init__(config)
        self.transformer = Molmo2TextModel(config.text_config)
        self.vision_backbone = Molmo2VisionBackbone(config.vit_config, config.adapter_config)
        self.post_init()

    def get_input_embeddings(self) -> Molmo2Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value  # type: ignore[assignment]

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        example_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Molmo2ModelOutputWithPast:
        """Read prompts with their images and videos.

        Args:
            input_ids: (B, S); or `inputs_embeds` (B, S, D), in which patch tokens are found by their embedding.
            attention_mask: (B, keys), 0 on padding, on either side.
            token_type_ids: (B, S), nonzero on visual tokens; found by id when missing or of another width.
                `mm_token_type_ids` is the name other processors use for it.
            example_ids: (B, S), one value for all tokens of a packed example; examples do not see each other, and
                positions restart. Their images and videos follow one another, row by row.
            branch_ids: (B, S), 0 for the prefix that all branches of an example share, 1, 2, ... for branches, which
                see this prefix and themselves and continue its positions. See `molmo2.model.packing`.
            kwargs: `MEDIA_INPUTS`. `pixel_values`, `image_token_pooling`, `image_grids`, `image_num_crops`: see
                `get_image_features`. `pixel_values_videos`, `video_token_pooling`, `video_grids`: see
                `get_video_features`. `image_features`, `video_features`: what these two return, or their vectors,
                (T, D), in the place of pixels and pooling indices; grids are needed where both come together.
        Raises:
            ValueError: Neither or both of ids and embeddings, media that do not fit the prompts or each other, or
                come behind cached tokens, patch tokens without media, an unknown argument that looks like one of
                these, a prompt longer than `max_position_embeddings`, or ids of examples and branches that fit no
                layout.
        """
        refuse_unknown_inputs(kwargs)
        inputs_embeds = self.transformer.embed(input_ids, inputs_embeds)
        is_visual = None
        if starts_sequence(inputs_embeds.shape[1], past_key_values):
            token_types = token_type_ids if token_type_ids is not None else mm_token_type_ids
            is_visual = self.resolve_visual_mask(token_types, input_ids, inputs_embeds)
        media = {name: kwargs.get(name) for name in MEDIA_INPUTS}
        if any(value is not None for value in media.values()):
            require_empty_cache(past_key_values, "Images and videos", "Pass text alone, or all in one pass")
        repeats = kwargs.get(REPEAT_FACTOR, 1)
        first_ids = None if input_ids is None else input_ids[::repeats]
        vectors = self._media_features(first_ids, inputs_embeds[::repeats], media, example_ids)
        if vectors is not None:
            inputs_embeds, has_visual = self._add_features(input_ids, inputs_embeds, vectors, repeats, is_visual)
        else:
            if not torch.compiler.is_compiling() and (inputs_embeds.shape[1] > 1 or past_key_values is None):
                has_types = token_type_ids is not None or mm_token_type_ids is not None
                is_prompt = past_key_values is not None or (attention_mask is not None and has_types)
                self._require_media(input_ids, inputs_embeds, is_prompt)
            has_visual = is_visual is not None and bool(is_visual.any())
            if is_distributed_training(self.vision_backbone):
                inputs_embeds = inputs_embeds + zero_vision_loss(self.vision_backbone).to(inputs_embeds)
        is_visual = is_visual if has_visual else None
        packed = packed_rows(attention_mask, example_ids, branch_ids, inputs_embeds.shape[:2])
        if packed is not None:
            require_empty_cache(
                past_key_values,
                "`example_ids` and `branch_ids`",
                "Run packed rows in one pass, without `past_key_values`; generate from unpacked prompts",
            )
            require_packed_layout(packed, is_visual)
        outputs = self.transformer(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=self._setting("output_attentions", output_attentions),
            output_hidden_states=self._setting("output_hidden_states", output_hidden_states),
            is_visual=is_visual,
            packed_rows=packed,
            cache_position=kwargs.get("cache_position"),
            return_dict=True,
        )
        return Molmo2ModelOutputWithPast(**outputs, image_hidden_states=vectors)


class Molmo2ForConditionalGeneration(Molmo2PreTrainedModel, Molmo2GenerationMixin):
    """Molmo2 with its output matrix: logits, loss and `generate`."""

    accepts_loss_kwargs = True
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}  # as transformers has it

    def __init__(self, config: Molmo2Config):
        super().__init__(config)
        self.model = Molmo2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> Molmo2TextModel:
        return self.model.transformer

    @property
    def vision_backbone(self) -> Molmo2VisionBackbone:
        return self.model.vision_backbone

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `Molmo2Model.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `Molmo2Model.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    def encode_frames(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Molmo2Model.encode_frames`."""
        return self.model.encode_frames(*args, **kwargs)

    def learnable_labels(self, labels: Tensor) -> Tensor:
        """(B, S) labels without visual tokens, which no answer contains, and ids past `vocab_size`, without logits."""
        is_lost = (labels >= self.config.text_config.vocab_size) | self.model.visual_token_mask(labels)
        return labels.masked_fill(is_lost, IGNORED)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_token_pooling: Tensor | None = None,
        image_grids: Tensor | None = None,
        image_num_crops: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_token_pooling: Tensor | None = None,
        video_grids: Tensor | None = None,
        image_features: Tensor | None = None,
        video_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        example_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Molmo2CausalLMOutputWithPast:
        """Logits, and the loss when labels are given. The other arguments are those of `Molmo2Model.forward`.

        Args:
            labels: (B, S) ids to predict, shifted inside; -100 and what `learnable_labels` drops are ignored, and
                `num_items_in_batch` shrinks by their share. First tokens of packed examples are not predicted; first
                tokens of branches must be -100.
            loss_weights: (B, S) weights of the labels at the same places; the loss is `sum(weight * cross entropy)`
                over their sum, or over `num_items_in_batch` where that is given (the sum over an accumulated step).
            logits_to_keep: Number of last positions (0: all), or a tensor of positions.
        Raises:
            ValueError: Labels together with `logits_to_keep`, a label at the start of a branch, negative weights, and
                whatever `Molmo2Model.forward` raises.
        """
        refuse_unknown_inputs(kwargs)
        passed_on = {name: kwargs.pop(name) for name in ("cache_position", REPEAT_FACTOR) if name in kwargs}
        rows = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "token_type_ids": token_type_ids,
            "mm_token_type_ids": mm_token_type_ids,
        }
        copies = 1
        makes_cache = use_cache if past_key_values is None else use_cache is not False
        if makes_cache and not self.get_decoder().drops_cache and can_copy_rows(past_key_values):
            copies = passed_on.pop(REPEAT_FACTOR, 1)
            # A tensor of one row holds for all rows.
            rows = {key: given if given is None or len(given) == 1 else given[::copies] for key, given in rows.items()}
        outputs = self.model(
            **rows,
            pixel_values=pixel_values,
            image_token_pooling=image_token_pooling,
            image_grids=image_grids,
            image_num_crops=image_num_crops,
            pixel_values_videos=pixel_values_videos,
            video_token_pooling=video_token_pooling,
            video_grids=video_grids,
            image_features=image_features,
            video_features=video_features,
            past_key_values=past_key_values,
            example_ids=example_ids,
            branch_ids=branch_ids,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **passed_on,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if copies > 1:
            getattr(outputs, CACHE_NAME).batch_repeat_interleave(copies)
            outputs.hidden_states, outputs.attentions = (
                states if states is None else tuple(state.repeat_interleave(copies, dim=0) for state in states)
                for states in (outputs.hidden_states, outputs.attentions)
            )
            logits = logits.repeat_interleave(copies, dim=0)
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"There are logits for {logits.shape[1]} positions and labels for {labels.shape[1]}: leave "
                    "`logits_to_keep` at 0 when passing labels."
                )
            targets = self.learnable_labels(labels)
            if kwargs.get("num_items_in_batch") is not None and loss_weights is None:
                kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * kept_label_fraction(targets, labels)
            packed = packed_rows(attention_mask, example_ids, branch_ids, targets.shape)
            if packed is not None or loss_weights is not None:
                kwargs["shift_labels"] = shift_labels(targets, packed)
            if loss_weights is None:
                loss = self.loss_function(logits=logits, labels=targets, vocab_size=logits.shape[-1], **kwargs)
            else:
                weights = nn.functional.pad(loss_weights[:, 1:], (0, 1))
                loss = weighted_loss(logits, kwargs["shift_labels"], weights, kwargs.get("num_items_in_batch"))
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Molmo2CausalLMOutputWithPast(loss=loss, logits=logits, **others)


__all__ = ["Molmo2ForConditionalGeneration", "Molmo2Model", "Molmo2PreTrainedModel", "Molmo2TextModel"]
