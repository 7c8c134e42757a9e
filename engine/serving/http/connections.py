"""The connections of the local server: limited in number, and closed if their clients are silent or do not read.

uvicorn limits the time between two requests of a connection alone. A client that sends no request at all, or takes
nothing of its response, would hold its connection, and what it was sent, for as long as it likes.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepfusion.serving.http.errors import error_response


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be, and how long each may wait for its client.

    Attributes:
        connections: open at a time. One more closes the one that has waited longest for a request; if all have
            requests under way, its own request gets status 503.
        head_seconds: for the head of a request to arrive, from the start of the connection or the last response on.
        stalled_seconds: for a client to take any of what it was sent.
    """

    connections: int = 512
    head_seconds: float = 10.0
    stalled_seconds: float = 30.0


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, which reports to a :class:`ConnectionKeeper`."""

    def __init__(self, *args: Any, keeper: ConnectionKeeper, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keeper = keeper

    @property
    def has_request(self) -> bool:
        """Whether a request is under way: its head has arrived, and its response is not yet complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._keeper.opened(self):
            self.app = _too_many_connections

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.has_request:
            self._keeper.serves(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.has_request:  # of several requests that were sent at once, the next one has begun
            self._keeper.waits(self)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP/1.1, in the form of every other error, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else a response is half sent
            response = error_response(400, "the request is not valid HTTP/1.1", {"Connection": "close"})
            head = h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._keeper.closed(self)


class ConnectionKeeper:
    """Keeps the connections of a server within its limits. For one event loop."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._waiting: dict[Connection, float] = {}  # for a request, and since when; the longest first
        self._unsent: dict[Connection, tuple[int, float]] = {}  # bytes in the buffer of each, and since when so many

    def opened(self, connection: Connection) -> bool:
        """Take a new connection in; False if no other could be closed for it."""
        self._unsent[connection] = 0, time.monotonic()
        there_is_room = len(self._unsent) <= self._limits.connections
        if not there_is_room and self._waiting:
            self._close(next(iter(self._waiting)))
            there_is_room = True
        self.waits(connection)
        return there_is_room

    def serves(self, connection: Connection) -> None:
        """A request of the connection is under way."""
        self._waiting.pop(connection, None)

    def waits(self, connection: Connection) -> None:
        """The connection waits for a request, from now on if it did not do so before."""
        if connection in self._unsent:
            self._waiting.setdefault(connection, time.monotonic())

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self._waiting.pop(connection, None)
        self._unsent.pop(connection, None)

    def close_overdue(self) -> None:
        """Close the connections whose clients have let a time limit pass. To be called about once a second."""
        now = time.monotonic()
        for connection in list(self._unsent):
            if self._is_silent(connection, now) or self._is_stalled(connection, now):
                self._close(connection)

    def _is_silent(self, connection: Connection, now: float) -> bool:
        """Whether the head of a request is overdue, from a client that has taken all of the last response."""
        since = self._waiting.get(connection)
        return since is not None and now - since > self._limits.head_seconds and not self._unsent[connection][0]

    def _is_stalled(self, connection: Connection, now: float) -> bool:
        size, since = self._unsent[connection]
        present = connection.transport.get_write_buffer_size()
        if present != size or not present:
            self._unsent[connection] = present, now
            return False
        return now - since > self._limits.stalled_seconds

    def _close(self, connection: Connection) -> None:
        """Close a connection at once, with whatever it still was to send."""
        self.closed(connection)
        connection.transport.abort()


_too_many_connections = JSONResponse(
    {"error": "too many connections are open; try again later"}, 503, {"Connection": "close", "Retry-After": "1"}
)
