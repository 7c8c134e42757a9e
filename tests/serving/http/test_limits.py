"""What one client may take from the others: previews and priorities, within the operator's limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.limits import Limits
from stepfusion.serving.http.requests import StreamRequest
from stepfusion.serving.http.validation import preview_interval, validate
from stepfusion_testing.http_service import events_of, gated_engine, until

LIMITS = Limits(images=8, steps=100, previews=20, priority=3)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    _, engine = gated_engine()
    with TestClient(make_app(service := AsyncEngine(engine), limits=LIMITS)) as client:
        until(lambda: service.ready)
        yield client


@pytest.mark.parametrize(
    ("ask", "previews"),
    [
        ({"n": 1, "steps": 21, "every": 1}, 21),
        ({"n": 8, "steps": 30, "every": 10}, 24),
        ({"n": 7, "steps": 3, "every": 1}, 21),
        ({"n": 3, "steps": 7, "every": 1}, 21),
        ({"timesteps": list(range(99, 10, -2)), "every": 2}, 23),
    ],
)
def test_too_many_previews_are_400(client: Any, ask: dict[str, Any], previews: int) -> None:
    response = client.post("/v1/stream", json=ask)
    told = response.json()["error"]
    assert response.status_code == 400
    assert told.startswith("n * steps / every is too large: ")
    assert told.endswith(f" with every = {ask['every']} are {previews} previews, and a request may have 20")
    images = ask.get("n", 1)
    assert f"{images} image{'s' if images > 1 else ''} of {ask.get('steps', 45)} steps" in told, "what was entered"


@pytest.mark.parametrize(
    "ask",
    [
        {"n": 1, "steps": 20, "every": 1},
        {"n": 8, "steps": 30, "every": 15},
        {"n": 8, "steps": 30, "every": 4_000_000_000},
        {"n": 6, "steps": 3, "every": 1, "guidance": 2},
    ],
)
def test_as_many_previews_as_the_limit_are_made(client: Any, ask: dict[str, Any]) -> None:
    response = client.post("/v1/stream", json=ask)
    assert response.status_code == 200
    assert events_of(response.text)[-1][0] == "result"


@pytest.mark.parametrize(("n", "steps"), [(1, 1), (1, 100), (2, 100), (3, 35), (8, 3), (8, 100), (30, 10)])
def test_default_previews_keep_within_the_limit(n: int, steps: int) -> None:
    """More images than previews get one preview each: the default is never refused."""
    _, engine = gated_engine()
    limits = Limits(images=30, previews=20)
    validated = validate(StreamRequest(n=n, steps=steps), engine, limits)
    each = -(-steps // preview_interval(validated, None, limits))
    assert n * each <= max(20, n)
    assert 1 <= each <= 10


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/stream"])
def test_clients_may_not_raise_their_priority_above_the_limit(client: Any, path: str) -> None:
    for priority, status in ((4, 400), (1000, 400), (3, 200), (0, 200), (-1000, 200)):
        response = client.post(path, json={"steps": 2, "priority": priority})
        assert response.status_code == status, priority
        if status == 400:
            assert response.json() == {"error": f"priority must be at most 3 on this server, got {priority}"}


def test_by_default_nobody_passes_the_others() -> None:
    _, engine = gated_engine()
    with TestClient(make_app(service := AsyncEngine(engine))) as client:
        until(lambda: service.ready)
        assert client.post("/v1/generate", json={"steps": 2, "priority": 1}).status_code == 400
        assert client.post("/v1/generate", json={"steps": 2, "priority": 0}).status_code == 200


def test_the_description_and_the_model_say_the_limits(client: Any) -> None:
    limits = client.get("/v1/model").json()["limits"]
    assert (limits["previews"], limits["priority"]) == (20, 3)
    document = client.get("/openapi.json").json()
    assert "20 previews" in document["info"]["description"]
    for path in ("/v1/generate", "/v1/stream"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"]["priority"]["maximum"] == 3
        assert "from -1000 to 3" in schema["properties"]["priority"]["description"]
