"""Start-up: programs of their own, from nothing to an import, a processor, a first call and a first answer.

Time is that of the whole program, Python and torch included; the peak is the program's own. The code of checkpoints
is in transformers' cache of modules by then, and compiled.
"""

import subprocess
import sys
from dataclasses import replace

from benchmarks.checkpoints import checkpoint
from benchmarks.harness import Finished, Goal, NotAvailable, Side, Work, row
from benchmarks.media import photo
from benchmarks.torchvision_peer import lines_for_programs

MAX_SECONDS = 300
GOALS = (Goal(1.1, "native"), Goal(1.1, "native", "peak"))

PACKAGE_PROCESSOR = "from molmo2.processing.processor import Molmo2Processor"
LIBRARY_PROCESSOR = "from transformers.models.molmo2 import Molmo2Processor"
PROCESSOR = """
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=is_remote)
"""
FIRST_CALL = """
from PIL import Image
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


def _program(side: Side, code: str) -> Work:
    """Runs Python code in a new interpreter, in which `folder`, `image` and `is_remote` are set."""
    small = replace(side, settings=replace(side.settings, quick=True))  # weights take no time to load
    folder, image = checkpoint(small, "thin"), side.settings.cache / "photo.png"
    if not image.exists():
        photo(480, 640).save(image)
    given = f"folder, image, is_remote = {str(folder)!r}, {str(image)!r}, {side.name != 'native'}\n"
    command = [sys.executable, "-c", lines_for_programs() + given + code + PEAK]

    def work() -> Finished:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_SECONDS, check=False)
        if done.returncode and side.name == "native":
            raise NotAvailable(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise RuntimeError(done.stderr)
        return Finished(int(done.stdout.split()[-1]) * 1024)

    work()  # the files are in the page cache, code is compiled
    return work


SIDES = ("ours", "native", "peer")


@row("startup-import", "import of the processor's class, of the package", bound="none", goals=GOALS, sides=SIDES[:2])
def startup_import(side: Side) -> Work:
    return _program(side, LIBRARY_PROCESSOR if side.name == "native" else PACKAGE_PROCESSOR)


@row(
    "startup-package", "processor, from_pretrained of the package's class", bound="none", goals=GOALS, sides=SIDES[:2]
)
def startup_package(side: Side) -> Work:
    imported = LIBRARY_PROCESSOR if side.name == "native" else PACKAGE_PROCESSOR
    return _program(side, f"{imported}\nprocessor = Molmo2Processor.from_pretrained(folder)\n")


@row("startup-processor", "AutoProcessor.from_pretrained", bound="none", goals=GOALS, sides=SIDES)
def startup_processor(side: Side) -> Work:
    return _program(side, PROCESSOR)


@row("startup-call", "AutoProcessor and a first call with a photo", bound="none", goals=GOALS, sides=SIDES)
def startup_call(side: Side) -> Work:
    return _program(side, PROCESSOR + FIRST_CALL)


@row("startup-answer", "processor, model and a first token about a photo", bound="none", goals=GOALS, sides=SIDES)
def startup_answer(side: Side) -> Work:
    return _program(side, PROCESSOR + FIRST_CALL + ANSWER)
