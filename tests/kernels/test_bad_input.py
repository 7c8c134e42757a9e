"""Bad input to the kernels' functions: each mistake's error to the letter, before any work."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import reference
from stepfusion_testing.bad_input import (
    LEVELS,
    NAN,
    ROWS,
    TIMES,
    Case,
    T,
    X,
    check,
)

pytestmark = pytest.mark.usefixtures("bad_input_workspace")


# fmt: off
OPS = [
    Case("x_start: integers", lambda ops: ops.q_sample(X.long(), T, LEVELS, LEVELS, noise=X),
         TypeError, "x_start must be float16 or bfloat16 or float32, got int64"),
    Case("x_start: a scalar", lambda ops: ops.q_sample(X[0, 0, 0, 0], T, LEVELS, LEVELS, noise=X),
         ValueError, "x_start must have a batch dimension, got a 0-dimensional tensor"),
    Case("x_start: list", lambda ops: ops.q_sample([0.0], T, LEVELS, LEVELS),
         TypeError, "x_start must be a tensor, got list"),
    Case("t: int32", lambda ops: ops.q_sample(X, T.int(), LEVELS, LEVELS, noise=X),
         TypeError, "t must be int64, got int32"),
    Case("t: one for two", lambda ops: ops.q_sample(X, T[:1], LEVELS, LEVELS, noise=X),
         ValueError, "t must have shape [2], got [1]"),
    Case("tables: two lengths", lambda ops: ops.q_sample(X, T, LEVELS, LEVELS[:5], noise=X),
         ValueError, "sqrt_one_minus_alphas_cumprod must have shape [100], got [5]"),
    Case("tables: integers", lambda ops: ops.q_sample(X, T, LEVELS.long(), LEVELS, noise=X),
         TypeError, "sqrt_alphas_cumprod must be float32 or float64, got int64"),
    Case("tables: other device", lambda ops: ops.q_sample(X, T, LEVELS.to("meta"), LEVELS, noise=X),
         ValueError, "sqrt_alphas_cumprod must be on cpu, got meta"),
    Case("noise: none", lambda ops: ops.q_sample(X, T, LEVELS, LEVELS),
         ValueError, "q_sample needs noise, or seeds and indices to draw it"),
    Case("posterior: two shapes",
         lambda ops: ops.q_posterior_mean_variance(X, X[:, :, :3], T, LEVELS, LEVELS, LEVELS, LEVELS),
         ValueError, "x_t must have shape [2, 1, 4, 4], got [2, 1, 3, 4]"),
    Case("posterior: two dtypes",
         lambda ops: ops.q_posterior_mean_variance(X, X.bfloat16(), T, LEVELS, LEVELS, LEVELS, LEVELS),
         TypeError, "x_t must be float32, got bfloat16"),
    Case("out: wrong shape", lambda ops: ops.diffusion_step(X, X[:, :, :3], T, ROWS, TIMES),
         ValueError, "out must have shape [2, 1, 4, 4], or [2, 2, 4, 4] with learned variance, got [2, 1, 3, 4]"),
    Case("out: integers", lambda ops: ops.diffusion_step(X, X.long(), T, ROWS, TIMES),
         TypeError, "out must be float16 or bfloat16 or float32, got int64"),
    Case("x: float16", lambda ops: ops.diffusion_step(X.half(), X, T, ROWS, TIMES),
         TypeError, "x must be float32, got float16"),
    Case("rows: int32", lambda ops: ops.diffusion_step(X, X, T.int(), ROWS, TIMES),
         TypeError, "rows must be int64, got int32"),
    Case("coefficients: 8 columns", lambda ops: ops.diffusion_step(X, X, T, ROWS[:, :8], TIMES),
         ValueError, "coefficients must have shape [4, 21], got [4, 8]"),
    Case("timesteps: two for four rows", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES[:2]),
         ValueError, "timesteps must have shape [4], got [2]"),
    Case("seeds without indices", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, seeds=T),
         ValueError, "seeds and indices must be given together, got one of them"),
    Case("guidance without out_uncond", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, guidance=T.float()),
         ValueError, "out_uncond and guidance must be given together, got one of them"),
    Case("x_next: not contiguous", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, x_next=X.transpose(2, 3)),
         ValueError, "x_next must be contiguous, got strides [16, 16, 1, 4] for shape [2, 1, 4, 4]"),
    Case("x_net: three images for two",
         lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, x_net=torch.zeros(3, 1, 4, 4)),
         ValueError, "x_net must hold 2 or 4 images like x on cpu, got [3, 1, 4, 4]"),
    Case("flags: int32", lambda ops: ops.diffusion_step(X, X, T, ROWS, TIMES, flags=T.int()),
         TypeError, "flags must be int64, got int32"),
    Case("eta: above 1", lambda ops: ops.ddim_step(X, X, T, T, LEVELS, eta=2),
         ValueError, "eta must be in [0, 1], got 2"),
    Case("eta: NaN", lambda ops: ops.ddim_step(X, X, T, T, LEVELS, eta=NAN),
         ValueError, "eta must be in [0, 1], got nan"),
    Case("clip: 0", lambda ops: ops.ddim_step(X, X, T, T, LEVELS, clip=0),
         ValueError, "clip must be positive or None, got 0"),
    Case("clip: NaN", lambda ops: ops.ddpm_step(X, X, T, T, LEVELS, clip=NAN),
         ValueError, "clip must be positive or None, got nan"),
    Case("prediction: unknown", lambda ops: ops.ddim_step(X, X, T, T, LEVELS, prediction="eps"),
         ValueError, "prediction must be one of 'epsilon', 'sample', 'v_prediction', got 'eps'"),
    Case("variance: unknown", lambda ops: ops.ddpm_step(X, X, T, T, LEVELS, variance="small"),
         ValueError, "variance must be one of 'fixed_small', 'fixed_large', 'learned', 'learned_range', got 'small'"),
    Case("t_prev: float", lambda ops: ops.ddpm_step(X, X, T, T.float(), LEVELS),
         TypeError, "t_prev must be int64, got float32"),
    Case("pixels: three dimensions", lambda ops: ops.to_uint8(X[0]),
         ValueError, "x must be images [B, C, H, W], got shape [1, 4, 4]"),
    Case("normal: one timestep for two", lambda ops: ops.normal(T, T, T[:1], (1, 4, 4)),
         ValueError, "timesteps must have shape [2], got [1]"),
    Case("normal: float seeds", lambda ops: ops.normal(T.float(), T, T, (1, 4, 4)),
         TypeError, "seeds must be int64, got float32"),
]

# fmt: on


@pytest.mark.parametrize("ops", [kernels, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_an_op(ops: ModuleType, case: Case) -> None:
    with pytest.raises(case.error) as caught:
        case.call(ops)
    assert type(caught.value) is case.error
    given = str(caught.value)
    if "float64" not in case.message:  # which the references take everywhere
        given = given.replace(" or float64, got", ", got")
    check(given, case.message)
    assert not X.any()
    assert not T.any()
