"""What `--push-to-hub` leaves on a Hub, and what it says when it cannot.

A program of its own uploads through huggingface_hub to a server on this machine; nothing of ours is replaced.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoints import REPOSITORY, write_json
from fake_hub import FakeHub, Repository, fake_hub, large_oid

REPO = "tester/molmo2-tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PROGRAM = """
import json, sys
from convert.errors import ConversionError
from convert.hub import push_folder
arguments = json.loads(sys.argv[1])
try:
    print(push_folder(warn=lambda text: print("warning:", text, file=sys.stderr), **arguments))
except ConversionError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub():
    with fake_hub(large_suffixes=(".safetensors",)) as running:
        yield running
        assert [request for request in running.unanswered if not request.startswith("GET")] == []


@pytest.fixture
def folder(tmp_path) -> Path:
    """Looks like a conversion: two shards of half a megabyte and what belongs to them; also what stays here."""
    folder = tmp_path / "converted"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, name in enumerate(SHARDS):
        save_file({f"w{number}": generator.standard_normal((256, 512)).astype(np.float32)}, folder / name)
    weight_map = {f"w{number}": name for number, name in enumerate(SHARDS)}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {"model_type": "molmo2"})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Molmo2\n", encoding="utf-8")
    (folder / "modeling_molmo2.py").write_text("# code\n", encoding="utf-8")
    (folder / ".cache" / "huggingface" / "note").write_text("private", encoding="utf-8")
    (folder / ".env").write_text("SECRET=1", encoding="utf-8")
    (folder / "__pycache__" / "modeling_molmo2.pyc").write_bytes(b"\0")
    return folder


@dataclass
class Pushed:
    code: int
    output: str
    errors: str


