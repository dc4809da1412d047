"""Reading points, tracks and counts: the public cases, one row for each rule and reading, and streams."""

import json

import pytest

from support.generated import generated
from support.paths import DATA

grounding_file = generated("grounding_molmo2")
GroundingStream, parse_grounding = grounding_file.GroundingStream, grounding_file.parse_grounding
CASES = json.loads((DATA / "grounding_cases.json").read_text(encoding="utf-8"))["cases"]


def flat(grounding):
    return [{name: getattr(point, name) for name in ("tag", "label", "key", "id", "x", "y")} for point in grounding]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
@pytest.mark.parametrize("says_kind", [True, False])
def test_public_case(case, says_kind):
    found = parse_grounding(case["text"], case["sizes"], kind=case["kind"] if says_kind else None)
    expected = case["expect"]
    assert flat(found) == expected["points"]
    assert found.kind == case["kind"]
    said = (found.count, found.says_none, found.truncated)
    assert said == tuple(expected[name] for name in ("count", "none", "truncated"))
    assert [tag.label for tag in found.tags] == expected["labels"]
    assert [tag.alt for tag in found.tags] == expected["alts"]
    if "tracks" in expected:
        frames = [
            {**frame, "points": {str(number): list(at) for number, at in frame["points"].items()}}
            for frame in found.frames(case["fps"])
        ]
        assert frames == expected["tracks"]


def test_the_cases_are_those_of_the_specification(shared):
    published = json.loads((shared / "grounding_cases.json").read_text(encoding="utf-8"))
    assert published["cases"] == CASES


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_stream_ends_with_the_same(case):
    text, expected = case["text"], parse_grounding(case["text"], case["sizes"])
    for place in range(len(text) + 1):
        stream = GroundingStream(case["sizes"])
        points = stream.feed(text[:place]) + stream.feed(text[place:])
        assert [(p.key, p.id, p.x, p.y) for p in points] == [(p.key, p.id, p.x, p.y) for p in expected][: len(points)]
        assert stream.close() == expected


# --- one row per reading ---------------------------------------------------------------------------------------------

MUG = '<points coords="1 1 500 250">mug</points>'
ONE = [(1, 1, 500, 250)]

