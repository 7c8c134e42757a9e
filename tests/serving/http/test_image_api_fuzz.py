"""Hundreds of malformed requests to the image API: each is refused in its form, at once, and the service goes on."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'http'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.image_requests import ImageRequest
from stepfusion.serving.http.limits import Limits
from stepfusion_testing.http_service import JSON, gated_engine, idle, until

ROUNDS = 300
ODD = (-1, 10**400, 1.5, "", "\0", "x" * 300, True, [], [[]], [None], {}, [2**64], "🦉", 0, "none", None, "1", 1e308)
INSERTED = (b"\r\n", b"--b", b"\0", b'"', b"\r\n\r\n", b"\xff\xfe", b";", b"name*=utf-8''x", b"[]", b"1e999", b"NaN")
PLAIN = "multipart/form-data; boundary=b"
KINDS = (PLAIN.replace("=b", '="b"'), PLAIN.replace("=b", "*=utf-8''b"), PLAIN.replace("=b", '="'))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    _, engine = gated_engine()
    service = AsyncEngine(engine, queue=8)
    limits = Limits(images=4, steps=10, evaluations=20, body=4096)
    with TestClient(make_app(service, limits=limits), raise_server_exceptions=False) as client:
        until(lambda: service.ready)
        yield client
        assert idle(service)


def check(response: Any, sent: object) -> None:
    """A refusal in the form of the API, or images."""
    assert response.status_code < 500, (sent, response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 700, sent
        assert "Traceback" not in error["message"], sent


def whole_form() -> bytes:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4, :, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    head = '--b\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    texts = {"prompt": b"dog", "steps": b"3", "seed": b"[1,2]"}
    parts = [head.format(name, "").encode() + text + b"\r\n" for name, text in texts.items()]
    picture = head.format("image", '; filename="x"').encode() + buffer.getvalue() + b"\r\n"
    return b"".join([*parts, picture, b"--b--\r\n"])


def mutated(rng: random.Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randrange(30)]
            case 2:
                data[at:at] = rng.choice(INSERTED)
            case _ if rng.random() < 0.2:
                del data[at:]
    return bytes(data)


def test_forms(client: TestClient) -> None:
    rng, whole = random.Random(1), whole_form()
    assert client.post("/v1/images/edits", content=whole, headers={"Content-Type": PLAIN}).status_code == 200
    for _ in range(ROUNDS):
        body = mutated(rng, whole)
        kind = rng.choice(KINDS) if rng.random() < 0.1 else PLAIN
        check(client.post("/v1/images/edits", content=body, headers={"Content-Type": kind}), body)


def test_fields(client: TestClient) -> None:
    rng = random.Random(2)
    names = [*ImageRequest.model_fields, "zz\0", "__proto__"]
    for _ in range(ROUNDS):
        ask: dict[str, Any] = {"prompt": "dog", "steps": 2}
        ask |= {rng.choice(names): rng.choice(ODD) for _ in range(rng.randrange(1, 4))}
        check(client.post("/v1/images/generations", content=json.dumps(ask), headers=JSON), ask)
