"""Publishes a converted folder on the Hub: all of it in one commit, and only what is not there yet.

Weight files are sent one by one before anything is committed. The Hub stores each under its SHA-256, so an interrupted
upload resumes with the first file that has not arrived, and half a model is never visible. No local state is kept:
running the same command again resumes. (`upload_large_folder` commits part by part, leaves its bookkeeping in the
folder, and is gone from huggingface_hub 2.)

Where both the Hub and this machine have Xet, huggingface_hub uploads files in chunks, and an interrupted file resumes
where it stopped; otherwise it uses Git LFS, and an interrupted file is sent again from its start.
"""

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

from molmo2.convert.deadlines import DeadlineExceeded, within_deadline
from molmo2.convert.errors import CheckpointError, ConversionError, listing, printable
from molmo2.convert.folder import read_folder
from molmo2.convert.shards import INDEX_FILE, SINGLE_FILE
from molmo2.convert.small_files import read_json
from molmo2.convert.staging import STATE_FILE

COMMIT_MESSAGE = "Upload the converted checkpoint"
# Files that clients read by name; those of code and weights follow from config.json and the index.
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)
# Names under which clients look for weights, and their indices.
WEIGHT_FILE = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")
PULL_REQUEST = re.compile(r"refs/pr/\d+")
NO_SUCH_ROUTE = (404, 405, 501)  # answers of a server without Xet
ANSWER_SECONDS = 120.0  # for a question without files, retries included
MIN_UPLOAD_RATE = 50_000.0  # bytes a second
_XET_SWITCH = threading.Lock()
Result = TypeVar("Result")


class HubError(ConversionError):
    """The Hub cannot be reached, or does not accept the upload."""

    exit_code = 7


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    log: Callable[[str], object] | None = None,
    warn: Callable[[str], object] | None = None,
) -> str:
    """Upload a converted folder. Repeating it sends what is missing, and commits only if something has changed.

    Files that only the repository has stay there; a warning names those that clients could take for weights.

    Args:
        folder: A complete conversion. Hidden files and `__pycache__` are left out.
        repo_id: "owner/name"; created if it does not exist.
        private: Create the repository as private. An existing one keeps its visibility.
        revision: Branch, made from "main" if it does not exist, or "refs/pr/N" for an open pull request; None: "main".
        create_pr: Open a pull request against "main" of a repository that exists, in the place of a commit to it. To
            add to an open one, name it as `revision`.
        token: An access token with write permission; None: the one that huggingface_hub finds (HF_TOKEN, or saved by
            `hf auth login`).
        log: Called with a line for each weight file.
        warn: Called with each warning; None: `warnings.warn`.
    Returns:
        Address of the commit that holds the folder, or of the pull request.
    Raises:
        CheckpointError: If the folder is not a complete conversion.
        HubError: If the Hub cannot be reached, refuses, does not answer in time, or keeps an existing repository
            public in spite of `private`; if there is nothing to open a pull request against, or for.
        ValueError: `create_pr` goes with neither `private` nor `revision`.
    """
    if create_pr and (private or revision is not None):
        raise ValueError(
            "A pull request is opened against main of an existing repository: leave out `private` and `revision`."
        )
    folder = Path(folder)
    files = files_to_publish(folder)
    _ensure_owner_and_name(repo_id)
    log = (lambda _: None) if log is None else log
    api = HfApi(token=token)
    with _explained(api, repo_id):
        if token is None and get_token() is None:
            raise HubError(f"There is no token for {api.endpoint}. {LOGIN_ADVICE}")
        _timely(lambda: _prepare_repository(api, repo_id, private, must_exist=create_pr))
        _timely(lambda: _prepare_branch(api, repo_id, revision))
        with _without_unoffered_xet(api, repo_id, revision):
            commit = _upload(api, repo_id, folder, files, _Destination(revision, create_pr), log)
        if create_pr and commit.pr_url is None:
            raise HubError(f"{repo_id} already holds all of {folder} on main, so no pull request was opened.")
        address = commit.commit_url if commit.pr_url is None else commit.pr_url
        revision = commit.pr_revision if create_pr else revision
        warning = _timely(lambda: _review(api, repo_id, folder, files, revision))
    if warning:
        _warn(warning) if warn is None else warn(warning)
    return address


def _timely(call: Callable[[], Result], num_bytes: int = 0) -> Result:
    """The result of calls to the Hub that send this number of bytes; the client library itself waits forever."""
    seconds = ANSWER_SECONDS + num_bytes / MIN_UPLOAD_RATE
    return within_deadline(call, seconds, "The Hub did not answer")


