"""Converting back: a converted folder, tuned in transformers or not, becomes a native training checkpoint."""

import copy
import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from molmo2.convert import config_files, native_config
from molmo2.convert.conversion import NATIVE_CONFIG_FILE, report_weights
from molmo2.convert.errors import CheckpointError, UnsupportedError, listing, shown
from molmo2.convert.folder import read_folder
from molmo2.convert.library_folder import cut_embedding, read_settings
from molmo2.convert.names import ensure_layers, expected_renames
from molmo2.convert.native_config import REQUIRED, SECTIONS, Field, NativeConfig, parse_config
from molmo2.convert.numerics import BlockConverter
from molmo2.convert.reader import CONFIG_FILE, UNSHARDED_FILE, SourceTensor
from molmo2.convert.small_files import read_model_section
from molmo2.convert.staging import Staging
from molmo2.convert.tokenizer import EXTRA_TOKENS
from molmo2.convert.torch_writer import stored_bytes, write_torch_file

COMPARED_FILES: dict[str, Callable[[NativeConfig], dict[str, Any]]] = {
    "processor_config.json": config_files.processor_config,
    "preprocessor_config.json": config_files.preprocessor_config,
    "video_preprocessor_config.json": config_files.video_preprocessor_config,
}
PARTS = ("text_config", "vit_config", "adapter_config")
# Keys of config.json that a native configuration lacks or has elsewhere.
FREE_KEYS = {
    *(
        "auto_map",
        "processor_class",
        "image_processor_type",
        "video_processor_type",
        "attn_implementation",
        "use_cache",
    ),
    *("attention_dropout", "residual_dropout", "embedding_dropout", "initializer_range"),
}
CONNECTOR = ("vit_layers", "pooling_attention_mask", "image_feature_dropout")  # named alike on both sides


def write_native(
    folder: str | Path,
    output: str | Path,
    *,
    native_config_path: str | Path | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    ignored_fields: Collection[str] = (),
    overwrite: bool = False,
    on_progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Write an unsharded native checkpoint: `model.pt` and a `config.yaml` with the section `model`.

    Every tensor keeps its bytes. Layers of the vision transformer that a conversion dropped stay dropped, and
    `skip_unused_layers` says so. The output matrix is left out where the model is tied and it still equals the
    embedding.

    Args:
        folder: Converted folder, or one that transformers saved from it, also with its own Molmo2 class.
        output: Checkpoint directory to make; it appears complete or not at all.
        native_config_path: A native `config.yaml` for the settings that converted files lack (prompt format, training
            switches). By default the folder's own `native_config.yaml`, else the trainer's defaults.
        tokenizer: Identifier of the base tokenizer to write into `config.yaml`.
        dtype: Dtype of the native tensors; None keeps the folder's.
        ignored_fields: Unknown native settings to accept, as dotted paths; they are written again.
        overwrite: Replace an output that has content, unless it is read.
        on_progress: Called with the number of bytes after each write.
    Returns:
        The `model` section that was written.
    Raises:
        CheckpointError: If the folder cannot be read.
        UnsupportedError: If its settings or tensors have no native form.
        OutputError: If the output cannot be written.
    Warns:
        UserWarning: For tensors with values that are NaN or infinite.
    """
    folder = Path(folder)
    tensors = read_folder(folder)
    section = native_section(folder, _base_section(folder, native_config_path), tokenizer)
    was_tied = section["llm"].get("weight_tying")
    section["llm"]["weight_tying"] = bool(was_tied)  # until the tensors tell
    config = parse_config(section, ignored_fields=ignored_fields)
    tensors = cut_embedding(tensors, config.embedding_rows)
    section["llm"]["weight_tying"] = _is_tied(tensors, was_tied)
    config = parse_config(section, ignored_fields=ignored_fields)
    ensure_layers(config, len(tensors))
    with _readable(folder):
        _ensure_same_settings(folder, config)
    native = _native_tensors(tensors, config)
    inputs = {folder, *(piece.path for tensor in tensors.values() for piece in tensor.pieces)}
    inputs |= set() if native_config_path is None else {Path(native_config_path)}
    staging = Staging(Path(output), fingerprint="", inputs=inputs, overwrite=overwrite)
    num_bytes = sum(stored_bytes(tensor, dtype) for tensor in native.values())
    with staging.cleanup_on_error():
        staging.open({}, num_bytes)
        staging.write_text(CONFIG_FILE, yaml.safe_dump({"model": section}, sort_keys=False))
        on_progress = (lambda _: None) if on_progress is None else on_progress
        notes = write_torch_file(staging.folder / UNSHARDED_FILE, native, dtype, on_progress)
        staging.commit({CONFIG_FILE: None, UNSHARDED_FILE: None})
    report_weights(notes)
    return section


def _base_section(folder: Path, path: str | Path | None) -> dict[str, Any]:
    """The native settings to start from."""
    own = folder / NATIVE_CONFIG_FILE
    if path is None and not own.is_file():
        return default_section()
    path = own if path is None else Path(path)
    try:
        return read_model_section(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def default_section() -> dict[str, Any]:
    """A `model` section with the trainer's defaults and the values that Molmo2 requires."""
    section: dict[str, Any] = {
        "model_name": native_config.MODEL_NAME,
        "data_formatter": dict(native_config.PROMPT_FORMAT),
    }
    for path, fields, _ in SECTIONS:
        _subsection(section, path).update({name: _default(field) for name, field in fields.items()})
    return section


def _subsection(section: dict[str, Any], path: str) -> dict[str, Any]:
    for name in filter(None, path.split(".")):
        section = section.setdefault(name, {})
    return section


def _default(field: Field) -> Any:
    if field.only:
        return field.only[0]
    default = None if field.default is REQUIRED else field.default
    return list(default) if isinstance(default, tuple) else default


def _ensure_keys(content: dict[str, Any], names: tuple[str, ...], path: Path) -> None:
    missing = [name for name in names if name not in content]
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing}; expected the spelling of the published files. Save the model with the code that "
            "came with its weights (trust_remote_code=True)."
        )


