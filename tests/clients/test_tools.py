"""What other people's packages make of our files: supervision, Label Studio's SDK, Datumaro, SAM 2, gguf, mlx-vlm.

Runs in an environment of its own (`constraints/tools.txt`).
"""

# ruff: noqa: E402  (SAM 2 in transformers wants torchvision importable first)

import json
import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("supervision", reason="tools have an environment of their own")
pytest.importorskip("datumaro", reason="tools have an environment of their own")
pytest.importorskip("label_studio_sdk", reason="tools have an environment of their own")

from benchmarks.torchvision_peer import make_importable

make_importable()

import gguf
import mlx.core as mx
import supervision as sv
from datumaro.components.annotation import AnnotationType
from datumaro.components.dataset import Dataset
from label_studio_sdk._extensions.label_studio_tools.postprocessing.video import extract_key_frames
from label_studio_sdk.converter import Converter
from label_studio_sdk.label_interface import LabelInterface
from mlx.utils import tree_flatten
from mlx_vlm.convert import convert
from mlx_vlm.models.molmo2 import config as mlx_molmo2
from mlx_vlm.utils import load_model
from safetensors.torch import load_file
from transformers import (
    Sam2ImageProcessor,
    Sam2Processor,
    Sam2VideoInferenceSession,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
)

from clients.test_readme import python_blocks
from miniature import native
from molmo2.convert.exchange_names import exchange_patterns, mlx_config
from molmo2.convert.names import LAYER_NUMBER
from molmo2.grounding.files import save
from molmo2.interop import (
    from_cvat,
    from_label_studio,
    label_studio_config,
    sam2_processor_arguments,
    sam2_prompts,
    to_cvat,
    to_label_studio,
    to_supervision,
)
from molmo2.model.modeling import Molmo2ForConditionalGeneration
from support.checkpoints import REPOSITORY, image_inputs, read_json, write_checkpoint, write_json
from unit.test_interop import FPS, IMAGES, TRACKS, numbers, without_ids

SIZES = IMAGES.media.sizes


# --- supervision


def test_supervision_draws_key_points_where_they_are():
    found = to_supervision(IMAGES)
    assert list(found) == [0, 1]
    key_points = found[0]
    assert isinstance(key_points, sv.KeyPoints)
    assert key_points.xy.tolist() == [[[160, 192]], [[320, 240]]]
    assert key_points.data["class_name"].tolist() == ['boats & "ships"', "sail"]
    scene = np.zeros((480, 640, 3), np.uint8)
    drawn = sv.VertexAnnotator(color=sv.Color.WHITE, radius=2).annotate(scene, key_points)
    assert drawn[192, 160].tolist() == [255, 255, 255]
    assert drawn[240, 320].tolist() == [255, 255, 255]
    assert np.count_nonzero(drawn[:, :, 0]) < 100


def test_supervision_counts_tracked_objects_that_cross_a_line():
    """The ids hold a track together: object 1 goes from left to right over the line, object 2 stays."""
    found = to_supervision(TRACKS, box_size=8)
    assert [(frame, detections.tracker_id.tolist()) for frame, detections in found.items()] == [
        (0, [1, 2]),
        (15, [1, 2]),
        (30, [1]),
        (45, [1, 2]),
    ]
    assert found[0].xyxy[0].tolist() == pytest.approx([124, 32, 132, 40])
    line = sv.LineZone(start=sv.Point(138, 0), end=sv.Point(138, 360), triggering_anchors=[sv.Position.CENTER])
    for detections in found.values():
        line.trigger(detections)
    assert (line.in_count, line.out_count) in [(1, 0), (0, 1)]
    zone = sv.PolygonZone(np.array([[300, 0], [400, 0], [400, 200], [300, 200]]))
    assert zone.trigger(found[0]).tolist() == [False, True]
    assert to_supervision(TRACKS)[30].data["tracker_id"].tolist() == [1]


# --- Label Studio


def test_label_studio_accepts_predictions_for_images():
    tasks = json.loads(json.dumps(to_label_studio(IMAGES, ["https://x/a.jpg", "https://x/b.jpg"])))
    labels = ['boats & "ships"', "sail"]
    interface = LabelInterface(label_studio_config(labels))
    interface.validate()
    assert interface.get_control("points").labels == labels
    for task in tasks:
        assert interface.validate_prediction(task["predictions"][0], return_errors=True) == []
    of_another_label = LabelInterface(label_studio_config(["sail"]))
    assert of_another_label.validate_prediction(tasks[0]["predictions"][0], return_errors=True) != []


