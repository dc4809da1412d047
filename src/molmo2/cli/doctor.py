"""`molmo2 doctor`: what is installed, what will be slow or wrong, and how to mend it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GOOD, NOTE, SLOW, WRONG = "ok", "note", "slow", "wrong"
IMPORT_SECONDS = 120
DECODERS = {"decord": "decord2", "torchcodec": "torchcodec", "av": "av"}
# Package -> (what it is for, how to get it).
EXTRAS = {
    "av": ("drawing on videos; transport streams, raw H.264, some AVI files", "pip install av"),
    "json_repair": ("structured answers that were cut off", "pip install 'molmo2-transformers[structured]'"),
    "pyarrow": ("batches in Parquet", "pip install 'molmo2-transformers[parquet]'"),
    "ray": ("batches on a cluster", "pip install 'molmo2-transformers[ray]'"),
    "vllm": ("many users at once: `molmo2 serve`", "pip install 'molmo2-transformers[vllm]'"),
}
OLD_TEMPLATE = "message['content'] or []"  # of folders converted by 0.1
SAFE_SHARE = 0.9  # of the memory, that weights may take


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok", "note" (something cannot be done), "slow" or "wrong".
        text: What was found.
        mend: What to do about it; "" if nothing.
    """

    level: str
    text: str
    mend: str = ""


def examine(model: str | None = None, server: str | None = None) -> Iterator[Finding]:
    """All findings, of the installation, and of a checkpoint and a server where they are named."""
    yield from _versions()
    yield from _decoders()
    yield from _torch()
    yield from _extras()
    if model is not None:
        yield from _checkpoint(model)
    if server is not None:
        yield from _server(server, model)


def report(findings: Iterator[Finding], form: str, write: Callable[[str], Any]) -> bool:
    """Write findings as text or JSON lines; whether something is wrong."""
    is_wrong = False
    for finding in findings:
        is_wrong = is_wrong or finding.level == WRONG
        if form == "json":
            write(json.dumps(asdict(finding)))
            continue
        write(f"{finding.level:5}  {finding.text}")
        if finding.mend:
            write(f"       -> {finding.mend}")
    return is_wrong


