"""What health and metrics say after the engine died: that it is dead, and that nothing is under way."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")
pytest.importorskip("prometheus_client", reason="the gauges need it")

from starlette.testclient import TestClient

import stepfusion as sf
from stepfusion.serving import AsyncEngine, EngineDead
from stepfusion.serving.http.app import make_app
from stepfusion_testing.http_service import Gate, gated_engine, until

GAUGES = ("lanes", "lanes_busy", "queue_images", "requests_active")


class Failing(Gate):
    """A gate behind which the device fails, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False

    def __call__(self, *arguments: Any) -> Any:
        out = super().__call__(*arguments)
        if self.fails:
            raise RuntimeError("the device is gone")
        return out


def failing_engine() -> tuple[Failing, sf.Engine]:
    network = Failing()
    known = {"num_classes": 4, "null_label": 3, "shape": (1, 8, 8), "device": "cpu", "batch": 4, "invariant": True}
    return network, sf.Engine(network, sf.NoiseSchedule.linear(100), **known)  # type: ignore[arg-type]


def gauges(service: AsyncEngine) -> dict[str, float]:
    assert service.registry is not None
    return {name: service.registry.get_sample_value(f"stepfusion_{name}") or 0.0 for name in GAUGES}


def is_dead_and_idle(client: TestClient, service: AsyncEngine) -> bool:
    responses = [client.get(path) for path in ("/healthz", "/readyz")]
    nothing = {"state": "dead", "waiting": 0, "busy": 0, "lanes": 0}
    said = all((r.status_code, r.json()) == (503, nothing) for r in responses)
    return said and gauges(service) == dict.fromkeys(GAUGES, 0.0) and service.status.quiet_seconds == 0


@pytest.mark.parametrize(
    "asks",
    [
        [{"n": 4, "labels": 0}],
        [{"n": 9, "labels": 0}],
        [{"n": 3, "labels": 0}, {"n": 3, "labels": 1, "guidance": 2.0}, {"n": 6, "labels": 2}],
    ],
)
def test_a_death_at_work_leaves_no_busy_lanes(asks: list[dict[str, Any]]) -> None:
    network, engine = failing_engine()
    with TestClient(make_app(service := AsyncEngine(engine))) as client:
        until(lambda: service.ready)
        service.submit(1, steps=3, labels=0).result(30)
        network.opened.clear()
        futures = [service.submit(steps=9, **ask) for ask in asks]
        until(lambda: service.status.busy > 0)
        network.fails = True
        network.opened.set()
        for future in futures:
            assert isinstance(future.exception(30), EngineDead)
        until(lambda: is_dead_and_idle(client, service), 5)
        response = client.post("/v1/generate", json={"steps": 3, "labels": 0})
        assert response.status_code == 503
        assert response.json()["error"].endswith("the device is gone")
        assert is_dead_and_idle(client, service), "and who comes later changes nothing"


def test_a_death_while_it_warms_up() -> None:
    network, engine = failing_engine()
    network.fails = True
    with TestClient(make_app(service := AsyncEngine(engine))) as client:
        until(lambda: service.status.state == "dead")
        until(lambda: is_dead_and_idle(client, service), 5)


def test_an_engine_that_was_closed_has_no_busy_lanes() -> None:
    _, engine = gated_engine()
    with TestClient(make_app(service := AsyncEngine(engine))) as client:
        until(lambda: service.ready)
        assert client.post("/v1/generate", json={"steps": 3}).status_code == 200
        futures = [service.submit(4, steps=90, labels=0) for _ in range(3)]
        service.close(drain=False)
        assert all(future.done() for future in futures)
        said = client.get("/healthz").json()
        assert (said["state"], said["waiting"], said["busy"]) == ("closed", 0, 0)
        assert {name: value for name, value in gauges(service).items() if value} == {"lanes": said["lanes"]}
