"""The Host header: a page of another site does not reach a server on loopback under a name of its own."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="the local server is uvicorn")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

from stepfusion.commands.main import main
from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.hosts import HostCheck, check_hosts
from stepfusion_testing.http_service import call, gated_engine, served_here, until

LOOPBACK, LAN, LOOPBACK6 = ("127.0.0.1", 8000), ("192.168.1.5", 8000), ("::1", 8000)
OURS = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.8.9.1",
    "[::1]",
    "[::1]:8000",
]
OURS += ["0.0.0.0:8000", "[::]", "[0:0:0:0:0:0:0:1]:80", "[::ffff:127.0.0.1]"]
STRANGE = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil.localhost"]
STRANGE += [
    "127.1",
    "2130706433",
    "0x7f.1",
    "93.184.216.34",
    "192.168.1.5",
    "[2001:db8::1]:8000",
    "",
    "localhost@evil",
]
STRANGE += ["localhost:80:80", "localhost:x", "local host", "[::1", "[evil]", "127.0.0.1/", "*", "locälhost"]


def status(headers: list[str], server: tuple[str, int | None] | None, **arguments: Any) -> int:
    """The status of a request with these Host headers, which arrived at this address."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> int:
        sent = []

        async def send(message: Any) -> None:
            sent.append(message)

        encoded = [(b"host", host.encode("latin-1")) for host in headers]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": encoded, "server": server}
        await HostCheck(app, **arguments)(scope, None, send)  # type: ignore[arg-type]
        return int(sent[0]["status"])

    return asyncio.run(ask())


@pytest.mark.parametrize("server", [LOOPBACK, LOOPBACK6, ("::ffff:127.0.0.1", 8000), ("127.0.1.1", 80)])
def test_a_stranger_on_loopback_is_refused(server: tuple[str, int]) -> None:
    assert {host: status([host], server) for host in OURS} == dict.fromkeys(OURS, 200)
    assert {host: status([host], server) for host in STRANGE} == dict.fromkeys(STRANGE, 421)


def test_beyond_loopback_any_host_is_accepted_unless_some_are_listed() -> None:
    for server in (LAN, ("/run/a.sock", None), None):
        assert status(["evil.example"], server) == 200
        assert status(["evil.example"], server, allowed=["example.org"]) == 421
        assert status(["localhost"], server, allowed=["example.org"]) == 200
    assert status(["192.168.1.5:8000"], LAN, allowed=["example.org"]) == 200, (
        "an address needs no name to be resolved"
    )
    assert status(["192.168.1.6:8000"], LAN, allowed=["example.org"]) == 421


@pytest.mark.parametrize(
    ("allowed", "accepted", "refused"),
    [
        (
            ["Example.org."],
            ["example.org", "EXAMPLE.ORG:1"],
            ["www.example.org", "notexample.org", "example.org.evil"],
        ),
        (
            ["*.example.org"],
            ["a.example.org", "a.b.example.org:8"],
            ["example.org", "evilexample.org", "example.org.x"],
        ),
        (["*"], ["evil.example", "x"], []),
        (["10.0.0.7", "2001:DB8:0::1"], ["10.0.0.7:80", "[2001:db8::1]:80"], ["10.0.0.8"]),
        ([], ["localhost"], ["example.org"]),
    ],
)
def test_allowed_hosts_are_accepted_wherever_requests_arrive(
    allowed: list[str], accepted: list[str], refused: list[str]
) -> None:
    for server in (LOOPBACK, LAN):
        assert {host: status([host], server, allowed=allowed) for host in accepted} == dict.fromkeys(accepted, 200)
        assert {host: status([host], server, allowed=allowed) for host in refused} == dict.fromkeys(refused, 421)


def test_the_announced_name_is_accepted() -> None:
    assert status(["my-machine:8000"], ("127.0.1.1", 8000), own="My-Machine") == 200
    assert status(["my-machine:8000"], ("127.0.1.1", 8000)) == 421


def test_every_host_header_counts_and_none_is_none() -> None:
    assert status(["localhost", "evil.example"], LOOPBACK) == 421
    assert status([], LOOPBACK) == 200, "HTTP/1.0, which no browser speaks"


@pytest.mark.parametrize(
    "host", ["", "http://example.org", "example.org:80", "a b", "*.*", "**", "ex*mple.org", "-/-", "*."]
)
def test_what_is_no_host_is_one_sentence(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="allowed hosts must be such as"):
        check_hosts([host])
    with pytest.raises(ValueError, match="allowed hosts must be such as"):
        make_app(AsyncEngine(gated_engine()[1]), allowed_hosts=[host])
    assert main(["serve", "no-such-model", "--local", "--allowed-hosts", f"example.org,{host}"]) == 1
    assert f"*.example.org, 10.0.0.7 or *, got {host.strip()!r}" in capsys.readouterr().err


# The application


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    _, engine = gated_engine()
    app = make_app(service := AsyncEngine(engine), allowed_hosts=["example.org"])
    with served_here(app) as (_, port):
        until(lambda: service.ready)
        yield port


def exchange(port: int, request: str) -> tuple[int, str, str]:
    """Status, head and body of a response."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)) as connection:
        connection.sendall(request.encode())
        received = b""
        while chunk := connection.recv(1 << 16):
            received += chunk
    head, _, body = received.decode().partition("\r\n\r\n")
    return int(head.split()[1]), head, body


@pytest.mark.parametrize("path", ["/", "/v1/model", "/metrics", "/healthz", "/nowhere", "/openapi.json"])
def test_every_path_is_refused_to_a_stranger(port: int, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: {{}}\r\nConnection: close\r\n\r\n"
    code, _, body = exchange(port, request.format("evil.example:8000"))
    message = "Host must be a name of this server (--allowed-hosts adds some), got 'evil.example:8000'"
    assert (code, json.loads(body)) == (421, {"error": message})
    for host in ("localhost:8000", f"127.0.0.1:{port}", "example.org"):
        assert exchange(port, request.format(host))[0] == (404 if path == "/nowhere" else 200)


def test_a_host_is_never_copied_into_a_redirect(port: int) -> None:
    for path in ("/healthz/", "/v1/model/", "//", "/v1/generate/"):
        code, head, body = exchange(port, f"GET {path} HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n")
        assert code == 404
        assert "location" not in head.lower()
        assert "example.org" not in head + body


def test_images_are_not_made_for_a_stranger() -> None:
    _, engine = gated_engine()
    app = make_app(service := AsyncEngine(engine))

    async def ask(host: str) -> Any:
        given = {"host": host}
        running, _, sent = call(app, "/v1/generate", b'{"steps": 2}', asyncio.Event(), given, server=LOOPBACK)
        await asyncio.wait_for(running, 60)
        return sent[0]["status"]

    with TestClient(app):
        until(lambda: service.ready)
        assert asyncio.run(ask("evil.example")) == 421
        assert asyncio.run(ask("localhost")) == 200
