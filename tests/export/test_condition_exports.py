"""Exports of networks with conditions, and of DiT: every format computes what the engine's network does."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepfusion as sf
from stepfusion.export import export_program
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import read_bundle, write_bundle
from stepfusion.export.exporters import exporter
from stepfusion.export.load import load_network
from stepfusion.export.manifest import Manifest
from stepfusion.export.program import example_inputs, input_names, input_specs
from stepfusion.export.spec_json import model_to_json, spec_from_json
from stepfusion.export.to_triton_server import export_triton_server
from stepfusion.networks import ConditionSpec
from stepfusion_testing.condition_networks import (
    UNETS,
    ByKeyword,
    Mixed,
    condition_engine,
    mixed_engine,
    options_of,
)
from stepfusion_testing.exports import cpu_engine, difference

NETWORK, LOOP = 1e-4, 1e-3  # float32, largest difference
SMALL = Batch(1, 2, 4)
NAMES = ("x", "timesteps", "labels", "text", "sizes")


@pytest.fixture(scope="module")
def engine() -> sf.Engine:
    """Of a network with labels, a text, and sizes as integers."""
    return mixed_engine()


@pytest.fixture(scope="module")
def bundle(engine: sf.Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its network as ONNX."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("conditions") / "bundle"
    exporter("onnx")(engine, out, batch=SMALL, table=engine.table("ddim", 3))
    return out


def assert_same_images(exported: sf.Engine, engine: sf.Engine, images: int = 3) -> None:
    options = options_of(engine, images)
    expected = engine.sample(images, steps=4, seed=3, **options)
    torch.testing.assert_close(exported.sample(images, steps=4, seed=3, **options), expected, rtol=0, atol=LOOP)


# Programs


# SDXL's has all that Stable Diffusion's has, and more.
@pytest.mark.parametrize(
    "name", [pytest.param("stable diffusion", marks=pytest.mark.soak), "sdxl", "inpainting", "dit"]
)
def test_a_program_of_any_batch_is_the_network(name: str) -> None:
    engine = condition_engine(name)
    program = export_program(engine, SMALL)
    names = ("x", "timesteps", *(one.name for one in engine.spec.conditions))
    assert program.graph_signature.user_inputs == ((*names, "labels") if name == "dit" else names)
    module = program.module()
    for batch in (1, 3):
        x, timesteps, *rest = example_inputs(engine, batch)
        keywords = {} if name == "dit" else dict(zip(names[2:], rest, strict=True))
        with torch.no_grad():
            expected = engine.network(x, timesteps, *(rest if name == "dit" else ()), **keywords)
            torch.testing.assert_close(module(x, timesteps, *rest), expected, rtol=0, atol=NETWORK)
    assert expected.shape[1] == (2 * engine.shape[0] if name == "dit" else engine.shape[0])


def test_inputs_are_in_the_order_of_labels_and_conditions(engine: sf.Engine) -> None:
    specs = input_specs(engine, SMALL, "float16")
    assert tuple(spec.name for spec in specs) == input_names(engine) == NAMES
    assert [spec.dtype for spec in specs] == ["float16", "int64", "int64", "float16", "int64"]
    assert [spec.shape for spec in specs[3:]] == [("batch", 5, 6), ("batch", 2)]
    for spec, value in zip(input_specs(engine, SMALL), example_inputs(engine, 3), strict=True):
        assert (spec.dtype, spec.shape[1:]) == (str(value.dtype).removeprefix("torch."), tuple(value.shape[1:]))


@pytest.mark.parametrize("name", ["labels", "row", "out", "null_text"])
def test_a_condition_with_the_name_of_another_input_is_refused(name: str) -> None:
    conditions = [ConditionSpec("text", (2,)), ConditionSpec(name, (2,))]
    with pytest.raises(sf.ExportError, match=rf"^the condition '{name}' cannot be exported: another input or output"):
        export_program(cpu_engine(nn.Identity(), shape=(1, 8, 8), conditions=conditions))


# Bundles


def test_an_engine_around_a_bundle_gives_the_engines_images(engine: sf.Engine, bundle: Path) -> None:
    network = load_network(bundle)
    assert max(difference(engine, network, batch) for batch in (1, 3, 9)) < NETWORK
    exported = sf.Engine.from_exported(bundle, batch=4)
    assert exported.spec == engine.spec
    assert not exported.evaluator.hoisted
    assert_same_images(exported, engine, 6)


def test_a_manifest_says_what_the_conditions_are(engine: sf.Engine, bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    assert manifest.model["conditions"] == [
        {"name": "text", "shape": [5, 6], "integer": False},
        {"name": "sizes", "shape": [2], "integer": True},
    ]
    assert tuple(spec.name for spec in manifest.inputs) == NAMES
    page = (bundle / "README.md").read_text()
    assert "| input | `text` | float32 | [batch, 5, 6] |" in page
    assert "## Conditions\n\nEach image has conditions of its own beside x: `text`, `sizes`, " in page
    assert 'engine.sample(labels=labels, conditions={"text": text, "sizes": sizes})' in page


def test_a_model_without_conditions_has_the_manifest_that_it_always_had() -> None:
    engine = condition_engine("dit")
    model = model_to_json(engine)
    assert "conditions" not in model
    assert spec_from_json(model).conditions == ()


def test_conditions_that_are_missing_or_wrong_are_named(engine: sf.Engine, bundle: Path) -> None:
    network = load_network(bundle)
    x, timesteps, labels, text, sizes = example_inputs(engine, 2)
    for conditions, message in (
        ({"text": text}, r"^the network needs the condition sizes; it has text, sizes$"),
        ({"text": text, "sizes": sizes, "y": text}, r"^the network takes no condition y; it has text, sizes$"),
        (
            {"text": text[:, :4], "sizes": sizes},
            r"^the network cannot take a condition: text is float32 \[2, 4, 6\]; accepted is floating .*\[2, 5, 6\]$",
        ),
        ({"text": text, "sizes": sizes.float()}, r"sizes is float32 \[2, 2\]; accepted is int64 \[2, 2\]$"),
        ({"text": text[:1], "sizes": sizes}, r"text is float32 \[1, 5, 6\]; accepted is floating point \[2, 5, 6\]$"),
    ):
        with pytest.raises(sf.ExportError, match=message):
            network(x, timesteps, labels, **conditions)
    with pytest.raises(sf.ExportError, match=r"^the network takes x, timesteps, labels, text, sizes, and 4 inputs"):
        network(x, timesteps, text=text, sizes=sizes)
    exported = sf.Engine.from_exported(bundle)
    with pytest.raises(ValueError, match=r"^conditions must have 'sizes', \[2\] for all images or for each$"):
        exported.sample(1, labels=0, conditions={"text": text[0]})


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / "manifest.json"
        given = json.loads(path.read_text())
        change(given)
        path.write_text(json.dumps(given))

    return spoil


def edit_condition(**changes: Any) -> Callable[[Path], None]:
    return edit(lambda given: given["model"]["conditions"][0].update(changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            edit_condition(shape=[5, 7]),
            r"inputs for conditions: text float32 \['batch', 5, 6\], sizes .*text floating",
        ),
        (edit_condition(integer=True), r"those of its model are text int64 \[5, 6\], sizes int64 \[2\], \[batch, "),
        (edit_condition(name="texts"), r"those of its model are texts floating \[5, 6\]"),
        (edit_condition(shape="5"), r"model.conditions.0.shape: Input should be a valid array, got '5'$"),
        (edit_condition(integer=0), r"model.conditions.0.integer: Input should be a valid boolean, got 0$"),
        (edit_condition(dtype="float32"), r"model.conditions.0.dtype"),
        (edit(lambda given: given["model"].pop("conditions")), r"those of its model are none, \[batch, ...\] each$"),
        (
            edit(lambda given: given["inputs"].pop()),
            r"inputs for conditions: text .*; those of its model are text .*",
        ),
        (edit(lambda given: given["inputs"].reverse()), r"has the first input sizes"),
        (
            edit(lambda given: given["inputs"].append(given["inputs"].pop(3))),
            r"sizes int64 .*, text float32 .*; those",
        ),
        (edit(lambda given: given["model"].update(conditions=17 * [{}])), r"model.conditions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_whose_conditions_were_changed_is_refused(
    spoil: Callable[[Path], None], message: str, bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(sf.ExportError, match=message):
        read_bundle(copy)


@pytest.mark.parametrize("changes", [{"name": "not a name"}, {"shape": [0]}, {"name": "sizes"}])
def test_a_manifest_whose_conditions_are_none_is_refused(changes: dict[str, Any], engine: sf.Engine) -> None:
    model = model_to_json(engine)
    model["conditions"][0] |= changes
    with pytest.raises(sf.ExportError, match=r"^the manifest's model cannot be used: .*(name|shape)"):
        spec_from_json(model)


def test_a_network_that_is_not_ours_takes_conditions_by_their_names() -> None:
    inner = Mixed().eval()
    known = {"shape": (2, 4, 4), "num_classes": 4, "conditions": inner.conditions}
    engine = mixed_engine(ByKeyword(inner), **known)
    x, timesteps, labels, text, sizes = example_inputs(engine, 3)
    with torch.no_grad():
        out = export_program(engine, SMALL).module()(x, timesteps, labels, text, sizes)
        expected = inner(x, timesteps, labels, text=text, sizes=sizes)
    torch.testing.assert_close(out, expected, rtol=0, atol=NETWORK)


# Formats


def export(form: str, engine: sf.Engine, out: Path) -> sf.Engine:
    """An engine around the engine's network in a format."""
    exporter(form)(engine, out, batch=SMALL)
    assert max(difference(engine, load_network(out), batch) for batch in (1, 3)) < NETWORK
    return sf.Engine.from_exported(out, batch=4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino.*")
def test_openvino_gives_the_engines_images(engine: sf.Engine, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    assert_same_images(export("openvino", engine, tmp_path / "bundle"), engine)


class Shifted(nn.Module):
    """Has every kind of input and compiles to one loop: the others' machine code is for ``make soak``."""

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor, *, shift: Tensor) -> Tensor:
        level = 1e-3 * timesteps + 0.1 * labels
        return 0.5 * x + level[:, None, None, None] + shift[:, :, None, None]


def test_machine_code_gives_the_engines_images(tmp_path: Path) -> None:
    conditions = [ConditionSpec("shift", (2,))]
    known = {"shape": (2, 4, 4), "num_classes": 4, "null_label": 3, "conditions": conditions}
    engine = cpu_engine(Shifted(), prediction="epsilon", **known)
    assert_same_images(export("aoti", engine, tmp_path / "bundle"), engine)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino.*")
@pytest.mark.soak
@pytest.mark.parametrize("form", ["onnx", "openvino", "aoti"])
@pytest.mark.parametrize("name", [*UNETS, "dit", "mixed"])
def test_networks_in_every_format_give_the_engines_images(form: str, name: str, tmp_path: Path) -> None:
    if form != "aoti":
        pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[form])
        pytest.importorskip("onnxscript")
    engine = mixed_engine() if name == "mixed" else condition_engine(name)
    assert_same_images(export(form, engine, tmp_path / "bundle"), engine)


