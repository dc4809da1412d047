"""A skip that is not allowed fails the run where MOLMO2_STRICT says so; what is for the night is left out by day."""

import os
import subprocess
import sys

import pytest

from support.paths import TESTS
from support.skips import ALLOWED, is_allowed, strictness

FILE = """
import pytest

def test_runs():
    pass

def test_allowed():
    pytest.skip("this release has no native Molmo2")

@pytest.mark.skipif(True, reason="for no reason")
def test_silent():
    pass

@pytest.mark.skipif(True, reason="the reference data beside the checkout is not there")
def test_reference():
    pass

@pytest.mark.xfail(strict=True)
def test_known_to_fail():
    assert False

@pytest.mark.nightly
def test_nightly():
    pass
"""


def outcomes(folder, strict="", *options):
    """Outcome of every test of FILE, and of a module that skips as a whole, under the conftest of all tests."""
    (folder / "test_some.py").write_text(FILE, encoding="utf-8")
    (folder / "test_whole.py").write_text('import pytest\npytest.importorskip("no_such_package")\n', encoding="utf-8")
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    command += ["-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(folder), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "MOLMO2_STRICT": strict}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR", "SKIPPED"))]
    return done.returncode, "\n".join(lines)


def failed(lines):
    return sorted(
        line.split("::")[1].split()[0]
        for line in lines.splitlines()
        if line.startswith(("FAILED", "ERROR")) and "::" in line
    )


def test_skips_are_fine_by_default(tmp_path):
    code, lines = outcomes(tmp_path)
    assert code == 0
    assert lines.count("SKIPPED") == 4
    assert "test_nightly" not in lines


def test_strict(tmp_path):
    code, lines = outcomes(tmp_path, "1")
    assert code != 0
    assert "test_whole.py" in lines.split("ERROR", 1)[1]


def test_strict_about_tests(tmp_path):
    code, lines = outcomes(tmp_path, "1", "--continue-on-collection-errors")
    assert code == 1
    assert failed(lines) == ["test_reference", "test_silent"]
    assert lines.count("SKIPPED") == 1


def test_strict_without_reference_data(tmp_path):
    _, lines = outcomes(tmp_path, "without-reference", "--continue-on-collection-errors")
    assert failed(lines) == ["test_silent"]


def test_nightly_runs_when_it_is_named(tmp_path):
    code, lines = outcomes(tmp_path, "", "-m", "nightly")
    assert code == 0
    assert "PASSED test_some.py::test_nightly" in lines


def test_levels(monkeypatch):
    monkeypatch.setenv("MOLMO2_STRICT", "yes")
    with pytest.raises(ValueError, match="'yes'; expected 1, without-reference"):
        strictness()
    assert all(ALLOWED.values())
    assert not is_allowed("for no reason", "1")
