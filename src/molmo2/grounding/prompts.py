"""The prompts that Molmo2 was trained on, each with the reader of its answer.

    prompt = prompts.point("cup")
    prompt.text                      # "Point to the cup."
    prompt.parse("<points ...")      # a Grounding

Source of the wording: the training prompts of Molmo2 for pointing, tracking and counting. Structured descriptions ask
for the JSON that `molmo2.grounding.structured` reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from molmo2.grounding.format import NO_POINTS, format_points
from molmo2.grounding.parse import parse_grounding
from molmo2.grounding.structured import IMAGE_SECTIONS, json_schema, parse_structured

SECTION_REQUESTS = {
    "summary": '"summary": one or two sentences',
    "events": '"events": a list of {"start": "mm:ss", "end": "mm:ss", "description": text}',
    "objects": '"objects": a list of {"name": text, "description": text, "first_seen": "mm:ss", "last_seen": "mm:ss"}',
    "text": '"text": a list of {"text": what is written or shown as text, "start": "mm:ss", "end": "mm:ss"}',
    "scene": '"scene": {"setting": text, "time_of_day": text, "location_type": text}',
    "activities": '"activities": {"primary": text, "secondary": a list of texts}',
}
IMAGE_REQUESTS = {
    **{name: SECTION_REQUESTS[name] for name in IMAGE_SECTIONS},
    "objects": '"objects": a list of {"name": text, "description": text}',
    "text": '"text": a list of what is written or shown as text',
}


@dataclass(frozen=True)
class Prompt:
    """A prompt and the reader of its answers.

    Attributes:
        text: For the user turn, beside the images or the video.
        reader: `(answer, media)` to a typed result.
        schema: The JSON schema that answers should follow; None for those in prose. Servers are told, see
            `molmo2.client`.
    """

    text: str
    reader: Callable[[str, Any], Any]
    schema: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    def parse(self, answer: str, media: Any = None) -> Any:
        """The answer as an object; never fails, whatever the answer says.

        Args:
            media: What the answer is about (`inputs.media[row]`, sizes, metadata of a video); turns places into
                pixels and times into frames.
        """
        return self.reader(answer, media)

    def __str__(self) -> str:
        return self.text


def point(what: str) -> Prompt:
    """Point to everything of a kind; read by `parse_grounding`."""
    return Prompt(f"Point to the {_named(what)}.", parse_grounding)


def track(what: str, fps: float | None = None, *, points: Any = None) -> Prompt:
    """Follow objects through a video; read by `parse_grounding`.

    Args:
        fps: Positions a second; the model gives 2 where nothing is said.
        points: Where the objects are at some time, to name the very ones: points of an earlier answer, or what
            `molmo2.grounding.format.format_points` takes. They are written into the prompt in the model's own format.
    Raises:
        ValueError: `points` holds none, or `fps` is not positive.
    """
    rate = "" if fps is None else f" at {_rate(fps)} FPS"
    if points is not None:
        places = format_points(points, _named(what))
        if places == NO_POINTS:
            raise ValueError(
                "`points` holds no point, so there is nothing to track. Pass at least one, or leave `points` out "
                "to track by name alone."
            )
        return Prompt(f"Track {places}{rate or ' at 2 FPS'}", parse_grounding)
    return Prompt(f"Track the {_named(what)}." if not rate else f"Track {_named(what)}{rate}", parse_grounding)


def count(what: str) -> Prompt:
    """How many there are; read by `parse_grounding`, whose `count` is the answer."""
    return Prompt(f"How many {_named(what)} are there?", parse_grounding)


def describe(what: str = "image") -> Prompt:
    """A description in prose of the "image", "images" or "video"; the answer stays text."""
    return Prompt(f"Describe {'these' if what == 'images' else 'this'} {_named(what)}.", _as_text)


def localize_events(what: str | None = None) -> Prompt:
    """When things happen in a video; read by `parse_structured`, whose `events` are the answer.

    Args:
        what: The events to look for; None for all.
    """
    wanted = "List the events of this video" if what is None else f"Find every time when {_named(what)}"
    return Prompt(f"{wanted}. {_json_request([SECTION_REQUESTS['events']])}", _as_structure, json_schema(["events"]))


def describe_structured(*sections: str, what: str = "video") -> Prompt:
    """A description as one JSON object; read by `parse_structured`.

    Args:
        sections: Of "summary", "events", "objects", "text", "scene", "activities"; none for all of them.
        what: "video", or "image", which has no events and no times.
    Raises:
        ValueError: There is no such section.
    """
    requests = SECTION_REQUESTS if what == "video" else IMAGE_REQUESTS
    unknown = [name for name in sections if name not in requests]
    if unknown:
        raise ValueError(f"There are no sections {unknown} for the {_named(what)}. Use some of {list(requests)}.")
    wanted = list(sections or requests)
    request = _json_request([requests[name] for name in wanted])
    schema = json_schema(wanted, of_video=what == "video")
    return Prompt(f"Describe this {_named(what)}. {request}", _as_structure, schema)


def _json_request(requests: list[str]) -> str:
    return f"Answer with one JSON object and nothing else: {{{', '.join(requests)}}}."


def _named(what: str) -> str:
    """The name of something, on one line and without a full stop.

    Raises:
        ValueError: It is empty.
    """
    name = " ".join(str(what).split()).rstrip(".")
    if not name:
        raise ValueError("The prompt needs to name something: found an empty name.")
    return name


def _rate(fps: float) -> str:
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps is {fps!r}, but it has to be a positive number of positions a second.")
    return f"{fps:g}"


def _as_text(answer: str, media: Any) -> str:
    return answer.strip()


def _as_structure(answer: str, media: Any) -> Any:
    return parse_structured(answer)
