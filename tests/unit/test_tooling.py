"""What several files of the repository say has to agree: versions, releases of transformers, make targets."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import molmo2
from scripts import mutate

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGINS = ("vllm", "lmms_eval", "vlmevalkit")  # of other tools, which are not installed here


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


def targets_of(workflow):
    """The make targets that the jobs of a workflow run."""
    jobs = yaml.safe_load(text_of(f".github/workflows/{workflow}.yml"))["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    in_matrix = {target for job in jobs for target in job.get("strategy", {}).get("matrix", {}).get("target", [])}
    return {command.split()[1] for command in commands} - {"${{"} | in_matrix


def test_the_workflow_runs_what_the_script_runs(targets):
    steps = re.findall(r"^step (.*)$", text_of(".ci/run"), re.M)
    in_script = {word for step in steps for word in re.split(r"[ ;|]+", step) if word in targets}
    # The last one is `check` and the whole suite on the release of development there.
    assert targets_of("ci") == in_script - {"clean", "test"}


def test_workflows_run_every_test(targets):
    tests = {target for target in targets if target.startswith("test-")} | {"nightly", "mutate", "fuzz"}
    assert tests - targets_of("ci") - targets_of("nightly") == set()


def test_workflows_allow_the_same_skips():
    names = ("ci", "nightly")
    levels = {yaml.safe_load(text_of(f".github/workflows/{name}.yml"))["env"]["MOLMO2_STRICT"] for name in names}
    assert levels == {"without-reference"}


def test_mutations_fail_where_the_tests_miss_more_than_before(monkeypatch):
    fine = SimpleNamespace(counts={mutate.SURVIVED: 3}, num_tests=9, failed=[])
    assert mutate.problems(0, fine, 3) == []
    for code, change, message in (
        (0, {"counts": {mutate.SURVIVED: 4}}, "4 mutants survived, 3 are allowed"),
        (0, {"num_tests": 0}, "no test ran"),
        (0, {"failed": ["test_a"]}, "1 tests fail without a change"),
        (4, {}, "pytest ended with 4"),
    ):
        assert mutate.problems(code, SimpleNamespace(**{**vars(fine), **change}), 3) == [message]
    codes, commands = iter([0, 1, 0]), []
    monkeypatch.setattr(mutate.subprocess, "call", lambda command: commands.append(command[2:]) or next(codes))
    monkeypatch.setattr("sys.argv", ["mutate.py", "--seed", "12"])
    assert mutate.main() == 1
    assert [command[0] for command in commands] == list(mutate.TARGETS)
    assert all(command[1:] == ["--number", "40", "--seed", "12"] for command in commands)
    for target in mutate.TARGETS.values():
        assert [name for name in target.tests if not (REPOSITORY / "tests" / name).is_file()] == []


def test_every_target_of_the_night_has_its_row():
    rows = {
        target
        for row in re.findall(r"^\| (`make .*?) \|", text_of("CONTRIBUTING.md"), re.M)
        for target in re.findall(r"`make ([a-z-]+)", row)
    }
    assert targets_of("nightly") - rows == set()


def test_the_reference_has_the_module_of_every_public_name():
    packages = [name.parent.name for name in (REPOSITORY / "src/molmo2").glob("*/__init__.py")]
    packages = [importlib.import_module(f"molmo2.{name}") for name in packages if name not in PLUGINS]
    homes = set()
    for package in packages:
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name, None)  # None of a module that nothing has imported yet
            homes.add(getattr(value, "__module__", None) if value is not None else f"{package.__name__}.{name}")
    assert len(homes) > 30
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (REPOSITORY / "docs/api").glob("*.md"))
    documented = set(re.findall(r"^::: (\S+)$", pages, re.M))
    assert {home for home in homes if home and home.startswith("molmo2")} - documented == set()
    assert {"molmo2", *(f"molmo2.{name}" for name in PLUGINS)} - documented == set()  # "molmo2" shows all its names
