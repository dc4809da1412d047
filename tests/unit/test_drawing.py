"""Marks on images and in videos: the right pixels, and no others."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from molmo2.grounding.parse import parse_grounding
from molmo2.tools.draw import (
    PALETTE,
    DrawingStyle,
    Mark,
    _overlaps,
    _shortened,
    contact_sheet,
    draw,
    draw_images,
    draw_marks,
    draw_points,
    marks_of,
    to_rgb,
)

GREY = (90, 90, 90)
BARE = DrawingStyle(show_ids=False, show_labels=False)


def answer(*points: tuple[int, int, int], label: str = "cup", key: str = "1"):
    """(id, x, y) in thousandths, in one image."""
    coords = " ".join(f"{number} {x:03d} {y:03d}" for number, x, y in points)
    return parse_grounding(f'<points coords="{key} {coords}">{label}</points>')


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """(N, 2) x, y of the pixels that differ."""
    difference = np.any(np.asarray(before) != np.asarray(after), axis=2)
    return np.argwhere(difference)[:, ::-1]


@pytest.mark.parametrize("size", [(640, 480), (101, 67), (16, 16), (2000, 300), (5, 3), (1, 1)])
def test_a_disc_is_where_the_point_is_and_nothing_else_changes(size):
    ground = Image.new("RGB", size, GREY)
    drawn = draw_points(ground, answer((1, 250, 600)), BARE)
    x, y = int(0.25 * size[0]), int(0.6 * size[1])
    assert drawn.size == size
    assert drawn.getpixel((x, y)) == BARE.color("cup", 1)
    radius = max(2.0, min(size) * 0.012)
    assert np.linalg.norm(changed(ground, drawn) - [x, y], axis=1).max() <= radius * 1.6 + 2.5
    assert ground.getpixel((x, y)) == GREY  # the image itself stays as it is


@pytest.mark.parametrize(("x", "y", "pixel"), [(0, 0, (0, 0)), (1000, 1000, (99, 49)), (1000, 0, (99, 0))])
def test_points_on_the_border_are_on_the_image(x, y, pixel):
    drawn = draw_points(Image.new("RGB", (100, 50), GREY), answer((1, x, y)), BARE)
    assert drawn.getpixel(pixel) == BARE.color("cup", 1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_any_mode(mode):
    drawn = draw_points(Image.new(mode, (60, 40)), answer((1, 500, 500)), BARE)
    assert (drawn.mode, drawn.getpixel((30, 20))) == ("RGB", BARE.color("cup", 1))


def test_arrays_paths_and_turned_files(tmp_path):
    array = np.full((40, 60, 3), 90, np.uint8)
    drawn = draw_points(array, answer((1, 500, 500)), BARE)
    assert drawn.getpixel((30, 20)) == BARE.color("cup", 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert draw_points(tmp_path / "turned.jpg", answer((1, 500, 500))).size == (40, 60)
    Image.new("RGB", (60, 40)).save(tmp_path / "damaged.png", exif=b"Exif\0\0junkjunk")
    with pytest.warns(UserWarning, match="it is taken as upright"):
        assert to_rgb(tmp_path / "damaged.png").size == (60, 40)
    with pytest.raises(TypeError, match="float is not an image"):
        to_rgb(1.5)


def test_an_object_keeps_its_colour():
    """In another image, beside others, and in a resized one."""
    style = DrawingStyle(show_ids=False, show_labels=False)
    ground = Image.new("RGB", (300, 300), GREY)
    alone = draw_points(ground, answer((2, 500, 500)), style).getpixel((150, 150))
    beside = draw_points(ground, answer((1, 100, 100), (2, 500, 500)), style).getpixel((150, 150))
    small = draw_points(ground.resize((60, 60)), answer((2, 500, 500)), style).getpixel((30, 30))
    assert alone == beside == small == style.color("cup", 2)
    colors = [style.color("cup", number) for number in range(1, 22)]
    assert len(set(colors)) == 21  # three rounds through the palette
    assert len({style.color(label, 1) for label in ("cup", "boat", "dog", "kite", "tree")}) > 1
    assert style.color("cup", 0) in PALETTE


def test_ids_and_labels_are_written_inside_the_image():
    ground = Image.new("RGB", (400, 300), GREY)
    corners = answer((1, 0, 0), (2, 1000, 0), (3, 0, 1000), (4, 1000, 1000), label="a corner with a long name")
    for style in (DrawingStyle(), DrawingStyle(text_size=30)):
        marks = changed(draw_points(ground, corners, BARE), draw_points(ground, corners, style))
        assert len(marks) > 200
        for corner in ((0, 0), (399, 0), (0, 299), (399, 299)):
            assert np.linalg.norm(marks - corner, axis=1).min() < 60


def test_captions_do_not_cover_discs_or_each_other():
    ground = Image.new("RGB", (600, 400), GREY)
    near = answer((1, 500, 500), (2, 530, 500), (3, 470, 500), (4, 500, 540))
    drawn = draw_points(ground, near)
    for number, x, y in ((1, 300, 200), (2, 318, 200), (3, 282, 200), (4, 300, 216)):
        assert drawn.getpixel((x, y)) == DrawingStyle().color("cup", number)


def test_no_id_where_there_is_one_object_unless_asked_for():
    ground = Image.new("RGB", (300, 200), GREY)
    one = answer((1, 500, 500), label="")
    assert np.array_equal(draw_points(ground, one), draw_points(ground, one, BARE))
    assert len(changed(draw_points(ground, one), draw_points(ground, one, DrawingStyle(show_ids=True))))


def test_captions_larger_than_the_image_are_left_out():
    tiny = Image.new("RGB", (9, 7), GREY)
    one = answer((1, 500, 500), label="something with a name")
    assert np.array_equal(draw_points(tiny, one), draw_points(tiny, one, BARE))


class CountingFont:
    """Letters of 5 pixels; notes how many were measured."""

    def __init__(self):
        self.measured = 0

    def getlength(self, text):
        self.measured += len(text)
        return 5.0 * len(text)


@pytest.mark.parametrize(("length", "shown"), [(0, ""), (23, "x" * 23), (24, "x" * 24), (25, "x" * 23 + "\u2026")])
def test_captions_are_cut_to_what_fits(length, shown):
    assert _shortened("x" * length, CountingFont(), 200) == shown


def test_cutting_a_caption_measures_little_of_it():
    font = CountingFont()
    assert _shortened("x" * 100_000, font, 200) == "x" * 23 + "\u2026"
    assert font.measured < 1000
    assert _shortened("x", font, 5) == ""


def test_half_a_character_is_drawn_as_a_replacement():
    ground = Image.new("RGB", (300, 200), GREY)
    one = answer((1, 500, 500), label="cu\ud83d p")
    drawn = draw_points(ground, one)
    (mark,) = marks_of(one.points, DrawingStyle(show_ids=False))
    assert np.array_equal(drawn, draw_marks(ground, [replace(mark, caption="cu\ufffd p")]))


def test_captions_of_many_points_go_where_least_is_covered():
    """The box with the least common area, the first of several."""
    boxes = np.array([(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)])
    taken = np.array([(5, 5, 25, 20), (0, 0, 2, 2)])
    assert _overlaps(boxes, taken).tolist() == [[25, 4], [25, 0], [0, 0]]
    assert _overlaps(boxes, taken[:0]).sum(axis=1).tolist() == [0, 0, 0]


def test_trails_lead_to_the_disc_and_fade():
    ground = Image.new("RGB", (300, 300), (0, 0, 0))
    trail = ((0.1, 0.5), (0.3, 0.5), (0.5, 0.5))
    drawn = draw_marks(ground, [Mark(0.7, 0.5, (255, 255, 255), trail=trail)])
    brightness = [drawn.getpixel((x, 150))[0] for x in (50, 120, 180)]
    assert 0 < brightness[0] < brightness[1] < brightness[2]
    assert drawn.getpixel((150, 170)) == (0, 0, 0)


def test_each_image_gets_its_own_points():
    grounds = [Image.new("RGB", (100, 100), GREY) for _ in range(3)]
    text = '<points coords="1 1 200 200\t3 2 800 800">cup</points>'
    first, second, third = draw_images(grounds, parse_grounding(text, [(100, 100)] * 3), BARE)
    assert first.getpixel((20, 20)) == BARE.color("cup", 1)
    assert np.array_equal(second, grounds[1])
    assert third.getpixel((80, 80)) == BARE.color("cup", 2)


def test_contact_sheet():
    frames = [np.full((90, 160, 3), 30 * number, np.uint8) for number in range(5)]
    about = {"fps": 2.0, "frames_indices": list(range(5)), "width": 160, "height": 90}
    text = '<tracks coords="0.5 1 500 500\t2.0 1 250 500">ball</tracks>'
    grounding = parse_grounding(text, about)
    sheet = contact_sheet(frames, grounding, BARE, columns=3, cell_width=160)
    assert sheet.size == (480, 2 * (90 + 14))
    color = BARE.color("ball", 1)
    assert sheet.getpixel((160 + 80, 45)) == color  # frame 1, at 0.5 s
    assert sheet.getpixel((160 + 40, 104 + 45)) == color  # frame 4, at 2.0 s
    assert sum(pixel == color for pixel in sheet.get_flattened_data()) < 80
    assert contact_sheet(frames, parse_grounding(text), cell_width=32).height > 0  # without times
    with pytest.raises(ValueError, match="5 frames, but 2 times"):
        contact_sheet(frames, grounding, times=[0, 1])
    with pytest.raises(ValueError, match="no frames to draw"):
        contact_sheet([], grounding)


@pytest.mark.parametrize(("columns", "width"), [(None, 3), (2, 2), (5, 3)])
def test_no_more_columns_than_frames(columns, width):
    frames = [Image.new("RGB", (16, 200)) for _ in range(3)]
    assert contact_sheet(frames, parse_grounding(""), columns=columns, cell_width=16).width == 16 * width


def test_impossible_styles_are_refused():
    with pytest.raises(ValueError, match="radius is -1"):
        DrawingStyle(radius=-1)
    with pytest.raises(ValueError, match="palette is empty"):
        DrawingStyle(palette=())


def test_one_image_or_a_list_with_options_of_the_style():
    ground, style = Image.new("RGB", (100, 50), GREY), {"radius": 3, "show_ids": False, "show_labels": False}
    drawn = draw(ground, answer((1, 250, 600)), **style)
    assert changed(drawn, draw_points(ground, answer((1, 250, 600)), DrawingStyle(**style))).size == 0
    first, second = draw([ground, ground], answer((1, 250, 600), key="2"), BARE)
    assert changed(ground, first).size == 0
    assert second.getpixel((25, 30)) == BARE.color("cup", 1)
    wide = draw(ground, answer((1, 250, 600)), BARE, radius=9)  # options count beside a style, too
    assert changed(wide, draw_points(ground, answer((1, 250, 600)), replace(BARE, radius=9))).size == 0
    assert changed(wide, drawn).size > 0


def test_drawing_needs_no_torch():
    """Annotations can be drawn where no model is, in a viewer for example."""
    program = "import sys, molmo2.tools.draw, molmo2.tools.draw_video; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("grounding", "message"),
    [
        ("boats.jpg", "after the image or video; found 'str'"),
        (SimpleNamespace(grounding=None), "Pass its `grounding`"),
    ],
)
def test_what_is_no_grounding_is_refused(grounding, message):
    with pytest.raises(TypeError, match=message):
        draw(Image.new("RGB", (8, 8)), grounding)
