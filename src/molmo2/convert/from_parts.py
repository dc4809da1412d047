"""A Molmo2 of any size from a text model and a vision transformer: folders of transformers in, fresh connector.

    build_from_parts(Parts("Qwen3-4B-Instruct-2507", "siglip2-so400m-patch14-384"), "molmo2-new")

The parts are described as a native checkpoint, so that everything after that is the conversion: weights stream from
the given files, and a fused matrix is its parts one after the other. What no part has, the connector and the rows of
Molmo2's own tokens, is drawn from a seed. Every setting of the parts is known, has the one value that Molmo2 can
express, or is refused by name.
"""

import json
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from molmo2.convert.conversion import ConversionOptions, ConversionPlan, plan_source, write_plan
from molmo2.convert.errors import CheckpointError, UnsupportedError, listing, shown
from molmo2.convert.folder import read_folder
from molmo2.convert.names import expected_renames, match
from molmo2.convert.native_config import ROPE_FIELDS, ROPE_TYPES, NativeConfig, parse_config
from molmo2.convert.reader import CheckpointLocation, Piece, SourceTensor
from molmo2.convert.small_files import read_json
from molmo2.convert.source import NativeSource
from molmo2.convert.staging import ensure_disjoint, ensure_replaceable
from molmo2.convert.to_native import default_section

INITIAL_STD = 0.02  # of fresh matrices and token rows
EXTRA_ROWS = 128  # for Molmo2's tokens, as published; 14 are used
VIT_LAYERS = (-3, -9)
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
# Values of the published models, where the trainer has no default.
PREPROCESSOR: dict[str, dict[str, Any]] = {
    "image": {"max_crops": 8, "use_single_crop_col_tokens": False},
    "video": {"max_frames": 384, "max_fps": [2.0], "pooling_h": 3, "pooling_w": 3, "use_frame_special_tokens": False},
}


@dataclass(frozen=True)
class TextFamily:
    """What distinguishes a family of text models.

    Attributes:
        settings: Native settings that follow from the family.
        fixed: Settings of config.json that have no place in Molmo2, with the values that change nothing.
        norms: Names of the norms of attention and feed-forward.
    """

    settings: Mapping[str, Any]
    fixed: Mapping[str, tuple]
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")


_PLAIN: Mapping[str, tuple] = {
    "attention_bias": (False, None),
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
}
_AFTER = {"norm_after": True, "attention_layer_norm": True, "attention_layer_norm_type": "olmo"}
_AFTER_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    "qwen3": TextFamily({"attention_layer_norm": True, "attention_layer_norm_type": "qwen3"}, _PLAIN),
    "qwen2": TextFamily({"qkv_bias": True}, _PLAIN),
    "llama": TextFamily({}, _PLAIN),
    "mistral": TextFamily({}, _PLAIN),
    "olmo2": TextFamily(_AFTER, _PLAIN, _AFTER_NORMS),
    "olmo3": TextFamily(_AFTER, _PLAIN, _AFTER_NORMS),
}
# Keys of the parts' config.json that are read below, or that change nothing in a forward pass.
TEXT_READ = {
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "max_window_layers"),
}
NEUTRAL = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map"),
}
VISION_READ = {
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "num_patches", "patch_size", "hidden_act", "layer_norm_eps"),
}
# The library's, which it does not write.
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
VISION_GRIDS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"image_size": 224},
    "siglip2_vision_model": {"num_patches": 256},
}
VISION_UNUSED = {"vision_use_head", "projection_dim", "projection_size", "initializer_factor"}
# Tensors of a SigLIP folder that belong to its own pooling or its text side.
VISION_DROPPED = ("head.", "post_layernorm.")
OTHER_SIDE = ("text_model.", "logit_scale", "logit_bias")
VISION_NAMES = {
    "attention_norm": "layer_norm1",
    "ffn_norm": "layer_norm2",
    "feed_forward.w1": "mlp.fc1",
    "feed_forward.w2": "mlp.fc2",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.out_proj",
}
PATCHES = "vision_backbone.image_vit.patch_embedding.weight"


