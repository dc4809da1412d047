"""The one place that reaches the network: images and videos by URL, with limits on time, size and destination.

The name of a host is resolved once and the connection goes to the very address that was checked, so that a second
answer of the name server cannot lead elsewhere. Each redirect starts anew.
"""

import base64
import binascii
import http.client
import importlib
import ipaddress
import socket
import ssl
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import IO, Any
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from molmo2.image.limits import MediaLimitError, MediaLimits

USER_AGENT = "Mozilla/5.0 (compatible; molmo2)"  # some servers refuse the defaults of libraries
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 1 << 16
MAX_SECONDS = 1_000_000  # of a download; sockets take no longer timeouts than twice that
SPOOL_BYTES = 1 << 24  # of a download that are kept in memory; what is larger goes to a temporary file
PORTS = {"http": 80, "https": 443}
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"  # not quoted again
GZIP_START = b"\x1f"
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class _Refused(ValueError):
    """A download that is not made or not used; the message says why, without the address."""


def scheme_of(text: str) -> str:
    """The scheme of a URL that media may have ("http", "https", "file" or "data"), or ""."""
    scheme = text[:8].lower().partition(":")
    return scheme[0] if scheme[1] and scheme[0] in ("http", "https", "file", "data") else ""


def masked(url: str) -> str:
    """An http(s) address as it may be printed: without user, password and query, which may hold secrets.

    A "/", "#" or "?" in a password that is not quoted ends the host too early for a parser: all before the last "@" is
    dropped, and nothing is shown where it may be a password that looks like a port.
    """
    address, _, query = url.partition("?")
    scheme, _, rest = address.partition(":")
    if "@" in rest:
        rest = "//" + rest.rpartition("@")[2]
    elif "@" in query and ":" in rest:
        return f"{scheme_of(url)}://..."
    try:
        parts = urlsplit(f"{scheme}:{rest}")
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        port = "" if parts.port is None else f":{parts.port}"
        shown = f"{parts.scheme}://{host}{port}{parts.path}" + ("?..." if query else "")
    except ValueError:
        return f"{scheme_of(url)}://... (a malformed address)"
    printable = "".join(character if character.isprintable() else "?" for character in shown)
    return printable if len(printable) <= 200 else f"{printable[:200]}..."


def fetch(url: str, where: str, limits: MediaLimits) -> IO[bytes]:
    """What is at an http(s) address, as an open temporary file at its start.

    Args:
        url: the address; may hold `user:password@`.
        where: names the item in errors.
        limits: see `MediaLimits`.

    Raises:
        MediaLimitError: the scheme is not accepted, or the content is larger than allowed.
        ValueError: it cannot be downloaded; the message has the reason, and the address without user and query.
    """
    limits.check_source(scheme_of(url), where)
    download = _Download(where, limits)
    try:
        return download.run(url)
    except MediaLimitError:
        raise
    except (OSError, ValueError, http.client.HTTPException, zlib.error) as error:
        reason = str(error) if isinstance(error, _Refused) else f"{type(error).__name__}: {_without_address(error)}"
        if download.is_late:
            reason = f"it took longer than total_seconds={limits.total_seconds:g}"
    raise ValueError(  # not `from error`: that may quote the address
        f"{where}: {masked(url)} could not be downloaded ({reason}). Check the address, or download the file and pass "
        "its path."
    )


def _without_address(error: Exception) -> str:
    # Of these, only errors of TLS (ValueErrors too) do not quote what they found.
    quotes = isinstance(error, (http.client.InvalidURL, ValueError)) and not isinstance(error, OSError)
    return "the address is malformed" if quotes else str(error)[:200]


