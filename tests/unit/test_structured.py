"""Structured answers: what a model writes as JSON, whole, damaged or cut off."""

import json
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2.grounding.structured import (
    Event,
    NamedObject,
    StructuredAnswer,
    WrittenText,
    parse_seconds,
    parse_structured,
)

json_repair = pytest.importorskip("json_repair")

EVENTS = [
    {"start": "00:01", "end": "00:04", "description": 'A man says "hi, [you]" and {leaves}'},
    {"start": "01:05", "end": "1:02:03", "description": "He comes back"},
    {"start": "3723.5", "end": 3724, "description": "The end"},
]
FULL = {
    "summary": "A man leaves and comes back.",
    "events": EVENTS,
    "objects": [{"name": "door", "description": "red"}, "hat"],
    "text": ["EXIT", 7],
    "scene": {"setting": "a hall", "weather": None},
}
READ_EVENTS = (
    Event(1.0, 4.0, 'A man says "hi, [you]" and {leaves}'),
    Event(65.0, 3723.0, "He comes back"),
    Event(3723.5, 3724.0, "The end"),
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:00", 0.0),
        ("01:05", 65.0),
        ("90:00", 5400.0),
        ("1:02:03", 3723.0),
        ("00:00:01.25", 1.25),
        ("00:01,5", 1.5),
        ("12", 12.0),
        (" 12.5 s ", 12.5),
        ("3 seconds", 3.0),
        (7, 7.0),
        (7.25, 7.25),
        ("1:2", None),
        ("1:2:3:4", None),
        ("-1", None),
        (-1, None),
        ("soon", None),
        ("", None),
        (True, None),
        (None, None),
        (float("nan"), None),
        ([1], None),
        pytest.param(10**400, None, id="beyond any float"),
        (float("inf"), None),
    ],
)
def test_times(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(FULL),
        json.dumps(FULL, indent=2),
        f"```json\n{json.dumps(FULL)}\n```",
        f"Here you are:\n```\n{json.dumps(FULL, indent=1)}\n```\nAnything else? [ok]",
        f"Sure! {json.dumps(FULL)} That is all.",
        json.dumps({name.upper(): value for name, value in FULL.items()}),
    ],
)
def test_whole_answers(answer):
    result = parse_structured(answer)
    assert result.events == READ_EVENTS
    assert result == StructuredAnswer(
        raw=answer,
        summary="A man leaves and comes back.",
        events=READ_EVENTS,
        objects=(NamedObject("door", "red"), NamedObject("hat")),
        text=(WrittenText("EXIT"), WrittenText("7")),
        scene=(("setting", "a hall"),),
        found=True,
    )


@pytest.mark.parametrize(
    ("answer", "events"),
    [
        (json.dumps(EVENTS), READ_EVENTS),
        (json.dumps(EVENTS[0]), READ_EVENTS[:1]),
        ('[{"timestamp": "00:01 - 00:04", "event": "x"}]', (Event(1.0, 4.0, "x"),)),
        ('[{"time": [1, 2], "label": "x"}]', (Event(1.0, 2.0, "x"),)),
        ('{"events": {"start": 1, "end": 2, "caption": "x"}}', (Event(1.0, 2.0, "x"),)),
        ('{"events": []}', ()),
    ],
)
def test_other_shapes_of_events(answer, events):
    result = parse_structured(answer)
    assert (result.events, result.found, result.truncated) == (events, True, False)


def test_cut_off_anywhere_keeps_every_complete_event():
    answer = json.dumps({"events": EVENTS})
    ends = [answer.index("}", answer.index(word)) + 1 for word in ("leaves}", "comes back", "The end")]
    ends[0] = answer.index('"}', answer.index("leaves}")) + 2
    for length in range(len(answer)):
        result = parse_structured(answer[:length])
        # A complete event counts once something follows it: until then the model may still be writing.
        complete = sum(length > end for end in ends)
        assert result.events == READ_EVENTS[:complete], answer[:length]
        assert result.truncated is result.repaired is (length > 0)


def test_cut_off_prose_stays():
    result = parse_structured('{"summary": "A man walks to the do')
    assert (result.summary, result.truncated, result.repaired) == ("A man walks to the do", True, True)


@pytest.mark.parametrize(
    "answer",
    [
        "{'events': [{'start': '00:01', 'end': '00:04', 'description': 'x'}]}",
        '{"events": [{"start": "00:01", "end": "00:04", "description": "x",},],}',
        '{events: [{start: "00:01", end: "00:04", description: "x"}]}',
        '{"events": [{"start": "00:01" "end": "00:04", "description": "x"}]}',
    ],
)
def test_damaged_answers_are_repaired(answer):
    result = parse_structured(answer)
    assert (result.events, result.repaired, result.truncated) == ((Event(1.0, 4.0, "x"),), True, False)


