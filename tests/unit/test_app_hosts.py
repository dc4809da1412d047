"""The names that a browser may know the app by."""

import asyncio

import pytest

from app import __main__ as app_main
from app.hosts import CheckedHosts, host_name


def test_hosts_as_browsers_write_them():
    headers = {"localhost:7860": "localhost", "[::1]:7860": "::1", "::1": "::1", "127.0.0.1": "127.0.0.1"}
    for header, name in headers.items():
        assert host_name(header) == name


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("127.0.0.1:7860", True),
        ("192.168.1.4", True),
        ("[::1]:7860", True),
        ("LOCALHOST:7860", True),
        ("localhost.", True),
        ("app.example", True),
        ("app.example:443", True),
        ("other.app.example", False),
        ("a-b.gradio.live", True),
        ("rebound.example:7860", False),
        ("localhost.rebound.example", False),
        ("127.0.0.1.rebound.example", False),
        ("gradio.live.rebound.example", False),
        ("", False),
    ],
)
def test_only_names_that_are_ours(header, accepted):
    passed, sent = [], []

    async def inner(scope, receive, send):
        passed.append(scope)

    async def send(message):
        sent.append(message)

    hosts = CheckedHosts(inner, {"localhost", ".gradio.live", "App.example:8080"})
    for kind in ("http", "websocket"):
        asyncio.run(hosts({"type": kind, "headers": [(b"host", header.encode())]}, None, send))
    asyncio.run(hosts({"type": "lifespan"}, None, send))
    assert len(passed) == (3 if accepted else 1)
    assert [message["type"] for message in sent] == (
        [] if accepted else ["http.response.start", "http.response.body", "websocket.close"]
    )


def test_without_gradio_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["app", "--server", "http://127.0.0.1:9/v1"])
    with pytest.raises(SystemExit, match="needs gradio: pip install gradio"):
        app_main.main()
