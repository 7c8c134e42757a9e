"""``stepfusion serve`` in processes of its own: what it answers, and how it ends."""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="stepfusion serve needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="stepfusion serve needs the extra 'serve'")
pytest.importorskip("httpx2", reason="the client of these tests")

import httpx2

import stepfusion as sf
from stepfusion.commands.main import main
from stepfusion.serving.http import stopping
from stepfusion_testing.http_service import JSON, Served, served, until
from stepfusion_testing.tiny_model import save_tiny_model

LOCAL = ("--local", "--port", "0", "--device", "cpu", "--lanes", "2", "--invariant")
LONG = {"n": 12, "steps": 100, "format": "npz"}  # six rounds of 100 ticks
CLIENT = httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0), timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def get(server: Served, path: str) -> Any:
    return CLIENT.get(server.url + path)


def generate(server: Served, **ask: Any) -> Any:
    return CLIENT.post(server.url + "/v1/generate", json=ask)


def ready(server: Served) -> None:
    until(lambda: get(server, "/readyz").status_code == 200, 60)


def images_of(response: Any) -> np.ndarray[Any, Any]:
    images: np.ndarray[Any, Any] = np.load(io.BytesIO(response.content), allow_pickle=False)["images"]
    return images


def test_it_serves_and_drains(model: Path) -> None:
    """With its stderr closed, where that can be."""
    closed = ("sh", "-c", 'exec "$@" 2>&-', "sh") if os.name == "posix" else ()
    with served(str(model), *LOCAL, "--max-images", "12", "--drain", "100", under=closed) as server:
        ready(server)
        engine = sf.Engine.from_pretrained(model, device="cpu", batch=2, invariant=True)
        made = images_of(generate(server, n=3, steps=4, seed=5, labels="Dog", format="npz"))
        wanted = engine.to_uint8(engine.sample(3, steps=4, seed=5, labels=1, progress=False)).numpy()
        np.testing.assert_array_equal(made, wanted)
        assert generate(server, n=13).status_code == 400

        # a client that leaves
        with CLIENT.stream("POST", server.url + "/v1/stream", json={"n": 12, "steps": 100}) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: accepted"
            until(lambda: get(server, "/healthz").json()["busy"] == 2)
        until(
            lambda: (
                get(server, "/healthz").json() | {"lanes": 0}
                == {"state": "ready", "waiting": 0, "busy": 0, "lanes": 0}
            )
        )

        # SIGTERM while a request is under way
        with ThreadPoolExecutor() as pool:
            under_way = pool.submit(generate, server, **LONG)
            until(lambda: get(server, "/healthz").json()["busy"] == 2)
            server.process.terminate()
            until(lambda: refused(server))
            assert not under_way.done()
            response = under_way.result()
        assert images_of(response).shape[0] == LONG["n"]
        assert server.process.wait(30) == 0


def refused(server: Served) -> bool:
    try:
        get(server, "/readyz")
    except (httpx2.NetworkError, httpx2.RemoteProtocolError):  # or met while it was being closed
        return True
    return False


def test_a_second_signal_kills(model: Path) -> None:
    with served(str(model), *LOCAL, "--drain", "100") as server:
        ready(server)
        with ThreadPoolExecutor() as pool:
            under_way = pool.submit(generate, server, **LONG)
            until(lambda: get(server, "/healthz").json()["busy"] == 2)
            server.process.terminate()
            until(lambda: refused(server))
            before = time.monotonic()
            server.process.terminate()
            assert server.process.wait(60) == -signal.SIGTERM
            assert time.monotonic() - before < 50
            assert isinstance(under_way.exception(), httpx2.TransportError)


def test_it_ends_with_its_parent(model: Path) -> None:
    parent = ("sh", "-c", '"$@" & read line', "sh")
    with served(str(model), *LOCAL, "--exit-with-parent", under=parent) as server:
        ready(server)
        server.process.kill()
        server.process.wait()
        until(lambda: refused(server), 30)


