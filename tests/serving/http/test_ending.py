"""A server that is told to stop: what it still finishes, and what it says to those whom it does not wait for."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="the local server is uvicorn")
pytest.importorskip("httpx2", reason="the client of these tests")

import httpx2
from starlette.testclient import TestClient

from stepfusion.serving import AsyncEngine, EngineClosed
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.waiting import Ending
from stepfusion_testing.http_service import call, events_of, gated_engine, rejected, served, served_here, until
from stepfusion_testing.tiny_model import save_tiny_model

STOPPED = "the server was stopped before this request was done"


def post(port: int, path: str, **ask: Any) -> Any:
    return httpx2.post(f"http://127.0.0.1:{port}{path}", json={"labels": 0, **ask}, timeout=60)


def is_503(response: Any) -> bool:
    return (response.status_code, response.json()) == (503, {"error": STOPPED})


def test_requests_that_are_not_done_in_time_are_told_so() -> None:
    """Those in lanes and those in the queue, whether or not the device answers: the gate is shut all the time."""
    gate, engine = gated_engine()
    gate.opened.set()
    app = make_app(service := AsyncEngine(engine))
    with ThreadPoolExecutor(8) as pool, served_here(app, drain=0.3) as (server, port):
        until(lambda: service.ready)
        gate.opened.clear()
        streams = [pool.submit(post, port, "/v1/stream", n=2, steps=9)]
        until(lambda: service.status.busy == 2)
        pictures = [pool.submit(post, port, "/v1/generate", n=n, steps=9) for n in (2, 1, 3)]
        streams.append(pool.submit(post, port, "/v1/stream", n=4, steps=9))
        until(lambda: service.status.waiting == 10)
        server.stop()
        responses = [future.result(20) for future in pictures]
        texts = [future.result(20).text for future in streams]
        gate.opened.set()
    assert all(map(is_503, responses))
    for text in texts:
        assert [name for name, _ in events_of(text)] == ["accepted", "error"]
        assert events_of(text)[-1][1] == {"status": 503, "error": STOPPED}


def test_a_body_that_is_still_coming_is_told_so() -> None:
    _, engine = gated_engine()
    with ExitStack() as stack:
        server, port = stack.enter_context(served_here(make_app(AsyncEngine(engine)), drain=0.1))
        connection = stack.enter_context(closing(socket.create_connection(("127.0.0.1", port), timeout=30)))
        head = "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        until(lambda: bool(server.server_state.tasks))
        server.stop()
        received = b""
        while chunk := connection.recv(1 << 16):
            received += chunk
    assert received.startswith(b"HTTP/1.1 503 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2]) == {"error": STOPPED}


def test_what_is_done_in_time_is_finished() -> None:
    gate, engine = gated_engine()
    app = make_app(service := AsyncEngine(engine))
    with ThreadPoolExecutor(2) as pool, served_here(app, drain=60) as (server, port):
        until(lambda: service.ready)
        gate.opened.clear()
        picture = pool.submit(post, port, "/v1/generate", n=2, steps=3)
        stream = pool.submit(post, port, "/v1/stream", n=2, steps=3)
        until(lambda: service.status.busy + service.status.waiting == 4)
        server.stop()
        time.sleep(0.5)
        gate.opened.set()
        assert picture.result(20).status_code == 200
        assert events_of(stream.result(20).text)[-1][0] == "result"


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/stream"])
def test_any_server_can_end_requests_and_frees_their_lanes(path: str) -> None:
    """As an ASGI application alone, and for requests that come after the end as well."""
    gate, engine = gated_engine()
    app = make_app(service := AsyncEngine(engine))

    async def ask() -> list[Any]:
        gate.opened.clear()
        running, _, sent = call(app, path, b'{"n": 4, "steps": 50, "labels": 0}', asyncio.Event())
        while service.status.busy < 4:
            await asyncio.sleep(0.01)
        app.state.end_requests()
        await asyncio.wait_for(running, 60)
        late, _, told = call(app, path, b'{"steps": 3, "labels": 0}', asyncio.Event())
        await asyncio.wait_for(late, 60)
        assert told[0]["status"] == 503
        assert rejected(service, "closed") == 1
        gate.opened.set()
        while service.status.busy:
            await asyncio.sleep(0.01)
        return sent

    with TestClient(app):
        until(lambda: service.ready)
        sent = asyncio.run(ask())
        assert ticks(service) <= 4, "two pools warm up, and the lanes are free by the next tick"
    body = b"".join(message.get("body", b"") for message in sent).decode()
    if path == "/v1/generate":
        assert (sent[0]["status"], json.loads(body)) == (503, {"error": STOPPED})
    else:
        assert events_of(body)[-1] == ("error", {"status": 503, "error": STOPPED})


def ticks(service: AsyncEngine) -> float:
    assert service.registry is not None
    return service.registry.get_sample_value("stepfusion_ticks_total") or 0.0


def test_sigterm_ends_requests_with_503(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    options = ("--local", "--port", "0", "--device", "cpu", "--lanes", "1", "--invariant", "--drain", "0")
    with served(str(model), *options) as server, ThreadPoolExecutor(2) as pool:
        port = int(server.url.rpartition(":")[2])
        until(lambda: httpx2.get(f"{server.url}/readyz").status_code == 200, 60)
        picture = pool.submit(post, port, "/v1/generate", n=64, steps=100)
        stream = pool.submit(post, port, "/v1/stream", n=64, steps=100)
        until(lambda: httpx2.get(f"{server.url}/healthz").json()["waiting"] == 127)
        server.process.terminate()
        assert is_503(picture.result(30))
        assert events_of(stream.result(30).text)[-1] == ("error", {"status": 503, "error": STOPPED})
        assert server.process.wait(30) == 0


def test_an_end_reaches_every_loop_and_thread() -> None:
    ending = Ending()

    def wait() -> str:
        with pytest.raises(EngineClosed) as raised:
            asyncio.run(ending.wait())
        return str(raised.value)

    with ThreadPoolExecutor(3) as pool:
        waiting: list[Future[str]] = [pool.submit(wait) for _ in range(3)]
        time.sleep(0.2)
        assert not any(future.done() for future in waiting)
        threading.Thread(target=ending.end).start()
        assert [future.result(10) for future in waiting] == [STOPPED] * 3
    assert wait() == STOPPED, "who comes later is told at once"
