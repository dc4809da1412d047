"""Answers in the notation of the specification, made at random, and a plain reader of undamaged ones.

The reader is the model card's way of reading, written from its description: per tag the quoted coordinates, split at
separators; the first word of a group is the key, then triples of which x and y have three or four digits.
"""

from dataclasses import dataclass

from hypothesis import strategies as st

LABELS = st.text(st.sampled_from("abc XYZ-'.,5é中"), max_size=12).map(str.strip)
COORDINATES = st.integers(0, 1000)
FRAMES = ("{}", "Counting the {} shows a total of 3.", "There are 12 {}.", "It is 5 1 500 500 {}")
SEPARATORS = st.sampled_from("\t\t\t;:,")


@dataclass(frozen=True)
class Answer:
    """An answer of one tag and what it says: `rows` of (key, id, x, y), coordinates on the grid."""

    text: str
    mode: str
    rows: tuple
    num_images: int


@st.composite
def answers(draw, modes=("pointing", "multi-image", "video pointing", "tracking")):
    mode = draw(st.sampled_from(modes))
    if mode == "pointing":
        keys = [1]
    elif mode == "multi-image":
        keys = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=5)))
    else:
        keys = [tenths / 10 for tenths in sorted(draw(st.sets(st.integers(0, 900), min_size=1, max_size=5)))]
    rows = []
    for key in keys:
        if mode == "tracking":
            ids = sorted(draw(st.sets(st.integers(1, 120), min_size=1, max_size=4)))
        else:
            ids = range(len(rows) + 1, len(rows) + 1 + draw(st.integers(1, 4)))
        rows += [(key, number, draw(COORDINATES), draw(COORDINATES)) for number in ids]
    groups = [" ".join([str(key), *(f"{n} {x:03d} {y:03d}" for k, n, x, y in rows if k == key)]) for key in keys]
    kind = "tracks" if mode == "tracking" else "points"
    alt = draw(st.none() | LABELS)
    attribute = "" if alt is None else f'alt="{alt}" '
    tag = f'<{kind} {attribute}coords="{draw(SEPARATORS).join(groups)}">{draw(LABELS)}</{kind}>'
    frame = draw(st.sampled_from(FRAMES))
    return Answer(frame.format(tag), mode, tuple(rows), max(2, *map(int, keys)) if mode == "multi-image" else 1)


def card_rows(text):
    """(key, id, x, y) of an undamaged answer, by splitting."""
    rows = []
    for tag in text.split("<")[1:]:
        if not tag.startswith(("points ", "tracks ")) or ' coords="' not in f" {tag}":
            continue
        coords = tag.split('coords="')[1].split('"')[0]
        for separator in ":;,":
            coords = coords.replace(separator, "\t")
        for group in coords.split("\t"):
            key, *words = group.split(" ")
            for place in range(0, len(words) - 2, 3):
                number, x, y = words[place : place + 3]
                if len(x) in (3, 4) and len(y) in (3, 4):
                    rows.append((float(key), int(number), int(x), int(y)))
    return rows
