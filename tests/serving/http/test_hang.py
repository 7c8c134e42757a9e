"""A device that does not answer: the server says so, keeps deadlines, and ends when it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="the local server is uvicorn")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

import httpx2
from starlette.testclient import TestClient

from stepfusion.serving import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion_testing.http_service import Served, events_of, gated_engine, until

CLIENT = httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0), timeout=60)
HANG = "the engine is dead: TimeoutError: no tick has ended for "


def ask(client: Any, url: str, **fields: Any) -> Any:
    return client.post(url, json={"labels": 0, "steps": 9, **fields})


def test_a_hang_is_said_everywhere() -> None:
    gate, engine = gated_engine()
    with (
        TestClient(make_app(service := AsyncEngine(engine, hang_after=0.5))) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        until(lambda: service.ready)
        gate.opened.clear()
        pictures = [pool.submit(ask, client, "/v1/generate", n=n) for n in (4, 3)]
        stream = pool.submit(ask, client, "/v1/stream", n=4)
        for response in [picture.result(25) for picture in pictures]:
            assert response.status_code == 503
            assert response.json()["error"].startswith(HANG)
        name, data = events_of(stream.result(25).text)[-1]
        assert (name, data["status"]) == ("error", 503)
        assert data["error"].startswith(HANG)
        nothing = {"state": "dead", "waiting": 0, "busy": 0, "lanes": 0}
        for path in ("/healthz", "/readyz"):
            response = client.get(path)
            assert (response.status_code, response.json()) == (503, nothing)
        assert ask(client, "/v1/generate").status_code == 503
        gate.opened.set()


def test_a_deadline_is_kept_while_it_hangs() -> None:
    gate, engine = gated_engine()
    with TestClient(make_app(service := AsyncEngine(engine))) as client, ThreadPoolExecutor(3) as pool:
        until(lambda: service.ready)
        gate.opened.clear()
        patient = pool.submit(ask, client, "/v1/generate", n=4)
        until(lambda: service.status.busy == 4)
        assert ask(client, "/v1/generate", deadline_s=0.3).status_code == 504
        assert events_of(ask(client, "/v1/stream", deadline_s=0.3).text)[-1][1]["status"] == 504
        assert not patient.done()
        assert client.get("/healthz").status_code == 200
        gate.opened.set()
        assert patient.result(25).status_code == 200


# In a process of its own

SCRIPT = """
import atexit, ctypes, sys, threading
import torch
import stepfusion as sf
from stepfusion.commands.main import main
from stepfusion.serving import worker

worker._LAST_ROUND_SECONDS = 0.5

def network(x, timesteps, labels):
    if bool((labels == 1).any()):
        atexit.register(threading.Event().wait)  # what a driver does at exit while its device is stuck
        {hang}
    return 0.1 * x

def engine(model, lora, **arguments):
    return sf.Engine(network, sf.NoiseSchedule.linear(100), shape=(1, 8, 8), num_classes=4, **arguments)

sf.Engine.from_pretrained = engine
sys.exit(main(["serve", "model", "--local", "--port", "0", "--device", "cpu", "--lanes", "2", *sys.argv[1:]]))
"""
IN_PYTHON, IN_A_LIBRARY = "threading.Event().wait()", "ctypes.CDLL(None).pause()"


@contextmanager
def hanging_server(tmp_path: Path, hang: str, *options: str) -> Iterator[Served]:
    """``stepfusion serve --local`` with a network that hangs at label 1; killed at the end."""
    script = tmp_path / "server.py"
    script.write_text(SCRIPT.format(hang=hang))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen(
        [sys.executable, "-P", str(script), *options],
        env={**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at http://" in line, line
            url = line.split()[-1]
            until(lambda: httpx2.get(f"{url}/readyz").status_code == 200, 60)
            yield Served(process, url)
        finally:
            process.kill()


def errors_of(server: Served) -> str:
    """What the server, which has ended, said on stderr."""
    assert server.process.stderr is not None
    return server.process.stderr.read()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("hang", [pytest.param(IN_PYTHON, marks=pytest.mark.soak), IN_A_LIBRARY])
def test_sigterm_ends_a_server_that_hangs(tmp_path: Path, hang: str) -> None:
    with hanging_server(tmp_path, hang, "--drain", "0.5") as server, ThreadPoolExecutor(2) as pool:
        assert ask(CLIENT, f"{server.url}/v1/generate").status_code == 200
        under_way = pool.submit(ask, CLIENT, f"{server.url}/v1/generate", labels=1)
        until(lambda: httpx2.get(f"{server.url}/healthz").json()["busy"] == 1)
        server.process.send_signal(signal.SIGTERM)
        response = under_way.result(60)
        assert response.status_code == 503
        assert response.json() == {"error": "the server was stopped before this request was done"}
        assert server.process.wait(60) == 0
        assert "Traceback" not in errors_of(server)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_server_whose_engine_hung_says_so_when_it_ends(tmp_path: Path) -> None:
    options = ("--drain", "30", "--hang-after", "0.5")
    with hanging_server(tmp_path, IN_A_LIBRARY, *options) as server:
        response = ask(CLIENT, f"{server.url}/v1/generate", labels=1)
        assert response.status_code == 503
        assert response.json()["error"].startswith(HANG)
        assert httpx2.get(f"{server.url}/healthz").status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(25) == 1
        told = errors_of(server)
        assert "no tick has ended for" in told
        assert told.endswith("stepfusion: the engine was dead; the log says why\n")
