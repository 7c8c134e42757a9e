"""Kernels that do what ours must not, as controls of the machine-code checks.

``python slow_kernels.py`` compiles them for sm_90, in a process without TRITON_INTERPRET, and prints JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from stepfusion.bench.machine_code import compile_launches
from stepfusion.bench.variants import Variant, step
from stepfusion.kernels.philox import normal_block


@triton.jit
def library_noise_kernel(z_ptr, seed, BLOCK: tl.constexpr):
    """``tl.randn``: one of four words used, sine and cosine of the library."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z_ptr + offs, tl.randn(seed, offs))


@triton.jit
def own_noise_kernel(z_ptr, seed_ptr, BLOCK: tl.constexpr):
    """Our noise; a launch can starve it of registers."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z_ptr + offs, normal_block(tl.load(seed_ptr), 0, 0, 0, 0, BLOCK, 4))


@triton.jit
def line_kernel(x_ptr, BLOCK: tl.constexpr):
    """A product and a sum, which FMA contraction would fuse."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) * 3.0 + 0.5)


def _launches() -> dict[str, Variant]:
    x, seed = torch.zeros(4096), torch.zeros(1, dtype=torch.int64)
    options = {"BLOCK": 4096, "num_warps": 4}
    return {
        "library noise": Variant(
            "library noise", lambda: library_noise_kernel[(1,)](x, 7, **options, enable_fp_fusion=False)
        ),
        "few registers": Variant("few registers", lambda: own_noise_kernel[(1,)](x, seed, **options, maxnreg=32)),
        "contracted": Variant("contracted", lambda: line_kernel[(1,)](x, **options, enable_fp_fusion=True)),
        "plain": Variant("plain", lambda: line_kernel[(1,)](x, **options, enable_fp_fusion=False)),
        "odd lanes": step(shape=(2, 1, 63, 65)),
    }


if __name__ == "__main__":
    launches = _launches()
    codes = dict(zip(launches, compile_launches(launches.values(), "sm_90"), strict=True))
    json.dump(
        {n: {**asdict(c), "instructions_per_element": c.instructions_per_element} for n, c in codes.items()},
        sys.stdout,
    )