# text -> points as (key, id, x, y) on the grid of 1000; read without sizes unless the row says otherwise.
POINTS = {
    # R1: tags
    "singular": ('<point coords="1 1 500 250">mug</point>', ONE),
    "singular track": ('<track coords="0.5 3 500 250">mug</track>', [(0.5, 3, 500, 250)]),
    "capitals": ('<POINTS Coords="1 1 500 250">mug</Points>', ONE),
    "alt behind": ('<points coords="1 1 500 250" alt="a mug">mug</points>', ONE),
    "self-closing": ('<points label="mug" coords="1 1 500 250"/>', ONE),
    "self-closing with a blank": ('<points coords="1 1 500 250" label="mug" />', ONE),
    "closed as another": ('<points coords="1 1 500 250">mug</point>', ONE),
    "blanks around =": ('<points coords = "1 1 500 250">mug</points>', ONE),
    "line break in the tag": ('<points\n  coords="1 1 500 250"\n>mug</points>', ONE),
    "two tags": (MUG + " and " + MUG.replace("1 1", "1 2"), [*ONE, (1, 2, 500, 250)]),
    "no coords": ("<points>1 1 500 250</points>", []),
    "no coords, alt": ('<points alt="1 1 500 250">mug</points>', []),
    "another tag": ('<box coords="1 1 500 250">mug</box>', []),
    "a longer word": ('<pointsman coords="1 1 500 250">mug</pointsman>', []),
    "another attribute": ('<points data-coords="1 1 500 250">mug</points>', []),
    "coords twice": ('<points coords="1 1 500 250" coords="1 2 100 100">mug</points>', ONE),
    "blank before coords lost": ('<pointscoords="1 1 500 250">mug</points>', ONE),
    # R2: separators
    **{
        f"separator {name}": (f'<points coords="1 1 500 250{mark}2 2 100 200">mug</points>', [*ONE, (2, 2, 100, 200)])
        for name, mark in {
            "tab": "\t",
            "semicolon": ";",
            "colon": ":",
            "comma": ",",
            "line": "\n",
            "windows line": "\r\n",
            "backslash t": "\\t",
            "two backslashes t": "\\\\t",
            "backslash n": "\\n",
            "two tabs": "\t\t",
            "spaced": " ; ",
            "mixed": ",\t ",
        }.items()
    },
    "extra blanks": ('<points coords="  1  1   500 250  ">mug</points>', ONE),
    "separator at the ends": ('<points coords=";1 1 500 250;">mug</points>', ONE),
    "comma between x and y": ('<points coords="1 1 500, 250">mug</points>', []),
    # R3: keys
    "key 1.0": ('<points coords="1.0 1 500 250">mug</points>', [(1.0, 1, 500, 250)]),
    "key 0": ('<points coords="0 1 500 250">mug</points>', []),
    "no point": ('<points coords="1">mug</points>', []),
    "nothing": ('<points coords="">mug</points>', []),
    # R4: values
    "1001": ('<points coords="1 1 1001 250 2 500 1001 3 000 1000">mug</points>', [(1, 3, 0, 1000)]),
    "unpadded": ('<points coords="1 1 5 25 2 7 100">mug</points>', [(1, 1, 5, 25), (1, 2, 7, 100)]),
    "negative": ('<points coords="1 1 -5 250 2 500 250">mug</points>', [(1, 2, 500, 250)]),
    "a letter in a number": ('<points coords="1 1 5x0 250 2 500 250">mug</points>', [(1, 2, 500, 250)]),
    "incomplete triple": ('<points coords="1 1 500 250 2 500">mug</points>', ONE),
    "thousands of digits": (f'<points coords="1 1 {"9" * 5000} 250 2 500 250">mug</points>', [(1, 2, 500, 250)]),
    "other digits": ('<points coords="1 1 \u0665\u0660\u0660 250">mug</points>', []),
    # R6: TABs that became spaces
    "times behind a space": (
        '<tracks coords="0.0 1 100 200 2 300 400 0.5 1 110 210 1.0 2 310 410">mug</tracks>',
        [(0.0, 1, 100, 200), (0.0, 2, 300, 400), (0.5, 1, 110, 210), (1.0, 2, 310, 410)],
    ),
    "time within a triple": ('<tracks coords="0.0 1 100 0.5 1 110 210">mug</tracks>', [(0.5, 1, 110, 210)]),
    "damaged time": ('<tracks coords="0.0 1 100 200\t0..5 1 110 210">mug</tracks>', [(0.0, 1, 100, 200)]),
    "images behind a space": (
        '<points coords="1 1 250 400 3 2 100 125 3 500 999">boats</points>',
        [(1, 1, 250, 400), (3, 2, 100, 125), (3, 3, 500, 999)],
    ),
    # R9: cut off
    "cut in y": ('<points coords="1 1 500 250 2 100 20', ONE),
    "cut behind y": ('<points coords="1 1 500 250 2 100 200', [*ONE, (1, 2, 100, 200)]),
    "cut behind a short y": ('<points coords="1 1 500 250 2 100 20 ', ONE),
    "short y inside": ('<points coords="1 1 500 25 2 100 200', [(1, 1, 500, 25), (1, 2, 100, 200)]),
    "cut behind the quote": ('<points coords="1 1 500 25"', []),
    "cut in the label": ('<points coords="1 1 500 25">mu', [(1, 1, 500, 25)]),
    "quote lost": ('<points coords="1 1 500 250>mug</points> and 1 2 300 300', ONE),
    "tag lost its end": ('<points coords="1 1 500 250"', ONE),
    "another begins in coords": (
        '<points coords="1 1 500 250 <points coords="1 2 100 200">x</points>',
        [*ONE, (1, 2, 100, 200)],
    ),
    "quote of alt lost": ('<points alt="a mug coords="1 1 500 250">mug</points>', ONE),
    "first quote lost": ('<points coords=1 1 500 250">mug</points>', ONE),
    "both quotes lost": ("<points coords=1 1 500 250>mug</points>", ONE),
    # R11: quotes, and numbers elsewhere
    "&quot;": ("<points alt=&quot;a mug&quot; coords=&quot;1 1 500 250&quot;>mug</points>", ONE),
    "single quotes": ("<points alt='a mug' coords='1 1 500 250'>mug</points>", ONE),
    "mixed quotes": ('<points alt="a mug&quot; coords=&quot;1 1 500 250">mug</points>', ONE),
    "escaped quotes": ('<points alt=\\"a mug\\" coords=\\"1 1 500 250\\">mug</points>', ONE),
    "numbers in prose": ('At 1 1 500 250. coords="1 1 500 250"', []),
    "numbers in the label": ('<points coords="1 1 500 250">1 2 100 200</points>', ONE),
    "numbers in alt": ('<points alt="1 2 100 200 > 5" coords="1 1 500 250">mug</points>', ONE),
    "a tag in alt": ('<points alt=\'<points coords="1 9 9 9">\' coords="1 1 500 250">mug</points>', ONE),
    "a tag in the label": (f'<points coords="1 2 100 200">x {MUG} y</points>', [(1, 2, 100, 200), *ONE]),
    "markup in the label": ('<points coords="1 1 500 250">a <b>mug</b> < 5</points>', ONE),
    # older notation
    "legacy": ('<point x="10.5" y="20.1" alt="a">mug</point>', [(1, 1, 105, 201)]),
    "legacy several": (
        '<points x1="10.5" y1="20.1" x2="100" y2="0">mug</points>',
        [(1, 1, 105, 201), (1, 2, 1000, 0)],
    ),
    "legacy without quotes": ("Here: <point x=10.5 y=20.1>mug</point>", [(1, 1, 105, 201)]),
    "legacy tags": ('<point x="1" y="2">a</point> <point y="4" x="3">b</point>', [(1, 1, 10, 20), (1, 2, 30, 40)]),
    "legacy gap": ('<points x1="1" y1="2" x2="3" x3="5" y3="6">a</points>', [(1, 1, 10, 20), (1, 2, 50, 60)]),
    "legacy outside": ('<points x1="100.1" y1="2" x2="3" y2="4">a</points>', [(1, 1, 30, 40)]),
    "legacy cut": ('<point x="10.5" y="20.', []),
    "legacy self-closing": ("<point x='10.5' y='20.1'/>", [(1, 1, 105, 201)]),
    "legacy and coords": ('<points coords="1 1 500 250" x="1" y="2">mug</points>', ONE),
}


