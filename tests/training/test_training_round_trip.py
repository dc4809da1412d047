"""From a native checkpoint to transformers, tuned there, back to a native one, and to transformers again."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from molmo2.convert.cli import main
from molmo2.training import DataCollator, lora_targets
from support.checkpoints import module_cache
from support.native_checkpoints import ShardLayout, native_section, native_tensors, write_base_tokenizer, write_sharded
from support.training_cases import CONVERSATIONS, TREES

pytestmark = pytest.mark.slow

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory):
    with module_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(write_base_tokenizer(tmp_path_factory.mktemp("tokenizer") / "base"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tokenizer):
    section = native_section()
    folder = tmp_path_factory.mktemp("native") / "run"
    write_sharded(folder, section, native_tensors(section), ShardLayout(2, 2))
    output = folder.parent / "converted"
    assert main([str(folder), str(output), "--tokenizer", tokenizer, "--quiet"]) == 0
    return output


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def tuned(converted: Path, folder: Path, dtype: torch.dtype, adapters: bool) -> Path:
    """The converted model after a step of training, saved with its processor."""
    model = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=True, dtype=torch.float32).train()
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
    if adapters:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=lora_targets(), init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    inputs = DataCollator(processor)(
        [{"messages": TREES["image"]}, {"messages": CONVERSATIONS["video"]}, {"messages": CONVERSATIONS["text"]}]
    )
    model(**inputs).loss.backward()
    optimizer.step()
    model = model.merge_and_unload() if adapters else model
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tuned_weights_come_back_byte_by_byte(tmp_path, converted, tokenizer, dtype, adapters):
    saved = tuned(converted, tmp_path / "tuned", getattr(torch, dtype), adapters)
    settings = ["--native-config", str(converted / "native_config.yaml")]
    assert main([str(saved), str(tmp_path / "native"), "--to-native", "--quiet", *settings]) == 0
    again = tmp_path / "again"
    assert main([str(tmp_path / "native"), str(again), "--tokenizer", tokenizer, "--dtype", dtype, "--quiet"]) == 0
    before, expected, found = stored(converted), stored(saved), stored(again)
    assert found.keys() == expected.keys()
    changed = set()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
        changed |= set() if torch.equal(before[name].to(tensor.dtype), tensor) else {name}
    targets = {name for name in expected if re.fullmatch(lora_targets() + r"\.weight", name)}
    assert changed == targets if adapters else len(changed) > 0.9 * len(expected)
    for name in FILES:
        assert (again / name).read_bytes() == (converted / name).read_bytes()
