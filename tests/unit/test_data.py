"""Rows of the published data sets become conversations: contents by hand, draws by statistics, all losses counted."""

import base64
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from molmo2 import MediaLimits, data, prompts
from molmo2.data import queries
from molmo2.data.evaluation import EVALUATION_SETS, evaluation_examples
from molmo2.data.examples import MISSING, NO_SIZE
from molmo2.data.media import MediaReference, image_size
from molmo2.data.pointing import positions
from molmo2.data.styles import COUNT_FORMS, LETTER_INSTRUCTIONS, NO_POINTING, TEMPLATES, TEXT_INSTRUCTIONS
from molmo2.evaluate import METRICS
from molmo2.grounding import parse_grounding
from molmo2.image.loading import load_images
from molmo2.image.measuring import measure_images
from support import data_rows as rows_of


def everywhere(reference):
    """A resolver that finds everything."""
    return f"/media/{reference.name}"


def wide(source):
    """The size of every image, for points in pixels."""
    return 200, 100


def examples(name, *rows, media=everywhere, seed=0, image_size=wide, **settings):
    settings["image_size"] = image_size
    return data.Examples(f"allenai/{name}", list(rows), media, data.Settings(**settings), seed=seed)


def branches(example):
    messages = example["messages"]
    return messages if isinstance(messages[0], list) else [messages]


def turns(conversation):
    """(style, question, answer) of each turn."""
    pairs = [message for message in conversation if message["role"] in ("user", "assistant")]
    found = []
    for user, assistant in zip(pairs[::2], pairs[1::2]):
        part = user["content"][-1]
        found.append((part.get("style", user.get("style")), part["text"], assistant["content"][0]["text"]))
    return found


def drawn(name, *rows, number=60, **settings):
    """All turns of the only example, with many seeds."""
    found = []
    for seed in range(number):
        (example,) = examples(name, *rows, seed=seed, **settings)
        found += [turn for branch in branches(example) for turn in turns(branch)]
    return found


def media_parts(example):
    return [part for message in branches(example)[0] for part in message["content"] if part["type"] != "text"]


# --- every set -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rows_of.ROWS)
def test_every_set_gives_conversations(name):
    row = rows_of.ROWS[name]
    found = data.Examples(name, [row], everywhere, data.Settings(config="chart", image_size=wide))
    assert len(found) == found.report.examples == found.report.rows == 1
    assert not found.report.left_out
    (example,) = found
    assert example == found[0] == found[-1]
    assert (example["dataset"], example["rows"]) == (name, [0])
    for branch in branches(example):
        for style, question, answer in turns(branch):
            assert style
            assert question
            assert answer
    with pytest.raises(IndexError):
        found[1]


def test_every_reader_has_a_row_of_its_own():
    academic = {name for name, family in data.DATASETS.items() if family is data.DATASETS["allenai/molmo2-mevis"]}
    assert set(data.DATASETS) - set(rows_of.ROWS) == academic - {"allenai/molmo2-mevis"}


@pytest.mark.parametrize(
    "name",
    [
        "allenai/Molmo2-VideoPoint",
        "allenai/Molmo2-VideoTrack",
        "allenai/pixmo-points",
        "allenai/pixmo-count",
        "allenai/pixmo-point-explanations",
        "allenai/molmo2-pixmo-multi-points",
    ],
)
def test_a_missing_column_is_named(name):
    row = {key: value for key, value in rows_of.ROWS[name].items() if key != "points"}
    with pytest.raises(ValueError, match=f"Row 0 of {name} has no column 'points'"):
        data.Examples(name, [row], everywhere)


def test_draws_depend_on_seed_epoch_and_index_alone():
    several = [{**rows_of.VIDEO_POINT, "video_id": f"v{number}"} for number in range(20)]
    one, other = examples("Molmo2-VideoPoint", *several), examples("Molmo2-VideoPoint", *several)
    backwards = [other[number] for number in reversed(range(20))][::-1]
    assert list(one) == backwards == one[:20]
    assert list(examples("Molmo2-VideoPoint", *several, seed=1)) != backwards
    other.epoch = 1
    assert list(other) != backwards


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.Examples("allenai/pixmo", []), "no reader for 'allenai/pixmo'"),
        (lambda: data.Examples("allenai/pixmo-cap", [], missing="skip"), "`missing` is 'skip'"),
        (lambda: data.Settings(p_multi_turn=2), "`Settings.p_multi_turn` is 2; expected a number from 0 to 1"),
        (lambda: data.Settings(sampling_fps=12), "up to 10"),
        (lambda: data.Settings(sampling_fps=0), "above 0"),
        (lambda: data.Settings(max_captions=0), "`Settings.max_captions` is 0; expected 1 or more"),
        (lambda: data.Settings(max_images=0), "`Settings.max_images` is 0; expected 1 or more"),
        (lambda: data.Settings(max_clip_seconds=-math.inf), "`Settings.max_clip_seconds` is -inf; expected a number"),
        (lambda: data.Settings(subtitle_mode="some"), "'some'; expected 'all' or 'frame_1'"),
        (lambda: data.Settings(subtitle_mode="frame_1"), "needs `frame_times`"),
        (lambda: data.Settings(point_mark=""), "`Settings.point_mark` is ''; expected a text that is not empty"),
        (lambda: data.Settings(explanation_style=""), "`Settings.explanation_style` is ''"),
        (lambda: examples("CoSyn-400K", rows_of.SYNTHETIC_QA), "several configurations"),
        (lambda: examples("Molmo2-SynMultiImageQA", rows_of.SYNTHETIC_QA), "several configurations"),
        (
            lambda: examples("Molmo2-SynMultiImageQA", rows_of.SYNTHETIC_QA, config="charts"),
            r"config` is 'charts'; expected one of the configurations chart, .*, doc, .*, table\.",
        ),
        (lambda: evaluation_examples("allenai/x", []), "no reader for 'allenai/x'"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("config", None, "a text"),
        ("min_score", "3", "a number"),
        ("min_score", float("nan"), "a number"),
        ("excluded_ids", None, "a list or a set of values of `video_id`"),
        ("excluded_ids", "vid1", "a list or a set"),
        ("excluded_ids", [None], "a list or a set"),
        ("use_unsure", "no", "True or False"),
        ("use_unsure", None, "True or False"),
        ("p_multi_turn", True, "a number"),
        ("max_captions", 2.5, "a whole number"),
        ("max_images", "5", "a whole number"),
        ("max_clip_seconds", None, "a number of seconds, or math.inf for no limit"),
        ("max_clip_seconds", float("nan"), "a number of seconds"),
        ("sampling_fps", "2", "a number"),
        ("subtitle_mode", None, "a text"),
        ("frame_times", [0.0], "a function, or None"),
        ("image_size", None, "a function"),
        ("image_size", (200, 100), "a function"),
        ("point_mark", b"@", "a text"),
        ("explanation_style", 5, "a text"),
    ],
)
def test_settings_of_another_type_are_refused(name, value, expected):
    """They would otherwise fail at every row, and each would be taken for one of another form."""
    message = f"`Settings.{name}` is {value!r}; expected {expected}"
    with pytest.raises(TypeError, match=re.escape(message)):
        data.Settings(**{name: value})


def test_every_setting_has_a_type():
    assert sorted(name for names, *_ in queries._TYPES for name in names) == sorted(
        field.name for field in dataclasses.fields(data.Settings)
    )


def test_settings_in_other_forms():
    for excluded in (["vid1"], ("vid1",), {"vid1"}, frozenset({"vid1"})):
        found = examples("Molmo2-Cap", rows_of.CAPTION, excluded_ids=excluded)
        assert found.report.left_out == {"the video is excluded": 1}
    found = examples("Molmo2-Cap", {**rows_of.CAPTION, "video_id": 12}, excluded_ids=[12])
    assert found.report.left_out == {"the video is excluded": 1}
    long = {**rows_of.VIDEO_POINT, "video_duration": 9000.0, "clip_end": 9000.0}
    assert len(examples("Molmo2-VideoPoint", long, max_clip_seconds=math.inf)) == 1


# --- points ----------------------------------------------------------------------------------------------------------


def test_video_points():
    """Per cent become thousandths, sorted by (x, y) in a frame; times stay those of the video, whose clip is shown."""
    tag = '<points coords="4.5 1 100 900 2 500 200\t6.0 3 999 000">red cups</points>'
    answers = {
        "video_point": tag,
        "video_point_count": f"Counting the {tag} shows a total of 3.",
        "video_count": "3",
        "video_count_point": f"There are 3 {tag}.",
    }
    found = drawn("Molmo2-VideoPoint", rows_of.VIDEO_POINT)
    assert {style for style, *_ in found} == set(answers)
    for style, question, answer in found:
        assert answer == answers[style]
        assert (question == rows_of.VIDEO_POINT["question"]) == (style != "video_point")
    (example,) = examples("Molmo2-VideoPoint", rows_of.VIDEO_POINT)
    assert media_parts(example) == [{"type": "video", "video": "/media/vid1", "max_fps": 2, "clip": (4.0, 12.0)}]


def test_cut_clips_begin_at_zero(tmp_path):
    (tmp_path / "vid1_4.0_12.0.mp4").touch()
    folder = data.Folder(tmp_path, has_cut_clips=True)
    answers = set()
    for seed in range(20):
        (example,) = examples("Molmo2-VideoPoint", rows_of.VIDEO_POINT, media=folder, seed=seed)
        assert media_parts(example) == [{"type": "video", "video": tmp_path / "vid1_4.0_12.0.mp4", "max_fps": 2}]
        answers |= {answer for *_, answer in turns(branches(example)[0])}
    assert '<points coords="0.5 1 100 900 2 500 200\t2.0 3 999 000">red cups</points>' in answers


def test_a_clip_begins_on_the_grid():
    row = {**rows_of.VIDEO_POINT, "clip_start": 4.2}
    (example,) = examples("Molmo2-VideoPoint", row)
    assert media_parts(example)[0]["clip"] == (4.5, 12.0)


def test_nothing_to_point_at():
    empty = {**rows_of.VIDEO_POINT, "count": 0, "points": [], "two_fps_timestamps": []}
    assert {answer for *_, answer in drawn("Molmo2-VideoPoint", empty)} == {"There are none."}


