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
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import molmo2.convert.hub as hub_module
from molmo2.convert import CheckpointError
from molmo2.convert.hub import REQUIRED_FILES, HubError, push_folder
from support.checkpoints import REPOSITORY, write_json
from support.fake_hub import POINTER, FakeHub, fake_hub

REPO = "tester/molmo2-tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# Without the pauses between the tries of the library, 20 seconds in all.
PROGRAM = """
import json, sys, time
time.sleep = lambda seconds: None
from molmo2.convert.errors import ConversionError
from molmo2.convert.hub import push_folder
arguments = json.loads(sys.argv[1])
try:
    print(push_folder(warn=lambda text: print("warning:", text, file=sys.stderr), **arguments))
except ConversionError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub():
    with fake_hub(lfs_bytes=100_000) as running:
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
    for name in REQUIRED_FILES:
        write_json(folder / name, {"name": name})
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
    private = ("HF_", "TRANSFORMERS_OFFLINE")  # older releases of huggingface_hub obey the second one, too
    environment = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    environment.update({} if token is None else {"HF_TOKEN": token})
    environment.update(
        HF_ENDPOINT=hub if isinstance(hub, str) else hub.url,
        HF_HOME=str(folder.parent / "home"),
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


def commits(hub: FakeHub, branch: str = "main") -> int:
    """Commits on a branch after the one that creates a repository."""
    return len(hub.repos[REPO].branches[branch]) - 1


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_everything_arrives_in_one_commit(hub, folder):
    pushed = push(hub, folder)
    assert pushed.code == 0, pushed.output + pushed.errors
    assert pushed.output.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.files(REPO) == visible(folder)
    assert commits(hub) == 1
    assert not hub.repos[REPO].private
    assert "warning" not in pushed.errors


def test_weights_are_committed_as_pointers(hub, folder):
    push(hub, folder)
    blobs = hub.repos[REPO].find("main").blobs
    pointers = {path: POINTER.fullmatch(blob) for path, blob in blobs.items()}
    found = {path: match[1].decode() for path, match in pointers.items() if match is not None}
    assert found == {name: sha256(folder / name) for name in SHARDS}
    assert {name: len(blobs[name]) < 200 for name in SHARDS} == dict.fromkeys(SHARDS, True)


def test_second_run_sends_and_commits_nothing(hub, folder):
    push(hub, folder)
    received = hub.num_received_bytes
    assert received == sum((folder / name).stat().st_size for name in SHARDS)
    again = push(hub, folder)
    assert again.code == 0, again.output
    assert hub.num_received_bytes == received
    assert commits(hub) == 1


def test_only_changed_files_are_sent(hub, folder):
    push(hub, folder)
    save_file({"w1": np.zeros((256, 300), np.float32)}, folder / SHARDS[1])
    (folder / "modeling_molmo2.py").write_text("# newer code\n", encoding="utf-8")
    received = hub.num_received_bytes
    assert push(hub, folder).code == 0
    assert hub.num_received_bytes - received == (folder / SHARDS[1]).stat().st_size
    assert commits(hub) == 2
    assert hub.files(REPO) == visible(folder)


def test_large_shards_travel_in_parts(folder):
    with fake_hub(lfs_bytes=100_000, part_bytes=200_000) as hub:
        assert push(hub, folder).code == 0
        assert len(hub.uploads) > len(SHARDS)
        assert hub.files(REPO) == visible(folder)


# --- where it arrives ------------------------------------------------------------------------------------------------


def test_new_repository_can_be_private(hub, folder):
    for _ in range(2):
        assert push(hub, folder, private=True).code == 0
    assert hub.repos[REPO].private
    assert push(hub, folder).code == 0
    assert hub.repos[REPO].private  # an existing repository keeps its visibility


def test_private_upload_to_a_public_repository_is_refused(hub, folder):
    hub.create(REPO)
    pushed = push(hub, folder, private=True)
    assert pushed.code == 7
    assert pushed.output.startswith(f"HubError: {REPO} exists and is public, but a private upload was asked for.")
    assert (hub.num_received_bytes, commits(hub)) == (0, 0)


def test_revision_makes_a_branch_and_leaves_main_alone(hub, folder):
    hub.create(REPO, files={"note.txt": b"kept"})
    for _ in range(2):
        pushed = push(hub, folder, revision="step-500")
        assert pushed.code == 0, pushed.output + pushed.errors
    assert hub.files(REPO) == {"note.txt": b"kept"}
    assert hub.files(REPO, "step-500") == {"note.txt": b"kept", **visible(folder)}


def test_warning_about_weights_of_another_model(hub, folder):
    left = {"model.safetensors": b"old", "model-00003-of-00003.safetensors": b"old", "notes.txt": b"mine"}
    hub.create(REPO, files=dict(left))
    pushed = push(hub, folder)
    assert pushed.code == 0
    assert f"warning: {REPO} also holds weight files of another model" in pushed.errors
    assert "model-00003-of-00003.safetensors" in pushed.errors
    assert "notes.txt" not in pushed.errors
    assert hub.files(REPO) == {**left, **visible(folder)}


def test_a_pull_request_leaves_main_alone_and_can_be_added_to(hub, folder):
    hub.create(REPO, files={"note.txt": b"kept"})
    pushed = push(hub, folder, create_pr=True)
    assert (pushed.code, pushed.output) == (0, f"{hub.url}/{REPO}/discussions/1"), pushed.errors
    assert hub.files(REPO) == {"note.txt": b"kept"}
    assert hub.files(REPO, "refs/pr/1") == {"note.txt": b"kept", **visible(folder)}
    (folder / "README.md").write_text("# Better\n", encoding="utf-8")
    received = hub.num_received_bytes
    assert push(hub, folder, revision="refs/pr/1").code == 0
    assert hub.num_received_bytes == received
    assert hub.files(REPO, "refs/pr/1")["README.md"] == b"# Better\n"
    assert "refs/pr/2" not in hub.repos[REPO].branches


def test_a_pull_request_needs_a_repository_and_a_change(hub, folder):
    pushed = push(hub, folder, create_pr=True)
    assert pushed.code == 7
    assert pushed.output.startswith(f"HubError: There is no repository {REPO} that the token may see")
    assert hub.repos == {}
    push(hub, folder)
    pushed = push(hub, folder, create_pr=True)
    assert pushed.output.startswith(f"HubError: {REPO} already holds all of "), pushed.errors
    assert list(hub.repos[REPO].branches) == ["main"]
    missing = push(hub, folder, revision="refs/pr/7")
    assert missing.output == f"HubError: {REPO} has no pull request 'refs/pr/7'. Open one with --create-pr."
    with pytest.raises(ValueError, match="against main of an existing repository"):
        push_folder(folder, REPO, create_pr=True, revision="dev", token="hf_none")


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_a_dropped_connection_and_the_run_after_it(hub, folder):
    """Whether the library tries again by itself or not: in the end nothing that had arrived was sent twice."""
    hub.drops = 20  # more often than any release retries
    pushed = push(hub, folder)
    assert pushed.code == 7
    assert pushed.output.startswith(f"HubError: The connection to {hub.url} failed or was lost")
    assert pushed.output.endswith("Then run the same command again: files that have arrived are not sent again.")
    assert commits(hub) == 0

    hub.drops, hub.uploads = 0, []
    assert push(hub, folder).code == 0
    assert hub.files(REPO) == visible(folder)
    assert sorted(upload.sha256 for upload in hub.uploads) == sorted(sha256(folder / name) for name in SHARDS)


def test_an_upload_that_broke_off_in_the_second_shard_continues_there(hub, folder):
    hub.drops, hub.drops_after = 20, 1
    assert push(hub, folder).code == 7
    assert [upload.sha256 for upload in hub.uploads if upload.is_complete] == [sha256(folder / SHARDS[0])]
    assert commits(hub) == 0

    hub.drops, hub.uploads = 0, []
    assert push(hub, folder).code == 0
    assert [upload.sha256 for upload in hub.uploads] == [sha256(folder / SHARDS[1])]
    assert hub.files(REPO) == visible(folder)
    assert commits(hub) == 1


def test_a_shard_that_arrived_before_an_interruption_is_not_sent_again(hub, folder):
    hub.create(REPO)
    first = (folder / SHARDS[0]).read_bytes()
    hub.storage[sha256(folder / SHARDS[0])] = first  # what an interrupted run leaves: a file, but no commit
    assert push(hub, folder).code == 0
    assert [upload.sha256 for upload in hub.uploads] == [sha256(folder / SHARDS[1])]
    assert hub.files(REPO) == visible(folder)
    assert commits(hub) == 1


# --- refusals --------------------------------------------------------------------------------------------------------


def test_no_token(hub, folder):
    pushed = push(hub, folder, token=None)
    assert pushed.code == 7
    assert pushed.output.startswith(f"HubError: There is no token for {hub.url}. Log in with `hf auth login`")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (None, "does not accept the token (401: "),
        ("read", f"The token may not write to {REPO} (403: "),
    ],
)
def test_hub_refuses(hub, folder, role, message):
    hub.create(REPO)
    hub.roles = {} if role is None else {"hf_none": role}
    pushed = push(hub, folder)
    assert pushed.code == 7
    assert message in pushed.output
    assert commits(hub) == 0


@pytest.mark.parametrize("repo_id", ["a/b/c", "tester/", "tester/mol mo", "-x", "alone"])
def test_malformed_name(folder, repo_id):
    with pytest.raises(HubError, match=f"^'{repo_id}' is not the name of a repository; expected OWNER/NAME"):
        push_folder(folder, repo_id, token="hf_none")


def test_no_answer(folder):
    with fake_hub() as hub:
        url = hub.url
    pushed = push(url, folder)
    assert pushed.code == 7
    assert pushed.output.startswith(f"HubError: The connection to {url} failed or was lost (")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SHARDS[1]).unlink(), SHARDS[1]),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja"),
        (lambda folder: os.truncate(folder / SHARDS[0], 1000), SHARDS[0]),
    ],
    ids=["shard", "config", "template", "truncated"],
)
def test_incomplete_folder_is_not_uploaded(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        push_folder(folder, REPO, token="hf_none")


def test_weights_outside_the_index_are_not_uploaded(folder):
    save_file({"w0": np.ones(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has weight files beside those of model\.safetensors\.index\.json"):
        push_folder(folder, REPO, token="hf_none")


def test_the_switch_for_xet_is_set_back(folder, monkeypatch):
    """And is touched for servers without Xet alone."""
    for status, expected in ((404, True), (200, False), (401, False)):
        session = SimpleNamespace(get=lambda *_, status=status, **__: SimpleNamespace(status_code=status))
        monkeypatch.setattr(hub_module, "get_session", lambda session=session: session)
        monkeypatch.setattr(hub_module.constants, "HF_HUB_DISABLE_XET", False)
        with hub_module._without_unoffered_xet(hub_module.HfApi(token="hf_none"), REPO, None):
            assert hub_module.constants.HF_HUB_DISABLE_XET is expected
        assert hub_module.constants.HF_HUB_DISABLE_XET is False
