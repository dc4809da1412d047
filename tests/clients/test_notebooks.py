"""The notebooks run from clean kernels, and what is stored in them is what they print."""

import base64
import io
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("nbformat")

import nbformat

from support.answers import assert_same_answer
from support.checkpoints import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "notebooks"))
from execute import executed

pytestmark = pytest.mark.slow

TRAIN = ("finetune_lora", "video_pointing")  # for minutes; test_training_example.py runs their cells with less of it
PATHS = [path for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")) if path.stem not in TRAIN]
KEY_OUTPUTS = {
    "images": ["Counting the <points coords=", "points,red circles,,1,1,30.78,57.57"],
    "videos": ["24 frames", "[1.0, 1.5, 2.0]", "6,1,36.84,33.48"],
    "convert_and_push": [
        "equal the checkpoint",
        "Probed: logits",
        "the same as here: True",
        "the same weights: True",
    ],
}
MAX_BYTES = 200_000
MEASURED = re.compile(r"(?<=logits differ by )\S+")
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    return MEASURED.sub("little", output.get("text", output.get("data", {}).get("text/plain", "")))


def image_size(output):
    """(width, height), or None without an image."""
    data = output.get("data", {})
    encoded = next((data[name] for name in data if name.startswith("image/")), None)
    return None if encoded is None else Image.open(io.BytesIO(base64.b64decode(encoded))).size


def test_there_are_notebooks_for_everything():
    assert {path.stem for path in PATHS} == set(KEY_OUTPUTS)


@each
def test_a_clean_kernel_prints_what_is_stored(path):
    stored, found = nbformat.read(path, as_version=4), executed(path)
    for old, new in zip(code_cells(stored), code_cells(found), strict=True):
        where = f"{path.name}, cell {new.id}; after a change that is meant: make notebooks"
        if "model" in new.metadata.get("tags", []):
            assert_same_answer("".join(map(text_of, new.outputs)), "".join(map(text_of, old.outputs)))
            continue
        assert [output.output_type for output in new.outputs] == [output.output_type for output in old.outputs], where
        assert [text_of(output) for output in new.outputs] == [text_of(output) for output in old.outputs], where
        assert [image_size(output) for output in new.outputs] == [image_size(output) for output in old.outputs]
    printed = "".join(text_of(output) for cell in code_cells(found) for output in cell.outputs)
    for text in KEY_OUTPUTS[path.stem]:
        assert text in printed


@each
def test_what_is_stored_is_small_complete_and_of_no_machine(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < MAX_BYTES
    assert [cell.id for cell in notebook.cells] == [f"{path.stem}-{n:02d}" for n in range(len(notebook.cells))]
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        shown = [text_of(output), output.get("data", {}).get("text/html", "")]
        for machine in (str(Path.home()), "/tmp", "/home/", "/Users/", str(REPOSITORY)):
            assert machine not in "".join(re.sub(r"base64,\S+", "", part) for part in shown)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