def test_questions_about_a_clip_form_a_tree_and_sometimes_turns():
    same = [{**rows_of.VIDEO_POINT, "label": label} for label in ("cups", "cats", "dogs")]
    other = {**rows_of.VIDEO_POINT, "clip_start": 8.0, "two_fps_timestamps": [8.0, 9.0]}
    shapes = Counter()
    for seed in range(300):
        first, second = examples("Molmo2-VideoPoint", *same, other, seed=seed)
        assert (first["rows"], second["rows"]) == ([0, 1, 2], [3])
        shapes[tuple(len(turns(branch)) for branch in branches(first))] += 1
    assert set(shapes) == {(1, 1, 1), (3,)}
    assert 0.13 < shapes[3,] / 300 < 0.27  # p_multi_turn is 0.2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotator_unsure": True}, "the annotator was unsure"),
        ({"clip_start": None, "clip_end": None, "video_duration": 64.0}, "longer than 63 s"),
        ({"two_fps_timestamps": [4.5]}, "not as many times"),
        ({"two_fps_timestamps": [4.5, 6.1]}, "not on the grid"),
        ({"two_fps_timestamps": [3.5, 6.0]}, "outside of the clip"),
        ({"points": [[], [{"x": 100.1, "y": 0.0}]]}, "outside of its image"),
        ({"points": [[], [{"x": 0.0, "y": 100.1}]]}, "outside of its image"),
        ({"points": [[], [{"x": -0.1, "y": 0.0}]]}, "outside of its image"),
        ({"label": " "}, "no label"),
        ({"label": "<points>"}, "contains a tag"),
    ],
)
def test_rows_that_are_left_out_are_counted(changes, reason, caplog):
    with caplog.at_level(logging.WARNING):
        found = examples("Molmo2-VideoPoint", {**rows_of.VIDEO_POINT, **changes}, rows_of.VIDEO_POINT)
    assert len(found) == 1
    assert found.report.left_out.total() == 1
    assert reason in str(found.report)
    assert "2 rows, 1 examples, 1 left out" in caplog.text


def test_the_choices_of_the_training_are_the_defaults():
    """Those of the released mixture; only subtitles are not chosen by the sampled frames."""
    expected = {
        "min_score": 3,
        "use_unsure": False,
        "p_multi_turn": 0.2,
        "max_captions": 4,
        "max_images": 5,
        "max_clip_seconds": 63,
        "sampling_fps": 2,
        "excluded_ids": frozenset(),
        "subtitle_mode": "all",
    }
    assert {name: getattr(data.Settings(), name) for name in expected} == expected


def test_a_clip_may_last_63_seconds():
    row = {**rows_of.VIDEO_POINT, "video_duration": 90.0, "clip_start": 2.0, "clip_end": 65.0}
    assert len(examples("Molmo2-VideoPoint", row)) == 1
    assert "longer than 63 s" in str(examples("Molmo2-VideoPoint", {**row, "clip_end": 65.5}).report)
    assert len(examples("Molmo2-VideoPoint", {**row, "clip_end": 65.5}, max_clip_seconds=64)) == 1


def test_unsure_annotators_may_be_used():
    assert len(examples("Molmo2-VideoPoint", {**rows_of.VIDEO_POINT, "annotator_unsure": True}, use_unsure=True)) == 1


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("Molmo2-MultiImagePoint", rows_of.MULTI_IMAGE_POINT),
        ("molmo2-pixmo-multi-points", rows_of.LOCAL_MULTI_POINT),
    ],
)
def test_points_in_image_sets(name, row):
    """Images of the drawn label alone, two to five; points are those of the images that are shown."""
    numbers, styles = Counter(), set()
    for seed in range(80):
        (example,) = examples(name, row, seed=seed)
        ((style, question, answer),) = turns(example["messages"])
        styles.add(style)
        assert "dog" in question.lower()
        shown = [int(part["image"][-5]) for part in media_parts(example)]
        assert shown == sorted(set(shown))
        assert 5 not in shown  # the cat
        numbers[len(shown)] += 1
        total = sum(number % 3 for number in shown)
        grounding = parse_grounding(answer)
        if COUNT_FORMS[style] == "only":
            assert answer == (str(total) if total else "There are none.")
        else:
            assert [(point.image_index, point.x_norm) for point in grounding] == [
                (place, number / 10) for place, number in enumerate(shown) for _ in range(number % 3)
            ]
            assert grounding.count == (total if COUNT_FORMS[style] or not total else None)
    assert set(numbers) == {2, 3, 4, 5}
    assert styles == {style for style in COUNT_FORMS if style.startswith("multi_image")}


def test_local_images_of_sets():
    """Names are looked up, images are taken as they are; a label that two images share is drawn with them."""
    row = rows_of.LOCAL_MULTI_POINT
    labels = ["dog", "cat", "dog", "cat", "cow", "cat", "dog"]
    drawn_labels = set()
    for seed in range(30):
        (example,) = examples("molmo2-pixmo-multi-points", {**row, "normalized_labels": labels}, seed=seed)
        shown = [int(part["image"][-5]) for part in media_parts(example)]
        drawn_labels |= {labels[number] for number in shown}
        assert len({labels[number] for number in shown}) == 1
    assert drawn_labels == {"dog", "cat"}
    (example,) = examples("molmo2-pixmo-multi-points", row)
    assert media_parts(example)[0]["image"].startswith("/media/pixmo/")
    held = {**row, "images": [f"image {number}".encode() for number in range(7)]}
    (example,) = examples("molmo2-pixmo-multi-points", held, media=lambda reference: None)
    assert {part["image"][:6] for part in media_parts(example)} == {b"image "}
    found = examples(
        "molmo2-pixmo-multi-points", row, media=lambda reference: None if "3" in reference.name else "file"
    )
    assert (len(found), found.report.missing) == (0, ["pixmo/3.jpg"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalized_labels": ["dog"]}, "not one label per image"),
        ({"normalized_labels": None}, "not one label per image"),
        ({"normalized_labels": [["dog"]] * 7}, "not one label per image"),
        ({"normalized_labels": list("abcdefg")}, "no two images share a label"),
        ({"points": [[]] * 6}, "not one list of points per image"),
        ({"points": [[{"x": 101.0, "y": 1.0}], *[[]] * 6]}, "outside of its image"),
    ],
)
def test_local_sets_that_are_left_out(changes, reason):
    found = examples("molmo2-pixmo-multi-points", {**rows_of.LOCAL_MULTI_POINT, **changes})
    assert (len(found), reason in str(found.report)) == (0, True)


def test_labels_that_differ():
    row = {**rows_of.MULTI_IMAGE_POINT, "labels": list("abcdefg")}
    assert "no two images share a label" in examples("Molmo2-MultiImagePoint", row).report.left_out
    names = {**rows_of.MULTI_IMAGE_POINT, "labels": ["dog", "hound"]}  # names of one kind, not one per image
    assert len(examples("Molmo2-MultiImagePoint", names)) == 1


def test_points_in_images():
    pointing = {**rows_of.PIXMO_POINTS, "collection_method": "pointing", "label": "sails"}
    (example,) = examples("pixmo-points", rows_of.PIXMO_POINTS, pointing)
    (first,), (second,) = map(turns, branches(example))
    tag = '<points coords="1 1 100 900 2 500 200">{}</points>'
    assert (first[0], first[2]) == ("point_count", f"Counting the {tag.format('boats')} shows a total of 2.")
    assert (second[0], second[2]) == ("pointing", tag.format("sails"))
    assert "boats" in first[1]


def test_rows_with_images_of_their_own_are_not_one_group():
    row = {key: value for key, value in rows_of.PIXMO_POINTS.items() if key != "image_url"}
    found = examples("pixmo-points", {**row, "image": "one"}, {**row, "image": "two"})
    assert [media_parts(example)[0]["image"] for example in found] == ["one", "two"]


# --- points in pixels ------------------------------------------------------------------------------------------------


def test_counts_of_images():
    """Points in pixels become thousandths of the image's size; rows about one image are one tree."""
    other = {**rows_of.PIXMO_COUNT, "label": "sails", "count": 0, "points": {"x": [], "y": []}}
    (example,) = examples("pixmo-count", rows_of.PIXMO_COUNT, other)
    (first,), (second,) = map(turns, branches(example))
    tag = '<points coords="1 1 100 900 2 500 200">boats</points>'
    assert (first[0], first[2]) == ("point_count", f"Counting the {tag} shows a total of 2.")
    assert "boats" in first[1]
    assert (second[0], second[2]) == ("point_count", "There are none.")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"points": None}, "not as many points as it counts"),  # validation and test
        ({"points": {"x": None, "y": None}}, "not as many points as it counts"),
        ({"count": 3}, "not as many points as it counts"),
        ({"points": {"x": [200.1, 5.0], "y": [5.0, 5.0]}}, "outside of its image"),
        ({"points": {"x": [5.0, 5.0], "y": [5.0, 100.1]}}, "outside of its image"),
        ({"points": {"x": [5.0, -0.1], "y": [5.0, 5.0]}}, "outside of its image"),
        ({"label": ""}, "no label"),
    ],
)
def test_counts_that_are_left_out(changes, reason):
    found = examples("pixmo-count", {**rows_of.PIXMO_COUNT, **changes}, rows_of.PIXMO_COUNT)
    assert (len(found), found.report.left_out.total()) == (1, 1)
    assert reason in str(found.report)


def test_points_at_the_edges_of_an_image_are_inside():
    row = {**rows_of.PIXMO_COUNT, "points": {"x": [200.0, 0.0], "y": [0.0, 100.0]}}
    ((_, _, answer),) = drawn("pixmo-count", row, number=1)
    assert '"1 1 000 1000 2 1000 000"' in answer


def test_sizes_of_images_come_from_their_files(tmp_path):
    """By the header; an image that is missing, one that is broken and one whose URL alone is known are counted."""
    Image.new("RGB", (400, 100)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    several = [{**rows_of.PIXMO_COUNT, "image_url": name} for name in ("a", "gone", "broken", "http://images/1.jpg")]
    found = examples(
        "pixmo-count", *several, media=data.first_of(data.Folder(tmp_path), data.urls), image_size=image_size
    )
    (example,) = found
    assert media_parts(example) == [{"type": "image", "image": tmp_path / "a.png"}]
    assert '"1 1 050 900 2 250 200"' in turns(branches(example)[0])[0][2]
    assert found.report.left_out == {
        NO_SIZE: 2,
        "an image or a video is missing": 1,
    }
    assert found.report.missing == ["gone"]
    assert data.Settings().image_size is image_size


def test_image_sizes(tmp_path):
    """(width, height); files are turned upright, as the processor does, open images and arrays are as they are."""
    image, exif = Image.new("RGB", (8, 4)), Image.Exif()
    for orientation, size in ((1, (8, 4)), (3, (8, 4)), (4, (8, 4)), (5, (4, 8)), (6, (4, 8)), (8, (4, 8))):
        exif[0x0112] = orientation
        image.save(tmp_path / "turned.jpg", exif=exif)
        path = tmp_path / "turned.jpg"
        content = path.read_bytes()
        for source in (path, str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}):
            assert image_size(source) == size
    assert image_size(Image.open(path)) == (8, 4)
    with io.BytesIO() as file:
        image.save(file, "png")
        assert image_size(file.getvalue()) == (8, 4)
    for shape, size in (
        ((4, 8, 3), (8, 4)),
        ((4, 8), (8, 4)),
        ((3, 4, 8), (8, 4)),
        ((3, 8, 4), (8, 3)),  # as the processor takes it
        ((5, 4, 8), None),
        ((2, 4, 8, 3), None),
    ):
        assert image_size(np.zeros(shape)) == size
    for source in ("http://images/1.jpg", tmp_path / "gone.jpg", b"no image", None, 5, {"bytes": None, "path": None}):
        assert image_size(source) is None


