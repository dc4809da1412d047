"""The Dockerfile and the compose file hold together: no daemon is needed to see that."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from molmo2.cli.commands import molmo2

REPOSITORY = Path(__file__).resolve().parents[2]
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD", "USER"}


def instructions():
    text = (REPOSITORY / "containers" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def stages():
    """Name -> (what it is built from, its instructions)."""
    found = {}
    for name, rest in instructions():
        assert name in INSTRUCTIONS
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = (base, [])
            continue
        list(found.values())[-1][1].append((name, rest))
    return found


def test_stages_stand_on_named_versions_and_not_on_root():
    built = stages()
    assert {"cpu", "cuda", "app"} <= built.keys()
    for base, _ in built.values():
        assert base in built or re.search(r":\d+\.\d+", base), base
    for target, entry in {"cpu": '["molmo2"]', "cuda": '["molmo2"]', "app": '["python", "-m", "app"]'}.items():
        own = dict(built[target][1])
        assert own["USER"] == "1000"
        found = {**dict(built[built[target][0]][1]), **own}
        assert "urlopen('http://127.0.0.1:" in found["HEALTHCHECK"]
        assert found["ENTRYPOINT"] == entry
        assert set(re.findall(r"==(\S+)\"", own["RUN"]))  # pinned


def test_what_is_copied_is_there_and_not_ignored():
    ignored = {line for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines() if line}
    copied = [rest.split()[0] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    assert len(copied) >= 3
    for source in copied:
        assert (REPOSITORY / source).exists()
        assert source not in ignored


def test_compose_starts_targets_and_commands_that_exist():
    services = yaml.safe_load((REPOSITORY / "containers" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    health = {name: "HEALTHCHECK" in dict(own) for name, (_, own) in stages().items()}
    for name in ("server-cpu", "server-cuda", "app"):
        service = services[name]
        target = service["build"]["target"]
        assert health[target] or health[stages()[target][0]]
        assert (REPOSITORY / "containers" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service.get("depends_on", {}).keys() <= services.keys()
    assert all(entry["condition"] == "service_healthy" for entry in services["app"]["depends_on"].values())
    for name, service in services.items():
        if name == "app":
            known = set(re.findall(r'"(--[a-z-]+)"', (REPOSITORY / "app" / "__main__.py").read_text(encoding="utf-8")))
            options = service["command"]
        else:
            command, *options = service.get("command", ["serve"])
            known = {option for parameter in molmo2.commands[command].params for option in parameter.opts}
        assert {option for option in options if option.startswith("--")} <= known


def test_a_linter_finds_nothing():
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("tools have an environment of their own")
    found = subprocess.run(
        [linter, "--no-color", REPOSITORY / "containers" / "Dockerfile"], capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
