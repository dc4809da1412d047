"""Files of Label Studio and CVAT, and prompts of SAM 2: what comes back is what was written.

The packages themselves read them in tests/clients/test_tools.py (`make test-tools`).
"""

import json
from dataclasses import replace

import pytest

from molmo2.grounding.parse import MediaInfo, SampledFrame, parse_grounding
from molmo2.interop import (
    from_cvat,
    from_label_studio,
    sam2_processor_arguments,
    sam2_prompts,
    to_cvat,
    to_label_studio,
)

FPS = 30.0
IMAGES = parse_grounding(
    '<points coords="1 1 250 400\t2 2 100 125 3 999 000">boats & "ships"</points>'
    '<points coords="1 4 500 500">sail</points>',
    [(640, 480), (1280, 720)],
)
SAMPLED = tuple(SampledFrame(index / 2, index, index * 15, index / 2) for index in range(5))
VIDEO = MediaInfo("video", ((640, 360),), SAMPLED)
# Object 2 is not in the frame at 1.0 s.
TRACKS = parse_grounding(
    '<tracks coords="0.0 1 200 100 2 500 200\t0.5 1 210 110 2 505 205\t'
    '1.0 1 220 120\t1.5 1 230 130 2 520 210">cup</tracks>',
    VIDEO,
)
BARE = replace(VIDEO, sampled_frames=())


def numbers(grounding):
    """What every format keeps, rounded to what a file with decimal digits holds."""
    return sorted(
        (point.image_index, point.time, point.id, point.label, round(point.x, 4), round(point.y, 4))
        for point in grounding.points
    )


def without_ids(grounding):
    return [(*row[:2], *row[3:]) for row in numbers(grounding)]


def test_label_studio_keeps_points_labels_and_ids():
    tasks = json.loads(json.dumps(to_label_studio(IMAGES, ["s3://a.jpg", "s3://b.jpg"])))
    assert [task["data"]["image"] for task in tasks] == ["s3://a.jpg", "s3://b.jpg"]
    value = tasks[0]["predictions"][0]["result"][0]["value"]
    assert (value["x"], value["y"]) == pytest.approx((25, 40))
    read = from_label_studio(tasks)
    assert numbers(read) == numbers(IMAGES)
    assert read.media.sizes == IMAGES.media.sizes


def test_peoples_annotations_come_before_predictions():
    (task, other) = to_label_studio(IMAGES, ["a", "b"])
    (region, _) = json.loads(json.dumps(task["predictions"][0]["result"]))
    region["value"] |= {"x": 50.0, "y": 25.0, "keypointlabels": ["dinghy"]}
    task["annotations"] = [{"was_cancelled": True, "result": []}, {"result": [region, {"type": "choices"}]}]
    with pytest.warns(UserWarning, match="not read: choices; expected 'keypointlabels'"):
        points = from_label_studio([task, other]).points
    assert [(point.label, point.x, point.y) for point in points[:1]] == [("dinghy", 320.0, 120.0)]
    assert len(points) == 3


def test_label_studio_has_boxes_in_videos():
    with pytest.raises(ValueError, match="Label Studio has no key points in videos"):
        to_label_studio(TRACKS, ["clip.mp4"])
    (task,) = to_label_studio(TRACKS, ["clip.mp4"], box_size=20, fps=FPS, num_frames=90)
    assert numbers(from_label_studio(json.dumps([task]))) == numbers(TRACKS)
    first, second = (region["value"]["sequence"] for region in task["predictions"][0]["result"])
    assert [(box["frame"], box["enabled"]) for box in first] == [(1, True), (16, True), (31, True), (46, False)]
    assert [(box["frame"], box["enabled"]) for box in second] == [(1, True), (16, False), (46, False)]


def test_what_people_added_gets_numbers_of_its_own():
    """Object 1 was deleted, object 2 kept, one added: the new one is no part of object 2."""
    (task,) = to_label_studio(TRACKS, ["clip.mp4"], box_size=20, fps=FPS, num_frames=90)
    _, kept = task["predictions"][0]["result"]
    added = {**kept, "meta": {}}
    task["annotations"] = [{"result": [kept, added]}]
    assert {point.id for point in from_label_studio([task]).points} == {2, 3}
    (task, other) = to_label_studio(IMAGES, ["a", "b"])
    for own in (task, other):
        for region in own["predictions"][0]["result"]:
            region["meta"] = {}
    numbered = [point.id for point in from_label_studio([task, other]).points]
    assert numbered == list(range(1, len(IMAGES.points) + 1))


def test_labels_have_no_control_characters():
    grounding = parse_grounding('<points coords="1 1 250 500">bo\x01ats</points>', [(640, 480)])
    (point,) = from_cvat(to_cvat(grounding, ["a.jpg"])).points
    assert point.label == "bo ats"


def test_boxes_at_the_edge_stay_inside_around_their_point():
    at_edge = parse_grounding('<tracks coords="0.0 1 010 999">x</tracks>', VIDEO)
    (task,) = to_label_studio(at_edge, ["clip.mp4"], box_size=20, fps=FPS, num_frames=90)
    (box,) = task["predictions"][0]["result"][0]["value"]["sequence"]
    assert (box["x"], box["width"]) == pytest.approx((0, 2))
    assert box["y"] + box["height"] == pytest.approx(100)
    assert numbers(from_label_studio([task])) == numbers(at_edge)


