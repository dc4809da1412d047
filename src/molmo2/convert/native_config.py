"""The `model` section of a native `config.yaml`: which fields mean what, and which values cannot be converted.

The tables below list every field the trainer writes. A field is read (with the trainer's default where the file lacks
it), must have one of the values that the target can express, or does not affect the finished model. Everything that
cannot be converted is reported by name, in one message.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from molmo2.convert.errors import UnsupportedError, listing, shown

REQUIRED = object()  # no default: sizes, and switches that decide which model this is

MODEL_NAME = "video_olmo"
OTHER_MODELS = {
    "molmo_point": "MolmoPoint is another architecture, with tokens that point; this converter writes Molmo2 only",
    "token_indexing_video_molmo2": "it is an early form of MolmoPoint, another architecture than Molmo2",
    "molmo": "it is a first-generation Molmo, another architecture than Molmo2",
}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
ROPE_FIELDS = (
    ("factor", float),
    ("high_freq_factor", float),
    ("low_freq_factor", float),
    ("attention_factor", float),
    ("original_max_position_embeddings", int),
    ("beta_fast", float),
    ("beta_slow", float),
    ("mscale", float),
    ("mscale_all_dim", float),
    ("truncate", bool),
)
NUM_EXTRA_TOKENS = 14
NATIVE_NORM_EPS = 1e-5  # where the file says null
TWO_WAY_ATTENTION = "image_tokens"


@dataclass(frozen=True)
class Range:
    """A range of valid numbers, in words and as a predicate."""

    words: str
    holds: Callable[[float], bool]


def _up_to(limit: float, *, above: float = -math.inf) -> Range:
    """Numbers that a model can have, far beyond all that exist: more would be enumerated, or allocated."""
    lowest = f"more than {above:g} and " if math.isfinite(above) else ""
    return Range(f"{lowest}at most {limit:g}", lambda number: above < number <= limit)


FACTOR = Range("between -1e9 and 1e9", lambda number: abs(number) <= 1e9)
POSITIVE = _up_to(1e12, above=0)
PROBABILITY = Range("0 to 1", lambda number: 0 <= number <= 1)
EPSILON = Range("0 or more, at most 1", lambda number: 0 <= number <= 1)
SIZE = _up_to(10_000_000)  # of a dimension; that it is positive is checked by group
VOCABULARY = _up_to(1_000_000)
DEPTH = _up_to(10_000)  # layers, heads
TOKENS = _up_to(1_000_000_000)
PIXELS = _up_to(16_384)  # of a side
COUNT = _up_to(10_000)  # crops, patches of a window
FRAMES = _up_to(1_000_000)
RATE = _up_to(1_000, above=0)
INITIAL = Range("0 or more, at most 1000", lambda number: 0 <= number <= 1_000)
MARGIN = Range("0 or more, at most 10000", lambda number: 0 <= number <= 10_000)


@dataclass(frozen=True)
class Field:
    """One field of `config.yaml`.

    Attributes:
        kind: int, float, bool, str, or [int] / [float] for a list of them.
        default: Value where the file lacks the field; REQUIRED if there is none.
        only: The values that the target can express; empty means any.
        because: Why other values cannot be converted.
        within: Range of a number, or of each number in a list.
        nullable: Whether null is a valid value (it is if `default` is None).
    """

    kind: Any
    default: Any = REQUIRED
    only: tuple = ()
    because: str = ""
    within: Range = FACTOR

    @property
    def nullable(self) -> bool:
        return self.default is None or None in self.only


def _only(kind: Any, *values: Any, because: str, default: Any = REQUIRED) -> Field:
    return Field(kind, default, values, because)


_NO_PLACE = "the target has no such setting and would be another model"

MODEL = {
    "bi_directional_attn": _only(
        str,
        TWO_WAY_ATTENTION,
        None,
        default=None,
        because="the target lets image tokens see each other, and no others",
    ),
}
MODEL_IGNORED = {"model_name", "data_formatter", "cp_enabled", "apply_cp_to_vision_backbone", "debug"}
MODEL_IGNORED |= {"shared_low_high_embedding"}  # written by older trainers

LLM = {
    "d_model": Field(int, within=SIZE),
    "n_heads": Field(int, within=DEPTH),
    "n_kv_heads": Field(int, None, within=DEPTH),
    "head_dim": Field(int, None, within=SIZE),
    "n_layers": Field(int, within=DEPTH),
    "qkv_bias": Field(bool, False),
    "clip_qkv": _only(float, None, default=None, because="the target does not clip queries, keys and values"),
    "mlp_ratio": Field(float, 4, within=_up_to(1_000)),
    "mlp_hidden_size": Field(int, None, within=SIZE),
    "activation_type": _only(str, "swiglu", default="swiglu", because="the target's feed-forward is gated with SiLU"),
    "block_type": _only(str, "sequential", default="sequential", because="the target has sequential blocks only"),
    "rope": _only(bool, True, because="the target has rotary position embeddings only"),
    "rope_theta": Field(float, 10000.0, within=POSITIVE),
    "rope_type": _only(str, *ROPE_TYPES, default="default", because="the target does not know this rotary scaling"),
    **{f"rope_{name}": Field(kind, None) for name, kind in ROPE_FIELDS},
    "rope_factor": Field(float, None, within=POSITIVE),
    "full_attention_layers": Field([int], None),
    "sliding_attention_rope_scaling": Field(bool, False),
    "attention_layer_norm": Field(bool, False),
    "attention_layer_norm_type": _only(
        str, "olmo", "qwen3", default="olmo", because="the target knows these two norms"
    ),
    "attention_layer_norm_with_affine": _only(bool, True, default=True, because="the target's norms have weights"),
    "layer_norm_type": _only(str, "rms", because="the target's text model has RMS norms"),
    "layer_norm_with_affine": _only(bool, True, default=True, because="the target's norms have weights"),
    "layer_norm_eps": Field(float, None, within=EPSILON),
    "bias_for_layer_norm": _only(bool, None, False, default=None, because="the target's norms have no bias"),
    "include_bias": _only(bool, False, because="the target's text model has no biases but `qkv_bias`"),
    "norm_after": Field(bool, False),
    "max_sequence_length": Field(int, None, within=TOKENS),
    "max_position_embeddings": Field(int, None, within=TOKENS),
    "scale_logits": _only(bool, False, default=False, because="the target does not scale its logits"),
    "normalize_input_embeds": _only(bool, False, default=False, because="the target does not norm its embeddings"),
    "can_predict_extra_tokens": _only(
        bool, False, default=False, because="the target's output covers the base vocabulary only"
    ),
    "vocab_size": Field(int, within=VOCABULARY),
    "embedding_size": Field(int, None, within=VOCABULARY),
    "additional_vocab_size": Field(int, within=VOCABULARY),
    "weight_tying": Field(bool),
    "fix_pad_tokenizer": Field(bool, False),
    "initializer_range": Field(float, 0.02, within=INITIAL),
}
LLM_IGNORED = {
    *("rope_full_precision", "attention_type", "float32_attention", "use_position_ids"),  # how it is computed
    *("attention_dropout", "residual_dropout", "response_residual_dropout", "embedding_dropout"),  # training only
    *("moe_num_experts", "moe_top_k", "moe_mlp_impl", "moe_log_expert_assignment", "moe_shared_expert"),
    *("moe_lbl_in_fp32", "moe_interleave", "moe_loss_weight", "moe_zloss_weight", "moe_dropless"),
    *("moe_capacity_factor", "init_path", "init_incremental", "new_embedding_init_range", "init_std", "init_fn"),
    *("init_cutoff_factor", "activation_checkpoint", "compile", "tokenizer"),
    *("mm_rope", "debug"),  # written by older trainers
}

TOKENIZER = {"identifier": Field(str, None)}
TOKENIZER_IGNORED = {"tokenizer_dir"}

VIT = {
    "image_model_type": _only(str, "siglip", because="the target's vision transformer is of the SigLIP kind"),
    "image_default_input_size": Field([int], within=PIXELS),
    "image_patch_size": Field(int, within=PIXELS),
    "image_emb_dim": Field(int, within=SIZE),
    "image_num_heads": Field(int, within=DEPTH),
    "image_num_key_value_heads": Field(int, within=DEPTH),
    "image_num_layers": Field(int, within=DEPTH),
    "image_head_dim": Field(int, within=SIZE),
    "image_mlp_dim": Field(int, within=SIZE),
    "image_mlp_activations": Field(str),
    "image_num_pos": Field(int, within=SIZE),
    "image_norm_eps": Field(float, within=EPSILON),
    "initializer_range": Field(float, 0.02, within=INITIAL),
    "float32_attention": Field(bool, True),
    "resize_mode": _only(str, "siglip", because="the target resizes images the SigLIP way"),
    "normalize": _only(str, "siglip", because="the target scales pixels to -1..1"),
}
VIT_IGNORED = {
    *("image_pos_patch_size", "image_dropout_rate", "attention_dropout", "residual_dropout", "attention_type"),
    *("sdpa_backend", "activation_checkpointing", "init_path", "pad_value", "truncate_pos_ids"),
}

BACKBONE = {
    "image_pooling_2d": _only(str, "attention_meanq", because="the target pools patches this way only"),
    "image_projector": _only(str, "mlp", because="the target's projector is a gated feed-forward"),
    "image_padding_embed": _only(str, None, default=None, because="the target has no embedding of padding"),
    "pooling_attention_mask": Field(bool, False),
    "vit_layers": Field([int]),
    "skip_unused_layers": Field(bool, True),
    "use_deepstack": _only(bool, False, default=False, because=_NO_PLACE),
    "share_connector": _only(bool, False, default=False, because=_NO_PLACE),
    "image_feature_dropout": Field(float, 0.0, within=PROBABILITY),
    "image_pooling_h": _only(int, 2, None, default=None, because="older checkpoints pool 2 x 2 patches"),
    "image_pooling_w": _only(int, 2, None, default=None, because="older checkpoints pool 2 x 2 patches"),
}
BACKBONE_IGNORED = {
    *("vit", "connector_activation_checkpointing", "compile_vit", "compile_connector", "normalize_on_gpu"),
    # written by older trainers
    *("fix_image_padding", "residual_patch_features", "patch_residual", "patch_residual_thresh", "debug"),
    *("frame_embedding", "pool_size_embeds"),
}

IMAGE = {
    "crop_mode": _only(str, "overlap-and-resize-c2", because="the target cuts images this way only"),
    "max_crops": Field(int, within=COUNT),
    "max_multi_image_crops": Field(int, None, within=COUNT),
    "overlap_margins": Field([int], (4, 4), within=MARGIN),
    "pooling_h": Field(int, 2, within=COUNT),
    "pooling_w": Field(int, 2, within=COUNT),
    "multi_image_pooling_h": Field(int, None, within=COUNT),
    "multi_image_pooling_w": Field(int, None, within=COUNT),
    "use_col_tokens": Field(bool, True),
    "use_single_crop_col_tokens": Field(bool, None),
    "use_single_crop_start_token": Field(bool, True),
}
IMAGE_IGNORED = {"high_res_max_crops", "p_high_res", "max_images"}

VIDEO = {
    "max_frames": Field(int, within=FRAMES),
    "frame_sample_mode": _only(str, "uniform_last_frame", "fps", because="the target knows these two ways"),
    "max_fps": Field([float], within=RATE),
    "pooling_h": Field(int, within=COUNT),
    "pooling_w": Field(int, within=COUNT),
    "time_mode": _only(str, "per-frame-compact", because="the target writes the time before each frame"),
    "use_frame_special_tokens": Field(bool),
    "per_frame_special_token": _only(bool, True, default=True, because="the target encloses every frame in tokens"),
}
VIDEO_IGNORED = {
    *("candidate_sampling_fps", "cache_videos", "loading_method", "time_sampling", "subtitle_mode"),
    "max_subtitle_tokens",
}
PREPROCESSOR_IGNORED = {
    *("video", "image", "max_answer_len", "last_message_loss_only", "max_text_tokens", "loss_token_weighting"),
}

SECTIONS: tuple[tuple[str, dict[str, Field], set[str]], ...] = (
    ("", MODEL, MODEL_IGNORED | {"llm", "vision_backbone", "mm_preprocessor"}),
    ("llm", LLM, LLM_IGNORED),
    ("llm.tokenizer", TOKENIZER, TOKENIZER_IGNORED),
    ("vision_backbone", BACKBONE, BACKBONE_IGNORED),
    ("vision_backbone.vit", VIT, VIT_IGNORED),
    ("mm_preprocessor", {}, PREPROCESSOR_IGNORED),
    ("mm_preprocessor.image", IMAGE, IMAGE_IGNORED),
    ("mm_preprocessor.video", VIDEO, VIDEO_IGNORED),
)

# The chat template writes this format; a model trained on another one converts with a warning.
PROMPT_FORMAT = {"message_format": "qwen3", "system_prompt": "demo_or_style_v2", "prompt_templates": "none"}


@dataclass(frozen=True)
class NativeConfig:
    """Checked settings of the model; each section keeps the trainer's names.

    Attributes:
        max_positions: Maximum sequence length in tokens, after an override.
        has_two_way_images: Whether image tokens attend to each other in both directions.
        warnings: Messages for the user that do not stop the conversion.
    """

    llm: dict[str, Any]
    vit: dict[str, Any]
    backbone: dict[str, Any]
    image: dict[str, Any]
    video: dict[str, Any]
    tokenizer: str | None
    max_positions: int
    has_two_way_images: bool
    warnings: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the text model."""
        given = self.llm["head_dim"]
        return self.llm["d_model"] // self.llm["n_heads"] if given is None else given

    @property
    def num_kv_heads(self) -> int:
        given = self.llm["n_kv_heads"]
        return self.llm["n_heads"] if given is None else given

    @property
    def fused_mlp_size(self) -> int:
        """Rows of `ff_proj`: up and gate."""
        given = self.llm["mlp_hidden_size"]
        return int(self.llm["mlp_ratio"] * self.llm["d_model"]) if given is None else given

    @property
    def embedding_rows(self) -> int:
        """Rows of `wte.embedding`; the ids of the extra tokens begin here."""
        given = self.llm["embedding_size"]
        return self.llm["vocab_size"] if given is None else given

    @property
    def tokenizer_size(self) -> int:
        """Number of tokens that the tokenizer is padded to before the extra ones."""
        return self.embedding_rows if self.llm["fix_pad_tokenizer"] else self.llm["vocab_size"]

    @property
    def num_vit_layers(self) -> int:
        """Layers of the vision transformer up to the deepest one whose output is used."""
        depth = self.vit["image_num_layers"]
        return max(layer % depth for layer in self.backbone["vit_layers"]) + 1


