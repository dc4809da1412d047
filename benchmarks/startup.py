"""Start-up: programs of their own, from nothing to an import, a processor, a first call and a first answer.

Time is that of the whole program, Python and torch included, or that of its last step; the peak is the program's own.
Both sides read folders with the same files, of which ours has the code as well: a vocabulary of the published size
with as many merges, as reading and searching those is what takes long, and hardly any weights. The code of checkpoints
is in transformers' cache of modules by then, and compiled. Programs have one thread: beside other work, two on two
cores wait for each other, which made the first call take 50 or 1,200 ms of CPU time by chance. Starts still differ,
hence the many rounds.

Of `step-processor` transformers takes the larger part of what ours needs more: it looks through the code of a
checkpoint for imports (`check_imports`, 27 ms of CPU time), hashes it and compares it with its cache (10 ms).
`step-package` is without this.
"""

import os
import subprocess
import sys
from typing import Any

from benchmarks.checkpoints import checkpoint
from benchmarks.harness import Finished, Goal, NotAvailable, Side, Work, row
from benchmarks.media import photo
from benchmarks.torchvision_peer import lines_for_programs

MAX_SECONDS = 300
MIN_ROUNDS = 5
GOALS = (Goal(1.1, "native"), Goal(1.1, "native", "peak"))

PACKAGE_PROCESSOR = "from molmo2.processing.processor import Molmo2Processor"
LIBRARY_PROCESSOR = "from transformers.models.molmo2 import Molmo2Processor"
AUTO_PROCESSOR = "from transformers import AutoProcessor\n"
LOADED = "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=is_remote)\n"
PHOTO = "from PIL import Image\n"
FIRST_CALL = """
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is it?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
"""
ANSWER = """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=is_remote)
model.generate(**inputs, max_new_tokens=1, do_sample=False)
"""
PEAK = """
import re
with open("/proc/self/status") as file:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", file.read()).group(1))
"""


def _program(side: Side, code: str, last: str = "") -> Work:
    """Runs Python code in a new interpreter, in which `folder`, `image` and `is_remote` are set.

    Args:
        last: The last step of the program; where there is one, its time alone counts.
    """
    folder, image = checkpoint(side, "start"), side.settings.cache / "photo.png"
    if not image.exists():
        photo(480, 640).save(image)
    given = f"folder, image, is_remote = {str(folder)!r}, {str(image)!r}, {side.name != 'native'}\n"
    timed = f"import time\nbegan = time.perf_counter()\n{last}\nprint(time.perf_counter() - began)\n" if last else ""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", lines_for_programs() + given + code + timed + PEAK]

    def work() -> Finished:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS, check=False
        )
        if done.returncode and side.name == "native":
            raise NotAvailable(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise RuntimeError(done.stderr)
        printed = done.stdout.split()
        return Finished(int(printed[-1]) * 1024, float(printed[-2]) if last else None)

    work()  # the files are in the page cache, code is compiled
    return work


def _row(name: str, title: str, sides: tuple[str, ...] = ("ours", "native", "peer")) -> Any:
    return row(name, title, bound="none", goals=GOALS, sides=sides, min_rounds=MIN_ROUNDS)


@_row("startup-import", "import of the processor's class, of the package", sides=("ours", "native"))
def startup_import(side: Side) -> Work:
    return _program(side, LIBRARY_PROCESSOR if side.name == "native" else PACKAGE_PROCESSOR)


@_row("startup-package", "processor, from_pretrained of the package's class", sides=("ours", "native"))
def startup_package(side: Side) -> Work:
    imported = LIBRARY_PROCESSOR if side.name == "native" else PACKAGE_PROCESSOR
    return _program(side, f"{imported}\nprocessor = Molmo2Processor.from_pretrained(folder)\n")


@_row("startup-processor", "AutoProcessor.from_pretrained")
def startup_processor(side: Side) -> Work:
    return _program(side, AUTO_PROCESSOR + LOADED)


@_row("startup-call", "AutoProcessor and a first call with a photo")
def startup_call(side: Side) -> Work:
    return _program(side, AUTO_PROCESSOR + LOADED + PHOTO + FIRST_CALL)


@_row("startup-answer", "processor, model and a first token about a photo")
def startup_answer(side: Side) -> Work:
    return _program(side, AUTO_PROCESSOR + LOADED + PHOTO + FIRST_CALL + ANSWER)


@_row("step-package", "of startup-package, from_pretrained alone", sides=("ours", "native"))
def step_package(side: Side) -> Work:
    imported = LIBRARY_PROCESSOR if side.name == "native" else PACKAGE_PROCESSOR
    return _program(side, f"{imported}\n", "processor = Molmo2Processor.from_pretrained(folder)")


@_row("step-processor", "of startup-call, AutoProcessor.from_pretrained alone")
def step_processor(side: Side) -> Work:
    return _program(side, AUTO_PROCESSOR, LOADED)


@_row("step-call", "of startup-call, the first call alone")
def step_call(side: Side) -> Work:
    return _program(side, AUTO_PROCESSOR + LOADED + PHOTO, FIRST_CALL)
