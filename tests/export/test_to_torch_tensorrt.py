"""torch-tensorrt: coverage by the real partitioner where the package is installed, and its errors everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import stepfusion as sf
from stepfusion.export.batch import Batch
from stepfusion.export.load import load_network
from stepfusion.export.to_torch_tensorrt import Coverage, export_torch_tensorrt, read_coverage
from stepfusion_testing.exports import cpu_engine, difference
from stepfusion_testing.networks import tiny_unet

HEADING = (
    "The following ops are currently unsupported or excluded from conversion, and are listed with their op-count"
)
REPORT = f"""
+++ Dry-Run Results for Graph +++

The graph consists of 12 Total Operators, of which 10 operators are supported, 83.33% coverage

{HEADING} in the graph:
 torch.ops.aten.special_bessel_j0.default: 2

    TRT Engine #1 - Submodule name: _run_on_acc_0
     Number of Operators in Engine: 6
    TRT Engine #2 - Submodule name: _run_on_acc_2
     Number of Operators in Engine: 4
"""


#: Every shipped network. The 256x256 UNet has one layer a block instead of two and 64x64 pixels, to take less time.
NETWORKS = (
    "fashion-mnist",
    "google/ddpm-cifar10-32",
    "google/ddpm-celebahq-256, one layer a block, 64x64",
    "context-unet",
)
#: Tiny networks: a UNet with all conditions that there are, and a transformer.
CONDITIONED = ("everything", "dit")


def run_script(*arguments: str) -> list[dict[str, object]]:
    """Partition in a process of its own, in which the stubs and the package's registrations stay."""
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, (str(here.parent), str(here), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, str(here / "partition_without_gpu.py"), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(find_spec("torch_tensorrt") is None, reason="torch-tensorrt is not installed: make partition")
@pytest.mark.skipif(torch.cuda.is_available(), reason="stubs the look-ups of a GPU, and there is one")
@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_the_partitioner_covers_every_operator_in_one_engine_with_device_look_ups_stubbed(network: str) -> None:
    names = [f"{network}/{dtype}" for dtype in ("float32", "float16", "bfloat16")]
    for found, name in zip(run_script(*names), names, strict=True):
        assert found["network"] == name
        assert found["operators"] == found["supported"] > 50
        assert (found["engines"], found["unsupported"]) == (1, [])


@pytest.mark.skipif(find_spec("torch_tensorrt") is None, reason="torch-tensorrt is not installed: make partition")
@pytest.mark.skipif(torch.cuda.is_available(), reason="stubs the look-ups of a GPU, and there is one")
@pytest.mark.slow
def test_networks_with_conditions_and_a_transformer_become_one_engine() -> None:
    names = [f"tiny {name}/float32" for name in CONDITIONED]
    for found, name in zip(run_script(*names), names, strict=True):
        assert found["network"] == name
        assert found["operators"] == found["supported"] > 20
        assert (found["engines"], found["unsupported"]) == (1, [])


def test_a_report_is_read() -> None:
    coverage = read_coverage(REPORT)
    assert coverage == Coverage(12, 10, 2, ("torch.ops.aten.special_bessel_j0.default: 2",))
    assert not coverage.complete
    assert str(coverage) == (
        "10 of 12 operators (83.3 %) in 2 engine(s); without a converter: torch.ops.aten.special_bessel_j0.default: 2"
    )
    assert Coverage(12, 12, 1, ()).complete
    assert not Coverage(12, 12, 2, ()).complete
    with pytest.raises(sf.ExportError, match=r"a report without the number of operators$"):
        read_coverage("nothing")


def test_it_needs_the_package_and_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cpu_engine(tiny_unet())
    monkeypatch.setattr("stepfusion.export.environment.find_spec", lambda name: None)
    missing = r"^the package torch_tensorrt is not installed: pip install 'stepfusion\[torch-tensorrt\]'$"
    with pytest.raises(sf.ExportError, match=missing):
        export_torch_tensorrt(engine, tmp_path / "bundle")
    monkeypatch.setattr("stepfusion.export.environment.find_spec", lambda name: name)
    with pytest.raises(sf.ExportError, match=r"builds for the GPU that the engine is on, and this one is on cpu$"):
        export_torch_tensorrt(engine, tmp_path / "bundle")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_compiled_module_is_saved_loaded_and_runs_as_the_network(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_tensorrt", reason="torch-tensorrt is not installed")
    from stepfusion.export.bundle import read_bundle
    from stepfusion.export.to_torch_tensorrt import load_torch_tensorrt

    engine, out = cpu_engine(tiny_unet(), device="cuda", dtype=dtype), tmp_path / "bundle"
    export_torch_tensorrt(engine, out, batch=Batch(1, 2, 4))
    allowed = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}[dtype]
    network = load_network(out)
    for batch in (1, 3, 6):
        assert difference(engine, network, batch) < allowed
    replayed = load_torch_tensorrt(read_bundle(out), engine.plan.device, cudagraphs=True)
    example = torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    torch.testing.assert_close(
        replayed(*example), network(*(value.cuda() for value in example)), rtol=0, atol=allowed
    )