@pytest.mark.parametrize("name", POINTS)
def test_points(name):
    text, expected = POINTS[name]
    found = parse_grounding(text)
    assert [(point.key, point.id) for point in found] == [row[:2] for row in expected]
    placed = [(point.x_norm * 1000, point.y_norm * 1000) for point in found]
    assert placed == [pytest.approx(row[2:]) for row in expected]


# text -> label, alt, truncated of each tag
TAGS = {
    "paired": (MUG, [("mug", None, False)]),
    "blanks around the label": ('<points coords="1 1 500 250"> mug </points>', [("mug", None, False)]),
    "attribute": ('<points label="mug" coords="1 1 500 250"/>', [("mug", None, False)]),
    "text before attribute": ('<points label="cup" coords="1 1 500 250">mug</points>', [("mug", None, False)]),
    "attribute where there is no text": ('<points label="cup" coords=""></points>', [("cup", None, False)]),
    "alt with > and numbers": ('<points alt="a > 3 1 2" coords="">mug</points>', [("mug", "a > 3 1 2", False)]),
    "alt with the other quote": ("<points alt='say \"mug\"' coords=''>mug</points>", [("mug", 'say "mug"', False)]),
    "alt with &quot;": (
        '<points alt="say &quot;mug&quot; now" coords="">mug</points>',
        [("mug", "say &quot;mug&quot; now", False)],
    ),
    "empty alt": ('<points alt="" coords="">mug</points>', [("mug", "", False)]),
    "cut in coords": ('<points alt="a" coords="1 1 50', [("", "a", True)]),
    "cut in the label": ('<points coords="1 1 500 250">red mu', [("red mu", None, True)]),
    "cut in the closing tag": ('<points coords="1 1 500 250">mug</poi', [("mug", None, True)]),
    "cut in alt": ('<points coords="1 1 500 250" alt="a m', [("", None, True)]),
    "cut before coords": ('<points alt="a m', []),
    "quote lost": ('<points coords="1 1 500 250>mug</points>', [("mug", None, True)]),
    "not closed": (f'<points coords="1 1 500 250">cup {MUG}', [("cup", None, True), ("mug", None, False)]),
    "> lost": ('<points coords="1 1 500 250"</points> more', [("", None, True)]),
    "quote of alt lost": ('<points alt="a mug coords="1 1 500 250">mug</points>', [("mug", "a mug", True)]),
    "markup": ('<points coords="">a <b>mug</b> < 5</points>', [("a <b>mug</b> < 5", None, False)]),
}


@pytest.mark.parametrize("name", TAGS)
def test_tags(name):
    text, expected = TAGS[name]
    found = parse_grounding(text)
    assert [(tag.label, tag.alt, tag.truncated) for tag in found.tags] == [
        (label, alt if alt is None else alt.strip(), truncated) for label, alt, truncated in expected
    ]
    assert [point.label for point in found] == [tag.label for tag in found.tags for _ in tag.points]
    assert [point for tag in found.tags for point in tag.points] == list(found.points)


