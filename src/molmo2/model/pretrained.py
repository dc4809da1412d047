"""Base class: capability flags for transformers, weight initialisation."""

from typing import Any

from torch import nn
from transformers.integrations import is_fsdp_enabled
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from molmo2.configuration import TOKEN_ID_OFFSETS, Molmo2Config
from molmo2.model.embedding import Molmo2Embedding
from molmo2.model.rotary import Molmo2RotaryEmbedding

logger = logging.get_logger(__name__)


class Molmo2PreTrainedModel(PreTrainedModel):
    """Base of the text model, the vision transformer, the connector and the models made of them."""

    config_class: Any = Molmo2Config
    base_model_prefix = "model"
    input_modalities: Any = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Molmo2DecoderLayer", "Molmo2VisionBlock", "Molmo2Pooling", "Molmo2Projector"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Reentrant checkpointing, the default before transformers 5, passes no gradient to a layer whose input has none:
    # adapters in an otherwise frozen vision transformer, whose input is pixels, would not be trained. Releases with
    # `activation_checkpointing_enable` call it from `gradient_checkpointing_enable`.
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(  # type: ignore[override]
            self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
        ) -> None:
            """As in transformers, with `use_reentrant=False` unless given."""
            settings = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
            super().activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **options)

    else:

        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
        ) -> None:
            """As in transformers, with `use_reentrant=False` unless given."""
            settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **options)

    @classmethod
    def _load_pretrained_model(  # a static method in recent releases
        cls, model: Any, state_dict: dict[str, Any] | None, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, also of a folder that the library's own class saved: its embedding is cut anew."""
        embeddings = [module for module in model.modules() if isinstance(module, Molmo2Embedding)]
        for embedding in embeddings:
            embedding.take_shapes(state_dict, checkpoint_files)
        loaded = super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        num_rows = model.config.get_text_config().vocab_size
        for embedding in embeddings:
            found = len(embedding.embedding)
            # Under FSDP all processes but one have no memory yet; elsewhere what has none stays in the files.
            if found == num_rows or not embedding.embedding.is_meta or is_fsdp_enabled():
                embedding.cut_at(num_rows)
            else:
                logger.warning(
                    f"The embedding in these files is cut after {found} rows, not after {num_rows} as in published "
                    "checkpoints, and stays so, as it is offloaded to disk: `save_pretrained` would write it so. To "
                    "save it with the published cut, load it into memory."
                )
        return loaded

    def _setting(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name)) if value is None else value

    def _tie_or_clone_weights(self, output_embeddings: nn.Module, input_embeddings: nn.Module) -> None:
        """Asked by older releases where a configuration was set to tie after it was made; newer ones do not ask."""
        logger.warning_once("Molmo2 never ties its output matrix: a configuration's `tie_word_embeddings` is ignored.")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers: the model reads `new_num_tokens` ids, and predicts as many.

        The ids of visual tokens lie behind the base vocabulary, and added tokens behind them, so the two tables of a
        published checkpoint become one, and the output matrix grows by the rows between. Rows that are new start at
        the mean of the old ones, where visual tokens, which no answer contains, are less likely than an average token.
        `vocab_size` and `additional_vocab_size`, 0 afterwards, describe the result to every reader of `config.json`.
        """
        ids = {name: getattr(self.config, name) for name in TOKEN_ID_OFFSETS if hasattr(self.config, name)}
        num_rows = float("inf") if new_num_tokens is None else new_num_tokens
        lost = {name: token_id for name, token_id in ids.items() if token_id >= num_rows}
        if lost:
            logger.warning(
                f"The embedding is cut to {new_num_tokens} rows, which leaves visual tokens without one: {lost}. "
                "The model can not read images any more, nor be loaded again. Keep "
                f"{max(lost.values()) + 1} rows or more; `len(processor.tokenizer)` counts these tokens."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _get_resized_embeddings(
        self, old_embeddings: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        if not isinstance(old_embeddings, Molmo2Embedding):
            return super()._get_resized_embeddings(old_embeddings, new_num_tokens, *args, **kwargs)
        joined = nn.Embedding.from_pretrained(old_embeddings.weight.detach(), freeze=False)
        resized = super()._get_resized_embeddings(joined, new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None or resized.num_embeddings != old_embeddings.num_embeddings:
            old_embeddings.join(resized.weight)
            self.config.get_text_config().additional_vocab_size = 0
        return old_embeddings

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
            if name == "bias":
                nn.init.zeros_(parameter)
            elif is_norm:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
