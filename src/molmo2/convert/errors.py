"""Errors of the converter, sorted by what a script would do about them; each class has its exit code.

What a message quotes was written by strangers: `shown` keeps it short, `printable` keeps it from steering a terminal.
"""

import re

MAX_LISTED = 40  # problems of one message
SECRETS = (
    (re.compile(r"hf_\w{6,}"), "hf_..."),  # access tokens of the Hub
    (re.compile(r"(?i)\b(bearer|basic) +[^\s'\",]+"), r"\1 ..."),
    (re.compile(r"(?<=://)[^/\s@'\"]{1,1000}@"), "...@"),  # name and password in an address
    (re.compile(r"(?i)(?<=[?&])(token|key|signature|x-amz-[a-z-]{1,40})=[^&\s'\"]+"), r"\1=..."),
)


def printable(text: str) -> str:
    """A text for terminals: control characters are written as escapes, and tokens and passwords left out."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode("ascii") for char in text
    )


def shown(value: object, limit: int = 100, depth: int = 4) -> str:
    """A value for a message, like `repr`, but of at most `limit` characters; values of any size and depth end here."""
    if isinstance(value, str):
        text = repr(value[:limit])
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        text = f"an integer of {value.bit_length()} bits"  # `repr` refuses more than 4300 digits
    elif isinstance(value, (tuple, list, dict)):
        text = _shown_items(value, limit, depth)
    elif isinstance(value, bytes):
        text = repr(value[:limit])
    else:
        text = repr(value) if value is None or isinstance(value, (int, float, type)) else f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."


def _shown_items(value: tuple | list | dict, limit: int, depth: int) -> str:
    opening, closing = "()" if isinstance(value, tuple) else "[]" if isinstance(value, list) else "{}"
    items: list[str] = []
    for item in value:
        if depth == 0 or sum(len(text) for text in items) > limit:
            items.append("...")
            break
        text = shown(item, limit, depth - 1)
        items.append(f"{text}: {shown(value[item], limit, depth - 1)}" if isinstance(value, dict) else text)
    comma = "," if isinstance(value, tuple) and len(items) == 1 else ""
    return f"{opening}{', '.join(items)}{comma}{closing}"


class ConversionError(Exception):
    """Base of all errors that the converter raises on purpose; the message says what to do."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(printable(message))


class CheckpointError(ConversionError):
    """The checkpoint is missing, incomplete, damaged or unsafe."""

    exit_code = 3


class UnsupportedError(ConversionError):
    """The checkpoint is fine, but Molmo2 in transformers cannot express it."""

    exit_code = 4


class OutputError(ConversionError):
    """The output folder cannot be written."""

    exit_code = 5


class VerificationError(ConversionError):
    """The output differs from its source, or does not load."""

    exit_code = 6


def listing(problems: list[str]) -> str:
    """The problems, one per line; a very long list is cut and says so."""
    lines = [f"  - {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  - ... and {len(problems) - MAX_LISTED} more")
    return "\n".join(lines)