def png(size=(8, 4), exif=b""):
    with io.BytesIO() as file:
        Image.new("RGB", size).save(file, "png", exif=exif)
        return file.getvalue()


def test_files_in_all_forms_have_sizes(tmp_path):
    """All that the processor reads without a download, but base64 text and open files."""
    content, path = png(), tmp_path / "a b.png"
    path.write_bytes(content)
    data_url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for source in (bytearray(content), memoryview(content), path.as_uri(), data_url, os.fspath(path)):
        assert image_size(source) == (8, 4)
        assert measure_images(source) == [(4, 8)]
    with path.open("rb") as file:
        assert image_size(file) is None
        assert file.tell() == 0
    for source in (base64.b64encode(content).decode(), "data:image/png;base64,?", tmp_path.as_uri(), os.devnull):
        assert image_size(source) is None


def orientation_tag(kind, number, value):
    """EXIF with the orientation tag alone, of this type of TIFF."""
    entry = struct.pack("<HHHI4s", 1, 0x0112, kind, number, value)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry + bytes(4)


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (orientation_tag(3, 1, b"\x06\0\0\0"), (4, 8)),
        (orientation_tag(3, 1, b"\x09\0\0\0"), (8, 4)),  # there is no ninth
        (orientation_tag(2, 4, b"abc\0"), (8, 4)),
        (orientation_tag(1, 2, b"\x06\x06\0\0"), (8, 4)),
    ],
    ids=["short", "nine", "text", "bytes"],
)
def test_strange_orientations_turn_nothing(exif, size):
    """Sizes that are measured are those that are shown."""
    content = png(exif=exif)
    assert image_size(content) == size
    assert measure_images(content) == [size[::-1]]
    assert load_images(content)[0].shape[:2] == size[::-1]


def test_damaged_metadata_turn_nothing():
    cut = png(exif=orientation_tag(3, 1, b"\x06\0\0\0")[:12])
    with pytest.raises(struct.error):
        Image.open(io.BytesIO(cut)).getexif()
    with pytest.warns(UserWarning, match="it is taken as upright"):
        assert image_size(cut) == (8, 4)
    with pytest.warns(UserWarning, match="it is taken as upright"):
        assert measure_images(cut) == [(4, 8)]


def test_what_the_processor_refuses_has_no_size(tmp_path):
    """Formats that are not accepted, images over the limit: such rows are left out and counted."""
    with io.BytesIO() as file:
        Image.new("RGB", (8, 4)).save(file, "ico", sizes=[(8, 4)])
        icon = file.getvalue()
    large = b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xff\xff\xff" * 2  # of 2 ** 48 pixels
    contents = {"icon": icon, "large": large, "good": png((400, 100))}
    for name, content in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        if name != "good":
            assert image_size(content) is None
            with pytest.raises(ValueError, match=r"cannot be decoded|over the limit"):
                measure_images(content)
    several = [{**rows_of.PIXMO_COUNT, "image_url": name} for name in contents]
    found = examples("pixmo-count", *several, media=data.Folder(tmp_path), image_size=image_size)
    assert [example["rows"] for example in found] == [[2]]
    assert found.report.left_out == {NO_SIZE: 2}


def test_large_jpegs_have_their_own_size(monkeypatch):
    """Not that at which they are decoded."""
    limits = MediaLimits(image_pixels=2000, reduce_jpeg=True)
    with io.BytesIO() as file:
        Image.new("RGB", (80, 40)).save(file, "jpeg")
        content = file.getvalue()
    with monkeypatch.context() as patch:
        patch.setattr("molmo2.image.limits.MediaLimits", lambda: limits)
        assert image_size(content) == (80, 40)
    assert measure_images(content, limits) == [(40, 80)]
    assert load_images(content, limits=limits)[0].shape == (20, 40, 3)


@pytest.mark.parametrize("size", [None, (0, 100), (200, 0), (-200, 100), (float("nan"), 100), (200, float("inf"))])
def test_sizes_that_are_not_known(size):
    found = examples("pixmo-count", rows_of.PIXMO_COUNT, image_size=lambda source: size)
    assert (len(found), found.report.left_out) == (0, {NO_SIZE: 1})


@pytest.mark.parametrize("size", [np.array([200, 100]), [200, 100], (np.float32(200), 100.0)])
def test_sizes_in_other_forms(size):
    (found,) = examples("pixmo-count", rows_of.PIXMO_COUNT, image_size=lambda source: size)
    (expected,) = examples("pixmo-count", rows_of.PIXMO_COUNT)
    assert found == expected


@pytest.mark.parametrize("size", [200, (200, 100, 3), "200x100"])
def test_sizes_that_are_no_pairs_are_refused(size):
    with pytest.raises(ValueError, match=r"`Settings.image_size` gave .*; expected \(width, height\) in pixels"):
        examples("pixmo-count", rows_of.PIXMO_COUNT, image_size=lambda source: size)


def test_an_image_that_changes_after_it_was_measured(tmp_path):
    path = tmp_path / "boats.png"
    path.write_bytes(png((200, 100)))
    row = {**rows_of.PIXMO_COUNT, "image_url": "boats"}
    found = examples("pixmo-count", row, media=data.Folder(tmp_path), image_size=image_size)
    assert len(found) == 1
    path.write_bytes(b"no image")
    with pytest.raises(
        FileNotFoundError, match=r"size of an image of allenai/pixmo-count is no longer known: boats\."
    ):
        found[0]


# --- points in prose -------------------------------------------------------------------------------------------------


def test_explanations():
    """A tag for each mark, its texts within and in `alt`; points are numbered over the whole answer."""
    (turn,) = drawn("pixmo-point-explanations", rows_of.EXPLANATION, number=1)
    first = '<points alt="moored boats" coords="1 1 100 900 2 500 200">boats</points>'
    second = '<points coords="1 3 999 000">a pier</points>'
    assert turn == ("point_qa", "Is it a harbour?", f"Yes: {first} lie beside {second}.")
    found = parse_grounding(turn[2])
    assert [(point.id, point.label, point.alt) for point in found] == [
        (1, "boats", "moored boats"),
        (2, "boats", "moored boats"),
        (3, "a pier", None),
    ]
    (example,) = examples("pixmo-point-explanations", rows_of.EXPLANATION, rows_of.EXPLANATION)
    assert len(branches(example)) == 2
    assert media_parts(example) == [{"type": "image", "image": "/media/http://images/1.jpg"}]


def test_explanations_in_other_forms():
    """Another mark and style, points as lists or alone, and an answer without any."""
    row = {**rows_of.EXPLANATION, "parsed_response": "Yes: @ lie beside @."}
    row["points"] = [{"x": [50.0, 10.0], "y": [20.0, 90.0]}, {"x": 99.9, "y": 0.0}]
    (expected,) = drawn("pixmo-point-explanations", rows_of.EXPLANATION, number=1)
    (turn,) = drawn("pixmo-point-explanations", row, number=1, point_mark="@", explanation_style="user_qa")
    assert turn == ("user_qa", *expected[1:])
    none = {**rows_of.EXPLANATION, "parsed_response": " Yes. ", "points": [], "inline_text": [], "alt_text": []}
    assert drawn("pixmo-point-explanations", none, number=1)[0][2] == "Yes."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parsed_response": "Yes: [POINT] lie beside [POINT]."}, r"has not one <|POINT|> for each list of points"),
        ({"parsed_response": "Yes: <|POINT|>."}, "has not one"),
        ({"parsed_response": "<points> <|POINT|> <|POINT|>"}, "the answer contains a tag"),
        ({"parsed_response": None}, "no question, or no answer"),
        ({"question": " "}, "no question, or no answer"),
        ({"inline_text": ["boats"]}, "not as many texts"),
        ({"alt_text": None}, "not as many texts"),
        ({"points": [[], [{"x": 1.0, "y": 1.0}]]}, "a list of points is empty"),
        ({"points": [[{"x": 1.0, "y": 100.1}], [{"x": 1.0, "y": 1.0}]]}, "outside of its image"),
        ({"inline_text": ["boats", "<points>"]}, "cannot stand in a tag"),
        ({"alt_text": ["\"'", None]}, "cannot stand in a tag"),
    ],
)
def test_explanations_that_are_left_out(changes, reason):
    found = examples("pixmo-point-explanations", {**rows_of.EXPLANATION, **changes}, rows_of.EXPLANATION)
    assert (len(found), found.report.left_out.total()) == (1, 1)
    assert reason in str(found.report)


