"""ONNX in onnxruntime against the engine, and what cannot be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.export import to_onnx
from stepfusion.export.base import NetworkExport
from stepfusion.export.batch import DYNAMIC, Batch
from stepfusion.export.bundle import read_bundle
from stepfusion.export.load import load_network
from stepfusion.export.program import export_program
from stepfusion.export.to_onnx import MODEL, compare_in_onnxruntime, export_onnx
from stepfusion.networks import UNet2D, UNet2DConfig
from stepfusion_testing.exports import back_in, cpu_engine, difference
from stepfusion_testing.tiny_model import tiny_network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

PUBLISHED: dict[str, dict[str, Any]] = {
    "google/ddpm-cifar10-32": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # At its own depth and size this takes minutes: one layer a block instead of two, 64x64 instead of 256x256.
    "google/ddpm-celebahq-256, one layer a block, 64x64": {
        "sample_size": 64,
        "layers_per_block": 1,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    },
}
COMMON = {
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
NETWORK, LOOP = 1e-4, 1e-3  # float32, largest difference


def published(name: str) -> sf.Engine:
    torch.manual_seed(0)
    return cpu_engine(UNet2D(UNet2DConfig(**COMMON, **PUBLISHED[name])), prediction="epsilon")


@pytest.mark.soak
def test_the_bundled_model_gives_the_engines_images(tmp_path: Path) -> None:
    engine = sf.Engine.from_pretrained(
        "fashion-mnist", device="cpu", dtype="float32", backend="reference", network="eager"
    )
    export_onnx(engine, tmp_path / "bundle", table=engine.table(steps=50))
    network = load_network(tmp_path / "bundle", "cpu", "float32")
    assert max(difference(engine, network, batch) for batch in (1, 3)) < NETWORK
    how: dict[str, Any] = {"seed": 5, "labels": [0, 7], "guidance": 2.0}
    images = back_in(network).sample(2, read_bundle(tmp_path / "bundle").table, **how)
    torch.testing.assert_close(images, engine.sample(2, steps=50, **how), rtol=0, atol=LOOP)


@pytest.mark.soak
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_unets_give_the_engines_images(name: str, tmp_path: Path) -> None:
    engine = published(name)
    export_onnx(engine, tmp_path / "bundle", batch=Batch.fixed(1), table=engine.table(steps=50))
    network = load_network(tmp_path / "bundle")
    assert difference(engine, network, 1) < NETWORK
    images = back_in(network).sample(table=read_bundle(tmp_path / "bundle").table)
    torch.testing.assert_close(images, engine.sample(steps=50), rtol=0, atol=LOOP)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_any_batch_goes_through_a_dynamic_bundle(sampler: str, engine: sf.Engine, onnx_bundle: Path) -> None:
    other = back_in(load_network(onnx_bundle))
    table = engine.table(sampler, 5)
    for n in (1, 2, 7, 66):
        labels = [i % 3 for i in range(n)]
        expected = engine.sample(n, table, labels=labels)
        torch.testing.assert_close(other.sample(n, table, labels=labels), expected, rtol=0, atol=LOOP)


def test_a_fixed_batch_is_filled_up_and_split(tmp_path: Path) -> None:
    engine = cpu_engine(tiny_network(num_class_embeds=None))
    export_onnx(engine, tmp_path / "bundle", batch=Batch.fixed(4))
    model = onnx.load(tmp_path / "bundle" / MODEL)
    assert [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim] == [4, 1, 8, 8]
    network = load_network(tmp_path / "bundle")
    for batch in (1, 3, 4, 9):
        assert difference(engine, network, batch) < NETWORK


def test_the_file_says_what_the_manifest_says(onnx_bundle: Path) -> None:
    model, manifest = onnx.load(onnx_bundle / MODEL), read_bundle(onnx_bundle).manifest
    onnx.checker.check_model(model, full_check=True)
    kinds = {1: "float32", 7: "int64"}
    for values, specs in ((model.graph.input, manifest.inputs), (model.graph.output, manifest.outputs)):
        found = [
            (
                value.name,
                kinds[value.type.tensor_type.elem_type],
                tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]
        assert found == [(spec.name, spec.dtype, spec.shape) for spec in specs]
    assert model.opset_import[0].version >= 20
    operators = {node.op_type for node in model.graph.node}
    assert "GroupNormalization" in operators
    assert "InstanceNormalization" not in operators  # what it became before opset 21, with a large error in float16
    assert all(info.type.tensor_type.HasField("shape") for info in model.graph.value_info)
    assert "Run in onnxruntime" in (onnx_bundle / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_in_the_file(dtype: str, tmp_path: Path) -> None:
    engine = cpu_engine(tiny_network(), dtype=dtype)
    export_onnx(engine, tmp_path / "bundle", batch=Batch.fixed(2))
    model = onnx.load(tmp_path / "bundle" / MODEL)
    weights = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert weights == {{"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]}
    note = (tmp_path / "bundle" / "README.md").read_text()
    if dtype == "bfloat16":
        assert "no bfloat16 convolutions on a CPU" in note
        with pytest.raises(sf.ExportError, match=r"^onnxruntime cannot run model.onnx: .*NOT_IMPLEMENTED"):
            load_network(tmp_path / "bundle", "cpu")
    else:
        assert "Run in onnxruntime" in note
        assert difference(engine, load_network(tmp_path / "bundle"), 2) < 0.02


def test_large_weights_lie_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "_EXTERNAL_ABOVE", 10_000)
    engine = cpu_engine(tiny_network())
    export_onnx(engine, tmp_path / "bundle", batch=Batch.fixed(2))
    bundle = read_bundle(tmp_path / "bundle")
    (data,) = set(bundle.manifest.files) - {MODEL, "README.md"}
    assert (bundle.path / data).stat().st_size > 30_000
    assert difference(engine, load_network(bundle.path), 2) < NETWORK


def test_nothing_of_how_it_was_traced_goes_into_the_file(onnx_bundle: Path) -> None:
    data = (onnx_bundle / MODEL).read_bytes()
    for path in (sf.__file__, torch.__file__, __file__):
        assert str(Path(path).parent).encode() not in data
    graph = onnx.load(onnx_bundle / MODEL).graph
    holders = (graph, *graph.node, *graph.input, *graph.initializer, *graph.value_info)
    assert not any(holder.metadata_props for holder in holders)


def test_an_operator_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    class Exotic(torch.nn.Module):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return x + torch.special.bessel_j0(x)

    with pytest.raises(sf.ExportError, match=r"^torch.onnx cannot convert the network: .*bessel_j0"):
        export_onnx(cpu_engine(Exotic(), shape=(1, 8, 8)), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_computes_something_else_is_refused(
    engine: sf.Engine, onnx_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(to_onnx.OnnxRuntimeNetwork):
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            return super().__call__(*inputs) + 1e-3

    manifest = read_bundle(onnx_bundle).manifest
    export = NetworkExport(engine, DYNAMIC, export_program(engine), manifest)
    assert "differs" in compare_in_onnxruntime(export, onnx_bundle / MODEL)
    monkeypatch.setattr(to_onnx, "OnnxRuntimeNetwork", Wrong)
    with pytest.raises(sf.ExportError, match=r"^the ONNX model differs from the network by 0.001 at batch 1; "):
        compare_in_onnxruntime(export, onnx_bundle / MODEL)


def test_labels_are_needed_where_the_network_takes_them(onnx_bundle: Path) -> None:
    network = load_network(onnx_bundle)
    with pytest.raises(sf.ExportError, match=r"^the network takes x, timesteps, labels, and 2 inputs were given$"):
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
