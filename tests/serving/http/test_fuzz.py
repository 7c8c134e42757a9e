"""Hundreds of malformed requests: each is refused with a 4xx and a sentence, and the service goes on."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.limits import Limits
from stepfusion.serving.http.requests import PictureRequest
from stepfusion_testing.http_service import JSON, gated_engine, idle, until

ROUNDS = 400
ODD: tuple[Any, ...] = (
    *(
        -1,
        -(10**400),
        10**400,
        1.5,
        -0.0001,
        1e308,
        "",
        "ddim ",
        "\0",
        "x" * 300,
        "\ud800",
        "__proto__",
        "../../x",
        True,
    ),
    *([], [[]], [None], {}, {"n": 1}, [1, "2"], [1e999], [2**64], [True], "🦉", [[[]]]),
)
ACCEPTED = [("guidance", 1.5), ("labels", [None]), ("priority", -1), ("deadline_s", 1.5), ("eta", 1.5)]
NUMBERS = [odd for odd in ODD if isinstance(odd, int | float) and not isinstance(odd, bool)]
ACCEPTED += [("lambda_min_clipped", odd) for odd in NUMBERS]  # where there is such a level
WRONG = [(name, odd) for name in PictureRequest.model_fields for odd in ODD if (name, odd) not in ACCEPTED]


def wrong_fields(rng: random.Random) -> bytes:
    """JSON with a field that no request may have, or a value that its field does not take."""
    ask: dict[str, Any] = {"n": 1, "steps": 2}
    name, value = rng.choice(WRONG)
    ask[name] = value
    if rng.random() < 0.2:
        ask[rng.choice(["", "N", "n ", "__class__", "table", "output", "progress", "start", "every"])] = 1
    return json.dumps(ask).replace("Infinity", "1e999").encode()


def broken_json(rng: random.Random) -> bytes:
    """What is no JSON object: cut, mutated, nested too deep, of another encoding."""
    whole = b'{"n": 1, "steps": 2, "labels": ["Cat"], "seed": 18446744073709551615}'
    match rng.randrange(6):
        case 0:
            return whole[: rng.randrange(len(whole))]
        case 1:
            at = rng.randrange(len(whole))
            return whole[:at] + bytes([rng.randrange(128, 256)]) + whole[at + 1 :]
        case 2:
            return b"[" * rng.randrange(1, 4000)
        case 3:
            return b'{"n":' * rng.randrange(2, 800) + b"1" + b"}" * rng.randrange(800)
        case 4:
            return json.dumps(rng.choice([odd for odd in ODD if not isinstance(odd, dict)])).encode()
        case _:
            return whole.decode().encode(rng.choice(["utf-16", "utf-32", "utf-7"])) + b"\xff"


def headers(rng: random.Random) -> dict[str, str]:
    """Mostly what is asked for."""
    kinds = [
        "text/plain",
        "multipart/form-data; boundary=x",
        "",
        "application/x-www-form-urlencoded",
        "application/xml",
    ]
    return {"Content-Type": rng.choice(kinds)} if rng.random() < 0.1 else JSON


def test_only_4xx_and_alive_after() -> None:
    gate, engine = gated_engine()
    service = AsyncEngine(engine, queue=8)
    rng = random.Random(6)
    seen: Counter[int] = Counter()
    with TestClient(make_app(service, limits=Limits(images=4, steps=10, evaluations=20, body=4096))) as client:
        until(lambda: service.ready)
        gate.opened.clear()  # what is accepted by mistake hangs, and fails the test
        for number in range(ROUNDS):
            body = wrong_fields(rng) if number % 2 else broken_json(rng)
            path = rng.choice(["/v1/generate", "/v1/stream"])
            response = client.post(path, content=body, headers=headers(rng))
            assert 400 <= response.status_code < 500, (body, response.text)
            said = response.json()["error"]
            assert said, body
            assert "Traceback" not in said, body
            assert len(said) < 400, body
            seen[response.status_code] += 1
        too_long = client.post("/v1/generate", content=b" " * 4097, headers={"content-type": "application/json"})
        seen[too_long.status_code] += 1
        gate.opened.set()
        assert idle(service)
        assert client.post("/v1/generate", json={"n": 2, "steps": 3}).status_code == 200
    assert set(seen) == {400, 413, 415}
