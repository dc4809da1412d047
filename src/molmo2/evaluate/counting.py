"""Scores of counts: is the number right, and is it close?

Source of the definitions: the published evaluation of Molmo2, which has three defects. `strict=True` reproduces them,
for comparisons with published numbers; by default they are mended.
"""

import re

from molmo2.evaluate.pointing import Scores
from molmo2.grounding.parse import parse_grounding

WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}")
TOTAL = re.compile(r"\ba total of (\d{1,18})|\bthe total number\b.*? is: ?(\d{1,18})", re.S)
NONE = re.compile(r"\bthere are none\b")
# fmt: off
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # from 0
# fmt: on
NUMBER_WORDS = {
    **{word: number for number, word in enumerate(UNITS)},
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
    "hundred": 100,
}


def image_counting(answer: str, count: int, *, strict: bool = False) -> Scores:
    """`correct`, `close` (within 1) and `valid` of a count in one image (pixmo-count).

    The predicted number is the total that the answer states, or the number of its points where it states none.

    Args:
        strict: The stated total is ignored: the points alone are counted, as published.
    """
    grounding = parse_grounding(answer, kind="image")
    stated = None if strict else grounding.count
    return _count_scores(len(grounding.points) if stated is None else stated, count, 1)


def video_counting(answer: str, count: int, *, strict: bool = False) -> Scores:
    """`correct`, `close` and `valid` of a count in a video (VideoCountEval).

    The predicted number is the whole answer, or N in "a total of N" or "the total number ... is: N", or 0 for "There
    are none."; another answer is invalid, and neither correct nor close. Close is within 1 + 5 % of the true count,
    rounded down.

    Args:
        strict: "There are none." is invalid, as published, where its pattern never matches.
    """
    text = answer.strip().lower().removesuffix(".")
    predicted: int | None = None
    if WHOLE_NUMBER.fullmatch(text):
        predicted = int(text)
    elif total := TOTAL.search(text):
        predicted = int(total[1] or total[2])
    elif not strict and NONE.search(text):
        predicted = 0
    return _count_scores(predicted, count, 1 + count // 20)


def countbench(answer: str, count: int, *, strict: bool = False) -> Scores:
    """`correct`, `close` (within 1) and `valid` of a count in words or digits (CountBenchQA).

    The predicted number is the first word of the answer, in digits or spelled out, or N in "a total of N", or 0 where
    the answer contains "none".

    Args:
        strict: Any number that was found counts as 1, as published, where it is overwritten.
    """
    words = re.findall(r"\d{1,3}(?:,\d{3})+|[^\W_]+", answer.lower())
    first = words[0].replace(",", "") if words else ""
    predicted: int | None = None
    if WHOLE_NUMBER.fullmatch(first):
        predicted = int(first)
    elif first in NUMBER_WORDS:
        predicted = NUMBER_WORDS[first]
    elif total := re.search(r"\ba total of (\d{1,18})", answer.lower()):
        predicted = int(total[1])
    elif "none" in words:
        predicted = 0
    return _count_scores(1 if strict and predicted is not None else predicted, count, 1)


def _count_scores(predicted: int | None, count: int, tolerance: int) -> Scores:
    if predicted is None:
        return {"correct": 0.0, "close": 0.0, "valid": 0.0}
    error = abs(predicted - count)
    return {"correct": float(error == 0), "close": float(error <= tolerance), "valid": 1.0}