@pytest.mark.parametrize(
    ("grounding", "options", "message"),
    [
        (parse_grounding(IMAGES.text), {"sources": ["a"]}, "the size of the image or video is unknown"),
        (IMAGES, {"sources": ["a"]}, r"about 2 image\(s\) of known size, but there are 1 name"),
        (
            parse_grounding(TRACKS.text, BARE),
            {"sources": ["a", "b"], "box_size": 1, "fps": 1, "num_frames": 1},
            "one video, but there are 2",
        ),
    ],
)
def test_what_label_studio_cannot_hold(grounding, options, message):
    with pytest.raises(ValueError, match=message):
        to_label_studio(grounding, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": "a"}], "not as JSON-MIN"),
        ([{"data": {"image": "a"}}], "Add `width` and `height`"),
        ([{"data": {"video": "a"}}, {"data": {"video": "b"}}], "Pass one video at a time"),
        ([{"data": {"video": "a", "width": 4, "height": 4}}], "Add `fps`"),
    ],
)
def test_other_files_are_no_label_studio_exports(content, message):
    with pytest.raises(ValueError, match=message):
        from_label_studio(content)


def test_cvat_keeps_points_of_images():
    text = to_cvat(IMAGES, ["a.jpg", "b.jpg"])
    assert without_ids(from_cvat(text)) == without_ids(IMAGES)
    assert from_cvat(text).media.sizes == IMAGES.media.sizes


def test_cvat_keeps_tracks_and_where_objects_are_gone():
    text = to_cvat(TRACKS, num_frames=90)
    assert numbers(from_cvat(text, fps=FPS)) == numbers(TRACKS)
    outside = [line.split('"')[1] for line in text.splitlines() if 'outside="1"' in line]
    assert outside == ["46", "16", "46"]
    assert 'frame="46"' not in to_cvat(TRACKS, num_frames=46)


def test_without_sampled_frames_tracks_have_no_gaps():
    bare = parse_grounding(TRACKS.text, BARE)
    with pytest.raises(ValueError, match="pass `fps`"):
        to_cvat(bare)
    assert to_cvat(bare, fps=FPS).count('outside="1"') == 2
    assert numbers(from_cvat(to_cvat(bare, fps=FPS), fps=FPS)) == numbers(TRACKS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<a", "This is not XML"),
        ("<a/>", "Found <a>"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><annotations/>', "declares a document type"),
        ("<annotations><image/><track/></annotations>", "Found images and tracks"),
        ('<annotations><image name="a"/></annotations>', "The size of the image 'a' is None"),
        (to_cvat(TRACKS), "Pass `fps`"),
    ],
)
def test_other_files_are_no_cvat_exports(text, message):
    with pytest.raises(ValueError, match=message):
        from_cvat(text)


def test_cvat_may_hold_what_is_no_point():
    size = '<image id="0" name="a" width="10" height="20">'
    points = '<points label="x" points="1,2;3,4"/><box label="x" xtl="1" ytl="1" xbr="2" ybr="2"/>'
    with pytest.warns(UserWarning, match="Only points are read, not: box"):
        read = from_cvat(f"<annotations>{size}{points}</image></annotations>")
    assert [(point.x, point.y) for point in read.points] == [(1, 2), (3, 4)]


def test_an_interpolated_frame_is_no_key_frame_and_a_track_has_one_point():
    text = to_cvat(TRACKS).replace('frame="15" outside="0" occluded="0" keyframe="1"', 'frame="15" keyframe="0"')
    assert len(from_cvat(text, fps=FPS).points) == 5
    several = to_cvat(TRACKS).replace('points="128,36"', 'points="128,36;1,1"')
    with pytest.raises(ValueError, match="Track 1 has 2 points in frame 0"):
        from_cvat(several, fps=FPS)


def test_sam2_prompts_of_images():
    prompts = sam2_prompts(IMAGES)
    assert [(prompt.index, prompt.object_id, prompt.label) for prompt in prompts] == [
        (0, 1, 'boats & "ships"'),
        (0, 4, "sail"),
        (1, 2, 'boats & "ships"'),
        (1, 3, 'boats & "ships"'),
    ]
    assert prompts[0].predictor_arguments()["point_coords"].tolist() == [[160, 192]]
    assert sam2_processor_arguments(prompts)[0] == {
        "input_points": [[[[160, 192]], [[320, 240]]]],
        "input_labels": [[[1], [1]]],
    }
    with pytest.raises(ValueError, match="about an image"):
        prompts[0].video_predictor_arguments()


@pytest.mark.parametrize(("frames", "indices"), [("source", [0, 15, 30, 45]), ("sampled", [0, 1, 2, 3])])
def test_sam2_prompts_of_videos(frames, indices):
    prompts = sam2_prompts(TRACKS, frames=frames)
    assert sorted({prompt.index for prompt in prompts}) == indices
    arguments = sam2_processor_arguments(prompts)[indices[1]]
    (points,) = arguments.pop("input_points")
    assert [xy for object_points in points for xy in object_points] == [
        pytest.approx((134.4, 39.6)),
        pytest.approx((323.2, 73.8)),
    ]
    assert arguments == {"input_labels": [[[1], [1]]], "frame_idx": indices[1], "obj_ids": [1, 2]}
    first = prompts[0].video_predictor_arguments()
    assert (first["frame_idx"], first["obj_id"], first["labels"].tolist()) == (0, 1, [1])


def test_sampled_frames_must_be_known():
    with pytest.raises(ValueError, match=r"sampled frame of the point at 0\.0 s is unknown"):
        sam2_prompts(parse_grounding(TRACKS.text, BARE), frames="sampled")
    with pytest.raises(ValueError, match="`frames` is 'all'"):
        sam2_prompts(TRACKS, frames="all")
