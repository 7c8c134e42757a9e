"""Which host a request may name.

A page of another site can make a browser send requests to a server on loopback, and read the responses, by letting a
name of its own resolve to 127.0.0.1 (DNS rebinding). Such requests name the page's host in their Host header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from stepfusion.serving.http.errors import error_response, shown

_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_HOST = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(:\d*)?")


def check_hosts(hosts: Iterable[str]) -> tuple[str, ...]:
    """Hosts as they are compared, in lower case. ValueError if one is none of name, ``*.name``, address and ``*``."""
    checked = []
    for host in hosts:
        plain = _plain(host)
        if host != "*" and _address(plain) is None and not _NAME.fullmatch(plain):
            raise ValueError(f"allowed hosts must be such as example.org, *.example.org, 10.0.0.7 or *, got {host!r}")
        checked.append(plain)
    return tuple(checked)


class HostCheck:
    """ASGI middleware: a request that names a host which is not this server's gets status 421.

    Accepted are always localhost, the addresses of loopback, the address that the request arrived at, and ``own``.
    Others are accepted if ``allowed`` has them; without ``allowed``, unless the request arrived at loopback.

    Args:
        own: what this server is called, for instance in the URL that it announces.
        allowed: names and addresses; ``*.example.org`` stands for every name that ends so, and ``*`` for all.
        on_refusal: is called with the scope of each request that is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        own: str | None = None,
        allowed: Sequence[str] | None = None,
        on_refusal: Callable[[Scope], object] = lambda scope: None,
    ) -> None:
        self._app, self._on_refusal = app, on_refusal
        self._own = None if own is None else _plain(own)
        self._allowed = None if allowed is None else check_hosts(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            arrived_at = (scope.get("server") or ("",))[0]
            strange = [host for host in named if not self._is_accepted(host, arrived_at)]
            if strange:
                self._on_refusal(scope)
                await _refusal(strange[0], scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_accepted(self, header: str, arrived_at: str) -> bool:
        matched = _HOST.fullmatch(header.strip())
        host = _plain(matched["host"]) if matched else ""
        if host in ("localhost", self._own) or _is_here(_address(host), _address(arrived_at)):
            return True
        if self._allowed is None:
            return not _is_loopback(_address(arrived_at))
        return any(_matches(host, pattern) for pattern in self._allowed)


def _refusal(host: str, path: str) -> ASGIApp:
    message = f"Host must be a name of this server (--allowed-hosts adds some), got {shown(host)}"
    return error_response(421, message, path=path)


def _plain(host: str) -> str:
    """A host without the marks that make no difference: case, a last dot, and an address's brackets and spelling."""
    host = host.lower().removesuffix(".")
    inside = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    address = _address(inside)
    return host if address is None else str(address)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(address: IPv4Address | IPv6Address | None) -> bool:
    return address is not None and address.is_loopback


def _is_here(host: IPv4Address | IPv6Address | None, arrived_at: IPv4Address | IPv6Address | None) -> bool:
    """Whether an address is one that needs no name to be resolved to reach this server."""
    return host is not None and (host.is_loopback or host.is_unspecified or host == arrived_at)


def _matches(host: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return pattern in ("*", host)
