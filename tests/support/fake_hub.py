"""A Hub that listens on this machine and keeps what is uploaded to it, for tests of everything that uploads.

It speaks as much of the protocol as uploading takes: who am I, creating and describing repositories, branches, the
question how each file should be sent, Git LFS (batch, parts, completion, verification) and commits. Without
`lfs_bytes`, it declares all files small, and they arrive inside the commit. It does not offer Xet.

Data sets, "datasets/OWNER/NAME", are described, listed and downloaded; nothing is uploaded to them.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

NETWORK_BYTES = 1 << 14
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")


def pointer(sha256: str, size: int) -> bytes:
    """What Git holds in place of a file that is stored with LFS."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(blob: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass
class Commit:
    """A state of a branch: path -> what Git holds, which for a file in LFS is its pointer."""

    oid: str
    title: str
    blobs: dict[str, bytes]


@dataclass
class Repository:
    """Branch -> commits, the oldest first."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # also refs/pr/N
    tags: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, title: str, blobs: dict[str, bytes]) -> Commit:
        number = sum(len(commits) for commits in self.branches.values())
        commit = Commit(hashlib.sha1(f"{branch} {number} {title}".encode()).hexdigest(), title, blobs)
        self.branches.setdefault(branch, []).append(commit)
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or an id names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        ids = {commit.oid: commit for commits in self.branches.values() for commit in commits}
        return self.tags.get(revision, ids.get(revision))


@dataclass
class Upload:
    """A request that carries a file, or a part of one, to the storage."""

    sha256: str
    num_bytes: int
    is_complete: bool


class FakeHub:
    """State of the server.

    Args:
        lfs_bytes: Files of at least this size have to go through LFS; None: no file has to.
        part_bytes: Files larger than this are stored in parts of this size.
    Attributes:
        storage: SHA-256 -> content of the files in LFS.
        uploads: What the storage has received, also in requests that were cut off.
        drops: Number of coming requests to the storage that are cut off halfway,
        drops_after: once this number of files has arrived.
        roles: Token -> "write" or "read"; None: every token may write.
        ignored: Paths that the repository's `.gitignore` keeps out.
        unanswered: Requests that this Hub does not know.
        downloads: Paths that were sent, in this order.
    """

    def __init__(self, url: str, lfs_bytes: int | None = None, part_bytes: int | None = None) -> None:
        self.url = url
        self.lfs_bytes = lfs_bytes
        self.part_bytes = part_bytes
        self.repos: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploads: list[Upload] = []
        self.drops = 0
        self.drops_after = 0
        self.roles: dict[str, str] | None = None
        self.ignored: set[str] = set()
        self.unanswered: list[str] = []
        self.downloads: list[str] = []
        self.lock = threading.Lock()

    @property
    def repositories(self) -> dict[str, dict[str, bytes]]:
        """Content of the main branches: repository -> path -> bytes."""
        return {name: self.files(name) for name in self.repos}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a download of a branch gives: path -> bytes."""
        commit = self.repos[name].find(revision)
        return {} if commit is None else {path: self.resolve(blob) for path, blob in commit.blobs.items()}

    def resolve(self, blob: bytes) -> bytes:
        found = POINTER.fullmatch(blob)
        return blob if found is None else self.storage[found[1].decode()]

    def create(self, name: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        """A repository with a first commit, as the Hub makes them."""
        repository = self.repos[name] = Repository(private)
        repository.commit("main", "initial commit", {} if files is None else files)
        return repository

    @property
    def num_received_bytes(self) -> int:
        return sum(upload.num_bytes for upload in self.uploads)


class Answer(Exception):
    """Ends the handling of a request with something other than success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "create_branch"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/refs", "references"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/xet-write-token/[^/]+", "xet_token"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "describe"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/verify", "lfs_verify"),
        ("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})(/(?P<part>\d+))?", "store"),
        ("POST", r"/storage/(?P<sha256>[0-9a-f]{64})/complete", "complete_parts"),
        ("GET", r"/api/(?P<name>datasets/[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", r"/api/(?P<name>datasets/[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "describe"),
        ("GET", r"/(?P<name>datasets/[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
        ("GET", r"/[^/]+/[^/]+/resolve/.*", "resolve"),
    )

    def log_message(self, *args: Any) -> None:
        """Tests report for themselves."""

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, action in self.ROUTES:  # noqa: B007 - the one that broke out of the loop
            found = re.fullmatch(pattern, path)
            if verb == method and found is not None:
                arguments = {name: unquote(text) for name, text in found.groupdict().items() if text is not None}
                break
        else:
            self._read()
            self.hub.unanswered.append(f"{self.command} {self.path}")
            self._answer({"error": "unknown to the fake hub"}, 501)
            return
        try:
            if action != "store":  # which reads by itself, as much as it likes
                arguments["body"] = self._read()
                self._authorize(method, path)
            with self.hub.lock:
                answer = getattr(self, action)(**arguments)
                self._answer(*(answer if isinstance(answer, tuple) else (answer,)))
        except Answer as refusal:
            headers = {"X-Error-Message": refusal.message}
            headers.update({} if refusal.code is None else {"X-Error-Code": refusal.code})
            self._answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _stream(self) -> Iterator[bytes]:
        """The body as it comes in, a little at a time."""
        is_chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        left = 0 if is_chunked else int(self.headers.get("Content-Length", 0))
        while True:
            if is_chunked:
                left = int(self.rfile.readline(), 16)
            is_last = left == 0
            while left:
                piece = self.rfile.read(min(left, NETWORK_BYTES))
                if not piece:
                    raise ConnectionError("the client is gone")
                left -= len(piece)
                yield piece
            if is_chunked:
                self.rfile.readline()
            if is_last or not is_chunked:
                return

    def _read(self) -> bytes:
        return b"".join(self._stream())

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **({} if headers is None else headers)}.items():
            self.send_header(name, value)
        if content is None:
            self.send_header("ETag", '"stored"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _authorize(self, method: str, path: str) -> None:
        roles = self.hub.roles
        if roles is None or path.startswith("/storage/"):  # addresses of the storage are secret and signed
            return
        role = roles.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if role is None:
            raise Answer(401, "Invalid credentials in Authorization header")
        if method == "POST" and role != "write":
            raise Answer(403, "you must use a write token to upload to a repository.")

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repos:
            raise Answer(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[name]

    def _commit(self, name: str, revision: str) -> Commit:
        commit = self._repository(name).find(revision)
        if commit is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Repositories

    def whoami(self, body: bytes) -> Any:
        return {"name": "tester", "type": "user", "orgs": []}

    def validate_yaml(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def create_repository(self, body: bytes) -> Any:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if name not in self.hub.repos:
            # Recent releases of huggingface_hub name the visibility.
            self.hub.create(name, private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def describe(self, name: str, body: bytes, revision: str = "main") -> Any:
        repository, commit = self._repository(name), self._commit(name, revision)
        files = [{"rfilename": path} for path in commit.blobs]
        about = {"id": name.removeprefix("datasets/"), "sha": commit.oid, "siblings": files}
        return {**about, "private": repository.private, "tags": []}

    def references(self, name: str, body: bytes) -> Any:
        repository = self._repository(name)
        heads = {branch: commits[-1] for branch, commits in repository.branches.items()}
        branches = {name: commit for name, commit in heads.items() if not name.startswith("refs/pr/")}

        def listing(kind: str, commits: dict[str, Commit]) -> Any:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c.oid} for n, c in commits.items()]

        answer = {"branches": listing("heads", branches), "tags": listing("tags", repository.tags), "converts": []}
        if "include_prs=1" in self.path:
            requests = [(n, commit) for n, commit in heads.items() if n not in branches]
            answer["pullRequests"] = [{"name": n, "ref": n, "targetCommit": c.oid} for n, c in requests]
        return answer

    def create_branch(self, name: str, revision: str, body: bytes) -> Any:
        repository = self._repository(name)
        if revision in repository.branches:
            raise Answer(409, f"Reference already exists: {revision}")
        repository.branches[revision] = [*repository.branches["main"]]
        return {}

    def tree(self, name: str, revision: str, body: bytes) -> Any:
        entries = []
        for path, blob in self._commit(name, revision).blobs.items():
            content, entry = self.hub.resolve(blob), {"type": "file", "path": path, "oid": git_oid(blob)}
            if content is not blob:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(blob)}
            entries.append({**entry, "size": len(content)})
        return entries

    def download(self, name: str, revision: str, path: str, body: bytes) -> Any:
        commit = self._commit(name, revision)
        if path not in commit.blobs:
            raise Answer(404, "Entry not found", "EntryNotFound")
        if self.command == "GET":
            self.hub.downloads.append(path)
        about = {"X-Repo-Commit": commit.oid, "ETag": f'"{git_oid(commit.blobs[path])}"'}
        return self.hub.resolve(commit.blobs[path]), 200, {**about, "Content-Type": "application/octet-stream"}

    def resolve(self, body: bytes) -> Any:
        raise Answer(404, "Entry not found", "EntryNotFound")

    def xet_token(self, name: str, body: bytes) -> Any:
        raise Answer(404, "This Hub has no Xet storage")

    # Commits

    def preupload(self, name: str, revision: str, body: bytes) -> Any:
        commit = self._commit(name, revision)
        files = []
        for file in json.loads(body)["files"]:
            is_lfs = self.hub.lfs_bytes is not None and file["size"] >= self.hub.lfs_bytes
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular"}
            blob = commit.blobs.get(file["path"])
            if blob is not None:
                found = POINTER.fullmatch(blob)
                answer["oid"] = git_oid(blob) if found is None else found[1].decode()
            files.append({**answer, "shouldIgnore": file["path"] in self.hub.ignored})
        return {"files": files, "commitOid": commit.oid}

    def commit(self, name: str, revision: str, body: bytes) -> Any:
        blobs = {**self._commit(name, revision).blobs}
        title = ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
            elif entry["key"] == "file":
                blobs[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise Answer(400, f"{value['path']} points to a file that was not uploaded")
                blobs[value["path"]] = pointer(value["oid"], value["size"])
        repository, answer = self.hub.repos[name], {}
        if "create_pr=1" in self.path:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        oid = repository.commit(revision, title, blobs).oid
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True, **answer}

    # Git LFS

    def lfs_batch(self, name: str, body: bytes) -> Any:
        self._repository(name)
        request = json.loads(body)
        return {"transfer": "multipart", "objects": [self._lfs_object(name, wanted) for wanted in request["objects"]]}

    def _lfs_object(self, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where to send a file; nothing of the kind if it is there already."""
        sha256, size, part_bytes = wanted["oid"], wanted["size"], self.hub.part_bytes
        if sha256 in self.hub.storage:
            return wanted
        href, header = f"{self.hub.url}/storage/{sha256}", {}
        if part_bytes is not None and size > part_bytes:
            self.hub.parts[sha256] = {}
            header = {str(part): f"{href}/{part}" for part in range(1, -(-size // part_bytes) + 1)}
            href, header = f"{href}/complete", {**header, "chunk_size": str(part_bytes)}
        verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify", "header": {}}
        return {**wanted, "actions": {"upload": {"href": href, "header": header}, "verify": verify}}

    def store(self, sha256: str, part: str | None = None) -> None:
        content = bytearray()
        is_dropped = self.hub.drops > 0 and len(self.hub.storage) >= self.hub.drops_after
        self.hub.drops -= is_dropped
        length = int(self.headers.get("Content-Length", 0))
        for piece in self._stream():
            content += piece
            if is_dropped and len(content) >= length // 2:
                self.hub.uploads.append(Upload(sha256, len(content), False))
                self._hang_up()
        self.hub.uploads.append(Upload(sha256, len(content), True))
        if part is None:
            self._keep(sha256, bytes(content))
        else:
            self.hub.parts[sha256][int(part)] = bytes(content)

    def _hang_up(self) -> None:
        """Cut the connection the hard way: the client is told at once, without an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        raise ConnectionError("cut off, as the test wished")

    def _keep(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Answer(422, "the content has another SHA-256 than announced")
        self.hub.storage[sha256] = content

    def complete_parts(self, sha256: str, body: bytes) -> Any:
        parts = self.hub.parts.pop(sha256)
        announced = [part["partNumber"] for part in json.loads(body)["parts"]]
        if announced != sorted(parts):
            raise Answer(400, f"parts {announced} are announced; {sorted(parts)} have arrived")
        self._keep(sha256, b"".join(parts[number] for number in announced))
        return {}

    def lfs_verify(self, name: str, body: bytes) -> Any:
        wanted = json.loads(body)
        if len(self.hub.storage.get(wanted["oid"], b"")) != wanted["size"]:
            raise Answer(404, "that file was not uploaded")
        return {}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that were cut off are no news; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError | ValueError):
            super().handle_error(request, client_address)


@contextmanager
def fake_hub(lfs_bytes: int | None = None, part_bytes: int | None = None) -> Iterator[FakeHub]:
    """A running fake Hub; its `url` is what HF_ENDPOINT should say."""
    server = Server(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}", lfs_bytes, part_bytes)
    server.RequestHandlerClass = type("BoundHandler", (Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
