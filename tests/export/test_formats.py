"""Formats, packages that are missing, and loading by format."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import stepfusion as sf
from stepfusion.export import load
from stepfusion.export.batch import DYNAMIC, Batch
from stepfusion.export.bundle import Bundle
from stepfusion.export.exporters import exporter
from stepfusion.export.formats import FORMATS, find_format
from stepfusion.export.guide import guide
from stepfusion.export.load import load_network
from stepfusion.export.manifest import Manifest
from stepfusion.export.program import export_program, input_specs, plain_network
from stepfusion.networks.norm import GroupNormAct
from stepfusion_testing.exports import cpu_engine
from stepfusion_testing.networks import smooth, tiny_unet


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_its_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfusion.export.environment.find_spec", lambda asked: asked)
    export = exporter(name)
    assert export.__name__ == f"export_{name.replace('-', '_')}"
    parameters = list(inspect.signature(export).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["engine", "out"]
    (options,) = get_args(get_type_hints(export)["options"])
    assert {"batch", "table"} <= set(options.__annotations__)
    assert ({"kind", "guided"} <= set(options.__annotations__)) == ("tick" in FORMATS[name].kinds)


@pytest.mark.parametrize("name", [name for name in FORMATS if "tensorrt" not in name or name == "tensorrt-rtx"])
def test_an_unknown_option_is_refused_before_any_work(
    name: str, engine: sf.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepfusion.export.environment.find_spec", lambda asked: asked)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bacth'"):
        exporter(name)(engine, tmp_path / "out", bacth=DYNAMIC)


@pytest.mark.parametrize("name", [name for name, found in FORMATS.items() if found.needs])
def test_a_missing_package_is_named_with_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = FORMATS[name]
    for package in found.needs:
        monkeypatch.setattr(
            "stepfusion.export.environment.find_spec",
            lambda asked, missing=package: None if asked == missing else asked,
        )
        message = rf"^the package {package} is not installed: pip install 'stepfusion\[{found.extra}\]'$"
        with pytest.raises(sf.ExportError, match=message):
            exporter(name)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"kind": "loop"}, ValueError, r"^kind must be"),
        ({"guided": True}, sf.ExportError, r"^guided is for kind='tick'"),
        ({"kind": "tick"}, sf.ExportError, r"^a tick needs a table"),
    ],
)
@pytest.mark.parametrize("name", [name for name, found in FORMATS.items() if "tick" in found.kinds])
def test_bad_arguments_leave_nothing(
    name: str, arguments: dict[str, Any], error: type[Exception], sentence: str, engine: sf.Engine, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence):
        exporter(name)(engine, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_a_format_does_not_carry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^format must be one of 'onnx', .*, got 'caffe'$"):
        find_format("caffe")
    with pytest.raises(sf.ExportError, match=r"^the format openvino does not carry a tick; onnx and aoti do$"):
        find_format("openvino", kind="tick")
    with pytest.raises(sf.ExportError, match=r"^the format onnx has no float64 networks; it has float32, bfloat16"):
        find_format("onnx", dtype="float64")
    assert find_format("aoti", kind="tick").kinds == ("network", "tick")


def test_loading_names_the_missing_package(onnx_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfusion.export.environment.find_spec", lambda name: None)
    message = r"^the package onnxruntime is not installed: pip install 'stepfusion\[onnx\]'$"
    with pytest.raises(sf.ExportError, match=message):
        load_network(onnx_bundle)


@pytest.mark.parametrize(("key", "value"), [("format", "triton-server"), ("format", "caffe"), ("kind", "tick")])
def test_what_holds_no_network_is_not_loaded(key: str, value: str, bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(sf.ExportError, match=r"holds a \w+ as [\w-]+; a network as onnx, .* can be loaded$"):
        load_network(bundle_copy)


def test_a_dtype_that_the_bundle_has_not_is_refused(onnx_bundle: Path) -> None:
    with pytest.raises(sf.ExportError, match=r"has a float32 network, and dtype is bfloat16$"):
        load_network(onnx_bundle, "cpu", torch.bfloat16)


def test_what_comes_back_describes_itself(engine: sf.Engine, onnx_bundle: Path) -> None:
    network = load_network(onnx_bundle)
    assert network.spec == engine.spec
    for name in ("shape", "num_classes", "null_label", "class_names", "prediction", "schedule", "options"):
        assert getattr(network, name) == getattr(network.spec, name), name
    assert (network.in_channels, network.sample_size) == (1, (8, 8))
    assert (network.device, network.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 2), r"^batch.low must be in \[1, 65536\], got 0$"),
        ((2, 1, 4), r"^batch must have low <= best <= high, got 2, 1, 4$"),
        ((1, 5, 4), r"^batch must have low <= best <= high, got 1, 5, 4$"),
    ],
)
def test_wrong_batches_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(*sizes)


def test_fused_networks_are_exported_in_plain_operators_and_stay_fused() -> None:
    engine = cpu_engine(tiny_unet(classes=None))
    assert isinstance(engine.network, torch.nn.Module)
    norms = [module for module in engine.network.modules() if isinstance(module, GroupNormAct)]
    for norm in norms:
        norm.fused = True
    plain = [module for module in plain_network(engine).modules() if isinstance(module, GroupNormAct)]
    assert [norm.fused for norm in plain] == [False] * len(norms)
    assert [norm.fused for norm in norms] == [True] * len(norms)


def test_an_output_object_is_unwrapped() -> None:
    class Output(torch.nn.Module):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> Any:
            return _Sample(smooth(x, timesteps))

    engine = cpu_engine(Output(), shape=(1, 8, 8))
    program = export_program(engine, Batch.fixed(2))
    x, timesteps = torch.zeros(2, 1, 8, 8), torch.tensor([1, 2])
    torch.testing.assert_close(program.module()(x, timesteps), smooth(x, timesteps))


class _Sample:
    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


@pytest.mark.parametrize("name", FORMATS)
def test_every_bundle_says_how_to_run_it(name: str, engine: sf.Engine) -> None:
    inputs = input_specs(engine, DYNAMIC)
    manifest = Manifest(
        name, "network", "any", "float32", inputs, inputs[:1], {"torch": "2"}, {"shape": [1, 8, 8]}, {}
    )
    page = guide(manifest, engine.table(steps=3))
    assert page.startswith(f"# A network as {name}\n")
    assert "| input | `timesteps` | int64 | [batch] |" in page
    run = page.partition("## Run it")[2].partition("Back in stepfusion")[0]
    assert "See the documentation" not in run
    tick = guide(replace(manifest, kind="tick"), None)
    for block in (page + tick).split("```python\n")[1:]:
        compile(block.partition("```")[0], name, "exec")


def test_importing_export_imports_no_format() -> None:
    script = "import sys, stepfusion.export; print([n for n in sys.argv[1:] if n in sys.modules])"
    heavy = ["onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch_tensorrt"]
    done = subprocess.run([sys.executable, "-P", "-c", script, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("weights", "file"), [("stripped", "model.onnx"), ("included", None)])
def test_an_engine_without_weights_gets_them_from_the_bundle(
    weights: str, file: str | None, engine: sf.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    monkeypatch.setattr(load, "require", lambda *_: None)
    monkeypatch.setattr(load, "TensorRTNetwork", lambda *arguments: given.append(arguments[-1]))
    specs, model = input_specs(engine, DYNAMIC), {"weights": weights}
    manifest = Manifest("tensorrt", "network", "cuda", "float32", specs, specs[:1], {}, model, {})
    load._load_tensorrt(Bundle(manifest, tmp_path, None, engine.spec, None), torch.device("cuda"))
    assert given == [None if file is None else tmp_path / file]
