"""Molmo2 as vLLM runs it: its layers, with vectors added to embeddings and the mask of the training."""

from collections.abc import Iterable
from typing import Any

import vllm.model_executor.models.molmo2 as original
from torch import Tensor
from torch.nn.functional import pad
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention import Attention
from vllm.multimodal import MULTIMODAL_REGISTRY

from molmo2.vllm.processing import DummyInputs, ProcessingInfo, PromptProcessor
from molmo2.vllm.settings import broken_mask
from molmo2.vllm.training_mask import TrainingMask


@MULTIMODAL_REGISTRY.register_processor(PromptProcessor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Molmo2ForConditionalGeneration(original.Molmo2ForConditionalGeneration):
    """vLLM's model, exact."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._mask = TrainingMask()
        if broken_mask(vllm_config) is not None:
            return
        mode = vllm_config.compilation_config.cudagraph_mode
        if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
            raise ValueError(
                f"The CUDA graph mode is {mode.name}: prompts would be replayed from a graph, without the mask of the "
                "training. Use FULL_AND_PIECEWISE, FULL_DECODE_ONLY or PIECEWISE."
            )
        for layer in self.model.modules():
            if isinstance(layer, Attention):
                if getattr(layer, "query_quant", None) is not None:
                    raise ValueError(
                        f"The KV cache is {layer.kv_cache_dtype}, with which queries are quantised too, so that the "
                        "mask of the training cannot be computed. Use --kv-cache-dtype auto."
                    )
                self._mask.apply_to(layer)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """As vLLM's; called once for each step, so this is where the mask learns which tokens are visual."""
        self._mask.begin_step(is_multimodal)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """As vLLM's, with a column for each visual token, which is never written; see `count_visual_tokens`."""
        logits = super().compute_logits(hidden_states)
        text = self.config.text_config
        return None if logits is None else pad(logits, (0, text.additional_vocab_size), value=float("-inf"))

    def _process_image_input(self, image_input: Any) -> Iterable[Tensor]:
        return self._add_patches(super()._process_image_input(image_input), image_input["image_tokens"])

    def _process_video_input(self, video_input: Any) -> Iterable[Tensor]:
        return self._add_patches(super()._process_video_input(video_input), video_input["video_tokens"])

    def _add_patches(self, items: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor, ...]:
        """Add the embedding of the patch token, in whose place vLLM puts the vectors of the patches.

        Args:
            items: (tokens, hidden) of each image or video.
            tokens: (tokens of all,) their ids.
        """
        for vectors, own in zip(items, tokens.split([len(vectors) for vectors in items])):
            is_patch = own == self.img_patch_id
            vectors[is_patch] += self.get_language_model().embed_input_ids(own[is_patch])
        return items
