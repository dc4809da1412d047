"""What several files of the repository say has to agree: versions, releases of transformers, make targets."""

import re
from pathlib import Path

import pytest
import yaml

import molmo2

REPOSITORY = Path(__file__).resolve().parents[2]


def text_of(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def releases():
    """The supported releases of transformers, oldest first."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    table = tomllib.loads(text_of("constraints/environments.toml"))["transformers"]
    assert set(table["full_suite"]) <= {*table["others"], table["main"]}
    assert set(table["wide_suite"]) <= set(table["others"])
    selected = [*table["wide"], *table["core"], *table["release_independent"]]
    assert [path for path in selected if not (REPOSITORY / path).exists()] == []
    return [*table["others"], table["main"]]


@pytest.fixture(scope="module")
def targets():
    """The targets that `make help` lists."""
    return re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), re.M)


def test_the_version_stands_in_one_place():
    version = molmo2.__version__
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == version
    sections = re.findall(r"^## (.+)$", text_of("CHANGELOG.md"), re.M)
    assert next(title for title in sections if title != "Unreleased") == version
    assert re.search(r'^dynamic = \["version"\]', text_of("pyproject.toml"), re.M)


def test_the_workflow_runs_every_release(releases):
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    assert jobs["suite"]["strategy"]["matrix"]["release"] == releases


def test_the_readme_names_every_release(releases):
    assert [release for release in releases if release not in text_of("README.md")] == []


def test_every_target_is_listed_and_every_command_is_a_target(targets):
    phony = re.search(r"^\.PHONY: (.*)$", text_of("Makefile"), re.M).group(1).split()
    assert sorted(phony) == sorted(targets)
    pages = ["README.md", "CONTRIBUTING.md", ".github/workflows/ci.yml", ".github/pull_request_template.md"]
    pages += [str(page.relative_to(REPOSITORY)) for page in (REPOSITORY / "docs").glob("*.md")]
    used = {target for page in pages for target in re.findall(r"(?:`|run: |^)make ([a-z-]+)", text_of(page), re.M)}
    assert used <= {*targets, "PYTHON"}


def test_the_workflow_runs_what_the_script_runs(targets):
    steps = re.findall(r"^step (.*)$", text_of(".ci/run"), re.M)
    in_script = {word for step in steps for word in re.split(r"[ ;|]+", step) if word in targets}
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    in_workflow = {command.split()[1] for command in commands} - {"${{"}
    in_workflow |= {target for job in jobs for target in job.get("strategy", {}).get("matrix", {}).get("target", [])}
    # The last two are `check` and the whole suite on the release of development there.
    assert in_workflow == in_script - {"clean", "test"}