STOPPING = str(stopping.__file__)  # run as a script it needs nothing of the package, and starts at once


def script(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(f"import runpy, sys, time\nmodule = runpy.run_path({STOPPING!r})\n{body}")
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_second_kills(tmp_path: Path, number: signal.Signals) -> None:
    # a handler may not print: the signal may come while the other line is printed
    body = (
        "import os\n"
        "with module['stopping'](lambda: os.write(1, b'asked\\n')):\n"
        "    os.write(1, b'on\\n')\n"
        "    time.sleep(60)\n"
    )
    with script(tmp_path, body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        assert process.wait(10) == -number


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    calls = []
    with runpy.run_path(STOPPING)["stopping"](lambda: calls.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: bool(calls))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local", "--replicas", "2"], "--replicas is an option of Ray Serve, and --local does without it"),
        (["--local", "--ray", "auto"], "--ray is an option of Ray Serve"),
        (["--port", "0"], "--port must be in [1, 65535], or 0 with --local, got 0"),
        (["--local", "--port", "70000"], "--port must be in"),
        (["--local", "--queue", "0"], "--queue must be in [1, "),
        (["--local", "--max-body", "-1"], "--max-body must be in"),
        (["--local", "--max-previews", "0"], "--max-previews must be in [1, "),
        (["--local", "--max-priority", "-1"], "--max-priority must be in [0, 1000], got -1"),
        (["--local", "--max-priority", "1001"], "--max-priority must be in [0, 1000], got 1001"),
        (["--local", "--drain", "nan"], "--drain must be a finite number of at least 0, got nan"),
        (["--local", "--hang-after", "-1"], "--hang-after must be a finite number of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "no-such-model", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("absent", "arguments", "message"),
    [
        (
            "uvicorn",
            ["--local"],
            "stepfusion serve needs uvicorn: pip install 'stepfusion[serve]', or [http] for --local",
        ),
        ("ray", [], "stepfusion serve needs Ray: pip install 'stepfusion[serve]', or use --local, without Ray"),
    ],
)
def test_what_is_not_installed_is_named(
    absent: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stepfusion.commands import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == absent else True)
    assert main(["serve", "fashion-mnist", *arguments]) == 1
    assert capsys.readouterr().err == f"stepfusion: {message}\n"


def test_a_port_that_is_taken_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    from stepfusion.serving.http.local_server import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "fashion-mnist", "--local", "--port", str(port)]) == 1
    assert "ddress already in use" in capsys.readouterr().err


# Ray Serve


@pytest.mark.slow
def test_ray_serves_the_same(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from stepfusion.serving.http.local_server import listen

    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    options = ("--port", str(port), "--device", "cpu", "--lanes", "2", "--invariant", "--cpus", "1", "--drain", "60")
    with served(str(model), *options) as server:
        ready(server)
        engine = sf.Engine.from_pretrained(model, device="cpu", batch=2, invariant=True)
        made = images_of(generate(server, n=3, steps=4, seed=5, labels="Dog", format="npz"))
        wanted = engine.to_uint8(engine.sample(3, steps=4, seed=5, labels=1, progress=False)).numpy()
        np.testing.assert_array_equal(made, wanted)
        assert generate(server, nn=1).status_code == 400
        large = CLIENT.post(server.url + "/v1/generate", content=b" " * 70_000, headers=JSON)
        assert large.status_code == 413

        with CLIENT.stream("POST", server.url + "/v1/stream", json={"n": 12, "steps": 100}) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: accepted"
            until(lambda: get(server, "/healthz").json()["busy"] == 2)
        until(lambda: get(server, "/healthz").json()["busy"] == 0)

        with ThreadPoolExecutor() as pool:
            under_way = pool.submit(generate, server, **LONG)
            until(lambda: get(server, "/healthz").json()["busy"] == 2)
            server.process.terminate()
            assert images_of(under_way.result()).shape[0] == LONG["n"]
        assert server.process.wait(120) == 0
