"""Engines to export, and bundles of a tiny network that many tests read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import stepfusion as sf
from stepfusion_testing.exports import cpu_engine
from stepfusion_testing.tiny_model import tiny_network


@pytest.fixture(scope="session")
def engine() -> sf.Engine:
    """A labelled UNet of one level, with guidance and class names."""
    return cpu_engine(
        tiny_network(add_attention=True), null_label=3, class_names=("a", "b", "c"), options={"clip": 2.0}
    )


@pytest.fixture(scope="session")
def onnx_bundle(engine: sf.Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network as ONNX, with the table of DDIM-4."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from stepfusion.export.to_onnx import export_onnx

    out = tmp_path_factory.mktemp("onnx") / "bundle"
    export_onnx(engine, out, table=engine.table(steps=4))
    return out


@pytest.fixture
def bundle_copy(onnx_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(onnx_bundle, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