def push(
    hub: FakeHub | str, folder: Path, *, token: str | None = "hf_none", repo_id: str = REPO, **arguments
) -> Pushed:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment.update({} if token is None else {"HF_TOKEN": token})
    environment.update(
        HF_ENDPOINT=hub if isinstance(hub, str) else hub.url,
        HF_HOME=str(folder.parent / "home"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )
    arguments = json.dumps({"folder": str(folder), "repo_id": repo_id, **arguments})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Pushed(done.returncode, done.stdout.strip(), done.stderr)


def visible(folder: Path) -> dict[str, bytes]:
    """The files directly in a folder that are meant to be uploaded."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".env"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_everything_arrives_in_one_commit(hub, folder):
    pushed = push(hub, folder)
    assert (pushed.code, pushed.output) == (0, f"{hub.url}/{REPO}"), pushed.errors
    assert hub.files(REPO) == visible(folder)
    assert hub.store[REPO].commits == [{"branch": "main", "paths": sorted(visible(folder))}]
    assert not hub.store[REPO].private
    assert "warning" not in pushed.errors


def test_weights_are_committed_as_pointers(hub, folder):
    push(hub, folder)
    pointers = {path: large_oid(content) for path, content in hub.store[REPO].branches["main"].items()}
    expected = {name: sha256(folder / name) for name in SHARDS}
    assert {path: oid for path, oid in pointers.items() if oid is not None} == expected
    assert hub.uploads == [expected[name] for name in SHARDS]


def test_second_run_sends_and_commits_nothing(hub, folder):
    push(hub, folder)
    received = hub.received
    again = push(hub, folder)
    assert (again.code, again.output) == (0, f"{hub.url}/{REPO}"), again.errors
    assert hub.received == received == sum((folder / name).stat().st_size for name in SHARDS)
    assert len(hub.store[REPO].commits) == 1


def test_only_changed_files_are_sent_and_committed(hub, folder):
    push(hub, folder)
    save_file({"w1": np.zeros((3, 5), np.float32)}, folder / SHARDS[1])
    (folder / "modeling_molmo2.py").write_text("# newer code\n", encoding="utf-8")
    received = hub.received
    assert push(hub, folder).code == 0
    assert hub.received - received == (folder / SHARDS[1]).stat().st_size
    assert hub.store[REPO].commits[1:] == [{"branch": "main", "paths": [SHARDS[1], "modeling_molmo2.py"]}]
    assert hub.files(REPO) == visible(folder)


def test_single_file_without_index(hub, folder):
    for name in (*SHARDS, "model.safetensors.index.json"):
        (folder / name).unlink()
    save_file({"w": np.ones((2, 3), np.float32)}, folder / "model.safetensors")
    assert push(hub, folder).code == 0
    assert hub.files(REPO) == visible(folder)


# --- where it arrives ------------------------------------------------------------------------------------------------


def test_name_without_owner_belongs_to_the_token(hub, folder):
    for _ in range(2):
        pushed = push(hub, folder, repo_id="molmo2-tiny")
        assert (pushed.code, pushed.output) == (0, f"{hub.url}/{REPO}"), pushed.errors
    assert len(hub.store[REPO].commits) == 1


def test_new_repository_can_be_private(hub, folder):
    for _ in range(2):
        assert push(hub, folder, private=True).code == 0
    assert hub.store[REPO].private
    assert push(hub, folder).code == 0
    assert hub.store[REPO].private


def test_private_upload_to_a_public_repository_is_refused(hub, folder):
    hub.store[REPO] = Repository()
    pushed = push(hub, folder, private=True)
    assert pushed.code == 5
    expected = f"OutputError: '{REPO}' exists and is public; make it private in its settings, or omit --private."
    assert pushed.output == expected
    assert (hub.received, hub.store[REPO].commits) == (0, [])


def test_revision_makes_a_branch_and_leaves_main_alone(hub, folder):
    hub.store[REPO] = Repository(branches={"main": {"note.txt": b"kept"}})
    for _ in range(2):
        pushed = push(hub, folder, revision="step-500")
        assert (pushed.code, pushed.output) == (0, f"{hub.url}/{REPO}/tree/step-500"), pushed.errors
    assert hub.files(REPO) == {"note.txt": b"kept"}
    assert hub.files(REPO, "step-500") == {"note.txt": b"kept", **visible(folder)}
    assert [commit["branch"] for commit in hub.store[REPO].commits] == ["step-500"]


def test_warning_about_weights_of_another_model(hub, folder):
    left = {"model.safetensors": b"old", "model-00003-of-00003.safetensors": b"old", "notes.txt": b"mine"}
    hub.store[REPO] = Repository(branches={"main": dict(left)})
    pushed = push(hub, folder)
    assert pushed.code == 0
    assert (
        f"warning: '{REPO}' holds weights that do not belong to this model; a client may load them in place of it. "
        "Delete them there:\n  - model-00003-of-00003.safetensors\n  - model.safetensors\n"
    ) in pushed.errors
    assert hub.files(REPO) == {**left, **visible(folder)}


# --- interruptions ---------------------------------------------------------------------------------------------------


def middle_of_second_shard(folder: Path) -> int:
    first, second = ((folder / name).stat().st_size for name in SHARDS)
    return first + second // 2


def test_upload_survives_a_dropped_connection(hub, folder):
    hub.drop_at = middle_of_second_shard(folder)
    pushed = push(hub, folder)
    assert pushed.code == 0, pushed.output
    assert hub.drop_at is None
    assert hub.files(REPO) == visible(folder)
    assert hub.uploads == [sha256(folder / name) for name in SHARDS]


def test_interrupted_upload_continues_with_what_is_missing(hub, folder):
    """The connection breaks inside the second shard, and the storage is gone when the library tries again."""
    hub.drop_at = middle_of_second_shard(folder)
    hub.when_dropped = lambda: hub.refusals.update({"PUT /storage/": 410})
    pushed = push(hub, folder)
    assert pushed.code == 5
    expected = f"OutputError: The upload to '{REPO}' stopped. Run the same command again: finished files are not sent"
    assert pushed.output.startswith(expected)
    assert "It answered 410." in pushed.output
    assert hub.uploads == [sha256(folder / SHARDS[0])]
    assert (hub.files(REPO), hub.store[REPO].commits) == ({}, [])

    hub.refusals.clear()
    received = hub.received
    assert push(hub, folder).code == 0
    assert hub.received - received == (folder / SHARDS[1]).stat().st_size
    assert hub.uploads == [sha256(folder / name) for name in SHARDS]
    assert hub.files(REPO) == visible(folder)
    assert len(hub.store[REPO].commits) == 1


# --- refusals --------------------------------------------------------------------------------------------------------


def test_no_token(hub, folder):
    pushed = push(hub, folder, token=None)
    assert pushed.code == 5
    expected = "OutputError: Uploading needs a token. The token is missing or not valid; log in with `hf auth login`"
    assert pushed.output.startswith(expected)
    assert hub.store == {}


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "It answered 401. The token is missing or not valid; log in with `hf auth login`, or set HF_TOKEN."),
        (403, "It answered 403. The token may not write there; take one with write access to this repository"),
    ],
)
@pytest.mark.parametrize("request_line", ["POST /api/repos/create", f"POST /api/models/{REPO}/commit/"])
def test_hub_refuses(hub, folder, status, advice, request_line):
    hub.refusals[request_line] = status
    if "commit" not in request_line:  # neither can the repository be seen
        hub.refusals["GET /api/models/"] = status
    pushed = push(hub, folder)
    assert pushed.code == 5
    assert advice in pushed.output
    assert REPO in pushed.output.partition("It answered")[0]
    assert all(repository.commits == [] for repository in hub.store.values())


@pytest.mark.parametrize("repo_id", ["a/b/c", "tester/", "tester/mol mo", "-x"])
def test_malformed_name(hub, folder, repo_id):
    pushed = push(hub, folder, repo_id=repo_id)
    assert pushed.code == 5
    assert pushed.output.startswith(f"OutputError: '{repo_id}' cannot name a repository; expected OWNER/NAME.")
    assert hub.store == {}


def test_nobody_answers(folder):
    with fake_hub() as hub:
        url = hub.url
    pushed = push(url, folder)
    assert pushed.code == 5
    assert pushed.output.startswith(f"OutputError: {url} cannot be reached, or did not accept '{REPO}'.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SHARDS[1]).unlink(), f"{SHARDS[1]} is missing."),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing; expected a converted folder."),
        (lambda folder: os.truncate(folder / SHARDS[0], 1000), "has 1000 bytes; its header describes "),
    ],
    ids=["shard", "config", "truncated"],
)
def test_incomplete_folder_is_not_uploaded(hub, folder, damage, message):
    damage(folder)
    pushed = push(hub, folder)
    assert pushed.code == 3
    assert pushed.output.startswith(f"CheckpointError: {folder} is not a complete conversion and is not uploaded: ")
    assert message in pushed.output
    assert hub.store == {}


def test_weights_outside_the_index_are_not_uploaded(hub, folder):
    save_file({"w0": np.ones(3, np.float32)}, folder / "model.safetensors")
    pushed = push(hub, folder)
    assert pushed.code == 3
    expected = f"CheckpointError: {folder} holds weights that its index does not name; remove them:"
    assert pushed.output == f"{expected}\n  - model.safetensors"
    assert hub.store == {}
