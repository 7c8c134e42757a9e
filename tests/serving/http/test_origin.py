"""What a server's pictures say of themselves, on every path that sends one."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'http'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

import stepfusion as sf
from stepfusion.commands.main import main
from stepfusion.files.png_text import read_texts
from stepfusion.options import ExecutionOptions
from stepfusion.serving.http.model_app import ModelApp
from stepfusion_testing.http_service import events_of, until
from stepfusion_testing.stable_diffusion import save_lora, save_stable_diffusion
from stepfusion_testing.tiny_model import save_tiny_model


def client_of(model: Path, **options: Any) -> Iterator[TestClient]:
    app = ModelApp(str(model), "model", ExecutionOptions(device="cpu", batch=2, invariant=True), **options).make()
    with TestClient(app) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        yield client


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("somewhere") / "model").parent


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[TestClient]:
    yield from client_of(place / "model")


def facts(png: bytes) -> dict[str, str]:
    return {name.removeprefix("stepfusion."): text for name, text in read_texts(png).items()}


def check_command(png: bytes, place: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that a picture names makes the same pixels, run beside the model."""
    monkeypatch.chdir(place)
    told = facts(png)
    assert main([*shlex.split(told["command"])[1:], "--out", out, "--device", "cpu", "--quiet"]) == 0
    with (
        Image.open(place / out / f"{told['seed']}-{told['index']}.png") as again,
        Image.open(io.BytesIO(png)) as sent,
    ):
        np.testing.assert_array_equal(np.asarray(again), np.asarray(sent))


def test_each_path_tells(client: TestClient, place: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    ask: dict[str, Any] = {"steps": 3, "seed": 5, "labels": "dog", "guidance": 2.0, "indices": [9], "eta": 0.5}
    one = client.post("/v1/generate", json=ask).content
    streamed = events_of(client.post("/v1/stream", json=ask).text)[-1][1]["images"][0]["png"]
    del ask["labels"]
    made = client.post("/v1/images/generations", json={"prompt": "dog", **ask}).json()["data"][0]["b64_json"]
    assert base64.b64decode(streamed) == base64.b64decode(made) == one
    told = facts(one)
    assert told | {"weights": ""} == {
        "Software": f"stepfusion {sf.__version__}",
        "model": "model",
        "weights": "",
        "sampler": "ddim, eta 0.5",
        "steps": "3",
        "seed": "5",
        "index": "9",
        "label": "1",
        "class": "Dog",
        "guidance": "2",
        "command": "stepfusion sample model --num 1 --labels 1 --guidance 2 --seed 5 --first-index 9 --steps 3 "
        "--eta 0.5 --batch 2 --invariant --single",
    }
    assert told["weights"].startswith("sha256:")
    assert str(place) not in "".join(told.values())
    check_command(one, place, "again", monkeypatch)


def test_a_grid_and_an_edit_have_no_command(client: TestClient) -> None:
    grid = facts(client.post("/v1/generate", json={"n": 4, "steps": 2, "labels": ["dog", "cat"] * 2}).content)
    assert (grid["index"], grid["label"], grid["class"]) == ("0-3", "1,0 in turn", "Dog,Cat in turn")
    assert "command" not in grid
    timesteps = facts(client.post("/v1/generate", json={"labels": 0, "timesteps": [50, 10]}).content)
    assert timesteps["steps"] == "2"
    assert "command" not in timesteps
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, "PNG")
    form = {"prompt": "cat", "steps": "4", "strength": "0.5"}
    response = client.post("/v1/images/edits", data=form, files={"image": buffer.getvalue()})
    edit = facts(base64.b64decode(response.json()["data"][0]["b64_json"]))
    assert (edit["edit"], edit["steps"]) == ("strength 0.5", "2")
    assert "command" not in edit


def test_no_metadata_means_none(place: Path) -> None:
    for client in client_of(place / "model", metadata=False):
        assert read_texts(client.post("/v1/generate", json={"steps": 2, "labels": 0}).content) == {}
        made = client.post("/v1/images/generations", json={"steps": 2, "prompt": "cat"}).json()["data"][0]["b64_json"]
        assert read_texts(base64.b64decode(made)) == {}


def test_lora_files_are_told_without_their_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    model = save_stable_diffusion(tmp_path / "model")
    file = save_lora(tmp_path / "style.safetensors", model)
    for client in client_of(model, lora=((str(file), 0.5),)):
        png = client.post("/v1/generate", json={"steps": 1, "prompt": "cat"}).content
        assert facts(png)["lora"] == "style.safetensors:0.5"
        check_command(png, tmp_path, "again", monkeypatch)
