"""Points and tracks written in the training notation, and read back."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from molmo2.grounding.format import format_points, format_tracks
from molmo2.grounding.parse import parse_grounding
from support.grounding_answers import answers

SHARES = st.integers(0, 1000).map(lambda value: value / 1000)
PLACES = st.tuples(SHARES, SHARES)
TENTHS = st.integers(0, 36000).map(lambda tenths: tenths / 10)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"points": [(0.512, 0.34)], "label": "red kite"}, '<points coords="1 1 512 340">red kite</points>'),
        ({"points": [(0, 1), (1, 0.0049)]}, '<points coords="1 1 000 1000 2 1000 005"></points>'),
        (
            {"points": {3: [(0.1, 0.125), (0.5, 0.999)], 1: [(0.25, 0.4)]}, "label": "boats"},
            '<points coords="1 1 250 400\t3 2 100 125 3 500 999">boats</points>',
        ),
        (
            {"points": {0.52: [(0.5, 0.5), (0.61, 0.48)], 12.0: [(0.088, 0.94)]}, "label": "penguins", "alt": "birds"},
            '<points alt="birds" coords="0.5 1 500 500 2 610 480\t12.0 3 088 940">penguins</points>',
        ),
        (
            {"points": [(46, 560), (310, 524)], "label": "mugs", "sizes": (1000, 800), "count": "after"},
            'Counting the <points coords="1 1 046 700 2 310 655">mugs</points> shows a total of 2.',
        ),
        (
            {
                "points": {2: [(30, 75)]},
                "label": "corner",
                "sizes": [(10, 10), (300, 100)],
                "count": "before",
                "total": 5,
            },
            'There are 5 <points coords="2 1 100 750">corner</points>.',
        ),
        ({"points": [], "label": "x"}, "There are none."),
        ({"points": {1: []}, "label": "x", "count": "after"}, "There are none."),
        ({"points": [(0.5, 0.5)], "alt": 'say "a"'}, '<points alt=\'say "a"\' coords="1 1 500 500"></points>'),
    ],
)
def test_points(arguments, expected):
    assert format_points(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"tracks": {1: {0.0: (0.2, 0.1), 0.5: (0.21, 0.11)}, 2: {0.0: (0.5, 0.2)}}, "label": "player"},
            '<tracks coords="0.0 1 200 100 2 500 200\t0.5 1 210 110">player</tracks>',
        ),
        ({"tracks": {7: {10: (32, 9), 9.96: (64, 36)}}, "size": (64, 36)}, None),
        (
            {"tracks": {7: {10: (32, 9), 2: (64, 36)}}, "size": (64, 36)},
            '<tracks coords="2.0 7 1000 1000\t10.0 7 500 250"></tracks>',
        ),
        ({"tracks": {}}, "No tracks available."),
        ({"tracks": {1: {}}}, "No tracks available."),
    ],
)
def test_tracks(arguments, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"Object 7 has two positions at 10\.0 s"):
            format_tracks(**arguments)
    else:
        assert format_tracks(**arguments) == expected


@given(answers())
@settings(max_examples=100)
def test_what_was_read_is_written_as_it_was(answer):
    tag = re.search(r"<(?:points|tracks) .*</(?:points|tracks)>", answer.text, re.S)[0]
    tag = re.sub('coords="[^"]*"', lambda found: re.sub("[;:,]", "\t", found[0]), tag)
    found = parse_grounding(tag)
    write = format_tracks if answer.mode == "tracking" else format_points
    assert write(found) == tag
    assert parse_grounding(write(found)) == found


@given(
    st.dictionaries(st.integers(1, 99), st.lists(PLACES, max_size=4), min_size=1, max_size=5)
    | st.dictionaries(TENTHS, st.lists(PLACES, max_size=4), min_size=1, max_size=5),
    st.sampled_from([None, "after", "before"]),
)
@settings(max_examples=100)
def test_positions_are_read_back(by_key, count):
    found = parse_grounding(format_points(by_key, "cup", count=count))
    expected = [(key, *at) for key in sorted(by_key) for at in by_key[key]]
    assert [(point.key, point.x_norm, point.y_norm) for point in found] == expected
    assert [point.id for point in found] == list(range(1, len(expected) + 1))
    assert found.says_none == (not expected)
    assert found.count == (0 if not expected else None if count is None else len(expected))


@given(st.dictionaries(st.integers(0, 999), st.dictionaries(TENTHS, PLACES, min_size=1, max_size=5), max_size=4))
@settings(max_examples=100)
def test_objects_are_read_back(objects):
    found = parse_grounding(format_tracks(objects, "cup"), kind="video")
    read = {track.id: {point.key: (point.x_norm, point.y_norm) for point in track.points} for track in found.tracks}
    assert read == objects
    assert found.says_none == (not objects)


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 9) | st.integers(95, 130), st.integers(0, 10), st.just(500)), min_size=1),
)
@settings(max_examples=300)
def test_points_of_a_selection_are_read_back(key, triples):
    groups = "\t".join(f"{key} {number} {x:03d} {y}" for number, x, y in triples)
    selected = parse_grounding(f'<points coords="{groups}">cup</points>')
    found = parse_grounding(format_points(selected))
    read = [(point.key, point.id, point.x_norm, point.y_norm) for point in found]
    assert read == [(key, number, x / 1000, y / 1000) for number, x, y in triples]


def test_an_id_like_the_number_of_an_image_begins_a_group():
    selected = parse_grounding('<points coords="1 1 100 100\t1 7 002 500\t1 123 300 300">cup</points>')
    text = '<points coords="1 1 100 100\t1 7 002 500 123 300 300">cup</points>'
    assert format_points(selected) == text
    assert format_points(selected.points[:2]) == '<points coords="1 1 100 100 7 002 500">cup</points>'


TEXTS = st.text(st.sampled_from("ab <>\"'&;=/\\\t\n") | st.characters(), max_size=12)
TRICKY = st.sampled_from(
    ["<points ", "</points>", "</point >", "<tracks>", "&quot;", " coords=", "coords =", "<", '"', "'"]
)


MIXED = st.lists(TEXTS | TRICKY, max_size=3).map("".join)


def is_refused(**texts):
    try:
        format_points([(0, 0)], **texts)
    except ValueError as error:
        return "would not be read back" in str(error)
    return False


@given(MIXED, st.none() | MIXED)
@settings(max_examples=100)
def test_texts_are_read_back_or_refused(label, alt):
    assume(not is_refused(label=label) and not is_refused(alt=alt))
    text = format_points([(0.5, 0.5), (0.25, 1)], label, alt=alt)
    found = parse_grounding(text)
    assert [(tag.label, tag.alt, tag.truncated) for tag in found.tags] == [(label, alt, False)]
    assert [(point.x_norm, point.y_norm) for point in found] == [(0.5, 0.5), (0.25, 1)]


@pytest.mark.parametrize(
    "label", ["a < b", 'a "b"', "Tom & Jerry", "R&amp;B", "<b>bold</b>", "it's", "x > 5", "<point"[:5]]
)
def test_marks_in_labels(label):
    (tag,) = parse_grounding(format_points([(0.5, 0.5)], label)).tags
    assert tag.label == label


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: format_points([(1.2, 0.5)]), r"x of point 1 of 1 is 1\.2, outside of 0\.\.1\. Pixels need `sizes`"),
        (lambda: format_points([(0.2, float("nan"))]), "y of point 1 of 1 is nan"),
        (lambda: format_points([(5, 300)], sizes=(100, 200)), r"300, outside of 0\.\.200\. The size is"),
        (lambda: format_points({0: [(0, 0)]}), "no image number 0"),
        (lambda: format_points({-1.0: [(0, 0)]}), "is no time"),
        (lambda: format_points({2: [(0, 0)]}, sizes=[(5, 5)]), r"1 size\(s\), but points in image 2"),
        (lambda: format_points([(0, 0)], "a</points>"), "would not be read back"),
        (lambda: format_points([(0, 0)], " a"), "would not be read back"),
        (lambda: format_points([(0, 0)], alt="\"'"), "both kinds of quotes"),
        (lambda: format_points([(0, 0)], count="first"), "expected one of"),
        (lambda: format_tracks({-1: {0.0: (0, 0)}}), "-1 is no id"),
        (
            lambda: format_points(
                parse_grounding('<points coords="1 1 001 001">a</points><points coords="1 2 001 001">b</points>')
            ),
            r"several labels, \['a', 'b'\]",
        ),
    ],
)
def test_what_cannot_be_written(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_key_of_another_type():
    with pytest.raises(TypeError, match="is no key"):
        format_points({"1": [(0, 0)]})
