"""One run of at most eight minutes on a machine with a GPU: prints a table and runs the tests marked `gpu`.

    python -m benchmarks.gpu_day --output benchmarks/results/gpu.json
    python -m benchmarks.gpu_day --pretend      # the same steps with a small model on a pretend device: tries the flow

The model has the shape of Molmo2-4B, bfloat16 weights from a seed. It is loaded once by this package and once by the
library's class; both stay on the GPU (48 GB are enough) and take turns in each step. Steps come in the order of their
value. One is started only while the time that it may take is left; what was skipped or failed is in the table by
name, and the JSON is written after each step.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bounds import weight_reads
from benchmarks.harness import DEFAULT_CACHE, REPOSITORY, NotAvailable, Settings, Side
from benchmarks.memory import PeakMemory
from benchmarks.models import clip_and_text, image_inputs
from benchmarks.report import duration, size
from benchmarks.runner import machine
from benchmarks.sides import chat_inputs, load_model

Figures = dict[str, Any]
SIDES = ("ours", "native")
REPEATS = 3
MAX_CELL = 200  # characters of a text in the table


class Gpu:
    """A CUDA device."""

    shape, name = "4b", "cuda"
    is_real = True

    def load(self, side: Side) -> Any:
        return load_model(side, self.shape, torch.bfloat16, "cuda")

    def moved(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.cuda() for name, value in inputs.items()}

    def result(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What work returns, on the CPU."""
        return work().float().cpu()

    def measured(self, work: Callable[[], Any], repeats: int) -> Figures:
        """Seconds (median, after a first run) and the bytes that torch allocated on top at most."""
        torch.cuda.synchronize()
        memory, seconds = PeakMemory("cuda"), []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return {"seconds": statistics.median(seconds[1:] or seconds), "peak_bytes": memory.peak_bytes()}

    def kernels(self, work: Callable[[], Any]) -> int:
        """Kernels and copies that the device ran."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            work()
            torch.cuda.synchronize()
        return sum(
            event.count for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA
        )


class PretendGpu(Gpu):
    """The tests' pretend device, which counts instead of measuring; seconds are those of this CPU and mean nothing."""

    shape, name = "thin", "cpu"
    is_real = False

    def load(self, side: Side) -> Any:
        from support.pretend_device import moved

        return moved(load_model(side, self.shape))

    def moved(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from support.pretend_device import on_device

        return {name: on_device(value) for name, value in inputs.items()}

    def result(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        from support.pretend_device import PretendDevice, on_cpu

        with PretendDevice():
            return on_cpu(work())

    def measured(self, work: Callable[[], Any], repeats: int) -> Figures:
        from support.pretend_device import PretendDevice

        started = time.perf_counter()
        with PretendDevice() as device:
            work()
        return {"seconds": time.perf_counter() - started, "peak_bytes": None, **device.counts}

    def kernels(self, work: Callable[[], Any]) -> int:
        from support.pretend_device import PretendDevice

        with PretendDevice() as device:
            work()
        return device.counts["launch"]


@dataclass
class Day:
    """What the steps share."""

    gpu: Gpu
    settings: Settings
    models: dict[str, Any] = field(default_factory=dict)

    def side(self, name: str) -> Side:
        return Side(name, self.settings)

    def each(self, prepare: Callable[[str, Any], Callable[[], Any]], repeats: int = REPEATS) -> dict[str, Figures]:
        """The same work by each side, in turn and twice over; the faster of its two medians counts."""
        works = {name: prepare(name, model) for name, model in self.models.items()}
        found: dict[str, Figures] = {}
        for _ in range(2 if self.gpu.is_real else 1):
            for name in [name for name in works if "failed" not in found.get(name, {})]:
                try:
                    figures = self.gpu.measured(works[name], repeats)
                except Exception as error:  # such as out of memory
                    if name == "ours":
                        raise
                    found[name] = {"failed": f"{type(error).__name__}: {error}"}
                    continue
                first = found.setdefault(name, figures)
                first["seconds"] = min(first["seconds"], figures["seconds"])
        return found

    def generate(self, inputs: Callable[[str], dict[str, torch.Tensor]], tokens: int, **options: Any) -> Any:
        def prepare(name: str, model: Any) -> Callable[[], Any]:
            given = self.gpu.moved(inputs(name))
            settings = {"max_new_tokens": tokens, "do_sample": False, **options}
            return lambda: model.generate(**given, **settings)

        return self.each(prepare, 1)

    def forward(self, inputs: Callable[[str], dict[str, torch.Tensor]], repeats: int = REPEATS) -> dict[str, Figures]:
        def prepare(name: str, model: Any) -> Callable[[], Any]:
            given = self.gpu.moved(inputs(name))
            return lambda: model(**given, use_cache=True, logits_to_keep=1).logits

        return self.each(prepare, repeats)

    def pick(self, full: int, quick: int) -> int:
        return quick if self.settings.quick else full


# --- steps -----------------------------------------------------------------------------------------------------------


def load(day: Day) -> dict[str, Figures]:
    found = {}
    for name in SIDES:
        kept: list[Any] = []
        try:
            found[name] = day.gpu.measured(lambda: kept.append(day.gpu.load(day.side(name))), 0)  # noqa: B023
            day.models[name] = kept[0]
        except NotAvailable as reason:
            found[name] = {"unavailable": str(reason)}
    return found


def _prompt(day: Day, rows: int = 1) -> Callable[[str], dict[str, torch.Tensor]]:
    ids = torch.arange(65, 65 + 8).repeat(rows, 1)
    return lambda name: {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def decode(day: Day) -> dict[str, Figures]:
    tokens = day.pick(64, 3)
    found = day.generate(_prompt(day), tokens)
    ours = day.models["ours"]
    if day.gpu.is_real:
        found["bound"] = day.gpu.measured(weight_reads(ours, tokens), REPEATS)
    return found


def static(day: Day) -> dict[str, Figures]:
    return day.generate(_prompt(day), day.pick(64, 3), cache_implementation="static", disable_compile=True)


def compiled(day: Day) -> dict[str, Figures]:
    """The first run, in which `generate` compiles the step, is not timed."""
    return day.generate(_prompt(day), day.pick(64, 3), cache_implementation="static")


def launches(day: Day) -> dict[str, Figures]:
    """Kernels for each new token: a longer answer minus a shorter one."""
    found = {}
    for name, model in day.models.items():
        given = day.gpu.moved(_prompt(day)(name))

        def kernels(tokens: int, model: Any = model, given: Any = given) -> int:
            return day.gpu.kernels(lambda: model.generate(**given, max_new_tokens=tokens, do_sample=False))

        kernels(2)
        found[name] = {"kernels": (kernels(6) - kernels(2)) / 4}
    return found


def prefill(day: Day) -> dict[str, Figures]:
    return day.forward(lambda name: clip_and_text(day.side(name), day.pick(16384, 256)))


def photo(day: Day) -> dict[str, Figures]:
    return day.forward(lambda name: image_inputs(day.side(name), day.gpu.shape, day.pick(24, 1)))


def frames(day: Day) -> dict[str, Figures]:
    """Vision tower and prefill of a clip whose frames are prepared."""
    number = day.pick(384, 3)
    video = ([np.zeros((378, 378, 3), np.uint8)] * number, {"timestamps": [0.5 * place for place in range(number)]})
    options = {"num_frames": number, "max_fps": None, "frame_sample_mode": "uniform_last_frame"}
    content = [{"type": "video", "video": video}, {"type": "text", "text": "What happens?"}]
    kwargs = {"videos_kwargs": options}
    return day.forward(lambda name: chat_inputs(day.side(name), day.gpu.shape, content, processor_kwargs=kwargs), 1)


def batch(day: Day) -> dict[str, Figures]:
    return day.generate(_prompt(day, 16), day.pick(64, 3))


def agreement(day: Day) -> dict[str, Figures]:
    """Largest difference of logits from the library's class, relative to the largest logit."""
    logits = {}
    for name, model in day.models.items():
        given = day.gpu.moved(image_inputs(day.side(name), day.gpu.shape, day.pick(8, 1)))
        found = day.gpu.result(lambda: model(**given, logits_to_keep=1).logits[0, -1])  # noqa: B023
        logits[name] = found[: model.config.get_text_config().vocab_size]
    if len(logits) < 2:
        raise NotAvailable("there is nothing to compare with")
    difference = (logits["ours"] - logits["native"]).abs().max() / logits["native"].abs().max()
    return {"ours": {"difference": float(difference)}}


def _attention(implementation: str) -> Callable[[Day], dict[str, Figures]]:
    """The prefill of ours with another attention; the model is set back afterwards."""

    def step(day: Day) -> dict[str, Figures]:
        if implementation.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
            raise NotAvailable("flash_attn is not installed")
        if not day.gpu.is_real:
            raise NotAvailable("it has no kernel for a pretend device")
        model = day.models["ours"]
        model.set_attn_implementation(implementation)
        try:
            given = day.gpu.moved(clip_and_text(day.side("ours"), day.pick(16384, 256)))
            return {"ours": day.gpu.measured(lambda: model(**given, use_cache=True, logits_to_keep=1), REPEATS)}
        finally:
            model.set_attn_implementation("sdpa")

    return step


def tests(day: Day) -> dict[str, Figures]:
    """The tests marked `gpu`, in a process of their own."""
    command = ["scripts/pytest", sys.executable, "-q", "-m", "gpu", "tests/unit/test_generation.py"]
    if not day.gpu.is_real:
        command.append("--collect-only")
    started = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    said = [line for line in done.stdout.splitlines() if line.strip()][-1]
    return {"ours": {"seconds": time.perf_counter() - started, "said": said}}


def vllm(day: Day) -> dict[str, Figures]:
    """16 answers of 64 tokens by vLLM with the plugin, in a process of its own; its start is not counted."""
    if importlib.util.find_spec("vllm") is None or not day.gpu.is_real:
        raise NotAvailable("vllm is not installed" if day.gpu.is_real else "it has no pretend device")
    from benchmarks.checkpoints import checkpoint

    day.models.clear()
    torch.cuda.empty_cache()
    code = (
        "import sys, time; from vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], dtype='bfloat16', max_model_len=4096, gpu_memory_utilization=0.5)\n"
        "settings = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)\n"
        "prompts = [{'prompt_token_ids': list(range(65, 73))}] * 16\n"
        "llm.generate(prompts, settings); started = time.perf_counter()\n"
        "llm.generate(prompts, settings); print('seconds', time.perf_counter() - started)\n"
    )
    folder = checkpoint(day.side("ours"), day.gpu.shape)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=180, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {"vllm": {"seconds": float(done.stdout.split("seconds")[-1].split()[0])}}


@dataclass(frozen=True)
class Step:
    """A line of the table: what it does, and the most seconds that it may take."""

    title: str
    run: Callable[[Day], dict[str, Figures]]
    seconds: float


STEPS = (
    Step("from_pretrained, 9.7 GB of bfloat16", load, 120),
    Step("decode, 64 tokens, eager", decode, 30),
    Step("kernels for each token", launches, 20),
    Step("prefill, 16,384 tokens", prefill, 30),
    Step("a photo of 25 crops: vision and prefill", photo, 30),
    Step("logits against the native class, bfloat16", agreement, 20),
    Step("384 frames: vision and prefill", frames, 60),
    Step("batch of 16, 64 tokens each", batch, 30),
    Step("decode, 64 tokens, static cache", static, 30),
    Step("decode, 64 tokens, static cache, compiled", compiled, 90),
    Step("prefill, 16,384 tokens, flex", _attention("flex_attention"), 60),
    Step("prefill, 16,384 tokens, flash", _attention("flash_attention_2"), 30),
    Step("tests marked gpu", tests, 60),
    Step("batch of 16, 64 tokens each, vLLM", vllm, 120),
)


# --- the run ---------------------------------------------------------------------------------------------------------


def line(title: str, found: dict[str, Figures]) -> str:
    """A row of the table: seconds and peak of each side, and their ratio."""
    cells = []
    for name, figures in found.items():
        parts = [duration(figures["seconds"])] if figures.get("seconds") is not None else []
        parts += [size(figures["peak_bytes"])] if figures.get("peak_bytes") is not None else []
        for key, value in figures.items():
            if key not in ("seconds", "peak_bytes"):
                parts.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {_in_a_cell(value)}")
        cells.append(f"{name}: {', '.join(parts)}")
    ours, native = (found.get(name, {}).get("seconds") for name in SIDES)
    ratio = f"ours / native {ours / native:.3f}" if ours and native else ""
    return f"| {title} | {'; '.join(cells)} | {ratio} |"


def _in_a_cell(value: Any) -> str:
    """Any text, such as that of an error, as one short line that ends no cell; the JSON has all of it."""
    text = " ".join(str(value).split()).replace("|", "/")
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL // 2]} ... {text[-MAX_CELL // 2 :]}"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu_day", description=__doc__)
    parser.add_argument("--pretend", action="store_true", help="a small model on a pretend device: tries the flow")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop (default 8)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR")
    arguments = parser.parse_args(given)
    if not (arguments.pretend or torch.cuda.is_available()):
        raise SystemExit("There is no GPU here. `--pretend` tries the flow.")
    started = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settings = Settings(quick=arguments.pretend, cache=arguments.cache.resolve())
    settings.cache.mkdir(parents=True, exist_ok=True)
    day = Day(PretendGpu() if arguments.pretend else Gpu(), settings)
    results: Figures = {"machine": machine(), "pretend": arguments.pretend, "steps": {}}
    print("| step | figures | |\n|---|---|---|", flush=True)
    failed = 0
    for step in STEPS:
        left = arguments.minutes * 60 - (time.monotonic() - started)
        try:
            if left < step.seconds:
                raise NotAvailable(f"skipped: {left:.0f} s are left, and it may take {step.seconds:.0f} s")
            with torch.no_grad():
                found = step.run(day)
        except NotAvailable as reason:
            found = {"ours": {"not measured": str(reason)}}
        except Exception as error:  # the other steps are worth having
            failed += 1
            found = {"ours": {"failed": f"{type(error).__name__}: {error}"}}
        results["steps"][step.title] = found
        results["seconds"] = time.monotonic() - started
        print(line(step.title, found), flush=True)
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{results['seconds']:.0f} s in all.")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
