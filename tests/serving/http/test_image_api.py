"""The image API that clients of other services speak, by its official client: images, edits, what is refused."""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'http'")
pytest.importorskip("uvicorn", reason="the HTTP application needs the extra 'http'")
pytest.importorskip("openai", reason="the client of these tests")

import httpx2
import openai

import stepfusion as sf
from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.limits import Limits
from stepfusion_testing.http_service import NULL_LABEL, gated_engine, idle, rejected, served_here, until

LIMITS = Limits(images=8, steps=60, evaluations=300, elements=1024, body=4096, body_seconds=2.0)
STEPS = 6


@dataclass(frozen=True)
class Here:
    """A served engine, its address, and the official client of the API."""

    engine: sf.Engine
    service: AsyncEngine
    url: str
    client: Any

    def generate(self, prompt: str = "cat", steps: int | None = STEPS, **ask: Any) -> Any:
        extra = {name: ask.pop(name) for name in EXTRA & set(ask)} | ({} if steps is None else {"steps": steps})
        return self.client.images.generate(prompt=prompt, **ask, extra_body=extra)

    def edit(self, prompt: str = "cat", **ask: Any) -> Any:
        extra = {name: ask.pop(name) for name in EXTRA & set(ask)} | {"steps": STEPS}
        return self.client.images.edit(prompt=prompt, **ask, extra_body=extra)

    def post(self, path: str, **arguments: Any) -> Any:
        return httpx2.post(f"{self.url}/v1/images/{path}", timeout=60, **arguments)


EXTRA = {"seed", "sampler", "eta", "guidance", "indices", "strength", "depth", "labels"}


def served_engine(shape: tuple[int, int, int] = (1, 8, 8), **arguments: Any) -> Iterator[Here]:
    _, engine = gated_engine(shape, **arguments)
    service = AsyncEngine(engine, queue=16)
    with served_here(make_app(service, limits=LIMITS, name="pets")) as (_, port):
        url = f"http://127.0.0.1:{port}"
        until(lambda: service.ready)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="anything", max_retries=0) as client:
            yield Here(engine, service, url, client)


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    yield from served_engine()


@pytest.fixture(scope="module")
def colour() -> Iterator[Here]:
    yield from served_engine((3, 6, 10))


def pixels_of(response: Any) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json)))) for one in response.data])


def offline(engine: sf.Engine, n: int = 1, **options: Any) -> np.ndarray[Any, Any]:
    pixels: np.ndarray[Any, Any] = engine.to_uint8(engine.sample(n, steps=STEPS, progress=False, **options)).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def png(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


def grey(seed: int = 0, shape: tuple[int, ...] = (8, 8)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def as_image(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    """Pixels [H, W] or [H, W, C] as an engine takes them."""
    tensor = torch.from_numpy(pixels)
    tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    return tensor[None].to(torch.float32) / 127.5 - 1


HOLE = np.zeros((8, 8), bool)
HOLE[2:5, 3:] = True


def with_hole(pixels: np.ndarray[Any, Any], hole: np.ndarray[Any, Any] = HOLE) -> np.ndarray[Any, Any]:
    """RGBA, transparent in the hole."""
    colours = pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, 2)
    return np.concatenate((colours, np.where(hole, 0, 255).astype(np.uint8)[..., None]), axis=2)


# Images


def test_images_are_those_of_the_engine_offline(here: Here) -> None:
    response = here.generate("Dog", n=3, seed=2**64 - 1, indices=[5, 0, 9], guidance=2.0, sampler="ddim", eta=0.5)
    wanted = offline(here.engine, 3, seed=2**64 - 1, indices=[5, 0, 9], labels=1, guidance=2.0, eta=0.5)
    np.testing.assert_array_equal(pixels_of(response), wanted)
    assert (response.size, response.output_format, response.background) == ("8x8", "png", "opaque")
    assert response.created > 1_700_000_000
    assert response.data[1].model_extra == {"seed": 2**64 - 1, "index": 0, "label": 1, "class": "Dog"}
    assert not np.array_equal(pixels_of(here.generate("Dog", n=3, seed=1, indices=[5, 0, 9])), wanted)  # the control


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("dOg", [1, 1]),
        (" Cat ", [0, 0]),
        ("1", [1, 1]),
        ("none", [NULL_LABEL] * 2),
        ("", [NULL_LABEL] * 2),
        ("dog, cat", [1, 0]),
    ],
)
def test_a_prompt_names_classes_as_the_command_line_does(here: Here, prompt: str, labels: list[int]) -> None:
    np.testing.assert_array_equal(pixels_of(here.generate(prompt, n=2)), offline(here.engine, 2, labels=labels))


def test_a_prompt_of_several_classes_makes_one_of_each(here: Here) -> None:
    assert [one.model_extra["class"] for one in here.generate("dog,cat").data] == ["Dog", "Cat"]


