"""What a program that starts has to import: nothing that a processor, or the command line, does not need at once."""

import pytest

from support.checkpoints import write_checkpoint
from support.fresh_process import run
from support.paths import REPOSITORY

# Decoders, drawing, the command line, the model and what works on answers: imported where they are first used.
LATER = {"av", "decord", "torchcodec", "cv2", "matplotlib", "pandas", "scipy", "click", "tqdm", "PIL.ImageDraw"}
LATER |= {"PIL.ImageFont", "torch._dynamo", "torch.nn.attention.flex_attention", "concurrent.futures.process"}
OWN_LATER = ("modeling_molmo2", "molmo2.model", "molmo2.tools", "molmo2.long_video", "molmo2.cli", "molmo2.batch")


def unwanted(modules: list[str]) -> list[str]:
    return [
        name
        for name in modules
        if name in LATER or name.partition(".")[0] in LATER or any(part in name for part in OWN_LATER)
    ]


def test_what_comes_too_early_is_found():
    early = ["av.container", "PIL.ImageDraw", "molmo2.tools.draw", "transformers_modules.x.modeling_molmo2"]
    assert unwanted([*early, "html", "PIL.Image", "transformers_modules.x.processing_molmo2"]) == early


@pytest.mark.parametrize("is_remote", [True, False], ids=["remote code", "package"])
def test_a_processor_imports_what_it_needs(is_remote, tmp_path):
    folder, cache = write_checkpoint(tmp_path / "tiny", "olmo3", remote_code=is_remote), tmp_path / "cache"
    cache.mkdir()
    found = run("startup", cache, folder=folder, is_remote=is_remote, python_path=REPOSITORY / "src")
    assert any(name.endswith("processing_molmo2" if is_remote else "molmo2.processing") for name in found["loading"])
    assert unwanted(found["loading"]) == unwanted(found["call"]) == []
    assert len(found["loading"]) <= 60  # with the library's own parts of a processor there are 2,700


@pytest.mark.parametrize(
    ("module", "later"),
    [
        ("molmo2", {"numpy", "torch", "transformers", "PIL", "molmo2.grounding"}),
        ("molmo2.cli", {"numpy", "torch", "transformers", "PIL", "tqdm"}),
        ("molmo2.convert", {"torch", "transformers", "PIL"}),
    ],
)
def test_a_module_imports_what_it_needs(module, later, tmp_path):
    modules = run("imported", tmp_path, module=module, python_path=REPOSITORY / "src")
    assert module in modules
    assert not later & set(modules)