OTHER_FORMS = [
    ("pixmo-count", {"points": {"x": [None, 20.0], "y": [20.0, 90.0]}}),
    ("pixmo-count", {"points": {"x": [100.0, 20.0], "y": None}}),
    ("pixmo-count", {"points": {"x": None, "y": [20.0, 90.0]}}),
    ("pixmo-count", {"points": {"x": "ab", "y": [20.0, 90.0]}}),
    ("pixmo-count", {"points": [[100.0, 20.0], [20.0, 90.0]]}),
    ("pixmo-count", {"points": np.array([[100.0, 20.0], [20.0, 90.0]])}),
    ("pixmo-count", {"points": {"x": np.ones((2, 2)), "y": np.ones((2, 2))}}),
    ("pixmo-count", {"points": {"x": np.array(1.0), "y": np.array(1.0)}, "count": 1}),
    ("pixmo-count", {"points": 2}),
    ("pixmo-count", {"count": np.array([1, 2])}),
    ("pixmo-count", {"label": 5}),
    ("pixmo-point-explanations", {"inline_text": [5, "a pier"]}),
    ("pixmo-point-explanations", {"alt_text": [["moored"], None]}),
    ("pixmo-point-explanations", {"inline_text": "ab"}),
    ("pixmo-point-explanations", {"alt_text": 5}),
    ("pixmo-point-explanations", {"parsed_response": ["Yes"]}),
    ("pixmo-point-explanations", {"question": 5}),
    ("pixmo-point-explanations", {"points": [[[50.0, 20.0]], [[99.9, 0.0]]]}),
    ("pixmo-point-explanations", {"points": [[{"x": None, "y": 1.0}], [{"x": 1.0, "y": 1.0}]]}),
    ("molmo2-pixmo-multi-points", {"points": 7}),
    ("molmo2-pixmo-multi-points", {"points": [[[1.0, 1.0]]] * 7}),
    ("molmo2-pixmo-multi-points", {"points": [[{"x": 1.0, "y": None}]] * 7}),
    ("molmo2-pixmo-multi-points", {"normalized_labels": 7}),
    ("molmo2-pixmo-multi-points", {"images": 7}),
    ("Molmo2-VideoPoint", {"question": 5}),
    ("Molmo2-VideoPoint", {"label": b"cups"}),
    ("Molmo2-VideoPoint", {"clip_end": None, "video_duration": None}),
    ("Molmo2-VideoPoint", {"two_fps_timestamps": [float("nan"), 6.0]}),
    ("Molmo2-MultiImagePoint", {"labels": "abcdefg"}),
    ("Molmo2-MultiImagePoint", {"labels": [5] * 7}),
    ("Molmo2-MultiImagePoint", {"image_urls": "abcdefg"}),
    ("pixmo-points", {"points": [{"x": None, "y": 5.0}]}),
    ("CoSyn-point", {"questions": "?"}),
    ("CoSyn-point", {"questions": [5]}),
    ("CoSyn-point", {"names": "b"}),
    ("Molmo2-VideoTrack", {"fps": None}),
    ("Molmo2-VideoTrack", {"points": [{"object_id": "m0", "points": None}]}),
    ("molmo2-mevis", {"frame_trajectories": [{"frame": None, "time": 0.0, "points": [None]}]}),
    ("Molmo2-MultiImageQA", {"qa_pairs": None}),
    ("pixmo-cap-qa", {"question": None}),
    ("molmo2-tulu4-classified", {"messages": [None]}),
    ("molmo2-tulu4-classified", {"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]}),
    ("CoSyn-400K", {"qa_pairs": {"question": ["A?"], "explanation": ["x"], "answer": [42]}}),
    ("CoSyn-400K", {"qa_pairs": {"question": [5], "explanation": ["x"], "answer": ["a"]}}),
    ("CoSyn-400K", {"qa_pairs": {"question": ["A?"], "explanation": [5], "answer": ["a"]}}),
    ("CoSyn-400K", {"qa_pairs": {"question": "A", "explanation": None, "answer": "a"}}),
    ("Molmo2-MultiImageQA", {"qa_pairs": {"question": ["A?"], "answer": [float("nan")]}}),
    ("Molmo2-Cap", {"video_caption": 123}),
    ("Molmo2-Cap", {"annotation_score": "4"}),
    ("pixmo-cap", {"caption": 123}),
    ("pixmo-cap", {"transcripts": [123]}),
    ("pixmo-cap", {"transcripts": "Spoken."}),
    ("Molmo2-VideoCapQA", {"Answer": 42}),
    ("Molmo2-VideoCapQA", {"Question": 42}),
    ("Molmo2-VideoCapQA", {"NegativeAnswers": [42]}),
    ("Molmo2-VideoCapQA", {"NegativeAnswers": "A car"}),
    ("Molmo2-AskModelAnything", {"question": 42}),
    ("Molmo2-AskModelAnything", {"answer": ["Because."]}),
    ("pixmo-cap-qa", {"answer": 42}),
    ("molmo2-hardcodes", {"questions": "Hello?"}),
    ("molmo2-hardcodes", {"questions": ["Hello?", 42]}),
    ("molmo2-hardcodes", {"response": 42}),
]


@pytest.mark.parametrize(("name", "changes"), OTHER_FORMS)
def test_rows_in_other_forms_are_counted(name, changes):
    row = rows_of.ROWS[f"allenai/{name}"]
    found = examples(name, {**row, **changes}, row, config="chart")
    assert (len(found), found.report.left_out) == (1, {"the row has another form": 1})
    assert re.fullmatch(r"(?s)row 0: \w+Error: .+", found.report.first_error)
    assert f"another form (the first: {found.report.first_error})" in str(found.report)


def test_the_first_error_is_reported(caplog):
    """With it one sees whether a row or its reader is wrong; each reason has its own words beside it."""
    several = [{**rows_of.USER_QA, "answer": answer} for answer in ("Because.", 42, [5] * 500, "So.")]
    several.append({**rows_of.USER_QA, "video_id": "gone"})
    found = examples("Molmo2-AskModelAnything", *several, media=lambda reference: {"vid1": "file"}.get(reference.name))
    assert found.report.first_error == "row 1: TypeError: Expected a text; found 42."
    assert (
        "5 rows, 1 examples, 3 left out: 2 because the row has another form (the first: row 1: TypeError: Expected a "
        "text; found 42.); 1 because an image or a video is missing (the first: gone)"
    ) in str(found.report)
    long = examples("pixmo-count", {**rows_of.PIXMO_COUNT, "label": ["x" * 5000]}).report
    assert len(long.first_error) < 400


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("pixmo-points", {"points": {"x": [50.0, 10.0], "y": [20.0]}}, "not as many x as y"),
        ("pixmo-points", {"points": {"x": [50.0], "y": [20.0, 90.0]}}, "not as many x as y"),
        ("pixmo-count", {"points": {"x": [100.0, 20.0, 5.0], "y": [20.0, 90.0]}}, "not as many x as y"),
        ("CoSyn-point", {"answer_points": [{"x": [50.0], "y": []}]}, "not as many x as y"),
        ("CoSyn-point", {"answer_points": {"x": [[50.0], [1.0]], "y": [[25.0]]}}, "lists of x, y differ in length"),
        ("CoSyn-point", {"names": ["bar", "line"]}, "not as many questions as answers and names"),
        ("Molmo2-VideoPoint", {"points": [[], {"x": [50.0], "y": [20.0, 1.0]}]}, "not as many x as y"),
        (
            "molmo2-mevis",
            {"frame_trajectories": {"frame": [0, 3], "time": [0.0], "points": [[], []]}},
            "lists of frame, time, points differ in length",
        ),
        ("Molmo2-VideoTrack", {"points": {"object_id": ["m0"], "points": []}}, "lists of object_id, points differ"),
        ("Molmo2-MultiImageQA", {"qa_pairs": {"question": ["A?", "B?"], "answer": ["a"]}}, "not as many answers"),
        ("Molmo2-MultiImageQA", {"qa_pairs": {"question": ["A?"], "answer": ["a", "b"]}}, "not as many answers"),
        (
            "CoSyn-400K",
            {"qa_pairs": {"question": ["A?"], "explanation": ["x", "y"], "answer": ["a"]}},
            "not as many answers or explanations as questions",
        ),
        ("molmo2-tulu4-classified", {"messages": {"role": ["user"], "content": []}}, "lists of role, content differ"),
        ("Molmo2-MultiImagePoint", {"points": None}, "not one list of points per image"),
        ("Molmo2-MultiImagePoint", {"labels": []}, "there is no label, or not one list"),
        ("CoSyn-point", {"questions": None}, "not as many questions as answers and names"),
    ],
)
def test_lists_that_do_not_fit_are_not_cut_to_the_shorter(name, changes, reason):
    row = rows_of.ROWS[f"allenai/{name}"]
    found = examples(name, {**row, **changes}, row, config="chart")
    assert (len(found), found.report.left_out.total()) == (1, 1)
    assert reason in str(found.report)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("pixmo-count", {"points": [{"x": 1.0}, {"x": 2.0}]}, "a point has no 'y'"),
        ("pixmo-point-explanations", {"points": [[{"y": 1.0}], [{"x": 1.0, "y": 1.0}]]}, "a point has no 'x'"),
        ("molmo2-pixmo-multi-points", {"points": [[{"left": 1.0}]] * 7}, "a point has no 'x'"),
        ("Molmo2-VideoPoint", {"points": [[{"x": 50.0}], []]}, "a point has no 'y'"),
        ("Molmo2-VideoTrack", {"points": [{"points": []}]}, "an entry of a list has no 'object_id'"),
        ("molmo2-mevis", {"frame_trajectories": [{"frame": 0, "points": []}]}, "an entry of a list has no 'time'"),
        (
            "molmo2-mevis",
            {"frame_trajectories": [{"frame": 0, "time": 0.0, "points": [{"id": 0}]}]},
            "an entry of a list has no 'point'",
        ),
        ("Molmo2-MultiImageQA", {"qa_pairs": {"question": ["A?"]}}, "`qa_pairs` has no 'answer'"),
        ("molmo2-tulu4-classified", {"messages": [{"role": "user"}]}, "an entry of a list has no 'content'"),
    ],
)
def test_entries_without_a_name_are_no_missing_columns(name, changes, reason):
    row = rows_of.ROWS[f"allenai/{name}"]
    found = examples(name, {**row, **changes}, row)
    assert (len(found), found.report.left_out) == (1, {reason: 1})


@pytest.mark.parametrize("column", ["points", "images"])
def test_local_sets_without_a_column_are_counted(column):
    row = {**rows_of.LOCAL_MULTI_POINT, column: None}
    found = examples("molmo2-pixmo-multi-points", row)
    assert (len(found), found.report.left_out.total()) == (0, 1)


def as_arrays(value):
    """Lists as arrays, as `datasets` gives them in the format "numpy"."""
    if isinstance(value, dict):
        return {key: as_arrays(entry) for key, entry in value.items()}
    if not isinstance(value, list):
        return value
    array = np.empty(len(value), dtype=object)
    array[:] = list(map(as_arrays, value))
    is_numbers = bool(value) and all(isinstance(entry, float) for entry in value)
    return array.astype(np.float64) if is_numbers else array


@pytest.mark.parametrize("name", rows_of.ROWS)
def test_arrays_are_lists(name):
    row = rows_of.ROWS[name]
    name = name.removeprefix("allenai/")
    for seed in range(4):
        (expected,), (found,) = (examples(name, each, seed=seed, config="chart") for each in (row, as_arrays(row)))
        assert found == expected


def test_arrays_of_images():
    """One column may hold an image or several; an array of two or three dimensions is an image."""
    texts = np.array(["chart one", "chart two"])
    pair = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    for several in (texts, texts.astype(object), pair):
        row = {**rows_of.MULTI_IMAGE_QA, "images": several}
        (example,) = examples("Molmo2-MultiImageQA", row)
        assert [np.array_equal(part["image"], each) for part, each in zip(media_parts(example), several)] == [True] * 2
    for one in (pair[0], pair[0, ..., 0]):
        (example,) = examples("CoSyn-400K", {**rows_of.SYNTHETIC_QA, "images": None, "image": one}, config="chart")
        (part,) = media_parts(example)
        assert part["image"] is one


def test_positions():
    """Sorted fractions, of all forms of points that the data sets have, also as arrays and deques."""
    expected = [(0.1, 0.9), (0.5, 0.2)]
    for form in (list, tuple, np.array, deque):
        assert positions({"x": form([50.0, 10.0]), "y": form([20.0, 90.0])}) == expected
        assert positions(form([{"x": 50.0, "y": 20.0}, {"x": 10.0, "y": 90.0}])) == expected
    assert positions({"x": 100.0, "y": 20.0}, (200, 100)) == [(0.5, 0.2)]
    for none in (None, [], np.array([]), {"x": None, "y": None}, {"x": np.array([]), "y": np.array([])}):
        assert positions(none) == []


