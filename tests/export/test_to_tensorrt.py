"""TensorRT for RTX, whose engines are built here for real, without a GPU; and what TensorRT itself is asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import stepfusion as sf
from stepfusion.export import to_tensorrt
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import read_bundle
from stepfusion.export.load import load_network
from stepfusion.export.program import export_program, input_specs, output_specs
from stepfusion.export.tensorrt_engine import RTX_GPUS, Tensors, build_engine, check_precisions
from stepfusion.export.to_onnx import write_onnx
from stepfusion.export.to_tensorrt import LAYERS, MODEL, export_tensorrt, export_tensorrt_rtx
from stepfusion_testing.exports import cpu_engine, difference
from stepfusion_testing.tiny_model import tiny_network

pytest.importorskip("onnxscript")
trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")

KINDS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
SLOW = ("float32", "bfloat16")  # as float16: each builds an engine of its own


@pytest.mark.parametrize("dtype", ["float16", *(pytest.param(name, marks=pytest.mark.soak) for name in SLOW)])
def test_an_engine_is_built_and_its_tensors_and_layers_are_read_back(dtype: str, tmp_path: Path) -> None:
    engine, out = cpu_engine(tiny_network(), dtype=dtype), tmp_path / "bundle"
    phases: list[str] = []

    def watch(phase: str, step: int, steps: int) -> bool:
        phases.append(phase)
        return 1 <= step <= steps

    export_tensorrt_rtx(engine, out, batch=Batch(1, 2, 4), progress=watch)
    manifest = read_bundle(out).manifest
    assert manifest.versions["compute_capability"].split() == list(RTX_GPUS)
    assert manifest.versions["tensorrt-rtx"] == trt.__version__
    assert (out / MODEL).stat().st_size > 50_000
    assert "Building engine" in phases
    read = json.loads((out / LAYERS).read_text())
    found, built = read["network"], read["engine"]
    kind, module = KINDS[dtype], engine.network
    assert isinstance(module, torch.nn.Module)
    numbers = [[name, "INT64", [-1]] for name in ("timesteps", "labels")]
    assert found["inputs"] == [["x", kind, [-1, 1, 8, 8]], *numbers]
    assert found["outputs"] == [["out", kind, [-1, 1, 8, 8]]]
    layers = Counter((layer, precision) for _, layer, precision in found["layers"])
    for layer, counterpart in (("CONVOLUTION", torch.nn.Conv2d), ("NORMALIZATION", torch.nn.GroupNorm)):
        assert layers[layer, kind] == sum(isinstance(part, counterpart) for part in module.modules())
        assert {precision for name, precision in layers if name == layer} == {kind}
    if "there was no GPU that it runs on" in (out / "README.md").read_text():  # the engine, in its builder's words
        assert (built["inputs"], built["outputs"]) == (found["inputs"], found["outputs"])
        convolutions = [precision for _, layer, precision in built["layers"] if layer == "correlation"]
        assert convolutions == [kind] * layers["CONVOLUTION", kind]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_needs_a_gpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cpu_engine(tiny_network())
    with pytest.raises(sf.ExportError, match=r"strips weights only if there is a GPU, and there is none$"):
        export_tensorrt_rtx(engine, tmp_path / "bundle", strip_weights=True)
    monkeypatch.setattr(to_tensorrt, "require", lambda *_: None)
    with pytest.raises(sf.ExportError, match=r"^TensorRT builds for the GPU that it finds, and there is none"):
        export_tensorrt(engine, tmp_path / "bundle")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_bundle_for_a_gpu_is_refused_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_tensorrt_rtx(cpu_engine(tiny_network()), out, batch=Batch.fixed(2))
    with pytest.raises(sf.ExportError, match=r"^the tensorrt-rtx bundle was made for cuda, and device is cpu$"):
        load_network(out, "cpu")
    with pytest.raises(sf.ExportError, match=r"^the tensorrt-rtx bundle cannot run here: device must be "):
        load_network(out)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tensorrt") / "model.onnx"
    engine, batch = cpu_engine(tiny_network()), Batch(1, 2, 4)
    program = export_program(engine, batch)
    write_onnx(program, path, input_specs(engine, batch), output_specs(program, batch))
    return path


def test_the_user_can_stop_the_builder(onnx_file: Path) -> None:
    steps: list[str] = []

    def stop(phase: str, step: int, of: int) -> bool:
        steps.append(phase)
        return False

    with pytest.raises(sf.ExportError, match=r"^tensorrt_rtx cannot build the network: "):
        build_engine(onnx_file, "tensorrt_rtx", Batch(1, 2, 4), progress=stop)
    assert steps


def test_an_operator_that_the_parser_does_not_know_is_named(onnx_file: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type, node.domain = "Wobble", "example.org"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(sf.ExportError, match=rf"cannot read the network: operator Wobble at {node.name}: "):
        build_engine(tmp_path / "model.onnx", "tensorrt_rtx", Batch(1, 2, 4))


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not ONNX")
    with pytest.raises(sf.ExportError, match=r"^tensorrt_rtx cannot read the network: .+"):
        build_engine(tmp_path / "model.onnx", "tensorrt_rtx", Batch.fixed(1))


def test_a_layer_in_another_dtype_is_refused() -> None:
    layers = [("time", "ELEMENTWISE", "FLOAT"), ("conv_in", "CONVOLUTION", "HALF"), ("mid", "CONVOLUTION", "FLOAT")]
    tensors = Tensors([], [], layers)
    with pytest.raises(sf.ExportError, match=r"^layer mid \(convolution\) is FLOAT, and the network is float16$"):
        check_precisions(tensors, "float16")
    assert tensors.precisions()["CONVOLUTION", "HALF"] == 1
    check_precisions(Tensors([], [], layers[:2]), "float16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("strip_weights", [False, True])
def test_a_tensorrt_engine_runs_as_the_network(dtype: str, strip_weights: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt", reason="tensorrt is not installed: pip install tensorrt")
    engine, out = cpu_engine(tiny_network(), dtype=dtype), tmp_path / "bundle"
    export_tensorrt(engine, out, batch=Batch(1, 2, 4), strip_weights=strip_weights)
    network = load_network(out, "cuda")
    allowed = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}[dtype]
    for batch in (1, 3, 6):
        assert difference(engine, network, batch) < allowed
