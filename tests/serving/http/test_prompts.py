"""Prompts over HTTP: the images of the same engine offline, bit for bit, and what is refused before any work."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

import stepfusion as sf
from stepfusion.files.png_text import read_texts
from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.intake import Intake
from stepfusion.serving.http.limits import Limits
from stepfusion_testing.conditioned import Prompts, TextNetwork, text_engine
from stepfusion_testing.http_service import events_of, gated_engine, idle, rejected, until

STEPS = 3


class Held(Prompts):
    """An encoder that counts, and that waits while it is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.began = threading.Event(), threading.Event()
        self.opened.set()

    def __call__(self, prompt: str | None) -> dict[str, Tensor]:
        self.began.set()
        assert self.opened.wait(60)
        return super().__call__(prompt)


def larger(x: Tensor) -> Tensor:
    """Grey images [n, 1, 8, 8] of latents [n, 2, 4, 4]."""
    return x.mean(1, keepdim=True).repeat_interleave(2, 2).repeat_interleave(2, 3)


class Here:
    """A served engine that takes prompts, and a client of it."""

    def __init__(self) -> None:
        self.prompts = Held()
        self.engine = text_engine(prompts=self.prompts, decode=larger, batch=4, invariant=True)
        self.service = AsyncEngine(self.engine, queue=16)
        self.app = make_app(self.service, limits=Limits(images=4, steps=20), name="texts")

    def offline(self, n: int, **options: Any) -> np.ndarray[Any, Any]:
        pixels: np.ndarray[Any, Any] = self.engine.to_uint8(self.engine.sample(n, steps=STEPS, **options)).numpy()
        return pixels


@pytest.fixture(scope="module")
def here() -> Here:
    return Here()


@pytest.fixture(scope="module")
def client(here: Here) -> Iterator[TestClient]:
    with TestClient(here.app, raise_server_exceptions=False) as client:
        until(lambda: here.service.ready)
        yield client


@pytest.mark.parametrize(
    "ask",
    [
        {"prompt": "a boat"},
        {"n": 2, "prompt": "a boat"},
        {"prompt": ["a boat", "Zoë", ""], "negative_prompt": "rain", "guidance": 3.0, "seed": 7},
        {"n": 2, "negative_prompt": ["rain", "snow"], "guidance": [1.0, 2.0]},
        {"n": 2, "guidance": 2.0},
    ],
)
def test_arrays_are_those_of_the_engine(here: Here, client: TestClient, ask: dict[str, Any]) -> None:
    answer = client.post("/v1/generate", json={**ask, "steps": STEPS, "format": "npz"})
    assert answer.status_code == 200, answer.text
    images = np.load(io.BytesIO(answer.content))["images"]
    np.testing.assert_array_equal(images, here.offline(len(images), **{k: v for k, v in ask.items() if k != "n"}))
    assert len(images) == ask.get("n", len(ask["prompt"]) if isinstance(ask.get("prompt"), list) else 1)


def test_a_prompt_is_encoded_once_for_a_request(here: Here, client: TestClient) -> None:
    here.prompts.encoded.clear()
    ask = {"prompt": ["a", "b", "a"], "negative_prompt": "c", "guidance": 2.0, "steps": STEPS, "format": "npz"}
    assert client.post("/v1/generate", json=ask).status_code == 200
    assert sorted(here.prompts.encoded, key=str) == ["a", "b", "c"]


def test_a_stream_and_its_pictures(here: Here, client: TestClient) -> None:
    ask = {"prompt": ["a boat", "-rain"], "negative_prompt": "snow", "guidance": 2.0, "steps": STEPS, "every": 1}
    events = events_of(client.post("/v1/stream", json=ask).text)
    assert events[0][0] == "accepted"
    assert any(name == "progress" for name, _ in events)
    name, result = events[-1]
    assert name == "result"
    wanted = here.offline(2, prompt=["a boat", "-rain"], negative_prompt="snow", guidance=2.0)
    for place, one in enumerate(result["images"]):
        data = base64.b64decode(one["png"])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), wanted[place, :, :, 0])
        texts = read_texts(data)
        assert texts["stepfusion.prompt"] == ask["prompt"][place]
        assert texts["stepfusion.negative"] == "snow"
        words = shlex.split(texts["stepfusion.command"])
        assert words[words.index("--negative") + 1] == "snow"
        assert "--prompt=-rain" in words or words[words.index("--prompt") + 1] == "a boat"