def test_cosyn_points():
    expected = ("cosyn_point", "Where is the bar?", '<points coords="1 1 500 250">bar</points>')
    assert drawn("CoSyn-point", rows_of.COSYN_POINT, number=1) == [expected]


# --- tracks ----------------------------------------------------------------------------------------------------------


def test_video_tracks():
    """Of 4 frames a second every other one; objects are numbered by `mask_id`; hidden ones are left out of a frame."""
    found = drawn("Molmo2-VideoTrack", rows_of.VIDEO_TRACK)
    tag = '<tracks coords="0.0 0 500 500\t0.5 0 600 500 1 100 100\t1.0 1 200 200">two dogs</tracks>'
    assert {(style, answer) for style, _, answer in found} == {("video_point_track_per_frame", tag)}
    with_rate = sum("2" in question for _, question, _ in found) / len(found)
    assert 0.3 < with_rate < 0.7
    (example,) = examples("Molmo2-VideoTrack", rows_of.VIDEO_TRACK)
    assert media_parts(example) == [
        {"type": "video", "video": "/media/c.mp4", "frame_sample_mode": "fps", "sampling_fps": 2}
    ]


def test_other_rates_are_always_said():
    found = drawn("Molmo2-VideoTrack", rows_of.VIDEO_TRACK, number=20, sampling_fps=4)
    assert all("4 FPS" in question or "4 p" in question or "4 times" in question for _, question, _ in found)
    assert found[0][2].startswith('<tracks coords="0.0 0 500 500\t0.2 0 005 010\t0.5 ')
    left_out = examples("Molmo2-VideoTrack", rows_of.VIDEO_TRACK, sampling_fps=3).report.left_out
    assert left_out == {"3 FPS do not divide the frame rate": 1}


def test_no_frame_of_a_track():
    row = {**rows_of.VIDEO_TRACK, "points": [{"object_id": "m0", "points": [None, [1.0, 1.0]]}]}
    assert drawn("Molmo2-VideoTrack", row, number=1)[0][2] == "No tracks available."


@pytest.mark.parametrize(
    ("row", "style", "answer"),
    [
        (
            rows_of.ACADEMIC,
            "video_point_track_per_frame",
            '<tracks coords="0.0 0 500 500\t0.5 0 600 500\t1.0 0 700 500 1 200 200">the dogs</tracks>',
        ),
        (
            {**rows_of.ACADEMIC, "task": "ground"},
            "video_point_track_start_end",
            '<tracks coords="0.0 0 500 500\t1.0 0 700 500 1 200 200">the dogs</tracks>',
        ),
        (
            rows_of.SINGLE,
            "video_single_point_track_start_end",
            '<tracks coords="0.5 7 600 500\t1.0 7 700 500">the dogs</tracks>',
        ),
    ],
)
def test_academic_tracks(row, style, answer):
    ((own_style, question, own_answer),) = drawn("molmo2-mevis", row, number=1)
    assert (own_style, own_answer) == (style, answer)
    assert ('<points coords="0.5 1 600 500">the dogs</points>' in question) == (row is rows_of.SINGLE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "other"}, "the task is none of"),
        ({"sampling_fps": 4}, "does not divide"),
        ({"task": "single_point_track"}, "not one object"),
        ({"width": 90}, "outside of its image"),
        ({"height": 49}, "outside of its image"),
        ({"frame_trajectories": [rows_of._seen(0, (0, [-1.0, 5.0], False))]}, "outside of its image"),
        ({"expression": ""}, "no label"),
    ],
)
def test_academic_rows_that_are_left_out(changes, reason):
    assert reason in str(examples("molmo2-mevis", {**rows_of.ACADEMIC, **changes}).report)


def test_points_at_the_edges_of_a_video_are_inside():
    edges = [rows_of._seen(0, (0, [0.0, 100.0], False)), rows_of._seen(3, (0, [200.0, 0.0], False))]
    assert len(examples("molmo2-mevis", {**rows_of.ACADEMIC, "frame_trajectories": edges})) == 1


@pytest.mark.parametrize(
    ("name", "row", "video"),
    [
        ("MolmoPoint-TrackAny", {**rows_of.ACADEMIC, "video_path": "all/v.mp4", "video_source": "any"}, "all/v.mp4"),
        ("MolmoPoint-TrackSyn", rows_of.ACADEMIC, "v.mp4"),
        ("molmo2-track-instruction", {**rows_of.ACADEMIC, "clip": "c.mp4", "video_dataset": "sav"}, "c.mp4"),
        ("Molmo2-VideoTrack", {**rows_of.VIDEO_TRACK, "clip": None}, "v.mp4"),
    ],
)
def test_which_column_names_the_video(name, row, video):
    (example,) = examples(name, row)
    assert media_parts(example)[0]["video"] == f"/media/{video}"


# --- questions, captions, text ---------------------------------------------------------------------------------------


NO_ANSWERS = {"question": ["How many cups?"], "answer": [""]}
NO_QUESTIONS = {"question": [None, "Why?"], "answer": ["3", "So."]}


def test_video_captions():
    found = drawn("Molmo2-Cap", rows_of.CAPTION, number=10)
    texts = {"video_short_caption": "Short.", "video_merged_caption": "Merged.", "video_long_caption": "Long."}
    assert {style: answer for style, _, answer in found} == texts
    assert len(drawn("Molmo2-Cap", rows_of.CAPTION, number=10, max_captions=2)) == 20
    (example,) = examples("Molmo2-Cap", {**rows_of.CAPTION, "annotation_score": 3})
    assert media_parts(example)[0]["clip"] == (0.0, 10.0)


@pytest.mark.parametrize(
    ("name", "row", "changes", "settings", "reason"),
    [
        ("Molmo2-Cap", rows_of.CAPTION, {"annotation_score": 2}, {}, "the score is below 3"),
        ("Molmo2-Cap", rows_of.CAPTION, {}, {"excluded_ids": frozenset({"vid1"})}, "the video is excluded"),
        ("Molmo2-AskModelAnything", rows_of.USER_QA, {"answer": " "}, {}, "there is no answer"),
        ("Molmo2-AskModelAnything", rows_of.USER_QA, {"question": None}, {}, "there is no question"),
        ("Molmo2-VideoCapQA", rows_of.CAPTION_QA, {"NegativeAnswers": []}, {}, "no other option"),
        ("Molmo2-VideoCapQA", rows_of.CAPTION_QA, {"NegativeAnswers": ["A car", None]}, {}, "no other option"),
        ("Molmo2-VideoCapQA", rows_of.CAPTION_QA, {"Question": None}, {}, "there is no question"),
        ("molmo2-hardcodes", rows_of.HARDCODES, {"questions": ["Who?", None]}, {}, "there is no question"),
        ("molmo2-hardcodes", rows_of.HARDCODES, {"response": None}, {}, "there is no answer"),
        ("molmo2-hardcodes", rows_of.HARDCODES, {"questions": []}, {}, "there is no question"),
        ("CoSyn-point", rows_of.COSYN_POINT, {"questions": [None]}, {}, "there is no question"),
        ("Molmo2-MultiImagePoint", rows_of.MULTI_IMAGE_POINT, {"labels": [None] * 7}, {}, "there is no label"),
        ("Molmo2-VideoCapQA", rows_of.CAPTION_QA, {"NegativeAnswers": ["x"] * 26}, {}, "more than 26 options"),
        ("Molmo2-Cap", {"video_id": "a", "annotation_score": 5, "video_caption": " "}, {}, {}, "there is no answer"),
        ("Molmo2-MultiImageQA", rows_of.MULTI_IMAGE_QA, {"qa_pairs": NO_QUESTIONS}, {}, "there is no question"),
        ("Molmo2-MultiImageQA", rows_of.MULTI_IMAGE_QA, {"image_urls": ["http://a"]}, {}, "only one image"),
        ("Molmo2-MultiImageQA", rows_of.MULTI_IMAGE_QA, {}, {"max_images": 1}, "not 1 to 1 images"),
        ("Molmo2-MultiImageQA", rows_of.MULTI_IMAGE_QA, {"image_urls": ["http://a"] * 6}, {}, "not 1 to 5 images"),
        ("Molmo2-SynMultiImageQA", rows_of.SYNTHETIC_QA, {"images": ["a"] * 6}, {"config": "table"}, "not 1 to 5"),
        ("Molmo2-MultiImageQA", rows_of.MULTI_IMAGE_QA, {"qa_pairs": NO_ANSWERS}, {}, "there is no answer"),
        ("pixmo-cap-qa", rows_of.PIXMO_CAP_QA, {"question": "[USER] a [USER] b"}, {}, "do not alternate"),
        ("molmo2-tulu4-classified", rows_of.TULU, {"has_special_token": True}, {}, "a special token"),
        ("molmo2-tulu4-classified", rows_of.TULU, {"messages": rows_of.TULU["messages"][:2]}, {}, "do not alternate"),
    ],
)
def test_questions_that_are_left_out(name, row, changes, settings, reason):
    found = examples(name, {**row, **changes}, **settings)
    assert len(found) == 0
    assert reason in str(found.report)


def test_multiple_choice():
    places, forms = Counter(), Counter()
    for style, question, answer in drawn("Molmo2-VideoCapQA", rows_of.CAPTION_QA, number=200):
        assert style == "video_multiple_choice"
        lines = question.split("\n")
        assert "What is it?" in lines
        assert len(lines) == 6
        has_letters = len(answer) == 1
        forms[has_letters] += 1
        if has_letters:
            assert f"{answer}. A cup" in lines
            places[answer] += 1
        else:
            assert answer == "A cup"
            assert {"A cup", "A car", "A cat", "A cow"} < set(lines)
    assert 70 < forms[True] < 130
    assert set(places) == set("ABCD")


def test_choices_about_a_video_form_a_tree():
    other = {**rows_of.CAPTION_QA, "video_id": "vid2"}
    first, second = examples("Molmo2-VideoCapQA", rows_of.CAPTION_QA, other, {**rows_of.CAPTION_QA, "Answer": "A dog"})
    assert (first["rows"], second["rows"]) == ([0, 2], [1])
    assert [len(branches(example)) for example in (first, second)] == [2, 1]


def test_questions_about_a_video_form_a_tree():
    (example,) = examples("Molmo2-AskModelAnything", rows_of.USER_QA, {**rows_of.USER_QA, "question": "Where?"})
    assert [turns(branch) for branch in branches(example)] == [
        [("user_qa", "Why?", "Because.")],
        [("user_qa", "Where?", "Because.")],
    ]
    assert "video" not in json.dumps(branches(example)[1])