# text -> count, none, truncated
COUNTS = {
    "prose": ("There is a cup on the table.", None, False, False),
    "bare": ("7", 7, False, False),
    "bare with blanks": (" \n12\n ", 12, False, False),
    "bare with a full stop": ("7.", 7, False, False),
    "zero": ("0", 0, False, False),
    "not whole": ("7.5", None, False, False),
    "two numbers": ("7 8", None, False, False),
    "a huge number": ("9" * 5000, None, False, False),
    "none": ("There are none.", 0, True, False),
    "no tracks": ("No tracks available.", 0, True, False),
    "none in more text": ("I looked everywhere. There are none. Sorry!", 0, True, False),
    "none of them": ("There are none of the cups on it.", None, False, False),
    "none, but points": (f"There are none. {MUG}", None, False, False),
    "none in a label": ('<points coords="">There are none.</points>', None, False, False),
    "point then count": (f"Counting the {MUG} shows a total of 3.", 3, False, False),
    "count then point": (f"There are 3 {MUG}.", 3, False, False),
    "there is": (f"There is 1 {MUG}.", 1, False, False),
    "not computed": (f"Counting the {MUG} shows a total of 12.", 12, False, False),
    "several tags": (f"Counting the {MUG} and {MUG} shows a total of 5.", 5, False, False),
    "several counts": (f"There are 2 {MUG}. Counting the {MUG} shows a total of 9.", 2, False, False),
    "without a tag": ("Counting the mugs shows a total of 4.", 4, False, False),
    "prose with a total": ("The receipt shows a total of 12.", None, False, False),
    "prose after counting": ("Counting the mugs. The receipt shows a total of 12.", None, False, False),
    "prose with a number": ("There are 3 people in the picture.", None, False, False),
    "prose around points": (f"There are 3 people. {MUG}", None, False, False),
    "count in a label": ('<points coords="">There are 3 cups</points>', None, False, False),
    "cut in a tag": (f"{MUG} <points alt=", None, False, True),
    "cut in the name of a tag": ("Counting the <poi", None, False, True),
    "cut behind <": ("Counting the <", None, False, True),
    "tags without coords": ("There are 3 <points>cups</points>.", 3, False, False),
    "empty": ("", None, False, False),
    "empty tag": ('Counting the <points coords="">cups</points> shows a total of 0.', 0, False, False),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    text, *expected = COUNTS[name]
    found = parse_grounding(text)
    assert [found.count, found.says_none, found.truncated] == expected


# --- images ----------------------------------------------------------------------------------------------------------

SIZES = [(100, 50), (10, 20)]


def test_keys_outside_of_the_images_are_dropped():
    found = parse_grounding('<points coords="0 1 500 500\t1 2 500 500\t2.0 3 500 500\t3 4 500 500">a</points>', SIZES)
    assert [(point.key, point.image_index, point.x, point.y) for point in found] == [(1, 0, 50, 25), (2, 1, 5, 10)]
    assert all(type(point.key) is int and point.frame is None and point.time is None for point in found)


def test_without_sizes_any_image_may_be_meant():
    found = parse_grounding('<points coords="7 1 500 500">a</points>')
    assert [(point.key, point.image_index, point.x) for point in found] == [(7, 6, None)]
    assert found.kind == "multi_image"


@pytest.mark.parametrize(
    ("text", "media", "kind", "expected"),
    [
        (MUG, None, None, "image"),
        (MUG, SIZES, None, "multi_image"),
        (MUG, SIZES[:1], None, "image"),
        (MUG, None, "video", "video"),
        ('<points coords="1.0 1 500 250">mug</points>', None, None, "video"),
        ('<points coords="1.0 1 500 250">mug</points>', SIZES[:1], "image", "image"),
        ('<points coords="1.0 1 500 250">mug</points>', SIZES, None, "multi_image"),
        ('<tracks coords="1 1 500 250">mug</tracks>', None, None, "video"),
        ("7", None, None, "image"),
    ],
)
def test_kind(text, media, kind, expected):
    found = parse_grounding(text, media, kind=kind)
    assert found.kind == expected
    for point in found:
        assert type(point.key) is (float if expected == "video" else int)
        assert (point.image_index is None) == (expected == "video")


def test_a_wrong_kind_is_refused():
    with pytest.raises(ValueError, match="'film'; expected one of"):
        parse_grounding(MUG, kind="film")


def test_legacy_points_have_no_place_in_a_video():
    assert len(parse_grounding('<point x="10" y="20">mug</point>', (100, 50), kind="video")) == 0


def test_tracks_and_frames():
    """R10: times sorted, the first of an id within one time; the flat list keeps all."""
    text = '<tracks coords="1.0 1 100 100\t0.5 1 200 200 1 300 300 2 400 400">a</tracks>'
    found = parse_grounding(text, (1000, 1000), kind="video")
    assert len(found.points) == 4
    assert [(track.id, [(point.key, point.x) for point in track.points]) for track in found.tracks] == [
        (1, [(0.5, 200), (1.0, 100)]),
        (2, [(0.5, 400)]),
    ]
    assert found.frames(5) == [
        {"time": 0.5, "frame": 2, "points": {1: (200, 200), 2: (400, 400)}},
        {"time": 1.0, "frame": 5, "points": {1: (100, 100)}},
    ]


def test_objects_of_different_labels_are_different():
    text = '<tracks coords="0.5 1 100 100">cat</tracks><tracks coords="0.5 1 200 200">dog</tracks>'
    assert [(track.label, track.id) for track in parse_grounding(text).tracks] == [("cat", 1), ("dog", 1)]


def test_a_sampled_frame_is_known_by_the_times_of_its_file():
    metadata = {
        "timestamps": [0.0, 0.5],
        "source_frame_indices": [0, 14],
        "source_timestamps": [0.0, 0.48],
        "source_first_timestamp": 1.25,
    }
    found = parse_grounding('<points coords="0.5 1 500 250">mug</points>', metadata)
    assert found.points[0].frame == grounding_file.SampledFrame(0.5, 1, 14, 0.48, 1.73)
    assert "<th>time</th>" in found._repr_html_()


def test_results_are_values():
    found = parse_grounding(MUG, (100, 50))
    assert found == parse_grounding(MUG, (100, 50))
    assert hash(found) == hash(parse_grounding(MUG, (100, 50)))
    assert json.loads(json.dumps(found.as_dict()))["points"][0]["x"] == 50
    assert len(found) == 1
    assert list(found) == list(found.points)
    assert bool(parse_grounding(""))
    with pytest.raises(AttributeError):
        found.count = 3
    assert "&lt;points" in found._repr_html_()
    assert "<th>image</th><th>id</th><th>x</th>" in found._repr_html_()
    assert "<td>50.0</td><td>12.5</td>" in found._repr_html_()
    assert "<td>0.500</td><td>0.250</td>" in parse_grounding(MUG)._repr_html_()
    assert MUG[slice(*found.points[0].span)] == "1 500 250"
    assert MUG[slice(*found.tags[0].span)] == MUG
    for older in ('<point x="10.5" alt="a" y="20.1">mug</point>', '<point y="20.1" alt="a" x="10.5">mug</point>'):
        start, end = parse_grounding(older, kind="image").points[0].span
        assert {older[start:][:4], older[:end][-4:]} <= {"10.5", "20.1"}
        assert start < older.index("alt") < end


# --- streams ---------------------------------------------------------------------------------------------------------

SHORT = 500  # characters; longer ones are not read one by one


def bare(points):
    """What does not depend on text that comes after the coordinates."""
    return [(p.tag, p.key, p.id, p.x_norm, p.y_norm, p.image_index, p.span) for p in points]


def complaint(text):
    """What is wrong with the text read as a stream of single characters; empty if nothing is."""
    stream = GroundingStream()
    points = [point for character in text for point in stream.feed(character)]
    found = stream.close()
    if found != parse_grounding(text):
        return f"ends with {found}"
    if bare(points) != bare(found)[: len(points)]:
        return f"handed out {points}"
    if stream.close() is not found:
        return "closes twice"
    return ""


@pytest.mark.parametrize("table", [POINTS, TAGS, COUNTS], ids=["points", "tags", "counts"])
def test_a_stream_of_single_characters(table):
    short = {name: row[0] for name, row in table.items() if len(row[0]) < SHORT}
    complaints = {name: complaint(text) for name, text in short.items()}
    assert {name: found for name, found in complaints.items() if found} == {}


def test_a_closed_stream_takes_no_more():
    stream = GroundingStream()
    stream.feed(MUG)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.feed("x")


def test_points_come_as_soon_as_they_are_certain():
    stream, came = GroundingStream(), []
    for place, character in enumerate('<points coords="1 1 500 250 2 100 20 3 100 200">mug</points>'):
        came += [(place, point.id) for point in stream.feed(character)]
    assert came == [(27, 1), (38, 2), (46, 3)]