def test_the_image_api_takes_the_prompt_itself(here: Here, client: TestClient) -> None:
    ask = {"prompt": "2, a boat", "negative_prompt": "rain", "guidance": 2.0, "n": 2, "steps": STEPS, "size": "8x8"}
    answer = client.post("/v1/images/generations", json=ask)
    assert answer.status_code == 200, answer.text
    wanted = here.offline(2, prompt="2, a boat", negative_prompt="rain", guidance=2.0)
    for place, one in enumerate(answer.json()["data"]):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))))
        np.testing.assert_array_equal(picture, wanted[place, :, :, 0])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            {"prompt": "x" * 10_001},
            "prompt must be a text of at most 10000 characters, or a list of one for each image",
        ),
        ({"negative_prompt": ["x", "y" * 10_001]}, "negative_prompt must be a text of at most 10000 characters"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": []}, "prompt must be a text"),
        ({"n": 3, "prompt": ["a", "b"]}, "prompt must be one value or one for each of the 3 images, got 2"),
        ({"prompt": ["a"] * 5}, "n is too large: 5 images, and a request may have 4"),
        ({"prompt": "a\0b"}, "prompt must not have a NUL character"),
        ({"prompt": "not a text"}, "prompt cannot be encoded"),
    ],
)
def test_what_is_refused(here: Here, client: TestClient, ask: dict[str, Any], message: str) -> None:
    assert isinstance(here.engine.network, TextNetwork)
    here.engine.network.batches.clear()
    before = rejected(here.service, "invalid")
    for path in ("/v1/generate", "/v1/stream"):
        answer = client.post(path, json={**ask, "steps": STEPS})
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(message)
    assert rejected(here.service, "invalid") == before + 2
    assert here.engine.network.batches == []


def test_a_model_without_an_encoder_takes_none(here: Here, client: TestClient) -> None:
    facts = client.get("/v1/model").json()
    assert (facts["prompts"], facts["guidance"], facts["shape"]) == (True, True, [1, 8, 8])
    service = AsyncEngine(gated_engine()[1])
    with TestClient(make_app(service)) as other:
        until(lambda: service.ready)
        assert other.get("/v1/model").json()["prompts"] is False
        for name in ("prompt", "negative_prompt"):
            answer = other.post("/v1/generate", json={name: "Cat"})
            assert answer.status_code == 400
            assert answer.json() == {"error": f"{name} was given, and this model has no text encoder"}
        answer = other.post("/v1/images/generations", json={"prompt": "Cat", "negative_prompt": "Dog"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "negative_prompt"


def test_the_form_has_boxes_that_the_model_shows(client: TestClient) -> None:
    page = client.get("/").text
    for name in ("prompt", "negative"):
        assert re.search(rf'<div id="{name}-field" class="wide" hidden>.*<textarea id="{name}"', page)
    assert 'for (const id of ["prompt-field", "negative-field"]) find(id).hidden = !model.prompts;' in page


def test_the_description_names_the_fields(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/generate", "/v1/stream", "/v1/images/generations"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"prompt", "negative_prompt"} <= schema["properties"].keys()


def test_who_leaves_while_a_prompt_is_encoded_leaves_nothing(here: Here, client: TestClient) -> None:
    """And the event loop, which other requests need, goes on meanwhile."""

    async def leave() -> None:
        submitting = asyncio.ensure_future(Intake(here.service).submit({"prompt": "a boat", "steps": 20}))
        while not here.prompts.began.is_set():
            await asyncio.sleep(0.001)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        here.prompts.opened.set()
        await asyncio.sleep(0.05)

    here.prompts.began.clear()
    here.prompts.opened.clear()
    try:
        asyncio.run(leave())
    finally:
        here.prompts.opened.set()
    until(lambda: idle(here.service))


def test_stable_diffusion_served_is_the_engine_offline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from stepfusion_testing.stable_diffusion import save_stable_diffusion

    engine = sf.Engine.from_pretrained(
        save_stable_diffusion(tmp_path / "model"), device="cpu", batch=2, invariant=True
    )
    asked: dict[str, Any] = {
        "prompt": ["cat on dog", "dog sat"],
        "negative_prompt": "on",
        "guidance": 3.0,
        "steps": 2,
    }
    latents = engine.sample(**asked)
    pixels = engine.to_uint8(latents).numpy()
    service = AsyncEngine(engine)
    with TestClient(make_app(service, name="tiny")) as client:
        until(lambda: service.ready)
        assert client.get("/v1/model").json()["shape"] == [3, 16, 16]
        answer = client.post("/v1/generate", json={**asked, "format": "npz"})
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.content))["images"], pixels)
        assert torch.equal(service.submit(**asked).result(60).images, latents)
        picture = np.ascontiguousarray(pixels[0])
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "png")
        form = {"prompt": "dog", "strength": "0.5", "steps": "2"}
        edited = client.post("/v1/images/edits", data=form, files={"image": ("a.png", data.getvalue(), "image/png")})
        assert edited.status_code == 200, edited.text
        assert edited.json()["size"] == "16x16"
        shown = torch.from_numpy(picture).permute(2, 0, 1)[None].to(torch.float32) / 127.5 - 1
        wanted = engine.to_uint8(engine.sample(image=shown, strength=0.5, prompt="dog", steps=2)).numpy()[0]
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(edited.json()["data"][0]["b64_json"]))))
        np.testing.assert_array_equal(found, wanted)
