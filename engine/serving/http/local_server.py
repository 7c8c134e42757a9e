"""The HTTP application in this process, run by uvicorn."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import uvicorn
from starlette.applications import Starlette

from stepfusion.serving.http.connections import Connection, ConnectionKeeper, ConnectionLimits
from stepfusion.serving.http.logs import REQUESTS, log_config
from stepfusion.serving.http.stopping import stopping

_KEEP_ALIVE_SECONDS = 5
_HEAD_BYTES = 1 << 14  # of the request line and the headers
_BACKLOG = 128  # also how many connections asyncio accepts before it does anything else
_FILES = 4096  # descriptors that the process asks for
_LAST_WORDS_SECONDS = 5  # for the responses of requests that were ended, before their connections are closed
_TICKS_A_SECOND = 10  # of uvicorn's main loop


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one. OSError if the address is taken or is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def serve_locally(app: Starlette, listening: socket.socket, *, drain: float, log_level: str = "warning") -> None:
    """Serve until SIGINT or SIGTERM; then finish what is under way, for ``drain`` seconds at most.

    What is not finished then ends with status 503, or an error event on a stream. A second signal kills the process.
    ``log_level`` as for :func:`stepfusion.serving.http.logs.log_config`.
    """
    LocalServer(app, drain, ConnectionLimits(_allowed_connections()), log_level).run(sockets=[listening])


class LocalServer(uvicorn.Server):
    """uvicorn with limits for silent connections, and an end that says what it ends.

    It stops by :func:`stopping`: uvicorn's own handlers kill on a second SIGINT only, and raise the first signal
    again after a clean end.

    Args:
        app: made by :func:`stepfusion.serving.http.app.make_app`.
        drain: seconds that requests under way have from the signal on.
        log_level: of what goes to stderr.
    """

    def __init__(self, app: Starlette, drain: float, limits: ConnectionLimits, log_level: str = "warning") -> None:
        self._keeper = ConnectionKeeper(limits)
        self._app, self._drain = app, drain
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=log_config(log_level),
            access_log=log_level in REQUESTS,
            server_header=False,
            ws="none",
            http=cast("type[asyncio.Protocol]", partial(Connection, keeper=self._keeper)),
            h11_max_incomplete_event_size=_HEAD_BYTES,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(drain) + _LAST_WORDS_SECONDS,
        )
        super().__init__(config)

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_A_SECOND == 0:
            self._keeper.close_overdue()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        out_of_time = asyncio.get_running_loop().call_later(self._drain, self._app.state.end_requests)
        try:
            await super().shutdown(sockets)
        finally:
            out_of_time.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with stopping(self.stop):
            yield

    def stop(self) -> None:
        """Take no more connections, and drain."""
        self.should_exit = True


def _allowed_connections() -> int:
    """How many connections may be open, a quarter of the file descriptors at most: a flood of connections is accepted
    in batches before the oldest are closed.
    """
    most = ConnectionLimits().connections
    if sys.platform == "win32":  # where sockets are no file descriptors
        return most
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return most if soft == resource.RLIM_INFINITY else min(most, max(1, soft // 4))
