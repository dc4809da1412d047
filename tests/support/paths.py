"""Where things lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
REPOSITORY = TESTS.parent
DATA = TESTS / "data"
SHARED = REPOSITORY.parent / "shared"  # reference data beside the checkout, which may be absent