@pytest.mark.parametrize(
    ("answer", "times"),
    [
        ('{"events": [{"start": 0:05, "end": 1:02, "description": "a"}]}', [(5.0, 62.0)]),
        ('[{"start": 01:05,\n "end": 1:01:02}]', [(65.0, 3662.0)]),
        ('[{"start":0:05.5,"end":0:07}]', [(5.5, 7.0)]),
        ('[{"time": [0:05, 1:02]}, {"time": 0:05 - 1:02}]', [(5.0, 62.0)] * 2),
        ('[{"start": 0:05 "end": 1:02}]', [(5.0, 62.0)]),
        ("[{'start': 0:05, 'end': 1:02, 'description': 'then: 2:00'}]", [(5.0, 62.0)]),
        ('[{"start": 0:05, "end": 1:02}, {"start": 1:0', [(5.0, 62.0)]),
        ('{"start": 0:05, "end": 1:0', [(5.0, None)]),
        ('{"start": 0:05, "end": 1:', [(5.0, None)]),
        ('[{"start": -0:05, "end": 0:05h}]', [(None, None)]),
    ],
)
def test_times_without_quotes(answer, times):
    result = parse_structured(answer)
    assert [(event.start, event.end) for event in result.events] == times
    assert result.repaired


def test_text_that_holds_times_stays_as_it_is():
    said = 'From "x", 0:05, to: 1:02, [3:00'
    result = parse_structured(f'{{"summary": {json.dumps(said)}, "events": [{{"start": 0:05, "end": 1:02}}]}}')
    assert (result.summary, result.events) == (said, (Event(5.0, 62.0, ""),))


def test_times_without_quotes_need_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "json_repair", None)
    assert parse_structured('[{"start": 0:05, "end": 1:02}]').events == (Event(5.0, 62.0, ""),)


@pytest.mark.parametrize(
    "answer",
    [
        '{"events": [{"start": 1, "end": 2, "description": "x"}, {"timestamp": ["0:05", "0:1',
        '[{"start": 1, "end": 2, "description": "x", "who": ["a", "b"]}, {"start": 3, "end": 4, "who": ["a", "b',
    ],
)
def test_lists_in_an_entry_that_was_cut_off_do_not_keep_it(answer):
    assert parse_structured(answer).events == (Event(1.0, 2.0, "x"),)


@pytest.mark.parametrize(
    ("answer", "expected", "problems"),
    [
        (
            {"video": {"summary": "A", "events": EVENTS}, "title": "B"},
            {"summary": "A", "events": READ_EVENTS},
            ["'title' is none of the sections"],
        ),
        ({"answer": {"video": {"text": ["GO"]}}}, {"text": (WrittenText("GO"),)}, []),
        ({"event": EVENTS[0]}, {"events": READ_EVENTS[:1]}, []),
        ({"summary": "A", "mood": "dark"}, {"summary": "A"}, ["'mood' is none of the sections"]),
        ({"timeline": EVENTS}, {}, ["'timeline' is none of the sections"]),
        ({"summary": {"day": "sunny", "night": ["dark", "cold"]}}, {"summary": "day: sunny, night: dark, cold"}, []),
        (
            {"objects": {"dog": "brown", "cat": {"colour": "red"}, "cow": None}},
            {"objects": (NamedObject("dog", "brown"), NamedObject("cat", "colour: red"), NamedObject("cow"))},
            [],
        ),
        ({"objects": {"name": "dog", "description": "brown"}}, {"objects": (NamedObject("dog", "brown"),)}, []),
        ({"objects": [{"dog": "brown"}]}, {}, ["object 1 lacks a name: 'dog: brown'"]),
        (
            {"text": [{"text": "GO", "time": "0:01 - 0:02"}, {"content": "STOP"}, "1"]},
            {"text": (WrittenText("GO", 1.0, 2.0), WrittenText("STOP"), WrittenText("1"))},
            [],
        ),
        (
            {"objects": [{"name": "dog", "first_seen": "0:01"}, {"name": "cat", "start": 2, "end": 3}]},
            {"objects": (NamedObject("dog", "", 1.0), NamedObject("cat", "", 2.0, 3.0))},
            [],
        ),
        (
            {"activities": {"primary": "running", "secondary": ["a", "", "b"], "none": None}},
            {"activities": (("primary", ("running",)), ("secondary", ("a", "b")))},
            [],
        ),
        ({"text": {"sign": "GO"}}, {"text": (WrittenText("sign: GO"),)}, []),
    ],
)
def test_nothing_is_dropped_without_a_word(answer, expected, problems):
    said = json.dumps(answer)
    result = parse_structured(said)
    assert len(result.problems) == len(problems)
    assert all(problem.startswith(start) for problem, start in zip(result.problems, problems))
    assert result == StructuredAnswer(said, found=True, problems=result.problems, **expected)