def parse_config(
    model: dict[str, Any], *, max_positions: int | None = None, ignored_fields: Collection[str] = ()
) -> NativeConfig:
    """Read the `model` section of a `config.yaml`.

    Args:
        model: The section.
        max_positions: Maximum sequence length, instead of the file's.
        ignored_fields: Unknown fields to accept, as dotted paths ("llm.new_switch").
    Raises:
        UnsupportedError: For everything the target cannot express, all of it in one message.
    """
    _ensure_molmo2(model)
    problems: list[str] = []
    sections = {
        path: _read_section(_section_at(model, path), path, fields, known | _names_at(ignored_fields, path), problems)
        for path, fields, known in SECTIONS
    }
    llm, vit, backbone = sections["llm"], sections["vision_backbone.vit"], sections["vision_backbone"]
    image, video = sections["mm_preprocessor.image"], sections["mm_preprocessor.video"]
    positions = _first_not_none(max_positions, llm["max_position_embeddings"], llm["max_sequence_length"])
    if positions is None:
        problems.append("llm.max_position_embeddings and llm.max_sequence_length are not set; pass --max-model-len")
    elif positions < 1:
        problems.append(
            f"llm.max_position_embeddings, or else llm.max_sequence_length, is {positions}; "
            "expected a positive number, or pass --max-model-len"
        )
    if _is_complete(llm, LLM):
        _check_text(llm, problems)
    if _is_complete(vit, VIT) and _is_complete(backbone, BACKBONE):
        _check_vision(vit, backbone, problems)
    if _is_complete(image, IMAGE) and _is_complete(video, VIDEO):
        _check_media(image, video, problems)
    if problems:
        raise UnsupportedError(f"This checkpoint cannot be converted to Molmo2:\n{listing(problems)}")
    return NativeConfig(
        llm=llm,
        vit=vit,
        backbone=backbone,
        image=image,
        video=video,
        tokenizer=sections["llm.tokenizer"]["identifier"],
        max_positions=positions,
        has_two_way_images=sections[""]["bi_directional_attn"] == TWO_WAY_ATTENTION,
        warnings=_warnings(model, sections[""]),
    )


