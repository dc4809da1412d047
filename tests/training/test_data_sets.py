"""From rows as `datasets` gives them to training batches: every column type survives arrow and parquet."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo2.data import Examples, Folder, Settings
from molmo2.training import DataCollator, TokenWeighting, build_training_example
from support import data_rows
from support.model_inputs import processor

CLIPS = Path(__file__).resolve().parents[2] / "examples" / "data"
POINTS = {
    **data_rows.VIDEO_POINT,
    "video_id": "nasa_clip",
    "clip_start": 0.5,
    "clip_end": 2.0,
    "two_fps_timestamps": [1.0, 1.5],
}


def decoded(example):
    return processor().tokenizer.decode(example["input_ids"])


def test_points_are_at_times_that_the_prompt_prints():
    """Frames of a clip are printed with the times of the whole video, which the answer repeats."""
    (row,) = Examples("allenai/Molmo2-VideoPoint", [POINTS], Folder(CLIPS), seed=3)
    answer = row["messages"][-1]["content"][0]["text"]
    assert "<points" in answer
    example = build_training_example(processor(), row["messages"], weighting=TokenWeighting())
    text = decoded(example)
    printed = [float(time) for time in re.findall(r"(\d+\.\d)(?= ?<)", text.split("<|im_start|>")[0])]
    assert printed == [0.5, 1.0, 1.5, 2.0]
    assert {1.0, 1.5} <= set(printed)
    assert answer in text
    assert example["loss_weights"].unique().tolist() == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize("num_frames", [4, 20])
@pytest.mark.parametrize("name", ["Molmo2-VideoTrack", "molmo2-mevis"])
def test_tracks_are_at_times_that_the_prompt_prints(name, num_frames):
    """At the rate of the answer, and where more frames fit at a multiple of it that divides the file's rate."""
    row = {**data_rows.ROWS[f"allenai/{name}"], "clip": None, "video": "nasa_clip"}
    (item,) = Examples(f"allenai/{name}", [row], Folder(CLIPS))
    example = build_training_example(processor(), item["messages"], weighting=TokenWeighting(), num_frames=num_frames)
    printed = re.findall(r"(\d+\.\d)(?= ?<)", decoded(example).split("<|im_start|>")[0])
    answer = item["messages"][-1]["content"][0]["text"]
    times = [group.split(" ")[0] for group in answer.split('"')[1].split("\t")]
    assert times == ["0.0", "0.5", "1.0"]
    assert set(times) <= set(printed)
    assert (len(printed) > 2 * len(times)) == (num_frames == 20)
    assert example["loss_weights"].unique().tolist() == pytest.approx([0.0, 0.2])


def test_explanations_and_counts_are_pointing_answers(tmp_path):
    """The style of an explanation stands before its question, that of a count does not; both have weight 0.2."""
    Image.new("RGB", (200, 100)).save(tmp_path / "boats.png")
    for name, head in (("pixmo-point-explanations", "point_qa: Is it a harbour?"), ("pixmo-count", None)):
        own = {**data_rows.ROWS[f"allenai/{name}"], "image_url": "boats"}
        (row,) = Examples(f"allenai/{name}", [own], Folder(tmp_path))
        example = build_training_example(processor(), row["messages"], weighting=TokenWeighting(), max_crops=1)
        question = row["messages"][0]["content"][-1]["text"] if head is None else head
        assert f"<|im_start|>user\n{question}<|im_end|>" in decoded(example)
        assert row["messages"][1]["content"][0]["text"] in decoded(example)
        assert example["loss_weights"].unique().tolist() == pytest.approx([0.0, 0.2])


def test_trees_share_their_video():
    rows = [{**data_rows.USER_QA, "video_id": "nasa_clip", "question": text} for text in ("Why?", "Where?")]
    examples = Examples("allenai/Molmo2-AskModelAnything", rows, Folder(CLIPS))
    batch = DataCollator(processor(), options={"num_frames": 2})(list(examples))
    assert batch["branch_ids"].max() == 2
    assert len(batch["video_grids"]) == 1


@pytest.mark.parametrize("form", ["arrow", "parquet"])
@pytest.mark.parametrize("name", data_rows.ROWS)
def test_rows_of_datasets(name, form, tmp_path):
    datasets = pytest.importorskip("datasets")
    row = {key: value for key, value in data_rows.ROWS[name].items() if value not in (None, [])}
    rows = datasets.Dataset.from_list([row, row])
    if form == "parquet":
        rows.to_parquet(tmp_path / "rows.parquet")
        rows = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    settings = Settings(config="chart", image_size=lambda source: (200, 100))
    found = list(Examples(name, rows, lambda reference: reference.name, settings))
    assert found == list(Examples(name, [row, row], lambda reference: reference.name, settings))


@pytest.mark.parametrize("name", data_rows.ROWS)
def test_rows_of_pandas(name):
    """Lists within rows are arrays there, also lists in lists."""
    datasets = pytest.importorskip("datasets")
    row = {key: value for key, value in data_rows.ROWS[name].items() if value not in (None, [])}
    (as_arrays,) = datasets.Dataset.from_list([row]).to_pandas().to_dict("records")
    settings = Settings(config="chart", image_size=lambda source: (200, 100))
    found = Examples(name, [as_arrays], lambda reference: reference.name, settings)
    assert list(found) == list(Examples(name, [row], lambda reference: reference.name, settings))
    assert not found.report.left_out


def test_sizes_of_held_images(tmp_path):
    """An image that a row holds is not decoded to learn its size; it is upright both before and after decoding."""
    datasets = pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: 100 by 200 in the file
    Image.new("RGB", (100, 200)).save(tmp_path / "turned.jpg", exif=exif)
    held = {"bytes": (tmp_path / "turned.jpg").read_bytes(), "path": None}
    row = {name: value for name, value in data_rows.PIXMO_COUNT.items() if name != "image_url"}
    rows = datasets.Dataset.from_list([{**row, "image": held}]).cast_column("image", datasets.Image())
    (example,) = Examples("allenai/pixmo-count", rows)
    image, _ = example["messages"][0]["content"]
    assert image["image"].size == (200, 100)
    assert '"1 1 100 900 2 500 200"' in example["messages"][1]["content"][0]["text"]


def test_rows_of_lists_and_decoded_images(tmp_path):
    """A list of rows may be stored as a row of lists; images are decoded when an example is taken, not before."""
    datasets = pytest.importorskip("datasets")
    image = Image.fromarray(np.full((4, 4, 3), 200, dtype=np.uint8))
    row = {**data_rows.COSYN_POINT, "image": image, "answer_points": [{"x": [50.0, 10.0], "y": [25.0, 20.0]}]}
    rows = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    (example,) = Examples("allenai/CoSyn-point", rows)
    image, _ = example["messages"][0]["content"]
    assert image["image"].size == (4, 4)
    assert example["messages"][1]["content"][0]["text"] == '<points coords="1 1 100 200 2 500 250">bar</points>'
    points = {"x": [50.0], "y": [20.0]}
    as_lists = {**data_rows.PIXMO_POINTS, "points": points}
    as_rows = {**data_rows.PIXMO_POINTS, "points": [{"x": 50.0, "y": 20.0}]}
    first, second = (list(Examples("allenai/pixmo-points", [each])) for each in (as_lists, as_rows))
    assert first == second
