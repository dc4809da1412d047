"""What docs/differences.md says is true: each row names the tests that show it."""

import fnmatch
import re

from test_golden_processor import DEPARTURES

from support.paths import REPOSITORY, TESTS


def test_differences_name_existing_tests():
    """Every row names tests that exist, and every departure from a recorded case has a row."""
    document = (REPOSITORY / "docs" / "differences.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in document.splitlines() if line.startswith("| ") and "| Test |" not in line]
    assert {len(row) for row in rows} == {4}
    name = re.compile(r"`(test_\w+\.py)::(\w+)(?:\[(.+?)\])?`")
    patterns = set()
    for *_, tests in rows:
        assert name.sub("", tests).strip(" ,|") == ""
        for file, function, cases in name.findall(tests):
            (path,) = TESTS.rglob(file)
            assert f"\ndef {function}(" in path.read_text(encoding="utf-8"), f"{file} has no {function}"
            patterns |= {cases} if cases else set()
    recorded = set(DEPARTURES)
    for cases in patterns:
        assert fnmatch.filter(recorded, cases), f"{cases} fits no departure"
    assert [case for case in sorted(recorded) if not any(fnmatch.fnmatch(case, cases) for cases in patterns)] == []
