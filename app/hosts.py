"""Which names a browser may know the app by.

A page of a stranger can point a DNS name of its own at this machine and so reach an app that listens on the loopback
interface (DNS rebinding). The browser then sends that name in the Host header, so names are refused unless they are of
this machine or of the command line; addresses in numbers cannot be pointed anywhere and are let in.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

SHARED = ".gradio.live"  # gradio's public addresses end with it

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def own_names() -> set[str]:
    """The names of this machine."""
    return {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}


def host_name(header: str) -> str:
    """The host of a Host header, without its port: "[::1]:7860" to "::1"."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


def is_address(name: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class CheckedHosts:
    """ASGI middleware that answers 421 to requests, and closes web sockets, under a name that is not ours.

    Args:
        names: Host names, with or without a port; one that starts with a dot stands for all names that end with it.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], names: Iterable[str]):
        self._app = app
        self._names = {host_name(name).rstrip(".") for name in names}

    def accepts(self, header: str) -> bool:
        """Whether a Host header names us."""
        name = host_name(header).rstrip(".")
        endings = tuple(known for known in self._names if known.startswith("."))
        return is_address(name) or name in self._names or (bool(endings) and name.endswith(endings))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is for us."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        header = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        if self.accepts(header):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = b"This app is not known by this name. Start it with --allow-host NAME to use one.\n"
            kind = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
            await send({"type": "http.response.start", "status": 421, "headers": kind})
            await send({"type": "http.response.body", "body": text})
