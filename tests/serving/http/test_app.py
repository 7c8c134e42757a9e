"""The HTTP application, in this process: what it answers, and what it leaves behind."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

import stepfusion as sf
from stepfusion.serving import AsyncEngine, EngineDead
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.limits import Limits
from stepfusion_testing.http_service import (
    JSON,
    NAMES,
    NAN_LABEL,
    NULL_LABEL,
    Gate,
    call,
    events_of,
    gated_engine,
    idle,
    until,
)

LIMITS = Limits(images=8, steps=60, evaluations=300, elements=1024, body=4096, body_seconds=0.3)


class Here:
    """A served engine, a client of it, and the gate that holds it."""

    def __init__(self, gate: Gate, service: AsyncEngine, client: TestClient) -> None:
        self.gate, self.service, self.client = gate, service, client

    def generate(self, **ask: Any) -> Any:
        return self.client.post("/v1/generate", json=ask)

    def events(self, **ask: Any) -> list[tuple[str, Any]]:
        return events_of(self.client.post("/v1/stream", json=ask).text)


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    gate, engine = gated_engine()
    service = AsyncEngine(engine, queue=16)
    with TestClient(make_app(service, limits=LIMITS, name="pets"), raise_server_exceptions=False) as client:
        until(lambda: service.ready)
        yield Here(gate, service, client)
        gate.opened.set()


@pytest.fixture(autouse=True)
def _nothing_stays(here: Here) -> Iterator[None]:
    yield
    here.gate.opened.set()
    until(lambda: idle(here.service))


def pixels(engine: sf.Engine, **arguments: Any) -> np.ndarray[Any, Any]:
    return engine.to_uint8(engine.sample(**arguments, progress=False)).numpy()


# Images


def test_npz_holds_what_the_engine_makes_offline(here: Here) -> None:
    ask = {"n": 3, "steps": 7, "eta": 0.5, "seed": 2**64 - 1, "indices": [5, 0, 9], "guidance": 2}
    response = here.generate(**ask, labels=["dog", 0, None], format="npz")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-npz"
    made = np.load(io.BytesIO(response.content), allow_pickle=False)
    labels = [1, 0, NULL_LABEL]
    assert made["images"].dtype == np.uint8
    np.testing.assert_array_equal(made["images"], pixels(here.service.engine, **ask, labels=labels))
    assert made["seeds"].tolist() == [2**64 - 1] * 3
    assert made["indices"].tolist() == [5, 0, 9]
    assert made["labels"].tolist() == labels


def test_eta_is_heeded_with_each_sampler_that_takes_one(here: Here) -> None:
    made = []
    for sampler, eta in (("ddim", 1), ("euler_ancestral", 0), ("euler_ancestral", 0.5), ("euler_ancestral", None)):
        ask = {"n": 2, "steps": 5, "sampler": sampler, "labels": 1, "eta": eta}
        response = here.generate(**ask, format="npz")
        assert response.status_code == 200
        made.append(np.load(io.BytesIO(response.content))["images"])
        np.testing.assert_array_equal(made[-1], pixels(here.service.engine, **ask))
    assert not any(np.array_equal(one, another) for one, another in itertools.combinations(made, 2))


def test_steps_are_where_they_are_asked_for(here: Here) -> None:
    engine, made = here.service.engine, []
    asked: list[dict[str, Any]] = [{"steps": 5, "spacing": name} for name in ("leading", "trailing", "karras")]
    for where in [*asked, {"timesteps": [80, 33, 0]}, {"sampler": "ddpm", "timesteps": [99, 3]}]:
        response = here.generate(n=2, labels=1, format="npz", **where)
        assert response.status_code == 200
        made.append(np.load(io.BytesIO(response.content))["images"])
        np.testing.assert_array_equal(made[-1], pixels(engine, n=2, labels=1, table=engine.table(**where)))
    assert not any(np.array_equal(one, another) for one, another in itertools.combinations(made, 2))


def test_png_is_one_image_or_a_grid(here: Here) -> None:
    expected = pixels(here.service.engine, n=4, steps=5, labels=1)
    for n, wanted in ((1, expected[0, ..., 0]), (4, np.block([[*expected[:2, ..., 0]], [*expected[2:, ..., 0]]]))):
        response = here.generate(n=n, steps=5, labels="Dog")
        assert response.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(response.content))), wanted)


def test_a_stream_tells_of_steps_and_ends_with_the_images(here: Here) -> None:
    (first, *steps, last) = here.events(n=2, steps=6, every=4, seed=2**63 + 1, labels=[0, None])
    assert first == ("accepted", {"images": 2, "steps": 6})
    told = {(data["step"], image) for name, data in steps for image in data["images"] if name == "progress"}
    assert told == {(4, 0), (4, 1), (6, 0), (6, 1)}
    assert all(data["steps"] == 6 and len(data["previews"]) == len(data["images"]) for _, data in steps)
    name, result = last
    assert name == "result"
    facts = [(one["name"], one["seed"], one["index"], one["label"], one["class"]) for one in result["images"]]
    seed = 2**63 + 1
    assert facts == [(f"{seed}-0", seed, 0, 0, "Cat"), (f"{seed}-1", seed, 1, NULL_LABEL, None)]
    expected = pixels(here.service.engine, n=2, steps=6, seed=seed, labels=[0, NULL_LABEL])
    for one, wanted in zip(result["images"], expected, strict=True):
        png = Image.open(io.BytesIO(base64.b64decode(one["png"])))
        np.testing.assert_array_equal(np.asarray(png), wanted[..., 0])
    assert result["seconds"]["total"] > 0


def test_previews_are_small_and_are_x0() -> None:
    _, engine = gated_engine((3, 160, 100))
    with TestClient(make_app(service := AsyncEngine(engine))) as client:
        until(lambda: service.ready)
        text = client.post("/v1/stream", json={"steps": 2, "every": 1, "labels": 0}).text
    x0 = [engine.to_uint8(event.x0)[0] for event in engine.stream(1, steps=2, labels=0)]
    previews = [data["previews"][0] for name, data in events_of(text) if name == "progress"]
    assert len(previews) == 2
    for preview, wanted in zip(previews, x0, strict=True):
        png = np.asarray(Image.open(io.BytesIO(base64.b64decode(preview))))
        np.testing.assert_array_equal(png, wanted[::3, ::3].numpy())


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_are_no_pictures_come_as_npz_only(channels: int) -> None:
    schedule = sf.NoiseSchedule.linear(100)
    engine = sf.Engine(lambda x, t: 0.1 * x, schedule, shape=(channels, 4, 4), device="cpu", batch=2)
    with TestClient(make_app(service := AsyncEngine(engine))) as client:
        until(lambda: service.ready)
        for path in ("/v1/generate", "/v1/stream"):
            response = client.post(path, json={"steps": 2})
            assert response.status_code == 400
            assert "'npz'" in response.json()["error"]
        made = np.load(io.BytesIO(client.post("/v1/generate", json={"steps": 2, "format": "npz"}).content))
        assert "labels" not in made
        np.testing.assert_array_equal(made["images"], pixels(engine, n=1, steps=2))
        response = client.post("/v1/generate", json={"labels": 1, "format": "npz"})
        assert (response.status_code, response.json()) == (
            400,
            {"error": "labels were given, and this model takes none"},
        )


# What is wrong

WRONG: list[tuple[Any, str]] = [
    ({"n": 0}, "n must be an integer of at least 1, got 0"),
    ({"n": True}, "n must be an integer"),
    ({"n": 1.0}, "n must be an integer"),
    ({"n": 9}, "n is too large: 9 images, and a request may have 8"),
    ({"n": 10**30}, "n is too large"),
    ({"indices": list(range(9))}, "n is too large: 9 images"),
    ({"steps": 61}, "steps is too large: 61 steps, and a request may have 60"),
    ({"sampler": "ddpm"}, "steps is too large: 100 steps"),
    ({"n": 8, "steps": 40}, "n * steps is too large: 8 images of 40 steps are 320 evaluations"),
    (
        {"n": 4, "steps": 40, "guidance": [1, 1, 1, 2]},
        "n * steps is too large: 4 images of 40 steps, with guidance two evaluations a step, are 320 evaluations",
    ),
    ({"sampler": "midpoint"}, "sampler must be one of 'ddim'"),
    ({"sampler": "flow_sde"}, "sampler must be one of 'ddim'"),
    ({"sampler": "ddim_inversion"}, "sampler must be one of 'ddim'"),
    (
        {"sampler": "ddpm", "steps": 5, "eta": 0.5},
        "eta is an option of sampler ddim, euler_ancestral, dpmpp_2m_sde, dpmpp_3m, tcd and flow_sde, "
        "got sampler ddpm",
    ),
    (
        {"sampler": "dpmpp_2m", "eta": 0},
        "eta is an option of sampler ddim, euler_ancestral, dpmpp_2m_sde, dpmpp_3m, tcd and flow_sde, "
        "got sampler dpmpp_2m",
    ),
    ({"sampler": "euler_ancestral", "eta": -1}, "eta must be a finite number in [0, 1], got -1"),
    ({"eta": -1}, "eta must be a finite number in [0, 1], got -1"),
    (
        {"spacing": "even"},
        "spacing must be one of 'leading', 'trailing', 'linspace', 'karras', 'exponential', 'lambda', 'beta', "
        "'linear', 'uniform', got 'even'",
    ),
    ({"spacing": "trailing\n"}, "spacing must be one of 'leading'"),
    ({"spacing": 1}, "spacing must be one of 'leading'"),
    (
        {"timesteps": "ddim25"},
        "timesteps must be a list of integers from 0 on, each smaller than the one before, got 'ddim25'",
    ),
    (
        {"timesteps": [5, -1]},
        "timesteps must be a list of integers from 0 on, each smaller than the one before, got -1",
    ),
    ({"timesteps": [5, 1.0]}, "timesteps must be a list of integers from 0 on"),
    ({"timesteps": []}, "timesteps must be a non-empty list of integers"),
    ({"timesteps": [5, 5]}, "timesteps must be strictly decreasing, got 5 followed by 5"),
    ({"timesteps": [100, 5]}, "timesteps must lie in [0, 99], got 5 to 100"),
    ({"timesteps": list(range(60, -1, -1))}, "steps is too large: 61 steps, and a request may have 60"),
    ({"timesteps": [5], "steps": 1}, "steps and timesteps exclude each other, got both"),
    ({"timesteps": [5], "spacing": "karras"}, "spacing and timesteps exclude each other, got both"),
    ({"guidance": 1e9}, "guidance must be"),
    ({"guidance": "2"}, "guidance must be a finite number, or a list of one for each image, got '2'"),
    ({"guidance": [1, 2], "n": 3}, "guidance must be one value or one for each of the 3 images, got 2"),
    ({"labels": "Fox"}, "labels must be among numbers from 0 to 3; names such as 'Cat'"),
    ({"labels": 4}, "got 4"),
    ({"labels": [0, 1.5]}, "labels must be a class's number or name"),
    ({"seed": -1}, "seed must be an integer from 0 to 2**64 - 1"),
    ({"seed": 2**64}, "seed must be"),
    ({"indices": [2**32]}, "indices must be"),
    ({"indices": 3}, "indices must be"),
    ({"priority": 1001}, "priority must be an integer from -1000 to 1000"),
    ({"deadline_s": 0}, "deadline"),
    ({"format": "bmp"}, "format must be 'png' or 'npz', got 'bmp'"),
    ({"nn": 1}, "unknown field 'nn'; 'n' may be meant; /openapi.json has all that are accepted"),
    ({"stpes": 1}, "unknown field 'stpes'; 'steps' may be meant"),
    ({"x" * 300: 1}, "; /openapi.json has all that are accepted"),
    ([], "the body must be a JSON object, got []"),
    ("x", "the body must be a JSON object"),
]


@pytest.mark.parametrize(("ask", "message"), WRONG)
def test_what_is_wrong_is_one_sentence(here: Here, ask: Any, message: str) -> None:
    response = here.client.post("/v1/generate", json=ask)
    said = response.json()["error"]
    assert (response.status_code, list(response.json())) == (400, ["error"])
    assert message in said
    assert "\n" not in said
    assert len(said) < 250


EMPTY = [
    {"labels": []},
    {"seed": []},
    {"indices": []},
    {"guidance": []},
    {"labels": [], "seed": [1, 2]},
    {"n": 2, "indices": []},
    {"guidance": [], "labels": [], "seed": [], "indices": []},
    {"timesteps": []},
]


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/stream"])
@pytest.mark.parametrize("ask", EMPTY)
def test_an_empty_list_is_400(here: Here, path: str, ask: dict[str, Any]) -> None:
    response = here.client.post(path, json=ask)
    assert (response.status_code, list(response.json())) == (400, ["error"])
    assert response.json()["error"].startswith(f"{next(name for name in ask if ask[name] == [])} must be ")


def test_elements_are_limited() -> None:
    _, engine = gated_engine((1, 16, 16))
    service = AsyncEngine(engine)
    with TestClient(make_app(service, limits=LIMITS)) as client:
        response = client.post("/v1/generate", json={"n": 5})
        assert response.status_code == 400
        assert (
            "n is too large: 5 images of 1 x 16 x 16 are 1280 elements, and a request may have 1024" in response.text
        )


def test_what_is_not_there(here: Here) -> None:
    for path in ("/v1/nothing", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/form.html"):
        assert here.client.get(path).status_code == 404
    response = here.client.get("/v1/generate")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert here.client.post("/v1/generate", content=b"{}").status_code == 415


def test_bodies_are_limited_before_and_while_they_are_read(here: Here) -> None:
    sent = []

    def chunks() -> Iterator[bytes]:
        for _ in range(1000):
            sent.append(1)
            yield b" " * 1024

    assert here.client.post("/v1/generate", content=b" " * 4097, headers=JSON).status_code == 413
    assert here.client.post("/v1/generate", content=chunks(), headers=JSON).status_code == 413
    assert here.client.post("/v1/generate", content=b" " * 4094 + b"{}", headers=JSON).status_code == 200


def test_a_declared_length_is_believed_before_anything_is_read(here: Here) -> None:
    async def ask() -> Any:
        running, _, sent = call(here.client.app, "/v1/generate", b"", None, {"content-length": "5000"})
        await asyncio.wait_for(running, 60)
        return sent[0]["status"]

    assert asyncio.run(ask()) == 413


def test_a_body_that_does_not_come_is_408(here: Here) -> None:
    async def ask() -> Any:
        running, _, sent = call(here.client.app, "/v1/generate", b"{", None)
        await asyncio.wait_for(running, 60)
        return sent[0]["status"]

    assert asyncio.run(ask()) == 408


# What goes wrong


@pytest.mark.parametrize("asgi", ["2.3", "2.4"])
@pytest.mark.parametrize("path", ["/v1/generate", "/v1/stream"])
def test_who_leaves_frees_the_lanes(here: Here, path: str, asgi: str) -> None:
    """Under a server of ASGI 2.4, too, in which Starlette waits for a message to be sent."""

    async def ask() -> tuple[int, list[Any]]:
        gone = asyncio.Event()
        here.gate.opened.clear()
        ticks = ticks_of(here)
        running, _, sent = call(here.client.app, path, b'{"n": 8, "steps": 30, "labels": 0}', gone, asgi=asgi)
        while here.service.status.busy < 4:
            await asyncio.sleep(0.01)
        gone.set()
        await asyncio.wait_for(running, 60)
        here.gate.opened.set()
        while not idle(here.service):
            await asyncio.sleep(0.01)
        return ticks_of(here) - ticks, sent

    ticks, sent = asyncio.run(ask())
    assert ticks <= 2, "lanes are free by the next tick"
    assert b"result" not in b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/stream"])
def test_a_handler_that_is_cancelled_frees_the_lanes(here: Here, path: str) -> None:
    """Which is how Ray Serve, and a server out of patience, tell."""

    async def ask() -> int:
        here.gate.opened.clear()
        ticks = ticks_of(here)
        running, _, _ = call(here.client.app, path, b'{"n": 8, "steps": 30, "labels": 0}', asyncio.Event())
        while here.service.status.busy < 4:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running])
        here.gate.opened.set()
        while not idle(here.service):
            await asyncio.sleep(0.01)
        return ticks_of(here) - ticks

    assert asyncio.run(ask()) <= 2


def ticks_of(here: Here) -> int:
    assert here.service.registry is not None
    return int(here.service.registry.get_sample_value("stepfusion_ticks_total") or 0)


def test_who_leaves_before_the_stream_begins_frees_the_lanes(here: Here) -> None:
    async def ask() -> None:
        gone = asyncio.Event()
        gone.set()
        here.gate.opened.clear()
        running, _, _ = call(here.client.app, "/v1/stream", b'{"n": 8, "steps": 30, "labels": 0}', gone)
        await asyncio.wait_for(running, 60)

    asyncio.run(ask())
    before = ticks_of(here)
    here.gate.opened.set()
    until(lambda: idle(here.service))
    assert ticks_of(here) - before <= 2


def test_too_much_is_429_with_a_hint(here: Here) -> None:
    here.gate.opened.clear()
    held = [here.service.submit(8, steps=30, labels=0) for _ in range(2)]
    until(lambda: here.service.status.busy == 4)
    here.service.submit(4, steps=30, labels=0)
    for path in ("/v1/generate", "/v1/stream"):
        response = here.client.post(path, json={"n": 8, "steps": 30})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert "images are waiting" in response.json()["error"]
    here.gate.opened.set()
    assert len([future.result(60) for future in held]) == 2


def test_deadlines_are_504(here: Here) -> None:
    here.generate(n=1, steps=3)
    response = here.generate(n=8, steps=30, deadline_s=1e-6)
    assert response.status_code == 504
    here.gate.opened.clear()
    threading.Timer(0.6, here.gate.opened.set).start()
    response = here.generate(n=8, steps=30, deadline_s=0.5)
    assert response.status_code == 504
    assert "0 of 8 images were done" in response.json()["error"]


def test_an_image_that_breaks_is_500_alone(here: Here) -> None:
    response = here.generate(n=1, steps=3, labels=NAMES[NAN_LABEL])
    assert response.status_code == 500
    assert "NaN" in response.text or "finite" in response.text
    name, data = here.events(n=1, steps=3, labels=NAN_LABEL)[-1]
    assert (name, data["status"]) == ("error", 500)
    assert here.generate(n=1, steps=3).status_code == 200


def test_a_dead_engine_is_503_and_says_so() -> None:
    _, engine = gated_engine()
    service = AsyncEngine(engine)
    with TestClient(make_app(service)) as client:
        until(lambda: service.ready)
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        scheduler = service._worker.scheduler
        assert scheduler is not None

        def fail() -> None:
            raise RuntimeError("the device is on fire")

        scheduler.step = fail  # type: ignore[method-assign]
        response = client.post("/v1/generate", json={"steps": 3})
        assert response.status_code == 503
        assert "on fire" in response.json()["error"]
        for path in ("/healthz", "/readyz"):
            response = client.get(path)
            assert (response.status_code, response.json()["state"]) == (503, "dead")
        assert client.post("/v1/stream", json={"steps": 3}).status_code == 503
    with pytest.raises(EngineDead):
        service.submit(1)


def test_what_nobody_foresaw_is_500_and_keeps_its_secrets(
    here: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr("stepfusion.serving.http.messages.picture", fail)
    monkeypatch.setattr("stepfusion.serving.http.messages.finished", fail)
    response = here.generate(steps=2)
    assert (response.status_code, response.json()) == (500, {"error": "the server failed; its log says why"})
    name, data = here.events(steps=2)[-1]
    assert (name, data) == ("error", {"status": 500, "error": "the server failed; its log says why"})
    assert "/secret/path" in caplog.text


def test_it_is_not_ready_while_it_warms_up() -> None:
    gate, engine = gated_engine()
    gate.opened.clear()
    service = AsyncEngine(engine)
    with TestClient(make_app(service)) as client:
        until(lambda: service.status.state == "starting")
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/generate", json={"steps": 2}).status_code == 503
        gate.opened.set()
        until(lambda: client.get("/readyz").status_code == 200)
    assert service.status.state == "closed"


# What is there


def test_model_has_what_a_client_needs(here: Here) -> None:
    facts = here.client.get("/v1/model").json()
    assert facts["name"] == "pets"
    assert facts["shape"] == [1, 8, 8]
    assert facts["classes"] == [{"label": i, "name": name} for i, name in enumerate(NAMES)]
    assert facts["guidance"] is True
    assert facts["limits"]["images"] == 8
    assert facts["samplers"] == list(sf.samplers.registry.samplers_of(sf.NoiseSchedule.linear()))
    assert "flow_sde" not in facts["samplers"]
    assert facts["default_sampler"] == "ddim"
    assert facts["spacings"] == ["leading", "trailing", "linspace", "karras", "exponential", "lambda", "beta"]
    assert {"ddim": 0, "euler_ancestral": 1}.items() <= facts["eta"].items(), "of samplers that take one, by default"
    assert facts["eta"].keys() <= {*facts["samplers"]}


def test_metrics_count(here: Here) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    def images() -> float:
        response = here.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        samples = [s for family in text_string_to_metric_families(response.text) for s in family.samples]
        return next(sample.value for sample in samples if sample.name == "stepfusion_images_total")

    before = images()
    here.generate(n=3, steps=2)
    assert images() == before + 3


def test_the_description_has_every_path_and_describes_what_is_asked(here: Here) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = here.client.get("/openapi.json").json()
    app: Any = here.client.app
    routes = {(route.path, method.lower()) for route in app.routes for method in route.methods - {"HEAD"}}
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == routes
    for path in ("/v1/generate", "/v1/stream"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        jsonschema.Draft202012Validator.check_schema(schema)
        good = {"n": 2, "labels": ["Dog", None], "seed": 7, "guidance": 1.5}
        jsonschema.validate(good, schema)
        for bad in (
            {"n": "2"},
            {"nn": 2},
            {"sampler": "eulers"},
            {"seed": -1},
            {"spacing": "even"},
            {"timesteps": 5},
            {"labels": []},
        ):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(bad, schema)
    described = document["paths"]["/v1/generate"]["post"]["responses"]
    assert {"200", "400", "408", "413", "415", "421", "429", "500", "503", "504"} == set(described)


def test_nothing_is_shared_with_other_origins(here: Here) -> None:
    response = here.client.get("/v1/model", headers={"Origin": "http://elsewhere"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "script-src 'sha256-" in here.client.get("/").headers["content-security-policy"]
