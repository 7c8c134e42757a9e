"""`NoiseSchedule`: every formula against scalar loops from the papers, and against diffusers' tables."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from stepfusion.samplers.schedule import NoiseSchedule

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler

ROUNDING = 1e-12  # relative, float64: a product of 1000 factors

TABLES = (
    "betas",
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "snr",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def linear_betas(total: int, start: float = 1e-4, end: float = 0.02) -> list[float]:
    return [start + (end - start) * t / max(total - 1, 1) for t in range(total)]


def squared_line_betas(total: int, start: float, end: float) -> list[float]:
    return [root**2 for root in linear_betas(total, math.sqrt(start), math.sqrt(end))]


def cosine_betas(total: int, s: float = 0.008, cap: float = 0.999) -> list[float]:
    def f(t: int) -> float:
        return math.cos((t / total + s) / (1 + s) * math.pi / 2) ** 2

    return [min(1 - f(t + 1) / f(t), cap) for t in range(total)]


def sigmoid_betas(total: int, start: float = 1e-4, end: float = 0.02) -> list[float]:
    return [start + (end - start) / (1 + math.exp(6 - 12 * t / max(total - 1, 1))) for t in range(total)]


SCHEDULES = {
    "linear": (NoiseSchedule.linear(), linear_betas(1000)),
    "linear 250": (NoiseSchedule.linear(250), linear_betas(250, 4e-4, 0.08)),
    "linear 4000": (NoiseSchedule.linear(4000), linear_betas(4000, 2.5e-5, 0.005)),
    "linear 250 unscaled": (NoiseSchedule.linear(250, scaled=False), linear_betas(250)),
    "linear, other ends": (NoiseSchedule.linear(100, 1e-5, 0.05, scaled=False), linear_betas(100, 1e-5, 0.05)),
    "scaled_linear": (NoiseSchedule.scaled_linear(), squared_line_betas(1000, 0.00085, 0.012)),
    "quadratic": (NoiseSchedule.quadratic(), squared_line_betas(1000, 1e-4, 0.02)),
    "cosine": (NoiseSchedule.cosine(), cosine_betas(1000)),
    "cosine 50": (NoiseSchedule.cosine(50, s=0.01, max_beta=0.9), cosine_betas(50, 0.01, 0.9)),
    "sigmoid": (NoiseSchedule.sigmoid(), sigmoid_betas(1000)),
    "two timesteps": (NoiseSchedule.from_betas([0.1, 0.2]), [0.1, 0.2]),
    "one timestep": (NoiseSchedule.from_betas([0.3]), [0.3]),
}

# Every beta_schedule that a diffusers scheduler knows, and the options that change its betas.
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear 400": {"num_train_timesteps": 400},
    "linear, other ends": {"beta_start": 1e-5, "beta_end": 0.03},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained": {"trained_betas": np.linspace(0.001, 0.1, 50).tolist(), "num_train_timesteps": 50},
    "zero SNR": {"rescale_betas_zero_snr": True},
    "zero SNR, scaled_linear": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}


def zero_terminal(betas: list[float]) -> list[float]:
    """Lin et al. 2024, algorithm 1, line by line: alphas_cumprod with a last entry of 0."""
    product, roots = 1.0, []
    for beta in betas:
        product *= 1 - beta
        roots.append(math.sqrt(product))
    first, last = roots[0], roots[-1]
    return [((root - last) * first / (first - last)) ** 2 for root in roots]


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_equal_the_formula(name: str) -> None:
    schedule, expected = SCHEDULES[name]
    assert schedule.num_timesteps == len(expected)
    np.testing.assert_allclose(schedule.betas, expected, rtol=ROUNDING)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_equal_scalar_recurrences(name: str) -> None:
    schedule, betas = SCHEDULES[name]
    close = partial(pytest.approx, rel=1e-10)  # 1 - abar cancels at small t
    abar, after = 1.0, [*betas[1:], 1.0]
    for t, beta in enumerate(betas):
        prev, abar = abar, abar * (1 - beta)
        # q(x_{t-1} | x_t, x_0) by completing the square: precisions add up
        precision = (1 - beta) / beta + (1 / (1 - prev) if prev < 1 else math.inf)
        assert schedule.alphas[t] == 1 - schedule.betas[t]
        assert schedule.alphas_cumprod[t] == close(abar)
        assert schedule.alphas_cumprod_prev[t] == close(prev)
        assert schedule.alphas_cumprod_next[t] == close(abar * (1 - after[t]))
        assert schedule.sqrt_alphas_cumprod[t] == close(math.sqrt(abar))
        assert schedule.sqrt_one_minus_alphas_cumprod[t] == close(math.sqrt(1 - abar))
        assert schedule.log_one_minus_alphas_cumprod[t] == close(math.log(1 - abar))
        assert schedule.sqrt_recip_alphas_cumprod[t] == close(1 / math.sqrt(abar))
        assert schedule.sqrt_recipm1_alphas_cumprod[t] == close(math.sqrt((1 - abar) / abar))
        assert schedule.snr[t] == close(abar / (1 - abar))
        assert schedule.posterior_variance[t] == close(1 / precision)
        if t > 0:
            assert schedule.posterior_log_variance_clipped[t] == close(-math.log(precision))
            coef1 = math.sqrt(prev) / (1 - prev) / precision
            assert schedule.posterior_mean_coef1[t] == close(coef1)
            assert schedule.posterior_mean_coef2[t] == close(math.sqrt(1 - beta) / beta / precision)


def test_the_first_step_ends_at_x0() -> None:
    schedule = NoiseSchedule.linear()
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_mean_coef1[0] == pytest.approx(1, abs=1e-11)
    assert schedule.posterior_mean_coef2[0] == 0
    assert schedule.posterior_log_variance_clipped[0] == schedule.posterior_log_variance_clipped[1]
    assert NoiseSchedule([0.3]).posterior_log_variance_clipped[0] == pytest.approx(math.log(0.3), rel=1e-15)


@pytest.mark.parametrize(
    ("schedule", "table", "t", "value"),
    [
        (NoiseSchedule.linear(), "alphas_cumprod", -1, 4.035830e-05),
        (NoiseSchedule.linear(), "alphas_cumprod", 0, 0.9999),
        (NoiseSchedule.scaled_linear(), "alphas_cumprod", -1, 0.0046601),
        (NoiseSchedule.scaled_linear(), "alphas_cumprod", 0, 0.99915),
        (NoiseSchedule.cosine(), "betas", -1, 0.999),
        (NoiseSchedule.cosine(), "betas", 0, 4.12842e-05),
        (NoiseSchedule.linear(), "betas", 999, 0.02),
    ],
)
def test_published_values(schedule: NoiseSchedule, table: str, t: int, value: float) -> None:
    assert getattr(schedule, table)[t] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("total", [250, 400, 2000])
def test_linear_scales_with_the_number_of_timesteps(total: int) -> None:
    """Trap 2: guided-diffusion keeps the total noise, diffusers does not; at T = 1000 they are one."""
    reference = DDPMScheduler(num_train_timesteps=total).betas.numpy()
    np.testing.assert_allclose(NoiseSchedule.linear(total, scaled=False).betas, reference, rtol=1e-6)
    np.testing.assert_allclose(NoiseSchedule.linear(total).betas, reference * 1000 / total, rtol=1e-6)
    thousand = NoiseSchedule.linear()
    assert thousand == NoiseSchedule.linear(scaled=False)
    last, last_of_thousand = np.log([NoiseSchedule.linear(total).alphas_cumprod[-1], thousand.alphas_cumprod[-1]])
    assert last == pytest.approx(last_of_thousand, rel=0.03)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_is_the_algorithm(name: str) -> None:
    schedule, betas = SCHEDULES[name]
    if len(betas) == 1:
        with pytest.raises(ValueError, match=r"^rescale_zero_terminal_snr needs at least 2 timesteps, got 1$"):
            schedule.rescale_zero_terminal_snr()
        return
    rescaled = schedule.rescale_zero_terminal_snr()
    np.testing.assert_allclose(rescaled.alphas_cumprod, zero_terminal(betas), rtol=1e-9)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.betas[-1] == 1
    assert rescaled.snr[-1] == 0
    assert math.isinf(rescaled.sqrt_recip_alphas_cumprod[-1])
    assert rescaled.alphas_cumprod[0] == pytest.approx(schedule.alphas_cumprod[0], rel=1e-14)
    assert rescaled.name == f"{schedule.name}, zero terminal SNR"


@pytest.mark.parametrize("name", CONFIGS)
def test_from_config_is_diffusers_schedule(name: str) -> None:
    """Trap 1: every factor of the product, and every root that was rescaled, is rounded to float32 there."""
    scheduler = DDPMScheduler(**CONFIGS[name])
    schedule = NoiseSchedule.from_config(scheduler.config)
    theirs = scheduler.alphas_cumprod.double().numpy()
    assert schedule.num_timesteps == len(theirs)
    bound = 2.0**-24 * np.arange(2, len(theirs) + 2) * schedule.sqrt_alphas_cumprod
    assert (np.abs(schedule.alphas_cumprod - theirs) <= bound).all()
    assert (schedule.alphas_cumprod != theirs).any()


@pytest.mark.parametrize(("table", "least", "most"), [("beta", 4e-4, 5e-4), ("one_minus_abar", 1.5e-4, 1.8e-4)])
def test_float32_tables_lose_what_ours_keep(table: str, least: float, most: float) -> None:
    """Trap 1: 1 - alpha in float32 keeps few digits of a small beta."""
    scheduler, schedule = DDPMScheduler(), NoiseSchedule.linear()
    exact = np.array(linear_betas(1000))
    abar32 = scheduler.alphas_cumprod.numpy()
    if table == "beta":
        truth, ours = exact, 1 - schedule.alphas
        theirs = np.float32(1) - abar32 / np.append(np.float32(1), abar32[:-1])
    else:
        truth, ours, theirs = 1 - np.cumprod(1 - exact), 1 - schedule.alphas_cumprod, np.float32(1) - abar32
    assert least < np.abs(theirs / truth - 1).max() < most
    assert np.abs(ours / truth - 1).max() < 1e-11


def test_from_config_passes_over_what_is_not_the_schedule() -> None:
    config = {
        **DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False).config,
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.6.0",
        "thresholding": True,
    }
    assert NoiseSchedule.from_config(config) == NoiseSchedule.scaled_linear(1000, 1e-4, 0.02)
    assert NoiseSchedule.from_config({}) == NoiseSchedule.linear()


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_float64_and_read_only(name: str) -> None:
    schedule, _ = SCHEDULES[name]
    for table in TABLES:
        array = getattr(schedule, table)
        assert array.dtype == np.float64
        assert array.shape == (schedule.num_timesteps,)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.5
        assert getattr(schedule, table) is array


def test_betas_are_copied() -> None:
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[0] = 0.5
    assert schedule.betas[0] == 0.1
    assert NoiseSchedule(torch.tensor([0.1, 0.2], dtype=torch.float64)) == schedule


def test_equality_hash_and_repr() -> None:
    linear, same = NoiseSchedule.linear(), NoiseSchedule.from_betas(NoiseSchedule.linear().betas)
    assert linear == same
    assert hash(linear) == hash(same)
    assert linear.fingerprint == same.fingerprint
    assert re.fullmatch(r"[0-9a-f]{16}", linear.fingerprint)
    assert linear != NoiseSchedule.linear(999)
    assert linear != NoiseSchedule.cosine()
    nudged = linear.betas.copy()
    nudged[500] = np.nextafter(nudged[500], 1)
    assert linear != NoiseSchedule(nudged)
    assert linear != "linear"
    assert repr(linear) == "NoiseSchedule(linear, 1000 timesteps, abar 0.999900 to 4.04e-05)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NoiseSchedule([]), ValueError,
         "betas must be one-dimensional with 1 to 1048576 entries, got shape (0,)"),
        (lambda: NoiseSchedule([[0.1]]), ValueError,
         "betas must be one-dimensional with 1 to 1048576 entries, got shape (1, 1)"),
        (lambda: NoiseSchedule([0.1, 0.0]), ValueError,
         "betas must lie in (0, 1), the last one in (0, 1], got betas[1] = 0.0"),
        (lambda: NoiseSchedule([0.1, 1.0, 0.1]), ValueError,
         "betas must lie in (0, 1), the last one in (0, 1], got betas[1] = 1.0"),
        (lambda: NoiseSchedule([0.1, math.nan]), ValueError,
         "betas must lie in (0, 1), the last one in (0, 1], got betas[1] = nan"),
        (lambda: NoiseSchedule.linear(0), ValueError, "timesteps must be in [1, 1048576], got 0"),
        (lambda: NoiseSchedule.linear(True), TypeError, "timesteps must be an integer, got True"),
        (lambda: NoiseSchedule.cosine(10.0), TypeError, "timesteps must be an integer, got 10.0"),
        (lambda: NoiseSchedule.linear(20), ValueError,
         "timesteps = 20 scales beta_end to 1, which must stay below 1: use more timesteps or scaled=False"),
        (lambda: NoiseSchedule.linear(scaled=1), TypeError, "scaled must be True or False, got 1"),
        (lambda: NoiseSchedule.linear(beta_start=0.5, beta_end=0.1), ValueError,
         "beta_start must not exceed beta_end, got 0.5 and 0.1"),
        (lambda: NoiseSchedule.quadratic(beta_start=0), ValueError,
         "beta_start must be a finite number in (0, 1], got 0"),
        (lambda: NoiseSchedule.sigmoid(beta_end="0.02"), TypeError, "beta_end must be a number, got '0.02'"),
        (lambda: NoiseSchedule.cosine(s=2), ValueError, "s must be a finite number in [0, 1], got 2"),
        (lambda: NoiseSchedule.from_config([1]), TypeError, "config must be a dict, got list"),
        (lambda: NoiseSchedule.from_config({"betas": 1, "a": 2}), ValueError,
         "scheduler config has unknown keys: 'a', 'betas'"),
        (lambda: NoiseSchedule.from_config({"beta_schedule": "cosine"}), ValueError,
         "beta_schedule must be one of 'linear', 'scaled_linear', 'squaredcos_cap_v2', 'sigmoid', got 'cosine'"),
        (lambda: NoiseSchedule.from_config({"rescale_betas_zero_snr": "yes"}), TypeError,
         "rescale_betas_zero_snr must be True or False, got 'yes'"),
        (lambda: NoiseSchedule.from_config({"num_train_timesteps": None}), TypeError,
         "num_train_timesteps must be an integer, got None"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()