def files_to_publish(folder: Path) -> list[str]:
    """Files that make up a converted folder, as sorted paths relative to it.

    Raises:
        CheckpointError: If something is missing or damaged, or if there are weights that the index does not know.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a converted one.")
    if (folder / STATE_FILE).exists():
        raise CheckpointError(
            f"{folder} is an unfinished conversion. Finish it with --resume, then upload its OUTPUT."
        )
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    hidden = [path for path in paths if any(part.startswith(".") or part == "__pycache__" for part in path.parts)]
    files = sorted(path.as_posix() for path in set(paths) - set(hidden))
    classes = read_json(folder / "config.json").get("auto_map", {}).values()
    modules = sorted({f"{name.partition('.')[0]}.py" for name in classes})
    missing = [name for name in (*REQUIRED_FILES, *modules) if name not in files]
    if missing:
        raise CheckpointError(f"{folder} is not a complete conversion. Missing:\n{listing(missing)}")
    known = {piece.path.name for tensor in read_folder(folder).values() for piece in tensor.pieces}
    stray = [name for name in files if WEIGHT_FILE.fullmatch(name) and name not in {*known, INDEX_FILE}]
    if stray:
        index = INDEX_FILE if (folder / INDEX_FILE).is_file() else SINGLE_FILE
        raise CheckpointError(
            f"{folder} has weight files beside those of {index}, and clients may mix them. Remove:\n{listing(stray)}"
        )
    return files


def _ensure_owner_and_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        reason = "" if repo_id.count("/") == 1 else "the owner is missing"
    except HFValidationError as error:
        reason = str(error)
    if reason:
        raise HubError(f"{repo_id!r} is not the name of a repository; expected OWNER/NAME ({reason.rstrip('.')}).")


def _prepare_repository(api: HfApi, repo_id: str, private: bool, *, must_exist: bool) -> None:
    try:
        is_private = api.repo_info(repo_id).private
    except RepositoryNotFoundError:
        if must_exist:
            raise HubError(
                f"There is no repository {repo_id} that the token may see, so no pull request can be opened. Leave "
                "--create-pr out to make it."
            ) from None
        api.create_repo(repo_id, private=private, exist_ok=True)
        return
    if private and not is_private:
        raise HubError(
            f"{repo_id} exists and is public, but a private upload was asked for. Make it private in its settings, "
            "choose another repository, or leave out --private to publish there."
        )


def _prepare_branch(api: HfApi, repo_id: str, revision: str | None) -> None:
    if revision is None:
        return
    is_request = PULL_REQUEST.fullmatch(revision) is not None
    references = api.list_repo_refs(repo_id, include_pull_requests=is_request)
    if is_request:
        if revision not in [request.ref for request in references.pull_requests or []]:
            raise HubError(f"{repo_id} has no pull request '{revision}'. Open one with --create-pr.")
        return
    if revision in [tag.name for tag in references.tags]:
        raise HubError(f"'{revision}' is a tag of {repo_id}; expected a branch. Choose another --revision.")
    if revision not in [branch.name for branch in references.branches]:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


@contextmanager
def _without_unoffered_xet(api: HfApi, repo_id: str, revision: str | None) -> Iterator[None]:
    """Context in which huggingface_hub uploads with Git LFS if the server has no Xet; otherwise nothing changes.

    From release 1.0 on it does not ask the server: with hf_xet installed it insists on Xet, and its only switch is a
    constant of the whole process. So the constant is touched for such servers alone, by one upload at a time, and is
    set back. Downloads that other threads start meanwhile do without Xet too, which changes how bytes travel, not
    which ones.
    """
    branch = constants.DEFAULT_REVISION if revision is None else revision.replace("/", "%2F")
    address = f"{api.endpoint}/api/models/{repo_id}/xet-write-token/{branch}"
    answer = _timely(lambda: get_session().get(address, headers=build_hf_headers(token=api.token)))
    if answer.status_code not in NO_SUCH_ROUTE:
        yield
        return
    with _XET_SWITCH:
        before = constants.HF_HUB_DISABLE_XET
        constants.HF_HUB_DISABLE_XET = True
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = before


class _Destination(NamedTuple):
    """Where a commit goes."""

    revision: str | None
    create_pr: bool


def _upload(
    api: HfApi, repo_id: str, folder: Path, files: list[str], destination: _Destination, log: Callable[[str], object]
) -> CommitInfo:
    """Send the weights one after the other, then everything else with the commit."""
    weights = [name for name in files if name.endswith(".safetensors")]
    operations = []
    for number, name in enumerate(weights, 1):
        size = (folder / name).stat().st_size
        log(f"Uploading {printable(name)} ({size:,} bytes), {number} of {len(weights)}.")
        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name)
        send = partial(api.preupload_lfs_files, repo_id, [operation], free_memory=False, **destination._asdict())
        _timely(send, size)
        operations.append(operation)
    others = [name for name in files if name not in weights]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in others]
    size = sum((folder / name).stat().st_size for name in others)
    commit = partial(api.create_commit, repo_id, operations, commit_message=COMMIT_MESSAGE, **destination._asdict())
    return _timely(commit, size)


def _review(api: HfApi, repo_id: str, folder: Path, files: list[str], revision: str | None) -> str:
    """Compare what the repository holds now with the folder; a warning, or ""."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    sizes = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
    absent = [name for name in files if sizes.get(name) != (folder / name).stat().st_size]
    if absent:
        raise HubError(
            f"{repo_id} did not keep these files as they were sent; does its .gitignore exclude them?\n"
            f"{listing(absent)}"
        )
    stale = sorted(name for name in sizes if WEIGHT_FILE.fullmatch(name) and name not in files)
    if not stale:
        return ""
    where = repo_id if revision is None else f"{repo_id}, branch {revision},"
    return printable(
        f"{where} also holds weight files of another model, which clients may mix with the new ones. If they are not "
        f"needed, delete them on the website or with huggingface_hub.HfApi().delete_files:\n{listing(stale)}"
    )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