def _versions() -> Iterator[Finding]:
    yield Finding(GOOD, f"Python {platform.python_version()} on {platform.platform()}")
    for name in ("molmo2-transformers", "torch", "transformers", "accelerate", "numpy", "pillow"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(WRONG, f"{name} is not installed", f"pip install {name}")
            continue
        wanted = _range_of(name)
        if wanted and not _fits(version, wanted):
            yield Finding(WRONG, f"{name} {version} is not supported ({wanted})", f"pip install '{name}{wanted}'")
        else:
            yield Finding(GOOD, f"{name} {version}")
    if importlib.util.find_spec("torchvision") is not None and (problem := _import_problem("torchvision")):
        yield Finding(
            WRONG,
            f"torchvision is installed but cannot be imported ({problem})",
            "Molmo2 does not need it: pip uninstall torchvision; or install the build that fits this torch",
        )


def _range_of(name: str) -> str:
    """The versions of a package that this one supports, such as ">=4.57.1,<5.25"; "" for any."""
    try:
        lines = importlib.metadata.requires("molmo2-transformers") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    return next(
        (line.removeprefix(name) for line in lines if line.startswith(name) and line[len(name) :][:1] in "<>=!~"), ""
    )


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _import_problem(module: str) -> str:
    """Why a module cannot be imported; "" if it can. In a process of its own: a broken library may end it."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {IMPORT_SECONDS} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines[-1][:200] if lines else f"exit code {done.returncode}")


def _decoders() -> Iterator[Finding]:
    usable = []
    for module, package in DECODERS.items():
        if importlib.util.find_spec(module) is None:
            continue
        problem = _import_problem(module)
        if problem:
            yield Finding(NOTE, f"video decoder {module} cannot be loaded ({problem})", f"pip uninstall {package}")
        else:
            usable.append(module)
            yield Finding(GOOD, f"video decoder {module}")
    if not usable:
        yield Finding(WRONG, "no video decoder: videos cannot be read", "pip install decord2")


def _torch() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield Finding(GOOD, f"GPU {index}: {device.name}, {device.total_memory / 1e9:.0f} GB")
        if not torch.cuda.is_bf16_supported():
            yield Finding(SLOW, "this GPU has no bfloat16", "--dtype float16")
        return
    cards = shutil.which("nvidia-smi") is not None
    if cards and torch.version.cuda is None:
        yield Finding(
            WRONG, "there is a GPU, but this torch is built for CPUs", "install torch for CUDA: https://pytorch.org"
        )
    else:
        yield Finding(
            SLOW, "no GPU: a 4B model takes minutes for an answer here", "--server URL of a machine with one"
        )
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    if threads < cores // 2:
        yield Finding(SLOW, f"torch uses {threads} of {cores} cores", "unset OMP_NUM_THREADS")
    flags = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").is_file() else ""
    if flags and "bf16" not in flags:
        yield Finding(SLOW, "this CPU computes bfloat16 by way of float32", "--dtype float32, where memory allows")


def _extras() -> Iterator[Finding]:
    for module, (purpose, install) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(NOTE, f"without {module}: {purpose}", install)
        elif module not in DECODERS:
            yield Finding(GOOD, f"{module}: {purpose}")


def _checkpoint(model: str) -> Iterator[Finding]:
    folder = Path(model)
    if not folder.is_dir():
        if model.startswith(("/", ".", "~")):
            yield Finding(WRONG, f"there is no folder '{model}'", "check the path")
            return
        is_offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        yield Finding(
            WRONG if is_offline and model.count("/") != 1 else NOTE,
            f"'{model}' is no folder here: it would be taken from the Hub"
            + (", but HF_HUB_OFFLINE is 1" * is_offline),
            "unset HF_HUB_OFFLINE, if it is not in the cache" if is_offline else "",
        )
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        advice = "molmo2 convert, if it is a training checkpoint"
        yield Finding(WRONG, f"'{model}' has no config.json that can be read ({error})", advice)
        return
    if config.get("model_type") != "molmo2":
        yield Finding(WRONG, f"'{model}' is of the type {config.get('model_type')!r}", "choose a folder of Molmo2")
        return
    weights = list(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    if not weights:
        yield Finding(WRONG, f"'{model}' has no weights (*.safetensors)", "download or convert it again")
    yield Finding(GOOD, f"'{model}': {size / 1e9:.2f} GB of {config.get('dtype') or config.get('torch_dtype')}")
    memory = _memory_bytes()
    if memory and size > SAFE_SHARE * memory:
        found = f"its weights take {size / 1e9:.0f} GB, but there are {memory / 1e9:.0f} GB"
        yield Finding(WRONG, found, "bfloat16, quantization_config, several GPUs, or a server")
    template = folder / "chat_template.jinja"
    if template.is_file() and OLD_TEMPLATE in template.read_text(encoding="utf-8"):
        yield Finding(
            WRONG,
            "its chat_template.jinja is of version 0.1: vLLM reads it as one for strings and misplaces images",
            "convert it again, or replace the file by that of this release",
        )


def _memory_bytes() -> int:
    """Of all GPUs, else of the machine; 0 if unknown."""
    import torch

    if torch.cuda.is_available():
        return sum(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _server(server: str, model: str | None) -> Iterator[Finding]:
    from molmo2.client import Client, ServerError, api_key

    try:
        client = Client(server, model, api_key=api_key(), retries=0)
        yield Finding(GOOD, f"{server} answers; it is of the kind {client.kind}")
    except (ServerError, ValueError) as error:
        yield Finding(WRONG, str(error), "start it (molmo2 serve), or correct the address")
        return
    try:
        names = client.models()
    except ServerError as error:
        yield Finding(NOTE, f"it lists no models ({error})", "name the model, or leave it to the server")
        return
    if model is not None and client.kind != "transformers" and model not in names:
        yield Finding(WRONG, f"it has no model '{model}' but {names[:10]}", "--model with one of these")
    else:
        yield Finding(GOOD, f"its models: {', '.join(names[:10])}")
