"""What a recipe says: a YAML file, checked before anything is loaded."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo2.data import DATASETS, SFT_GROUPS
from molmo2.data.evaluation import EVALUATION_SETS

MAX_FILE_BYTES = 1 << 20
PARTS = ("vision", "connector", "text")
WEIGHTINGS = ("report", "released_trainer", "none")
SHARDINGS = ("auto", "fsdp", "ddp")
DTYPES = ("float32", "bfloat16", "auto")

# The three stages of Molmo2's training. Rates, warm-up, rows and steps are those of the released scripts.
PRESETS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "steps": 31_000,
        "rows_per_step": 128,
        "max_tokens": 2536,
        "max_crops": 16,
        "learning_rates": {"vision": 6e-6, "connector": 2e-4, "text": 2e-5},
        "warmup_steps": {"vision": 2000, "connector": 200, "text": 2000},
        "groups": {"captions": 0.6, "pointing": 0.3, "nlp": 0.1},
    },
    "sft": {
        "steps": 30_000,
        "rows_per_step": 128,
        "max_tokens": 16_384,
        "max_crops": 128,
        "processor": {"num_frames": 128},
        "groups": SFT_GROUPS,
    },
    "long-context": {
        "steps": 2000,
        "rows_per_step": 128,
        "max_tokens": 36_864,
        "max_crops": 400,
        "processor": {"num_frames": 384},
        "groups": SFT_GROUPS,
    },
}


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the entry."""


@dataclass(frozen=True)
class DataSet:
    """A data set of the mixture.

    Attributes:
        files: Files of rows (.jsonl, .json, .parquet, .arrow) or patterns of them, relative to the recipe.
        reader: A name in `molmo2.data.DATASETS`; without one, rows are conversations (`messages`, or `prompt` and
            `completion`).
        media: Folders of images and videos, or JSON files from names to URLs, asked in this order.
        cut_clips: The folders hold the clips themselves, named by `molmo2.data.clip_name`.
        group: The group whose share it has a part of.
        size: The number of examples that it counts as; its own if it is not said.
        settings: Of `molmo2.data.Settings`.
    """

    name: str
    files: tuple[str, ...]
    reader: str | None = None
    media: tuple[str, ...] = ()
    cut_clips: bool = False
    group: str = ""
    size: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reader is not None and self.reader not in DATASETS:
            raise RecipeError(
                f"reader is {self.reader!r}; expected one of {', '.join(DATASETS)}{_near(self.reader, DATASETS)}"
            )
        if self.reader is None and (self.media or self.settings or self.cut_clips):
            raise RecipeError("`media`, `cut_clips` and `settings` belong to a `reader`, but there is none")


@dataclass(frozen=True)
class Evaluation:
    """Questions that are answered during training, and scored.

    Attributes:
        reader: A name in `molmo2.data.evaluation.EVALUATION_SETS`.
        files, media: As for `DataSet`.
        every: Steps from one to the next; the last step is always followed by one.
        limit: Only the first rows; all if it is not said.
    """

    reader: str
    files: tuple[str, ...]
    media: tuple[str, ...] = ()
    every: int = 1000
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.reader not in EVALUATION_SETS:
            raise RecipeError(_no_reader(self.reader, EVALUATION_SETS))
        _require_positive(self, "every", "limit")