def test_colours_and_sizes(colour: Here) -> None:
    response = colour.generate("cat", size="10x6")
    np.testing.assert_array_equal(pixels_of(response), offline(colour.engine, labels=0))
    assert response.size == "10x6"


def test_habits_of_clients_change_nothing(here: Here) -> None:
    habits = {"model": "pets", "size": "auto", "quality": "auto", "user": "someone", "response_format": "b64_json"}
    more = {"output_format": "png", "background": "opaque", "moderation": "low", "n": 1, "stream": False}
    np.testing.assert_array_equal(pixels_of(here.generate("cat", **habits, **more)), offline(here.engine, labels=0))


def test_a_model_without_classes_takes_an_empty_prompt() -> None:
    schedule = sf.NoiseSchedule.linear(100)
    engine = sf.Engine(lambda x, t: 0.1 * x, schedule, shape=(1, 4, 4), device="cpu", batch=2, invariant=True)
    service = AsyncEngine(engine)
    with served_here(make_app(service)) as (_, port):
        until(lambda: service.ready)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0) as client:
            made = client.images.generate(prompt="", n=2, extra_body={"steps": STEPS})
            np.testing.assert_array_equal(pixels_of(made), offline(engine, 2))
            assert set(made.data[0].model_extra) == {"seed", "index"}
            with pytest.raises(openai.BadRequestError, match="this model has no classes, got 'cat'"):
                client.images.generate(prompt="cat")


# Edits


def test_an_edit_paints_the_transparent_part_of_the_mask(here: Here) -> None:
    image = grey()
    response = here.edit("dog", image=png(image), mask=png(with_hole(grey(1))), n=2, seed=4, indices=[3, 8])
    mask = torch.from_numpy(HOLE)[None, None]
    wanted = offline(here.engine, 2, image=as_image(image), mask=mask, seed=4, indices=[3, 8], labels=1)
    made = pixels_of(response)
    np.testing.assert_array_equal(made, wanted)
    np.testing.assert_array_equal(made[:, ~HOLE], np.stack([image[~HOLE]] * 2))
    assert not np.array_equal(made[0][HOLE], image[HOLE])


def test_without_a_mask_the_transparent_part_of_the_image_is_painted(colour: Here) -> None:
    image, hole = grey(2, (6, 10, 3)), np.zeros((6, 10), bool)
    hole[:, :4] = True
    made = pixels_of(colour.edit(image=("photo.png", png(with_hole(image, hole)), "image/png")))
    white = np.where(hole[..., None], 255, image).astype(
        np.uint8
    )  # what is seen there is not used without a strength
    mask = torch.from_numpy(hole)[None, None]
    np.testing.assert_array_equal(made, offline(colour.engine, image=as_image(white), mask=mask, labels=0))


def test_a_strength_makes_images_from_an_image(here: Here) -> None:
    image = grey(3)
    for kind in ("PNG", "WEBP"):
        data = png(
            image[..., None].repeat(3, 2) if kind == "WEBP" else image,
            kind,
            **({"lossless": True} if kind == "WEBP" else {}),
        )
        made = pixels_of(here.edit("cat", image=data, strength=0.5, seed=9))
        np.testing.assert_array_equal(
            made, offline(here.engine, image=as_image(image), strength=0.5, seed=9, labels=0)
        )
    both = here.edit("cat", image=png(image), mask=png(with_hole(image)), strength=0.5, guidance=1.5)
    mask = torch.from_numpy(HOLE)[None, None]
    wanted = offline(here.engine, image=as_image(image), mask=mask, strength=0.5, guidance=1.5, labels=0)
    np.testing.assert_array_equal(pixels_of(both), wanted)


def test_a_form_may_hold_lists(here: Here) -> None:
    files = {"image": png(grey())}
    for texts in ({"indices": "[4, 2]", "seed": "[1, 2]"}, {"indices[]": ["4", "2"], "seed[]": ["1", "2"]}):
        response = here.post("edits", data={"prompt": "dog", "steps": "6", "strength": "0.5", **texts}, files=files)
        assert response.status_code == 200, response.text
        assert [(one["seed"], one["index"]) for one in response.json()["data"]] == [(1, 4), (2, 2)]
        wanted = offline(here.engine, 2, image=as_image(grey()), strength=0.5, seed=[1, 2], indices=[4, 2], labels=1)
        made = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x["b64_json"])))) for x in response.json()["data"]]
        np.testing.assert_array_equal(np.stack(made), wanted)


# What is wrong

WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": "bird"}, r"^.*prompt must be among 'Cat', 'Dog', 'Owl'; the classes' numbers from 0 to 3", "prompt"),
    ({"prompt": "dog, bird"}, "prompt must be among", "prompt"),
    ({"prompt": "4"}, "prompt must be among", "prompt"),
    ({"n": 0}, "n must be an integer of at least 1, got 0", "n"),
    ({"n": 9}, "n is too large: 9 images, and a request may have 8", "n"),
    ({"n": 10**30}, "n is too large", "n"),  # before anything of that size is made
    ({"n": 8, "steps": 50}, r"n \* steps is too large", "n"),
    ({"size": "1024x1024"}, "size must be '8x8' or 'auto' for this model, got '1024x1024'", "size"),
    ({"response_format": "url"}, r"response_format must be 'b64_json' \(images are kept nowhere", "response_format"),
    ({"output_format": "webp"}, "output_format must be 'png', got 'webp'", "output_format"),
    ({"background": "transparent"}, "background must be 'auto' or 'opaque'", "background"),
    ({"quality": "hd"}, "quality must be 'auto' or 'standard'", "quality"),
    ({"seed": -1}, r"seed must be an integer from 0 to 2\*\*64 - 1", "seed"),
    ({"sampler": "magic"}, "sampler must be one of 'ddim'", "sampler"),
    ({"sampler": "ddpm", "eta": 0.5, "steps": 5}, "eta is an option of sampler", "eta"),
    ({"steps": 61}, "steps is too large: 61 steps", "steps"),
    ({"guidance": [1.0, 2.0, 3.0], "n": 2}, "guidance must be one value or one for each of the 2 images", "guidance"),
    ({"indices": []}, "indices must be a list", "indices"),
    ({"labels": 1}, "unknown field 'labels'; /openapi.json has all that are accepted", "labels"),
    ({"depth": 1}, "unknown field 'depth'", "depth"),
]


