"""What answers on the command line: a model in this process, or a server."""

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import click
from click.core import ParameterSource

MODEL_VARIABLE, SERVER_VARIABLE = "MOLMO2_MODEL", "MOLMO2_SERVER"
KINDS = {"num_frames": "video", "max_crops": "image", "clip": "video"}  # what an option of the processor is for


class ModelError(click.ClickException):
    """The model cannot be loaded, or the server cannot be reached."""

    exit_code = 3


class Asker(Protocol):
    """Answers questions; `molmo2.client.Client` is one too."""

    def ask(self, question: Any, images: Any = None, videos: Any = None, **options: Any) -> Any:
        """See `molmo2.ask`."""

    def ask_stream(self, question: Any, images: Any = None, videos: Any = None, **options: Any) -> Iterator[Any]:
        """See `molmo2.ask_stream`."""


@dataclass(frozen=True)
class LocalModel:
    """`ask` and `ask_stream` of a model in this process."""

    model: Any
    processor: Any

    def ask(self, question: Any, images: Any = None, videos: Any = None, **options: Any) -> Any:
        """See `molmo2.ask`."""
        from molmo2.tools.ask import ask

        return ask(self.model, self.processor, question, images, videos, **options)

    def ask_stream(self, question: Any, images: Any = None, videos: Any = None, **options: Any) -> Iterator[Any]:
        """See `molmo2.ask_stream`."""
        from molmo2.tools.ask import ask_stream

        return ask_stream(self.model, self.processor, question, images, videos, **options)


def processor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's options that go to the processor, where they were given."""
    given = {name: options[name] for name in KINDS}
    return {name: value for name, value in given.items() if value is not None}


def require_effect(options: Mapping[str, Any], kinds: Collection[str]) -> None:
    """Check that each option of the processor that was given concerns some of the files.

    Args:
        kinds: Those of the files: "image", "video".
    Raises:
        UsageError: It is for videos, and the files are images, or the other way round.
    """
    for name in processor_options(options):
        kind = KINDS[name]
        if kind not in kinds:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} is for {kind}s, and the files are none. Leave it out.")


def named_model(model: str | None, server: str | None) -> str | None:
    """The model to name: that of the environment is a folder or repository here, and means nothing to a server."""
    source = click.get_current_context().get_parameter_source("model")
    return None if server is not None and source is ParameterSource.ENVIRONMENT else model


def require_one(model: str | None, server: str | None) -> None:
    """Check that there is a model or a server to ask.

    Raises:
        UsageError: There is neither.
    """
    if model is None and server is None:
        raise click.UsageError(
            "There is no model to ask. Pass --model FOLDER (or a repository such as allenai/Molmo2-4B), or "
            f"--server URL; or set {MODEL_VARIABLE} or {SERVER_VARIABLE}."
        )


def open_asker(model: str | None, server: str | None, device: str, dtype: str) -> Asker:
    """A client of the server where there is one, else the model, loaded.

    Raises:
        UsageError: Neither is named.
        ModelError: The model cannot be loaded, or the server has no model of that name.
    """
    require_one(model, server)
    if server is not None:
        from molmo2.client import Client, ServerError, api_key

        try:
            return Client(server, model=model, api_key=api_key())
        except (ServerError, ValueError) as error:
            raise ModelError(str(error)) from error
    return LocalModel(*load_model(str(model), device, dtype))


def load_model(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model on its device and its processor.

    Raises:
        ModelError: It cannot be loaded.
    """
    quiet_libraries()
    import torch

    from molmo2.registration import load

    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            options: dict[str, Any] = {"device_map": "auto"} if device == "cuda" else {}
            return load(name, dtype=dtype, **options)
        model, processor = load(name, dtype=dtype)
        return model.to(device), processor  # type: ignore[arg-type]  # decorated by transformers
    except (OSError, ValueError, RuntimeError, ImportError, AssertionError) as error:  # the last: torch without CUDA
        raise ModelError(f"'{name}' cannot be loaded as a Molmo2 model: {error}") from error


def quiet_libraries() -> None:
    """No progress bars and hints of libraries outside of a terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
