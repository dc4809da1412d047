"""The package behind transformers' Auto classes: no code of a checkpoint is executed."""

import pytest
import transformers

from molmo2.convert import OutputError, add_remote_code
from molmo2.registration import load
from support.checkpoints import read_json, write_checkpoint
from support.fresh_process import run

AUTO_CLASSES = {
    "AutoConfig": "Molmo2Config",
    "AutoImageProcessor": "Molmo2ImageProcessor",
    "AutoModel": "Molmo2Model",
    "AutoModelForImageTextToText": "Molmo2ForConditionalGeneration",
    "AutoModelForMultimodalLM": "Molmo2ForConditionalGeneration",
    "AutoProcessor": "Molmo2Processor",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a new process finds that registers the package and loads a checkpoint whose own code would raise."""
    folder = write_checkpoint(tmp_path_factory.mktemp("registered") / "Molmo2-4B", "qwen3")
    for file in folder.glob("*.py"):
        file.write_text("raise RuntimeError('the code of the checkpoint was executed')\n", encoding="utf-8")
    cache = tmp_path_factory.mktemp("cache")
    return run("registered", cache, folder=folder, target=cache / "saved"), cache / "saved"


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_auto_classes_take_the_package(report, name):
    found = report[0]["classes"][name]
    if not hasattr(transformers, name):
        assert found == {"error": "absent"}
        return
    if getattr(getattr(transformers, name), "is_dummy", False):  # needs torchvision in this release
        assert found["error"] == "ImportError"
        return
    assert found.get("class") == AUTO_CLASSES[name], found.get("trace")
    assert found["module"].partition(".")[0] == "molmo2"


def test_load_and_pipelines_take_the_package(report):
    found = report[0]
    assert found["load"] == ["molmo2.model.modeling", "molmo2.processing.processor"]
    assert found["parts"] == {
        "image_processor": "molmo2.image.processing",
        "video_processor": "molmo2.video.processing",
    }
    assert found["pipeline"] == found["architecture"] == "molmo2.model.modeling"
    assert found["training"] is False
    assert found["num_frames"] == 3
    assert found["same processor as AutoProcessor's"] is True


def test_code_of_the_checkpoint_is_refused(report):
    refused = report[0]["refused"]
    assert refused["error"] == "ValueError"
    assert "takes no ['trust_remote_code']" in refused["message"]


def test_what_is_saved_names_no_code_that_is_not_there(report):
    """And `add_remote_code` puts both there."""
    saved = report[1]
    names = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
    for name in names:
        assert "auto_map" not in read_json(saved / name), name
    add_remote_code(saved)
    for name in names:
        for reference in read_json(saved / name)["auto_map"].values():
            assert (saved / f"{reference.partition('.')[0]}.py").is_file(), (name, reference)
    answer = run("remote_logits", saved.parent, folder=saved)
    assert answer["module"].startswith("transformers_modules.")
    assert answer["sum"] == report[0]["sum"]


def test_remote_code_wants_a_molmo2_folder(tmp_path):
    with pytest.raises(OutputError, match=r"no config.json of the model type 'molmo2'"):
        add_remote_code(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_named_as_such(tmp_path):
    """transformers would speak of tokenizers and names of repositories."""
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=r"There is no folder '.*nowhere'"):
            load(name)
    with pytest.raises(FileNotFoundError, match=r"has no config.json. Pass a checkpoint folder"):
        load(tmp_path)
    (tmp_path / "step200").mkdir()
    with pytest.raises(FileNotFoundError, match=r"training checkpoint. `molmo2-convert` makes"):
        load(str(tmp_path))
    with pytest.raises(OSError, match=r"somebody/no-such-model|connect|offline"):
        load("somebody/no-such-model", local_files_only=True)