def data_url_bytes(url: str, where: str, limits: MediaLimits) -> bytes:
    """The content of a `data:` URL, base64 or percent-encoded.

    Raises:
        MediaLimitError: it is larger than `fetch_bytes`.
        ValueError: it is neither.
    """
    limits.check_source("data", where)
    header, _, payload = url.partition(",")
    limits.check("fetch_bytes", len(payload) * 3 // 4, f"{where} is a data URL of {len(payload):,} characters")
    content = base64_bytes(unquote(payload) if "%" in payload else payload)
    if content is None and header.lower().rstrip().endswith(";base64"):
        raise ValueError(f"{where} is '{url[:40]}...', which is not valid base64. Encode the bytes of the file.")
    return unquote_to_bytes(payload) if content is None else content


def base64_bytes(text: str) -> bytes | None:
    """The decoded bytes, or None if `text` is not base64 (line breaks are allowed)."""
    try:
        return base64.b64decode("".join(text.split()), validate=True) or None
    except (binascii.Error, ValueError):
        return None


class _Download:
    """One download: follows redirects, and gives up when its time is over, whatever it waits for."""

    def __init__(self, where: str, limits: MediaLimits) -> None:
        self._where, self._limits = where, limits
        self._seconds = min(limits.total_seconds, MAX_SECONDS)
        self._deadline = time.monotonic() + self._seconds
        self._socket: socket.socket | None = None

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def run(self, url: str) -> IO[bytes]:
        timer = threading.Timer(self._seconds, self._interrupt)
        timer.daemon = True
        timer.start()
        try:
            for _ in range(self._limits.redirects + 1):
                response = self._get(url)
                with response:
                    if response.status not in REDIRECTS:
                        return self._content(response)
                    location = response.headers.get("Location")
                if location is None:
                    raise _Refused(f"it answered {response.status} without saying where to go")
                with suppress(UnicodeError):  # the library reads headers as Latin-1
                    location = location.encode("latin-1").decode()
                url = urljoin(url, location)
                if scheme_of(url) not in PORTS or scheme_of(url) not in self._limits.sources:
                    raise _Refused(f"it redirects to {masked(url)}, whose scheme is not accepted")
            raise _Refused(f"it redirects more than {self._limits.redirects} times")
        finally:
            timer.cancel()
            self._close()

    def _interrupt(self) -> None:
        """Ends what waits for the socket: a server that sends a byte now and then meets no other timeout."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _wait(self, seconds: float) -> float:
        """Seconds to wait for one step."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the time is over")
        return min(seconds, remaining)

    def _stream(self) -> socket.socket:
        """The connected socket, ready to wait for the next bytes."""
        if self._socket is None:
            raise ConnectionError("the connection was closed")
        self._socket.settimeout(self._wait(self._limits.read_seconds))
        return self._socket

    def _get(self, url: str) -> http.client.HTTPResponse:
        """The answer to one request, its headers read."""
        self._close()
        parts = urlsplit(url)
        scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
        if not host:
            raise _Refused("the address has no host")
        host = host if ":" in host else host.encode("idna").decode()
        port = parts.port or PORTS[scheme]
        proxy = None if proxy_bypass(host) else getproxies().get(scheme)
        addresses = self._checked_addresses(host, port, is_proxied=proxy is not None)
        headers = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
        headers |= _authorization("Authorization", parts)
        target = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe=URL_CHARACTERS)
        name = f"[{host}]" if ":" in host else host
        if proxy is not None:
            via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            if via.scheme != "http" or not via.hostname:
                raise _Refused(
                    f"the proxy that {scheme}_proxy names is no http:// address of a host, the only kind used here; "
                    "set another one, or name this host in no_proxy"
                )
            addresses = self._resolve(via.hostname, via.port or PORTS["http"])
            to_proxy = _authorization("Proxy-Authorization", via)
            if scheme == "http":
                named_port = "" if parts.port is None else f":{parts.port}"
                target, headers = f"http://{name}{named_port}{target}", headers | to_proxy
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = PORTS[scheme]  # decides whether the header `Host` names the port
        self._socket = self._connected(addresses)
        if scheme == "https":
            if proxy is not None:
                self._open_tunnel(f"{name}:{port}", to_proxy)
            self._socket = _tls_context().wrap_socket(self._socket, server_hostname=host)
        connection.sock = self._stream()
        connection.request("GET", target, headers=headers)
        return connection.getresponse()

    def _open_tunnel(self, name: str, headers: dict[str, str]) -> None:
        """Ask the proxy for a connection to "host:port"."""
        lines = [f"CONNECT {name} HTTP/1.1", f"Host: {name}", *(f"{key}: {value}" for key, value in headers.items())]
        stream = self._stream()
        stream.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):  # byte by byte: what follows belongs to the tunnel
            byte = stream.recv(1)
            answer += byte
            if not byte or len(answer) > CHUNK_BYTES:
                raise _Refused("the proxy did not answer as one")
        status = answer.split(b" ", 2)[1:2]
        if status != [b"200"]:
            raise _Refused(f"the proxy answered {status[0].decode('latin-1')[:3] if status else 'nothing known'}")

    def _connected(self, addresses: list[Any]) -> socket.socket:
        """A socket connected to the first address that can be reached."""
        problem: OSError = OSError("no address")
        for family, kind, protocol, _, address in addresses:
            candidate = socket.socket(family, kind, protocol)
            try:
                candidate.settimeout(self._wait(self._limits.connect_seconds))
                candidate.connect(address)
                return candidate
            except OSError as error:
                candidate.close()
                problem = error
        raise problem

    def _resolve(self, host: str, port: int) -> list[Any]:
        """The addresses of a host. The system's resolver has no timeout, so another thread waits for it."""
        found: list[Any] = []

        def resolve() -> None:
            try:
                found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                found.append(error)

        thread = threading.Thread(target=resolve, daemon=True, name="molmo2-resolve")
        thread.start()
        thread.join(self._wait(self._limits.connect_seconds))
        if not found:
            raise TimeoutError("the name of the host was not resolved in time")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _checked_addresses(self, host: str, port: int, is_proxied: bool) -> list[Any]:
        """The addresses of a host that may be connected to."""
        try:
            addresses = self._resolve(host, port)
        except socket.gaierror:
            if is_proxied:  # in many networks only the proxy knows names outside
                return []
            raise
        if self._limits.allow_private_hosts:
            return addresses
        public = [entry for entry in addresses if is_public(entry[4][0])]
        if not public:
            raise _Refused(
                "its address is private, loopback, link-local or reserved; pass "
                "limits=MediaLimits(allow_private_hosts=True) if that is meant"
            )
        return public

    def _content(self, response: http.client.HTTPResponse) -> IO[bytes]:
        """The decoded body in a temporary file."""
        if not 200 <= response.status < 300:
            raise _Refused(f"it answered {response.status} {_printable(response.reason)}".rstrip())
        file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115  # the caller's
        try:
            written = 0
            for chunk in self._decoded(response):
                written += len(chunk)
                self._check_size(written)
                file.write(chunk)
            file.seek(0)
            return file
        except BaseException:
            file.close()
            raise

    def _check_size(self, num_bytes: int) -> None:
        self._limits.check("fetch_bytes", num_bytes, f"{self._where} is a download of {num_bytes:,} bytes or more")

    def _decoded(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The body in small pieces, however far it is compressed."""
        encoding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
        if encoding in ("identity", ""):
            yield from self._raw(response)
            return
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise _Refused(f"its content has the encoding '{_printable(encoding)}', which was not asked for")
        inflater: Any = None
        for chunk in self._raw(response):
            if inflater is None:  # "deflate" is zlib's format, but some servers send it without the header
                is_bare = encoding == "deflate" and (chunk[0] & 15 != 8 or int.from_bytes(chunk[:2], "big") % 31 != 0)
                inflater = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32)
            while chunk:
                if inflater.eof:  # a file of gzip may have several members, with zeros between; the rest is ignored
                    chunk = chunk.lstrip(b"\0")
                    if encoding == "deflate" or chunk[:1] != GZIP_START:
                        break
                    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
                yield inflater.decompress(chunk, CHUNK_BYTES)
                chunk = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        if inflater is not None and not inflater.eof:
            yield inflater.flush()  # at most what one match repeats: no input is left
        if inflater is not None and not inflater.eof:
            raise _Refused("its compressed content is cut off")

    def _raw(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The body as sent."""
        expected, received = response.length, 0
        self._check_size(expected or 0)
        while not response.isclosed():  # as it is, on recent versions of Python, once it has read all
            self._stream()
            chunk = response.read1(CHUNK_BYTES)
            if not chunk:
                break
            received += len(chunk)
            self._check_size(received)  # also of what decompresses to nothing
            yield chunk
        if (expected is not None and received < expected) or self.is_late:
            raise _Refused(f"{received:,} of {expected or 0:,} bytes came")


def is_public(address: str) -> bool:
    """True for an address of the public Internet, also of one that is written inside an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and (ip in NAT64 or int(ip) >> 32 == 0):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _authorization(name: str, parts: Any) -> dict[str, str]:
    """The header for the user and password of an address, if it has them."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {name: "Basic " + base64.b64encode(pair.encode()).decode()}


@cache
def _tls_context() -> ssl.SSLContext:
    """Certificates of the system and of certifi: on some systems only one of the two has any. Read once."""
    context = ssl.create_default_context()
    with suppress(ImportError):
        context.load_verify_locations(importlib.import_module("certifi").where())
    return context


def _printable(text: str | None) -> str:
    return "".join(character for character in (text or "")[:80] if character.isprintable())