def native_section(folder: Path, base: dict[str, Any], tokenizer: str | None) -> dict[str, Any]:
    """The `model` section that describes a converted folder.

    Args:
        base: Native settings that the folder lacks.
        tokenizer: Identifier of the base tokenizer; None keeps that of `base`.
    """
    config = read_settings(folder, "config.json")
    _ensure_keys(config, PARTS, folder / "config.json")
    text, vit, adapter = (config[name] for name in PARTS)
    image, video = (read_settings(folder, f"{name}preprocessor_config.json") for name in ("", "video_"))
    processor = read_settings(folder, "processor_config.json")
    section = copy.deepcopy(base)
    with _readable(folder):
        connector = {name: adapter[name] for name in CONNECTOR if name in adapter}
        _subsection(section, "llm").update(_llm_values(text))
        _subsection(section, "vision_backbone").update(connector, skip_unused_layers=True)
        _subsection(section, "vision_backbone.vit").update(_vit_values(vit))
        _subsection(section, "mm_preprocessor.image").update(_image_values(image, processor))
        _subsection(section, "mm_preprocessor.video").update(_video_values(video, processor))
        if section["llm"].get("vocab_size") is None:
            section["llm"]["vocab_size"] = text["vocab_size"]
        if tokenizer is not None:
            _subsection(section, "llm.tokenizer")["identifier"] = tokenizer
    return section


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Context that reads settings of any type, of which some may be missing."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(
            f"The JSON files of {folder} lack {error}; expected those of a published folder."
        ) from None
    except (TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise CheckpointError(
            f"The JSON files of {folder} hold a wrong value ({error}); expected those of a published folder."
        ) from None


def _llm_values(text: dict[str, Any]) -> dict[str, Any]:
    scaling = text["rope_scaling"]
    rope: dict[str, Any] = {f"rope_{name}": None for name, _ in native_config.ROPE_FIELDS}
    rope["rope_type"] = "default" if scaling is None else scaling["rope_type"]
    rope |= {} if scaling is None else {f"rope_{name}": scaling[name] for name in scaling if name != "rope_type"}
    return {
        **rope,
        "rope_theta": text["rope_theta"],
        "full_attention_layers": text["rope_scaling_layers"],
        "sliding_attention_rope_scaling": False,
        "d_model": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "head_dim": text["head_dim"],
        "mlp_hidden_size": 2 * text["intermediate_size"],
        "qkv_bias": text["qkv_bias"],
        "attention_layer_norm": text["use_qk_norm"],
        "attention_layer_norm_type": text["qk_norm_type"],
        "norm_after": text["norm_after"],
        "layer_norm_eps": text["layer_norm_eps"],
        "max_position_embeddings": text["max_position_embeddings"],
        "embedding_size": text["vocab_size"],
        "additional_vocab_size": text["additional_vocab_size"],
        "initializer_range": text["initializer_range"],
    }


def _vit_values(vit: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_emb_dim": vit["hidden_size"],
        "image_mlp_dim": vit["intermediate_size"],
        "image_num_layers": vit["num_hidden_layers"],
        "image_num_heads": vit["num_attention_heads"],
        "image_num_key_value_heads": vit["num_key_value_heads"],
        "image_head_dim": vit["head_dim"],
        "image_mlp_activations": vit["hidden_act"],
        "image_norm_eps": vit["layer_norm_eps"],
        "image_default_input_size": vit["image_default_input_size"],
        "image_patch_size": vit["image_patch_size"],
        "image_num_pos": vit["image_num_pos"],
        "float32_attention": vit["float32_attention"],
        "initializer_range": vit["initializer_range"],
    }


def _image_values(image: dict[str, Any], processor: dict[str, Any]) -> dict[str, Any]:
    pooling_h, pooling_w = image["pooling_size"]
    return {
        "max_crops": image["max_crops"],
        "max_multi_image_crops": image["max_crops"],
        "overlap_margins": image["overlap_margins"],
        "pooling_h": pooling_h,
        "pooling_w": pooling_w,
        "multi_image_pooling_h": pooling_h,
        "multi_image_pooling_w": pooling_w,
        "use_col_tokens": processor["image_use_col_tokens"],
        "use_single_crop_col_tokens": processor.get("use_single_crop_col_tokens"),
        "use_single_crop_start_token": processor["use_single_crop_start_token"],
    }


def _video_values(video: dict[str, Any], processor: dict[str, Any]) -> dict[str, Any]:
    pooling_h, pooling_w = video["pooling_size"]
    return {
        "max_frames": video["num_frames"],
        "frame_sample_mode": video["frame_sample_mode"],
        "max_fps": [video["max_fps"]],
        "pooling_h": pooling_h,
        "pooling_w": pooling_w,
        "use_frame_special_tokens": processor["use_frame_special_tokens"],
    }


def _is_tied(tensors: dict[str, SourceTensor], was_tied: bool | None) -> bool:
    """Whether the output matrix may be left out: it must equal the embedding, bit by bit."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.transformer.wte.embedding")
    if was_tied is False or head is None or embedding is None:
        return False
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    return _digest(head) == _digest(embedding)  # blocks end elsewhere where pieces do


def _digest(tensor: SourceTensor) -> bytes:
    digest = hashlib.sha256()
    for block in BlockConverter(tensor.dtype).stream(tensor):
        digest.update(block)
    return digest.digest()


def _ensure_same_settings(folder: Path, config: NativeConfig) -> None:
    """Convert the new native settings again and compare, so that no setting is lost."""
    saved = read_settings(folder, "config.json")
    token_ids = dict.fromkeys(EXTRA_TOKENS, 0)
    again = config_files.model_config(config, dtype="float32", attention="sdpa", token_ids=token_ids)
    pairs = [(f"config.json: {part}", again[part], saved[part]) for part in PARTS]
    pairs += [(name, build(config), read_settings(folder, name)) for name, build in COMPARED_FILES.items()]
    problems = []
    for name, wanted, found in pairs:
        for key, value in wanted.items():
            if key not in FREE_KEYS and key in found and not _same(value, found[key]):
                problems.append(f"{name}.{key} is {shown(found[key])}; natively it would be {shown(value)}")
    if problems:
        raise UnsupportedError(f"{folder} has settings that no native configuration can express:\n{listing(problems)}")


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, (int, float)):
        return math.isclose(left, right, rel_tol=1e-12)
    return left == right


def _native_tensors(tensors: dict[str, SourceTensor], config: NativeConfig) -> dict[str, SourceTensor]:
    """The tensors under their native names, in the table's order."""
    renames = expected_renames(config)
    wanted = {rename.target: rename for rename in renames}
    problems = [f"'{name}' is missing" for name in wanted if name not in tensors]
    problems += [f"'{name}' is unknown to a model of this configuration" for name in tensors if name not in wanted]
    problems += [
        f"'{name}' has shape {tensor.shape}; the configuration makes it {wanted[name].shape}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if problems:
        raise UnsupportedError(f"The tensors do not fit config.json:\n{listing(problems)}")
    native: dict[str, SourceTensor] = {}
    for rename in renames:
        native.setdefault(rename.native, tensors[rename.target])
    return native
