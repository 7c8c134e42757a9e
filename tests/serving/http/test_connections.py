"""Slow, silent and many connections: none of them holds the server."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="the local server is uvicorn")

from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion_testing.http_service import Gate, gated_engine, idle, served, served_here, until
from stepfusion_testing.tiny_model import save_tiny_model

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class Site:
    """A local server with short time limits, its engine and its gate."""

    def __init__(self, gate: Gate, service: AsyncEngine, server: Any, port: int) -> None:
        self.gate, self.service, self.server, self.port = gate, service, server, port

    def connect(self, **options: int) -> socket.socket:
        """A connection, with these socket options, whose reads time out."""
        connection = socket.socket()
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", self.port))
        return connection


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    gate, engine = gated_engine((3, 256, 256), batch=32)
    service = AsyncEngine(engine)
    limits = {"connections": 20, "head_seconds": 0.7, "stalled_seconds": 0.7}
    with served_here(make_app(service), **limits) as (server, port):
        until(lambda: service.ready)
        yield Site(gate, service, server, port)
        gate.opened.set()


def post(path: str, body: Any) -> bytes:
    """A request for images, whose connection stays."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def read_to_end(connection: socket.socket) -> bytes:
    """Everything until the server closes, or breaks off."""
    data = b""
    try:
        while chunk := connection.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def read_response(connection: socket.socket) -> bytes:
    """One response, head and body, in however many packets it comes."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += next_packet(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
    assert length is not None, head
    missing = int(length[1]) - len(body)
    while missing > 0:
        chunk = next_packet(connection)
        data, missing = data + chunk, missing - len(chunk)
    assert missing == 0, "more than one response"
    return data


def next_packet(connection: socket.socket) -> bytes:
    """What comes next on a connection that the server must not close."""
    chunk = connection.recv(1 << 16)
    assert chunk != b"", "closed within a response"
    return chunk


def trickle(connection: socket.socket, data: Callable[[int], bytes]) -> bool:
    """Send little by little, for 20 s or longer. Whether the server closed the connection meanwhile."""
    connection.settimeout(0.05)
    for i in range(400):
        try:
            connection.sendall(data(i))
            if connection.recv(1 << 16) == b"":
                return True
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return True
    return False


# Silent clients


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n",
        HEALTH[:-2],
    ],
)
def test_a_connection_that_sends_no_request_is_closed(site: Site, sent: bytes) -> None:
    started = time.monotonic()
    with closing(site.connect()) as connection:
        connection.sendall(sent)
        assert read_to_end(connection) == b""
        assert time.monotonic() - started > 0.5


def test_a_head_that_trickles_in_is_not_waited_for(site: Site) -> None:
    with closing(site.connect()) as connection:
        connection.sendall(HEALTH[:-2])
        assert trickle(connection, lambda i: f"X-{i}: {i}\r\n".encode())


def test_a_body_that_trickles_in_after_the_response_is_not_waited_for(site: Site) -> None:
    with closing(site.connect()) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert trickle(connection, lambda i: b"x")


def test_a_connection_is_closed_that_is_silent_after_a_response(site: Site) -> None:
    with closing(site.connect()) as connection:
        connection.sendall(HEALTH + HEALTH)
        assert read_to_end(connection).count(b"HTTP/1.1 200 OK") == 2


def test_a_connection_whose_request_takes_long_stays(site: Site) -> None:
    site.gate.opened.clear()
    threading.Timer(2.5, site.gate.opened.set).start()
    with closing(site.connect()) as connection:
        connection.sendall(post("/v1/generate", {"steps": 2}))
        assert read_response(connection).startswith(b"HTTP/1.1 200 OK")
        connection.sendall(LAST)  # and it goes on to be used
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 OK")


# Clients that do not read


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/stream"])
def test_a_client_that_takes_nothing_is_disconnected(site: Site, path: str) -> None:
    ask = {"n": 32, "steps": 2} | ({"format": "npz"} if path == "/v1/generate" else {"every": 1})
    with closing(site.connect(SO_RCVBUF=4096)) as connection:
        connection.sendall(post(path, ask))
        until(lambda: not idle(site.service))
        until(lambda: not site.server.server_state.connections)
        taken = read_to_end(connection)
        assert taken.startswith(b"HTTP/1.1 200 OK")
        assert not taken.endswith(b"0\r\n\r\n"), "the end of a stream"
        assert len(taken) < 32 * 3 * 256 * 256, "the length of the images"


def test_a_client_that_reads_slowly_gets_everything(site: Site) -> None:
    with closing(site.connect(SO_RCVBUF=1 << 16)) as connection:
        connection.sendall(post("/v1/generate", {"n": 32, "steps": 1, "format": "npz"}) + LAST)
        received, started = 0, time.monotonic()
        while chunk := connection.recv(1 << 16):
            received += len(chunk)
            time.sleep(0.02)
        assert received > 32 * 3 * 256 * 256
        assert time.monotonic() - started > 1.5, "longer than the time limits, with some of it read in each"


# Many clients


def test_more_silent_connections_than_there_may_be_close_the_oldest(site: Site) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(closing(site.connect())) for _ in range(60)]
        for _ in range(3):
            connection = stack.enter_context(closing(site.connect()))
            connection.sendall(LAST)
            assert read_to_end(connection).startswith(b"HTTP/1.1 200 OK")
        assert read_to_end(silent[0]) == b""


def test_a_connection_too_many_is_503_if_all_others_are_busy(site: Site) -> None:
    site.gate.opened.clear()
    with ExitStack() as stack:
        busy = [stack.enter_context(closing(site.connect())) for _ in range(20)]
        for connection in busy:
            connection.sendall(post("/v1/generate", {"steps": 1}))
        until(lambda: site.service.status.waiting + site.service.status.busy == 20)
        for _ in range(3):
            one_more = stack.enter_context(closing(site.connect()))
            one_more.sendall(HEALTH)
            head, _, body = read_to_end(one_more).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in head.lower()
            assert json.loads(body) == {"error": "too many connections are open; try again later"}
        site.gate.opened.set()
        for connection in busy:
            assert read_response(connection).startswith(b"HTTP/1.1 200 OK")
        last = stack.enter_context(closing(site.connect()))
        last.sendall(LAST)
        assert read_to_end(last).startswith(b"HTTP/1.1 200 OK"), "those that were busy wait now, and make room"


def test_a_server_with_few_file_descriptors_outlives_a_flood(tmp_path: Path) -> None:
    """400 silent connections to a process that may open 256 files; then it answers, and ends in time."""
    few = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    model = save_tiny_model(tmp_path / "tiny")
    options = ("--local", "--port", "0", "--device", "cpu", "--lanes", "2", "--drain", "60")
    with served(str(model), *options, under=few) as server, ExitStack() as stack:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for _ in range(400):
            stack.enter_context(closing(socket.create_connection(address, timeout=30)))
        for _ in range(3):
            connection = stack.enter_context(closing(socket.create_connection(address, timeout=30)))
            connection.sendall(LAST)
            assert read_to_end(connection).startswith(b"HTTP/1.1 200 OK")
        server.process.terminate()
        assert server.process.wait(30) == 0


# What is no HTTP

MALFORMED = [
    b"NONSENSE\r\n\r\n",
    b"GET / HTTP/9.9 x\r\n\r\n",
    b"GET  /two spaces HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # without a host
    b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)) + b"\r\n\r\n",  # TLS
    b"A" * 40_000,
    HEALTH + b"NONSENSE\r\n\r\n",
    post("/v1/generate", {"steps": 1})[:-5] + b"\xff" * 9 + b"NONSENSE\r\n\r\n",
]


@pytest.mark.parametrize("sent", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_http_is_refused_as_json(site: Site, sent: bytes) -> None:
    with closing(site.connect()) as connection:
        connection.sendall(sent)
        received = read_to_end(connection)
    head, _, body = received[received.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    assert isinstance(json.loads(body)["error"], str)
    with closing(site.connect()) as connection:
        connection.sendall(LAST)
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 "), "and the others are served"


def test_nonsense_in_a_body_whose_request_was_answered_before(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can be said any more: the connection is closed."""
    head = (
        "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n"
    )
    with closing(site.connect()) as connection:
        connection.sendall(f"{head}\r\n".encode())
        assert read_response(connection).startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"NONSENSE\r\n\r\n")
        assert read_to_end(connection) == b""
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
