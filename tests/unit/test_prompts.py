"""Prompts as data: the training wording, and a reader for each answer."""

import json

import pytest

from molmo2.grounding import prompts
from molmo2.grounding.parse import MediaInfo, SampledFrame, parse_grounding
from molmo2.grounding.prompts import SECTION_REQUESTS, Prompt
from molmo2.grounding.structured import IMAGE_SECTIONS, SECTIONS, Event, NamedObject, StructuredAnswer, WrittenText

TAG = '<points coords="0.5 1 500 500">cup</points>'


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (prompts.point("cup"), "Point to the cup."),
        (prompts.point("  red\ncup. "), "Point to the red cup."),
        (prompts.track("cup"), "Track the cup."),
        (prompts.track("cup", fps=2), "Track cup at 2 FPS"),
        (prompts.track("cup", fps=0.5), "Track cup at 0.5 FPS"),
        (prompts.track("cup", points={0.5: [(0.5, 0.5)]}), f"Track {TAG} at 2 FPS"),
        (prompts.track("cup", 1, points=parse_grounding(TAG)), f"Track {TAG} at 1 FPS"),
        (prompts.count("cups"), "How many cups are there?"),
        (prompts.describe(), "Describe this image."),
        (prompts.describe("video"), "Describe this video."),
        (prompts.describe("images"), "Describe these images."),
    ],
)
def test_wording(prompt, text):
    assert (prompt.text, str(prompt)) == (text, text)


def test_pointing_and_counting_answers_become_places():
    grounding = prompts.point("cup").parse('<points coords="1 1 500 250">cup</points>', [(200, 100)])
    assert [(point.x, point.y) for point in grounding] == [(100, 25)]
    assert prompts.count("cups").parse("3").count == 3
    media = MediaInfo("video", ((64, 48),), (SampledFrame(0.0, 0, 0, 0.0), SampledFrame(0.5, 1, 15, 0.5)))
    tracks = prompts.track("cup").parse('<tracks coords="0.5 7 500 500">cup</tracks>', media).tracks
    assert [(track.id, track.points[0].frame.source_index) for track in tracks] == [(7, 15)]


def test_descriptions_stay_text():
    assert prompts.describe().parse(" A cup. \n", [(2, 2)]) == "A cup."


def test_structured_prompts_say_what_their_parser_reads():
    """The format that each prompt spells out, filled in, comes back whole."""
    assert list(SECTION_REQUESTS) == list(SECTIONS)
    answer = {
        "summary": "A man leaves.",
        "events": [{"start": "00:01", "end": "00:04", "description": "He leaves"}],
        "objects": [{"name": "door", "description": "red", "first_seen": "00:00", "last_seen": "00:05"}],
        "text": [{"text": "EXIT", "start": "00:02", "end": "00:03"}],
        "scene": {"setting": "hall", "time_of_day": "night", "location_type": "office"},
        "activities": {"primary": "walking", "secondary": ["talking", "waving"]},
    }
    for name in SECTIONS:
        text = prompts.describe_structured(name).text
        assert f'"{name}"' in text
        first = answer[name][0] if isinstance(answer[name], list) else answer[name]
        keys = list(first) if isinstance(first, dict) else []
        assert [other for other in SECTIONS if f'"{other}": ' in text and other not in keys] == [name][name in keys :]
        assert all(f'"{key}"' in text for key in keys)
    result = prompts.describe_structured().parse(json.dumps(answer))
    assert isinstance(result, StructuredAnswer)
    assert (result.summary, result.text) == ("A man leaves.", (WrittenText("EXIT", 2.0, 3.0),))
    assert result.objects == (NamedObject("door", "red", 0.0, 5.0),)
    assert result.scene == (("setting", "hall"), ("time_of_day", "night"), ("location_type", "office"))
    assert result.activities == (("primary", ("walking",)), ("secondary", ("talking", "waving")))
    events = prompts.localize_events("a man leaves")
    assert events.text.startswith("Find every time when a man leaves. Answer with one JSON object")
    assert events.parse(json.dumps({"events": answer["events"]})).events == (Event(1.0, 4.0, "He leaves"),)
    assert prompts.localize_events().text.startswith("List the events of this video. ")


def test_images_have_no_times():
    prompt = prompts.describe_structured(what="image")
    assert prompt.text.startswith("Describe this image. ")
    assert [name for name in SECTIONS if f'"{name}": ' in prompt.text] == list(IMAGE_SECTIONS)
    assert "mm:ss" not in prompt.text
    assert "first_seen" not in json.dumps(prompt.schema)
    result = prompt.parse('{"objects": [{"name": "door"}], "text": ["EXIT"], "activities": ["walking"]}')
    assert (result.objects, result.text) == ((NamedObject("door"),), (WrittenText("EXIT"),))
    assert result.activities == (("primary", ("walking",)),)
    with pytest.raises(ValueError, match=r"no sections \['events'\] for the image"):
        prompts.describe_structured("events", what="image")


def test_impossible_prompts_are_refused():
    with pytest.raises(ValueError, match="empty name"):
        prompts.point(" . ")
    with pytest.raises(ValueError, match=r"no sections \['colour'\] for the video\. Use some of"):
        prompts.describe_structured("colour")
    for nothing in ([], {0.5: []}, parse_grounding("There are none.")):
        with pytest.raises(ValueError, match=r"holds no point, so there is nothing to track\. Pass at least one"):
            prompts.track("cup", points=nothing)
    with pytest.raises(ValueError, match="fps is 0"):
        prompts.track("cup", fps=0)


def test_readers_of_ones_own():
    assert Prompt("Yes or no?", lambda answer, media: answer == "Yes").parse("Yes") is True