def test_subtitles_precede_the_question():
    (example,) = examples("Molmo2-VideoSubtitleQA", rows_of.SUBTITLE_QA, rows_of.SUBTITLE_QA)
    for branch in branches(example):
        assert branch[0] == {"role": "subtitle", "content": "subtitle\n0.0 - 1.5 Hello.\n60.0 - 61.0 Bye.\n"}
    assert turns(branches(example)[0])[0][0] == "video_multiple_choice_w_subtitle"
    (example,) = examples(
        "Molmo2-VideoSubtitleQA", rows_of.SUBTITLE_QA, subtitle_mode="frame_1", frame_times=lambda *_: [0.0, 2.5, 5.0]
    )
    assert example["messages"][0]["content"] == "subtitle\n0.0 - 1.5 Hello.\n"


def test_subtitles_as_lists_and_damaged_ones():
    rows = rows_of.SUBTITLE_QA["subtitle"]
    lists = {name: [row[name] for row in rows] for name in rows[0]}
    found = examples("Molmo2-VideoSubtitleQA", {**rows_of.SUBTITLE_QA, "subtitle": lists})
    assert branches(found[0]) == branches(examples("Molmo2-VideoSubtitleQA", rows_of.SUBTITLE_QA)[0])
    unequal = {**lists, "end": lists["end"][:1]}
    for damaged in ("no times", [{"start": 0.0}], 5, unequal):
        found = examples("Molmo2-VideoSubtitleQA", {**rows_of.SUBTITLE_QA, "subtitle": damaged})
        assert (len(found), found.report.left_out) == (0, {"the subtitle cannot be read": 1})


def test_only_transcripts_that_say_something_are_drawn():
    row = {**rows_of.PIXMO_CAP, "caption": "", "transcripts": ["", None, " ", "Spoken."]}
    assert {answer for _, _, answer in drawn("pixmo-cap", row, number=20)} == {"Spoken."}
    assert examples("pixmo-cap", {**row, "transcripts": ["", " "]}).report.left_out == {"there is no answer": 1}


def test_questions_about_images():
    assert drawn("Molmo2-MultiImageQA", rows_of.MULTI_IMAGE_QA, number=1) == [
        ("correction_qa", f"{NO_POINTING}How many cups?", "3"),
        ("correction_qa", "Which is larger?", "The second."),
    ]
    assert drawn("Molmo2-SynMultiImageQA", rows_of.SYNTHETIC_QA, number=1, config="chart") == [
        ("cosyn_chart_exp", "Which?", "It is higher. Answer: The first")
    ]
    assert drawn("CoSyn-400K", rows_of.SYNTHETIC_QA, number=1, config="math")[0][0] == "cosyn_math_exp"
    (example,) = examples("Molmo2-SynMultiImageQA", rows_of.SYNTHETIC_QA, config="chart")
    assert [part["image"] for part in media_parts(example)] == ["chart one", "chart two"]
    assert drawn("pixmo-cap-qa", rows_of.PIXMO_CAP_QA, number=1) == [
        ("synthetic_qa", "What is it?", "A boat."),
        ("synthetic_qa", "Which colour?", "Red."),
    ]
    plain = {**rows_of.PIXMO_CAP_QA, "question": "What is it?"}
    assert drawn("pixmo-cap-qa", plain, number=1) == [("synthetic_qa", "What is it?", "Red.")]


@pytest.mark.parametrize(("style", "length"), [("long_caption", 1500), ("transcript", 2400)])
def test_captions_say_about_how_long_they_are(style, length):
    row = {**rows_of.PIXMO_CAP, "transcripts": ["y" * 2400]}
    found = [turn for turn in drawn("pixmo-cap", row, number=400) if turn[0] == style]
    assert len(found) == 400
    numbers = [int(question[len(style) + 1 : -1]) for _, question, _ in found if question != f"{style}:"]
    assert 0.05 < 1 - len(numbers) / len(found) < 0.16  # one time in ten without
    assert np.mean(numbers) == pytest.approx(length / 15, abs=5)
    assert np.std(numbers) == pytest.approx(25, abs=4)


def test_text():
    (example,) = examples("molmo2-tulu4-classified", rows_of.TULU)
    assert example["messages"][0] == {"role": "system", "content": "Be brief."}
    assert turns(example["messages"]) == [("text_sft", "Hi", "Hello"), ("text_sft", "Bye", "See you")]
    assert [turn[2] for turn in drawn("molmo2-hardcodes", rows_of.HARDCODES, number=1)] == ["Molmo2.", "Molmo2."]
    (example,) = examples("molmo2-hardcodes", {**rows_of.HARDCODES, "images": ["an image"]})
    assert media_parts(example) == [{"type": "image", "image": "an image"}]


# --- media -----------------------------------------------------------------------------------------------------------


def test_missing_media_are_reported_not_dropped(caplog):
    several = [{**rows_of.USER_QA, "video_id": name} for name in ("here", "gone", "gone", "away")]

    def media(reference):
        return "file" if reference.name == "here" else None

    with caplog.at_level(logging.WARNING):
        found = examples("Molmo2-AskModelAnything", *several, media=media)
    assert len(found) == 1
    assert found.report.missing == ["gone", "away"]
    assert (
        "4 rows, 1 examples, 3 left out: 3 because an image or a video is missing (the first: gone, away)"
        in caplog.text
    )
    with pytest.raises(FileNotFoundError, match="3 because"):
        data.Examples("allenai/Molmo2-AskModelAnything", several, media, missing="raise")


@pytest.mark.parametrize(
    ("name", "changes", "missing"),
    [
        *(
            ("Molmo2-AskModelAnything", {"video_id": none}, f"video: {none!r}")
            for none in (None, "", True, 1.5, float("nan"))
        ),
        *((name, {"video_id": None}, "video: None") for name in ("Molmo2-Cap", "Molmo2-VideoCapQA")),
        ("Molmo2-VideoPoint", {"video_id": None}, "video: None"),
        ("Molmo2-VideoTrack", {"clip": None, "video": None}, "video: None"),
        ("molmo2-mevis", {"video": None}, "video: None"),
        *((name, {"image_url": None}, "image: None") for name in ("pixmo-points", "pixmo-count", "pixmo-cap")),
        *((name, {"image_url": None}, "image: None") for name in ("pixmo-cap-qa", "pixmo-point-explanations")),
        ("pixmo-points", {"image_url": None, "images": []}, "image: None"),
        ("CoSyn-point", {"image": None}, "image: None"),
        ("CoSyn-point", {"image": {"bytes": None, "path": None}}, "image: {'bytes': None, 'path': None}"),
        ("CoSyn-400K", {"image": None}, "image: None"),
        ("Molmo2-SynMultiImageQA", {"images": ["chart", None]}, "image: None"),
        ("Molmo2-SynMultiImageQA", {"images": None}, "image: None"),
        ("Molmo2-MultiImageQA", {"image_urls": ["http://images/1.jpg", None]}, "image: None"),
        ("Molmo2-MultiImageQA", {"image_urls": None}, "image: None"),
        (
            "Molmo2-MultiImagePoint",
            {"image_urls": [*rows_of.MULTI_IMAGE_POINT["image_urls"][1:], None]},
            "image: None",
        ),
        ("Molmo2-MultiImagePoint", {"image_urls": None}, "image: None"),
        ("molmo2-pixmo-multi-points", {"images": [None, *rows_of.LOCAL_MULTI_POINT["images"][1:]]}, "image: None"),
        ("molmo2-pixmo-multi-points", {"images": None}, "image: None"),
        ("molmo2-hardcodes", {"images": [None]}, "image: None"),
    ],
)
def test_media_without_a_name_are_missing(name, changes, missing, tmp_path):
    """They end no reading, whatever looks for media, and the report says which row it was."""
    row = rows_of.ROWS[f"allenai/{name}"]
    found = examples(name, row, {**row, **changes}, config="chart")
    assert (len(found), found.report.left_out) == (1, {MISSING: 1})
    assert found.report.missing == [f"row 1 ({missing})"]
    assert f"(the first: row 1 ({missing}))" in str(found.report)
    for media in (data.Folder(tmp_path), data.urls, data.UrlMapping({None: "http://a"})):
        assert f"row 0 ({missing})" in examples(name, {**row, **changes}, media=media, config="chart").report.missing


@pytest.mark.parametrize("name", [12, np.int64(12), Path("12"), "12"])
def test_numbers_and_paths_are_names(name, tmp_path):
    """Resolvers get their text, so that those for names of files and of URLs find them."""
    (tmp_path / "12.mp4").touch()
    (tmp_path / "12.png").touch()
    resolvers = (everywhere, data.Folder(tmp_path), data.UrlMapping({"12": "http://media/12"}))
    asked = {**rows_of.USER_QA, "video_id": name}
    found = [examples("Molmo2-AskModelAnything", asked, media=each)[0] for each in resolvers]
    expected = ["/media/12", tmp_path / "12.mp4", "http://media/12"]
    assert [media_parts(example)[0]["video"] for example in found] == expected
    for own, column in (("molmo2-pixmo-multi-points", "images"), ("Molmo2-MultiImageQA", "image_urls")):
        row = {**rows_of.ROWS[f"allenai/{own}"], column: [name] * (7 if column == "images" else 2)}
        (example,) = examples(own, row, media=data.Folder(tmp_path))
        assert {part["image"] for part in media_parts(example)} == {tmp_path / "12.png"}
    assert examples("Molmo2-AskModelAnything", asked, media=data.urls).report.missing == ["12"]
    row = {**EVALUATED["PointArena/pointarena-data"][0], "image": name}
    ((example,), _) = evaluation_examples("PointArena/pointarena-data", [row], data.Folder(tmp_path))
    assert example.messages[0]["content"][0]["image"] == tmp_path / "12.png"


def test_a_row_without_columns_for_images_is_refused():
    row = {key: value for key, value in rows_of.PIXMO_POINTS.items() if key != "image_url"}
    with pytest.raises(ValueError, match="Row 0 of allenai/pixmo-points has no column 'image_url'"):
        examples("pixmo-points", row)


def test_errors_of_resolvers_are_not_taken_for_those_of_rows():
    def media(reference):
        raise TypeError("a fault of the resolver")

    with pytest.raises(TypeError, match="a fault of the resolver"):
        examples("Molmo2-AskModelAnything", rows_of.USER_QA, media=media)
    with pytest.raises(TypeError, match="a fault of the resolver"):
        evaluation_examples("allenai/pixmo-count", [EVALUATED["allenai/pixmo-count"][0]], media)


def test_media_that_disappear():
    places = {"vid1": "file"}
    found = examples("Molmo2-AskModelAnything", rows_of.USER_QA, media=lambda reference: places.get(reference.name))
    places.clear()
    with pytest.raises(FileNotFoundError, match="vid1"):
        found[0]


def reference(name, kind="video", clip=None):
    return MediaReference(kind, name, clip)


