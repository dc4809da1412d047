"""A Hub that listens on this machine and keeps what is uploaded to it, for tests of `push_to_hub`.

It speaks as much of the protocol as creating a repository and committing files takes. Files arrive inside the commit:
the server declares all of them small, so that none takes the way over separate storage.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Content of the repositories: repository -> path -> bytes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.unanswered: list[str] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        """Tests report for themselves."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _repository(self, action: str) -> str:
        """The name in /api/models/<owner>/<name>/<action>/<revision>."""
        return self.path.partition("/api/models/")[2].partition(f"/{action}/")[0]

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            self.hub.repositories.setdefault(name, {})
            self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer({"files": files, "commitOid": COMMIT})
        elif "/commit/" in self.path:
            name = self._repository("commit")
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.hub.repositories[name][entry["value"]["path"]] = content
            self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._refuse()

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self._answer({"name": "tester", "type": "user", "orgs": []})
        elif "/resolve/" in self.path:
            self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        elif self.path.startswith("/api/models/"):
            name = "/".join(self.path.split("/")[3:5])
            files = [{"rfilename": path} for path in self.hub.repositories.get(name, {})]
            self._answer({"id": name, "sha": COMMIT, "siblings": files, "private": False, "tags": []})
        else:
            self._refuse()

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.hub.unanswered.append(f"{self.command} {self.path}")
        self._answer({"error": "unknown to the fake hub"}, 501)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running fake Hub; its `url` is what HF_ENDPOINT should say."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("BoundHandler", (Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
