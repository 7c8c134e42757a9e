"""How long each operation takes: fused on a GPU, the reference on a CPU. ``pytest --benchmark-only tests/bench``"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepfusion import kernels, samplers
from stepfusion.bench.measure import synchronize
from stepfusion.kernels import reference
from stepfusion.kernels.backend import interpreting
from stepfusion.samplers.schedule import NoiseSchedule

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")
OPS = kernels if DEVICE.type == "cuda" else reference
SHAPES = [(1, 3, 32, 32), (64, 3, 32, 32), (16, 3, 256, 256)]
SCHEDULE = NoiseSchedule.linear(1000)

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def measured(benchmark: Any, call: Callable[[], object]) -> None:
    """Time a call until the device is done."""

    def finished() -> None:
        call()
        synchronize(DEVICE)

    finished()  # compiles
    benchmark(finished)


def device_table(name: str) -> torch.Tensor:
    return torch.tensor(getattr(SCHEDULE, name), dtype=torch.float32, device=DEVICE)


@shapes
@pytest.mark.parametrize("noise", ["none", "given", "drawn"])
def test_step(benchmark: Any, shape: tuple[int, ...], noise: str) -> None:
    table = samplers.ddim(SCHEDULE, 50, eta=0.0 if noise == "none" else 1.0).on(DEVICE)
    x, out, z = (torch.randn(shape, device=DEVICE) for _ in range(3))
    rows, seeds = torch.full((len(x),), 20, device=DEVICE), torch.zeros(len(x), dtype=torch.int64, device=DEVICE)
    source = {
        "none": {},
        "given": {"noise": z},
        "drawn": {"seeds": seeds, "indices": torch.arange(len(x), device=DEVICE)},
    }
    x_next = torch.empty_like(x)
    measured(
        benchmark,
        lambda: OPS.diffusion_step(x, out, rows, table.coefficients, table.timesteps, x_next=x_next, **source[noise]),
    )


@shapes
def test_q_sample(benchmark: Any, shape: tuple[int, ...]) -> None:
    x, noise = (torch.randn(shape, device=DEVICE) for _ in range(2))
    t = torch.randint(0, 1000, (len(x),), device=DEVICE)
    signal, scale = device_table("sqrt_alphas_cumprod"), device_table("sqrt_one_minus_alphas_cumprod")
    measured(benchmark, lambda: OPS.q_sample(x, t, signal, scale, noise=noise))


@shapes
def test_posterior(benchmark: Any, shape: tuple[int, ...]) -> None:
    x_start, x_t = (torch.randn(shape, device=DEVICE) for _ in range(2))
    t = torch.randint(0, 1000, (len(x_t),), device=DEVICE)
    names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped")
    tables = [device_table(name) for name in names]
    measured(benchmark, lambda: OPS.q_posterior_mean_variance(x_start, x_t, t, *tables))


@shapes
def test_to_uint8(benchmark: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=DEVICE)
    measured(benchmark, lambda: OPS.to_uint8(x))


@pytest.mark.parametrize(
    "shape", [(8, 128, 32, 32), (8, 256, 16, 16), (8, 512, 8, 8)], ids=lambda s: f"{s[1]}at{s[2]}"
)
def test_group_norm_silu(benchmark: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight, bias = torch.ones(shape[1], device=DEVICE), torch.zeros(shape[1], device=DEVICE)
    measured(benchmark, lambda: OPS.group_norm_silu(x, weight, bias, 32, 1e-6))
