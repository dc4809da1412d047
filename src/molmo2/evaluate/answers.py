"""Multiple choice and short answers: which option an answer means, ANLS and relaxed accuracy.

Sources: the published evaluation of Molmo2; ANLS: A. F. Biten et al., Scene Text VQA, 2019; relaxed accuracy: A.
Masry et al., ChartQA, 2022.
"""

import random
import re
from collections.abc import Callable, Sequence

from molmo2.evaluate.pointing import Scores

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05


def edit_distance(one: str, other: str) -> int:
    """Number of characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        previous, row[0] = row[0], number
        for place, target in enumerate(other, 1):
            replaced = previous + (character != target)
            previous, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, replaced)
    return row[-1]


# --- multiple choice -------------------------------------------------------------------------------------------------


def by_text(answer: str, options: Sequence[str]) -> int:
    """The option (from 0) that the answer is most like, in lower case.

    The one that equals it; else the only one that it begins with; else the only one that begins with it; else the only
    one that contains it; else the first of least edit distance. Rule `mc` of the published evaluation.
    """
    said, texts = answer.strip().lower(), [option.strip().lower() for option in options]
    if said in texts:
        return texts.index(said)
    tests: list[Callable[[str], bool]] = [
        lambda text: said.startswith(text),
        lambda text: text.startswith(said),
        lambda text: said in text,
    ]
    for test in tests:
        fitting = [number for number, text in enumerate(texts) if test(text)]
        if len(fitting) == 1:
            return fitting[0]
    return min(range(len(texts)), key=lambda number: edit_distance(said, texts[number]))


def by_first_letter(answer: str, options: Sequence[str]) -> int | None:
    """The option whose letter is the first character of the answer: MVBench, MLVU, MotionBench, VideoEvalPro."""
    return _option(answer.strip()[:1], options)


def by_lone_letter(answer: str, options: Sequence[str]) -> int | None:
    """The option of the first capital letter that stands alone: PerceptionTest, Video-MME, LongVideoBench, LVBench."""
    found = re.search(rf"(?<![^\W_])([{LETTERS[: len(options)]}])(?![^\W_])", answer)
    return _option(found[1] if found else "", options)


def by_letter_or_text(answer: str, options: Sequence[str]) -> int | None:
    """The option of a letter in brackets, else before a full stop, else alone, else of the longest text in the answer.

    EgoSchema, NeXT-QA, MuirBench, BLINK, MMIU.
    """
    letters = LETTERS[: len(options)]
    for pattern in (rf"\(([{letters}])\)", rf"(?<![^\W_])([{letters}])\.", rf"(?<![^\W_])([{letters}])(?![^\W_])"):
        if found := re.search(pattern, answer):
            return _option(found[1], options)
    texts = [text.strip().lower() for text in options]
    fitting = [number for number, text in enumerate(texts) if text and text in answer.lower()]
    return max(fitting, key=lambda number: len(options[number]), default=None)


CHOICE_RULES: dict[str, Callable[[str, Sequence[str]], int | None]] = {
    "text": by_text,
    "first_letter": by_first_letter,
    "lone_letter": by_lone_letter,
    "letter_or_text": by_letter_or_text,
}


def multiple_choice(
    answer: str, options: Sequence[str], correct: int, *, rule: str = "text", guess_seed: int | str | None = None
) -> Scores:
    """`correct` and `valid` (an option was found) of a multiple-choice answer.

    Args:
        options: Their texts, without letters.
        correct: Index of the right one, from 0.
        rule: How the option is found, a key of `CHOICE_RULES`.
        guess_seed: Guess where no option was found, as the published evaluation does for MuirBench, BLINK and MMIU;
            the seed (the id of the example, for instance) makes the guess repeatable.
    Raises:
        ValueError: There is no such rule or option.
    """
    if rule not in CHOICE_RULES:
        raise ValueError(f"There is no rule {rule!r}. Use one of {', '.join(CHOICE_RULES)}.")
    if not 0 <= correct < len(options):
        raise ValueError(f"The right option is number {correct}, but there are {len(options)}, counted from 0.")
    chosen = CHOICE_RULES[rule](answer, options)
    is_valid = chosen is not None
    if chosen is None and guess_seed is not None:
        chosen = random.Random(guess_seed).randrange(len(options))
    return {"correct": float(chosen == correct), "valid": float(is_valid)}


def _option(letter: str, options: Sequence[str]) -> int | None:
    place = LETTERS.find(letter) if letter else -1
    return place if 0 <= place < len(options) else None


# --- short answers ---------------------------------------------------------------------------------------------------


def anls(answer: str, references: Sequence[str]) -> Scores:
    """`anls`: 1 - edit distance / length of the longer text, 0 up to 0.5; the best of the references.

    DocVQA, InfoVQA. Case and repeated blanks do not count.

    Raises:
        ValueError: There are no references.
    """
    if not references:
        raise ValueError("ANLS needs at least one reference; found none.")
    said = _folded(answer)
    return {"anls": max(_similarity(said, _folded(reference)) for reference in references)}


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    distance = edit_distance(one, other) / longest if longest else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, reference: str) -> Scores:
    """`correct`: numbers may be off by 5 % of the reference, other answers have to be equal but for case (ChartQA).

    A percentage is a hundredth; "1,234" is a number.
    """
    said, wanted = _number(answer), _number(reference)
    if said is not None and wanted is not None:
        is_correct = abs(said - wanted) <= RELATIVE_TOLERANCE * abs(wanted)
    else:
        is_correct = _folded(answer) == _folded(reference)
    return {"correct": float(is_correct)}


def _number(text: str) -> float | None:
    found = re.fullmatch(r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:e[+-]?\d{1,3})?)\s*(%?)", text.strip(), re.I)
    if not found or not re.search(r"\d", found[1]) or found[1][:1] in "eE":
        return None
    return float(found[1].replace(",", "")) / (100 if found[2] else 1)


def _folded(text: str) -> str:
    return " ".join(text.lower().split())