@dataclass(frozen=True)
class PartsSource(NativeSource):
    """Two folders and a seed, as a native checkpoint."""

    vision: Path = Path()
    seed: int = 0
    is_from_parts: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.location.folder.resolve().name} + {self.vision.resolve().name}"

    @property
    def description(self) -> str:
        return f"{self.location.folder} and {self.vision}, fresh connector of seed {self.seed}"

    @property
    def origin(self) -> str:
        return "Built from the text model and the vision transformer below, with an untrained connector"


@dataclass(frozen=True)
class Parts:
    """What a model is built from.

    Attributes:
        llm: Folder of a text model: Qwen3, Qwen2, Llama, Mistral, OLMo 2 or 3.
        vision: Folder of a SigLIP or SigLIP 2, whole or its vision part.
        seed: Of the fresh values; each tensor has a stream of its own.
        vit_layers: Layers of the vision transformer whose outputs are used; negative ones count from its depth.
    """

    llm: str | Path
    vision: str | Path
    seed: int = 0
    vit_layers: tuple[int, ...] = VIT_LAYERS


@contextmanager
def open_parts(
    parts: Parts, *, max_positions: int | None = None, ignored_fields: Collection[str] = ()
) -> Iterator[PartsSource]:
    """Context with the parts as a checkpoint; what is new lies in a temporary folder until it ends.

    Args:
        max_positions: Maximum sequence length in tokens, instead of the text model's.
        ignored_fields: Unknown keys of the parts' config.json, and unknown tensors of the text model, to accept.

    Raises:
        CheckpointError: A folder or file is missing or damaged.
        UnsupportedError: Molmo2 cannot express a part; the reasons in one message.
    """
    llm, vision = Path(parts.llm), Path(parts.vision)
    text_config, vision_config = _part_config(llm), vision_settings(_part_config(vision))
    section, warnings = settings_of_parts(llm, text_config, vision_config, parts.vit_layers, ignored_fields)
    config = parse_config(section, max_positions=max_positions)
    config = replace(config, warnings=(*config.warnings, *warnings, _untrained(parts.seed)))
    text = _text_tensors(llm, text_config["model_type"], config, ignored_fields)
    wanted = {rename.native: rename.shape for rename in expected_renames(config)}
    vit, patches = _vision_tensors(vision, config, wanted)
    with tempfile.TemporaryDirectory(prefix="molmo2-parts-") as scratch:
        fresh = [name for name in wanted if name not in text and name not in vit]
        made = _write_made(Path(scratch) / "made.bin", wanted, fresh, parts.seed, patches)
        found = {**text, **vit, **made}
        renames = match({name: tensor.shape for name, tensor in found.items()}, config)
        kept = {name: found[name] for name in wanted}
        location = CheckpointLocation(llm, None, False)
        yield PartsSource(location, section, config, kept, renames, vision, parts.seed)


def build_from_parts(
    parts: Parts,
    output: str | Path,
    options: ConversionOptions | None = None,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], object] | None = None,
    warn: Callable[[str], object] | None = None,
) -> ConversionPlan:
    """Write a folder that transformers loads; arguments as for `open_parts` and `convert_checkpoint`.

    The tokenizer is that of the text model's folder, filled up to the rows of its embedding and extended by Molmo2's
    tokens, unless the options name another.
    """
    options = ConversionOptions() if options is None else options
    ensure_disjoint([Path(output)], [Path(parts.llm), Path(parts.vision)])
    ensure_replaceable(Path(output), overwrite)
    opened = open_parts(parts, max_positions=options.max_model_len, ignored_fields=options.ignored_fields)
    with opened as source:
        plan = plan_parts(source, options)
        write_plan(plan, output, overwrite=overwrite, on_progress=on_progress, warn=warn)
    return plan


