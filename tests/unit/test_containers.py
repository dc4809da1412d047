"""The Dockerfile and the compose file hold together: no daemon is needed to see that."""

import re
from pathlib import Path

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
    assert {"cpu", "cuda"} <= built.keys()
    for base, _ in built.values():
        assert base in built or re.search(r":\d+\.\d+", base), base
    for target in ("cpu", "cuda"):
        own = dict(built[target][1])
        assert own["USER"] == "molmo2"
        inherited = dict(built[built[target][0]][1])
        assert "/health" in inherited["HEALTHCHECK"]
        assert inherited["ENTRYPOINT"] == '["molmo2"]'
        assert set(re.findall(r"==(\S+)\"", own["RUN"]))  # pinned


def test_compose_starts_targets_and_commands_that_exist():
    services = yaml.safe_load((REPOSITORY / "containers" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name in ("server-cpu", "server-cuda"):
        service = services[name]
        assert service["build"]["target"] in stages()
        assert (REPOSITORY / "containers" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    for service in services.values():
        command, *options = service.get("command", ["serve"])
        known = {option for parameter in molmo2.commands[command].params for option in parameter.opts}
        assert {option for option in options if option.startswith("--")} <= known