def build_rtx(engine: sf.Engine, out: Path) -> list[list[Any]]:
    """The inputs that TensorRT for RTX found in the network; it builds without a GPU."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
    exporter("tensorrt-rtx")(engine, out, batch=SMALL)
    assert read_bundle(out).spec == engine.spec
    found: list[list[Any]] = json.loads((out / "layers.json").read_text())["network"]["inputs"]
    return found


def test_tensorrt_for_rtx_builds_an_engine_with_conditions(engine: sf.Engine, tmp_path: Path) -> None:
    assert build_rtx(engine, tmp_path / "bundle")[-2:] == [["text", "FLOAT", [-1, 5, 6]], ["sizes", "INT64", [-1, 2]]]


@pytest.mark.soak
@pytest.mark.parametrize("name", ["everything", "dit"])
def test_tensorrt_for_rtx_builds_the_networks(name: str, tmp_path: Path) -> None:
    engine = condition_engine(name)
    found = {tensor: shape[1:] for tensor, _, shape in build_rtx(engine, tmp_path / "bundle")}
    assert {one.name: found[one.name] for one in engine.spec.conditions} == {
        one.name: list(one.shape) for one in engine.spec.conditions
    }


def test_a_python_model_of_the_triton_server_takes_conditions(
    engine: sf.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_triton_server(engine, tmp_path / "bundle", backend="python", batch=SMALL)
    folder = tmp_path / "bundle" / "models" / "network"
    config = (folder / "config.pbtxt").read_text()
    assert 'name: "text"\n    data_type: TYPE_FP32\n    dims: [ 5, 6 ]\n' in config
    assert 'name: "sizes"\n    data_type: TYPE_INT64\n    dims: [ 2 ]\n' in config

    class PbTensor:
        def __init__(self, value: Tensor) -> None:
            self.value = value

        def to_dlpack(self) -> Any:
            return torch.utils.dlpack.to_dlpack(self.value)

        @classmethod
        def from_dlpack(cls, name: str, capsule: Any) -> Tensor:
            return torch.utils.dlpack.from_dlpack(capsule)

    utilities = ModuleType("triton_python_backend_utils")
    utilities.__dict__.update(
        Tensor=PbTensor,
        get_input_tensor_by_name=lambda request, name: PbTensor(request[name]),
        InferenceResponse=lambda output_tensors: output_tensors[0],
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    names: dict[str, Any] = {}
    exec((folder / "1" / "model.py").read_text(), names)
    model = names["TritonPythonModel"]()
    kind = {"model_instance_kind": "CPU", "model_instance_device_id": "0"}
    model.initialize({"model_repository": str(folder), "model_version": "1", **kind})
    x, timesteps, labels, text, sizes = example_inputs(engine, 3)
    values = (x, timesteps[:, None], labels[:, None], text, sizes)
    (out,) = model.execute([dict(zip(NAMES, values, strict=True))])
    with torch.no_grad():
        expected = engine.network(x, timesteps, labels, text=text, sizes=sizes)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_a_bundle_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """Its manifest knows nothing of conditions."""
    engine = condition_engine("dit")
    specs = input_specs(engine, SMALL)
    model = model_to_json(engine, SMALL)
    manifest = Manifest("onnx", "network", "any", "float32", specs, specs[:1], {"torch": "2"}, model, {})
    write_bundle(tmp_path / "bundle", manifest, lambda folder: None)
    read = read_bundle(tmp_path / "bundle")
    assert (read.spec, read.spec.conditions) == (engine.spec, ())
