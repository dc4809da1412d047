"""Reading points, tracks and counts: the public cases, one row for each rule and reading, and streams."""

import json
from pathlib import Path

import pytest

from molmo2_remote.grounding_molmo2 import GroundingStream, parse_grounding

CASES = json.loads((Path(__file__).parent / "data" / "grounding_cases.json").read_text(encoding="utf-8"))["cases"]


def flat(grounding):
    return [{name: getattr(point, name) for name in ("tag", "label", "key", "id", "x", "y")} for point in grounding]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
@pytest.mark.parametrize("says_kind", [True, False])
def test_public_case(case, says_kind):
    found = parse_grounding(case["text"], case["sizes"], kind=case["kind"] if says_kind else None)
    expected = case["expect"]
    assert flat(found) == expected["points"]
    assert found.kind == case["kind"]
    assert (found.count, found.none, found.truncated) == tuple(expected[k] for k in ("count", "none", "truncated"))
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
