"""Images and videos of requests through this package's processors: the same pixels, tokens and times as in training.

Nothing is worked out a second time: the tokens of an item come with its pixels, and vLLM puts them into the prompt.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import torch
import vllm.model_executor.models.molmo2 as original
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptReplacement, PromptUpdate, PromptUpdateDetails

from molmo2.image.limits import MediaLimits
from molmo2.model.vision_inputs import flat_pooling, image_groups
from molmo2.processing.processor import Molmo2Processor
from molmo2.processing.prompt_tokens import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    VISUAL_TOKENS,
    image_tokens,
    insert_bos,
    video_string,
)
from molmo2.video.probing import probe_videos
from molmo2.vllm.options import sorted_options
from molmo2.vllm.video import is_undecoded

# Rows of each field that belong to one item; the model takes the names from vLLM's class.
ROWS = {
    "image": {
        "pixel_values": "image_num_crops",
        "image_token_pooling": "image_num_pooled_patches",
        "image_tokens": "num_image_tokens",
    },
    "video": {
        "pixel_values_videos": "video_num_crops",
        "video_token_pooling": "video_num_pooled_patches",
        "video_tokens": "num_video_tokens",
        "video_prompt": "num_video_prompt_tokens",  # with the printed times
    },
}
PER_ITEM = {"image": ("image_num_patches",), "video": ("video_num_patches",)}
PROMPT_FIELDS = {"image": "image_tokens", "video": "video_prompt"}
# Requests are those of strangers: decoders of videos run in a process that is ended after this time.
LIMITS = MediaLimits(decode_seconds=60)
PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}


@lru_cache(maxsize=4)
def _processor(folder_or_repo: str, revision: str | None, options: str) -> Molmo2Processor:
    by_modality = json.loads(options)
    own = {name: value for values in by_modality.values() for name, value in values.items()}
    processor = Molmo2Processor.from_pretrained(folder_or_repo, revision=revision or "main", **own)
    processor.limits = LIMITS
    return processor


class ProcessingInfo(original.Molmo2ProcessingInfo):
    """What vLLM wants to know about the processor."""

    def get_hf_processor(self, **kwargs: object) -> Molmo2Processor:
        """The processor with the server's options; those of a request are options of a call."""
        config = self.ctx.model_config
        served = sorted_options(config.multimodal_config.mm_processor_kwargs or {}, config.max_model_len)
        return _processor(config.model, config.revision, json.dumps(served, sort_keys=True))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}


class DummyInputs(original.Molmo2DummyInputsBuilder):
    """Inputs of the largest size, to measure memory with."""