def test_label_studios_converter_reads_the_same_pixels(tmp_path):
    """Its export from annotations has our points, in percent of the same sizes."""
    labels = ['boats & "ships"', "sail"]
    tasks = to_label_studio(IMAGES, ["a.jpg", "b.jpg"])
    for number, task in enumerate(tasks, start=1):
        (prediction,) = task.pop("predictions")
        task |= {"id": number, "annotations": [{"id": number, "result": prediction["result"], "was_cancelled": False}]}
    source = save(json.dumps(tasks), tmp_path / "tasks.json")
    Converter(label_studio_config(labels), str(tmp_path), download_resources=False).convert_to_json(
        str(source), str(tmp_path / "out"), is_dir=False
    )
    exported = (tmp_path / "out" / "result.json").read_text(encoding="utf-8")
    assert numbers(from_label_studio(exported)) == numbers(IMAGES)


def test_label_studio_interpolates_only_between_sampled_frames_with_the_object():
    (task,) = json.loads(json.dumps(to_label_studio(TRACKS, ["x.mp4"], box_size=20, fps=FPS, num_frames=90)))
    interface = LabelInterface(label_studio_config(["cup"], is_video=True))
    interface.validate()
    assert interface.is_video_object_tracking()
    result = task["predictions"][0]["result"]
    assert interface.validate_prediction(task["predictions"][0], return_errors=True) == []
    first, second = (
        {box["frame"]: box for box in region["value"]["sequence"]} for region in extract_key_frames(result)
    )
    assert sorted(first) == list(range(1, 47))
    assert sorted(second) == [*range(1, 17), 46]
    middle = first[24]  # 8 of 15 frames between 0.5 s and 1.0 s
    assert middle["x"] + middle["width"] / 2 == pytest.approx(21 + 1 * 8 / 15)


# --- CVAT


def datumaro_points(path):
    """Points as Datumaro reads them: (item, label, x, y, attributes)."""
    data = Dataset.import_from(str(path), "cvat")
    labels = data.categories()[AnnotationType.label]
    return [
        (item, labels[annotation.label].name, *map(float, annotation.points), annotation.attributes)
        for item in data
        for annotation in item.annotations
    ]


def test_datumaro_reads_points_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    for name, size in zip(("a.png", "b.png"), SIZES):
        Image.new("RGB", size).save(tmp_path / "images" / name)
    save(to_cvat(IMAGES, ["a.png", "b.png"]), tmp_path / "annotations.xml")
    found = sorted((item.attributes["frame"], label, x, y) for item, label, x, y, _ in datumaro_points(tmp_path))
    expected = [(point.image_index, point.label, point.x, point.y) for point in IMAGES.points]
    assert [row[:2] for row in found] == [row[:2] for row in sorted(expected)]
    np.testing.assert_allclose([row[2:] for row in found], [row[2:] for row in sorted(expected)], rtol=0, atol=1e-4)


def test_datumaro_reads_tracks(tmp_path):
    save(to_cvat(TRACKS, num_frames=90), tmp_path / "annotations.xml")
    rows = datumaro_points(tmp_path)
    seen = {
        (item.attributes["frame"], values["track_id"]): (label, pytest.approx((x, y), abs=1e-4))
        for item, label, x, y, values in rows
        if not values["outside"]
    }
    assert seen == {(point.frame.source_index, point.id): (point.label, (point.x, point.y)) for point in TRACKS.points}
    gone = [item.attributes["frame"] for item, *_, values in rows if values["outside"]]
    assert sorted(gone) == [16, 46, 46]


def test_what_datumaro_writes_is_read(tmp_path):
    (tmp_path / "in" / "images").mkdir(parents=True)
    for name, size in zip(("a.png", "b.png"), SIZES):
        Image.new("RGB", size).save(tmp_path / "in" / "images" / name)
    save(to_cvat(IMAGES, ["a.png", "b.png"]), tmp_path / "in" / "annotations.xml")
    Dataset.import_from(str(tmp_path / "in"), "cvat").export(str(tmp_path / "out"), "cvat", save_media=True)
    (file,) = (tmp_path / "out").glob("*.xml")
    read = from_cvat(file.read_text(encoding="utf-8"))
    rounded = [(*row[:3], round(row[3], 2), round(row[4], 2)) for row in without_ids(IMAGES)]
    assert without_ids(read) == rounded
    assert read.media.sizes == SIZES


# --- SAM 2


def test_sam2s_processor_scales_prompts_to_its_own_grid():
    images = [Image.new("RGB", size) for size in SIZES]
    processor = Sam2Processor(Sam2ImageProcessor())
    arguments = sam2_processor_arguments(sam2_prompts(IMAGES))
    assert list(arguments) == [0, 1]
    for index, given in arguments.items():
        inputs = processor(images=images[index], **given, return_tensors="pt")
        points = [point for point in IMAGES.points if point.image_index == index]
        expected = torch.tensor([[[[1024 * point.x_norm, 1024 * point.y_norm]] for point in points]])
        torch.testing.assert_close(inputs["input_points"], expected, rtol=0, atol=1e-3)
        assert inputs["input_labels"].tolist() == [[[1]] * len(points)]