def plan_parts(source: PartsSource, options: ConversionOptions) -> ConversionPlan:
    """The plan of the conversion, with the tokenizer of the text model and no data sets unless they are named."""
    folder = source.location.folder
    tokenizer = str(folder) if options.tokenizer is None else options.tokenizer
    data_sets = () if options.data_sets is None else options.data_sets
    options = replace(options, tokenizer=tokenizer, data_sets=data_sets)
    plan = plan_source(source, options, {folder, source.vision})
    known = json.loads(plan.tokenizer.files["added_tokens.json"])
    missing = [token for token in TURN_TOKENS if token not in known]
    if not missing:
        return plan
    warning = (
        f"The tokenizer has no {' and no '.join(missing)}, with which the chat template opens and closes turns: they "
        "become ordinary text, and answers do not end there. Add them to the text model first, or edit "
        "chat_template.jinja."
    )
    config = replace(source.config, warnings=(*source.config.warnings, warning))
    return replace(plan, source=replace(source, config=config))


def _untrained(seed: int) -> str:
    return (
        f"The connector between vision and text, and the rows of Molmo2's tokens, are fresh (seed {seed}): answers "
        "about images and videos are noise until they are trained."
    )


# --- settings


def _part_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Download the part first: hf download REPO --local-dir DIR.")
    return read_json(folder / "config.json")


def vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the vision part, of a whole SigLIP or alone, with the defaults that files leave out."""
    if isinstance(config.get("vision_config"), dict):
        config = {"model_type": f"{config.get('model_type')}_vision_model", **config["vision_config"]}
    return {**VISION_DEFAULTS, **VISION_GRIDS.get(str(config.get("model_type")), {}), **config}


def settings_of_parts(
    llm: Path, text: dict[str, Any], vision: dict[str, Any], vit_layers: Sequence[int], ignored: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The native `model` section, and what the user should know."""
    problems: list[str] = []
    warnings: list[str] = []
    section = default_section()
    section["llm"].update(_text_section(text, ignored, problems, warnings))
    _checked_vision(vision, ignored, problems)
    if problems:
        raise UnsupportedError(f"Molmo2 cannot be built from these parts:\n{listing(problems)}")
    section["llm"]["tokenizer"] = {"identifier": llm.resolve().name}
    section["vision_backbone"]["vit"].update(_vision_section(vision))
    section["vision_backbone"].update(vit_layers=list(vit_layers), pooling_attention_mask=True)
    for name, values in PREPROCESSOR.items():
        section["mm_preprocessor"][name].update(values)
    return section, warnings


def _unknown(part: str, config: dict[str, Any], known: set[str], ignored: Collection[str]) -> list[str]:
    from transformers import PretrainedConfig  # not needed for --help

    known = known | NEUTRAL | set(PretrainedConfig().to_dict())
    return [
        f"{part}: `{name}` is unknown (value {shown(value, 60)}); if it does not affect the model, pass "
        f"--ignore-field {name}"
        for name, value in config.items()
        if name not in known and name not in ignored
    ]


