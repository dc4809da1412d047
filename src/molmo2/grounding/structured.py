"""Structured answers: one JSON object, fenced or bare, with events in `mm:ss`, read without ever failing.

What a model writes is repaired where it is damaged or cut off (json-repair, `pip install json-repair`); the result
says so. Times without quotes (`"start": 0:05`) are read without it. Of a list that was cut off, the entry that was
being written is left out, with all that it holds: it may lack anything.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SECTIONS = ("summary", "events", "objects", "text", "scene", "activities")
IMAGE_SECTIONS = ("summary", "objects", "text", "scene", "activities")  # without times
FENCE = re.compile(r"```[ \t]*(?:json5?|JSON)?[ \t]*\n?")
CLOCK = re.compile(r"(?:(\d{1,4}):)?(\d{1,4}):(\d{2})(?:[.,](\d{1,6}))?")
SECONDS = re.compile(r"(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})\s*(?:s|sec|secs|seconds?)?", re.IGNORECASE)
RANGE = re.compile(r"-|\u2013|\u2014|to")  # the blanks around it go with those of the times
START_NAMES = ("start", "start_time", "begin", "from")
END_NAMES = ("end", "end_time", "stop", "to")
RANGE_NAMES = ("timestamp", "timestamps", "time", "interval", "range")
DESCRIPTION_NAMES = ("description", "event", "label", "caption", "name", "text", "action")
FIRST_SEEN_NAMES = ("first_seen", "first_appearance", *START_NAMES)
LAST_SEEN_NAMES = ("last_seen", "last_appearance", *END_NAMES)
NAME_NAMES = ("name", "label", "object")
DETAIL_NAMES = ("description", "details", "attributes")
WRITING_NAMES = ("text", "content", "value")
MAX_CHARACTERS = 200_000  # no answer is longer; what comes after is not read
MARK = re.compile(r'[{}\[\],]|\\.|"|```', re.DOTALL)
# A value without quotes that begins like a clock. Strings, in either kind of quotes, are passed over as a whole.
BARE_CLOCK = re.compile(
    r"""\\.|"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{\[,:]\s*'[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z)"""
    r"""|(?P<before>[\[,:]\s*)(?P<clock>-?\d+:(?:\d[^,\[\]{}"\\\n]*|\Z))""",
    re.DOTALL,
)
MAX_DEPTH = 64  # brackets in brackets; deeper ones are damage
TOO_DEEP = f"brackets are nested more than {MAX_DEPTH} deep"
_TEXT: dict[str, Any] = {"type": "string"}
_CLOCK: dict[str, Any] = {"type": "string", "pattern": "^([0-9]+:)?[0-5]?[0-9]:[0-5][0-9]$"}


def _object_schema(**properties: Any) -> dict[str, Any]:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SECTION_SCHEMAS: dict[str, Any] = {
    "summary": _TEXT,
    "events": {"type": "array", "items": _object_schema(start=_CLOCK, end=_CLOCK, description=_TEXT)},
    "objects": {
        "type": "array",
        "items": _object_schema(name=_TEXT, description=_TEXT, first_seen=_CLOCK, last_seen=_CLOCK),
    },
    "text": {"type": "array", "items": _object_schema(text=_TEXT, start=_CLOCK, end=_CLOCK)},
    "scene": _object_schema(setting=_TEXT, time_of_day=_TEXT, location_type=_TEXT),
    "activities": _object_schema(primary=_TEXT, secondary={"type": "array", "items": _TEXT}),
}
IMAGE_SCHEMAS = SECTION_SCHEMAS | {
    "objects": {"type": "array", "items": _object_schema(name=_TEXT, description=_TEXT)},
    "text": {"type": "array", "items": _TEXT},
}


def json_schema(sections: Iterable[str] = SECTIONS, *, of_video: bool = True) -> dict[str, Any]:
    """The JSON schema of a structured answer, for servers that hold a model to one.

    Args:
        sections: Of "summary", "events", "objects", "text", "scene", "activities".
        of_video: With times; those of events stay in any case.
    Raises:
        KeyError: There is no such section.
    """
    schemas = SECTION_SCHEMAS if of_video else IMAGE_SCHEMAS
    return _object_schema(**{name: schemas[name] for name in sections})