def test_problems_are_named_and_nothing_is_changed():
    entries = [{"start": "00:09", "end": "00:04", "description": "a"}, {"start": "soon", "description": "b"}, "c"]
    result = parse_structured(json.dumps({"events": entries}))
    assert result.events == (Event(9.0, 4.0, "a"), Event(None, None, "b"))
    assert result.problems == (
        "event 1 ends at 4 s, before it starts at 9 s",
        "event 2 lacks a start that is a time",
        "event 3 is 'c', not an object",
    )


@pytest.mark.parametrize("answer", ["", "No.", "``` ```", "7"])
def test_no_json(answer):
    assert parse_structured(answer) == StructuredAnswer(answer, problems=("no JSON was found",))


def test_without_the_library_whole_answers_are_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "json_repair", None)
    assert parse_structured(json.dumps(FULL)).events == READ_EVENTS
    damaged = parse_structured('{"events": [')
    assert damaged.problems[0].endswith("pip install json-repair")


FRAGMENTS = st.sampled_from(
    [
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        ",",
        ":",
        "\\",
        "```json",
        "```",
        "\n",
        " ",
        "null",
        "1",
        "00:01",
        "events",
        "start",
    ]
)


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=200), st.lists(FRAGMENTS, max_size=60).map("".join)))
def test_no_text_makes_it_raise(answer):
    assert parse_structured(answer).raw == answer


def test_a_number_beyond_any_float_is_no_time():
    result = parse_structured('{"events": [{"start": 1' + "0" * 400 + ', "end": 2}]}')
    assert result.events == (Event(None, 2.0, ""),)
    assert result.problems == ("event 1 lacks a start that is a time",)


@pytest.mark.parametrize("depth", [60, 70, 500, 990, 5000])
@pytest.mark.parametrize(
    "answer",
    ['{{"summary": {lists}}}', '{{"events": [{lists}]}}', '{{"scene": {objects}}}', '{{"a": "]]" 7 "b": {lists}}}'],
)
def test_deep_nesting_is_named(answer, depth):
    said = answer.format(lists="[" * depth + "]" * depth, objects='{"a": ' * depth + "1" + "}" * depth)
    result = parse_structured(said)
    assert result.raw == said
    assert any(problem.endswith("nested more than 64 deep") for problem in result.problems) == (depth > 64)


@pytest.mark.parametrize("answer", ["Sure [1]: {}", "As in [1], [2, 3]:\n{}", "Times in [s]. {} See [4]."])
def test_brackets_in_the_prose_before(answer):
    whole = parse_structured(json.dumps({"events": EVENTS}))
    found = parse_structured(answer.replace("{}", json.dumps({"events": EVENTS})))
    assert found.events == whole.events
    assert found.events


@settings(max_examples=200)
@given(st.data())
def test_damage_never_raises_and_never_invents_times(data):
    answer = json.dumps({"events": EVENTS})
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(answer)))
        cut = data.draw(st.integers(0, 6))
        answer = answer[:place] + data.draw(st.one_of(FRAGMENTS, st.text(max_size=3))) + answer[place + cut :]
    result = parse_structured(answer)
    assert result.raw == answer
    assert all(isinstance(event, Event) for event in result.events)


HOSTILE = ["[", "{", '{"a":', '"', "```", "\\", '[{"start": 1, "end": 2}, ', "}{", "'", "1,", "[]", "[1] "]
HOSTILE += ["1:02", ", 1:02", ":1", ",'", ", ", '\\"', "{'\\'"]


@pytest.mark.slow
@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_takes_no_more_than_linear_time(unit):
    def work(length):
        answer = "[" + unit * (length // len(unit))
        started = time.thread_time()
        parse_structured(answer)
        return time.thread_time() - started

    work(1000)
    short, long = (min(work(length) for _ in range(3)) for length in (3_000, 24_000))
    assert long < 8 * 4 * short + 1
