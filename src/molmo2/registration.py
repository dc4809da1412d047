"""The package's classes behind transformers' Auto classes, and a model with its processor in one call."""

import importlib
import inspect
import sys
from collections.abc import Iterator, MutableMapping
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoProcessor

# Not from `transformers`: without torchvision that has empty stand-ins, and pipelines use these.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.utils import cached_file

from molmo2.configuration import Molmo2Config
from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.model.modeling import Molmo2ForConditionalGeneration, Molmo2Model
from molmo2.processing.processor import Molmo2Processor
from molmo2.video.processing import Molmo2VideoProcessor

MODEL_TYPE = Molmo2Config.model_type
GENERATING_AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")  # the second one since 5.x
PROCESSOR_TABLES = (
    ("processing_auto", "PROCESSOR_MAPPING_NAMES"),
    ("image_processing_auto", "IMAGE_PROCESSOR_MAPPING_NAMES"),
    ("video_processing_auto", "VIDEO_PROCESSOR_MAPPING_NAMES"),
)
# Options of `from_pretrained` that say where files come from: model and processor need the same ones.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def register() -> None:
    """Let the Auto classes of transformers take this package's classes for the model type "molmo2".

    Afterwards `AutoModelForImageTextToText.from_pretrained(...)`, `AutoProcessor.from_pretrained(...)`, pipelines and
    tools that use them load Molmo2 checkpoints without `trust_remote_code`: no code of the checkpoint is executed.
    This holds also where transformers has a class of its own for that model type, and for trainers that look the class
    up by the architecture of a checkpoint, `transformers.Molmo2ForConditionalGeneration`, as TRL does. Calling it
    again changes nothing.
    """
    _take_architecture_names()
    for table in _library_processors():
        table.pop(MODEL_TYPE, None)
    AutoConfig.register(MODEL_TYPE, Molmo2Config, exist_ok=True)
    AutoModel.register(Molmo2Config, Molmo2Model, exist_ok=True)
    for name in GENERATING_AUTO_CLASSES:
        if hasattr(transformers, name):
            getattr(transformers, name).register(Molmo2Config, Molmo2ForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(Molmo2Config, Molmo2Processor, exist_ok=True)
    AutoImageProcessor.register(Molmo2Config, exist_ok=True, **_image_processor_classes())
    AutoVideoProcessor.register(Molmo2Config, Molmo2VideoProcessor, exist_ok=True)


def load(
    folder_or_repo: str | PathLike[str],
    *,
    processor_options: dict[str, Any] | None = None,
    dtype: Any = "auto",
    **options: Any,
) -> tuple[Molmo2ForConditionalGeneration, Molmo2Processor]:
    """Load a model and its processor with this package's classes. The Auto classes stay as they are; see `register`.

    From then on, in this process, the names `transformers.Molmo2ForConditionalGeneration` and
    `transformers.Molmo2Model` lead to the package's classes: trainers build a second model, such as the reference of
    DPO, by the name in config.json, and the library's own class reads other inputs. That one stays in
    `transformers.models.molmo2.modeling_molmo2`.

    Args:
        folder_or_repo: A checkpoint folder, or the name of a repository on the Hub.
        processor_options: Options of the processor's `from_pretrained`, such as `max_crops` or `num_frames`.
        dtype: Of the weights; "auto" is the one they are stored in.
        options: Further options of the model's `from_pretrained`, such as `device_map`, `attn_implementation` or
            `quantization_config`. Those that say where files come from (`revision`, `token`, ...) hold for both.
    Returns:
        The model, in evaluation mode, and the processor.
    Raises:
        ValueError: `trust_remote_code=True` or `code_revision` was passed: no code of the checkpoint is executed here.
        OSError: There is no such folder or repository, or files are missing.
    """
    refused = sorted(name for name in ("trust_remote_code", "code_revision") if options.pop(name, None))
    if refused:
        raise ValueError(
            f"`molmo2.load` runs the code of the installed package only, so it takes no {refused}. Leave them out, or "
            "load the checkpoint's own code with `AutoModelForImageTextToText.from_pretrained`."
        )
    shared = {name: options[name] for name in HUB_OPTIONS if name in options}
    require_checkpoint(folder_or_repo, **shared)
    processor = Molmo2Processor.from_pretrained(folder_or_repo, **shared, **(processor_options or {}))
    model = Molmo2ForConditionalGeneration.from_pretrained(folder_or_repo, dtype=dtype, **options)
    _take_architecture_names()
    return model.eval(), processor


def require_folder(folder_or_repo: str | PathLike[str]) -> None:
    """Refuses a path that leads nowhere: transformers would take it for the name of a repository.

    Raises:
        FileNotFoundError: It is written as a path, and there is no such folder.
    """
    is_path = isinstance(folder_or_repo, PathLike) or folder_or_repo.startswith(("/", ".", "~"))
    if is_path and not Path(folder_or_repo).is_dir():
        raise FileNotFoundError(f"There is no folder '{folder_or_repo}'. Check the path and the working folder.")


def require_checkpoint(folder_or_repo: str | PathLike[str], **hub_options: Any) -> None:
    """Looks for config.json: the tokenizer is what transformers misses first, in words that do not name the cause.

    Raises:
        OSError: There is no such folder or repository, or no config.json in it.
    """
    require_folder(folder_or_repo)
    folder = Path(folder_or_repo, hub_options.get("subfolder") or "")
    if not Path(folder_or_repo).is_dir():
        cached_file(str(folder_or_repo), "config.json", **hub_options)
    elif not (folder / "config.json").is_file():
        is_training = (folder / "config.yaml").is_file() or any(folder.glob("step*"))
        raise FileNotFoundError(
            f"The folder '{folder}' has no config.json"
            + (
                "; it is a training checkpoint. `molmo2-convert` makes a folder from it that can be loaded."
                if is_training
                else ". Pass a checkpoint folder for transformers, or the name of a repository."
            )
        )


def _take_architecture_names() -> None:
    """Lets the names in `architectures` of a config.json, looked up in `transformers`, lead to this package.

    The modules of the library are left alone: its own class stays in `transformers.models.molmo2.modeling_molmo2`.
    """
    for library in _library_modules():
        for model_class in (Molmo2ForConditionalGeneration, Molmo2Model):
            setattr(library, model_class.__name__, model_class)


def _library_modules() -> list[Any]:
    """`transformers`, and what modules of TRL hold under that name: where TRL is imported first, it is made anew
    during that import, and TRL keeps the former one.
    """
    names = [name for name in list(sys.modules) if name.partition(".")[0] == "trl"]
    # Not getattr: it would import modules that are yet to be imported.
    held = [object.__getattribute__(sys.modules[name], "__dict__").get("transformers") for name in names]
    return [transformers, *(other for other in held if isinstance(other, ModuleType))]


def _library_processors() -> Iterator[MutableMapping[str, Any]]:
    """transformers' tables of its own processors by model type.

    The classes of a processor are looked up by name, in these tables first: "Molmo2Processor" would be the library's.
    """
    for module, name in PROCESSOR_TABLES:
        yield getattr(importlib.import_module(f"transformers.models.auto.{module}"), name)


def _image_processor_classes() -> dict[str, Any]:
    """Arguments for `AutoImageProcessor.register`; recent releases know classes by backend, of which ours has none."""
    if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
        return {"image_processor_classes": {"pil": Molmo2ImageProcessor, "torchvision": Molmo2ImageProcessor}}
    return {"slow_image_processor_class": Molmo2ImageProcessor}