def _is_complete(section: dict[str, Any], fields: dict[str, Field]) -> bool:
    """Whether every field has a valid value, so that fields can be compared with each other."""
    return all(section[name] is not None or field.nullable for name, field in fields.items())


def _first_not_none(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _ensure_molmo2(model: dict[str, Any]) -> None:
    name = model.get("model_name")
    if isinstance(name, str) and name in OTHER_MODELS:
        raise UnsupportedError(f"model_name is '{name}': {OTHER_MODELS[name]}.")
    if name != MODEL_NAME:
        raise UnsupportedError(f"model_name is {shown(name)}; expected '{MODEL_NAME}', the trainer's name of Molmo2.")


def _warnings(model: dict[str, Any], top: dict[str, Any]) -> tuple[str, ...]:
    warnings = []
    if top["bi_directional_attn"] is None:
        warnings.append(
            "bi_directional_attn is null: the model was trained with causal attention among image tokens, but the "
            "processor marks them for two-way attention. Set `inputs['token_type_ids']` to zero before calling the "
            "model to get the trained behaviour. Serving engines that cannot do this compute a different model."
        )
    formatter = model.get("data_formatter")
    formatter = formatter if isinstance(formatter, dict) else {}
    for name, expected in PROMPT_FORMAT.items():
        if formatter.get(name, expected) != expected:
            warnings.append(
                f"data_formatter.{name} is {shown(formatter[name])}, but the chat template writes '{expected}'. "
                "Edit chat_template.jinja to what the model was trained on."
            )
    return tuple(warnings)


def _section_at(model: dict[str, Any], path: str) -> Any:
    """The section at a dotted path; None if it, or a parent, is not a section."""
    section: Any = model
    for name in filter(None, path.split(".")):
        section = section.get(name) if isinstance(section, dict) else None
    return section


def _names_at(full_names: Collection[str], path: str) -> set[str]:
    """Last parts of those dotted names that lie in the section at `path`."""
    return {name.rpartition(".")[2] for name in full_names if name.rpartition(".")[0] == path}


def _read_section(
    section: Any, path: str, fields: dict[str, Field], known: set[str], problems: list[str]
) -> dict[str, Any]:
    """Values of all fields of one section; None for an invalid one, which is added to `problems`."""
    if not isinstance(section, dict):
        problems.append(f"{path} is {'missing' if section is None else shown(section)}; expected a section")
        return dict.fromkeys(fields)
    prefix = f"{path}." if path else ""
    for name in section:
        if name not in fields and name not in known:
            where = f"{prefix}{name if isinstance(name, str) and len(name) < 100 else shown(name)}"
            problems.append(
                f"{where} is unknown (value {shown(section[name], 60)}); "
                f"if it does not affect the model, pass --ignore-field {where}"
            )
    return {name: _read_field(section, name, prefix, field, problems) for name, field in fields.items()}


def _read_field(section: dict[str, Any], name: str, prefix: str, field: Field, problems: list[str]) -> Any:
    if name not in section:
        if field.default is REQUIRED:
            problems.append(f"{prefix}{name} is missing, and no default is safe; add it to config.yaml")
            return None
        return list(field.default) if isinstance(field.default, tuple) else field.default
    value = section[name]
    if value is None and field.nullable:
        return None
    try:
        value = _typed(value, field.kind)
    except (TypeError, ValueError, OverflowError):
        problems.append(f"{prefix}{name} is {shown(value)}; expected {_kind_name(field.kind)}")
        return None
    if field.only and value not in field.only:
        allowed = " or ".join("null" if choice is None else repr(choice) for choice in field.only)
        problems.append(f"{prefix}{name} is {shown(value)}; only {allowed} can be converted: {field.because}")
    numbers = value if isinstance(value, list) else [value]
    if not all(field.within.holds(number) for number in numbers if isinstance(number, (int, float))):
        problems.append(f"{prefix}{name} is {shown(value)}; expected {field.within.words}")
    return value


def _typed(value: Any, kind: Any) -> Any:
    if isinstance(kind, list):
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return [_typed(item, kind[0]) for item in value]
    if kind is float and not isinstance(value, bool):
        number = value if isinstance(value, (int, float)) else float(value)  # YAML reads 1e-6 as a string
        if not math.isfinite(number):
            raise ValueError
        return number
    if type(value) is not kind:
        raise TypeError
    return value


def _kind_name(kind: Any) -> str:
    names: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return f"a list ({names[kind[0]]} each)" if isinstance(kind, list) else names[kind]


Section = dict[str, Any]


def _check_positive(section: Section, path: str, names: tuple[str, ...], problems: list[str]) -> bool:
    wrong = [name for name in names if section[name] is not None and section[name] < 1]
    problems.extend(f"{path}{name} is {section[name]}; expected a positive number" for name in wrong)
    return not wrong


def _check_text(llm: Section, problems: list[str]) -> None:
    sizes = ("d_model", "n_heads", "n_kv_heads", "head_dim", "n_layers", "vocab_size", "embedding_size", "mlp_ratio")
    if not _check_positive(llm, "llm.", (*sizes, "mlp_hidden_size"), problems):
        return
    kv_heads = _first_not_none(llm["n_kv_heads"], llm["n_heads"])
    if llm["n_heads"] % kv_heads:
        problems.append(f"llm.n_heads is {llm['n_heads']}, which {kv_heads} key/value heads do not divide")
    if llm["head_dim"] is None and llm["d_model"] % llm["n_heads"]:
        problems.append(
            f"llm.head_dim is null, and {llm['n_heads']} heads do not divide llm.d_model, {llm['d_model']}"
        )
    fused = _first_not_none(llm["mlp_hidden_size"], llm["mlp_ratio"] * llm["d_model"])
    if fused % 2:
        problems.append(f"llm.mlp_hidden_size (or mlp_ratio x d_model) is {fused}; up and gate need an even number")
    if llm["additional_vocab_size"] < NUM_EXTRA_TOKENS:
        problems.append(
            f"llm.additional_vocab_size is {llm['additional_vocab_size']}; "
            f"the {NUM_EXTRA_TOKENS} extra tokens need a row each"
        )
    layers = _first_not_none(llm["full_attention_layers"], [])
    outside = [layer for layer in layers if not 0 <= layer < llm["n_layers"]]
    if outside:
        problems.append(
            f"llm.full_attention_layers names {shown(outside)}; there are layers 0 to {llm['n_layers'] - 1}"
        )


def _check_vision(vit: Section, backbone: Section, problems: list[str]) -> None:
    path = "vision_backbone.vit."
    sizes = tuple(f"image_{name}" for name in ("patch_size", "emb_dim", "num_heads", "num_key_value_heads"))
    sizes += tuple(f"image_{name}" for name in ("num_layers", "head_dim", "mlp_dim", "num_pos"))
    if not _check_positive(vit, path, sizes, problems):
        return
    size, patch, depth = vit["image_default_input_size"], vit["image_patch_size"], vit["image_num_layers"]
    if len(size) != 2 or any(side < patch or side % patch for side in size):
        problems.append(
            f"{path}image_default_input_size is {shown(size)}; expected (height, width) in multiples of {patch}"
        )
    layers = backbone["vit_layers"]
    if not layers or any(not -depth <= layer < depth for layer in layers):
        problems.append(f"vision_backbone.vit_layers is {shown(layers)}; expected layers from {-depth} to {depth - 1}")


def _check_media(image: Section, video: Section, problems: list[str]) -> None:
    path = "mm_preprocessor.image."
    several = _first_not_none(image["max_multi_image_crops"], image["max_crops"])
    if several != image["max_crops"]:
        problems.append(
            f"{path}max_crops is {image['max_crops']} and max_multi_image_crops is {several}; "
            "the target has one number for one and for several images"
        )
    for side in ("h", "w"):
        single = image[f"pooling_{side}"]
        multi = _first_not_none(image[f"multi_image_pooling_{side}"], single)
        if multi != single:
            problems.append(
                f"{path}pooling_{side} is {single} and multi_image_pooling_{side} is {multi}; "
                "the target pools one and several images alike"
            )
    if len(image["overlap_margins"]) != 2:
        problems.append(f"{path}overlap_margins is {shown(image['overlap_margins'])}; expected two numbers of patches")
    if len(video["max_fps"]) != 1:
        problems.append(
            f"mm_preprocessor.video.max_fps is {shown(video['max_fps'])}; "
            "the target has exactly one densest frame rate"
        )
    _check_positive(image, path, ("max_crops", "pooling_h", "pooling_w"), problems)
    _check_positive(video, "mm_preprocessor.video.", ("max_frames", "pooling_h", "pooling_w"), problems)
