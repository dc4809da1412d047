"""Answers made at random, damaged at random, and hostile: nothing raises, nothing is invented, time stays linear."""

import itertools
import re
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2.grounding import format as grounding_format
from molmo2.grounding import parse, structured
from molmo2.grounding.parse import GroundingStream, parse_grounding
from support.grounding_answers import answers, card_rows

# What means something to a reader, for damage and for texts made of nothing else.
TAG_PIECES = ["<points ", "<tracks ", "<point ", "</points>", "</tracks>", "coords=", 'coords="', "alt='", "label="]
MARKS = [
    '"',
    "'",
    "&quot;",
    "&",
    "&quo",
    "\\t",
    "\\",
    '\\"',
    "\t",
    "\n",
    ";",
    ",",
    " ",
    ">",
    "/>",
    "<",
    "/",
    "=",
    "\0",
]
NUMBERS = ["1 ", "2 ", "0.5 ", "1.0", "500 ", "99 ", "1001", "x1=", "y1=", "x=", '"10.5"', "7", "\u0663", "."]
WORDS = ["There are ", "There are none.", " shows a total of 3", "Counting the ", "\xe9", "\ud800", "\u2028", "cup"]
PIECES = st.sampled_from(TAG_PIECES + MARKS + NUMBERS + WORDS)


@pytest.mark.parametrize("text", ["There are 5 \0", "\0 shows a total of 5", "There are \0 5 \0."])
def test_a_nul_in_the_text_is_no_tag(text):
    assert parse_grounding(text).count is None
    stream = GroundingStream()
    for character in text:
        stream.feed(character)
    assert stream.close() == parse_grounding(text)


def rows(points):
    return [(point.key, point.id, round(point.x_norm * 1000), round(point.y_norm * 1000)) for point in points]


def bare(points):
    """What does not depend on text that comes after the coordinates."""
    return [(p.tag, p.key, p.id, p.x, p.y, p.x_norm, p.y_norm, p.image_index, p.frame, p.span) for p in points]


def assert_nothing_is_invented(found):
    """The numbers of each point stand in its span, in order, inside a tag; the spans follow each other."""
    last = 0
    for tag in found.tags:
        assert last <= tag.span[0] < tag.span[1] <= len(found.text)
        last = tag.span[1]
        place = tag.span[0]
        for point in tag.points:
            assert place <= point.span[0] < point.span[1] <= tag.span[1]
            written = found.text[slice(*point.span)]
            numbers = [float(number) for number in re.findall(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+", written)]
            if numbers[0] == point.id and len(numbers) == 3:
                grid = 1000
                place = point.span[1]
            else:  # the older notation, whose tags do not write ids
                grid, numbers = 100, [point.id, *numbers]
                assert {"x", "y"} <= set(re.findall("[xy]", found.text[slice(*tag.span)].lower()))
            assert {point.x_norm, point.y_norm} <= {number / grid for number in numbers}
            assert 0 <= point.x_norm <= 1
            assert 0 <= point.y_norm <= 1
            if grid == 1000:
                assert numbers == [point.id, point.x_norm * 1000, point.y_norm * 1000]
                key = found.text[tag.span[0] : point.span[0]]
                assert float(point.key) in [float(word) for word in re.findall(r"[0-9]*\.[0-9]+|[0-9]+\.?", key)]
    assert [point for tag in found.tags for point in tag.points] == list(found.points)


def read(text, cuts=()):
    """The whole text at once, and in pieces, which has to come to the same."""
    found = parse_grounding(text)
    stream, points, places = GroundingStream(), [], [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in pairwise(places):
        points += stream.feed(text[start:end])
    assert stream.close() == found
    assert bare(points) == bare(found)[: len(points)]
    assert_nothing_is_invented(found)
    return found


@given(answers())
@settings(max_examples=200)
def test_undamaged_answers_are_read_as_the_card_reads_them(answer):
    kind = {"pointing": "image", "multi-image": "multi_image"}.get(answer.mode, "video")
    found = parse_grounding(answer.text, [(1000, 1000)] * answer.num_images, kind=kind)
    assert rows(found) == list(answer.rows)
    assert [(float(key), *rest) for key, *rest in rows(found)] == card_rows(answer.text)
    assert not found.truncated
    assert read(answer.text).tags == read(answer.text, cuts=range(0, 400, 7)).tags


@given(answers(), st.data())
@settings(max_examples=200)
def test_an_answer_cut_anywhere_keeps_its_complete_triples(answer, data):
    end = data.draw(st.integers(0, len(answer.text)))
    whole, found = parse_grounding(answer.text), read(answer.text[:end])
    complete = [row for row, point in zip(rows(whole), whole) if point.span[1] < end]
    assert rows(found)[: len(complete)] == complete
    assert len(found) <= len(complete) + 1
    if len(found) > len(complete):  # the last number may have lost digits, but has three
        key, number, x, y = rows(whole)[len(complete)]
        assert rows(found)[-1][:3] == (key, number, x)
        assert str(y).zfill(3).startswith(f"{rows(found)[-1][3]:03d}")
    (tag,) = whole.tags
    if tag.span[0] < end < tag.span[1]:
        assert found.truncated


@st.composite
def damaged(draw):
    text = draw(answers()).text
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 8)))
        text = text[:start] + draw(st.sampled_from(["", text[start:end][::-1]]) | PIECES) + text[end:]
    return text


