"""Uploads a converted folder to the Hub: shard by shard, then everything in one commit."""

import fnmatch
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConversionError, OutputError, listing
from .folder import read_folder, read_json
from .shards import INDEX_FILE

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
ADVICE = {
    401: "The token is missing or not valid; log in with `hf auth login`, or set HF_TOKEN.",
    403: "The token may not write there; take one with write access to this repository (Settings > Access Tokens).",
    404: "There is no such repository or branch, or this token may not see it.",
}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> str:
    """Upload a converted folder; what the Hub has already is neither sent nor committed again.

    Shards travel one after the other and are kept by the Hub as soon as they are complete, so after an interruption
    the same call sends only the rest. A single commit at the end makes all files visible together; if none has
    changed, there is no commit. Files and folders whose names begin with a dot, and `__pycache__`, stay here.

    Large files go through Xet storage where `hf_xet` is installed. For a server without it, set `HF_HUB_DISABLE_XET=1`
    in the environment; `HF_ENDPOINT` names another server than huggingface.co.

    Args:
        folder: A complete conversion.
        repo_id: OWNER/NAME, or NAME for a repository of the token's owner; it is created if it does not exist.
        private: Make a new repository private. An existing one must be private already.
        revision: Branch to commit to, started from `main` if it does not exist; None is `main`.
        token: None takes the one that `hf auth login` stored, or HF_TOKEN.
        warn: Called with a message about weights on the Hub that do not belong to this model.
    Returns:
        Address of the repository, or of the branch.
    Raises:
        CheckpointError: If the folder is incomplete; nothing is uploaded then.
        OutputError: If the Hub cannot be reached or refuses, or if the upload is interrupted.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = _files_to_upload(Path(folder))
    api = HfApi(token=_require_token(token))
    _check_repo_id(repo_id)
    with _explained(f"{api.endpoint} cannot be reached, or did not accept '{repo_id}'."):
        repo_id = _require_repository(api, repo_id, private, revision)
        foreign = _weights_among(set(api.list_repo_files(repo_id, revision=revision)) - files.keys())
    if foreign:
        warn(
            f"'{repo_id}' holds weights that do not belong to this model; a client may load them in place of it. "
            f"Delete them there:\n{listing(foreign)}"
        )
    additions = {name: CommitOperationAdd(name, str(path)) for name, path in files.items()}
    stopped = f"The upload to '{repo_id}' stopped. Run the same command again: finished files are not sent again."
    with _explained(stopped):
        for name in _weights_among(files):
            api.preupload_lfs_files(repo_id, [additions[name]], revision=revision, free_memory=False)
        api.create_commit(
            repo_id, list(additions.values()), commit_message="Upload converted Molmo2", revision=revision
        )
    return f"{api.endpoint}/{repo_id}" + ("" if revision is None else f"/tree/{revision}")


def _files_to_upload(folder: Path) -> dict[str, Path]:
    """Files by their paths in the repository.

    Raises:
        CheckpointError: If they are not one complete model.
    """
    try:
        read_json(folder / "config.json")
        tensors = read_folder(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is not a complete conversion and is not uploaded: {error}") from None
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {place.as_posix(): path for place, path in paths.items() if not any(map(_is_hidden, place.parts))}
    shards = {piece.path.name for tensor in tensors.values() for piece in tensor.pieces}
    strange = [name for name in _weights_among(files) if name not in {*shards, INDEX_FILE}]
    if strange:
        raise CheckpointError(f"{folder} holds weights that its index does not name; remove them:\n{listing(strange)}")
    return files


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _weights_among(names: Any) -> list[str]:
    return sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_FILES))


def _require_token(token: str | None) -> str:
    from huggingface_hub import get_token

    token = get_token() if token is None else token
    if token is None:
        raise OutputError(f"Uploading needs a token. {ADVICE[401]}")
    return token


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OutputError(f"'{repo_id}' cannot name a repository; expected OWNER/NAME. {error}") from None


def _require_repository(api: Any, repo_id: str, private: bool, revision: str | None) -> str:
    """Make sure that repository and branch exist; the name of the former with its owner."""
    # Not False: the owner's default visibility applies unless asked otherwise.
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise OutputError(f"'{repo_id}' exists and is public; make it private in its settings, or omit --private.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


@contextmanager
def _explained(situation: str) -> Iterator[None]:
    """Turn whatever goes wrong into one error that says what to do.

    The releases of huggingface_hub differ in their HTTP client and thereby in the classes of its errors, so no class
    is named here; only the status of an HTTP answer matters.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not hasattr(cause, "response"):
            cause = cause.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        advice = ADVICE.get(status, "")
        parts = [situation, "" if status is None else f"It answered {status}.", advice]
        detail = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        raise OutputError(" ".join(filter(None, parts)) + f"\n  {detail}") from error
