"""Bad input to GaussianDiffusion: each mistake's error to the letter, before any work, and nothing left behind."""

from __future__ import annotations

import pytest

import stepfusion as sf
from stepfusion_testing.bad_input import (
    DIFFUSION,
    LINEAR,
    Case,
    T,
    X,
    check_case,
    network,
)

pytestmark = pytest.mark.usefixtures("bad_input_workspace")


# fmt: off
DIFFUSIONS = [
    Case("diffusion schedule: text", lambda: sf.GaussianDiffusion("linear"),
         TypeError, "schedule must be a NoiseSchedule, got str"),
    Case("diffusion variance: unknown", lambda: sf.GaussianDiffusion(LINEAR, variance="small"),
         ValueError, "variance must be one of 'fixed_small', 'fixed_large', 'learned', 'learned_range', got 'small'"),
    Case("diffusion clip: negative", lambda: sf.GaussianDiffusion(LINEAR, clip=-1),
         ValueError, "clip must be a finite number in (0, inf], got -1"),
    Case("t: T", lambda: DIFFUSION.q_sample(X, T + 100, X), ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("t: negative", lambda: DIFFUSION.q_sample(X, T - 1, X), ValueError, "t must lie in [0, 99], got -1 to -1"),
    Case("t: int32", lambda: DIFFUSION.q_sample(X, T.int(), X), TypeError, "t must be int64, got int32"),
    Case("t: float", lambda: DIFFUSION.q_sample(X, T.float(), X), TypeError, "t must be int64, got float32"),
    Case("t: a number", lambda: DIFFUSION.q_sample(X, 0, X), TypeError, "t must be a tensor, got int"),
    Case("t: one for two", lambda: DIFFUSION.q_sample(X, T[:1], X), ValueError, "t must have shape [2], got [1]"),
    Case("t: other device", lambda: DIFFUSION.q_sample(X, T.to("meta"), X),
         ValueError, "t must be on cpu, got meta"),
    Case("x_start: integers", lambda: DIFFUSION.q_sample(X.long(), T, X),
         TypeError, "x_start must be float16 or bfloat16 or float32 or float64, got int64"),
    Case("noise: one for two images", lambda: DIFFUSION.q_sample(X, T, X[:1]),
         ValueError, "noise must have shape [2, 1, 4, 4], got [1, 1, 4, 4]"),
    Case("noise: integers", lambda: DIFFUSION.q_sample(X, T, X.long()),
         TypeError, "noise must be float16 or bfloat16 or float32 or float64, got int64"),
    Case("noise: none", lambda: DIFFUSION.q_sample(X, T),
         ValueError, "q_sample needs noise, or seeds and indices to draw it"),
    Case("noise: given and drawn", lambda: DIFFUSION.q_sample(X, T, X, seeds=T, indices=T),
         ValueError, "noise must be given or drawn, got both noise and seeds or indices"),
    Case("seeds without indices", lambda: DIFFUSION.q_sample(X, T, seeds=T),
         ValueError, "seeds and indices must be given together, got one of them"),
    Case("seeds: floats", lambda: DIFFUSION.q_sample(X, T, seeds=T.float(), indices=T),
         TypeError, "seeds must be int64, got float32"),
    Case("posterior: two dtypes", lambda: DIFFUSION.q_posterior_mean_variance(X, X.half(), T),
         TypeError, "x_t must be float32, got float16"),
    Case("q_mean_variance: t", lambda: DIFFUSION.q_mean_variance(X, T + 100),
         ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("predict_eps_from_x0: t", lambda: DIFFUSION.predict_eps_from_x0(X, T + 100, X),
         ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("p_sample: t", lambda: DIFFUSION.p_sample(network, X, T + 100, noise=X),
         ValueError, "t must lie in [0, 99], got 100 to 100"),
    Case("p_sample: no noise", lambda: DIFFUSION.p_sample(network, X, T),
         ValueError, "this step adds noise: give noise, or seeds and indices"),
    Case("ddim_sample: eta", lambda: DIFFUSION.ddim_sample(network, X, T, eta=2.0),
         ValueError, "eta must be a finite number in [0, 1], got 2.0"),
    Case("ddim_reverse_sample: last t", lambda: DIFFUSION.ddim_reverse_sample(network, X, T + 99),
         ValueError, "t must lie in [0, 98], got 99 to 99"),
    Case("p_sample_loop: steps", lambda: DIFFUSION.p_sample_loop(network, (2, 1, 4, 4), steps=101),
         ValueError, "steps must be in [1, 100], got 101"),
    Case("p_sample_loop: seed", lambda: DIFFUSION.p_sample_loop(network, (2, 1, 4, 4), steps=2, seed=True),
         TypeError, "seed must be an integer, got True"),
    Case("p_sample_loop: start", lambda: DIFFUSION.p_sample_loop(network, (2, 1, 4, 4), steps=2, start=X[:1]),
         ValueError, "start must have shape [2, 1, 4, 4], got [1, 1, 4, 4]"),
    Case("p_sample_loop: noise", lambda: DIFFUSION.p_sample_loop(network, (2, 1, 4, 4), steps=2, noise=X),
         ValueError, "noise must have shape [2, 2, 1, 4, 4], got [2, 1, 4, 4]"),
    Case("training_losses: loss", lambda: DIFFUSION.training_losses(network, X, T, loss="l3", noise=X),
         ValueError, "loss must be one of 'l1', 'l2', 'huber', 'mse', 'rescaled_mse', 'kl', 'rescaled_kl', got 'l3'"),
    Case("training_losses: no noise", lambda: DIFFUSION.training_losses(network, X, T),
         ValueError, "q_sample needs noise, or seeds and indices to draw it"),
]

# fmt: on


@pytest.mark.usefixtures("no_network_call")
@pytest.mark.parametrize("case", DIFFUSIONS, ids=lambda case: case.name)
def test_a_call(case: Case) -> None:
    check_case(case)
