"""OpenVINO IR on this CPU against the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion.export import to_openvino
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import read_bundle
from stepfusion.export.load import load_network
from stepfusion.export.to_openvino import export_openvino
from stepfusion_testing.exports import back_in, cpu_engine, difference
from stepfusion_testing.tiny_model import tiny_network

pytest.importorskip("onnxscript")
pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino.*")


class Convolution(nn.Module):
    """Is converted in a second: where what is tested is the way, not the network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + torch.tanh(timesteps.to(x.dtype) / 500)[:, None, None, None]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
def test_it_gives_the_engines_images(dtype: str, tmp_path: Path) -> None:
    engine = cpu_engine(tiny_network(add_attention=True), dtype=dtype)
    export_openvino(engine, tmp_path / "bundle", table=engine.table(steps=5))
    bundle = read_bundle(tmp_path / "bundle")
    assert {"model.xml", "model.bin", "table.json", "README.md"} == set(bundle.manifest.files)
    assert (bundle.manifest.dtype, bundle.manifest.inputs[0].dtype) == (dtype, "float32")
    network = load_network(bundle.path)
    if torch.cpu._is_avx512_bf16_supported():
        compiled = network._run._request.get_compiled_model()  # type: ignore[attr-defined]
        wanted = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == wanted
    for batch in (1, 3):
        assert difference(engine, network, batch) < {"float32": 1e-4, "bfloat16": 0.125}[dtype]
    images = back_in(network).sample(3, bundle.table, labels=1)
    error = (images - engine.sample(3, steps=5, labels=1)).abs()
    assert error.max() < 1e-3 if dtype == "float32" else error.mean() < 0.02


def test_a_fixed_batch_is_filled_up_and_split(tmp_path: Path) -> None:
    engine = cpu_engine(Convolution().eval(), shape=(1, 8, 8))
    export_openvino(engine, tmp_path / "bundle", batch=Batch.fixed(4))
    network = load_network(tmp_path / "bundle")
    for batch in (1, 4, 9):
        assert difference(engine, network, batch) < 1e-4


def test_float16_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(
        sf.ExportError, match=r"^the format openvino has no float16 networks; it has float32, bfloat16$"
    ):
        export_openvino(cpu_engine(tiny_network(), dtype="float16"), tmp_path / "bundle")


def test_a_model_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(to_openvino.OpenVINONetwork):
        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            return 1.001 * super().__call__(*inputs)

    monkeypatch.setattr(to_openvino, "OpenVINONetwork", Wrong)
    with pytest.raises(sf.ExportError, match=r"^the OpenVINO model differs from the network by "):
        export_openvino(cpu_engine(Convolution().eval(), shape=(1, 8, 8)), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
