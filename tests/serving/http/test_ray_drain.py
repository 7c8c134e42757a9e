"""A replica whose application is deleted ends its requests as the local server does. Ray itself is not run here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

from stepfusion.serving import AsyncEngine
from stepfusion.serving.http import stopping
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.ray_server import Replicas, deployment
from stepfusion_testing.http_service import events_of, gated_engine, until

STOPPED = {"error": "the server was stopped before this request was done"}


class FakeServe(ModuleType):
    """What a deployment uses of ``ray.serve``: it keeps what it is given, and says what a test wants."""

    def __init__(self) -> None:
        super().__init__("ray.serve")
        self.build: Callable[[], Any] = dict
        self.options: dict[str, Any] = {}
        self.applications: dict[str, Any] = {}
        self.asked = 0

    def ingress(self, build: Callable[[], Any]) -> Callable[[Any], Any]:
        self.build = build
        return lambda kind: kind

    def deployment(self, **options: Any) -> Callable[[Any], Any]:
        self.options = options
        return lambda kind: SimpleNamespace(bind=lambda: kind)

    def status(self) -> Any:
        self.asked += 1
        return SimpleNamespace(applications=self.applications)

    def say(self, status: str) -> None:
        """The state of the application from now on."""
        self.applications = {"stepfusion": SimpleNamespace(status=status)}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    fake, ray = FakeServe(), ModuleType("ray")
    ray.serve = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", fake)
    monkeypatch.setattr(stopping, "_WANTED_SECONDS", 0.02)
    return fake


@pytest.mark.parametrize("gone", ["DELETING", "forgotten"])
def test_requests_under_way_get_503_when_the_drain_is_over(serve: FakeServe, gone: str) -> None:
    gate, engine = gated_engine()
    service = AsyncEngine(engine)
    model: Any = SimpleNamespace(make=lambda: make_app(service))
    deployment(model, Replicas(), drain=0.2)
    assert serve.options["graceful_shutdown_timeout_s"] > 0.2 + 1, "the responses still have to be sent"
    serve.say("DEPLOYING")
    with TestClient(serve.build()) as client, ThreadPoolExecutor(2) as pool:
        until(lambda: service.ready)
        serve.say("RUNNING")
        gate.opened.clear()
        picture, stream = (
            pool.submit(client.post, path, json={"steps": 9, "n": 2, "labels": 0})
            for path in ("/v1/generate", "/v1/stream")
        )
        until(lambda: service.status.busy + service.status.waiting == 4)
        asked = serve.asked
        until(lambda: serve.asked > asked + 3)
        assert not picture.done()
        if gone == "forgotten":
            serve.applications = {}
        else:
            serve.say(gone)
        response = picture.result(25)
        assert (response.status_code, response.json()) == (503, STOPPED)
        assert events_of(stream.result(25).text)[-1] == ("error", {"status": 503, **STOPPED})
        gate.opened.set()


def test_what_was_never_seen_and_what_cannot_be_seen_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_WANTED_SECONDS", 0.01)
    ended, answers = threading.Event(), iter([False, False, ConnectionError(), True, ConnectionError(), True, False])
    asked: list[Any] = []

    def is_wanted() -> bool:
        answer = next(answers)
        assert not ended.is_set()
        asked.append(answer)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    stopping.when_gone(is_wanted, 0.0, ended.set)
    assert ended.wait(25)
    assert len(asked) == 7
