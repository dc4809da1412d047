"""Base class: capability flags for transformers, weight initialisation."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from molmo2.configuration import Molmo2Config
from molmo2.model.rotary import Molmo2RotaryEmbedding


def checkpointing_settings(given: dict[str, Any] | None) -> dict[str, Any]:
    """Settings of `torch.utils.checkpoint`, with `use_reentrant=False` unless given.

    Reentrant checkpointing, the default before transformers 5, passes no gradient to a layer whose input has none:
    adapters in an otherwise frozen vision transformer, whose input is pixels, would not be trained.
    """
    return {"use_reentrant": False, **({} if given is None else given)}


class Molmo2PreTrainedModel(PreTrainedModel):
    """Base of the text model, the vision transformer, the connector and the models made of them."""

    config_class: Any = Molmo2Config
    base_model_prefix = "model"
    input_modalities: Any = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Molmo2DecoderLayer", "Molmo2VisionBlock", "Molmo2Pooling", "Molmo2Projector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Releases with `activation_checkpointing_enable` call it from `gradient_checkpointing_enable`.
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(  # type: ignore[override]
            self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
        ) -> None:
            """As in transformers, with `checkpointing_settings`."""
            settings = checkpointing_settings(activation_checkpointing_kwargs)
            super().activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **options)

    else:

        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
        ) -> None:
            """As in transformers, with `checkpointing_settings`."""
            settings = checkpointing_settings(gradient_checkpointing_kwargs)
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **options)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint did not contain; never touch a tensor that was loaded.

        Some releases of transformers call this for modules whose tensors are partly or wholly loaded, with a mark on
        the loaded ones, and with rotary buffers that were allocated but never computed.
        """
        if isinstance(module, Molmo2RotaryEmbedding):
            module.restore()
            return
        is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            self._fill(parameter, is_bias=name == "bias", is_norm=is_norm)

    def _fill(self, parameter: Tensor, is_bias: bool, is_norm: bool) -> None:
        if is_bias:
            nn.init.zeros_(parameter)
        elif is_norm:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
