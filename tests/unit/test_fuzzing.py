"""A share of `make fuzz`: cases of every corpus, each in a watched child, with none that is wrong."""

import subprocess
import sys

import pytest

from scripts import fuzz

SHARES = {
    "answers": 1500,
    "checkpoints": 60,
    "configs": 150,
    "fetch": 40,
    "interruptions": 6,
    "media": 200,
    "prompts": 40,
}


def test_every_corpus_has_a_share_and_a_full_number():
    corpora = {path.stem for path in fuzz.CORPORA.glob("[a-z]*.py")}
    assert corpora == SHARES.keys() == fuzz.FULL.keys()


@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_each_corpus(name):
    counts = fuzz.fuzz(name, 5, float("inf"), SHARES[name])
    assert counts["tried"] == SHARES[name]
    assert counts["wrong"] == 0
    assert counts["refused"] < SHARES[name]  # some are taken
    assert (counts["refused"] > 0) == (name not in ("answers", "interruptions", "prompts"))


# In the place of a corpus: cases that end the child, wait for ever, take memory and raise; then good ones.
BAD = """
import os, time
held = []
def cases(seed):
    yield from (lambda: os.abort(), lambda: time.sleep(1000), lambda: held.append(b'1' * (1 << 27)), lambda: 1 / 0)
    while True:
        yield lambda: None
run = lambda case: case() and None
"""


def test_bad_cases_are_counted_by_the_number_that_brings_them_back(monkeypatch, tmp_path, capsys):
    (tmp_path / "bad.py").write_text(BAD, encoding="utf-8")
    start = (
        "import importlib, sys\nfrom scripts import fuzz\nsys.path.insert(0, sys.argv[1])\n"
        "fuzz.load_corpus, fuzz.CASE_BYTES = importlib.import_module, 1 << 26\n"
        "fuzz.run_cases('bad', 0, int(sys.argv[2]))"
    )
    original = subprocess.Popen

    def popen(command, **options):
        program = [sys.executable, "-c", start, str(tmp_path), command[-1]]
        return original(program, cwd=fuzz.REPOSITORY, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(fuzz, "CASE_SECONDS", 3)
    assert fuzz.fuzz("bad", 0, 100, 6) == {"tried": 6, "refused": 0, "wrong": 4, "ok": 2}
    ended, late, large, raised = capsys.readouterr().out.splitlines()
    assert ended == "bad: seed 0, case 0: wrong: the process ended with status -6"
    assert late == "bad: seed 0, case 1: wrong: no end in 3 seconds"
    assert large.startswith("bad: seed 0, case 2: wrong: 1")
    assert large.endswith(" bytes of memory")
    assert raised == "bad: seed 0, case 3: wrong: ZeroDivisionError: division by zero"
