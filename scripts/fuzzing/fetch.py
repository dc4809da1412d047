"""Servers on the loopback interface that answer what no server should."""

import socket
import threading
from collections.abc import Iterator

import numpy as np

from molmo2.image import fetching
from molmo2.image.limits import MediaLimits
from molmo2.image.loading import load_images
from support.clips import load_video
from support.hostile_media import clip, image_bytes, mutated

LIMITS = MediaLimits(
    allow_private_hosts=True, connect_seconds=1, read_seconds=0.3, total_seconds=1, fetch_bytes=1_000_000
)
LINES = (
    b"HTTP/1.1 200 OK", b"HTTP/1.1 302 Found", b"HTTP/1.1 404 Not Found", b"HTTP/1.1 100 Continue", b"HTTP/9 x", b"",
    b"ICY 200 OK", b"HTTP/1.1 999", b"HTTP/1.1 200 " + b"a" * 70_000,
)  # fmt: skip
HEADERS = (
    b"Content-Length: -1", b"Content-Length: 99999999999999", b"Content-Length: x", b"Transfer-Encoding: chunked",
    b"Content-Encoding: gzip", b"Content-Encoding: deflate", b"Content-Encoding: br", b"Location: /again",
    b"Location: file:///etc/passwd", b"Location: http://[", b"Location: gopher://x/", b"Location:", b"\x00\xff: \xff",
    b"Content-Type: text/html", b"X: " + b"a" * 70_000, b": ", b" folded", b"Location: http://\xff/", b"Location: //",
)  # fmt: skip
fetching.getproxies = dict


def cases(seed: int) -> Iterator[tuple[bytes, bool]]:
    rng = np.random.default_rng(seed)
    while True:
        lines = [LINES[0] if rng.random() < 0.5 else LINES[rng.integers(len(LINES))]]
        lines += [HEADERS[rng.integers(len(HEADERS))] for _ in range(rng.integers(0, 4))]
        is_video = bool(rng.random() < 0.3)
        body = clip() if is_video else image_bytes("PNG")
        if rng.random() < 0.5:
            body = mutated(body, rng)
        if rng.random() < 0.2:
            body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        yield b"\r\n".join([*lines, b"", body]), is_video


def run(case: tuple[bytes, bool]) -> str:
    answer, is_video = case
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(2)
        thread = threading.Thread(target=_answer, args=(server, answer), daemon=True)
        thread.start()
        try:
            url = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}/a.png?token=secret"
            (load_video if is_video else load_images)(url, limits=LIMITS)
        except (ValueError, TypeError) as error:
            return "wrong: the message has the password" if "secret" in str(error) else "refused"
    return "ok"


def _answer(server: socket.socket, answer: bytes) -> None:
    try:
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(1)
                connection.recv(1 << 16)
                connection.sendall(answer)
    except OSError:
        return