# Errors

LOGIN_ADVICE = "Log in with `hf auth login`, or set HF_TOKEN to a token of yours with write permission."
CONTINUE_ADVICE = "Then run the same command again: files that have arrived are not sent again."
TRANSPORTS = ("requests", "urllib3", "httpx", "httpx2")  # which one it is depends on the release of huggingface_hub


@contextmanager
def _explained(api: HfApi, repo_id: str) -> Iterator[None]:
    """Context that turns every failure of the client library into a `HubError` that says what to do."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        text = _explanation(error, api.endpoint, repo_id)
        tokens = [token for token in (api.token, get_token()) if isinstance(token, str) and token]
        for token in tokens:
            text = text.replace(token, "...").replace(repr(token)[1:-1], "...")
        # A traceback would show the message of its cause.
        is_secret = any(token in str(cause) for token in tokens for cause in _causes(error))
        raise HubError(text) from None if is_secret or printable(str(error)) != str(error) else error


def _explanation(error: Exception, endpoint: str, repo_id: str) -> str:
    chain = list(_causes(error))
    responses = [found for cause in chain if (found := getattr(cause, "response", None)) is not None]
    if responses:
        return _explain_status(responses[0].status_code, _first_line(error), endpoint, repo_id)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be uploaded. Unset it."
    if any(isinstance(cause, DeadlineExceeded) for cause in chain):
        return f"{endpoint}: {chain[-1]}. Check the network, and HF_ENDPOINT if it is set. {CONTINUE_ADVICE}"
    reason = f"{type(chain[-1]).__name__}: {_first_line(chain[-1])}"
    is_transport = any(type(cause).__module__.partition(".")[0] in TRANSPORTS for cause in chain)
    if is_transport or any(isinstance(cause, ConnectionError | TimeoutError) for cause in chain):
        return (
            f"The connection to {endpoint} failed or was lost ({reason}). Check the network, and HF_ENDPOINT if it is "
            f"set. {CONTINUE_ADVICE}"
        )
    return f"The upload to {repo_id} stopped ({reason}). Remove the cause. {CONTINUE_ADVICE}"


def _explain_status(status: int, message: str, endpoint: str, repo_id: str) -> str:
    if status == 401:
        return f"{endpoint} does not accept the token (401: {message}). {LOGIN_ADVICE}"
    if status == 403:
        owner = repo_id.partition("/")[0]
        return (
            f"The token may not write to {repo_id} (403: {message}). Use a token with write permission that belongs "
            f"to '{owner}' or to a member with write access."
        )
    if status >= 500 or status == 429:
        return f"{endpoint} is down or busy ({status}: {message}). Wait a while. {CONTINUE_ADVICE}"
    return f"{endpoint} does not accept the upload to {repo_id} ({status}: {message})."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ if error.__cause__ is not None or error.__suppress_context__ else error.__context__


def _first_line(error: BaseException) -> str:
    """The most telling line of a message; the Hub's own words come last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