def test_folders(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    url = "http://images/1.jpg"
    (tmp_path / "secret.mp4").touch()
    for name in ("a.mp4", "b.webm", "c.jpg", "d.gif", "e.tif", "f.heic", "g.m4v"):
        (folder / name).touch()
    find = data.Folder(folder)
    assert find(reference("a")) == find(reference("a.mp4")) == folder / "a.mp4"
    assert find(reference("b")) == folder / "b.webm"
    assert find(reference("c")) is None  # an image is no video
    assert find(reference("c", "image")) == folder / "c.jpg"
    assert find(reference("d")) == find(reference("d", "image")) == folder / "d.gif"
    for name in ("e.tif", "f.heic"):
        assert find(reference(name[0], "image")) == folder / name
    assert find(reference("g")) == folder / "g.m4v"
    assert find(reference("../secret")) is None
    assert find(reference("a/../../secret.mp4")) is None
    assert find(reference(str(tmp_path / "secret.mp4"))) is None
    assert find(reference("")) is None
    (folder / "linked.mp4").symlink_to(tmp_path / "secret.mp4")
    assert find(reference("linked")) == folder / "linked.mp4"
    (folder / f"{hashlib.sha256(url.encode()).hexdigest()}.png").touch()
    assert find(reference(url, "image")).suffix == ".png"
    assert data.clip_name(reference("x", clip=(1.0, None))) == "x_1.0_end"


def test_url_mappings(tmp_path):
    gcs = "https://storage.googleapis.com/bucket/a.mp4"
    mapping = {
        "a": {"youtube": "https://www.youtube.com/watch?v=a", "gcs": gcs},
        "b": gcs,
        "c": ["https://youtu.be/c"],
        "d": None,
    }
    path = tmp_path / "youtube_id_to_urls_mapping.json"
    path.write_text(json.dumps(mapping))
    find = data.UrlMapping(path)
    assert [find(reference(name)) for name in "abcde"] == [gcs, gcs, None, None, None]
    both = data.first_of(data.Folder(tmp_path), find)
    (tmp_path / "e.mp4").touch()
    assert [both(reference(name)) for name in "ade"] == [gcs, None, tmp_path / "e.mp4"]
    with pytest.raises(ValueError, match="one kind"):
        data.first_of(data.Folder(tmp_path, has_cut_clips=True), find)


def test_urls_are_used_as_they_are():
    (example,) = data.Examples("allenai/pixmo-points", [rows_of.PIXMO_POINTS])
    assert media_parts(example) == [{"type": "image", "image": "http://images/1.jpg"}]
    assert data.urls(reference("vid1")) is None


# --- styles and subtitles --------------------------------------------------------------------------------------------

FIELDS = {"label": "cups", "fps": "2", "points": "<points ...>", "start_time": "1.0", "end_time": "2.0"}


@pytest.mark.parametrize("style", TEMPLATES)
def test_templates(style):
    texts = [text.format(**FIELDS) for text in TEMPLATES[style]]
    assert len(set(texts)) == len(texts) >= 3
    named = {name for name in FIELDS if f"{{{name}}}" in TEMPLATES[style][0]}
    assert all({name for name in FIELDS if f"{{{name}}}" in text} == named for text in TEMPLATES[style])
    found = {data.draw_prompt(style, random.Random(seed), **FIELDS) for seed in range(400)}
    assert found <= set(texts)
    assert len(found) > 0.7 * len(texts)


def test_as_many_templates_as_in_training():
    """Of the styles whose number is known; those of pointing were about 40, those of first and last points 5 to 7."""
    numbers = {
        "pointing": 40,
        "point_count": 58,
        "video_point_track_per_frame": 10,
        "video_point_track_per_frame_fps": 8,
        "video_point_track_start_end": 6,
        "video_single_point_track_start_end": 12,
        "video_clip_caption_start_end": 10,
    }
    assert {style: len(TEMPLATES[style]) for style in numbers} == numbers
    assert (len(set(LETTER_INSTRUCTIONS)), len(set(TEXT_INSTRUCTIONS))) == (16, 14)


def test_prompts_that_users_see_are_among_them():
    assert prompts.point("cups").text in [text.format(**FIELDS) for text in TEMPLATES["pointing"]]
    assert prompts.count("cups").text in [text.format(**FIELDS) for text in TEMPLATES["point_count"]]
    assert prompts.track("cups").text in [text.format(**FIELDS) for text in TEMPLATES["video_point_track_per_frame"]]
    with_rate = TEMPLATES["video_point_track_per_frame_fps"]
    assert prompts.track("cups", 2).text in [text.format(**FIELDS) for text in with_rate]


def test_braces_in_labels_are_text():
    assert "{label}" in data.draw_prompt("pointing", random.Random(0), label="{label}")
    with pytest.raises(ValueError, match="'poem' has no templates"):
        data.draw_prompt("poem", random.Random(0))
    with pytest.raises(ValueError, match="need 'label'"):
        data.draw_prompt("pointing", random.Random(0))
    with pytest.raises(ValueError, match="Option 2 of 2"):
        data.draw_multiple_choice("?", ["a", "b"], 2, random.Random(0))


def test_times_in_prompts():
    times = Counter(data.draw_time(3725.25, random.Random(seed)) for seed in range(200))
    assert set(times) == {"3725.2", "01:02:05"}
    assert 70 < times["01:02:05"] < 130
    assert data.draw_time(3725.25, random.Random(0), in_seconds=True) == "3725.2"


SRT = (
    "1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>Hello</i>\r\nthere.\r\n\r\n"
    "2\r\n01:00:00,000 --> 01:00:01,000\r\nBye &amp; on.\r\n"
)
VTT = (
    "WEBVTT\n\nNOTE nothing\n\nfirst\n00:01.000 --> 00:02.500 align:start\nHello there.\n\n"
    "01:00:00.000 --> 01:00:01.000\nBye & on.\n"
)
SUBTITLES = {(1.0, 2.5): "Hello there.", (3600.0, 3601.0): "Bye & on."}


@pytest.mark.parametrize(
    "source",
    [
        SRT,
        VTT,
        SUBTITLES,
        [{"start": start, "end": end, "text": text} for (start, end), text in SUBTITLES.items()],
        [(3600, 3601, "Bye & on."), (1, 2.5, "Hello there.")],
    ],
)
def test_every_form_of_subtitles(source):
    found = data.read_subtitles(source)
    assert found == SUBTITLES
    assert list(found) == list(SUBTITLES)


def test_subtitle_text():
    assert data.subtitle_text(SUBTITLES, mode="all") == "subtitle\n1.0 - 2.5 Hello there.\n3600.0 - 3601.0 Bye & on.\n"
    for times, is_near in (([0.0], True), ([3.5], True), ([3.6], False), ([2.0], True), ([], False)):
        assert bool(data.subtitle_text(SUBTITLES, times)) == is_near
    assert data.subtitle_text("Plain.") == "subtitle\nPlain."
    assert data.subtitle_text("") == data.subtitle_text({}, [0.0]) == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.read_subtitles("Some text"), "neither SRT nor WebVTT"),
        (lambda: data.read_subtitles([(2, 1, "a")]), "expected 0 <= start <= end"),
        (lambda: data.read_subtitles([{"start": 1.0, "text": "a"}]), "no subtitles: .*KeyError: 'end'"),
        (lambda: data.read_subtitles([(1, None, "a")]), "no subtitles: .*TypeError"),
        (lambda: data.read_subtitles([(1, 2, None)]), "no subtitles: .*TypeError: expected a text; found None"),
        (lambda: data.read_subtitles({(1, 2): 5}), "no subtitles: .*TypeError: expected a text; found 5"),
        (lambda: data.subtitle_text({}, [], "some"), "'some'; expected 'frame_1' or 'all'"),
        (lambda: data.subtitle_text(SUBTITLES), "needs the times"),
    ],
)
def test_subtitles_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- evaluation sets -------------------------------------------------------------------------------------------------

