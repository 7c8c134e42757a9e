"""network="openvino": the network through OpenVINO, one compiled model for each signature."""

from __future__ import annotations

import builtins
import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepfusion.errors import BackendError
from stepfusion.execution import openvino_network as subject
from stepfusion.execution.openvino_network import openvino_network
from stepfusion.export.batch import Batch
from stepfusion.networks import UNet2D, UNet2DConfig
from stepfusion_testing.exports import cpu_engine

TOLERANCE = {torch.float32: 2.0**-16, torch.bfloat16: 2.0**-4}  # relative to the largest output


class Small(nn.Module):
    """x [B, 3, H, W] and int64 labels [B]; one number of its parameters is not a float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, kernel_size=3, padding=1)
        self.embedding = nn.Embedding(4, 3)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.conv(x)) + self.embedding(labels)[:, :, None, None]


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8, dtype=dtype), torch.randint(0, 4, (batch,))


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of every model compiled from now on."""
    seen: list[dict[str, Any]] = []
    settings = subject._settings

    def record(dtype: torch.dtype) -> dict[str, Any]:
        seen.append(settings(dtype))
        return seen[-1]

    monkeypatch.setattr(subject, "_settings", record)
    return seen


@pytest.fixture(scope="module")
def network() -> Callable[..., Tensor]:
    """A small network in OpenVINO, which has a model for a batch of 2 as soon as it was called with one."""
    pytest.importorskip("openvino")
    return openvino_network(Small().eval(), torch.float32)


class TestWithOpenVINO:
    """What needs the package."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("openvino")

    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.soak)])
    def test_a_unet_gives_what_eager_gives(self, dtype: torch.dtype) -> None:
        config = UNet2DConfig(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
        )  # with attention in its middle
        unet = UNet2D(config).eval()
        x, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
        with torch.no_grad():
            expected = unet(x, timesteps)
        half = copy.deepcopy(unet).to(dtype, memory_format=torch.channels_last)
        actual = openvino_network(half, dtype)(x.to(dtype), timesteps)
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        scale = expected.abs().max().item()
        assert (actual.float() - expected).abs().max().item() <= TOLERANCE[dtype] * scale

    def test_outputs_are_the_callers_own(self, network: Callable[..., Tensor]) -> None:
        x, labels = inputs(2)
        first = network(x, labels)
        kept = first.clone()
        second = network(x + 1, labels)
        assert torch.equal(first, kept)
        assert not torch.equal(second, first)

    def test_inputs_of_any_layout(self, network: Callable[..., Tensor]) -> None:
        x, labels = inputs(2)
        assert torch.equal(network(x.contiguous(memory_format=torch.channels_last), labels), network(x, labels))

    def test_one_model_for_each_signature(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = count_compilations(monkeypatch)
        module = Small().eval()
        network = openvino_network(module, torch.float32)
        for batch in (1, 2, 1, 2):
            tensors = inputs(batch)
            with torch.no_grad():
                torch.testing.assert_close(network(*tensors), module(*tensors), rtol=1e-5, atol=1e-5)
        assert len(seen) == 2

    def test_in_bfloat16_and_the_module_is_left_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = count_compilations(monkeypatch)
        module, (x, labels) = Small().bfloat16().eval(), inputs(1, torch.bfloat16)
        with torch.no_grad():
            expected = copy.deepcopy(module).float()(x.float(), labels)
        out = openvino_network(module, torch.bfloat16)(x, labels)
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).abs().max() <= TOLERANCE[torch.bfloat16] * expected.abs().max()
        assert seen == [
            {
                "INFERENCE_PRECISION_HINT": "bf16",
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            }
        ]
        assert module.conv.weight.dtype == torch.bfloat16
        assert module.steps.dtype == torch.int64

    def test_threads_take_turns(self, network: Callable[..., Tensor]) -> None:
        batches = [inputs(2) for _ in range(4)]
        expected = [network(*batch) for batch in batches]
        wrong: list[int] = []

        def repeat(index: int) -> None:
            wrong.extend(index for _ in range(50) if not torch.equal(network(*batches[index]), expected[index]))

        threads = [threading.Thread(target=repeat, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_network_that_cannot_be_exported_is_named(self) -> None:
        class Branches(Small):
            def forward(self, x: Tensor, labels: Tensor) -> Tensor:
                return x if x.sum() > 0 else -x

        with pytest.raises(BackendError, match="OpenVINO cannot take this network: "):
            openvino_network(Branches().eval(), torch.float32)(*inputs(1))

    def test_parameters_elsewhere_are_refused(self) -> None:
        with pytest.raises(BackendError, match=r"parameter conv\.weight is on meta: use device='cpu'"):
            openvino_network(Small().to("meta"), torch.float32)

    def test_inputs_elsewhere_are_refused(self) -> None:
        x, labels = inputs(1)
        with pytest.raises(BackendError, match="input 1 is on meta"):
            openvino_network(Small().eval(), torch.float32)(x, labels.to("meta"))


SIGNALLED = """
import signal, sys
import torch
from stepfusion.export.load import load_network
from stepfusion.execution.openvino_network import openvino_network

class Doubled(torch.nn.Module):
    def forward(self, x, t):
        return 2 * x

inputs = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
for make in (lambda: load_network(sys.argv[1]), lambda: openvino_network(Doubled(), torch.float32)):
    networks = [make(), make()]
    for network in networks:
        network(*inputs)
    del network
    while networks:
        del networks[0]  # in the order in which they were made
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino.*")
@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO changes the stack of signal handlers on Linux")
def test_ctrl_c_interrupts_a_process_whose_models_are_gone(tmp_path: Path) -> None:
    for package in ("openvino", "onnxscript"):
        pytest.importorskip(package)
    from stepfusion.export.to_openvino import export_openvino

    class Smooth(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            return torch.tanh(x) * timesteps[:, None, None, None]

    export_openvino(cpu_engine(Smooth(), shape=(1, 4, 4)), tmp_path / "bundle", batch=Batch.fixed(2))
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", SIGNALLED, str(tmp_path / "bundle")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n" * 2), done.stderr[-1000:]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "openvino":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(BackendError, match=r"pip install stepfusion\[openvino\]"):
        openvino_network(Small(), torch.float32)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of .*torch\.bfloat16.*got torch\.float64"):
        openvino_network(Small(), torch.float64)
