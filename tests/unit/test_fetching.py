"""Downloads: where they may go, how long and how large they may be, and what is said about those that fail."""

import base64
import gzip
import http.client
import socket
import threading
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from molmo2 import MediaLimitError, MediaLimits
from molmo2.image import fetching
from molmo2.image.fetching import is_public, masked
from molmo2.image.loading import load_images
from support.clips import load_video
from support.hostile_media import clip, image_bytes

LOCAL = MediaLimits(allow_private_hosts=True, connect_seconds=120, read_seconds=120, total_seconds=120)
IMAGE = image_bytes("PNG")
BOMB = gzip.compress(bytes(5_000_000))


def members(content):
    """gzip in several members, one empty, then zeros and what does not belong to it."""
    parts = [gzip.compress(content[:100]), gzip.compress(b""), gzip.compress(content[100:])]
    return parts[0] + bytes(7) + parts[1] + parts[2] + bytes(9) + b"end"


class Handler(BaseHTTPRequestHandler):
    """Answers what the path asks for."""

    asked: list
    ended: threading.Event  # the tests have

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):  # noqa: C901  # a table of answers
        self.asked.append((self.path, dict(self.headers)))
        kind, _, argument = self.path[1:].partition("?")[0].partition("/")
        if kind == "redirect":
            count = int(argument)
            self.answer(b"", 302, Location=f"/redirect/{count - 1}" if count else "/image")
        elif kind == "to":
            self.answer(b"", 307, Location=argument)
        elif kind == "raw":
            self.answer(b"", 301, Location="/bild-ü.jpg".encode(argument).decode("latin-1"))
        elif kind == "status":
            self.answer(IMAGE, int(argument))
        elif kind == "encoded":
            encode = {
                "gzip": gzip.compress,
                "members": members,
                "deflate": zlib.compress,
                "bare": lambda data: zlib.compress(data)[2:-4],
            }
            name = {"bare": "deflate", "members": "gzip"}.get(argument, argument)
            self.answer(encode[argument](IMAGE), Content_Encoding=name)
        elif kind == "bomb":
            self.answer(BOMB, Content_Encoding="gzip")
        elif kind == "bombs":
            self.answer(gzip.compress(bytes(60_000)) * 50, Content_Encoding="gzip")
        elif kind == "nothings":
            self.answer(gzip.compress(b"") * 50, Content_Encoding="gzip", **{"Content-Length": None})
        elif kind == "cutmember":
            self.answer(gzip.compress(IMAGE[:100]) + gzip.compress(IMAGE[100:])[:-20], Content_Encoding="gzip")
        elif kind == "cut":
            self.answer(IMAGE[: len(IMAGE) // 2], **{"Content-Length": len(IMAGE)})
        elif kind == "cutgzip":
            self.answer(gzip.compress(IMAGE)[:-20], Content_Encoding="gzip")
        elif kind == "brotli":
            self.answer(IMAGE, Content_Encoding="br")
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(bytes(1 << 16))
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            while not self.ended.wait(0.05):  # or until the client has left, which raises
                self.wfile.write(IMAGE[:1])
        elif kind == "silent":
            self.ended.wait()
        elif kind == "page":
            self.answer(b"<html>Please log in</html>", Content_Type="image/png")
        elif kind == "clip.mp4":
            self.answer(clip())
        else:
            self.answer(IMAGE)


@pytest.fixture(scope="module")
def server():
    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args):
            pass

    Handler.asked, Handler.ended = [], threading.Event()
    with Quiet(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        Handler.ended.set()
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setattr(fetching, "getproxies", dict)


def refused(reason):
    return pytest.raises(ValueError, match=reason)


def test_images_and_videos_are_downloaded(server):
    expected = load_images(IMAGE)[0]
    for path in (
        "image",
        "redirect/4",
        "encoded/gzip",
        "encoded/members",
        "encoded/deflate",
        "encoded/bare",
        "a b/ü.png?x=1&y=%20z",
    ):
        np.testing.assert_array_equal(load_images(f"{server}/{path}", limits=LOCAL)[0], expected)
    np.testing.assert_array_equal(load_video(f"{server}/clip.mp4", limits=LOCAL)[0], load_video(clip())[0])
    path, headers = Handler.asked[-2]
    assert path == "/a%20b/%C3%BC.png?x=1&y=%20z"
    assert headers["Host"] == server[7:]
    assert {own["User-Agent"] for _, own in Handler.asked[-8:]} == {fetching.USER_AGENT}  # images and videos alike
    assert "molmo2" in fetching.USER_AGENT


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_redirect_with_letters_that_are_not_quoted(server, encoding):
    assert load_images(f"{server}/raw/{encoding}", limits=LOCAL)
    assert Handler.asked[-1][0] == "/bild-%C3%BC.jpg"


def test_escapes_anywhere_in_a_data_url():
    content = bytes(range(250)) * 400 + b"a"
    encoded = base64.b64encode(content).decode()
    assert encoded.endswith("=")
    for quoted in (encoded, encoded.replace("=", "%3D"), encoded.replace("+", "%2B")):
        assert fetching.data_url_bytes(f"data:image/png;base64,{quoted}", "images", LOCAL) == content


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("status/404", "it answered 404 Not Found"),
        ("status/500", "it answered 500"),
        ("redirect/5", "it redirects more than 5 times"),
        ("to/file:///etc/passwd", r"it redirects to .* whose scheme is not accepted"),
        ("to/ftp://example.org/", r"it redirects to .* whose scheme is not accepted"),
        ("cut", r"of [\d,]+ bytes came"),
        ("cutgzip", "compressed content is cut off"),
        ("cutmember", "compressed content is cut off"),
        ("brotli", "has the encoding 'br', which was not asked for"),
        ("page", "cannot be decoded as an image .*unknown format"),
        ("to/http://[::1", "could not be downloaded"),
    ],
)
def test_answers_that_are_no_media(server, path, reason):
    with refused(reason):
        load_images(f"{server}/{path}", limits=LOCAL)
    with refused("could not be downloaded|No video backend|is a text"):
        load_video(f"{server}/{path}", limits=LOCAL)


