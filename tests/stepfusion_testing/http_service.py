"""A model small enough to be served in a test, in this process and in one of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import stepfusion as sf
from stepfusion.serving import AsyncEngine

NAMES = ("Cat", "Dog", "Owl")
NAN_LABEL, NULL_LABEL = 2, 3
JSON = {"Content-Type": "application/json"}


class Gate:
    """A network that holds every evaluation while it is shut. ``Owl`` breaks an image."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.opened.set()

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert self.opened.wait(60)
        out = 0.1 * x + 0.01 * labels.view(-1, 1, 1, 1)
        return torch.where((labels == NAN_LABEL).view(-1, 1, 1, 1), torch.nan, out)


def gated_engine(shape: tuple[int, int, int] = (1, 8, 8), **arguments: Any) -> tuple[Gate, sf.Engine]:
    """An invariant engine of four lanes, and the gate in it."""
    gate = Gate()
    given = {"num_classes": 4, "null_label": NULL_LABEL, "class_names": NAMES, "batch": 4, "invariant": True}
    schedule = sf.NoiseSchedule.linear(100)
    return gate, sf.Engine(gate, schedule, shape=shape, device="cpu", **{**given, **arguments})


def events_of(text: str) -> list[tuple[str, Any]]:
    """The server-sent events of a response, without comments."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("event: ")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def call(
    app: Any,
    path: str,
    body: bytes,
    gone: asyncio.Event | None,
    headers: dict[str, str] | None = None,
    reading: asyncio.Event | None = None,
    server: tuple[str, int | None] | None = None,
    asgi: str = "2.3",
) -> tuple[asyncio.Future[None], asyncio.Event, list[dict[str, Any]]]:
    """Call an ASGI application as a server does: the running call, an event that is set by its first message, and the
    messages so far.

    Args:
        gone: the client leaves when it is set; None if its body never ends.
        reading: the client takes nothing but the head of the response until it is set.
        server: the address that the request arrived at. asgi: the version of its protocol that the server speaks.
    """
    started, sent = asyncio.Event(), list[dict[str, Any]]()
    messages = [{"type": "http.request", "body": body, "more_body": gone is None}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] != "http.response.start" and reading is not None:
            await reading.wait()
        sent.append(message)
        started.set()

    given = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "server": server,
        "asgi": {"version": "3.0", "spec_version": asgi},
    }
    return asyncio.ensure_future(app(scope, receive, send)), started, sent


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for it; AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def idle(service: AsyncEngine) -> bool:
    """Whether no lane is taken and nothing waits."""
    status = service.status
    return status.busy == 0 and status.waiting == 0


def rejected(service: AsyncEngine, reason: str) -> int:
    """How many requests were refused for this reason."""
    assert service.registry is not None
    return int(service.registry.get_sample_value("stepfusion_rejected_total", {"reason": reason}) or 0)


@dataclass(frozen=True)
class Served:
    """A server in a process of its own: what was started, and where it answers."""

    process: subprocess.Popen[str]
    url: str


class LoggingRestored:
    """Sets logging back to what it was before the first server of this process, when the last one has ended.

    uvicorn 0.30 leaves the handlers that it was given. Servers may end in any order, as fixtures do in pytest 8.0.
    """

    _LOGGERS = tuple(logging.getLogger(name) for name in ("stepfusion", "uvicorn", "uvicorn.access", "uvicorn.error"))

    def __init__(self) -> None:
        self._inside = 0
        self._before: list[tuple[logging.Logger, list[logging.Handler], int, bool]] = []

    def __enter__(self) -> None:
        if self._inside == 0:
            self._before = [(one, one.handlers[:], one.level, one.propagate) for one in self._LOGGERS]
        self._inside += 1

    def __exit__(self, *_: object) -> None:
        self._inside -= 1
        for logger, handlers, level, propagate in self._before if self._inside == 0 else ():
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


_LOGGING_RESTORED = LoggingRestored()


@contextmanager
def served_here(app: Any, drain: float = 1.0, **limits: Any) -> Iterator[tuple[Any, int]]:
    """The local server in a thread of this process, with no signal handlers: the server, and its port on 127.0.0.1.

    ``limits``: of its connections.
    """
    from stepfusion.serving.http.connections import ConnectionLimits
    from stepfusion.serving.http.local_server import LocalServer, listen

    class Server(LocalServer):
        capture_signals = nullcontext  # type: ignore[assignment]

    with _LOGGING_RESTORED, listen("127.0.0.1", 0) as listening:
        server = Server(app, drain, ConnectionLimits(**limits))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            until(lambda: server.started)
            yield server, listening.getsockname()[1]
        finally:
            server.stop()
            thread.join()


@contextmanager
def served(*arguments: str, under: tuple[str, ...] = ()) -> Iterator[Served]:
    """``stepfusion serve`` with these arguments; ``under``: a command that starts it. Killed at the end."""
    command = [*under, sys.executable, "-P", "-m", "stepfusion", "serve", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen(
        command, env={**env, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at http://" in line, line
            yield Served(process, line.split()[-1])
        finally:
            process.kill()
