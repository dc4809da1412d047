"""What a model says, compared: words exactly, places a little beside, because arithmetic differs between machines."""

import re

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def _tolerance(number: float) -> int:
    """Small numbers count, large ones are places."""
    return 0 if number < 10 else 2 if number < 100 else 20


def assert_same_answer(found: str, stored: str) -> None:
    """Fails where words or counts differ, or a place is off by more than two hundredths."""
    assert NUMBER.sub("#", found) == NUMBER.sub("#", stored)
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(stored), strict=True):
        assert abs(float(one) - float(other)) <= _tolerance(float(other)), (found, stored)
