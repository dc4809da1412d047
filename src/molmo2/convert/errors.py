"""Errors of the converter, sorted by what a script would do about them; each class has its exit code."""


class ConversionError(Exception):
    """Base of all errors that the converter raises on purpose; the message says what to do."""

    exit_code = 1


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


def listing(problems: list[str], limit: int = 40) -> str:
    """The problems, one per line; a very long list is cut and says so."""
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  - ... and {len(problems) - limit} more")
    return "\n".join(lines)