@dataclass(frozen=True)
class Lora:
    """Adapters in place of full training; needs PEFT.

    Attributes:
        rank, alpha, dropout: Of the adapters; alpha is twice the rank if it is not said.
        parts: Parts of the model whose linear layers get one.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    parts: tuple[str, ...] = ("text", "connector")

    def __post_init__(self) -> None:
        _require_positive(self, "rank", "alpha")
        _require_known(self.parts, PARTS, "parts")


@dataclass(frozen=True)
class Rates:
    """Learning rates of the parts, and the settings of AdamW; defaults are those of the released fine-tuning."""

    vision: float = 5e-6
    connector: float = 5e-6
    text: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"betas is {list(self.betas)}; expected two numbers from 0 to below 1")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Paths are relative to the file.

    Attributes:
        model: A checkpoint folder, or a repository on the Hub.
        output: The folder for checkpoints, the log and, at the end, the model.
        data: Data sets of the mixture.
        preset: One of `PRESETS`, whose entries hold unless the recipe has its own.
        steps: Steps of the optimizer.
        rows_per_step: Packed rows of a step, over all processes.
        rows_per_device: Rows of one forward pass.
        max_tokens, max_crops, pool_size: Of the `Packer`.
        groups: Shares of the groups. Of a preset's groups only those are kept that a data set belongs to.
        learning_rates: Of the parts.
        warmup_steps: Steps with rising rates, of all parts or of each.
        final_rate: What a rate falls to along a cosine, as a part of it.
        train: Parts that learn; with `lora` those of its own.
        lora: Adapters, or None.
        dtype: Of the weights: "float32", or "auto" for the one they are stored in. At common rates most updates of
            weights in bfloat16 round to nothing; `bf16` computes in bfloat16 with weights in float32.
        weighting: Rule of the loss weights: "report", "released_trainer", "none".
        processor: Options of `build_training_example`, such as `max_crops` and `num_frames`.
        bf16, gradient_checkpointing: As of `TrainingArguments`.
        sharding: "fsdp", "ddp", or "auto": FSDP2 where there are GPUs and several processes.
        context_parallel: Processes that share each row; see `molmo2.training.context_parallel`.
        max_grad_norm: Gradients are scaled down to it.
        save_every, log_every: Steps from one checkpoint, or one line of the log, to the next.
        keep: Checkpoints that are kept; all if it is not said.
        report_to: "tensorboard", "wandb", ...; `log.jsonl` is written in any case.
        evaluation: Questions that are answered during training.
        seed: Of the mixture, of what is drawn, and of the trainer.
        trainer: Further `TrainingArguments`.
    """

    model: str
    output: str
    data: tuple[DataSet, ...]
    steps: int
    preset: str | None = None
    rows_per_step: int = 8
    rows_per_device: int = 1
    max_tokens: int = 4096
    max_crops: int = 64
    pool_size: int = 48
    groups: Mapping[str, float] | None = None
    learning_rates: Rates = Rates()
    warmup_steps: int | Mapping[str, int] = 200
    final_rate: float = 0.1
    train: tuple[str, ...] = PARTS
    lora: Lora | None = None
    dtype: str = "float32"
    weighting: str = "released_trainer"
    processor: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = False
    gradient_checkpointing: bool = False
    sharding: str = "auto"
    context_parallel: int = 1
    max_grad_norm: float = 1.0
    save_every: int = 1000
    keep: int | None = None
    log_every: int = 10
    report_to: tuple[str, ...] = ()
    evaluation: tuple[Evaluation, ...] = ()
    seed: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = field(default=Path(), metadata={"is_entry": False})

    def __post_init__(self) -> None:
        _require_positive(
            self, "steps", "rows_per_step", "rows_per_device", "max_tokens", "max_crops", "pool_size", "save_every",
            "log_every", "keep", "max_grad_norm", "context_parallel",
        )  # fmt: skip
        _require_known(self.train, PARTS, "train")
        _require_known((self.weighting,), WEIGHTINGS, "weighting")
        _require_known((self.sharding,), SHARDINGS, "sharding")
        _require_known((self.dtype,), DTYPES, "dtype")
        if not self.data:
            raise RecipeError("data is empty; expected a list of data sets")
        if isinstance(self.warmup_steps, Mapping):
            _require_known(tuple(self.warmup_steps), PARTS, "warmup_steps")
        if any(self.warmup_of(part) < 0 for part in PARTS):
            raise RecipeError(f"warmup_steps is {self.warmup_steps}; expected 0 or more")
        taken = sorted(set(self.trainer) & TAKEN_ARGUMENTS)
        if taken:
            raise RecipeError(f"trainer has {', '.join(taken)}, which other entries of the recipe decide")

    def path(self, entry: str) -> Path:
        """A path of the recipe."""
        return (self.folder / Path(entry).expanduser()).resolve()

    def warmup_of(self, part: str) -> int:
        """Steps with rising rates of a part of the model."""
        steps = self.warmup_steps
        return steps if isinstance(steps, int) else steps.get(part, 0)

    def shares(self) -> dict[str, float] | None:
        """Shares of the groups that data sets belong to; None where there are no groups."""
        used = {data.group for data in self.data}
        preset = PRESETS[self.preset].get("groups") if self.preset else None
        if self.groups is None or (used == {""} and self.groups == preset):
            return None
        return {name: share for name, share in self.groups.items() if name in used or self.groups != preset}

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to be continued, for JSON."""
        values = dataclasses.asdict(self)
        for name in (
            *("output", "folder", "steps", "save_every", "keep", "log_every", "report_to", "evaluation"),
            "context_parallel",
        ):
            del values[name]
        return values


# Entry -> what of `molmo2.training` does it, in a loop of one's own.
NOT_IN_RECIPES = {
    **dict.fromkeys(("tensor_parallel", "tensor", "tp", "tp_plan", "parallel"), "tensor_parallel"),
    **dict.fromkeys(("pipeline", "pipeline_parallel", "pp", "pp_plan"), "Pipeline"),
}

# Arguments of the trainer that other entries of a recipe decide.
TAKEN_ARGUMENTS = frozenset(
    {
        "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
        "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "gradient_checkpointing", "save_strategy",
        "save_steps", "save_total_limit", "logging_strategy", "logging_steps", "report_to", "eval_strategy",
        "eval_steps", "seed", "data_seed", "fsdp", "fsdp_config", "ignore_data_skip", "accelerator_config",
        "dataloader_num_workers", "remove_unused_columns", "label_smoothing_factor", "activation_checkpointing",
        "auto_find_batch_size", "save_only_model", "parallelism_config",
    }
)  # fmt: skip


def read_recipe(path: str | Path, **changes: Any) -> Recipe:
    """The recipe in a YAML file.

    Args:
        changes: Entries in place of those of the file.
    Raises:
        OSError: The file cannot be read.
        RecipeError: It is no YAML, an entry is unknown, missing, or of another type or range.
    """
    import yaml

    path = Path(path)
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise RecipeError(f"'{path}' has more than {MAX_FILE_BYTES} bytes; a recipe has some hundred")
    try:
        loaded = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"'{path}' is no YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise RecipeError(f"'{path}' holds a {type(loaded).__name__}; expected a mapping such as `model: Molmo2-4B`")
    try:
        return recipe_from({**loaded, **changes}, path.resolve().parent)
    except RecipeError as error:
        raise RecipeError(f"'{path}': {error}") from None


def recipe_from(entries: Mapping[str, Any], folder: Path = Path()) -> Recipe:
    """The recipe of these entries; see `read_recipe`."""
    preset = entries.get("preset")
    if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
        raise RecipeError(f"preset is {preset!r}{_near(str(preset), PRESETS)}; expected one of {', '.join(PRESETS)}")
    for name in entries:
        if name in NOT_IN_RECIPES:
            raise RecipeError(
                f"{name}: recipes do not cut a model over processes: the trainer would clip and save the parts. Shard "
                "weights with `sharding: fsdp`, share rows with `context_parallel`, or call "
                f"`molmo2.training.{NOT_IN_RECIPES[name]}` in a loop of your own"
            )
    given = dict(entries)
    for name, value in PRESETS.get(preset or "", {}).items():
        is_merged = name in ("learning_rates", "processor") and isinstance(given.get(name), Mapping)
        given[name] = {**value, **given[name]} if is_merged else given.get(name, value)
    return _built(Recipe, given, "", {"folder": folder})


def _built(kind: type, entries: Any, where: str, more: Mapping[str, Any] | None = None) -> Any:
    """A dataclass of entries; `where` is the path of the entry, for errors."""
    prefix = f"{where}: " if where else ""
    if not isinstance(entries, Mapping):
        raise RecipeError(f"{prefix}found {entries!r}; expected a mapping")
    hints = typing.get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind) if each.metadata.get("is_entry", True)}
    unknown = [str(name) for name in entries if name not in fields]
    if unknown:
        raise RecipeError(
            f"{prefix}there is no entry {unknown[0]!r}{_near(unknown[0], fields)}; entries are {', '.join(fields)}"
        )
    required = [
        name
        for name, each in fields.items()
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in entries]
    if missing:
        raise RecipeError(f"{prefix}{', '.join(missing)} is missing")
    values = {name: _value(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in entries.items()}
    try:
        return kind(**values, **(more or {}))
    except RecipeError as error:
        raise RecipeError(f"{prefix}{error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of the type that a field has."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [each for each in arguments if each is not type(None)]
        if len(kinds) > 1:  # a number, or a mapping of them
            kinds = [each for each in kinds if (typing.get_origin(each) is not None) == isinstance(value, Mapping)]
        return _value(kinds[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _built(typing.cast(type, hint), value, where)
    if origin is tuple:
        entries = [value] if isinstance(value, (str, Mapping)) else value
        if not isinstance(entries, (list, tuple)):
            raise RecipeError(f"{where} is {value!r}; expected a list")
        return tuple(_value(arguments[0], each, f"{where}[{place}]") for place, each in enumerate(entries))
    if origin is not None:  # Mapping[str, ...]
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} is {value!r}; expected a mapping")
        return {str(name): _value(arguments[1], each, f"{where}.{name}") for name, each in value.items()}
    return value if hint is Any else _plain(hint, value, where)


def _plain(hint: type, value: Any, where: str) -> Any:
    """A number, a truth value or a text."""
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, where)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{where} is {value!r}; expected {WORDS[hint]}")
    return value


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _number(value: Any, where: str) -> float:
    """A finite number of 0 or more; YAML reads 1e-5 as text."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise RecipeError(f"{where} is {value!r}; expected a number of 0 or more")
    return number


def _require_positive(entries: Any, *names: str) -> None:
    for name in names:
        value = getattr(entries, name)
        if value is not None and not value > 0:
            raise RecipeError(f"{name} is {value}; expected more than 0")


def _require_known(found: tuple[str, ...], known: tuple[str, ...], name: str) -> None:
    unknown = [each for each in found if each not in known]
    if unknown or not found:
        raise RecipeError(f"{name} is {', '.join(unknown) or 'empty'}; expected {', '.join(known)}")


def _no_reader(name: str, known: Any) -> str:
    return f"reader is {name!r}{_near(name, known)}; expected one of {', '.join(known)}"


def _near(name: str, known: Any) -> str:
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""
