"""Requests to an OpenAI endpoint, with the standard library alone: retries, deadlines, server-sent events.

Redirects are not followed and proxies of the environment not used: the key goes to the address that was named, and
nowhere else. No error repeats it.
"""

import http.client
import json
import random
import socket
import ssl
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PASSING_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # may be over when asked again
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0
MAX_RESPONSE_BYTES = 64 * 2**20  # no answer is longer
READ_BYTES = 2**16
MAX_QUOTED_CHARACTERS = 500  # of a server's message in an error
HIDDEN = "***"


class ServerError(RuntimeError):
    """A server refuses a request, or answers what cannot be read.

    Attributes:
        status: The HTTP status; None where there is none.
        reason: What the server says of that status, and advice; the message without the address.
    """

    def __init__(self, message: str, status: int | None = None, reason: str = ""):
        super().__init__(message)
        self.status, self.reason = status, reason


class ServerUnreachable(ServerError):
    """Nothing answers at the address, after all retries."""


class DeadlineExceeded(ServerError):
    """The answer was not complete in time."""


@dataclass(frozen=True)
class Endpoint:
    """An address and how it is asked.

    Attributes:
        base_url: Such as http://127.0.0.1:8000/v1.
        retries: Further attempts where nothing answers, or the server is busy.
    Raises:
        ValueError: The address is none that can be asked; a password in it is not repeated.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    retries: int = 4

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.username is not None or parts.password is not None:
            raise ValueError("The address of the server holds a user or password. Pass `api_key` instead.")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(
                f"{self.quoted(self.base_url)!r} is no server. Pass an address such as http://127.0.0.1:8000/v1."
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("The API key has characters that no key has, such as a line break. Check how it is read.")

    def get(self, path: str, seconds: float) -> Any:
        """The JSON at a path."""
        return self._whole("GET", path, None, time.monotonic() + seconds)

    def post(self, path: str, body: dict[str, Any], seconds: float) -> Any:
        """The JSON that a request gives.

        Raises:
            ServerUnreachable, DeadlineExceeded, ServerError: There is none.
        """
        return self._whole("POST", path, json.dumps(body).encode(), time.monotonic() + seconds)

    def stream(self, path: str, body: dict[str, Any], seconds: float) -> Generator[dict[str, Any], None, None]:
        """The events that a request gives, as they come. Closing the iterator closes the connection.

        Raises:
            ServerError: As `post`; also where the stream breaks off or an event tells of an error.
        """
        deadline = time.monotonic() + seconds
        with closing(self._open("POST", path, json.dumps(body).encode(), deadline)) as exchange:
            for data in _events(exchange.pieces()):
                if data == b"[DONE]":
                    return
                event = self._parsed(data)
                if isinstance(event, dict) and "error" in event:
                    raise ServerError(f"The server broke off: {self.quoted(_message(event))}")
                yield event

    def _whole(self, method: str, path: str, body: bytes | None, deadline: float) -> Any:
        for attempt in range(self.retries + 1):
            with closing(self._open(method, path, body, deadline, attempt)) as exchange:
                try:
                    return self._parsed(b"".join(exchange.pieces()))
                except _Broken as error:
                    if attempt == self.retries:
                        raise ServerError(str(error)) from error
            self._pause(attempt, None, deadline)
        raise ServerError("No attempt was allowed.")

    def _open(self, method: str, path: str, body: bytes | None, deadline: float, attempt: int = 0) -> "_Exchange":
        """A response whose status is good; attempts that fail for a while are repeated."""
        while True:
            exchange = _Exchange(self.base_url, self._shown, deadline)
            try:
                status = exchange.begin(method, path, body, self._headers())
            except TimeoutError as error:
                exchange.close()
                self._check(deadline, error)
                status, failure = 0, str(error)
            except (OSError, http.client.HTTPException) as error:
                exchange.close()
                status, failure = 0, f"{type(error).__name__}: {error}"
            if status == 200:
                return exchange
            wait = exchange.retry_after
            if status:
                failure = exchange.failure()
                exchange.close()
            if attempt >= self.retries or (status and status not in PASSING_STATUSES):
                raise self._error(status, failure)
            self._pause(attempt, wait, deadline)
            attempt += 1

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        return headers if self.api_key is None else {**headers, "Authorization": f"Bearer {self.api_key}"}

    def _error(self, status: int, failure: str) -> ServerError:
        failure = self.quoted(failure)
        if not status:
            return ServerUnreachable(f"Nothing answers at {self._shown} ({failure}). Is the server running there?")
        advice = {
            401: " Set MOLMO2_API_KEY, or pass `api_key`.",
            403: " The key may not do this.",
            404: " Does the address end in /v1, and is the model's name right?",
            413: " Send fewer or smaller images and videos.",
        }.get(status, "")
        if 300 <= status < 400:
            advice = " Redirects are not followed: pass the address that it leads to."
        reason = f"{failure}{advice}"
        return ServerError(f"{self._shown} answers {status}: {reason}", status, reason)

    def _pause(self, attempt: int, wait: float | None, deadline: float) -> None:
        """Wait before the next attempt, as long as the server asks for or longer each time."""
        seconds = min(FIRST_PAUSE_SECONDS * 2**attempt, MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
        seconds = seconds if wait is None else wait
        if time.monotonic() + seconds > deadline:
            raise DeadlineExceeded(f"{self._shown} gives no answer in time: it is busy or does not answer.")
        time.sleep(seconds)

    def _check(self, deadline: float, error: BaseException) -> None:
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(f"{self._shown} gives no answer in time. Raise `timeout`.") from error

    @property
    def _shown(self) -> str:
        """The address for messages."""
        return self.quoted(self.base_url)

    def quoted(self, text: str, length: int = MAX_QUOTED_CHARACTERS) -> str:
        """A text for a message: without the key, as it is or as JSON and Python write it, and only then cut."""
        for form in (self.api_key, json.dumps(self.api_key)[1:-1], repr(self.api_key)[1:-1]) if self.api_key else ():
            text = text.replace(str(form), HIDDEN)
        return text[:length]

    def _parsed(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            shown = self.quoted(content.decode("utf-8", "replace"), 80)
        raise ServerError(f"The server answers {shown!r}, which is no JSON. Does its address end in /v1?")


class _Broken(ServerError):
    """The connection ended amid a response."""


class _Exchange:
    """One request and its response, until a deadline."""

    def __init__(self, base_url: str, shown: str, deadline: float):
        parts = urlsplit(base_url)
        self._prefix, self._shown, self._deadline = parts.path.rstrip("/"), shown, deadline
        kind: Any = http.client.HTTPConnection
        options: dict[str, Any] = {}
        if parts.scheme == "https":
            kind, options = http.client.HTTPSConnection, {"context": ssl.create_default_context()}
        self._connection = kind(parts.hostname, parts.port, timeout=self._seconds_left(), **options)
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None

    def begin(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> int:
        """Send the request; the status of the response."""
        self._connection.connect()
        self._socket = self._connection.sock
        self._set_timeout()
        self._connection.request(method, self._prefix + path, body, headers)
        self._set_timeout()
        self._response = self._connection.getresponse()
        return self._response.status

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait."""
        value = None if self._response is None else self._response.getheader("Retry-After")
        try:
            return None if value is None else max(0.0, float(value))
        except ValueError:  # a date
            return None

    def pieces(self) -> Iterator[bytes]:
        """The body, as it comes.

        Raises:
            DeadlineExceeded: It is not complete in time.
            ServerError: It breaks off, or never ends.
        """
        total = 0
        while self._response is not None:
            self._set_timeout()
            try:
                piece = self._response.read1(READ_BYTES)
            except TimeoutError as error:
                raise self._too_late() from error
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(f"{self._shown} broke off its answer ({type(error).__name__}).") from error
            if not piece:
                if self._response.length:  # of those that were announced
                    raise _Broken(f"{self._shown} broke off its answer.")
                return
            total += len(piece)
            if total > MAX_RESPONSE_BYTES:
                raise ServerError(f"{self._shown} answers more than {MAX_RESPONSE_BYTES} bytes, which is no answer.")
            yield piece

    def failure(self) -> str:
        """The message of a response that is an error."""
        try:
            content = b"".join(self.pieces())
        except ServerError:
            return "(without a message)"
        try:
            return _message(json.loads(content))
        except ValueError:
            return content.decode("utf-8", "replace")

    def close(self) -> None:
        """Close the connection, also amid a response."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def _seconds_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._too_late()
        return left

    def _set_timeout(self) -> None:
        if self._socket is not None:
            self._socket.settimeout(self._seconds_left())

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._shown} gives no answer in time. Raise `timeout`.")


def _events(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The data of server-sent events; comments and other fields are passed over."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _message(content: Any) -> str:
    """What an error says, uncut: of OpenAI in error.message, of FastAPI in detail."""
    found = content
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)
