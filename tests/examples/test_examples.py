"""The programs of examples/ do what they say."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stepfusion as sf
from stepfusion_testing.tiny_model import CLASS_NAMES, SIZE, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def program(name: str) -> dict[str, Any]:
    """The names of an example, which is not run as the main program."""
    return runpy.run_path(str(EXAMPLES / name), run_name=f"example_{Path(name).stem}")


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example as the main program."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_on_the_page_and_in_a_test() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    here = Path(__file__).read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert files == set(re.findall(r"\(\.\./examples/([\w.]+)\)", page))
    assert all(f'"{name}"' in here for name in files)


def test_the_latency_study_prints_a_table(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("latency.py", str(model), "--steps", "2,4", "--batches", "1,2", "--rounds", "2", monkeypatch=monkeypatch)
    head, *lines = capsys.readouterr().out.rpartition("\n\n")[2].strip().splitlines()
    assert re.fullmatch(r"steps\s+batch 1\s+batch 2", head)
    assert [line.split()[0] for line in lines] == ["2", "4"]
    cells = re.findall(r"([\d.]+) ms\s+([\d.]+)/s", "\n".join(lines))
    assert len(cells) == 4
    for (milliseconds, rate), batch in zip(cells, (1, 2, 1, 2), strict=True):
        assert float(milliseconds) > 0
        assert float(rate) == pytest.approx(1e3 * batch / float(milliseconds), rel=0.1)


@pytest.fixture(scope="module")
def service(model: Path) -> Any:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    pytest.importorskip("httpx2")
    from starlette.testclient import TestClient

    from stepfusion.serving import AsyncEngine

    engine = sf.Engine.from_pretrained(model, device="cpu", invariant=True, batch=4)
    with TestClient(program("service.py")["make_app"](AsyncEngine(engine), CLASS_NAMES)) as client:
        yield client, engine


def pixels(response: Any) -> np.ndarray[Any, Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as image:
        return np.asarray(image)


def test_a_picture_of_the_service_is_the_engines(service: Any) -> None:
    client, engine = service
    assert client.get("/garments").json() == list(CLASS_NAMES)
    assert client.get("/healthz").status_code == 200
    got = pixels(client.get("/garments/Dog.png?seed=7&index=3&steps=4&guidance=2"))
    wanted = engine.sample(seed=7, indices=[3], steps=4, labels=1, guidance=2.0)
    assert np.array_equal(got, engine.to_uint8(wanted)[0, ..., 0].numpy())
    assert not np.array_equal(got, pixels(client.get("/garments/Dog.png?seed=8&index=3&steps=4&guidance=2")))


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        ("/garments/Horse.png", 404, "there is no horse"),
        ("/garments/Cat.png?steps=many", 400, "steps must be a number, got 'many'"),
        ("/garments/Cat.png?steps=201", 400, "steps must be at most 200, got 201"),
        ("/garments/Cat.png?steps=0", 400, "steps must be"),
        ("/garments/Cat.png?seed=-1", 400, "seed must be"),
    ],
)
def test_what_the_service_refuses(service: Any, address: str, status: int, message: str) -> None:
    response = service[0].get(address)
    assert response.status_code == status
    assert message in response.text


def test_rows_become_images_wherever_they_are_split(model: Path) -> None:
    example = program("ray_data.py")
    rows = [example["wanted"]({"id": number}, classes=3, seed=5) for number in range(7)]
    assert rows[4] == {"seed": 5, "index": 4, "label": 1}
    batch = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    sampler = example["Sampler"](str(model), steps=3, device="cpu", batch=4)
    whole = sampler(batch)
    assert whole["image"].shape == (7, SIZE, SIZE, 1)
    assert whole["image"].dtype == np.uint8
    assert np.array_equal(whole["label"], batch["label"])
    parts = [sampler({name: column[part] for name, column in batch.items()}) for part in (slice(2), slice(2, 7))]
    assert np.array_equal(np.concatenate([part["image"] for part in parts]), whole["image"])


@pytest.mark.soak
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install stepfusion[ray]")
def test_the_pipeline_runs_on_ray(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    asked = ("--model", str(model), "--num", "6", "--classes", "3", "--steps", "2", "--out", str(out))
    command = [sys.executable, "-P", str(EXAMPLES / "ray_data.py"), *asked]  # Ray warns of much in its own process
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"6 images in {out}" in done.stdout


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "quick_start.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.soak
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "quick_start.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 5
