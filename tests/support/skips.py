"""Which tests may be skipped, and why: everywhere else a skip is a check that silently did not take place.

`MOLMO2_STRICT=1` makes a failure of every skip whose reason fits no row here; continuous integration sets it.
`MOLMO2_STRICT=without-reference` is for machines without the reference data beside the checkout.
"""

import os
import re

# Pattern of a reason -> why the test may be left out.
ALLOWED = {
    r"this transformers has no Molmo2 of its own|this release has no native Molmo2": "older releases",
    r"transformers has a class of its own since": "the test is about releases without one",
    r"this release of TRL passes on the inputs of some models alone": "its collators know the keys of a few models",
    r"transformers' own class cannot express": "nothing to compare with",
    r"an offloaded cache needs an accelerator|needs an accelerator|CUDA": "GPU checks run on machines with a GPU",
    r"which the pretend device does not follow": "masks of early releases go through vmap",
    r"static caches of early releases keep their place on the host": "no step of theirs can be captured",
    r"ffprobe is not installed": "a system package; our own code needs none",
    r"needs FiftyOne and a database": "`make test-fiftyone` runs them",
    r"(could not import|No module named) '(peft|trl|datasets|tensorboard|wandb)": "`make test-training` runs them",
    r"could not import '(gradio|playwright|nbclient|ipykernel|nbformat)'": "`make test-app` runs them",
    r"could not import '(ray|pyarrow.parquet|fastapi)'": "`make test-batch` runs them",
    r"needs vLLM": "`make test-vllm` runs them",
    r"quantisation has an environment of its own": "`make test-quantization` runs them",
    r"lmms-eval has an environment of its own": "`make test-lmms-eval` runs them",
    r"VLMEvalKit has an environment of its own": "`make test-vlmevalkit` runs them",
    r"metrics have an environment of their own": "`make test-metrics` runs them",
    r"tools have an environment of their own": "`make test-tools` runs them",
    r"(ms-swift|axolotl) has an environment of its own": "`make test-training` runs them",
    r"There is no browser\. Install chromium": "`make test-app BROWSER=optional`; not every machine can have one",
    r"this release of TRL learns questions too": "a release of TRL that cannot do it",
    r"mounting is not permitted here|needs the right to mount": "needs root and a kernel that lets it",
    r"on Linux only|is the Linux kernel's|needs kill -9": "other systems",
    r"this build of PyAV has no encoder": "builds differ in their codecs",
    r"torchcodec cannot be loaded": "it needs FFmpeg's libraries, which pip does not bring; decord and PyAV must load",
    r"part of Python from 3.11 on|could not import 'tomllib'": "older Python",
}
WITHOUT_REFERENCE = r"beside the checkout|(given files|shared media) are not here|got empty parameter set"


def strictness() -> str:
    """What MOLMO2_STRICT says: "1", "without-reference", or nothing, with which skips are fine.

    Raises:
        ValueError: MOLMO2_STRICT says something else.
    """
    value = os.environ.get("MOLMO2_STRICT", "")
    if value in ("", "0"):
        return ""
    if value not in ("1", "without-reference"):
        raise ValueError(f"MOLMO2_STRICT is {value!r}; expected 1, without-reference, or nothing.")
    return value


def is_allowed(reason: str, level: str) -> bool:
    """Whether a test may be skipped for this reason."""
    patterns = [*ALLOWED, *([WITHOUT_REFERENCE] if level == "without-reference" else [])]
    return any(re.search(pattern, reason) for pattern in patterns)