def test_a_server_that_says_nothing(server):
    short = replace(LOCAL, read_seconds=0.4)
    with refused("TimeoutError"):
        load_images(f"{server}/silent", limits=short)
    with refused("could not be downloaded"):
        load_video(f"{server}/silent", limits=short)


def test_size_is_bounded_while_it_arrives(server):
    for path in ("bomb", "endless", "image"):
        with pytest.raises(MediaLimitError, match=r"over the limit fetch_bytes=100\b"):
            load_images(f"{server}/{path}", limits=replace(LOCAL, fetch_bytes=100))
    for path in ("bomb", "bombs"):
        with pytest.raises(MediaLimitError, match="fetch_bytes=1,000,000"):
            load_video(f"{server}/{path}", limits=replace(LOCAL, fetch_bytes=1_000_000))
    with pytest.raises(MediaLimitError, match="fetch_bytes=999"):
        load_images(f"{server}/nothings", limits=replace(LOCAL, fetch_bytes=999))


def test_an_answer_that_closes_with_its_last_byte(server, monkeypatch):
    """As `read1` of newer versions of Python closes it."""
    read1 = http.client.HTTPResponse.read1

    def closing_read1(self, size):
        chunk = read1(self, size)
        if self.length == 0:
            self.close()
        return chunk

    monkeypatch.setattr(http.client.HTTPResponse, "read1", closing_read1)
    assert load_images(f"{server}/image", limits=LOCAL)[0].shape == (40, 60, 3)
    with refused(r"of [\d,]+ bytes came"):
        load_images(f"{server}/cut", limits=LOCAL)


def test_a_server_that_drips_meets_the_total_deadline(server):
    with refused("it took longer than total_seconds=0.5"):
        load_images(f"{server}/drip", limits=replace(LOCAL, total_seconds=0.5))


