"""Answers of a model at random: every reader takes any text, in one piece or in many, and finds the same."""

import random
from collections.abc import Iterator

from molmo2.grounding.parse import GroundingStream, parse_grounding
from molmo2.grounding.structured import parse_structured

PIECES = (
    *("<points", "<tracks", "</points>", "</tracks>", " coords=", ' coords="', " alt='a'", " label=", "=", '"', "'"),
    *("&quot;", "&", "\\", "\\t", "\\n", '\\"', "/", ">", "/>", "<", " ", "\t", "\n", ";", ":", ",", "\0", "\ud800"),
    *("1 1 500 500", " 2 003 040", "1.5", "0.", "9", "x1=", ' y1="6"', "There are 5", "Counting the ", "none."),
    *(" shows a total of 3", "{", "}", "[", "]", '"events"', '"timestamp": "0:05 - 0:09"', "```json", "0:05", "cup"),
)
LENGTHS = (1,) * 12 + (2, 30, 65)

Case = tuple[str, tuple[int, ...]]


def cases(seed: int) -> Iterator[Case]:
    """(answer, lengths of the pieces that it comes in) without end."""
    rng = random.Random(seed)
    while True:
        pieces = [rng.choice(PIECES) * rng.choice(LENGTHS) for _ in range(rng.randrange(24))]
        yield "".join(pieces), tuple(rng.randint(1, 80) for _ in range(8)) if rng.random() < 0.7 else (1,)


def run(case: Case) -> None:
    """Read an answer.

    Raises:
        AssertionError: Pieces give another result than the whole, or a point lies outside of the answer.
    """
    answer, sizes = case
    whole = parse_grounding(answer)
    stream, place, turn, points = GroundingStream(), 0, 0, []
    while place < len(answer):
        size = sizes[turn % len(sizes)]
        points += stream.feed(answer[place : place + size])
        place, turn = place + size, turn + 1
    assert stream.close() == whole, "in pieces the answer is another one"
    assert [point.span for point in points] == [point.span for point in whole.points][: len(points)]
    assert all(0 <= point.span[0] < point.span[1] <= len(answer) for point in whole.points)
    assert parse_structured(answer).raw == answer
