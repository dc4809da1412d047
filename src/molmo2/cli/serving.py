"""`molmo2 serve`: the command line of vLLM, or of `transformers serve` where there is no vLLM.

`python -m molmo2.cli.serving serve FOLDER ...` is `transformers serve` with this package's classes registered, so that
it executes no code of the checkpoint.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VLLM, TRANSFORMERS = ENGINES = ("vllm", "transformers")
TRANSFORMERS_CLI = "transformers.cli.transformers"
SERVE_PACKAGES = ("fastapi", "uvicorn", "openai")


class ServeError(ValueError):
    """There is nothing to serve with, or an option that the engine lacks."""


@dataclass(frozen=True)
class ServeOptions:
    """What is served, and where.

    Attributes:
        dtype: "auto" is the one of the checkpoint; vLLM alone would take bfloat16 for float32.
        max_model_len: Tokens of a request; None for those of the checkpoint.
        images, videos: Most of them in a request (vLLM).
        more: Further arguments for the engine.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    max_model_len: int | None = None
    images: int = 16
    videos: int = 1
    more: Sequence[str] = ()


def choose_engine(wanted: str | None = None) -> str:
    """The engine that is installed: vLLM before `transformers serve`.

    Raises:
        ServeError: None is, or not the one that is wanted.
    """
    missing = [name for name in SERVE_PACKAGES if importlib.util.find_spec(name) is None]
    has_command = importlib.util.find_spec("transformers") is not None and _has_module(TRANSFORMERS_CLI)
    if wanted in (None, VLLM) and importlib.util.find_spec("vllm") is not None:
        return VLLM
    if wanted == VLLM:
        raise ServeError(
            "vLLM is not installed: pip install 'molmo2-transformers[vllm]' (without a GPU see docs/serving.md)."
        )
    if not has_command:
        raise ServeError("This transformers has no server that takes images: pip install -U transformers, or vLLM.")
    if missing:
        raise ServeError(
            f"`transformers serve` lacks {', '.join(missing)}: pip install 'transformers[serving]'; for many users at "
            "once: pip install 'molmo2-transformers[vllm]'."
        )
    return TRANSFORMERS


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def serve_command(engine: str, options: ServeOptions) -> list[str]:
    """The program to run and its arguments.

    Raises:
        ServeError: An option that `transformers serve` does not have.
    """
    dtype = stored_dtype(options.model) if options.dtype == "auto" else options.dtype
    where = ["--host", options.host, "--port", str(options.port), "--dtype", dtype]
    if engine == VLLM:
        limits = json.dumps({"image": options.images, "video": options.videos})
        flags = ["--limit-mm-per-prompt", limits]  # the classes are those of `molmo2.vllm`, a plugin
        # Found out by itself, but not with templates of version 0.1, which would misplace every image.
        flags += ["--chat-template-content-format", "openai"]
        if options.max_model_len is not None:
            flags += ["--max-model-len", str(options.max_model_len)]
        program = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        return [*program, "serve", options.model, *where, *flags, *options.more]
    if options.max_model_len is not None:
        raise ServeError("`transformers serve` has no --max-model-len: a request may be as long as the checkpoint's.")
    return [sys.executable, "-m", "molmo2.cli.serving", "serve", options.model, *where, *options.more]


def stored_dtype(model: str) -> str:
    """The dtype that a folder's config.json names; "auto" where it does not, and for repositories."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "auto"
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def main() -> None:
    """`transformers`, with the classes of this package for Molmo2."""
    from molmo2.registration import register

    register()
    importlib.import_module(TRANSFORMERS_CLI).main()


if __name__ == "__main__":
    main()
