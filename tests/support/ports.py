"""Ports for servers of tests."""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOWEST = 12_000  # browsers refuse some below
EPHEMERAL = 32_768  # Linux's own start of such ports, unless `RANGE` names another
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of this machine without a listener, for a server that starts later and takes no other.

    It is none of those that the system gives to connections and to servers that ask for any port: another program may
    get one of these at every moment between this call and the start of the server.
    """
    end = EPHEMERAL
    with suppress(OSError, ValueError):
        end = int(RANGE.read_text(encoding="ascii").split()[0])
    ports = range(LOWEST, end) if end > 2 * LOWEST else range(LOWEST, 1 << 16)
    chance = random.SystemRandom()  # tests seed the other one: those that run side by side would choose alike
    while True:
        port = chance.choice(ports)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def closed_port() -> Iterator[int]:
    """A port without a listener, and none can come meanwhile: it is bound."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