class PromptProcessor(BaseMultiModalProcessor):
    """From the images and videos of a prompt to tokens and model inputs."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        data, _, passthrough = self._get_hf_mm_inputs(mm_items, hf_kwargs)
        features: dict[str, Any] = {}
        if data:
            try:
                options = sorted_options(hf_kwargs, self.info.ctx.model_config.max_model_len)
                if data.get("images"):
                    images = [_upright_original(item, mm_items["image"].data) for item in enumerate(data["images"])]
                    features |= self._image_fields(images, options["images_kwargs"])
                if data.get("videos"):
                    features |= self._video_fields(data["videos"], options["videos_kwargs"])
            except Exception as error:  # whatever is wrong with a request is the request's fault
                raise ValueError(f"The images or videos of the request cannot be used: {error}") from error
        dtype = self.info.ctx.model_config.dtype
        features = {name: value.to(dtype) if value.is_floating_point() else value for name, value in features.items()}
        return self._finalize_hf_mm_data(data, hf_kwargs, passthrough, BatchFeature(features))

    def _image_fields(self, images: list[Any], options: dict[str, Any]) -> dict[str, Tensor]:
        processor = self.info.get_hf_processor()
        outputs = processor.image_processor.preprocess(images, **options, return_tensors="pt")
        grids, crops = outputs["image_grids"], outputs["image_num_crops"]
        tokens = [
            processor.tokenizer.convert_tokens_to_ids(image_tokens(grid, processor.visual_token_format))
            for grid in grids.tolist()
        ]
        return {
            "pixel_values": outputs["pixel_values"],
            "image_token_pooling": outputs["image_token_pooling"],
            "image_num_crops": crops,
            "image_num_pooled_patches": image_groups(grids).sum(-1),
            "image_num_patches": crops * outputs["pixel_values"].shape[1],
            "image_tokens": torch.tensor([token for own in tokens for token in own]),
            "num_image_tokens": torch.tensor([len(own) for own in tokens]),
        }

    def _video_fields(self, videos: Sequence[Any], options: dict[str, Any]) -> dict[str, Tensor]:
        fields = [self._fields_of_one_video(frames, metadata, options) for frames, metadata in videos]
        return {name: torch.cat([own[name] for own in fields]) for name in fields[0]}

    def _fields_of_one_video(
        self, frames: Any, metadata: dict[str, Any], options: dict[str, Any]
    ) -> dict[str, Tensor]:
        processor = self.info.get_hf_processor()
        about = {name: value for name, value in metadata.items() if name not in ("options", "do_sample_frames")}
        if is_undecoded(frames):
            frames, options = frames.tobytes(), {**metadata["options"], **options}
            self._require_room(frames, options)
        else:
            options = {"do_sample_frames": metadata.get("do_sample_frames", False), **options}
        outputs = processor.video_processor.preprocess(
            [frames], video_metadata=[about or None], **options, return_metadata=True, return_tensors="pt"
        )
        grids, (sampled,) = outputs["video_grids"], outputs["video_metadata"]
        text = video_string(grids, sampled.timestamps, processor.visual_token_format)
        prompt = torch.tensor(processor.tokenizer.encode(text, add_special_tokens=False))
        tokens = prompt[torch.isin(prompt, torch.tensor(self._visual_ids()))]
        pooled, num_patches = grids.prod(dim=-1), outputs["pixel_values_videos"].shape[1]
        return {
            "pixel_values_videos": outputs["pixel_values_videos"],
            "video_token_pooling": flat_pooling(outputs["video_token_pooling"], pooled, grids[:, 0], num_patches),
            "video_num_crops": grids[:, 0].sum()[None],
            "video_num_pooled_patches": pooled.sum()[None],
            "video_num_patches": grids[:, 0].sum()[None] * num_patches,
            "video_tokens": tokens,
            "num_video_tokens": torch.tensor([len(tokens)]),
            "video_prompt": prompt,
            "num_video_prompt_tokens": torch.tensor([len(prompt)]),
        }

    def _require_room(self, video: bytes, options: dict[str, Any]) -> None:
        """Refuse a video that is too long for a prompt before its frames are decoded."""
        processor, longest = self.info.get_hf_processor().video_processor, self.info.ctx.model_config.max_model_len
        planned = {name: value for name, value in options.items() if name not in ("clip", "num_frames")}
        num_frames = options.get("num_frames") or processor.num_frames
        if processor.plan(num_frames, **planned).num_pooled_tokens <= longest:
            return
        ((plan, times),) = (probe(**options) for probe in probe_videos(processor, [video]))
        if plan.num_pooled_tokens > longest:
            raise ValueError(
                f"The video takes {plan.num_pooled_tokens} tokens with its {len(times)} frames; a prompt has at most "
                f"{longest} (max_model_len). Lower `num_frames` or `max_fps`, or pass a `clip`."
            )

    def _visual_ids(self) -> list[int]:
        return self.info.get_hf_processor().tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS))

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        config = {}
        for modality, rows in ROWS.items():
            for name, sizes in rows.items():
                if name in hf_inputs:
                    config[name] = MultiModalFieldConfig.flat_from_sizes(modality, hf_inputs[sizes])
            for name in (*rows.values(), *PER_ITEM[modality]):
                config[name] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return config

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        visual_ids = self._visual_ids()
        tokenizer = self.info.get_hf_processor().tokenizer

        def update(modality: str) -> PromptReplacement:
            def tokens(index: int) -> PromptUpdateDetails:
                ids = out_mm_kwargs[modality][index][PROMPT_FIELDS[modality]].data.tolist()
                return PromptUpdateDetails.select_token_ids(ids, visual_ids)

            target = [tokenizer.convert_tokens_to_ids(PLACEHOLDERS[modality])]
            return PromptReplacement(modality=modality, target=target, replacement=tokens)

        return [update(modality) for modality in ROWS]

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        return insert_bos(prompt, self.info.get_hf_processor().bos_token_id)


def _upright_original(numbered: tuple[int, Any], items: Sequence[Any]) -> Any:
    """The image of a request, or its file where vLLM changed it more than by decoding (transparency, palettes)."""
    index, image = numbered
    encoded = getattr(items[index], "original_bytes", None)
    if encoded is None or Image.open(BytesIO(encoded)).mode == "RGB":
        return image
    return encoded