MASK = np.zeros((10, 20), dtype=bool)
MASK[4:6, 8:12] = True
RLE = {"size": [10, 20], "counts": [84, 2, 8, 2, 8, 2, 8, 2, 84]}
EVALUATED = {
    "allenai/Molmo2-VideoPointEval": (
        {
            "video_id": "v",
            "video_source": "youtube",
            "label": "cups",
            "height": 10,
            "width": 20,
            "video_duration": 9.0,
            "two_fps_timestamps": [1.5],
            "points": [{"x": 10.0, "y": 5.0}],
            "masks": [[{"frame_id": 3, "rle": RLE}]],
        },
        '<points coords="1.5 1 500 500">cups</points>',
    ),
    "allenai/Molmo2-VideoCountEval": (
        {
            "video_id": "v",
            "label": "cups",
            "question": "How many?",
            "count": 4,
            "category": "object",
            "clip_start": 1.0,
        }
        | {"clip_end": 9.0, "video_duration": 20.0},
        "4",
    ),
    "allenai/Molmo2-VideoTrackEval": (
        {**rows_of.VIDEO_TRACK, "w": 20, "h": 10, "mask_id": ["m"]}
        | {
            "points": [{"object_id": "m", "points": [[10.0, 5.0]] * 3}],
            "masks": [{"object_id": "m", "masks": [RLE] * 3}],
        },
        '<tracks coords="0.0 0 500 500\t0.5 0 500 500">dogs</tracks>',
    ),
    "allenai/pixmo-points-eval": (
        {"image_url": "http://a", "label": "cups", "points": [{"x": 50.0, "y": 50.0}], "masks": [MASK.tolist()]},
        '<points coords="1 1 500 500">cups</points>',
    ),
    "allenai/pixmo-count": ({"image_url": "http://a", "label": "cups", "count": 2}, "2"),
    "PointArena/pointarena-data": (
        {"user_input": "The cup.", "category": "spatial", "image": "an image", "mask": MASK},
        '<points coords="1 1 500 500">cup</points>',
    ),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_sets(name):
    """The right answer has full marks, and another one has not."""
    row, answer = EVALUATED[name]
    (example,), report = evaluation_examples(name, [row], everywhere)
    assert (report.rows, report.examples) == (1, 1)
    scores = METRICS[example.metric](answer, **example.truth)
    assert min(scores.values()) == pytest.approx(1)
    assert max(METRICS[example.metric]("No idea.", **example.truth).values()) < 1 or example.metric == "image_counting"
    assert len(media_parts({"messages": example.messages})) == 1
    assert example.messages[0]["content"][-1]["text"]


def test_every_evaluation_set_is_tested():
    assert set(EVALUATED) == set(EVALUATION_SETS)


def test_details_of_evaluation_sets():
    names = ["Molmo2-VideoCountEval", "Molmo2-VideoTrackEval"]
    (count,), (track,) = (
        evaluation_examples(f"allenai/{name}", [EVALUATED[f"allenai/{name}"][0]], everywhere)[0] for name in names
    )
    assert count.messages[0]["content"][0]["clip"] == (1.0, 9.0)
    assert (count.groups, count.max_new_tokens) == ({"category": "object", "count": "0-4"}, 2048)
    ((image,), _) = evaluation_examples("allenai/pixmo-count", [EVALUATED["allenai/pixmo-count"][0]], everywhere)
    assert (image.groups, image.max_new_tokens) == ({"count": "2"}, 192)  # also per true count, as published
    assert (track.groups, sorted(track.truth["points"])) == ({"group": "animal"}, [0, 2])


@pytest.mark.parametrize("fps", [4, 25, 29.97, 7.5, 1])
def test_tracks_at_rates_that_do_not_divide(fps):
    """The right positions at 0.0, 0.5, 1.0, ... seconds have full marks."""
    row = {
        **EVALUATED["allenai/Molmo2-VideoTrackEval"][0],
        "fps": fps,
        "points": [{"object_id": "m", "points": [[10.0, 5.0]] * 90}],
        "masks": [{"object_id": "m", "masks": [RLE] * 90}],
    }
    ((example,), _) = evaluation_examples("allenai/Molmo2-VideoTrackEval", [row], everywhere)
    times = [place / 2 for place in range(180) if round(place / 2 * fps) < 90]
    coordinates = "\t".join(f"{time:.1f} 0 500 500" for time in times)
    scores = METRICS[example.metric](f'<tracks coords="{coordinates}">dogs</tracks>', **example.truth)
    assert min(scores.values()) == pytest.approx(1)


def test_masks_are_images():
    row, answer = EVALUATED["PointArena/pointarena-data"]
    grey_and_alpha = np.stack([MASK.astype(np.uint8), np.full_like(MASK, 255, dtype=np.uint8)], axis=-1)
    for mask in (grey_and_alpha, grey_and_alpha[..., [0, 0, 0, 1]], MASK[..., None]):
        ((example,), _) = evaluation_examples("PointArena/pointarena-data", [{**row, "mask": mask}], everywhere)
        assert np.array_equal(example.truth["mask"], MASK)
    with pytest.raises(ValueError, match=r"mask 'm\.png' is a str; expected an image"):
        evaluation_examples("PointArena/pointarena-data", [{**row, "mask": "m.png"}], lambda reference: reference.name)


def test_missing_media_of_evaluation_sets():
    row, _ = EVALUATED["allenai/pixmo-count"]
    found, report = evaluation_examples("allenai/pixmo-count", [row], lambda reference: None)
    assert (found, report.missing, report.left_out.total()) == ([], ["http://a"], 1)


@pytest.mark.parametrize(
    ("name", "changes", "missing"),
    [
        ("allenai/Molmo2-VideoCountEval", {"video_id": None}, "row 1 (video: None)"),
        ("allenai/Molmo2-VideoTrackEval", {"clip": None, "video": None}, "row 1 (video: None)"),
        ("allenai/pixmo-count", {"image_url": None}, "row 1 (image: None)"),
        ("allenai/pixmo-points-eval", {"image": None, "image_url": None}, "row 1 (image: None)"),
        ("PointArena/pointarena-data", {"image": None}, "row 1 (image: None)"),
        ("PointArena/pointarena-data", {"mask": None}, "row 1 (mask: None)"),
    ],
)
def test_media_without_a_name_in_evaluation_sets(name, changes, missing):
    row, _ = EVALUATED[name]
    found, report = evaluation_examples(name, [row, {**row, **changes}], everywhere)
    assert ([each.row for each in found], report.left_out, report.missing) == ([0], {MISSING: 1}, [missing])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Molmo2-VideoPointEval", {"two_fps_timestamps": [1.5, 2.0]}, "not as many times or masks as points"),
        ("Molmo2-VideoPointEval", {"masks": []}, "not as many times or masks as points"),
        ("Molmo2-VideoPointEval", {"points": {"x": [10.0], "y": []}}, "lists of x, y differ in length"),
        ("Molmo2-VideoPointEval", {"points": [{"y": 3.0}]}, "a point has no 'x'"),
        ("Molmo2-VideoPointEval", {"points": [{"x": 3.0}]}, "a point has no 'y'"),
        ("Molmo2-VideoPointEval", {"points": [{"x": 3.0, "y": None}]}, "y of a point is None; expected a number"),
        ("Molmo2-VideoPointEval", {"points": [3.0]}, "TypeError"),
        ("Molmo2-VideoPointEval", {"points": None, "masks": None, "two_fps_timestamps": None}, "is null; expected a"),
        ("Molmo2-VideoPointEval", {"two_fps_timestamps": [None]}, "a time is None; expected a number"),
        ("Molmo2-VideoPointEval", {"masks": [None]}, "the list of masks of an object is null"),
        ("Molmo2-VideoPointEval", {"masks": [[{"rle": RLE}]]}, "an entry of a list has no 'frame_id'"),
        ("Molmo2-VideoPointEval", {"masks": [[{"frame_id": None, "rle": RLE}]]}, "`frame_id` is None"),
        ("Molmo2-VideoPointEval", {"label": None}, "there is no label"),
        ("Molmo2-VideoPointEval", {"label": 5}, "Expected a text; found 5"),
        ("Molmo2-VideoPointEval", {"width": None}, "`width` is None; expected a number"),
        ("Molmo2-VideoPointEval", {"height": 0}, "`height` is 0; expected a number above 0"),
        ("Molmo2-VideoPointEval", {"video_duration": float("nan")}, "`video_duration` is nan; expected a number"),
        ("Molmo2-VideoCountEval", {"count": None}, "`count` is None; expected a number"),
        ("Molmo2-VideoCountEval", {"count": "4"}, "`count` is '4'; expected a number"),
        ("Molmo2-VideoCountEval", {"count": True}, "`count` is True; expected a number"),
        ("Molmo2-VideoCountEval", {"count": 2.5}, "`count` is 2.5; expected a whole number from 0 on"),
        ("Molmo2-VideoCountEval", {"count": -1}, "`count` is -1; expected a whole number from 0 on"),
        ("Molmo2-VideoCountEval", {"question": None, "label": None}, "there is no label"),
        ("Molmo2-VideoCountEval", {"question": " ", "label": " "}, "there is no label"),
        ("Molmo2-VideoCountEval", {"question": 5}, "Expected a text; found 5"),
        ("Molmo2-VideoCountEval", {"category": float("nan")}, "Expected a text; found nan"),
        ("Molmo2-VideoTrackEval", {"exp": None}, "there is no label"),
        ("Molmo2-VideoTrackEval", {"fps": 0}, "`fps` is 0; expected a number above 0"),
        ("Molmo2-VideoTrackEval", {"w": None}, "`w` is None; expected a number"),
        ("Molmo2-VideoTrackEval", {"masks": []}, r"points of the objects \['m'\], and masks of \[\]"),
        (
            "Molmo2-VideoTrackEval",
            {"masks": [{"object_id": "n", "masks": [RLE] * 3}]},
            r"points of the objects \['m'\], and masks of \['n'\]",
        ),
        (
            "Molmo2-VideoTrackEval",
            {"masks": [{"object_id": "m", "masks": [RLE] * 3}] * 2},
            "an object has several entries in `masks`",
        ),
        ("Molmo2-VideoTrackEval", {"points": None, "masks": None}, "`points` is null"),
        ("Molmo2-VideoTrackEval", {"points": [{"object_id": "m", "points": None}]}, "`points` of an object is null"),
        ("Molmo2-VideoTrackEval", {"points": [{"points": []}]}, "an entry of a list has no 'object_id'"),
        ("Molmo2-VideoTrackEval", {"points": [{"object_id": "m", "points": [[1.0, None]]}]}, "y of a point is None"),
        ("Molmo2-VideoTrackEval", {"points": [{"object_id": "m", "points": [[1.0]]}]}, "IndexError"),
        ("pixmo-count", {"label": None, "count": 2}, "there is no label"),
        ("pixmo-count", {"label": "cups", "count": None}, "`count` is None; expected a number"),
        ("pixmo-points-eval", {"label": None}, "there is no label"),
        ("pixmo-points-eval", {"label": "<points>"}, "the label contains a tag"),
        ("pixmo-points-eval", {"points": [{"y": 3.0}]}, "a point has no 'x'"),
        ("pixmo-points-eval", {"points": [{"x": 3.0, "y": "3"}]}, "y of a point is '3'; expected a number"),
        ("pixmo-points-eval", {"points": None, "masks": []}, "`points` is null"),
        ("pixmo-points-eval", {"masks": [[[True], [True, False]]]}, "ValueError"),
        ("pixmo-points-eval", {"masks": [[True, False]]}, r"shapes \[\(2,\)\]; expected one \(H, W\) for all"),
        ("pixmo-points-eval", {"masks": [None]}, "TypeError"),
        (
            "pixmo-points-eval",
            {"masks": [MASK, MASK[1:]], "points": [{"x": 50.0, "y": 50.0}] * 2},
            r"shapes \[\(10, 20\), \(9, 20\)\]; expected one",
        ),
        ("pixmo-points-eval", {"points": {"x": [50.0, 1.0], "y": [50.0]}}, "lists of x, y differ in length"),
        ("pixmo-points-eval", {"masks": []}, "not as many masks as points"),
        ("pixmo-points-eval", {"masks": None}, "`masks` is null; expected a list"),
    ],
)
def test_rows_that_cannot_be_judged_are_named(name, changes, message):
    """Before anything is asked: a score without them would be one of other questions."""
    row, _ = EVALUATED[f"allenai/{name}"]
    with pytest.raises(ValueError, match=f"Row 1 of allenai/{name} has another form: .*{message}.*Mend it, or leave"):
        evaluation_examples(f"allenai/{name}", [row, {**row, **changes}], everywhere)


@pytest.mark.parametrize("column", ["user_input", "category"])
def test_pointbench_asks_no_null(column):
    row, _ = EVALUATED["PointArena/pointarena-data"]
    with pytest.raises(ValueError, match=r"Row 1 of .* has another form: there is no `user_input`, or no `category`"):
        evaluation_examples("PointArena/pointarena-data", [row, {**row, column: None}], everywhere)


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_sets_of_arrays(name):
    """As from pandas: lists are arrays of objects, numbers those of numpy."""
    row, answer = EVALUATED[name]
    row = {**row, "count": np.float64(row["count"])} if "count" in row else row
    found, report = evaluation_examples(name, [row, as_arrays(row)], everywhere)
    (first, second) = found
    assert (first.messages, first.groups, report.examples) == (second.messages, second.groups, 2)
    assert min(METRICS[second.metric](answer, **second.truth).values()) == pytest.approx(1)
    assert second.groups.get("count") in (None, "2", "0-4")


def test_it_needs_neither_torch_nor_transformers():
    script = "import sys, molmo2.data; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
