"""Every refused request is counted once, whoever refused it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")
pytest.importorskip("prometheus_client", reason="what is counted needs it")

from starlette.testclient import TestClient

import stepfusion as sf
from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.limits import Limits
from stepfusion_testing.http_service import JSON, Gate, call, gated_engine, idle, rejected, until

REASONS = ("invalid", "overloaded", "deadline", "closed", "dead")


class Site:
    """A served engine, a client of it, and the gate that holds it."""

    def __init__(self, gate: Gate, service: AsyncEngine, client: TestClient) -> None:
        self.gate, self.service, self.client = gate, service, client

    def counts(self) -> dict[str, int]:
        """Refused requests by reason, of those that were refused for it."""
        found = {reason: rejected(self.service, reason) for reason in REASONS}
        return {reason: count for reason, count in found.items() if count}


@pytest.fixture
def site() -> Iterator[Site]:
    gate, engine = gated_engine()
    service = AsyncEngine(engine, queue=6)
    limits = Limits(images=8, previews=20, body=1000, body_seconds=0.2)
    with TestClient(make_app(service, limits=limits), raise_server_exceptions=False) as client:
        until(lambda: service.ready)
        yield Site(gate, service, client)
        gate.opened.set()


INVALID: list[dict[str, Any]] = [
    {"json": {"n": 9}},
    {"json": {"nn": 1}},
    {"json": {"labels": []}},
    {"json": {"labels": "Fox"}},
    {"json": {"priority": 1}},
    {"json": {"timesteps": [1, 2]}},
    {"json": {"n": 7}},  # more than the queue holds, which the engine says
    {"json": {"deadline_s": 0}},  # and this as well
    {"json": []},
    {"content": b"{", "headers": JSON},
    {"content": b"{}", "headers": {"Content-Type": "text/plain"}},
    {"content": b" " * 1001, "headers": JSON},
]


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/stream"])
def test_each_invalid_request_is_counted_once(site: Site, path: str) -> None:
    for count, request in enumerate(INVALID, 1):
        assert 400 <= site.client.post(path, **request).status_code < 420
        assert site.counts() == {"invalid": count}, request
    assert site.client.post(path, json={"steps": 2}).status_code == 200
    assert site.counts() == {"invalid": len(INVALID)}


def test_fields_of_one_path_alone(site: Site) -> None:
    assert site.client.post("/v1/generate", json={"format": "bmp"}).status_code == 400
    assert site.client.post("/v1/stream", json={"n": 2, "steps": 20, "every": 1}).status_code == 400
    assert site.counts() == {"invalid": 2}


def test_a_body_that_does_not_come(site: Site) -> None:
    async def ask() -> int:
        running, _, sent = call(site.client.app, "/v1/generate", b"{", None)
        await asyncio.wait_for(running, 60)
        return int(sent[0]["status"])

    assert asyncio.run(ask()) == 408
    assert site.counts() == {"invalid": 1}


def test_images_that_are_no_pictures() -> None:
    engine = sf.Engine(lambda x, t: 0.1 * x, sf.NoiseSchedule.linear(100), shape=(2, 4, 4), device="cpu", batch=2)
    with TestClient(make_app(service := AsyncEngine(engine))) as client:
        until(lambda: service.ready)
        for count, path in enumerate(["/v1/generate", "/v1/stream"], 1):
            assert client.post(path, json={"steps": 2}).status_code == 400
            assert rejected(service, "invalid") == count


def test_what_the_engine_refuses_is_counted_by_its_reason(site: Site) -> None:
    site.client.post("/v1/generate", json={"steps": 2})
    assert site.client.post("/v1/generate", json={"steps": 50, "deadline_s": 1e-6}).status_code == 504
    assert site.counts() == {"deadline": 1}
    site.gate.opened.clear()
    site.service.submit(4, steps=2, labels=0)
    until(lambda: site.service.status.busy == 4)
    site.service.submit(6, steps=2, labels=0)
    assert site.client.post("/v1/stream", json={"steps": 2}).status_code == 429
    assert site.counts() == {"deadline": 1, "overloaded": 1}
    site.gate.opened.set()
    until(lambda: idle(site.service))


def test_what_asks_for_no_images_is_not_counted(site: Site) -> None:
    for path in ("/nowhere", "/v1/generate", "/healthz"):
        site.client.get(path)
    site.client.post("/nowhere", json={})
    assert site.counts() == {}


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/stream"])
def test_a_request_for_images_that_names_a_strange_host_is_counted(path: str) -> None:
    _, engine = gated_engine()
    with TestClient(make_app(service := AsyncEngine(engine), allowed_hosts=["testserver"])) as client:
        until(lambda: service.ready)
        strange = {"Host": "evil.example"}
        assert client.post(path, json={"steps": 2}, headers=strange).status_code == 421
        assert rejected(service, "invalid") == 1
        assert client.get("/v1/model", headers=strange).status_code == 421
        assert client.get(path, headers=strange).status_code == 421
        assert client.post(path, json={"steps": 2}).status_code == 200
        assert rejected(service, "invalid") == 1, "the others asked for no images, or were answered"


def test_a_client_that_leaves_is_not_refused(site: Site) -> None:
    async def ask() -> None:
        gone = asyncio.Event()
        gone.set()
        running, _, _ = call(site.client.app, "/v1/generate", b'{"steps": 50}', gone)
        await asyncio.wait_for(running, 60)

    asyncio.run(ask())
    assert site.counts() == {}


def test_reasons_are_those_that_are_documented(site: Site) -> None:
    for reason in REASONS:
        site.service.count_rejected(reason)
    assert site.counts() == dict.fromkeys(REASONS, 1)
    with pytest.raises(ValueError, match="reason must be"):
        site.service.count_rejected("bored")
