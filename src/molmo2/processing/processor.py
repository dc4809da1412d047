"""Molmo2's processor: text, images and videos in, model inputs out.

Images and videos are cut into crops by their own processors; each placeholder of a prompt is replaced by the tokens of
its image or video; each row gets one BOS, is truncated and padded. `apply_chat_template` does the same for messages
and the media that they name.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers.configuration_utils import PretrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from molmo2.grounding.parse import IMAGE, MULTI_IMAGE, Grounding, MediaInfo, media_info
from molmo2.image.limits import MediaLimits, checked_limits
from molmo2.image.processing import Molmo2ImageProcessor, Molmo2ImageProcessorKwargs
from molmo2.image.suffixes import IMAGE_SUFFIXES
from molmo2.media_features import MediaFeatures, ground_answers
from molmo2.processing.chat import find_media, is_batch, media_arguments, messages_of, option_of_call
from molmo2.processing.plain_text import (
    SURROGATE,
    RenderedPrompt,
    SpecialTokens,
    encode_plain,
    hide,
    split_pieces,
)
from molmo2.processing.prompt_tokens import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    VISUAL_TOKENS,
    ExpandedPrompt,
    VisualTokenFormat,
    expand,
    frame_tokens,
    image_tokens,
    insert_bos,
    pad,
    padded_length,
    require_placeholders,
    timed_grids,
    truncate,
    video_string,
)
from molmo2.video.processing import Molmo2VideoProcessor, Molmo2VideoProcessorKwargs, options_of_each

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor",
    "AutoVideoProcessor": "video_processing_molmo2.Molmo2VideoProcessor",
    "AutoProcessor": "processing_molmo2.Molmo2Processor",
}
TOKEN_FORMAT_OPTIONS = tuple(VisualTokenFormat.__dataclass_fields__)


class Molmo2TextKwargs(TextKwargs, total=False):
    """Options of the text side.

    Attributes:
        return_mm_token_type_ids: False leaves `token_type_ids` out.
        return_text_replacement_offsets: True adds `text_replacement_offsets`: for each prompt what its placeholders
            were replaced by, see `ExpandedPrompt`; `new_span` counts characters of the row, its BOS included.
        assistant_spans: For each prompt the (start, end) characters that the assistant wrote; adds `assistant_masks`.
        allow_special_tokens: Special tokens in the text of messages count as if the template had written them.
        split_special_tokens: Special tokens in prompts are text too, but for the placeholders of images and videos.
    """

    return_tensors: str | None
    return_mm_token_type_ids: bool | None
    return_text_replacement_offsets: bool | None
    assistant_spans: list[list[tuple[int, int]]] | None
    allow_special_tokens: bool | None
    split_special_tokens: bool | None


CALL_DEFAULTS: dict[str, dict[str, Any]] = {
    "text_kwargs": {"return_mm_token_type_ids": True},
    "images_kwargs": {},
    "videos_kwargs": {"return_metadata": False},
}


class Molmo2ProcessorKwargs(ProcessingKwargs, total=False):
    """Options of one call of the processor."""

    text_kwargs: Molmo2TextKwargs  # type: ignore[misc]  # the library narrows these fields in its own processors too
    images_kwargs: Molmo2ImageProcessorKwargs  # type: ignore[misc]
    videos_kwargs: Molmo2VideoProcessorKwargs  # type: ignore[misc]
    _defaults = CALL_DEFAULTS  # type: ignore[misc]


MAX_NAME = 255  # characters of a file name, on common systems
# Options that a tokenizer may bring along from its own construction, for every call.
TOKENIZER_DEFAULTS = ("add_special_tokens", "padding", "truncation", "max_length", "pad_to_multiple_of")
# Options of tokenizers without a meaning for rows with visual tokens.
UNUSED_TEXT_OPTIONS = {"text_pair", "text_target", "text_pair_target", "stride", "is_split_into_words"} | {
    f"return_{name}" for name in ("overflowing_tokens", "special_tokens_mask", "offsets_mapping", "length")
}
# As keyword arguments these apply to images alone, as in the original; for frames they stand in `videos_kwargs`.
IMAGE_ONLY_KWARGS = frozenset({"resample"})
# Options that choose which frames of a video are taken.
SAMPLING_OPTIONS = frozenset({"num_frames", "frame_sample_mode", "max_fps", "sampling_fps", "fps", "clip"})


class Molmo2Processor(ProcessorMixin):
    """Prepares text, images and videos for Molmo2.

    Args:
        image_processor, video_processor, tokenizer: The three parts, each a public attribute.
        chat_template: Jinja source; see `chat_template.jinja`.
        image_use_col_tokens .. use_low_res_token_for_global_crops: The tokens that this checkpoint writes images and
            videos with; see `molmo2.processing.prompt_tokens.VisualTokenFormat`.

    Unless the tokenizer's files state a padding side, it is set to the left, as generation needs. It is set on the
    tokenizer itself and not on a copy, so that `processor.tokenizer is tokenizer` holds and setting
    `tokenizer.padding_side` later has the usual effect. Nothing else about the tokenizer is changed.

    Raises:
        ValueError: The tokenizer lacks tokens of Molmo2; the message names them.
    """

    attributes = ["image_processor", "video_processor", "tokenizer"]
    optional_attributes: list[str] = []
    image_processor_class = "AutoImageProcessor"
    video_processor_class = "AutoVideoProcessor"
    tokenizer_class = "AutoTokenizer"
    valid_processor_kwargs = Molmo2ProcessorKwargs  # type: ignore[assignment]
    audio_tokenizer = None

    def __init__(
        self,
        image_processor: Any = None,
        video_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_use_col_tokens: bool = True,
        use_single_crop_col_tokens: bool | None = None,
        use_single_crop_start_token: bool = True,
        video_use_col_tokens: bool = False,
        use_frame_special_tokens: bool = True,
        use_low_res_token_for_global_crops: bool = False,
        **kwargs: Any,
    ):
        super().__init__(image_processor, video_processor, tokenizer)
        self.chat_template = tokenizer.chat_template if chat_template is None else chat_template
        self.image_use_col_tokens = image_use_col_tokens
        self.use_single_crop_col_tokens = use_single_crop_col_tokens
        self.use_single_crop_start_token = use_single_crop_start_token
        self.video_use_col_tokens = video_use_col_tokens
        self.use_frame_special_tokens = use_frame_special_tokens
        self.use_low_res_token_for_global_crops = use_low_res_token_for_global_crops
        _ = self.visual_token_format  # refuses values that are no flags
        self.image_token, self.video_token = IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
        needed = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, *VISUAL_TOKENS)
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in needed}  # `get_vocab` copies 150,000 entries
        # An unknown token has no id, or that of the unknown token.
        missing = [t for t in needed if ids[t] is None or tokenizer.convert_ids_to_tokens(ids[t]) != t]
        if missing:
            raise ValueError(
                f"The tokenizer lacks {missing}. Use that of a Molmo2 checkpoint, whose vocabulary ends with them."
            )
        self.image_token_id, self.video_token_id = ids[IMAGE_PLACEHOLDER], ids[VIDEO_PLACEHOLDER]
        self.image_token_ids: Any = [ids[token] for token in VISUAL_TOKENS]
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"

    @classmethod
    def get_attributes(cls) -> list[str]:
        return list(cls.attributes)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Type of any argument but None: without torchvision the library compares with a placeholder class."""
        if argument is None:
            raise ValueError(f"Molmo2Processor needs a `{argument_name}`; found None.")
        return type(argument)

    @property
    def limits(self) -> MediaLimits:
        """What is refused of images and videos, see `MediaLimits`; set for both. Never saved, nor read from files."""
        return self.image_processor.limits

    @limits.setter
    def limits(self, value: MediaLimits | None) -> None:
        self.image_processor.limits = self.video_processor.limits = checked_limits(value)

    @property
    def visual_token_format(self) -> VisualTokenFormat:
        """Which tokens this checkpoint writes images and videos with."""
        return VisualTokenFormat(**{name: getattr(self, name) for name in TOKEN_FORMAT_OPTIONS})

    @property
    def bos_token_id(self) -> int:
        """Id of the first token of every row: the tokenizer's BOS, else its EOS."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return eos if bos is None else bos

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "token_type_ids"]
        return [*names, *self.image_processor.model_input_names, *self.video_processor.model_input_names]

    def get_image_tokens(self, image_grid: Sequence[int]) -> list[str]:
        """Tokens of one image, given its row of `image_grids`; see `molmo2.processing.prompt_tokens.image_tokens`."""
        return image_tokens(image_grid, self.visual_token_format)

    # The hooks of transformers 5, from the outputs of image and video processor.

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Text that one `<|image|>` is replaced by; `image_inputs` hold `image_grids`."""
        return "".join(self.get_image_tokens(image_inputs["image_grids"][image_idx]))

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Text that one `<|video|>` is replaced by; `video_inputs` hold `video_grids` and `video_metadata`."""
        videos = timed_grids(np.asarray(video_inputs["video_grids"]).tolist(), video_inputs["video_metadata"])
        return self.get_video_string(*videos[video_idx])

    def get_video_string(self, video_grid: Sequence[Any], timestamps: Sequence[float]) -> str:
        """Text of one video, given its rows of `video_grids`; see `molmo2.processing.prompt_tokens.video_string`."""
        return video_string(video_grid, timestamps, self.visual_token_format)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        **kwargs: Unpack[Molmo2ProcessorKwargs],
    ) -> BatchFeature:
        """Prepare prompts with their images and videos.

        Args:
            images: One image, a flat list for all prompts in order, or one list per prompt. A path, a URL, bytes, a
                PIL image or an array; see `Molmo2ImageProcessor`.
            text: One prompt or a list, with one `<|image|>` or `<|video|>` for each image and video. Without text,
                only the inputs of the images and videos are returned.
            videos: Likewise; a file, URL, bytes, or frames with `video_metadata`; see `Molmo2VideoProcessor`.
            kwargs: Options of the tokenizer (padding, truncation, max_length, padding_side, ...), of the image
                processor (max_crops, ...) and of the video processor (num_frames, max_fps, clip, ...), and
                `return_tensors`.
                `per_video_options`: for each video a dictionary of video options for this one.
        Returns:
            `input_ids`, `attention_mask` (B, S) int64; `token_type_ids` (B, S) bool, True on visual tokens (left out
            under `return_mm_token_type_ids=False`); the outputs of the two processors; with `return_metadata=True` the
            list `video_metadata`. The attribute `media` describes the images and videos of each row (sizes, sampled
            frames), for `post_process_grounding`.
        Raises:
            ValueError: The placeholders do not match the images and videos; truncation would cut visual tokens; rows
                of different lengths would become a tensor without padding; there is no input at all; audio.
        """
        if kwargs.pop("audio", None) is not None:  # no argument of its own: the library would list it as an input
            raise ValueError(
                "Molmo2 has no audio input: `audio` must be None. Speech can be passed as text (role `subtitle`)."
            )
        if _is_text(images) and not _is_text(text) and not _are_references(images):
            images, text = text, images  # called with the text first
        if images is None and text is None and videos is None:
            raise ValueError("Nothing to process: pass `text`, and `images` or `videos` with it.")
        own_options = kwargs.pop("per_video_options", None)
        options = self.sort_options(kwargs)
        own_options = option_of_call("per_video_options", own_options, options["videos_kwargs"])
        return_tensors = options["text_kwargs"].get("return_tensors")
        prompts, stand_ins = (None, []) if text is None else self._hidden(_as_prompts(text), options["text_kwargs"])

        media: dict[str, Any] = {}
        sizes: list[MediaInfo] = []
        metadata = None
        if images is not None:
            outputs = self.image_processor.preprocess(images, **{**options["images_kwargs"], "return_tensors": None})
            if prompts is not None:
                require_placeholders(prompts, IMAGE_PLACEHOLDER, len(outputs["image_grids"]), images)
            sizes = outputs.media
            media.update(outputs if len(outputs["image_grids"]) else {})
        if videos is not None:
            given = {**options["videos_kwargs"], "return_tensors": None, "return_metadata": True}
            outputs = self.video_processor.preprocess(videos, per_video_options=own_options, **given)
            metadata = outputs.pop("video_metadata")
            if prompts is not None:
                require_placeholders(prompts, VIDEO_PLACEHOLDER, len(metadata), videos)
            media.update(outputs if metadata else {})
        data = dict(media)
        if prompts is not None:
            videos = timed_grids(media.get("video_grids", []), metadata or [])
            expanded = self._expand(prompts, media.get("image_grids", []), videos)
            data = {**self._tokenize(expanded, stand_ins, options["text_kwargs"]), **media}
        offsets = data.pop("text_replacement_offsets", None)
        features = MediaFeatures(data, return_tensors, _media_of_rows(prompts, sizes, metadata or []))
        if metadata is not None and options["videos_kwargs"].get("return_metadata"):
            features["video_metadata"] = metadata
        if offsets is not None:
            features["text_replacement_offsets"] = offsets
        return features

    @staticmethod
    def sort_options(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Options of a call by modality: nested ones as they are, flat ones wherever they are known.

        Not the library's merge, because that differs between releases and recent ones refuse unknown options.

        Raises:
            ValueError: An option is given flat and nested; the message names both places.
        """
        sections = {name: dict(values) for name, values in CALL_DEFAULTS.items()}
        common = dict(kwargs.get("common_kwargs") or {})
        flat = {name: value for name, value in kwargs.items() if name not in sections and name != "common_kwargs"}
        unknown = set(flat)
        for name in sections:
            known = Molmo2ProcessorKwargs.__annotations__[name].__annotations__
            nested = dict(kwargs.get(name) or {})
            elsewhere = IMAGE_ONLY_KWARGS if name == "videos_kwargs" else frozenset()
            own = {option: flat[option] for option in flat if option in known and option not in elsewhere}
            twice = sorted(set(own) & set(nested))
            if twice:
                raise ValueError(f"{twice} given twice: in `{name}` and as a keyword argument. Keep one of them.")
            unknown -= set(own)
            sections[name].update({**common, **own, **nested})
        for option in sorted(UNUSED_TEXT_OPTIONS & {name for name, value in sections["text_kwargs"].items() if value}):
            logger.warning_once(f"Molmo2Processor has no use for the option {option!r}; it changes nothing.")
        for option in sorted(unknown):
            logger.warning_once(f"Molmo2Processor ignores the unknown option {option!r}.")
        return sections

    def _expand(
        self, prompts: list[str], image_grids: Sequence[Any], videos: Sequence[tuple[Any, Sequence[float]]]
    ) -> list[ExpandedPrompt]:
        token_format = self.visual_token_format
        image_texts = ["".join(image_tokens(grid, token_format)) for grid in image_grids]
        video_texts = [video_string(grids, times, token_format) for grids, times in videos]
        texts = {IMAGE_PLACEHOLDER: image_texts, VIDEO_PLACEHOLDER: video_texts}
        for placeholder, own in texts.items():
            require_placeholders(prompts, placeholder, len(own))
        waiting = {placeholder: iter(own) for placeholder, own in texts.items()}
        return [expand(prompt, waiting) for prompt in prompts]

    @property
    def _special_tokens(self) -> SpecialTokens:
        return SpecialTokens.from_tokenizer(self.tokenizer, (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, *VISUAL_TOKENS))

    def _hidden(self, prompts: list[str], options: dict[str, Any]) -> tuple[list[str], list[Mapping[str, str]]]:
        """The prompts with stand-ins for special tokens that are mere text, and what these stand for."""
        texts: list[str] = []
        stand_ins: list[Mapping[str, str]] = []
        split = options.get("split_special_tokens")
        split = getattr(self.tokenizer, "split_special_tokens", False) if split is None else split
        for prompt in prompts:
            text: str = str(prompt)
            own: Mapping[str, str] = {}
            if isinstance(prompt, RenderedPrompt):
                if not options.get("allow_special_tokens"):
                    text, own = prompt.hidden, prompt.stand_ins
            elif split:
                text, own = hide(text, self._special_tokens, kept=frozenset({IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER}))
            texts.append(text)
            stand_ins.append(own)
        return texts, stand_ins

    def _encode(self, texts: list[str], with_offsets: bool, add_special_tokens: bool) -> tuple[list[Any], list[Any]]:
        """Ids, and on request the (start, end) characters of each."""
        encoded = self.tokenizer(
            [SURROGATE.sub("\ufffd", text) for text in texts],
            add_special_tokens=add_special_tokens,
            split_special_tokens=False,  # the visual tokens must not be
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=with_offsets,
        )
        return encoded["input_ids"], encoded["offset_mapping"] if with_offsets else []

    def _encode_around_text(
        self, text: str, stand_ins: Mapping[str, str], with_offsets: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """`_encode` for one prompt with stand-ins, whose text is encoded as if no token were special."""
        row: list[int] = []
        places: list[tuple[int, int]] = []
        done = 0
        for piece, is_text in split_pieces(text, stand_ins, self._special_tokens):
            if is_text:
                ids, offsets = encode_plain(self.tokenizer, SURROGATE.sub("\ufffd", piece))
            else:
                (ids,), rows = self._encode([piece], with_offsets, add_special_tokens=False)
                offsets = rows[0] if with_offsets else []
            row += ids
            places += [(start + done, end + done) for start, end in offsets]
            done += len(piece)
        return row, places

    def _tokenize(
        self, prompts: list[ExpandedPrompt], stand_ins: list[Mapping[str, str]], options: dict[str, Any]
    ) -> dict[str, Any]:
        defaults = self.tokenizer.init_kwargs
        options = {**{name: defaults[name] for name in TOKENIZER_DEFAULTS if name in defaults}, **options}
        spans = options.get("assistant_spans")
        with_offsets = spans is not None
        texts = [prompt.text for prompt in prompts]
        ids, offsets = self._encode(
            ["" if own else text for text, own in zip(texts, stand_ins)],
            with_offsets,
            options.get("add_special_tokens", True),
        )
        for index, own in enumerate(stand_ins):
            if own:
                ids[index], places = self._encode_around_text(texts[index], own, with_offsets)
                offsets[index : index + 1] = [places] if with_offsets else []
        rows = [insert_bos(list(own), self.bos_token_id) for own in ids]
        masks = None
        if spans is not None:
            masks = [
                _assistant_mask(prompt, own, places, len(row))
                for prompt, own, places, row in zip(prompts, spans, offsets, rows)
            ]
        visual = frozenset(self.image_token_ids)
        max_length, side = options.get("max_length"), self.tokenizer.truncation_side
        truncation = getattr(options.get("truncation"), "value", options.get("truncation"))
        if truncation not in (None, False, "do_not_truncate"):
            max_length = self.tokenizer.model_max_length if max_length is None else max_length
            masks = masks and [truncate(mask, max_length, side, frozenset()) for mask in masks]
            rows = [truncate(row, max_length, side, visual) for row in rows]

        lengths = [len(row) for row in rows]
        target = padded_length(lengths, options.get("padding"), max_length, options.get("pad_to_multiple_of"))
        if not target and options.get("return_tensors") is not None and len(set(lengths)) > 1:
            raise ValueError(
                f"The prompts have {lengths} tokens, which make no tensor. Pass `padding=True`, or leave "
                "`return_tensors` out to get lists."
            )
        padding_side = options.get("padding_side")
        padding_side = self.tokenizer.padding_side if padding_side is None else padding_side

        def padded(values: list[list[int]], filler: int) -> list[list[int]]:
            return [pad(row, target, filler, padding_side) for row in values] if target else values

        outputs: dict[str, Any] = {
            "input_ids": padded(rows, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * length for length in lengths], 0),
        }
        if options.get("return_mm_token_type_ids"):
            outputs["token_type_ids"] = [[token in visual for token in row] for row in outputs["input_ids"]]
        if masks is not None:
            outputs["assistant_masks"] = padded(masks, 0)
        if options.get("return_text_replacement_offsets"):
            bos = self.tokenizer.convert_ids_to_tokens(self.bos_token_id)
            added = [len(bos) * (list(own)[:1] != [self.bos_token_id]) for own in ids]
            outputs["text_replacement_offsets"] = [
                [{**one, "new_span": tuple(place + shift for place in one["new_span"])} for one in prompt.replacements]
                for prompt, shift in zip(prompts, added)
            ]
        return outputs

    def apply_chat_template(  # type: ignore[override]  # the library's types name its own messages
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write messages as a prompt and, with `tokenize=True`, prepare it with the images and videos that it names.

        Args:
            conversation: Messages `{"role", "content"}`, or a list of conversations. Content is text or a list of
                parts: `{"type": "text", "text"}`, `{"type": "image", "image": ...}` (also `url`, `path`, `base64`,
                `image_url`), `{"type": "video", "video": ...}` (also `url`, `path`, `video_url`), which may carry
                `clip`, `num_frames`, `max_fps`, `frame_sample_mode`, `sampling_fps`, `timestamps`, `video_metadata`.
            return_assistant_tokens_mask: With `tokenize` and `return_dict`, add `assistant_masks` (B, S): 1 on the
                tokens of the assistant, the closing token included.
            processor_kwargs, kwargs: Options of `__call__`; `kwargs` are passed to the template too. Special tokens in
                the text of messages are encoded as text, unless `allow_special_tokens=True`.
        Returns:
            The prompt, a list of prompts for a batch; with `tokenize` the ids, with `return_dict` too a BatchFeature.
            A prompt remembers which special tokens in it are text; `__call__` reads that, no other tokenizer does.
        Raises:
            ValueError: A missing template, or one that does not read `tools`; with `tokenize` a part that is no text,
                image or video, or one without its source, and whatever `__call__` raises.
            jinja2.TemplateError: Roles out of order, an empty conversation.
        """
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("`return_assistant_tokens_mask` needs `tokenize=True` and `return_dict=True`.")
        batched = is_batch(conversation)
        conversations = list(conversation) if batched else [conversation]
        prompts, spans = self.render_conversations(
            conversations,
            chat_template,
            tools=tools,
            documents=documents,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **kwargs,
        )
        if not tokenize:
            is_plain = kwargs.get("allow_special_tokens")
            written = [str(prompt) if is_plain or not prompt.stand_ins else prompt for prompt in prompts]
            return written if batched else written[0]
        options = {**kwargs, **(processor_kwargs or {})}
        if return_tensors not in (None, "auto"):
            options["return_tensors"] = return_tensors
        if return_assistant_tokens_mask:
            options["assistant_spans"] = spans
        features = self(text=[*prompts], **media_arguments([find_media(own) for own in conversations], options))
        return features if return_dict else features["input_ids"]

    def render_conversations(
        self, conversations: list[Any], chat_template: str | None = None, **options: Any
    ) -> tuple[list[RenderedPrompt], list[list[tuple[int, int]]]]:
        """Write conversations as prompts with placeholders; the first step of `apply_chat_template`.

        Args:
            options: `add_generation_prompt`, `return_assistant_tokens_mask`, ... and variables of the template.
        Returns:
            The prompts, which remember the special tokens that are text of a message; for each, under
            `return_assistant_tokens_mask`, the (start, end) characters that the assistant wrote, as `encode_prompts`
            takes them.
        Raises:
            ValueError: There is no template, or none that reads `tools` or `documents`.
        """
        template = self.chat_template if chat_template is None else chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            raise ValueError(
                "The processor has no chat template. Put `chat_template.jinja` beside its files, or pass one."
            )
        unread = [name for name in ("tools", "documents") if options.get(name) and not re.search(name, template)]
        if unread:
            raise ValueError(
                f"`{unread[0]}` was given, but the chat template has no place for it. Write it into the system "
                "message, or pass a `chat_template` that reads it."
            )
        messages: list[Any] = [messages_of(conversation) for conversation in conversations]
        written = (messages, options.get("tools"), options.get("documents"))
        (messages, options["tools"], options["documents"]), stand_ins = hide(written, self._special_tokens, template)
        rendered: Any = render_jinja_template(  # whose annotation is wrong
            messages, chat_template=template, **{**self.tokenizer.special_tokens_map, **options}
        )
        prompts, spans = rendered
        return [RenderedPrompt(prompt, stand_ins) for prompt in prompts], spans

    def encode_prompts(
        self,
        prompts: list[str],
        image_grids: Sequence[Any] = (),
        videos: Sequence[tuple[Any, Sequence[float]]] = (),
        *,
        assistant_spans: list[list[tuple[int, int]]] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Expand and tokenize prompts whose images and videos are planned or processed already.

        Args:
            prompts: With one placeholder for each image and video.
            image_grids: A row of `image_grids` for each image of all prompts.
            videos: Rows of `video_grids` and times in seconds for each video; see
                `molmo2.processing.prompt_tokens.timed_grids`.
            assistant_spans: For each prompt the (start, end) characters that the assistant wrote; adds
                `assistant_masks`.
            options: Of the tokenizer, and `return_tensors`.
        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` and `assistant_masks`, as the call would give them.
        """
        options = {**CALL_DEFAULTS["text_kwargs"], **options, "assistant_spans": assistant_spans}
        texts, stand_ins = self._hidden(prompts, options)
        data = self._tokenize(self._expand(texts, image_grids, videos), stand_ins, options)
        return BatchFeature(data, tensor_type=options.get("return_tensors"))

    def post_process_grounding(
        self, answers: Any, media: Any = None, *, kind: str | None = None
    ) -> Grounding | list[Grounding]:
        """Read points, tracks and counts from answers.

        Args:
            answers: One answer, as a string or token ids (list, array or tensor), or a batch of them. Special tokens
                and negative ids, with which labels are padded, are dropped; so is the prompt at the beginning of ids,
                if `media` is the processor's output.
            media: The images and videos that the answers are about. One of
                the inputs that the answers were generated from (several answers per row, as by `num_return_sequences`,
                follow each other);
                sizes: (width, height), a list of them for the images of one answer, one of either per answer for a
                batch;
                the metadata of the video (`SampledVideoMetadata`, `VideoMetadata`, a dictionary), one per answer for a
                batch;
                None, which gives fractions of width and height instead of pixels.
            kind: "image", "multi_image" or "video", if `media` are sizes.
        Returns:
            A `molmo2.grounding.Grounding`, or a list of them for a batch. No answer makes reading fail. In a
            prompt with images beside a video, keys with a decimal point and tracks refer to the video, whole numbers
            to the images. With several videos times are read against the first; for another one pass
            `inputs.media[row].more_videos[...]`.
        Raises:
            TypeError, ValueError: `answers` or `media` are of another kind, or there are not as many.
        """
        return ground_answers(answers, media, kind, self.tokenizer)

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[tuple[int, int]] | None = None,
        video_sizes: list[tuple[int, int, int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Numbers of visual tokens for images and videos of these sizes, by the same plans as in the call.

        Args:
            image_sizes: (height, width) of each image, in pixels.
            video_sizes: (frames, height, width) of each video after sampling; timestamps are text.
            kwargs: Options of the call, such as `max_crops`, `pooling_size` or `per_video_options`.
        Returns:
            `num_image_tokens`, `num_image_patches` (crops) and `num_video_tokens`, one number for each.
        Raises:
            ValueError: An option chooses the frames of videos, whose number is given here; an option is invalid.
        """
        own_options = kwargs.pop("per_video_options", None)
        options = self.sort_options(kwargs)
        own_options = option_of_call("per_video_options", own_options, options["videos_kwargs"])
        token_format = self.visual_token_format
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            planned = options["images_kwargs"]
            images = [self.image_processor.plan(height, width, **planned) for height, width in image_sizes]
            counts["num_image_tokens"] = [len(image_tokens(image.grid, token_format)) for image in images]
            counts["num_image_patches"] = [image.num_crops for image in images]
        if video_sizes is not None:
            given, own_options = options["videos_kwargs"], options_of_each(own_options, len(video_sizes))
            sampling = sorted({name for own in (given, *own_options) for name in own} & SAMPLING_OPTIONS)
            if sampling:
                raise ValueError(
                    f"{sampling} cannot be applied to `video_sizes`, which count the frames after sampling. Leave "
                    "them out, and pass the numbers of frames that they give."
                )
            videos = [
                self.video_processor.plan(frames, **{**given, **own})
                for (frames, *_), own in zip(video_sizes, own_options)
            ]
            counts["num_video_tokens"] = [
                sum(frames * len(frame_tokens(rows, cols, token_format)) for frames, rows, cols in video.grids)
                for video in videos
            ]
        return MultiModalData(**counts)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Image processor, video processor and tokenizer; the library's own lookup needs torchvision."""
        kwargs = {
            name: value for name, value in kwargs.items() if name not in ("use_fast", "_from_auto", "code_revision")
        }
        tokenizer = _load_tokenizer(pretrained_model_name_or_path, kwargs)
        kwargs.pop("trust_remote_code", None)
        if processor_dict is None:
            processor_dict, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        parts = []
        for name, part_class in (("image_processor", Molmo2ImageProcessor), ("video_processor", Molmo2VideoProcessor)):
            if isinstance(processor_dict.get(name), dict):
                parts.append(part_class.from_dict(dict(processor_dict[name]), **kwargs))
            else:
                parts.append(part_class.from_pretrained(pretrained_model_name_or_path, **kwargs))
        return [*parts, tokenizer]

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the processor; the parts that recent releases nest in its file are in `args`."""
        nested = {name for name in processor_dict if name in cls.attributes or name == "feature_extractor"}
        return super().from_args_and_dict(
            args, {name: value for name, value in processor_dict.items() if name not in nested}, **kwargs
        )

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save files that every supported release, and tools that read single files, can load.

        Image and video processor get their own files, also under releases that would nest them; the tokenizer keeps a
        class name that all releases know; the chat template is in the tokenizer's file too.
        """
        folder = Path(save_directory)
        tokenizer_class = self.tokenizer.init_kwargs.get("tokenizer_class")
        forms = ("legacy_serialization", "save_jinja_files")
        super().save_pretrained(folder, **{name: kwargs[name] for name in forms if name in kwargs})
        auto_map = {} if self._auto_class is None else AUTO_MAP
        for part, own in ((self.image_processor, "AutoImageProcessor"), (self.video_processor, "AutoVideoProcessor")):
            (saved,) = part.save_pretrained(folder)
            chosen = {name: AUTO_MAP[name] for name in (own, "AutoProcessor")} if auto_map else None
            _rewrite(Path(saved), {"processor_class": type(self).__name__, "auto_map": chosen})
        nested = dict.fromkeys([*self.attributes, "feature_extractor"])
        chosen = {"AutoProcessor": AUTO_MAP["AutoProcessor"]} if auto_map else None
        settings = {name: getattr(self, name) for name in TOKEN_FORMAT_OPTIONS}
        processor_file = folder / "processor_config.json"
        _rewrite(
            processor_file, {**nested, "processor_class": type(self).__name__, "auto_map": chosen}, keep_null=settings
        )
        tokenizer_file = folder / "tokenizer_config.json"
        _rewrite(
            tokenizer_file,
            {
                **_portable_tokenizer_keys(tokenizer_file),
                "tokenizer_class": _portable_tokenizer_class(tokenizer_class, self.tokenizer),
                **({"chat_template": self.chat_template} if kwargs.get("save_jinja_files", True) else {}),
                "auto_map": chosen,
            },
        )
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", folder.name)
            self.push_to_hub(repo_id, **kwargs)
        return [str(processor_file)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) for item in value)
    )


def _are_references(texts: str | list[str]) -> bool:
    """Whether all strings are URLs, paths of files or names of image files, and therefore no prompts."""
    return all(map(_is_reference, [texts] if isinstance(texts, str) else texts))


def _is_reference(text: str) -> bool:
    path = Path(text)
    may_be_name = text.split() == [text] and len(path.name) <= MAX_NAME
    is_image = may_be_name and path.suffix.lower() in IMAGE_SUFFIXES
    return is_image or text.startswith(("http://", "https://", "file://", "data:")) or os.path.isfile(path)


def _as_prompts(text: Any) -> list[str]:
    prompts = list(text) if isinstance(text, (list, tuple)) else [text]
    wrong = [type(prompt).__name__ for prompt in prompts if not isinstance(prompt, str)]
    if wrong or not prompts:
        raise ValueError(f"`text` holds {wrong[0] if wrong else 'nothing'}; expected a string or a list of strings.")
    return prompts


def _media_of_rows(prompts: list[str] | None, images: list[MediaInfo], metadata: list[Any]) -> list[MediaInfo]:
    """Images and videos of each prompt; without prompts, one row with all of them."""
    if prompts is None:
        prompts = [IMAGE_PLACEHOLDER * len(images) + VIDEO_PLACEHOLDER * len(metadata)]
    image_sizes, videos = (image.sizes[0] for image in images), map(media_info, metadata)
    rows = []
    for prompt in prompts:
        sizes = tuple(islice(image_sizes, prompt.count(IMAGE_PLACEHOLDER)))
        clips: tuple[Any, ...] = tuple(islice(videos, prompt.count(VIDEO_PLACEHOLDER)))
        if clips:
            rows.append(replace(clips[0], image_sizes=sizes, more_videos=clips[1:]))
        else:
            rows.append(MediaInfo(MULTI_IMAGE if len(sizes) > 1 else IMAGE, sizes))
    return rows


def _assistant_mask(
    prompt: ExpandedPrompt, spans: list[tuple[int, int]], offsets: list[tuple[int, int]], length: int
) -> list[int]:
    """1 on tokens inside the spans, which count characters of the prompt before expansion; 0 on an inserted BOS."""
    moved = [(prompt.position(start), prompt.position(end)) for start, end in spans]
    mask = [
        int(any(start <= first and last <= end for start, end in moved) and last > first) for first, last in offsets
    ]
    return [0] * (length - len(mask)) + mask


def _load_tokenizer(name_or_path: Any, options: dict[str, Any]) -> Any:
    """The tokenizer, also of a repository that has vocab.json and merges.txt but no tokenizer.json.

    For the model type `molmo2` recent releases read tokenizer.json only. Under another configuration they use the
    class in tokenizer_config.json, which builds the tokenizer from the other two files.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path, **options)
    except ValueError:
        return AutoTokenizer.from_pretrained(name_or_path, config=PretrainedConfig(), **options)


def _portable_tokenizer_class(stated: str | None, tokenizer: Any) -> str:
    """Class name under which all releases produce the same ids.

    Recent releases rebuild named classes with their own pre-tokenizer (GPT-2's for Olmo's tokenizer), and write the
    name of a base class that older ones lack; `PreTrainedTokenizerFast` takes tokenizer.json as it is everywhere.
    """
    name = type(tokenizer).__name__ if stated is None else stated
    return name if name.removesuffix("Fast") == "Qwen2Tokenizer" else "PreTrainedTokenizerFast"


def _portable_tokenizer_keys(path: Path) -> dict[str, Any]:
    """Changes to tokenizer_config.json that let all releases read it.

    Recent ones list special tokens under a key that older ones read as a dictionary, and record how the tokenizer was
    loaded on this machine.
    """
    changes: dict[str, Any] = {"is_local": None, "local_files_only": None}
    special_tokens = json.loads(path.read_text(encoding="utf-8")).get("extra_special_tokens")
    if isinstance(special_tokens, list):
        changes.update(extra_special_tokens=None, additional_special_tokens=special_tokens)
    return changes


def _rewrite(path: Path, changes: dict[str, Any], keep_null: dict[str, Any] | None = None) -> None:
    """Change keys of a JSON file; None removes a key, except for those in `keep_null`.

    Other keys stay, null included: null is how a tokenizer states that it has no unknown token.
    """
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(changes)
    content = {name: value for name, value in content.items() if value is not None or name not in changes}
    content.update(keep_null or {})
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["Molmo2Processor"]
