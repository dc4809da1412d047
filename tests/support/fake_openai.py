"""A small OpenAI endpoint on 127.0.0.1 that says what a test tells it, and remembers what it was asked."""

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """Attributes:
    answer: Text of an answer, or a function of the request's body that gives it.
    failures: (status, headers, body) of the next requests, before any is answered.
    kind: "vllm", "transformers" or "openai": what it looks like.
    silent: Events without text before those of a streamed answer.
    break_after: Pieces of a stream after which the connection ends.
    """

    answer: Any = "Yes."
    failures: list[tuple[int, dict[str, str], str]] = field(default_factory=list)
    kind: str = "openai"
    models: tuple[str, ...] = ("mini",)
    finish_reason: str = "stop"
    silent: int = 0
    break_after: int | None = None
    pause_seconds: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    active: int = 0
    most_active: int = 0
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """Answers for the `FakeServer` that its server holds."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        fake = self.server.fake
        if self.path == "/v1/models":
            owner = {"vllm": "vllm"}.get(fake.kind, "me")
            self._json(200, {"data": [{"id": name, "owned_by": owner} for name in fake.models]})
        elif self.path == "/openapi.json" and fake.kind == "transformers":
            self._json(200, {"paths": {"/load_model": {}, "/v1/chat/completions": {}}})
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self):
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.requests.append(body)
            fake.headers.append(dict(self.headers))
            failure = fake.failures.pop(0) if fake.failures else None
            fake.active += 1
            fake.most_active = max(fake.most_active, fake.active)
        try:
            if failure is not None:
                self._send(failure[0], failure[2].encode(), failure[1])
                return
            time.sleep(fake.pause_seconds)
            text = fake.answer(body) if callable(fake.answer) else fake.answer
            usage = {"prompt_tokens": 30, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 20}}
            if body.get("stream"):
                self._stream(text, usage)
                return
            message = {"message": {"role": "assistant", "content": text}, "finish_reason": fake.finish_reason}
            self._json(200, {"choices": [message], "usage": usage})
        finally:
            with fake.lock:
                fake.active -= 1

    def _stream(self, text, usage):
        fake = self.server.fake
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]} for _ in range(fake.silent)]
        events += [{"choices": [{"delta": {"content": text[place : place + 7]}}]} for place in range(0, len(text), 7)]
        events.append({"choices": [{"delta": {}, "finish_reason": fake.finish_reason}]})
        events.append({"choices": [], "usage": usage})
        for event in events[: fake.break_after]:
            self.wfile.write(b": comment\n\ndata: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()
        if fake.break_after is None:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _json(self, status, content):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve(**options):
    fake = FakeServer(**options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.fake = fake
    server.handle_error = lambda request, address: None  # a client that has hung up
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