def _text_section(
    config: dict[str, Any], ignored: Collection[str], problems: list[str], warnings: list[str]
) -> dict[str, Any]:
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        problems.append(f"--llm: model_type is {shown(kind)}; expected one of {', '.join(FAMILIES)}")
        return {}
    problems += [
        f"--llm: `{name}` is {shown(config[name])}; only {shown(allowed[0])} can be expressed"
        for name, allowed in family.fixed.items()
        if name in config and config[name] not in allowed
    ]
    problems += _unknown("--llm", config, TEXT_READ | set(family.fixed), ignored)
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [name for name in (*required, "rms_norm_eps", "max_position_embeddings") if name not in config]
    if missing:
        problems.append(f"--llm: config.json lacks {', '.join(missing)}")
        return {}
    window = config.get("sliding_window")
    slides = "sliding_attention" in (config.get("layer_types") or []) or (kind == "mistral" and window is not None)
    if slides:
        warnings.append(
            f"The text model looks back at most {window} tokens in some layers; Molmo2 has no such window, so longer "
            "sequences give other values than the text model did (as in Molmo2-O-7B)."
        )
    return {
        **family.settings,
        **_rope(config, problems),
        "d_model": config["hidden_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "n_layers": config["num_hidden_layers"],
        "mlp_hidden_size": 2 * config["intermediate_size"],
        "layer_norm_eps": config["rms_norm_eps"],
        "layer_norm_type": "rms",
        "max_position_embeddings": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "embedding_size": config["vocab_size"],
        "additional_vocab_size": EXTRA_ROWS,
        "weight_tying": bool(config.get("tie_word_embeddings", False)),
        "fix_pad_tokenizer": True,
    }


def _rope(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Rotary settings, out of `rope_parameters` (one for all layers, or one for each type) or the older two keys."""
    types = config.get("layer_types") or []
    full = [number for number, kind in enumerate(types) if kind == "full_attention"]
    has_two_tables = config["model_type"] == "olmo3"
    given = config.get("rope_parameters")
    if given is None:
        given = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    elif any(isinstance(value, dict) for value in given.values()):
        sliding = given.get("sliding_attention") or {}
        given = given.get("full_attention") or sliding
        is_plain = sliding.get("rope_type", "default") == "default"
        if not is_plain or sliding.get("rope_theta", given.get("rope_theta")) != given.get("rope_theta"):
            problems.append("--llm: layers with sliding attention have a rotary base or scaling of their own")
    scaling = {name: value for name, value in given.items() if name not in ("rope_theta", "type")}
    kind = scaling.pop("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        problems.append(f"--llm: the rotary scaling {shown(kind)} is none of {', '.join(ROPE_TYPES)}")
    names = {name for name, _ in ROPE_FIELDS}
    scaling = {name: value for name, value in scaling.items() if value is not None}
    unknown = sorted(set(scaling) - names - {"partial_rotary_factor"})
    if unknown or scaling.pop("partial_rotary_factor", 1) != 1:
        problems.append(f"--llm: rotary settings {shown(unknown or ['partial_rotary_factor'])} cannot be expressed")
    if kind in ("yarn", "llama3"):
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    found = {"rope_theta": given.get("rope_theta", 10000.0), "rope_type": kind}
    if kind != "default":
        found |= {f"rope_{name}": value for name, value in scaling.items()}
        found["full_attention_layers"] = full if has_two_tables else None
    return found


def _checked_vision(config: dict[str, Any], ignored: Collection[str], problems: list[str]) -> None:
    kind = config.get("model_type")
    if kind not in VISION_GRIDS:
        problems.append(f"--vision: model_type is {shown(kind)}; expected one of {', '.join(VISION_GRIDS)}")
        return
    problems += _unknown("--vision", config, VISION_READ | VISION_UNUSED, ignored)
    if config["num_channels"] != 3:
        problems.append(f"--vision: `num_channels` is {shown(config['num_channels'])}; Molmo2 sees three")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    wrong = [name for name in names if type(config.get(name)) is not int or config[name] < 1]
    problems += [f"--vision: `{name}` is {shown(config.get(name))}; expected a positive integer" for name in wrong]
    if not wrong and config["hidden_size"] % config["num_attention_heads"]:
        problems.append("--vision: `num_attention_heads` does not divide `hidden_size`")
    if not wrong and _grid_side(config) is None:
        problems.append("--vision: the patches of an image make up no square (`image_size` or `num_patches`)")


def _grid_side(config: dict[str, Any]) -> int | None:
    """Patches along a side of the square that the position vectors are for."""
    size, patches = config.get("image_size"), config.get("num_patches")
    if config["model_type"] == "siglip_vision_model":
        return size // config["patch_size"] if type(size) is int and size >= config["patch_size"] else None
    side = round(patches**0.5) if type(patches) is int and patches > 0 else 0
    return side if side and side * side == patches else None


def _vision_section(config: dict[str, Any]) -> dict[str, Any]:
    side, heads = _grid_side(config) or 0, config["num_attention_heads"]
    return {
        "image_default_input_size": [side * config["patch_size"]] * 2,
        "image_patch_size": config["patch_size"],
        "image_emb_dim": config["hidden_size"],
        "image_num_heads": heads,
        "image_num_key_value_heads": heads,
        "image_num_layers": config["num_hidden_layers"],
        "image_head_dim": config["hidden_size"] // heads,
        "image_mlp_dim": config["intermediate_size"],
        "image_mlp_activations": config["hidden_act"],
        "image_num_pos": side * side,
        "image_norm_eps": config["layer_norm_eps"],
    }


# --- tensors


def _joined(name: str, parts: Sequence[SourceTensor]) -> SourceTensor:
    """A matrix whose rows are those of the parts, one after the other.

    Raises:
        UnsupportedError: dtypes or widths differ.
    """
    first = parts[0]
    if any(part.dtype != first.dtype or part.shape[1:] != first.shape[1:] for part in parts):
        found = ", ".join(f"'{part.name}' {part.dtype} {part.shape}" for part in parts)
        raise UnsupportedError(f"These belong into one matrix, but differ: {found}.")
    rows = sum(part.shape[0] for part in parts)
    pieces = tuple(piece for part in parts for piece in part.pieces)
    return SourceTensor(name, (rows, *first.shape[1:]), first.dtype, pieces)


def _text_names(family: TextFamily, config: NativeConfig) -> dict[str, tuple[str, ...]]:
    """Native name -> names in the folder of the text model, whose rows follow one another."""
    attention_norm, mlp_norm = family.norms
    names: dict[str, tuple[str, ...]] = {
        "transformer.wte.embedding": ("model.embed_tokens.weight",),
        "transformer.ln_f.weight": ("model.norm.weight",),
    }
    if not config.llm["weight_tying"]:
        names["transformer.ff_out.weight"] = ("lm_head.weight",)
    kinds = ["weight", "bias"] if config.llm["qkv_bias"] else ["weight"]
    for layer in range(config.llm["n_layers"]):
        native, own = f"transformer.blocks.{layer}.", f"model.layers.{layer}."
        for kind in kinds:
            names[f"{native}att_proj.{kind}"] = tuple(f"{own}self_attn.{part}_proj.{kind}" for part in "qkv")
        names[f"{native}attn_out.weight"] = (f"{own}self_attn.o_proj.weight",)
        names[f"{native}ff_proj.weight"] = (f"{own}mlp.up_proj.weight", f"{own}mlp.gate_proj.weight")
        names[f"{native}ff_out.weight"] = (f"{own}mlp.down_proj.weight",)
        names[f"{native}attn_norm.weight"] = (f"{own}{attention_norm}.weight",)
        names[f"{native}ff_norm.weight"] = (f"{own}{mlp_norm}.weight",)
        if config.llm["attention_layer_norm"]:
            names |= {f"{native}{part}_norm.weight": (f"{own}self_attn.{part}_norm.weight",) for part in "qk"}
    return names


def _text_tensors(folder: Path, kind: str, config: NativeConfig, ignored: Collection[str]) -> dict[str, SourceTensor]:
    found = read_folder(folder)
    if config.llm["n_layers"] > len(found):
        raise UnsupportedError(f"{folder} names {config.llm['n_layers']} layers, but has {len(found)} tensors in all.")
    names = _text_names(FAMILIES[kind], config)
    used = {own for parts in names.values() for own in parts}
    spare = {"lm_head.weight"} if config.llm["weight_tying"] else set()  # some files hold the tied copy
    problems = [f"'{own}' is missing" for own in sorted(used - set(found))]
    problems += [
        f"'{name}' of shape {found[name].shape} is unknown to a '{kind}' text model; if it does not "
        f"affect the model, pass --ignore-field {name}"
        for name in sorted(set(found) - used - spare - set(ignored))
        if not name.endswith("rotary_emb.inv_freq")  # recomputed
    ]
    if problems:
        raise UnsupportedError(f"The tensors of {folder} are not those of its config.json:\n{listing(problems)}")
    return {native: _joined(native, [found[own] for own in parts]) for native, parts in names.items()}


def _vision_tensors(
    folder: Path, config: NativeConfig, wanted: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, SourceTensor], SourceTensor]:
    """The tensors that are copied as they are, and the patch matrix."""
    found = read_folder(folder)
    ending = "embeddings.patch_embedding.weight"
    prefixes = [name.removesuffix(ending) for name in found if name.endswith(ending)]
    if len(prefixes) != 1:
        raise UnsupportedError(f"{folder} has {len(prefixes)} tensors '...{ending}'; expected that of one SigLIP.")
    own = {name.removeprefix(prefixes[0]): tensor for name, tensor in found.items() if name.startswith(prefixes[0])}
    root = "vision_backbone.image_vit."
    names = {
        f"{root}positional_embedding": "embeddings.position_embedding.weight",
        f"{root}patch_embedding.bias": "embeddings.patch_embedding.bias",
    }
    for layer in range(config.vit["image_num_layers"]):
        for part, source in VISION_NAMES.items():
            for kind in ("weight", "bias"):
                native = f"{root}transformer.resblocks.{layer}.{part}.{kind}"
                names[native] = f"encoder.layers.{layer}.{source}.{kind}"
    problems = [f"'{prefixes[0]}{name}' is missing" for name in names.values() if name not in own]
    rest = set(own) - set(names.values()) - {ending}
    rest = {f"{prefixes[0]}{name}" for name in rest if not name.startswith(VISION_DROPPED)}
    rest |= {name for name in found if not name.startswith((prefixes[0], *OTHER_SIDE))}
    problems += [f"'{name}' of shape {found[name].shape} is unknown to a SigLIP" for name in sorted(rest)]
    if problems:
        raise UnsupportedError(f"The tensors of {folder} are not those of its config.json:\n{listing(problems)}")
    copied = {native: own[name] for native, name in names.items() if native in wanted}
    return {native: replace(tensor, name=native) for native, tensor in copied.items()}, own[ending]


def _patch_rows(tensor: SourceTensor, patch: int) -> bytes:
    """The patch matrix with its columns ordered row, column, channel: SigLIP convolves (channel, row, column)."""
    piece = tensor.pieces[0]
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        data = file.read(piece.num_bytes)
    if len(tensor.shape) == 2:  # SigLIP 2 with images of any shape: already so
        return data
    if tensor.shape[1:] != (3, patch, patch):
        raise UnsupportedError(f"'{tensor.name}' has shape {tensor.shape}; expected (width, 3, {patch}, {patch}).")
    items = np.frombuffer(data, np.uint16 if tensor.dtype == "bfloat16" else np.uint32)
    return np.ascontiguousarray(items.reshape(tensor.shape).transpose(0, 2, 3, 1)).tobytes()


def _fresh(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal values for matrices, zeros for biases, float32."""
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.standard_normal(shape, np.float32) * np.float32(INITIAL_STD)


def _write_made(
    path: Path, wanted: Mapping[str, tuple[int, ...]], fresh: Sequence[str], seed: int, patches: SourceTensor
) -> dict[str, SourceTensor]:
    """Write what no file of the parts holds as it is needed, one tensor after the other."""
    made: dict[str, SourceTensor] = {}
    with open(path, "wb") as file:
        for name in fresh:
            is_patches = name == PATCHES
            if is_patches:
                patch = round((wanted[name][1] // 3) ** 0.5)
                data, dtype = _patch_rows(patches, patch), patches.dtype
            else:
                data, dtype = _fresh(name, wanted[name], seed).tobytes(), "float32"
            piece = Piece(path, file.tell(), len(data), zlib.crc32(data))
            shape = (patches.shape[0], len(data) // patches.shape[0] // (2 if dtype == "bfloat16" else 4))
            made[name] = SourceTensor(name, shape if is_patches else wanted[name], dtype, (piece,))
            file.write(data)
    return made
