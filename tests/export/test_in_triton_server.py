"""A model repository in a real Triton Inference Server, which nvidia-pytriton's wheel holds with its Python backend.

Skipped unless ``STEPFUSION_PYTRITON`` names the folder that the wheel was installed to: ``make server``.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.export.batch import Batch
from stepfusion.export.program import example_inputs
from stepfusion.export.to_triton_server import export_triton_server
from stepfusion_testing.exports import cpu_engine
from stepfusion_testing.tiny_model import tiny_network

WHEEL = os.environ.get("STEPFUSION_PYTRITON", "")
BATCHES = {"dynamic": Batch(1, 2, 8), "fixed": Batch.fixed(2)}
TYPES = {torch.float32: "FP32", torch.int64: "INT64"}
PATIENCE = 240  # seconds; every model imports PyTorch in a process of its own

pytestmark = [
    pytest.mark.skipif(
        not Path(WHEEL, "pytriton").is_dir(), reason="no Triton Inference Server in STEPFUSION_PYTRITON: make server"
    ),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def engine() -> sf.Engine:
    return cpu_engine(tiny_network())


@pytest.fixture(scope="module")
def server(engine: sf.Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a repository of every kind of batch, for the Python and the ONNX backend."""
    folder = tmp_path_factory.mktemp("server")
    for name, batch in BATCHES.items():
        for backend in ("python", "onnx"):
            out = folder / f"{name}_{backend}"
            export_triton_server(engine, out, batch=batch, backend=backend, name=out.name)
            shutil.move(out / "models" / out.name, folder / "models" / out.name)
    (folder / "models" / "wrong").mkdir()  # the control: a field that ModelConfig does not have
    (folder / "models" / "wrong" / "config.pbtxt").write_text('name: "wrong"\nbackend: "python"\nbatch: 2\n')
    root = Path(WHEEL, "pytriton", "tritonserver")
    backends = Path(shutil.copytree(root / "backends", folder / "backends"))
    stub = root / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
    Path(shutil.copy(stub, backends / "python")).chmod(0o755)
    binary = Path(shutil.copy(root / "bin" / "tritonserver", folder))
    binary.chmod(0o755)
    libraries = Path(WHEEL, "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                str(binary),
                f"--model-repository={folder / 'models'}",
                f"--backend-directory={backends}",
                f"--http-port={port}",
                "--http-address=127.0.0.1",
                "--allow-grpc=0",
                "--allow-metrics=0",
                "--exit-on-error=0",
                "--exit-timeout-secs=5",
            ],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
                "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # for the interpreter in the stub
            },
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}/v2"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(address: str, body: object = None) -> Any:
    """The answer to a GET, or to a POST with a body."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data), timeout=60) as answer:
            return json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return json.loads(error.read() or b"{}")


def states(server: str) -> dict[str, tuple[str, str]]:
    """State and reason of every model, when the server is through with loading them."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            index = ask(f"{server}/repository/index", {})
        except OSError:  # it does not listen yet: it loads first
            time.sleep(1)
            continue
        return {model["name"]: (model.get("state", ""), model.get("reason", "")) for model in index}
    raise AssertionError("the server does not answer")


def test_it_reads_every_configuration(server: str) -> None:
    """It loads the Python models, and of the others it lacks no more than their backend."""
    found = states(server)
    for name in BATCHES:
        assert found[f"{name}_python"] == ("READY", "")
        assert "unable to find backend library for backend 'onnxruntime'" in found[f"{name}_onnx"][1]
    assert found.get("wrong", ("", ""))[0] != "READY"
    config = ask(f"{server}/models/dynamic_python/config")
    assert (config["max_batch_size"], config["dynamic_batching"]["preferred_batch_size"]) == (8, [2])
    assert [tensor["name"] for tensor in config["input"]] == ["x", "timesteps", "labels"]


@pytest.mark.parametrize("name", BATCHES)
def test_its_answers_are_the_networks(name: str, server: str, engine: sf.Engine) -> None:
    assert states(server)[f"{name}_python"][0] == "READY"
    inputs = example_inputs(engine, 3 if name == "dynamic" else 2)
    shaped = [value[:, None] if name == "dynamic" and value.ndim == 1 else value for value in inputs]
    tensors = [
        {"name": key, "shape": list(value.shape), "datatype": TYPES[value.dtype], "data": value.flatten().tolist()}
        for key, value in zip(("x", "timesteps", "labels"), shaped, strict=True)
    ]
    (out,) = ask(f"{server}/models/{name}_python/infer", {"inputs": tensors})["outputs"]
    with torch.no_grad():
        expected = engine.network(*inputs)
    assert (out["name"], out["datatype"]) == ("out", "FP32")
    torch.testing.assert_close(torch.tensor(out["data"]).reshape(out["shape"]), expected, rtol=0, atol=1e-5)


def test_it_refuses_a_request_of_the_wrong_shape(server: str) -> None:
    assert states(server)["dynamic_python"][0] == "READY"
    tensor = {"name": "x", "shape": [1, 1, 8, 9], "datatype": "FP32", "data": [0.0] * 72}
    assert "error" in ask(f"{server}/models/dynamic_python/infer", {"inputs": [tensor]})