@dataclass(frozen=True)
class Event:
    """Something that happens in a video.

    Attributes:
        start, end: Seconds as said, None where nothing that is a time was said. `end` may lie before `start`, if the
            answer says so; `problems` of the result names it.
    """

    start: float | None
    end: float | None
    description: str


@dataclass(frozen=True)
class NamedObject:
    """An object in the scene.

    Attributes:
        first_seen, last_seen: Seconds as said; None where nothing that is a time was said, as about images.
    """

    name: str
    description: str = ""
    first_seen: float | None = None
    last_seen: float | None = None


@dataclass(frozen=True)
class WrittenText:
    """What is written or shown as text, and from when to when.

    Attributes:
        start, end: As those of `NamedObject`.
    """

    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class StructuredAnswer:
    """A structured description.

    Attributes:
        raw: The answer.
        found: It holds something that could be read as JSON.
        truncated: The JSON was cut off.
        repaired: It was no valid JSON.
        problems: What could not be understood, in words.
        scene: Names and values of the scene, as text.
        activities: Names ("primary", "secondary") and what is done, as texts.
    """

    raw: str
    summary: str = ""
    events: tuple[Event, ...] = ()
    objects: tuple[NamedObject, ...] = ()
    text: tuple[WrittenText, ...] = ()
    scene: tuple[tuple[str, str], ...] = ()
    activities: tuple[tuple[str, tuple[str, ...]], ...] = ()
    found: bool = False
    truncated: bool = False
    repaired: bool = False
    problems: tuple[str, ...] = ()


def parse_structured(answer: str) -> StructuredAnswer:
    """Read an answer to `prompts.localize_events` or `prompts.describe_structured`.

    Keys are found whatever their case; a list at the top counts as events, as does a single event. An object around
    the one that is asked for is passed through. Never raises.
    """
    document = _find_json(answer[:MAX_CHARACTERS])
    if document is None:
        return StructuredAnswer(answer, problems=("no JSON was found",))
    content = _read(document)
    problems = list(content.problems)
    values: Any = content.value
    if isinstance(values, Mapping):
        values = _unwrapped(values, problems)
    if isinstance(values, Mapping) and not _sections_in(values) and _is_event(values):
        values = [values]
    if isinstance(values, list):
        values = {"events": values}
    if not isinstance(values, Mapping):
        return StructuredAnswer(
            answer,
            truncated=content.truncated,
            repaired=content.repaired,
            problems=(*problems, "no JSON object was found"),
        )
    sections = _sections_in(values)
    problems += _unread(values)
    return StructuredAnswer(
        raw=answer,
        summary=_text(sections.get("summary")),
        events=tuple(_events(sections.get("events"), problems)),
        objects=tuple(_objects(sections.get("objects"), problems)),
        text=tuple(_writings(sections.get("text"))),
        scene=_scene(sections.get("scene")),
        activities=tuple(_activities(sections.get("activities"))),
        found=True,
        truncated=content.truncated,
        repaired=content.repaired,
        problems=tuple(problems),
    )


