r"""Points and tracks written as Molmo2's answers write them, for few-shot prompts, corrections and training data.

    format_points({1: [(0.25, 0.4)], 3: [(0.1, 0.125), (0.5, 0.999)]}, "boats")
    ->  <points coords="1 1 250 400\t3 2 100 125 3 500 999">boats</points>

`molmo2.grounding.parse` reads the result back unchanged; what it could not read back is refused. The format is that of
the released models: TABs between images and frames, three digits. Needs nothing but Python.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import index
from typing import Any

GRID = 1000
MAX_ID = 10**9 - 1
SHORTEST_COORDINATE = 100  # coordinates have three digits or more, so no smaller id looks like one
MAX_SECONDS = 1e8
NO_POINTS = "There are none."
NO_TRACKS = "No tracks available."
COUNT_MODES = (None, "after", "before")
TAG_EDGE = re.compile(r"</?(?:points?|tracks?)", re.I)
UNCLOSED_BEFORE_COORDS = re.compile(r"coords\s*=\s*\Z", re.I)

Triple = tuple[int, int, int]  # id, x, y


def format_points(
    points: Any,
    label: str | None = None,
    *,
    sizes: Any = None,
    alt: str | None = None,
    count: str | None = None,
    total: int | None = None,
) -> str:
    """Write points as the answer of a pointing or counting prompt.

    Args:
        points: Positions (x, y), which are those of a single image; or {key: positions}, where a key is the number of
            an image from 1 (int) or seconds in a video (float); or `Point` objects (also a `Grounding`), which bring
            their own keys and ids. Positions get running ids, image after image and frame after frame, in the order
            in which they are given. Ids of `Point` objects need not run on: where one would be taken for the number
            of an image, the key is written once more in front of it.
        label: What is pointed at; None takes that of the `Point` objects, if there are any.
        sizes: If given, positions are pixels of images of these sizes: (width, height), or one of them per image.
            Else they are fractions of width and height, 0..1. `Point` objects know both and need no sizes.
        alt: The text of the `alt` attribute; None takes that of the `Point` objects, or leaves it out.
        count: "after" writes "Counting the <points ...> shows a total of N.", "before" "There are N <points ...>.".
        total: The number that is said; None says how many points there are.
    Returns:
        The answer; "There are none." without points.
    Raises:
        TypeError, ValueError: A position lies outside its image, a key or id is invalid, or a text would not be read
            back unchanged.
    """
    if count not in COUNT_MODES:
        raise ValueError(f"`count` is {count!r}; expected one of {COUNT_MODES}.")
    items = list(points) if not isinstance(points, Mapping) else []
    if items and all(hasattr(item, "x_norm") for item in items):
        label, alt, groups = _shared(items, "label", label), _shared(items, "alt", alt), _groups_of(items)
    else:
        by_key = points if isinstance(points, Mapping) else {1: items}
        groups = _numbered(by_key, sizes)
    number = sum(len(triples) for _, triples in groups)
    if not number:
        return NO_POINTS
    tag = _tag("points", groups, label, alt)
    said = number if total is None else index(total)
    if count == "after":
        return f"Counting the {tag} shows a total of {said}."
    return f"There are {said} {tag}." if count == "before" else tag


def format_tracks(
    tracks: Any, label: str | None = None, *, size: tuple[float, float] | None = None, alt: str | None = None
) -> str:
    """Write tracks as the answer of a tracking prompt.

    Args:
        tracks: {id: {seconds: (x, y)}}, or `Track` objects (also a `Grounding`).
        label: What is tracked; None takes that of the `Track` objects.
        size: If given, positions are pixels of a video of this (width, height); else fractions, 0..1.
        alt: As for `format_points`.
    Returns:
        The answer, times ascending, objects of one time by id; "No tracks available." without any.
    Raises:
        TypeError, ValueError: As `format_points`; also if two positions of an object are printed with the same time.
    """
    objects: list[tuple[int, Iterable[tuple[float, Triple]]]] = []
    if isinstance(tracks, Mapping):
        for number, positions in tracks.items():
            objects.append(
                (number, [(time, _triple(number, at, size, f"object {number}")) for time, at in positions.items()])
            )
    else:
        found = list(getattr(tracks, "tracks", tracks))
        points = [point for track in found for point in track.points]
        if points:
            label, alt = _shared(points, "label", label), _shared(points, "alt", alt)
        objects = [(track.id, [(point.key, _grid_triple(point)) for point in track.points]) for track in found]
    by_time: dict[str, list[Triple]] = {}
    for number, places in objects:
        for time, triple in places:
            group = by_time.setdefault(_seconds(float(time)), [])
            if any(other[0] == triple[0] for other in group):
                raise ValueError(
                    f"Object {number} has two positions at {_seconds(float(time))} s, the precision of the format. "
                    "Keep one of them."
                )
            group.append(triple)
    if not by_time:
        return NO_TRACKS
    groups = [(time, sorted(by_time[time])) for time in sorted(by_time, key=float)]
    return _tag("tracks", groups, label, alt)


# --- groups of points ------------------------------------------------------------------------------------------------


def _numbered(by_key: Mapping[Any, Iterable[Any]], sizes: Any) -> list[tuple[str, list[Triple]]]:
    """Positions with running ids, keys ascending."""
    groups: list[tuple[str, list[Triple]]] = []
    number = 0
    for key in sorted(by_key):
        triples = []
        for at in by_key[key]:
            number += 1
            triples.append(_triple(number, at, _size(sizes, key), f"point {number} of {_key(key)}"))
        if triples:
            groups.append((_key(key), triples))
    return _merged(groups)


def _groups_of(points: Sequence[Any]) -> list[tuple[str, list[Triple]]]:
    groups = _merged([(_key(point.key), [_grid_triple(point)]) for point in points])
    return [part for group in groups for part in _unmistakable(*group)]


def _unmistakable(key: str, triples: list[Triple]) -> Iterator[tuple[str, list[Triple]]]:
    r"""A group, split before ids that do not continue and that a reader would take for the number of the next image.

    It would where a TAB may have become a space: in "1 1 100 100 7 002 500 123 300 300" image 7 may follow image 1,
    with point 2 at 500 123. Written as "1 1 100 100\t1 7 002 500 123 300 300" it is point 7 of image 1.
    """
    start = 0
    for place in range(1, len(triples) - 1):
        (last, _, _), (number, x, _), (following, _, _) = triples[place - 1 : place + 2]
        is_like_an_id = x == last + 1 and following >= SHORTEST_COORDINATE
        if is_like_an_id and number != last + 1 and "." not in key and number > int(key):
            yield key, triples[start:place]
            start = place
    yield key, triples[start:]


def _merged(groups: list[tuple[str, list[Triple]]]) -> list[tuple[str, list[Triple]]]:
    """Neighbours with the same printed key as one group."""
    merged: list[tuple[str, list[Triple]]] = []
    for key, triples in groups:
        if merged and merged[-1][0] == key:
            merged[-1][1].extend(triples)
        else:
            merged.append((key, list(triples)))
    return merged


def _shared(points: Sequence[Any], name: str, given: str | None) -> str | None:
    """The label or alt text to write: as given, or as the points have it."""
    if given is not None:
        return given
    texts = list(dict.fromkeys(getattr(point, name) for point in points))
    if len(texts) > 1:
        raise ValueError(
            f"The points have several {name}s, {texts}, but a tag has one. Pass `{name}`, or write one each."
        )
    return texts[0]


# --- numbers ---------------------------------------------------------------------------------------------------------


def _key(key: Any) -> str:
    if isinstance(key, float):
        return _seconds(key)
    try:
        number = index(key)
    except TypeError:
        raise TypeError(f"{key!r} is no key. Pass the number of an image (int) or seconds (float).") from None
    if not 1 <= number <= MAX_ID:
        raise ValueError(f"There is no image number {number}; the first is 1. Pass seconds as a float.")
    return str(number)


def _seconds(seconds: float) -> str:
    if not 0 <= seconds < MAX_SECONDS:
        raise ValueError(f"{seconds!r} is no time in a video; expected seconds from 0.")
    return f"{seconds:.1f}"


def _size(sizes: Any, key: Any) -> tuple[float, float] | None:
    if sizes is None:
        return None
    if len(sizes) == 2 and not any(hasattr(side, "__len__") for side in sizes):
        return sizes[0], sizes[1]
    place = 0 if isinstance(key, float) else index(key) - 1
    if not 0 <= place < len(sizes):
        raise ValueError(f"There are {len(sizes)} size(s), but points in image {key}. Pass one size per image.")
    return sizes[place]


def _triple(number: Any, at: Any, size: tuple[float, float] | None, where: str) -> Triple:
    x, y = at
    width, height = (1, 1) if size is None else size
    return _id(number), _on_grid(x, width, "x", where), _on_grid(y, height, "y", where)


def _grid_triple(point: Any) -> Triple:
    return _triple(point.id, (point.x_norm, point.y_norm), None, f"point {point.id}")


def _id(number: Any) -> int:
    number = index(number)
    if not 0 <= number <= MAX_ID:
        raise ValueError(f"{number} is no id; expected a number from 0 to {MAX_ID}.")
    return number


def _on_grid(position: float, length: float, axis: str, where: str) -> int:
    if not 0 <= position <= length:
        hint = "Pixels need `sizes`." if length == 1 else "The size is (width, height)."
        raise ValueError(f"{axis} of {where} is {position!r}, outside of 0..{length}. {hint}")
    return round(GRID * position / length)


# --- text ------------------------------------------------------------------------------------------------------------


def _tag(kind: str, groups: Iterable[tuple[str, list[Triple]]], label: str | None, alt: str | None) -> str:
    coords = "\t".join(
        " ".join([key, *(f"{number} {x:03d} {y:03d}" for number, x, y in triples)]) for key, triples in groups
    )
    attribute = "" if alt is None else f" alt={_quoted(alt)}"
    return f'<{kind}{attribute} coords="{coords}">{_content(label)}</{kind}>'


def _content(label: str | None) -> str:
    label = "" if label is None else label
    if label != label.strip() or TAG_EDGE.search(label) is not None:
        raise ValueError(
            f"The label {label!r} would not be read back as it is: blanks at its ends and tags of points or tracks "
            "have no place in it."
        )
    return label


def _quoted(alt: str) -> str:
    """The text in the quotes that it does not contain."""
    quote = "'" if '"' in alt or "&quot;" in alt else '"'
    if quote in alt or UNCLOSED_BEFORE_COORDS.search(alt) is not None:
        raise ValueError(
            f"The alt text {alt!r} would not be read back as it is: it must not contain both kinds of quotes, nor end "
            "like the beginning of an attribute."
        )
    return f"{quote}{alt}{quote}"
