r"""Questions about images and clips of the world, with exact answers in the model's notation.

Point to the red circles.            <points coords="1 1 204 655 2 731 120">red circles</points>
How many red circles are there?      Counting the <points ...>red circles</points> shows a total of 2.
Count the red circles.               2
What colour is the ring?             blue
What is the green object?            letter A
Where is the ring?                   top left
Track the ring.                      <tracks coords="0.0 1 512 340\t0.5 1 530 340">ring</tracks>
nothing there                        There are none. / No tracks available. / 0
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .world import COLOURS, KINDS, Clip, DrawnImage, Thing

NONE, NO_TRACKS = "There are none.", "No tracks available."
MAX_POINTS = 7
GROUP_SEPARATOR = "\t"


@dataclass(frozen=True)
class Place:
    """A object at a key of the answer: an image number from 1, or the time of a sampled frame."""

    key: int | float
    number: int
    thing: Thing


@dataclass(frozen=True)
class Question:
    """A question, its answer, and what the answer is about.

    Attributes:
        task: point, count, number, colour, what, where, track.
        target: (colour or None, kind or None) asked about.
        places: What a perfect answer points at, in the order of the answer.
    """

    task: str
    text: str
    answer: str
    target: tuple[str | None, str | None] = (None, None)
    places: tuple[Place, ...] = ()


def image_number(key: int, place: int) -> int:
    """Number of a object in a set of images."""
    return 100 * key + place


def clip_key(seconds: float) -> float:
    """The time of a frame as answers write it."""
    return round(float(seconds), 1)


def matches(thing: Thing, target: tuple[str | None, str | None]) -> bool:
    colour, kind = target
    return (colour is None or thing.colour == colour) and (kind is None or thing.kind == kind)


def noun(target: tuple[str | None, str | None], plural: bool) -> str:
    """`red circles`, `letter A`, `objects`."""
    colour, kind = target
    head, _, name = ("object" if kind is None else kind).partition(" ")
    head = head if not plural else head + ("es" if head.endswith("s") else "s")
    return " ".join(filter(None, (colour, head, name)))


def _grid(fraction: float) -> str:
    return f"{min(1000, max(0, round(1000 * fraction))):03d}"


def _key(key: int | float) -> str:
    return f"{key:.1f}" if isinstance(key, float) else str(key)


def _ordered(places: Sequence[Place]) -> list[Place]:
    return sorted(places, key=lambda place: (place.key, _grid(place.thing.x), _grid(place.thing.y)))


def _tag(kind: str, label: str, places: Sequence[Place], ids: Sequence[int]) -> str:
    groups: dict[str, list[str]] = {}
    for place, number in zip(places, ids):
        triple = f"{number} {_grid(place.thing.x)} {_grid(place.thing.y)}"
        groups.setdefault(_key(place.key), []).append(triple)
    coords = GROUP_SEPARATOR.join(f"{key} {' '.join(triples)}" for key, triples in groups.items())
    return f'<{kind} coords="{coords}">{label}</{kind}>'


def point(target: tuple, places: Sequence[Place], plural: bool) -> Question:
    label, places = noun(target, plural), _ordered(places)
    answer = _tag("points", label, places, range(1, len(places) + 1)) if places else NONE
    return Question("point", f"Point to the {label}.", answer, target, tuple(places))


def count(target: tuple, places: Sequence[Place]) -> Question:
    label, places = noun(target, True), _ordered(places)
    tag = _tag("points", label, places, range(1, len(places) + 1))
    answer = f"Counting the {tag} shows a total of {len(places)}." if places else NONE
    return Question("count", f"How many {label} are there?", answer, target, tuple(places))


def number_only(target: tuple, places: Sequence[Place]) -> Question:
    return Question("number", f"Count the {noun(target, True)}.", str(len(places)), target, tuple(places))


def track(target: tuple, places: Sequence[Place], plural: bool) -> Question:
    """Each object keeps its identity; identities run in the order of first appearance, then of x, then of y."""
    label, places = noun(target, plural), _ordered(places)
    rows = sorted(zip(places, identities(places)), key=lambda row: (row[0].key, row[1]))
    answer = _tag("tracks", label, [row[0] for row in rows], [row[1] for row in rows]) if rows else NO_TRACKS
    return Question("track", f"Track the {label}.", answer, target, tuple(row[0] for row in rows))


def identities(places: Sequence[Place]) -> list[int]:
    """Numbers from 1 for the objects of a clip, in the order in which the places name them first."""
    ids: dict[int, int] = {}
    return [ids.setdefault(place.number, len(ids) + 1) for place in places]


def where(target: tuple, places: Sequence[Place]) -> Question:
    thing = places[0].thing
    row = ("top", "", "bottom")[min(2, int(3 * thing.y))]
    col = ("left", "", "right")[min(2, int(3 * thing.x))]
    answer = f"{row} {col}".strip() or "centre"
    return Question("where", f"Where is the {noun(target, False)}?", answer, target, tuple(places))


def _pick_target(rng: np.random.Generator, things: Sequence[Thing], none: float) -> tuple[str | None, str | None]:
    """What to ask for: something there, or, with probability `none`, a near miss of it."""
    if not things or rng.random() < none:
        for _ in range(10):
            colours = [thing.colour for thing in things] if things and rng.random() < 0.6 else list(COLOURS)
            kinds = [thing.kind for thing in things] if things and rng.random() < 0.6 else list(KINDS)
            colour, kind = colours[rng.integers(len(colours))], kinds[rng.integers(len(kinds))]
            target = ((colour, kind), (None, kind), (colour, None))[rng.choice(3, p=(0.6, 0.25, 0.15))]
            if not any(matches(thing, target) for thing in things):
                return target
        return ("red", "cross") if not things else _pick_target(rng, things, 0)
    thing = things[rng.integers(len(things))]
    options = ((thing.colour, thing.kind), (None, thing.kind), (thing.colour, None), (None, None))
    return options[rng.choice(4, p=(0.5, 0.25, 0.2, 0.05))]


def _about_one(rng: np.random.Generator, seen: Sequence[Place]) -> Question | None:
    """A colour, what or where question about something that is described by its kind or colour alone."""
    things = first_places(seen)
    task = ("colour", "what", "where")[rng.integers(3)]
    for chosen in (things[index] for index in rng.permutation(len(things))):
        thing = chosen.thing
        places = [place for place in seen if place.number == chosen.number]
        targets = {"colour": [(None, thing.kind)], "what": [(thing.colour, None)]}.get(
            task, [(thing.colour, thing.kind), (None, thing.kind)]
        )
        for target in targets:
            if sum(matches(other.thing, target) for other in things) > 1:
                continue
            if task == "where":
                return where(target, places)
            words = noun(target, False)
            text, answer = (
                (f"What colour is the {words}?", thing.colour)
                if task == "colour"
                else (f"What is the {words}?", thing.kind)
            )
            return Question(task, text, answer, target, tuple(places))
    return None


def first_places(places: Sequence[Place]) -> list[Place]:
    """Where each object is seen first."""
    firsts: dict[int, Place] = {}
    for place in places:
        firsts.setdefault(place.number, place)
    return list(firsts.values())


def _compose(
    rng: np.random.Generator,
    number: int,
    seen: Sequence[Place],
    places_of: Callable[[tuple], list[Place]],
    makers: Sequence[tuple[float, Callable[[tuple, list[Place]], Question]]],
    about_one: float,
    none: float,
) -> list[Question]:
    """`number` different questions, drawn by weight, about the objects at the places where they are seen."""
    things = [place.thing for place in first_places(seen)]
    weights = np.array([weight for weight, _ in makers])
    found: dict[str, Question] = {}
    for _ in range(6 * number):
        if len(found) == number:
            break
        if rng.random() < about_one:
            question = _about_one(rng, seen) if seen else None
        else:
            maker = makers[rng.choice(len(makers), p=weights / weights.sum())][1]
            target = _pick_target(rng, things, none)
            places = places_of(target)
            question = maker(target, places) if len({place.number for place in places}) <= MAX_POINTS else None
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def ask_images(
    rng: np.random.Generator, images: Sequence[DrawnImage], number: int, *, about_one: float = 0.3, none: float = 0.2
) -> list[Question]:
    """Questions about one image or a set of them.

    Args:
        about_one: Fraction of colour, what and where questions (single images only).
        none: Probability that a pointing or counting question asks for something absent.
    """
    everything = [
        Place(index, image_number(index, place), thing)
        for index, image in enumerate(images, start=1)
        for place, thing in enumerate(image.things)
    ]

    def places_of(target: tuple) -> list[Place]:
        return [place for place in everything if matches(place.thing, target)]

    makers = (
        (0.5, lambda target, places: point(target, places, bool(rng.random() < 0.5))),
        (0.35, count),
        (0.15, number_only),
    )
    return _compose(rng, number, everything, places_of, makers, about_one if len(images) == 1 else 0, none)


def ask_clip(
    rng: np.random.Generator,
    clip: Clip,
    times: Sequence[float],
    number: int,
    *,
    about_one: float = 0.15,
    none: float = 0.12,
) -> list[Question]:
    """Questions about a clip whose frames are seen at `times`, in seconds."""
    seen = [Place(clip_key(time), number, thing) for time in times for number, thing in clip.seen_at(time)]

    def all_places(target: tuple) -> list[Place]:
        return [place for place in seen if matches(place.thing, target)]

    makers = (
        (0.7, lambda target, places: track(target, places, bool(rng.random() < 0.3))),
        (0.2, lambda target, places: point(target, first_places(places), bool(rng.random() < 0.5))),
        (0.1, lambda target, places: count(target, first_places(places))),
    )
    return [
        question
        for question in _compose(rng, number, seen, all_places, makers, about_one, none)
        if question.task != "where"  # objects move
    ]


def vocabulary_texts() -> list[str]:
    """Every word, label and phrase that questions and answers are made of, stars included; diamonds need bytes."""
    targets = [(colour, kind) for colour in (None, *COLOURS) for kind in (None, "star", *KINDS)]
    nouns = [noun(target, plural) for target in targets for plural in (False, True)]
    phrases = [
        "Where is the circle?",
        "Point to the circle.",
        "How many circles are there?",
        "Count the circles.",
        "Track the circle.",
    ]
    phrases += ["What colour is the circle?", "What is the red object?", "top left", "top right", "bottom left"]
    phrases += ["bottom right", "centre", "left", "right", "top", "bottom", NONE, NO_TRACKS]
    phrases += ["Counting the", " shows a total of 1."]
    return [*nouns, *(f" {text}" for text in nouns), *phrases]