def parse_seconds(value: Any) -> float | None:
    """Seconds of `mm:ss`, `h:mm:ss` (both with fractions), "12.5", "12.5 s" or a number; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value) if 0 <= value <= sys.float_info.max else None  # whole numbers may be beyond any float
    if not isinstance(value, str):
        return None
    text = value.strip()
    clock = CLOCK.fullmatch(text)
    if clock is not None:
        hours, minutes, seconds = int(clock[1] or 0), int(clock[2]), int(clock[3])
        return hours * 3600 + minutes * 60 + seconds + float(f"0.{clock[4] or 0}")
    plain = SECONDS.fullmatch(text)
    return None if plain is None else float(plain[1])


# --- the JSON in an answer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Document:
    """JSON as it stands in an answer.

    Attributes:
        text: From its first bracket to its last, or to the end of the answer.
        truncated: Brackets are open at the end.
        open_entry: The text up to where the outermost list entry that is open at the end begins; None if none is.
    """

    text: str
    truncated: bool
    open_entry: str | None


@dataclass(frozen=True)
class _Content:
    value: Any
    truncated: bool
    repaired: bool
    problems: tuple[str, ...] = ()


def _find_json(answer: str) -> _Document | None:
    """The first bracket that opens something, behind a fence if there is one, and what belongs to it.

    Brackets without an object in them may be a part of the prose ("see [1]"): they count where there is no other.
    """
    fence, first = FENCE.search(answer), None
    start = -1 if fence is None else _first_bracket(answer, fence.end())
    start = _first_bracket(answer, 0) if start < 0 else start
    while start >= 0:
        document = _bracketed(answer, start)
        if "{" in document.text:
            return document
        first = document if first is None else first
        start = _first_bracket(answer, start + len(document.text))
    return first


def _first_bracket(text: str, start: int) -> int:
    places = [place for place in (text.find("{", start), text.find("[", start)) if place >= 0]
    return min(places, default=-1)


def _bracketed(text: str, start: int) -> _Document:
    """The text from an opening bracket to the one that closes it. Brackets inside strings do not count."""
    stack: list[str] = []
    entries: list[int] = []  # of each open list, where its current entry begins
    place, in_string = start, False
    for token in MARK.finditer(text, start):
        mark, place = token[0], token.start()
        if mark == '"':
            in_string = not in_string
        elif in_string or mark.startswith("\\"):
            continue
        elif mark in "{[":
            stack.append(mark)
            if mark == "[":
                entries.append(place + 1)
        elif mark in "}]":
            if stack and stack.pop() == "[" and entries:
                entries.pop()
            if not stack:
                return _Document(text[start : place + 1], False, None)
        elif mark == "," and stack and stack[-1] == "[" and entries:
            entries[-1] = place
        elif mark == "```":
            return _Document(text[start:place], True, None)
    return _Document(text[start:], True, text[start : entries[0]] if entries else None)


def _read(document: _Document) -> _Content:
    for text in (document.text, _with_quoted_clocks(document.text)):
        try:
            return _checked(_Content(json.loads(text, strict=False), False, text != document.text))
        except (ValueError, RecursionError):
            pass
    text = _with_quoted_clocks(document.text if document.open_entry is None else document.open_entry)
    if _depth(text) > MAX_DEPTH:
        return _Content(None, document.truncated, True, (TOO_DEEP,))
    try:
        repair = importlib.import_module("json_repair")
    except ImportError:
        problem = "the JSON is damaged or cut off; to have it repaired: pip install json-repair"
        return _Content(None, document.truncated, False, (problem,))
    try:
        value = repair.loads(text)
    except Exception as error:  # whatever a repair stumbles over is damage, not a fault of the caller
        return _Content(None, document.truncated, True, (f"the JSON could not be repaired ({type(error).__name__})",))
    return _checked(_Content(value, document.truncated, True))


def _with_quoted_clocks(text: str) -> str:
    """JSON whose bare `0:05` are strings; a reader would take them for the number 0."""
    return BARE_CLOCK.sub(lambda found: f'{found["before"]}"{found["clock"]}"' if found["clock"] else found[0], text)


def _checked(content: _Content) -> _Content:
    """The content, or none if it is nested so deep that it could not be walked through."""
    level = [content.value]
    for _ in range(MAX_DEPTH):
        level = [part for value in level for part in _parts(value)]
    is_deep = any(isinstance(value, (Mapping, list)) for value in level)
    return _Content(None, content.truncated, content.repaired, (TOO_DEEP,)) if is_deep else content


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def _depth(text: str) -> int:
    deepest = depth = 0
    for mark in re.findall(r"[{}\[\]]", text):
        depth += 1 if mark in "{[" else -1
        deepest = max(deepest, depth)
    return deepest


# --- from JSON to results --------------------------------------------------------------------------------------------


def _sections_in(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(name).strip().lower(): value for name, value in values.items() if str(name).strip().lower() in SECTIONS
    }


def _unwrapped(values: Mapping[Any, Any], problems: list[str]) -> Mapping[Any, Any]:
    """The object with sections in it where there are none beside it: that of `{"video": {"summary": ...}}`."""
    while not _sections_in(values) and not _is_event(values):
        inner = [(name, value) for name, value in values.items() if isinstance(value, Mapping)]
        if len(inner) != 1:
            break
        problems += _unread(values, inner[0][0])
        values = inner[0][1]
    return values


def _unread(values: Mapping[Any, Any], wrapper: Any = None) -> list[str]:
    """A problem for each name that means nothing here but holds something."""
    known = _sections_in(values)
    names = [str(name) for name, value in values.items() if name != wrapper and _text(value)]
    unknown = [name for name in names if name.strip().lower() not in known]
    return [f"{name[:60]!r} is none of the sections {', '.join(SECTIONS)}" for name in unknown]


def _text(value: Any) -> str:
    """Text as it is, of lists and objects what they hold: "red, blue", "colour: red"."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return ", ".join(filter(None, map(_text, value)))
    if isinstance(value, Mapping):
        parts = ((name, _text(part)) for name, part in value.items())
        return ", ".join(f"{name}: {part}" for name, part in parts if part)
    return "" if value is None else str(value)


