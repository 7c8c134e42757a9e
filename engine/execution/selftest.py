"""A quick proof on the machine at hand: the fused step against the reference, and both against float64."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from stepfusion import kernels
from stepfusion.kernels import cpu_ops, reference
from stepfusion.kernels.backend import why_not_triton
from stepfusion.kernels.cpu.sampling_library import why_not_sampling_kernels
from stepfusion.kernels.tolerance import ROUNDINGS, projection_roundings, tolerance
from stepfusion.samplers import ddpm
from stepfusion.samplers.schedule import NoiseSchedule


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference found, and the largest that rounding explains."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """True if rounding explains the difference."""
        return self.error <= self.allowed


def self_test(device: torch.device) -> list[Check]:
    """Walk a stochastic table over random images on ``device``.

    Reference against float64, and the fused kernels that run here, in C++ and Triton, against the reference.
    """
    table = ddpm(NoiseSchedule.linear(), 10)
    rows = torch.arange(10, device=device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((10, 3, 16, 16), generator=generator).to(device)
    out = torch.randn((10, 3, 16, 16), generator=generator).to(device)
    identity = {"seeds": rows * 7, "indices": rows}
    single, double = table.on(device), table.on(device, torch.float64)
    exact = reference.diffusion_step(
        x.double(), out.double(), rows, double.coefficients, double.timesteps, **identity
    )
    plain = reference.diffusion_step(x, out, rows, single.coefficients, single.timesteps, **identity)
    magnitude = float(max(abs(table.coefficients[:, :2]).max() * x.abs().max(), exact.abs().max()))
    allowed = tolerance(torch.float32, magnitude, ROUNDINGS["diffusion_step"])
    checks = [Check("reference step against float64", float((plain - exact).abs().max()), allowed)]
    if device.type == "cpu" and why_not_sampling_kernels() is None:
        fused = cpu_ops.diffusion_step(x, out, rows, single.coefficients, single.timesteps, **identity)
        checks.append(Check("C++ step against reference", float((fused - plain).abs().max()), 0.0))
    if why_not_triton(device) is None:
        fused = kernels.diffusion_step(x, out, rows, single.coefficients, single.timesteps, **identity)
        checks.append(_projection(device))
        checks.append(Check("fused step against reference", float((fused - plain).abs().max()), 0.0))
    return checks


def _projection(device: torch.device) -> Check:
    """The product of a shortcut in bfloat16, on a GPU by its matrix units, against float64."""
    generator = torch.Generator().manual_seed(1)
    image, x, skip = (torch.randn((2, c, 16, 16), generator=generator) for c in (128, 256, 128))
    given = [image, x, torch.randn((128, 384), generator=generator) / 16]
    given, skip = [t.to(device, torch.bfloat16) for t in given], skip.to(device, torch.bfloat16)
    exact, magnitude = (
        reference.add_projection_doubled(*map(f, given), skip=f(skip)) for f in (torch.Tensor.double, _magnitude)
    )
    fused = kernels.add_projection_doubled(*given, skip=skip)
    allowed = tolerance(torch.bfloat16, float(magnitude.max()), projection_roundings(384))
    return Check("fused product of a shortcut against float64", float((fused - exact).abs().max()), allowed)


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    return x.double().abs()


def self_test_in_interpreter() -> Check:
    """Fused against reference if Triton drives no device: on the CPU, in Triton's interpreter.

    In a process of its own, because the interpreter is chosen when Triton is imported.
    """
    command = [sys.executable, "-P", "-m", "stepfusion.execution.selftest"]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    name = "fused step against reference, in Triton's interpreter"
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return Check(f"{name}: it did not run ({reason[0]})", math.nan, 0.0)
    return Check(**{**json.loads(done.stdout)[-1], "name": name})


if __name__ == "__main__":
    print(json.dumps([asdict(check) for check in self_test(torch.device("cpu"))]))
