"""The mask of the training in vLLM: all visual tokens of a prompt see each other.

No attention of vLLM can express it: causal on CPUs; elsewhere within ranges, one for each image or frame. So what
vLLM computed for a prompt with visual tokens is computed again, from the same queries, keys and values. The prompt is
whole in its step (`molmo2.vllm.settings`); later steps are causal, as in training.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molmo2.model.attention.blockwise import BlockwiseMask, blockwise_attention
from molmo2.model.attention.mask import AttentionSpec

logger = logging.getLogger("vllm.molmo2")  # vLLM shows what is below "vllm"


@dataclass
class TrainingMask:
    """The visual tokens of the step that is computed, shared by all layers.

    Attributes:
        is_visual: (tokens of all requests of the step,) bool, on the CPU; None where there are none.
        prompts: (start, end, mask) of each request with visual tokens, once a layer asked for them.
    """

    is_visual: Tensor | None = None
    prompts: list[tuple[int, int, BlockwiseMask]] | None = field(default=None, repr=False)

    def begin_step(self, is_visual: Tensor | None) -> None:
        """To be called before the layers, at each step.

        Args:
            is_visual: (tokens,) bool, or None.
        """
        self.prompts = None
        self.is_visual = is_visual.cpu() if is_visual is not None and bool(is_visual.any()) else None

    def apply_to(self, layer: Any) -> None:
        """Correct what this `Attention` of vLLM computes, from now on."""
        causal = layer.impl.forward
        scaling = float(layer.impl.scale)

        def forward(owner: Any, *states: Tensor, output: Tensor, **more: Any) -> Tensor:
            query, key, value, _, metadata = states  # behind the values: the cache
            result = causal(owner, *states, output=output, **more)
            if self.is_visual is not None and metadata is not None:
                self._correct((query, key, value), metadata, output, scaling)
            return result

        layer.impl.forward = forward

    def _correct(self, states: tuple[Tensor, ...], metadata: Any, output: Tensor, scaling: float) -> None:
        """Overwrite the rows of prompts with visual tokens in `output` (tokens, heads, head_dim)."""
        if self.prompts is None:
            self.prompts = self._find_prompts(metadata, output.device)
        for start, end, mask in self.prompts:
            query, key, value = (rows[start:end].transpose(0, 1)[None] for rows in states)
            attended = blockwise_attention(query, key, value, mask, scaling, 0.0)
            output[start:end] = attended.reshape(output[start:end].shape)

    def _find_prompts(self, metadata: Any, device: torch.device) -> list[tuple[int, int, BlockwiseMask]]:
        is_visual = self.is_visual
        if is_visual is None:
            return []
        starts = metadata.query_start_loc.tolist()
        prompts = []
        for start, end, length in zip(starts, starts[1:], metadata.seq_lens.tolist()):
            own = is_visual[start:end]
            if not bool(own.any()):
                continue
            if length != end - start:
                logger.error(
                    "molmo2.vllm: a prompt of %d tokens reached the model in pieces, the last of %d. Its visual "
                    "tokens do not see each other as in training. Please report the options that the engine has.",
                    length,
                    end - start,
                )
                continue
            spec = AttentionSpec(is_visual=own[None].to(device))
            prompts.append((start, end, BlockwiseMask(spec, 1, 0, length, device)))
        return prompts
