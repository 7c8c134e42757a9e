"""The HTTP application in this process, run by uvicorn."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from stepfusion.serving.http.stopping import stopping

_CONNECTIONS = 512  # at a time; more get 503
_KEEP_ALIVE_SECONDS = 5
_HEAD_BYTES = 1 << 14  # of the request line and the headers
_BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one. OSError if the address is taken or is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def serve_locally(app: ASGIApp, listening: socket.socket, *, drain: float) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is under way, for ``drain`` seconds at most.

    A second signal kills the process. A connection that brings no further request for 5 s is closed.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        http="h11",
        h11_max_incomplete_event_size=_HEAD_BYTES,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(drain),
    )
    _Server(config).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ends by :func:`stopping`: uvicorn's own handlers kill on a second SIGINT only, and raise the first signal again
    after a clean end.
    """

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with stopping(self._stop):
            yield

    def _stop(self) -> None:
        self.should_exit = True