@given(damaged(), st.lists(st.integers(0, 10**6), max_size=8))
@settings(max_examples=200)
def test_damaged_answers(text, cuts):
    read(text, cuts)


@given(st.lists(PIECES, max_size=60).map("".join), st.lists(st.integers(0, 10**6), max_size=8))
@settings(max_examples=400)
def test_texts_of_nothing_but_notation(text, cuts):
    read(text, cuts)


@given(st.text(max_size=200) | st.text(st.characters(categories=["Cs", "Nd", "Zs", "Cc"]), max_size=100))
@settings(max_examples=200)
def test_any_unicode(text):
    assert len(read(text)) == 0 or "coords" in text.lower()


@given(answers(modes=["video pointing", "tracking"]))
@settings(max_examples=100)
def test_times_survive_tabs_that_became_spaces(answer):
    for separator in ("\t", ";"):
        text = answer.text.replace(separator, " ")
    if "\t" not in text:
        assert rows(parse_grounding(text.replace(";", " "), kind="video")) == list(answer.rows)


# --- hostile texts ---------------------------------------------------------------------------------------------------

STARTS = ["", "7", "Counting the ", '<points coords="1 1 100 100">', "<points ", '<points x1="']
STARTS += ['<points coords="', "<points coords=", '<points alt="', "<points alt='", "<points alt=&quot;"]
REPEATED = ['<points coords="', '<points alt="x ', "<points>", '<points coords="1 1 100 100">', "</points>", "<", "<p"]
REPEATED += ['<points coords="1 1 100 100">a</points>', '<point x="1" y="2">a</point>', ' a="', " a=", " coords="]
REPEATED += ["5", '"', "'", "&quot;", "&quot; ", "&quot;a", "&", "\\", " ", "\n", "\t", ">", "/", "=", "a"]
REPEATED += ["1 ", "1 100 200 ", "1.0 ", "there are 3 ", "counting the ", "counting the shows a total of 3 "]
REPEATED += ["shows a total of 3. ", "there are none "]


def num_calls(text, piece):
    """Calls of functions, Python's and C's, while a text is read in pieces: what the machine does, without a clock."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        stream = GroundingStream()
        for start in range(0, len(text), piece):
            stream.feed(text[start : start + piece])
        stream.close()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("piece", [1, 10**9], ids=["characters", "whole"])
@pytest.mark.parametrize("start", STARTS)
def test_steps_grow_as_the_text_does(start, piece):
    for repeated in REPEATED:
        short, long = (num_calls(start + repeated * (size // len(repeated)), piece) for size in (1000, 4000))
        assert long <= 4.2 * short + 100, repeated


def work(text):
    """Seconds of this thread's own work, the lesser of two tries; what else the machine does is not in it."""
    spent = []
    for _ in range(2):
        started = time.thread_time()
        parse_grounding(text)
        spent.append(time.thread_time() - started)
    return min(spent)