def test_private_addresses_are_refused(server, monkeypatch):
    limits = replace(LOCAL, allow_private_hosts=False)
    port = server.rpartition(":")[2]
    hosts = ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "0x7f.1", "127.1")
    for host in hosts:
        with refused(r"its address is private, .*allow_private_hosts=True|gaierror"):
            load_images(f"http://{host}:{port}/image", limits=limits)
    # A name that is public at first and private later: the address that was checked is the one connected to.
    resolved = []

    def resolve(host, port, **kwargs):
        resolved.append(host)
        address = {"public.test": "203.0.113.1" if len(resolved) > 1 else "8.8.8.8"}.get(host, host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connected = []

    def connect(self, address):
        connected.append(address)
        raise ConnectionRefusedError("no")

    monkeypatch.setattr(fetching.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetching.socket.socket, "connect", connect)
    with refused("ConnectionRefusedError: no"):
        load_images("http://public.test/a.png", limits=limits)
    assert (resolved, connected) == (["public.test"], [("8.8.8.8", 80)])


def test_a_redirect_to_a_private_address_is_refused(server, monkeypatch):
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    limits = replace(LOCAL, allow_private_hosts=False)
    assert load_images(f"{server}/image", limits=limits)
    with refused("its address is private"):
        load_images(f"{server}/to/http://169.254.169.254/latest/meta-data/", limits=limits)


PRIVATE = """
10.0.0.1 172.16.3.4 192.168.1.1 127.0.0.9 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1 255.255.255.255
::1 :: fe80::1%eth0 fc00::1 fec0::1 ff02::1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2001:db8::1
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_addresses_that_are_public():
    for address in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address)


def test_user_and_query_are_masked_and_sent_where_they_belong(server):
    url = server.replace("http://", "http://user:s%40cret@") + "/status/403?token=abc"
    for load in (load_images, load_video):
        with pytest.raises(ValueError, match="it answered 403") as caught:
            load(url, limits=LOCAL)
        chain = f"{caught.value!r} {caught.value.__cause__!r}"
        assert "cret" not in chain
        assert "abc" not in chain
    assert Handler.asked[-1][1]["Authorization"] == "Basic dXNlcjpzQGNyZXQ="
    assert masked("https://u:p@h.org:8/a?b#c") == "https://h.org:8/a?..."
    assert masked("http://[::1/a?secret") == "http://... (a malformed address)"


@pytest.mark.parametrize("scheme", ["http", "HTTPS"])
@pytest.mark.parametrize(
    "rest",
    [
        "//bob:hunter2/x@h/a",
        "//bob:hunter2@x@h/a",
        "//bob:123/hunter2@h/a?b",
        "//bob:123#hunter2@h/a",
        "//bob:1?hunter2@h/a",
        "//bob:1/hunter2?x@h/a",
        "//hunter2/x@h/a",
        "/bob:hunter2@h/a",
        "//bob:hunter2@[h/a",
        "//bob:hunter2@h:port/a",
        "//bob:hunter2\r\n@h/a",
        "//bob:hunter2@/a",
        "//bob:hunter2@[::1]x:80/",
        "//h:hunter2/a",
    ],
)
def test_passwords_are_not_repeated_whatever_the_address(scheme, rest, monkeypatch):
    def resolve(*args, **kwargs):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(fetching.socket, "getaddrinfo", resolve)
    for load in (load_images, load_video):
        with pytest.raises(ValueError, match="could not be downloaded") as caught:
            load(f"{scheme}:{rest}", limits=LOCAL)
        assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    "url", ["http://", "http://a b/", "http://x:99999999/", "http://\r\nX: y/", "https://[1", "http://é" * 99]
)
def test_malformed_addresses(url):
    for load in (load_images, load_video):
        with refused("could not be downloaded"):
            load(url, limits=LOCAL)


def test_a_proxy_is_used_for_names_but_not_to_reach_private_addresses(server, monkeypatch):
    monkeypatch.setattr(fetching, "getproxies", lambda: {"http": server})
    limits = replace(LOCAL, allow_private_hosts=False)
    with refused("its address is private"):
        load_images("http://127.0.0.1/image", limits=limits)
    assert load_images("http://8.8.8.8/image", limits=limits)[0].shape == (40, 60, 3)
    assert Handler.asked[-1][0] == "http://8.8.8.8/image"
    load_images("http://8.8.8.8:80/a?b", limits=limits)
    assert Handler.asked[-1][0] == "http://8.8.8.8:80/a?b"
    load_images("http://user:pw@Bücher.invalid:81/ü.png", limits=limits)
    path, headers = Handler.asked[-1]
    assert (path, headers["Host"]) == ("http://xn--bcher-kva.invalid:81/%C3%BC.png", "xn--bcher-kva.invalid:81")


@pytest.mark.parametrize("proxy", ["https://bob:hunter2@p:1", "socks5://p:1", "http://", "ftp://p"])
def test_proxies_of_other_kinds_are_refused(proxy, monkeypatch):
    monkeypatch.setattr(fetching, "getproxies", lambda: {"http": proxy, "https": proxy})
    for scheme in ("http", "https"):
        with refused(f"the proxy that {scheme}_proxy names is no http:// address of a host"):
            load_images(f"{scheme}://8.8.8.8/image")