@pytest.mark.parametrize(("ask", "message", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_one_sentence(here: Here, ask: dict[str, Any], message: str, param: str | None) -> None:
    before = rejected(here.service, "invalid")
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        here.generate(**ask)
    error = caught.value
    assert (error.type, error.param, error.status_code) == ("invalid_request_error", param, 400)
    assert set(error.body) == {"message", "type", "param", "code"}
    assert rejected(here.service, "invalid") == before + 1


def test_codes_and_statuses_are_those_of_the_api(here: Here) -> None:
    with pytest.raises(openai.NotFoundError, match="model must be 'pets' or absent, got 'dall-e-3'") as missing:
        here.generate(model="dall-e-3")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as unknown:
        here.generate(depth=1)
    assert unknown.value.code == "unknown_parameter"
    for path, body, status, code in (
        ("generations", b"{}", 400, "missing_required_parameter"),
        ("generations", b"[1", 400, "invalid_json"),
        ("generations", b" " * 5000, 413, None),
        ("variations", b"{}", 404, "not_found"),
    ):
        response = here.post(path, content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert here.post("generations", content=b"{}").status_code == 415
    assert (
        here.post("edits", json={})
        .json()["error"]["message"]
        .startswith("the Content-Type must be multipart/form-data")
    )
    response = here.post("generations", json={"prompt": "cat"}, headers={"Host": "evil.example"})
    assert (response.status_code, response.json()["error"]["type"]) == (421, "invalid_request_error")


def test_a_server_error_has_the_form_of_the_api(here: Here) -> None:
    with pytest.raises(openai.InternalServerError, match="became non-finite") as caught:
        here.generate("owl")
    assert (caught.value.type, caught.value.status_code) == ("server_error", 500)


BOMB = png(np.zeros((9000, 9000), np.uint8))
EDITS: list[tuple[dict[str, Any], str, str]] = [
    ({"image": png(grey())}, "mask must be given, or an image with fully transparent pixels, or a strength", "mask"),
    ({"image": png(with_hole(grey(), HOLE & False))}, "mask must be given", "mask"),
    ({"image": png(grey(0, (9, 8))), "strength": 0.5}, "image is 8 x 9 pixels, and images are 8 x 8", "image"),
    ({"image": BOMB, "strength": 0.5}, "image declares", "image"),
    ({"image": b"GIF89a", "strength": 0.5}, r"image is not a sound picture \(PNG or JPEG or WEBP\)", "image"),
    ({"image": png(grey(), "BMP"), "strength": 0.5}, r"image is not a sound picture \(PNG or", "image"),
    ({"image": png(grey())[:-30], "strength": 0.5}, "image is not a sound picture", "image"),
    ({"image": [png(grey()), png(grey())], "strength": 0.5}, "image must be one file, got 2", "image"),
    ({"image": png(grey()), "mask": png(grey())}, "mask must be a PNG with fully transparent pixels", "mask"),
    ({"image": png(grey()), "mask": png(with_hole(grey(), HOLE & False))}, "mask must be a PNG with", "mask"),
    (
        {"image": png(grey()), "mask": png(with_hole(grey(), HOLE), "WEBP")},
        r"mask is not a sound picture \(PNG\)",
        "mask",
    ),
    ({"image": png(grey()), "mask": png(with_hole(grey(0, (4, 4)), HOLE[:4, :4]))}, "mask is 4 x 4 pixels", "mask"),
    ({"image": png(grey()), "strength": 0}, "strength must be a number above 0, and at most 1, got 0", "strength"),
    ({"image": png(grey()), "strength": "much"}, "strength must be a number", "strength"),
    ({"image": png(grey()), "strength": 0.5, "prompt": "bird"}, "prompt must be among", "prompt"),
    ({"image": png(grey()), "strength": 0.5, "depth": 3}, "unknown field 'depth'", "depth"),
    ({"image": png(grey()), "strength": 0.5, "n": 9}, "n is too large", "n"),
]


@pytest.mark.parametrize(("ask", "message", "param"), EDITS, ids=[message[:40] for _, message, _ in EDITS])
def test_a_wrong_edit_is_one_sentence(here: Here, ask: dict[str, Any], message: str, param: str) -> None:
    if ask["image"] is BOMB:
        assert len(BOMB) < 1 << 17
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        here.edit(**ask)
    assert caught.value.param == param
    assert idle(here.service)


def test_a_form_has_a_largest_size(here: Here) -> None:
    """What it declares is enough: nothing of it is read."""
    connection = http.client.HTTPConnection(here.url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/images/edits")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(LIMITS.body + 2 * (8 * 64 + (1 << 16)) + 1))
    connection.endheaders()
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert (response.status, error["type"]) == (413, "invalid_request_error")
    assert error["message"].startswith("the body must have at most ")
    connection.close()


HEAD = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"", "multipart/form-data; boundary=x", 400, "the body is not a form: it is cut short"),
        (HEAD + b"cat", "multipart/form-data; boundary=x", 400, "the body is not a form: it is cut short"),
        (HEAD + b"cat\r\n--x--", "multipart/form-data; boundary=x", 400, "image must be a file, and is missing"),
        (HEAD + b"\xff\r\n--x--", "multipart/form-data; boundary=x", 400, "'prompt' must be text in UTF-8"),
        (
            b"--x\r\n\r\ncat\r\n--x--",
            "multipart/form-data; boundary=x",
            400,
            "the body is not a form: a part has no name",
        ),
        (b"--xcat\r\n--x--", "multipart/form-data; boundary=x", 400, "the body is not a form: a part has no headers"),
        ((HEAD + b"\r\n") * 70 + b"--x--", "multipart/form-data; boundary=x", 400, "at most 64 parts"),
        (HEAD, "multipart/form-data", 415, "the Content-Type must be multipart/form-data"),
        (HEAD, "multipart/form-data; boundary=" + "x" * 71, 415, "the boundary must have 1 to 70"),
        (
            HEAD.replace(b"prompt", b"image") + b"cat\r\n--x\r\n" + HEAD[5:] + b"cat\r\n--x--",
            "multipart/form-data; boundary=x",
            400,
            "image must be a file, got a text",
        ),
        (
            HEAD.replace(b'"prompt"', b'"photo"; filename="a.png"') + b"cat\r\n--x--",
            "multipart/form-data; boundary=x",
            400,
            "unknown file 'photo'",
        ),
    ],
)
def test_broken_forms(here: Here, body: bytes, kind: str, status: int, message: str) -> None:
    response = here.post("edits", content=body, headers={"Content-Type": kind})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_latents_are_no_pictures() -> None:
    schedule = sf.NoiseSchedule.linear(100)
    engine = sf.Engine(lambda x, t: 0.1 * x, schedule, shape=(4, 4, 4), device="cpu", batch=2)
    service = AsyncEngine(engine)
    with served_here(make_app(service)) as (_, port):
        until(lambda: service.ready)
        response = httpx2.post(f"http://127.0.0.1:{port}/v1/images/generations", json={"prompt": ""})
    assert response.status_code == 400
    assert "'npz'" in response.json()["error"]["message"]


def test_clients_find_the_model(here: Here) -> None:
    (model,) = here.client.models.list().data
    assert (model.id, model.owned_by) == ("pets", "stepfusion")
    assert here.generate("cat", model=model.id).data


def test_the_description_has_the_paths(here: Here) -> None:
    document = json.loads(httpx2.get(f"{here.url}/openapi.json").content)
    generations = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    edits = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert generations["schema"]["required"] == ["prompt"]
    assert {"prompt", "n", "size", "seed", "sampler", "steps", "eta", "guidance", "indices"} <= set(
        generations["schema"]["properties"]
    )
    assert edits["schema"]["required"] == ["image", "prompt"]
    assert {"image", "mask", "strength"} <= set(edits["schema"]["properties"])