def _writings(value: Any) -> Iterator[WrittenText]:
    """What is written in the scene: each entry, or the text that it names."""
    for entry in _listed(value):
        named = _first(entry, WRITING_NAMES) if isinstance(entry, Mapping) else None
        text = _text(entry if named is None else named)
        if text:
            yield WrittenText(text, *(_times(entry) if named is not None else (None, None)))


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def _first(entry: Mapping[Any, Any], names: tuple[str, ...]) -> Any:
    lowered = {str(name).strip().lower(): value for name, value in entry.items()}
    return next((lowered[name] for name in names if lowered.get(name) is not None), None)


def _is_event(entry: Mapping[Any, Any]) -> bool:
    return _first(entry, START_NAMES + END_NAMES + RANGE_NAMES) is not None


def _events(value: Any, problems: list[str]) -> Iterator[Event]:
    for number, entry in enumerate(_listed(value), start=1):
        if not isinstance(entry, Mapping):
            problems.append(f"event {number} is {str(entry)[:60]!r}, not an object")
            continue
        start, end = _times(entry)
        event = Event(start, end, _text(_first(entry, DESCRIPTION_NAMES)))
        if start is None or end is None:
            problems.append(f"event {number} lacks {'a start' if start is None else 'an end'} that is a time")
        elif end < start:
            problems.append(f"event {number} ends at {end:g} s, before it starts at {start:g} s")
        yield event


def _times(
    entry: Mapping[Any, Any], starts: tuple[str, ...] = START_NAMES, ends: tuple[str, ...] = END_NAMES
) -> tuple[float | None, float | None]:
    start, end = parse_seconds(_first(entry, starts)), parse_seconds(_first(entry, ends))
    both = _first(entry, RANGE_NAMES)
    if start is None and end is None and both is not None:
        parts = both if isinstance(both, list) else RANGE.split(both, maxsplit=1) if isinstance(both, str) else [both]
        times = [parse_seconds(part) for part in parts[:2]]
        start, end = times[0] if times else None, times[1] if len(times) == 2 else None
    return start, end


def _objects(value: Any, problems: list[str]) -> Iterator[NamedObject]:
    if isinstance(value, Mapping) and _first(value, NAME_NAMES + DETAIL_NAMES) is None:  # {"door": "red"}
        value = [{"name": str(name), "description": part} for name, part in value.items()]
    for number, entry in enumerate(_listed(value), start=1):
        if isinstance(entry, Mapping):
            name = _text(_first(entry, NAME_NAMES))
            if name:
                times = _times(entry, FIRST_SEEN_NAMES, LAST_SEEN_NAMES)
                yield NamedObject(name, _text(_first(entry, DETAIL_NAMES)), *times)
            else:
                problems.append(f"object {number} lacks a name: {_text(entry)[:60]!r}")
        elif _text(entry):
            yield NamedObject(_text(entry))


def _scene(value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, Mapping):
        return tuple((str(name), _text(part)) for name, part in value.items() if _text(part))
    return (("description", _text(value)),) if _text(value) else ()


def _activities(value: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names and texts; a list or a text without a name is the primary activity."""
    named = value if isinstance(value, Mapping) else {"primary": value}
    for name, part in named.items():
        texts = tuple(filter(None, map(_text, _listed(part))))
        if texts:
            yield str(name), texts
