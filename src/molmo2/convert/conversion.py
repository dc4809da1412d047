"""The conversion, step by step: plan everything, write, move into place."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from molmo2.convert import config_files
from molmo2.convert.errors import OutputError, UnsupportedError, VerificationError, listing
from molmo2.convert.model_card import model_card
from molmo2.convert.shards import GIGABYTE, INDEX_FILE, SAFETENSORS_DTYPES, Shard, index_content, plan_shards
from molmo2.convert.small_files import read_json
from molmo2.convert.source import NativeSource, open_source
from molmo2.convert.staging import Staging, ensure_disjoint, ensure_replaceable
from molmo2.convert.tokenizer import TokenizerFiles, build_tokenizer
from molmo2.convert.writer import WeightWriter
from molmo2.grounding.files import replaced
from molmo2.version import __version__

NATIVE_CONFIG_FILE = "native_config.yaml"
REMOTE_MODULES = (
    *("configuration_molmo2", "grounding_molmo2", "image_processing_molmo2", "modeling_molmo2", "processing_molmo2"),
    "video_processing_molmo2",
)
# Fields of the native configuration that hold paths of the training machine.
PRIVATE_FIELDS = ("init_path", "init_incremental", "tokenizer_dir")
BASE_MEMORY = 500_000_000  # bytes: Python, torch and the vocabulary of a tokenizer
PIECE_MEMORY = 2_000  # bytes kept for each piece


@dataclass(frozen=True)
class ConversionOptions:
    """Settings of a conversion.

    Attributes:
        dtype: Dtype of the output: "float32" keeps the bytes of a float32 checkpoint, "bfloat16" rounds to nearest
            even.
        max_model_len: Maximum sequence length in tokens; None keeps the checkpoint's.
        attn_implementation: Attention implementation in `config.json`.
        max_shard_bytes: Maximum size of a safetensors file; a tensor that is larger gets a file of its own.
        tokenizer: Local folder or repository, instead of the one that `config.yaml` names.
        ignored_fields: Unknown fields of `config.yaml` to accept, as dotted paths.
        data_sets: Repositories of the training data, for the model card; None: those of the published models.
    Raises:
        ValueError: For a value out of range, with the choices.
    """

    dtype: str = "float32"
    max_model_len: int | None = None
    attn_implementation: str = "sdpa"
    max_shard_bytes: int = 5 * GIGABYTE
    tokenizer: str | None = None
    ignored_fields: tuple[str, ...] = ()
    data_sets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(SAFETENSORS_DTYPES)}.")
        if self.attn_implementation not in config_files.ATTENTION_CHOICES:
            choices = ", ".join(config_files.ATTENTION_CHOICES)
            raise ValueError(f"attn_implementation is {self.attn_implementation!r}; expected one of {choices}.")
        for name in ("max_model_len", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected a positive number.")

    def open_source(self, checkpoint: str | Path) -> NativeSource:
        """Open a checkpoint with these options; see `source.open_source`."""
        return open_source(checkpoint, max_positions=self.max_model_len, ignored_fields=self.ignored_fields)


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion, checked and laid out before any weight is read.

    Attributes:
        inputs: Files and folders that are read, which the output may not replace.
    """

    source: NativeSource
    shards: list[Shard]
    tokenizer: TokenizerFiles
    options: ConversionOptions
    inputs: frozenset[Path]

    @property
    def output_bytes(self) -> int:
        """Number of bytes of weights that are written."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def peak_memory(self) -> int:
        """Expected peak memory in bytes. Tensors stream through fixed buffers, so their size does not matter."""
        return BASE_MEMORY + PIECE_MEMORY * self.source.num_pieces

    def model_config(self) -> dict[str, Any]:
        """`config.json`."""
        return config_files.model_config(
            self.source.config,
            dtype=self.options.dtype,
            attention=self.options.attn_implementation,
            token_ids=self.tokenizer.extra_ids,
        )

    def fingerprint(self) -> str:
        """A hash of everything that the shards depend on."""
        tensors = self.source.tensors.values()
        names = {path: str(path.resolve()) for path in self.source.files}
        stats = sorted((names[path], path.stat().st_size, path.stat().st_mtime_ns) for path in names)
        pieces = sorted((t.name, t.dtype, [(names[p.path], p.start) for p in t.pieces]) for t in tensors)
        digest = hashlib.sha256(json.dumps([stats, pieces]).encode())
        for shard in self.shards:
            digest.update(shard.file_name.encode() + shard.header)
        return digest.hexdigest()

    def describe(self) -> str:
        """The plan as text."""
        source, config = self.source, self.source.config
        llm, vit = config.llm, config.vit
        tied = "; output copied from the tied embedding" if llm["weight_tying"] else ""
        lines = {
            "checkpoint": source.description,
            "step": "unknown" if source.location.step is None else str(source.location.step),
            "text model": f"{llm['n_layers']} layers of width {llm['d_model']}, {llm['n_heads']} heads over "
            f"{config.num_kv_heads} key/value heads",
            "vocabulary": f"{config.embedding_rows:,} + {llm['additional_vocab_size']} tokens{tied}",
            "vision": f"{config.num_vit_layers} of {vit['image_num_layers']} layers of width {vit['image_emb_dim']}",
            "longest sequence": f"{config.max_positions:,} tokens",
            "parameters": f"{source.num_parameters:,} in {len(source.renames)} tensors",
            "read": f"{source.num_bytes:,} bytes",
            "write": f"{self.output_bytes:,} bytes as {self.options.dtype} in {len(self.shards)} file(s)",
            "peak memory": f"about {self.peak_memory / 1e9:.1f} GB, whatever the size of the model",
        }
        width = max(len(name) for name in lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def plan_conversion(checkpoint: str | Path, options: ConversionOptions | None = None) -> ConversionPlan:
    """Find, check and plan; nothing is written.

    Raises:
        CheckpointError: If the checkpoint is absent, incomplete, damaged or dangerous.
        UnsupportedError: If Molmo2 cannot express it, or its configuration class refuses the settings.
        OutputError: If the remote code that is stored with the weights is missing.
    """
    options = ConversionOptions() if options is None else options
    return plan_source(options.open_source(checkpoint), options, {Path(checkpoint)})


def plan_source(source: NativeSource, options: ConversionOptions, inputs: set[Path]) -> ConversionPlan:
    """The plan for a checkpoint that is open; `inputs` are further files and folders that may not be replaced."""
    config = source.config
    identifier = config.tokenizer if options.tokenizer is None else options.tokenizer
    if identifier is None:
        raise UnsupportedError("config.yaml names no llm.tokenizer.identifier; pass --tokenizer.")
    tokenizer = build_tokenizer(identifier, filled_size=config.tokenizer_size, embedding_rows=config.embedding_rows)
    shards = plan_shards(source.renames, options.dtype, options.max_shard_bytes)
    code = remote_code_files()
    inputs = {*inputs, Path(identifier), source.location.folder, *source.files, *code}
    plan = ConversionPlan(source, shards, tokenizer, options, frozenset(inputs))
    config_files.ensure_accepted(plan.model_config())
    return plan


def remote_code_files() -> list[Path]:
    """Files stored with the weights: the generated modules, the chat template and the licence.

    An installed package brings them along in `remote_code`; in a checkout they lie in the root.

    Raises:
        OutputError: If one of them is missing.
    """
    installed = Path(__file__).parent / "remote_code"
    root = installed if installed.is_dir() else Path(__file__).resolve().parents[3]
    files = [
        root / name for name in (*(f"{module}.py" for module in REMOTE_MODULES), "chat_template.jinja", "LICENSE")
    ]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise OutputError(f"{root} lacks {missing}, which are stored with the weights. Reinstall molmo2-transformers.")
    return files


def remote_code_hashes() -> dict[str, str]:
    """SHA-256 of each file that is stored with the weights, in hexadecimal, by name.

    Raises:
        OutputError: If one of them is missing.
    """
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in remote_code_files()}


def ensure_remote_code(folder: str | Path) -> dict[str, str]:
    """Compare the remote code in a folder with that of this installation.

    Returns:
        SHA-256 by name, of all files.
    Raises:
        VerificationError: Files are missing or differ; all in one message.
    """
    folder, expected = Path(folder), remote_code_hashes()
    problems = []
    for name, wanted in expected.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        if found is None:
            problems.append(f"'{name}' is missing")
        elif found != wanted:
            problems.append(f"'{name}' has SHA-256 {found}; this installation ships {wanted}")
    if problems:
        raise VerificationError(
            f"The code in {folder} is not that of molmo2-transformers {__version__}. It was edited, or written by "
            "another version: check it with that one, or replace it with molmo2.convert.add_remote_code.\n"
            f"{listing(problems)}"
        )
    return expected


def add_remote_code(folder: str | Path) -> None:
    """Put the remote code into a checkpoint folder and name it in the folder's files.

    What a model of the installed package saves loads with that package; with this it loads with
    `trust_remote_code=True` too, on machines and in tools that lack the package.

    Args:
        folder: With `config.json`, and the processor's files if they are there; other files are not touched.
    Raises:
        OutputError: There is no `config.json` of Molmo2, or the code is missing here.
        CheckpointError: A JSON file is damaged.
    """
    folder, code = Path(folder), remote_code_files()
    # Each file appears whole or not at all: a half-written config.json would be the end of the folder.
    config = folder / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != "molmo2":
        raise OutputError(f"{folder} has no config.json of the model type 'molmo2'. Save the model there first.")
    for file in code:
        with replaced(folder / file.name) as partial:
            shutil.copyfile(file, partial)
    for name, auto_map in config_files.AUTO_MAPS.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            with replaced(folder / name) as partial:
                partial.write_text(_json({**content, "auto_map": auto_map}), encoding="utf-8")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _without_private(section: Any) -> Any:
    if isinstance(section, dict):
        return {name: None if name in PRIVATE_FIELDS else _without_private(value) for name, value in section.items()}
    return section


def text_files(plan: ConversionPlan) -> dict[str, str]:
    """Contents of all files except weights and remote code, by name."""
    source, tokenizer, options = plan.source, plan.tokenizer, plan.options
    config = source.config
    contents = {
        "config.json": plan.model_config(),
        "generation_config.json": config_files.generation_config(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id),
        "processor_config.json": config_files.processor_config(config),
        "preprocessor_config.json": config_files.preprocessor_config(config),
        "video_preprocessor_config.json": config_files.video_preprocessor_config(config),
    }
    if len(plan.shards) > 1:
        contents[INDEX_FILE] = index_content(plan.shards, options.dtype)
    card = model_card(
        config,
        source=source.name,
        origin=source.origin,
        num_parameters=source.num_parameters,
        source_dtypes=source.dtypes,
        dtype=options.dtype,
        data_sets=options.data_sets,
        is_from_parts=source.is_from_parts,
    )
    native = yaml.safe_dump({"model": _without_private(source.raw_config)}, sort_keys=False)
    files = {name: _json(content) for name, content in contents.items()}
    return {**files, **tokenizer.files, "README.md": card, NATIVE_CONFIG_FILE: native}


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    options: ConversionOptions | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Callable[[int], object] | None = None,
    warn: Callable[[str], object] | None = None,
) -> ConversionPlan:
    """Convert a native checkpoint into a folder that transformers loads.

    Args:
        checkpoint: A checkpoint directory, or a save folder with `step<N>` children.
        output: The folder to create; it appears complete or not at all.
        options: See `ConversionOptions`.
        overwrite: Replace an output that has content, unless the conversion reads from it.
        resume: Continue an interrupted conversion with the same source and options.
        on_progress: Called with the number of bytes after each write.
        warn: Called with each warning about the weights; None: `warnings.warn`.
    Returns:
        The plan that was carried out.
    Raises:
        ConversionError: One of its kinds; see `errors`. The output is as it was.
    """
    ensure_disjoint([Path(output)], [Path(checkpoint)])
    ensure_replaceable(Path(output), overwrite)
    plan = plan_conversion(checkpoint, options)
    write_plan(plan, output, overwrite=overwrite, resume=resume, on_progress=on_progress, warn=warn)
    return plan


def write_plan(
    plan: ConversionPlan,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Callable[[int], object] | None = None,
    warn: Callable[[str], object] | None = None,
) -> None:
    """Carry out a plan; see `convert_checkpoint`."""
    staging = Staging(Path(output), plan.fingerprint(), inputs=plan.inputs, overwrite=overwrite, resume=resume)
    contents, copies = text_files(plan), remote_code_files()
    small_bytes = sum(len(text.encode("utf-8", "backslashreplace")) for text in contents.values()) + sum(
        path.stat().st_size for path in copies
    )
    shards = {shard.file_name: shard.num_bytes for shard in plan.shards}
    with staging.cleanup_on_error():
        staging.open(shards, small_bytes)
        for name, text in contents.items():
            staging.write_text(name, text)
        for path in copies:
            staging.copy(path)
        on_progress = (lambda _: None) if on_progress is None else on_progress
        WeightWriter(staging, plan.source.tensors, plan.options.dtype, on_progress).write(plan.shards)
        notes = [note for shard in shards for note in staging.notes.get(shard, [])]
        staging.commit({**dict.fromkeys((*contents, *(path.name for path in copies))), **shards})
    report_weights(notes, warn)


def report_weights(notes: list[str], warn: Callable[[str], object] | None = None) -> None:
    """Warn of weights that are NaN or infinite: the model was written, but hardly works."""
    if notes:
        text = f"The weights were converted as they are, but some are no numbers:\n{listing(sorted(set(notes)))}"
        warnings.warn(text, stacklevel=3) if warn is None else warn(text)