@pytest.mark.parametrize("repeated", REPEATED)
def test_work_grows_as_the_text_does(repeated):
    """What a regular expression does is one call, so here its work decides. Quadratic would be 100 times as much."""
    for start in STARTS[::6]:
        short, long = (work(start + repeated * (size // len(repeated))) for size in (20_000, 200_000))
        assert long <= 30 * short + 0.5, start


@pytest.mark.parametrize(
    "repeated", ['<points coords="', "5", "<", '"', "1 100 200 ", '<points coords="1 1 100 100">']
)
@pytest.mark.parametrize("start", STARTS[::6])
def test_two_megabytes(start, repeated):
    found = parse_grounding(start + repeated * (2_000_000 // len(repeated)))
    assert found.truncated == ("points" in start + repeated or repeated == "<")


# --- regular expressions ---------------------------------------------------------------------------------------------

PATTERNS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": pattern
    for module in (parse, grounding_format, structured)
    for name, value in vars(module).items()
    for pattern in (value.values() if isinstance(value, dict) else [value])
    if isinstance(pattern, re.Pattern)
}
UNITS = [
    " ",
    "\n",
    "\t",
    "1",
    "1 ",
    "0.",
    "a",
    '"',
    "'",
    "\\",
    "&",
    "&quot;",
    "<",
    "</",
    "<points ",
    "=",
    "/",
    ",",
    ":",
    "[",
]
UNITS += [
    "{",
    "`",
    "-",
    "to",
    "coords ",
    "coords = ",
    "there are ",
    "1 \0",
    "none ",
    "shows a total of ",
    "[' ",
    ', "',
    "1:",
]
UNIT_COUNT = 16_000


def seconds_of(pattern, texts):
    """Seconds of this thread's own work with all ways of searching."""
    started = time.thread_time()
    for text in texts:
        pattern.fullmatch(text)
        for _ in pattern.finditer(text):
            pass
    return time.thread_time() - started


@pytest.mark.parametrize("name", PATTERNS)
def test_regular_expressions_are_linear(name):
    """Four times the text may take four times the work, and some. Anything quadratic takes seconds at this length."""

    def is_linear(unit):
        short, long = (
            seconds_of(PATTERNS[name], [text, "there are" + text + "x", "[" + text + "\0x", 'coords="' + text])
            for text in (unit * (UNIT_COUNT // 4), unit * UNIT_COUNT)
        )
        return long <= 8 * short + 0.1

    for unit in UNITS:
        assert is_linear(unit) or is_linear(unit), repr(unit)  # a second time, as other programs share the caches


@pytest.mark.parametrize("blanks", [" ", "\t", "\n"])
def test_a_range_of_many_blanks(blanks):
    answer = '{"events": [{"timestamp": "1:00' + blanks * 30_000 + '-  2:00", "description": "a"}]}'
    started = time.process_time()
    event = structured.parse_structured(answer).events[0]
    assert (event.start, event.end) == (60.0, 120.0)
    assert time.process_time() - started < 2


RUNS = st.tuples(PIECES | st.sampled_from("ax./&\\9é"), st.sampled_from([1, 2, 30, 63, 64, 65, 66, 90]))


@given(
    st.sampled_from(
        [
            "<points coords=",
            "<tracks coords = ",
            "<points alt=a coords=",
            '<points coords="',
            "<points alt=",
            "<points x1=",
        ]
    ),
    st.lists(RUNS, max_size=6),
)
@settings(max_examples=50, deadline=None)
def test_every_split_of_an_answer_with_long_words_is_read_as_the_whole(start, runs):
    text = (start + "".join(piece * times for piece, times in runs))[:300]
    whole = parse_grounding(text)
    for place in range(len(text) + 1):
        stream = GroundingStream()
        points = [*stream.feed(text[:place]), *stream.feed(text[place:])]
        assert stream.close() == whole, place
        assert bare(points) == bare(whole.points)[: len(points)]


@given(
    st.sampled_from(["<points coords=", "<tracks coords= ", '<points coords="', "<points alt="]),
    st.lists(st.tuples(PIECES | st.sampled_from("ax./&\\"), st.sampled_from([1, 2, 30, 64, 65, 90])), max_size=8),
    st.lists(st.integers(1, 80), min_size=1, max_size=8),
)
@settings(max_examples=200)
def test_long_words_in_tags_are_read_alike_however_they_come(start, runs, sizes):
    text = start + "".join(piece * times for piece, times in runs)
    whole = parse_grounding(text)
    stream, points, place = GroundingStream(), [], 0
    for size in itertools.cycle(sizes):
        points += stream.feed(text[place : place + size])
        place += size
        if place >= len(text):
            break
    assert stream.close() == whole
    assert bare(points) == bare(whole.points)[: len(points)]
