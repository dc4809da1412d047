"""Answers to files and back: what a format can hold comes back as it was."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from molmo2.grounding.files import (
    CSV_COLUMNS,
    export_grounding,
    from_coco,
    from_csv,
    from_json,
    from_mot,
    save,
    to_coco,
    to_csv,
    to_json,
    to_mot,
)
from molmo2.grounding.parse import MediaInfo, SampledFrame, parse_grounding
from molmo2.tools.draw import DrawingStyle, contact_sheet, draw
from molmo2.tools.draw_video import MarksOverTime

VIDEO = MediaInfo(
    "video",
    ((640, 360),),
    (SampledFrame(0.0, 0, 0, 0.0, 5.0), SampledFrame(0.5, 1, 15, 0.5005, 5.5005), SampledFrame(0.98, 2, 29, 0.967)),
)
ANSWERS = {
    "image": ('Counting the <points coords="1 1 046 700 2 310 655">mugs</points> shows a total of 2.', [(1000, 800)]),
    "several images": (
        '<points coords="1 1 250 400\t3 2 100 125">boats</points>',
        [(640, 480), (30, 30), (1280, 720)],
    ),
    "labels": (
        '<points coords="1 1 250 400">a, "b"\r\nü 船</points> and <points alt="x" coords="1 2 100 125">;</points>',
        [(64, 48)],
    ),
    "video points": ('<points coords="0.0 1 250 400 2 100 125\t1.0 3 500 500">boats</points>', VIDEO),
    "tracks": ('<tracks coords="0.0 1 200 100 2 500 200\t0.5 1 210 110\t1.0 1 220 120 2 480 205">x</tracks>', VIDEO),
    "points and tracks": (
        '<points coords="0.5 1 250 400">boats</points> <tracks coords="0.5 1 200 100\t1.0 1 220 120">x</tracks>',
        VIDEO,
    ),
    "none": ("There are none.", [(64, 48)]),
    "cut off": ('<points coords="1 1 250 400 2 300', [(64, 48)]),
    "no size": ('<points coords="1 1 250 400">cup</points>', None),
}
BESIDE_IMAGES = replace(VIDEO, image_sizes=((64, 48), (30, 20)))
MIXED = '<points coords="0.5 1 500 500\t1 2 250 500\t2 3 100 900">boats</points>'
PIXELS = [name for name in ANSWERS if name != "no size"]


def answer(name):
    return parse_grounding(*ANSWERS[name])


def test_images_beside_a_video():
    """Points in them are no points of the video."""
    grounding = parse_grounding(MIXED, BESIDE_IMAGES)
    assert [point.image_index for point in grounding.points] == [None, 0, 1]
    coco = to_coco(grounding, ["clip.mp4"])
    found = [(image["file_name"], image["width"], image["height"]) for image in coco["images"]]
    assert found == [("clip_0.5s", 640, 360), ("image_1", 64, 48), ("image_2", 30, 20)]
    assert [annotation["image_id"] for annotation in coco["annotations"]] == [1, 2, 3]
    read = from_coco(json.loads(json.dumps(coco)))
    assert [replace(point, span=(0, 0)) for point in grounding.points] == [
        replace(point, frame=given.frame, span=(0, 0)) for point, given in zip(read.points, grounding.points)
    ]
    assert read.media.image_sizes == BESIDE_IMAGES.image_sizes
    with pytest.raises(ValueError, match="MOT files are about one video"):
        to_mot(grounding)
    marks = MarksOverTime(grounding, DrawingStyle())
    assert [(mark.x, mark.y) for mark in marks(0.5)] == [(0.5, 0.5)]
    assert marks(1.0) == marks(2.0) == []


@pytest.mark.parametrize("name", ANSWERS)
def test_json_holds_everything(name, tmp_path):
    grounding = answer(name)
    assert from_json(to_json(grounding)) == grounding
    path = save(to_json(grounding), tmp_path / "answer.json")
    assert from_json(path.read_text(encoding="utf-8")) == grounding


@pytest.mark.parametrize("name", ANSWERS)
def test_csv_holds_every_number_of_every_point(name, tmp_path):
    grounding = answer(name)
    path = save(to_csv(grounding), tmp_path / "answer.csv")
    text = path.read_bytes().decode()  # `read_text` would change the line ends inside labels
    assert text.splitlines()[0] == ",".join(CSV_COLUMNS)
    read = from_csv(text)
    assert read.points == tuple(replace(point, span=(0, 0)) for point in grounding.points)
    assert [track.id for track in read.tracks] == [track.id for track in grounding.tracks]


@given(label=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
def test_csv_survives_any_label(label):
    (point,) = answer("no size").points
    written = replace(answer("no size"), points=(replace(point, label=label),))
    assert from_csv(to_csv(written)).points[0].label == label


@pytest.mark.parametrize("name", PIXELS)
def test_coco_holds_pixels_labels_and_images(name):
    grounding = answer(name)
    coco = json.loads(json.dumps(to_coco(grounding)))
    assert {"images", "annotations", "categories"} <= coco.keys()
    assert [entry["id"] for entry in coco["annotations"]] == list(range(1, len(grounding) + 1))
    images = {image["id"]: image for image in coco["images"]}
    for entry, point in zip(coco["annotations"], grounding.points, strict=True):
        assert entry["keypoints"] == [point.x, point.y, 2]
        image = images[entry["image_id"]]
        assert 0 <= entry["keypoints"][0] <= image["width"]
        if point.frame is not None:
            assert (image["frame_index"], image["seconds"]) == (point.frame.source_index, point.key)
    read = from_coco(coco)
    assert read.kind == (grounding.kind if grounding.points else "image")
    for found, point in zip(read.points, grounding.points, strict=True):
        assert (found.label, found.id, found.key, found.x, found.y) == (
            *(point.label, point.id, point.key, point.x, point.y),
        )
        assert found.x_norm == pytest.approx(point.x_norm)
        assert (found.tag, found.image_index) == (point.tag, point.image_index)


def test_coco_counts_images_without_points_and_takes_names():
    coco = to_coco(answer("several images"), ["a.jpg", "b.jpg", "c.jpg"])
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [entry["image_id"] for entry in coco["annotations"]] == [1, 3]
    with pytest.raises(ValueError, match="3 image\\(s\\), but 1 file name"):
        to_coco(answer("several images"), ["a.jpg"])


def test_coco_of_other_tools():
    """Several keypoints an annotation, some invisible, no `track_id`."""
    image = {"id": 7, "file_name": "x.jpg", "width": 100, "height": 50}
    annotation = {"id": 3, "image_id": 7, "category_id": 1, "keypoints": [10, 20, 2, 0, 0, 0, 30, 40, 1]}
    category = {"id": 1, "name": "person", "keypoints": ["a", "b", "c"]}
    read = from_coco({"images": [image], "annotations": [annotation], "categories": [category]})
    assert [(point.x_norm, point.y_norm, point.id) for point in read.points] == [(0.1, 0.4, 3), (0.3, 0.8, 3)]


@pytest.mark.parametrize("box_size", [0, 10])
def test_mot_counts_source_frames_from_one(box_size):
    grounding = answer("tracks")
    lines = to_mot(grounding, box_size=box_size).splitlines()
    left, top = 128 + 1 - box_size / 2, 36 + 1 - box_size / 2
    assert lines[0] == f"1,1,{left:g},{top:g},{box_size},{box_size},1,-1,-1,-1"
    assert [line.split(",")[:2] for line in lines] == [["1", "1"], ["1", "2"], ["16", "1"], ["30", "1"], ["30", "2"]]
    read = from_mot("\n".join(lines), (640, 360), 29.97, label="x")
    expected = sorted(grounding.points, key=lambda point: (point.frame.source_index, point.id))
    for found, point in zip(read.points, expected, strict=True):
        assert (found.id, found.frame.source_index) == (point.id, point.frame.source_index)
        assert (found.x, found.y) == pytest.approx((point.x, point.y), abs=0.01)
    assert [track.id for track in read.tracks] == [1, 2]


SECONDS = {"fps": 30, "frames_indices": [0, 30, 60], "width": 100, "height": 100}


@pytest.mark.parametrize(
    ("text", "rows"),
    {
        "two times in one frame": (
            '<tracks coords="0.0 1 100 100\t0.5 1 200 200\t1.0 1 300 300">dog</tracks>',
            [(1, 1, 11), (31, 1, 31)],
        ),
        "the nearer time comes first": (
            '<tracks coords="1.0 1 300 300\t1.3 1 200 200\t1.8 1 500 500">dog</tracks>',
            [(31, 1, 31), (61, 1, 51)],
        ),
        "equally near": ('<tracks coords="0.9 1 100 100\t1.1 1 200 200">dog</tracks>', [(31, 1, 11)]),
        "two objects with one id": (
            '<tracks coords="0.0 1 100 100\t1.0 1 110 100">dog</tracks> '
            '<tracks coords="0.0 1 500 500 2 700 700\t1.0 1 510 500">cat</tracks>',
            [(1, 1, 11), (1, 2, 71), (1, 3, 51), (31, 1, 12), (31, 3, 52)],
        ),
        "ids of others stay": (
            '<tracks coords="0.0 4 100 100">dog</tracks> <tracks coords="0.0 2 300 300 4 500 500">cat</tracks>',
            [(1, 2, 31), (1, 4, 11), (1, 5, 51)],
        ),
    }.values(),
)
def test_mot_has_each_object_once_in_a_frame(text, rows):
    lines = to_mot(parse_grounding(text, SECONDS)).splitlines()
    assert [tuple(int(number) for number in line.split(",")[:3]) for line in lines] == rows


def test_mot_at_a_low_rate_has_each_object_once_in_a_frame():
    unplaced = parse_grounding(
        '<tracks coords="0.4 1 100 100\t0.9 1 200 200\t1.0 1 300 300">dog</tracks>', MediaInfo("video", ((100, 100),))
    )
    assert [line.split(",")[:3] for line in to_mot(unplaced, fps=1).splitlines()] == [
        ["1", "1", "11"],
        ["2", "1", "31"],
    ]


def test_mot_needs_frames():
    text, _ = ANSWERS["tracks"]
    unplaced = parse_grounding(text, MediaInfo("video", ((640, 360),)))
    with pytest.raises(ValueError, match=r"source frame of the point at 0\.0 s is unknown"):
        to_mot(unplaced)
    assert [line.split(",")[0] for line in to_mot(unplaced, fps=30).splitlines()] == ["1", "1", "16", "31", "31"]
    with pytest.raises(ValueError, match="but the answer is about images"):
        to_mot(answer("image"))
    with pytest.raises(ValueError, match="Line 1 is '1,2,3'"):
        from_mot("1,2,3", (10, 10), 30)


def test_pixels_need_a_size():
    with pytest.raises(ValueError, match="COCO files hold pixels, but the size of the image or video is unknown"):
        to_coco(answer("no size"))


def test_other_content_is_refused():
    with pytest.raises(ValueError, match="Found format None, version None; expected 'molmo2-grounding'"):
        from_json("{}")
    with pytest.raises(ValueError, match=r"columns .* are missing"):
        from_csv("a,b\n1,2\n")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "answer.json"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        save("\ud800", path)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["answer.json"]


def test_the_suffix_says_what_is_written(tmp_path):
    export = export_grounding
    assert from_json(export(answer("tracks"), tmp_path / "a.json").read_text(encoding="utf-8")) == answer("tracks")
    assert export(answer("tracks"), tmp_path / "a.csv").read_text().startswith("tag,label")
    assert export(answer("tracks"), tmp_path / "a.txt", box_size=4).read_text().startswith("1,1,127,")
    assert "annotations" in json.loads(export(answer("tracks"), tmp_path / "b.json", format="coco").read_text())
    with pytest.raises(ValueError, match=r"Cannot tell the format of .*a\.xml.*Pass one of"):
        export(answer("tracks"), tmp_path / "a.xml")


def test_answers_are_drawn():
    ground = Image.new("RGB", (64, 48))
    drawn = draw(ground, answer("labels"), radius=3)
    assert drawn.getpixel((16, 19)) == DrawingStyle().color(answer("labels").points[0].label, 1)
    assert len(draw([ground, ground], answer("several images"))) == 2
    assert contact_sheet([ground] * 3, answer("tracks"), columns=3).width == 960