def test_sam2s_video_session_gets_each_object_in_its_frame():
    processor = Sam2VideoProcessor(Sam2ImageProcessor(), Sam2VideoVideoProcessor())
    session = Sam2VideoInferenceSession(
        video=torch.zeros(60, 3, 8, 8), video_height=360, video_width=640, dtype=torch.float32
    )
    for given in sam2_processor_arguments(sam2_prompts(TRACKS)).values():
        processor.add_inputs_to_inference_session(session, **given)
    assert session.obj_ids == [1, 2]
    found = {
        (frame, session.obj_idx_to_id(number)): inputs["point_coords"].flatten().tolist()
        for number, frames in session.point_inputs_per_obj.items()
        for frame, inputs in frames.items()
    }
    assert found == {
        (point.frame.source_index, point.id): pytest.approx([1024 * point.x_norm, 1024 * point.y_norm], abs=1e-3)
        for point in TRACKS.points
    }


# --- GGUF and MLX


@pytest.mark.parametrize(("architecture", "norm_after"), [("qwen3", False), ("olmo2", True)])
def test_gguf_knows_every_name(architecture, norm_after):
    """As tensors of these architectures, or of the projector files with the vision part; Qwen 2 has biases."""
    kinds = (architecture, "clip", "qwen2")
    archs = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name in kinds]
    allowed = {gguf.TENSOR_NAMES[tensor] for arch in archs for tensor in gguf.MODEL_TENSORS[arch]}
    names = {name for row in exchange_patterns("gguf", norm_after=norm_after) for name in row.foreign}
    assert {re.sub(r"\.(weight|bias)$", "", name).format("{bid}") for name in names} - allowed == set()


@torch.no_grad()
def test_mlx_loads_a_folder_and_computes_the_same_text(tmp_path):
    """mlx-vlm's own loader makes the names of the table, its model takes all of them, and text logits agree."""
    folder = write_checkpoint(tmp_path / "molmo2", "qwen3")
    own = Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    config = mlx_config(read_json(folder / "config.json"))
    write_json(folder / "config.json", config)
    model = load_model(folder)
    assert model.vision_tower.vit_layers == config["adapter_config"]["vit_layers"] == [7, 1]
    table = {row.targets[0]: row.foreign[0] for row in exchange_patterns("mlx")}
    names = load_file(folder / "model.safetensors")
    assert sorted(name for name, _ in tree_flatten(model.parameters())) == sorted(
        table[LAYER_NUMBER.sub("{}", name)].format(*LAYER_NUMBER.findall(name)) for name in names
    )
    ids = torch.randint(0, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    found = torch.tensor(np.array(model(mx.array(ids.numpy())).logits))
    torch.testing.assert_close(found, own(ids).logits, rtol=1e-4, atol=1e-4)
    again = Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = image_inputs(folder)
    torch.testing.assert_close(again(**inputs).logits, own(**inputs).logits, rtol=0, atol=0)


def test_mlx_vlm_converts_a_folder(tmp_path):
    """`mlx_vlm.convert` writes a folder of its own names, which its loader takes and which says the same."""
    folder, converted = native.to_transformers(native.CHECKPOINT, tmp_path / "molmo2"), tmp_path / "mlx"
    write_json(folder / "config.json", mlx_config(read_json(folder / "config.json")))
    convert(str(folder), str(converted))
    names = {name for path in converted.glob("*.safetensors") for name in load_file(path)}
    model = load_model(converted)
    assert names == {name for name, _ in tree_flatten(model.parameters())}
    ids = mx.arange(24)[None]
    np.testing.assert_array_equal(np.array(model(ids).logits), np.array(load_model(folder)(ids).logits))


def test_mlx_counts_published_layers_from_another_depth():
    """Why `mlx_config` is needed; where this fails, docs/hub.md has a caveat less."""
    vit = mlx_molmo2.VitConfig.from_dict({"num_hidden_layers": 27})
    assert [layer % vit.num_hidden_layers for layer in (-3, -9)] == [22, 16]
    fixed = mlx_config({"vit_config": {"num_hidden_layers": 27}, "adapter_config": {"vit_layers": [-3, -9]}})
    assert fixed["adapter_config"]["vit_layers"] == [24, 18]
    assert mlx_molmo2.VitConfig.from_dict(fixed["vit_config"]).num_hidden_layers == 25


# --- The page


def test_the_page_says_what_is_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    page = REPOSITORY / "docs" / "tools.md"
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        for line in re.findall(r"^print\(.*\)  # (.*)$", block, re.M):
            assert line in printed
    assert from_cvat((tmp_path / "video.xml").read_text(), fps=30).kind == "video"
    text = page.read_text(encoding="utf-8")
    assert [
        name for name in ("supervision", "datumaro", "label-studio-sdk") if f"{name} {version(name)}" not in text
    ] == []
