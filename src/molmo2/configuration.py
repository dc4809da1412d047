"""Configuration of Molmo2: three sub-configurations and the ids of the visual tokens.

Two spellings of the same file are in use. The published checkpoints say `vit_config`, `vit_layers`,
`image_default_input_size`, `rope_theta` + `rope_scaling`; the native class of recent transformers releases writes
`vision_config`, `vision_feature_layer`, `image_size`, `rope_parameters`. Both are read here, on every supported
transformers; what is written is the published spelling in full, because all readers understand it.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers.activations import ACT2FN
from transformers.configuration_utils import PretrainedConfig

from molmo2.values import is_number, is_whole

# What processor and model agree on without passing it along.
CHANNELS = 3  # red, green, blue
PAD_PATCH = -1  # in pooling tables: a place of a pooling window that lies outside the image
PAD_SLOT = -2  # in pooling tables: fills up the rows of windows that are smaller than the widest; no part of a window
UINT8_MEAN = UINT8_STD = 0.5  # how the model normalises pixels that it is given as uint8

# Rotary scaling types, and the parameters that each requires.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Those of their parameters that are numbers above 0.
ROPE_NUMBERS = {
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim"),
}
QK_NORM_TYPES = ("qwen3", "olmo")
MAX_SIZE = 2**31 - 1  # of any size: more is damage, and would be allocated

# The visual tokens follow the base vocabulary in one fixed order; a file that omits an id means this offset.
TOKEN_ID_OFFSETS = {
    "image_start_token_id": 0,
    "image_end_token_id": 1,
    "image_patch_id": 2,
    "image_col_id": 3,
    "low_res_image_start_token_id": 4,
    "image_low_res_id": 6,
    "frame_start_token_id": 7,
    "frame_end_token_id": 8,
}


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "transformers_version"}


def _same_settings(config: PretrainedConfig, other: object) -> bool:
    return type(config) is type(other) and _settings(config) == _settings(other)


class _TextView(property):
    """A setting of the text model at the top level; a file states it in `text_config` alone."""

    def __reduce__(self) -> tuple[Any, ...]:
        """For cloudpickle, which knows plain properties only: vLLM sends configurations to its processes with it."""
        return type(self), (self.fget, self.fset, None, self.__doc__)


class Molmo2BaseConfig(PretrainedConfig):
    """Base of the four configurations: aliases, validation helpers and complete serialisation."""

    # --- what transformers 5 would do to them ---

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        """Keeps `==`: every subclass becomes a dataclass there, whose own compares the base fields alone."""
        super().__init_subclass__(*args, **kwargs)
        cls.__eq__ = _same_settings  # type: ignore[method-assign]

    def validate_rope(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `_require_rope` checks, and the rules of the library warn about published values."""

    def standardize_rope_params(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: it would add a key to the saved file that older releases do not know."""

    # --- helpers ---

    def _take_aliases(self, kwargs: dict[str, Any]) -> None:
        """Store values given under the native spelling; they win over the published one, which may be a default."""
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))

    def _settable(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without keys that are computed from others: no key that is not known may keep a file from loading."""
        own = {name: found for name in kwargs if isinstance(found := getattr(type(self), name, None), property)}
        computed = {name for name, found in own.items() if found.fset is None or isinstance(found, _TextView)}
        return {name: value for name, value in kwargs.items() if name not in computed}

    def _refuse(self, found: str, expected: str) -> None:
        raise ValueError(f"{type(self).__name__}: {found}; {expected}.")

    def _require(self, names: Sequence[str], is_valid: Callable[[Any], bool], expected: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not is_valid(value):
                other = "".join(f". Also called `{alias}`" for alias, own in self.attribute_map.items() if own == name)
                self._refuse(f"`{name}` is {value!r:.80}", f"expected {expected}{other}")

    def _require_positive(self, *names: str) -> None:
        self._require(names, lambda value: is_whole(value) and value >= 1, "a positive integer")
        self._require(names, lambda value: value <= MAX_SIZE, f"at most {MAX_SIZE}")

    def _require_flags(self, *names: str) -> None:
        self._require(names, lambda value: isinstance(value, bool), "true or false")

    def _require_numbers(self, *names: str, maximum: float = math.inf, above: float = -math.inf) -> None:
        """Numbers from 0 to `maximum`, and greater than `above`."""
        expected = f"a number {'from' if above < 0 else 'above'} 0" + (
            f" to {maximum:g}" if maximum < math.inf else ""
        )
        self._require(
            names, lambda value: is_number(value) and max(0, above) <= value <= maximum and value > above, expected
        )

    def _require_integers(self, *names: str) -> None:
        self._require(
            names, lambda value: isinstance(value, (list, tuple)) and all(map(is_whole, value)), "a list of integers"
        )

    def _require_layers(self) -> None:
        """Checks what the layers of all three parts have: widths, heads, dropout, activation, fresh weights."""
        self._require_positive("hidden_size", "intermediate_size")
        self._require_positive("num_attention_heads", "num_key_value_heads", "head_dim")
        self._require_numbers("attention_dropout", "residual_dropout", maximum=1.0)
        self._require_numbers("initializer_range")
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse(
                f"{self.num_attention_heads} attention heads over {self.num_key_value_heads} key/value heads",
                "`num_attention_heads` must be a multiple of `num_key_value_heads`",
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            self._refuse(f"`hidden_act` is {self.hidden_act!r}", "expected an activation known to transformers")

    def to_diff_dict(self) -> dict[str, Any]:
        """Every setting of the model, defaults included, without the base class's own defaults.

        Other readers (the native class, serving engines) have other defaults, so nothing may be left to them.
        """
        noise = PretrainedConfig().to_dict()
        kept = {"model_type", "transformers_version"}
        differing = {k: v for k, v in self.to_dict().items() if k in kept or k not in noise or v != noise[k]}
        differing.pop("_name_or_path", None)  # a place on this machine
        for name in getattr(self, "sub_configs", {}):
            differing[name] = getattr(self, name).to_diff_dict()
            differing[name].pop("transformers_version", None)
        return differing

    def to_dict(self) -> dict[str, Any]:
        settings = {k: v for k, v in super().to_dict().items() if k != "_pre_quantization_dtype"}  # 4.57's; no JSON
        for name in getattr(self, "sub_configs", {}):
            settings[name] = getattr(self, name).to_dict()
            settings[name].pop("transformers_version", None)
        return settings


class Molmo2VitConfig(Molmo2BaseConfig):
    """The vision transformer.

    Args:
        image_default_input_size: (height, width) of one crop in pixels.
        image_patch_size: Side of a square patch in pixels.
        image_num_pos: Entries of the stored position table, a square number; a patch grid of another size resizes it.
        num_hidden_layers: Layers of the original tower; those past the last one that
            `Molmo2AdapterConfig.vit_layers` names are neither built nor stored.
        float32_attention: Scores and softmax of the attention in float32, whatever the dtype of the weights.
        residual_dropout: Dropout probability on the output of each attention.

    Raises:
        ValueError: For a value that no vision transformer of this kind can have, naming it and what was expected.
    """

    model_type = "molmo2"
    base_config_key = "vit_config"
    attribute_map = {
        "image_size": "image_default_input_size",
        "patch_size": "image_patch_size",
        "num_position_embeddings": "image_num_pos",
    }

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 16,
        head_dim: int = 72,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        image_default_input_size: tuple[int, int] | list[int] = (378, 378),
        image_patch_size: int = 14,
        image_num_pos: int | None = None,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        initializer_range: float = 0.02,
        float32_attention: bool = True,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.image_default_input_size = image_default_input_size
        self.image_patch_size = image_patch_size
        self.image_num_pos = image_num_pos
        self.attention_dropout = attention_dropout
        self.residual_dropout = residual_dropout
        self.initializer_range = initializer_range
        self.float32_attention = float32_attention
        self._take_aliases(kwargs)
        self._require_integers("image_default_input_size")
        self.image_default_input_size = list(self.image_default_input_size)
        self._require_layers()
        self._require_positive("num_hidden_layers", "image_patch_size")
        self._require_numbers("layer_norm_eps", above=0.0)
        self._require_flags("float32_attention")
        self._require_patch_grid()
        super().__init__(**self._settable(kwargs))

    def _require_patch_grid(self) -> None:
        size, patch = self.image_default_input_size, self.image_patch_size
        if len(size) != 2 or any(side < patch or side % patch for side in size):
            self._refuse(
                f"`image_default_input_size` is {size}", f"expected (height, width) in multiples of the patch, {patch}"
            )
        if self.image_num_pos is None:
            self.image_num_pos = math.prod(self.image_num_patch)
        self._require_positive("image_num_pos")
        side = math.isqrt(self.image_num_pos)
        if side < 1 or (side * side != self.image_num_pos and self.image_num_pos != math.prod(self.image_num_patch)):
            self._refuse(
                f"`image_num_pos` is {self.image_num_pos}",
                f"expected a square number or the {math.prod(self.image_num_patch)} patches of a crop",
            )

    @property
    def image_num_patch(self) -> tuple[int, int]:
        """(rows, columns) of patches in one crop."""
        height, width = self.image_default_input_size
        return height // self.image_patch_size, width // self.image_patch_size


class Molmo2AdapterConfig(Molmo2BaseConfig):
    """The connector: attention pooling of neighbouring patches and a gated projection into the text model.

    Args:
        vit_layers: Layers of the vision transformer whose outputs are concatenated, in this order; negative values
            count from `Molmo2VitConfig.num_hidden_layers`.
        pooling_attention_mask: Keep the missing patches of a pooling window out of its mean and attention.
        hidden_size: Width of one vision feature, equal to the vision transformer's.
        text_hidden_size: Width of the text model.
        image_feature_dropout: Dropout probability on the gathered features.

    Raises:
        ValueError: For a value that no connector of this kind can have, naming it and what was expected.
    """

    model_type = "molmo2"
    base_config_key = "adapter_config"
    attribute_map = {"vision_feature_layer": "vit_layers"}

    def __init__(
        self,
        vit_layers: tuple[int, ...] | list[int] = (-3, -9),
        pooling_attention_mask: bool = True,
        hidden_size: int = 1152,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 16,
        head_dim: int = 72,
        float32_attention: bool = True,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        hidden_act: str = "silu",
        intermediate_size: int = 9728,
        text_hidden_size: int = 2560,
        image_feature_dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.vit_layers = vit_layers
        self.pooling_attention_mask = pooling_attention_mask
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.float32_attention = float32_attention
        self.attention_dropout = attention_dropout
        self.residual_dropout = residual_dropout
        self.hidden_act = hidden_act
        self.intermediate_size = intermediate_size
        self.text_hidden_size = text_hidden_size
        self.image_feature_dropout = image_feature_dropout
        self.initializer_range = initializer_range
        self._take_aliases(kwargs)
        self._require_integers("vit_layers")
        self.vit_layers = list(self.vit_layers)
        if not self.vit_layers:
            self._refuse("`vit_layers` is empty", "expected at least one layer of the vision transformer")
        self._require_layers()
        self._require_positive("text_hidden_size")
        self._require_numbers("image_feature_dropout", maximum=1.0)
        self._require_flags("pooling_attention_mask", "float32_attention")
        super().__init__(**self._settable(kwargs))


class Molmo2TextConfig(Molmo2BaseConfig):
    """The text model.

    `rope_parameters` is the one place for the rotary settings: `{"rope_type", "rope_theta", ...}`. `rope_theta` and
    `rope_scaling` (None when unscaled) are views of it, and the two keys that are written to disk.

    Args:
        vocab_size: Rows of `wte.embedding` and of `lm_head`; logits cover these ids.
        additional_vocab_size: Rows of `wte.new_embedding`: the ids from `vocab_size` up, read but never predicted.
        qkv_bias: Bias on the fused query/key/value projection.
        use_qk_norm: RMSNorm on queries and keys.
        qk_norm_type: `"qwen3"` norms each head, `"olmo"` the whole projection.
        norm_after: Norm the output of each sublayer instead of its input.
        rope_scaling_layers: Indices of the layers that use the scaled rotary tables; None means all of them.
        max_position_embeddings: Longest sequence in tokens.

    Raises:
        ValueError: For a value that no such text model can have, naming it and what was expected.
    """

    model_type = "molmo2_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"attention_bias": "qkv_bias", "rms_norm_eps": "layer_norm_eps"}
    base_model_pp_plan = {  # where a pipeline may cut the text model, and what its pieces pass on
        "wte": (["input_ids"], ["inputs_embeds"]),
        "blocks": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        hidden_size: int = 2560,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int = 128,
        vocab_size: int = 151936,
        additional_vocab_size: int = 128,
        qkv_bias: bool = False,
        num_hidden_layers: int = 36,
        intermediate_size: int = 9728,
        hidden_act: str = "silu",
        embedding_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        max_position_embeddings: int = 36864,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling_layers: list[int] | None = None,
        use_qk_norm: bool = True,
        qk_norm_type: str = "qwen3",
        layer_norm_eps: float = 1e-6,
        norm_after: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = head_dim
        self.vocab_size = vocab_size
        self.additional_vocab_size = additional_vocab_size
        self.qkv_bias = qkv_bias
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.embedding_dropout = embedding_dropout
        self.attention_dropout = attention_dropout
        self.residual_dropout = residual_dropout
        self.max_position_embeddings = max_position_embeddings
        self.rope_scaling_layers = rope_scaling_layers
        self.use_qk_norm = use_qk_norm
        self.qk_norm_type = qk_norm_type
        self.layer_norm_eps = layer_norm_eps
        self.norm_after = norm_after
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.rope_parameters = self._merge_rope(rope_theta, rope_scaling, rope_parameters)
        self._take_aliases(kwargs)
        self._require_valid()
        kwargs.pop("tie_word_embeddings", None)  # said once, at the top level
        super().__init__(**{**self._settable(kwargs), "tie_word_embeddings": False})

    @staticmethod
    def _merge_rope(
        rope_theta: float | None, rope_scaling: dict[str, Any] | None, rope_parameters: dict[str, Any] | None
    ) -> dict[str, Any]:
        for name, given in (("rope_scaling", rope_scaling), ("rope_parameters", rope_parameters)):
            if given is not None and not isinstance(given, dict):
                raise ValueError(f"Molmo2TextConfig: `{name}` is {given!r:.80}; expected a dictionary of settings.")
        scaling = rope_parameters if rope_scaling is None else rope_scaling
        merged = {} if scaling is None else dict(scaling)
        unscaled = merged.keys() <= {"rope_theta"}
        merged["rope_type"] = merged.pop("type", merged.get("rope_type", "default" if unscaled else None))
        if rope_theta is None:
            rope_theta = merged.get("rope_theta", (rope_parameters or {}).get("rope_theta", 5_000_000.0))
        merged["rope_theta"] = float(rope_theta) if is_whole(rope_theta) else rope_theta
        return merged

    def _require_valid(self) -> None:
        self._require_layers()
        self._require_positive("vocab_size", "num_hidden_layers", "max_position_embeddings")
        self._require_numbers("embedding_dropout", maximum=1.0)
        self._require_numbers("layer_norm_eps", "rope_theta", above=0.0)
        self._require_flags("qkv_bias", "use_qk_norm", "norm_after", "use_cache")
        if self.head_dim % 2:
            self._refuse(f"`head_dim` is {self.head_dim}", "rotary embeddings rotate pairs, so it must be even")
        extra = ["additional_vocab_size"]
        self._require(extra, lambda value: is_whole(value) and 0 <= value <= MAX_SIZE, "zero or more")
        if self.use_qk_norm and self.qk_norm_type not in QK_NORM_TYPES:
            self._refuse(f"`qk_norm_type` is {self.qk_norm_type!r}", f"expected one of {QK_NORM_TYPES}")
        self._require_rope()
        if self.rope_scaling_layers is not None:
            self._require_integers("rope_scaling_layers")
        layers = [] if self.rope_scaling_layers is None else self.rope_scaling_layers
        outside = [layer for layer in layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            self._refuse(
                f"`rope_scaling_layers` names layers {outside}",
                f"the model has layers 0..{self.num_hidden_layers - 1}",
            )

    def _require_rope(self) -> None:
        given = self.rope_parameters
        rope_type = given.get("rope_type")
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            self._refuse(
                f"the rotary scaling is of type {rope_type!r:.80}",
                f"supported are {tuple(ROPE_TYPES)}. It stands in `rope_scaling` as `rope_type`",
            )
        missing = [name for name in ROPE_TYPES[rope_type] if given.get(name) is None]
        if missing:
            self._refuse(
                f"the rotary scaling of type {rope_type!r} lacks {missing}",
                f"found {self.rope_scaling}. Add them to `rope_scaling`",
            )
        for name in ROPE_NUMBERS & given.keys():
            value = given[name]
            if value is not None and not (is_number(value) and value > 0):
                self._refuse(f"`rope_scaling` has {name!r} = {value!r:.80}", "expected a number above 0")

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self.rope_parameters, "rope_theta": float(value)}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The scaling settings without the base; None when the rotary tables are unscaled."""
        if self.rope_parameters["rope_type"] == "default":
            return None
        return {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self.rope_parameters = self._merge_rope(self.rope_theta, value, None)

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        settings.pop("rope_parameters", None)
        # No reader of text_config needs the key, and releases differ in whether they store it.
        settings.pop("tie_word_embeddings", None)
        settings["rope_theta"] = self.rope_theta
        settings["rope_scaling"] = copy.deepcopy(self.rope_scaling)
        return settings


def _text_attribute(name: str) -> _TextView:
    return _TextView(
        lambda config: getattr(config.text_config, name),
        lambda config, value: setattr(config.text_config, name, value),
        doc=f"`text_config.{name}`.",
    )


class Molmo2Config(Molmo2BaseConfig):
    """Configuration of `Molmo2ForConditionalGeneration`; the defaults are those of Molmo2-4B.

    Args:
        vit_config, adapter_config, text_config: Sub-configurations, as objects or dictionaries; None means defaults.
        image_start_token_id: First of the visual tokens. Ids that are not given follow it in the order in which
            every published tokenizer lists them.
        use_frame_special_tokens: Whether the checkpoint's prompts enclose video frames in their own tokens
            (information for clients; prompts follow the processor's option of the same name).

    Raises:
        ValueError: For values that contradict each other, naming what was found and what was expected.
    """

    model_type = "molmo2"
    sub_configs = {
        "vit_config": Molmo2VitConfig,
        "adapter_config": Molmo2AdapterConfig,
        "text_config": Molmo2TextConfig,
    }
    # A trainer's predictions are all other outputs, of all batches alike: one without images has no vectors of them.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]
    attribute_map = {
        "image_token_id": "image_patch_id",
        "video_token_id": "image_patch_id",
        "image_high_res_id": "image_patch_id",
        "vision_config": "vit_config",
    }

    hidden_size = _text_attribute("hidden_size")
    intermediate_size = _text_attribute("intermediate_size")
    num_hidden_layers = _text_attribute("num_hidden_layers")
    num_attention_heads = _text_attribute("num_attention_heads")
    num_key_value_heads = _text_attribute("num_key_value_heads")
    head_dim = _text_attribute("head_dim")
    vocab_size = _text_attribute("vocab_size")
    max_position_embeddings = _text_attribute("max_position_embeddings")

    def __init__(
        self,
        vit_config: Molmo2VitConfig | dict[str, Any] | None = None,
        adapter_config: Molmo2AdapterConfig | dict[str, Any] | None = None,
        text_config: Molmo2TextConfig | dict[str, Any] | None = None,
        image_start_token_id: int | None = None,
        low_res_image_start_token_id: int | None = None,
        image_end_token_id: int | None = None,
        image_low_res_id: int | None = None,
        image_patch_id: int | None = None,
        image_col_id: int | None = None,
        frame_start_token_id: int | None = None,
        frame_end_token_id: int | None = None,
        use_frame_special_tokens: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        if vit_config is None:
            vit_config = kwargs.pop("vision_config", None)
        given = {"vit_config": vit_config, "adapter_config": adapter_config, "text_config": text_config}
        for name, config_class in self.sub_configs.items():
            value = {} if given[name] is None else given[name]
            if not isinstance(value, (dict, PretrainedConfig)):
                self._refuse(f"`{name}` is {value!r}", "expected a dictionary of settings or a configuration")
            setattr(self, name, config_class(**value) if isinstance(value, dict) else value)
        self.image_start_token_id = image_start_token_id
        self.low_res_image_start_token_id = low_res_image_start_token_id
        self.image_end_token_id = image_end_token_id
        self.image_low_res_id = image_low_res_id
        self.image_col_id = image_col_id
        self.frame_start_token_id = frame_start_token_id
        self.frame_end_token_id = frame_end_token_id
        spellings = (image_patch_id, kwargs.get("image_token_id"), kwargs.get("image_high_res_id"))
        self.image_patch_id = next((spelling for spelling in spellings if spelling is not None), None)
        for alias in self.attribute_map:
            kwargs.pop(alias, None)
        different = [other for other in spellings if other is not None and other != self.image_patch_id]
        if different:
            self._refuse(
                f"`image_patch_id` is {self.image_patch_id!r:.80}, but `image_token_id` or `image_high_res_id` is "
                f"{different[0]!r:.80}",
                "expected one id for all three",
            )
        self._complete_token_ids()
        self.use_frame_special_tokens = use_frame_special_tokens
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._require_consistent(tie_word_embeddings)
        if kwargs.get("attn_implementation") is None:  # older releases pass None for "not chosen"
            # What a file chose for its parts, which the base class forgets without a choice at the top.
            of_parts = {
                name: part.get("attn_implementation") for name, part in given.items() if isinstance(part, dict)
            }
            kwargs["attn_implementation"] = {name: own for name, own in of_parts.items() if own is not None} or None
        super().__init__(**{**self._settable(kwargs), "tie_word_embeddings": False})
        self.tie_word_embeddings = False

    def _complete_token_ids(self) -> None:
        given = [name for name in TOKEN_ID_OFFSETS if getattr(self, name) is not None]
        self._require(given, is_whole, "the id of a token, an integer")
        first = self.image_start_token_id
        if first is None:
            first = self.text_config.vocab_size
        for name, offset in TOKEN_ID_OFFSETS.items():
            if getattr(self, name) is None:
                setattr(self, name, first + offset)

    def _require_consistent(self, tie_word_embeddings: bool) -> None:
        self._require_flags("use_frame_special_tokens", "use_cache")
        self._require_numbers("initializer_range")
        if tie_word_embeddings not in (False, None):
            self._refuse(
                f"`tie_word_embeddings` is {tie_word_embeddings!r:.80}",
                "Molmo2 never ties its output matrix, which covers fewer ids than the embedding; set it to False",
            )
        depth = self.vit_config.num_hidden_layers
        if any(not -depth <= layer < depth for layer in self.adapter_config.vit_layers):
            self._refuse(
                f"`adapter_config.vit_layers` is {self.adapter_config.vit_layers}",
                f"the vision transformer has layers {-depth}..{depth - 1}",
            )
        if self.adapter_config.text_hidden_size != self.text_config.hidden_size:
            self._refuse(
                f"the connector writes vectors of {self.adapter_config.text_hidden_size} "
                f"into a text model of width {self.text_config.hidden_size}",
                "`adapter_config.text_hidden_size` must equal `text_config.hidden_size`",
            )
        if self.adapter_config.hidden_size != self.vit_config.hidden_size:
            self._refuse(
                f"the connector reads features of {self.adapter_config.hidden_size} "
                f"from a vision transformer of width {self.vit_config.hidden_size}",
                "`adapter_config.hidden_size` must equal `vit_config.hidden_size`",
            )
        rows = self.text_config.vocab_size + self.text_config.additional_vocab_size
        outside = {name: getattr(self, name) for name in TOKEN_ID_OFFSETS if not 0 <= getattr(self, name) < rows}
        if outside:
            self._refuse(
                f"token ids {outside} have no embedding",
                f"the two embedding tables hold ids 0..{rows - 1}. Their sizes: `vocab_size`, `additional_vocab_size`",
            )

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        settings["image_high_res_id"] = self.image_patch_id
        settings["tie_word_embeddings"] = False
        if self._auto_class is None:  # of the installed package: no code is saved beside it that `auto_map` could name
            settings.pop("auto_map", None)
        return settings


__all__ = ["Molmo2AdapterConfig", "Molmo2Config", "Molmo2TextConfig", "Molmo2VitConfig"]
