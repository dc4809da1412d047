"""What counts as a number, in settings, options and limits. Needs Python alone."""

import math
from numbers import Real
from typing import Any, TypeGuard


def is_whole(value: Any) -> bool:
    """Whether this is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether this is a number above 0 that a float can hold, also a fraction or one of numpy."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
    except OverflowError:
        return False
