"""Ten thousand requests over HTTP: memory stays flat, and every image is the one that an engine makes alone."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="requests need a server")
pytest.importorskip("httpx2", reason="clients need it")

import httpx2

import stepfusion as sf
from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion_testing.http_service import events_of, idle, served_here, until
from stepfusion_testing.tiny_model import save_tiny_model

REQUESTS = int(os.environ.get("STEPFUSION_SOAK_REQUESTS", "10000"))
WARM = min(1000, REQUESTS // 2)  # after so many, everything that is kept has been made
CLIENTS = 24
ALLOWED_GROWTH = 24 << 20  # of bytes that allocators keep for later, whatever the number of requests
SAMPLERS = (("ddim", 2, None), ("ddim", 3, 0.5), ("dpmpp_2m", 3, None), ("euler", 2, None), ("ddpm", 2, None))


@dataclass(frozen=True)
class Asked:
    """One request, small enough that ten thousand take minutes."""

    sampler: str
    steps: int
    eta: float | None
    seed: int
    n: int
    label: int | None
    guidance: float | None
    stream: bool

    @classmethod
    def drawn(cls, rng: random.Random) -> Asked:
        sampler, steps, eta = rng.choice(SAMPLERS)
        label, guidance = rng.choice((None, 0, 1, 2)), rng.choice((None, None, 2.0))
        return cls(sampler, steps, eta, rng.randrange(8), rng.choice((1, 1, 2)), label, guidance, rng.random() < 0.1)

    @property
    def options(self) -> dict[str, Any]:
        given = {"sampler": self.sampler, "steps": self.steps, "eta": self.eta, "seed": self.seed}
        given |= {"labels": self.label, "guidance": self.guidance}
        return {name: value for name, value in given.items() if value is not None}


class Twins:
    """The images that the engine makes without a server, each made once."""

    def __init__(self, engine: sf.Engine) -> None:
        self._engine, self._made = engine, dict[Asked, np.ndarray[Any, Any]]()

    def of(self, asked: Asked) -> np.ndarray[Any, Any]:
        key = Asked(**{**vars(asked), "stream": False})
        if key not in self._made:
            x = self._engine.sample(asked.n, progress=False, **asked.options)
            self._made[key] = self._engine.to_uint8(x).numpy()
        return self._made[key]


def resident_bytes() -> int:
    """The memory that this process has now; where that is not told, the most that it had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10


async def images_of(client: Any, asked: Asked) -> np.ndarray[Any, Any]:
    """The pixels that the server sends, uint8 [n, H, W, C]; of a stream those of its last event."""
    body = {**asked.options, "n": asked.n}
    if asked.stream:
        response = await client.post("/v1/stream", json={**body, "every": 1})
        assert response.status_code == 200, response.text
        name, result = events_of(response.text)[-1]
        assert name == "result", result
        pictures = [Image.open(io.BytesIO(base64.b64decode(one["png"]))) for one in result["images"]]
        return np.stack([np.atleast_3d(np.asarray(picture)) for picture in pictures])
    response = await client.post("/v1/generate", json={**body, "format": "npz"})
    assert response.status_code == 200, response.text
    with np.load(io.BytesIO(response.content), allow_pickle=False) as arrays:
        return np.asarray(arrays["images"])


async def ask_all(port: int, twins: Twins, count: int, rng: random.Random) -> int:
    """``count`` requests by many clients at once, each compared; how many were."""
    left, compared = iter(range(count)), 0

    async def client() -> None:
        nonlocal compared
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as connection:
            for _ in left:
                asked = Asked.drawn(rng)
                pixels = await images_of(connection, asked)
                np.testing.assert_array_equal(pixels, twins.of(asked), err_msg=str(asked))
                compared += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return compared


@pytest.mark.soak
def test_ten_thousand_requests_leave_memory_flat_and_images_equal(tmp_path: Path, one_thread: None) -> None:
    model = save_tiny_model(tmp_path / "model")
    arguments: dict[str, Any] = {"device": "cpu", "batch": 8, "invariant": True}
    twins = Twins(sf.Engine.from_pretrained(model, **arguments))
    service = AsyncEngine(sf.Engine.from_pretrained(model, **arguments), queue=1024)
    rng = random.Random(0)
    with served_here(make_app(service, name="pets"), drain=5.0) as (_, port), torch.inference_mode():
        until(lambda: service.ready)
        compared = asyncio.run(ask_all(port, twins, WARM, rng))
        until(lambda: idle(service))
        before = resident_bytes()
        compared += asyncio.run(ask_all(port, twins, REQUESTS - WARM, rng))
        until(lambda: idle(service))
        growth = resident_bytes() - before
        assert service.live
    assert compared == REQUESTS
    assert growth < ALLOWED_GROWTH, f"{growth / 2**20:.1f} MiB more after {REQUESTS - WARM} requests"
