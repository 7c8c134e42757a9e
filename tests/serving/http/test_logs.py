"""What the local server writes to stderr."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="stepfusion serve needs the extra 'http'")
pytest.importorskip("httpx2", reason="the client of these tests")

import httpx2

from stepfusion.commands.main import main
from stepfusion.serving.http.logs import LEVELS, WithoutProbes, log_config
from stepfusion_testing.http_service import until
from stepfusion_testing.tiny_model import save_tiny_model


def logged(model: Path, *options: str) -> str:
    """What a server says that answers a request for images, a wrong one, and a probe."""
    words = ("serve", str(model), "--local", "--port", "0", "--device", "cpu", "--lanes", "2", *options)
    command = [sys.executable, "-P", "-m", "stepfusion", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        until(lambda: httpx2.get(f"{url}/readyz").status_code == 200, 60)
        for ask in ({"n": 2, "steps": 2, "labels": 0}, {"n": 0}):
            httpx2.post(f"{url}/v1/generate", json=ask)
        process.terminate()
        return process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_each_request_is_a_line(model: Path) -> None:
    lines = logged(model).splitlines()
    assert sum('"POST /v1/generate HTTP/1.1" 200' in line for line in lines) == 1
    assert sum('"POST /v1/generate HTTP/1.1" 400' in line for line in lines) == 1
    assert (
        sum("stepfusion.serving: request 1, 2 images, 0." in line and "running: done" in line for line in lines) == 1
    )
    assert not any("/readyz" in line for line in lines)


@pytest.mark.soak
def test_a_higher_level_is_silent(model: Path) -> None:
    assert logged(model, "--log-level", "warning") == ""


def test_a_level_is_every_loggers() -> None:
    assert {logger["level"] for logger in log_config("warning")["loggers"].values()} == {"WARNING"}


def test_probes_are_shown_to_those_who_look_closely() -> None:
    path, probe = (
        logging.LogRecord("uvicorn.access", 20, "", 1, "", ("127.0.0.1:9", "GET", path, "1.1", 200), None)
        for path in ("/v1/model", "/healthz")
    )
    assert (WithoutProbes().filter(path), WithoutProbes().filter(probe)) == (True, False)
    filters = [log_config(level)["handlers"]["access"]["filters"] for level in LEVELS]
    assert filters == [[], *[["without_probes"]] * 3]


def test_ray_has_logs_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "fashion-mnist", "--log-level", "info"]) == 1
    assert "--log-level is an option of --local" in capsys.readouterr().err
