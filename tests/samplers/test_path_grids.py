"""Levels that samplers visit on any path, what is refused, and tables that start anew from any row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepfusion as sf
from stepfusion.kernels import COLUMNS
from stepfusion.samplers.beta_quantiles import beta_quantiles
from stepfusion.samplers.registry import (
    SAMPLERS,
    check_options,
    default_sampler,
    make_table,
    options_of,
    samplers_of,
)
from stepfusion.samplers.spacing import FLOW_SPACINGS, SIGMA_SPACINGS
from stepfusion.samplers.timesteps import BY_LEVEL, by_level
from stepfusion_testing import solvers
from stepfusion_testing.analytic import walk_columns

SIGMA, FLOW, LINEAR = sf.SigmaPath(), sf.FlowPath(), sf.NoiseSchedule.linear()
PATHS = {"sigma": SIGMA, "flow": FLOW, "schedule": LINEAR}
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()


def levels(path: Any, steps: int, **options: Any) -> Any:
    return sf.euler(path, steps, **options).pairs()[1]


# Spacings


def test_levels_of_sigma() -> None:
    np.testing.assert_allclose(levels(SIGMA, 18), solvers.karras_levels(0.002, 80.0, 18), rtol=1e-12)
    np.testing.assert_allclose(levels(SIGMA, 9, rho=3.0), solvers.karras_levels(0.002, 80.0, 9, 3.0), rtol=1e-12)
    for name in ("exponential", "lambda"):
        np.testing.assert_allclose(levels(SIGMA, 5, spacing=name), np.geomspace(80, 0.002, 5), rtol=1e-12)
    np.testing.assert_allclose(levels(SIGMA, 5, spacing="linear"), np.linspace(80, 0.002, 5), rtol=1e-12)


def test_levels_of_flows() -> None:
    t = np.array([1.0, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(levels(FLOW, 4), t, rtol=1e-12)
    np.testing.assert_allclose(levels(sf.FlowPath(3.0), 4), 3 * t / (1 + 2 * t), rtol=1e-12)
    lam = np.log(1 / levels(sf.FlowPath(3.0), 7, spacing="lambda") - 1)
    np.testing.assert_allclose(np.diff(lam), np.diff(lam)[0], rtol=1e-9)


@pytest.mark.parametrize("path", ["sigma", "flow"])
def test_every_spacing_falls_from_the_noisiest_level(path: str) -> None:
    for spacing in SIGMA_SPACINGS if path == "sigma" else FLOW_SPACINGS:
        for steps in (1, 2, 7, 200):
            found = levels(PATHS[path], steps, spacing=spacing)
            assert len(found) == steps
            assert (np.diff(found) < 0).all(), spacing
            top = {"sigma": 80.0, "flow": 0.999 if spacing == "lambda" else 1.0}[path]
            assert found[0] == pytest.approx(top)
            bounded = levels(PATHS[path], steps, spacing=spacing, lambda_min_clipped=-2.0)
            assert bounded[0] == pytest.approx(np.exp(2.0) if path == "sigma" else 1 / (1 + np.exp(-2.0)))


def test_beta_quantiles_invert_the_distribution() -> None:
    """Beside sums of a fine grid; and with shape 1 they are the probabilities, with 1/2 a squared sine."""
    p = np.linspace(0, 1, 33)
    np.testing.assert_allclose(beta_quantiles(p, 1.0), p, atol=1e-12)
    np.testing.assert_allclose(beta_quantiles(p, 0.5), np.sin(np.pi * p / 2) ** 2, atol=1e-12)
    x = beta_quantiles(p[1:-1])
    w = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = w ** (1 / 0.6 - 1) * (w ** (1 / 0.6)) ** -0.4 * np.maximum(1 - w ** (1 / 0.6), 1e-300) ** -0.4
    total = np.cumsum(density)
    below = np.interp(x**0.6, w, total) / total[-1]
    np.testing.assert_allclose(below, p[1:-1], atol=2e-3)


@pytest.mark.parametrize("spacing", BY_LEVEL)
@pytest.mark.parametrize("schedule", [LINEAR, ZERO_SNR], ids=["linear", "zero SNR"])
def test_timesteps_by_level(spacing: str, schedule: sf.NoiseSchedule) -> None:
    sigma = np.sqrt(1 / np.maximum(schedule.alphas_cumprod, 1e-30) - 1)
    top = sigma[-2 if schedule is ZERO_SNR else -1]
    for steps in (1, 2, 10, 50, 1000):
        visits = by_level(schedule.alphas_cumprod, steps, spacing)
        assert visits[0] == 999
        assert len(visits) == steps
        assert (np.diff(visits) < 0).all()
        assert visits[-1] >= 0
    wanted = {
        "karras": solvers.karras_levels(sigma[0], top, 10),
        "beta": sigma[0] + beta_quantiles(1 - np.linspace(0, 1, 10)) * (top - sigma[0]),
    }.get(spacing, np.geomspace(top, sigma[0], 10))
    if schedule is ZERO_SNR:
        return  # its noisy timesteps lie too far apart to be near
    apart = np.abs(np.log(sigma[by_level(schedule.alphas_cumprod, 10, spacing)[1:6]] / np.array(wanted)[1:6]))
    assert apart.max() < 0.05


# What is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sf.euler(SIGMA), ValueError, "steps or levels must be given on SigmaPath"),
        (lambda: sf.euler(SIGMA, 5, levels=[3.0]), ValueError, "steps and levels exclude each other, got both"),
        (lambda: sf.euler(SIGMA, levels=[3.0], spacing="karras"), ValueError, "spacing and levels exclude each"),
        (lambda: sf.euler(SIGMA, levels=[3.0, 3.0]), ValueError, "levels must be strictly decreasing, got 3"),
        (lambda: sf.euler(SIGMA, levels=[]), ValueError, "levels must be a list of 1 to 1000 numbers, got shape"),
        (lambda: sf.euler(SIGMA, levels=[True]), TypeError, "levels must be numbers, got bool"),
        (lambda: sf.euler(FLOW, levels=[1.2]), ValueError, r"levels must be finite numbers in \(0, 1\], got 1.2"),
        (lambda: sf.euler(FLOW, levels=[0.5], final_level=0.6), ValueError, "final_level must lie below the last"),
        (lambda: sf.euler(FLOW, 5, timesteps=[3]), ValueError, "timesteps is an option of a NoiseSchedule, got it"),
        (lambda: sf.euler(LINEAR, levels=[0.5]), ValueError, "levels is an option of a path whose levels are real"),
        (lambda: sf.euler(FLOW, 5, steps_offset=1), ValueError, "steps_offset is an option of a NoiseSchedule"),
        (lambda: sf.euler(FLOW, 5, spacing="trailing"), ValueError, "spacing must be one of 'uniform', "),
        (lambda: sf.euler(SIGMA, 5, spacing="beta", rho=3), ValueError, "rho is an option of spacing 'karras'"),
        (lambda: sf.euler(SIGMA, 1001), ValueError, r"steps must be in \[1, 1000\], got 1001"),
        (lambda: sf.euler(SIGMA, 5, prediction="flow"), ValueError, "prediction must be one of 'edm', "),
        (lambda: sf.euler(FLOW, 5, prediction="epsilon"), ValueError, "prediction 'epsilon' cannot start at t = 1"),
        (lambda: sf.euler(FLOW, 5, colour=1), TypeError, "there is no option 'colour'; options of all samplers are"),
        (lambda: sf.euler("linear", 5), TypeError, "schedule must be a NoiseSchedule or another path, got str"),
        (lambda: sf.heun(FLOW, 5, s_churn=1.0), ValueError, "s_churn must be 0 on FlowPath"),
        (lambda: sf.heun(SIGMA, 5, s_churn=-1.0), ValueError, r"s_churn must be a finite number in \[0, inf\]"),
        (lambda: sf.heun(SIGMA, 5, guidance_interval=(3, 1)), ValueError, "guidance_interval must be a finite"),
        (lambda: sf.heun(SIGMA, 5, guidance_interval=3), TypeError, r"guidance_interval must be two levels"),
        (lambda: sf.heun(SIGMA, 5, guidance_rescale=2), ValueError, r"guidance_rescale must be a finite number"),
        (lambda: sf.ddpm(SIGMA, 5), TypeError, "schedule must be a NoiseSchedule, got SigmaPath: this sampler is"),
        (lambda: sf.ddim_inversion(FLOW, 5, timesteps=[3]), ValueError, "timesteps is an option of a NoiseSchedule"),
        (lambda: sf.ddim_inversion(LINEAR, levels=[0.5]), ValueError, "levels is an option of a path whose levels"),
        (lambda: sf.flow_sde(SIGMA, 5), TypeError, "path must be a FlowPath for flow_sde, got SigmaPath"),
        (lambda: sf.ddim(FLOW, 5, compat="diffusers"), ValueError, "compat is an option of a NoiseSchedule, got"),
        (lambda: sf.unipc(SIGMA, 5, order=4), ValueError, r"order must be in \[1, 3\], got 4"),
        (lambda: sf.unipc(SIGMA, 5, variant="bh3"), ValueError, "variant must be one of 'bh1', 'bh2', got 'bh3'"),
        (lambda: sf.unipc(FLOW, 5, predict_x0=False), ValueError, "predict_x0 must be True where the first level"),
        (lambda: sf.dpmpp_2m(FLOW, 5, solver_type="x"), ValueError, "solver_type must be one of 'midpoint', 'heun'"),
        (lambda: sf.dpmpp_3m(FLOW, 5, eta=1.0, compat="diffusers"), ValueError, "compat must be None, or"),
        (lambda: sf.plms(LINEAR, 5, order=1), ValueError, r"order must be in \[2, 4\], got 1"),
        (
            lambda: sf.plms(ZERO_SNR, 5, prediction="sample", lambda_min_clipped=-np.inf),
            ValueError,
            "plms cannot start at the level 999",
        ),
        (lambda: sf.lcm(LINEAR, 51), ValueError, r"steps must be in \[1, 50\], got 51"),
        (lambda: sf.consistency(SIGMA, 41), ValueError, r"steps must be in \[1, 40\], got 41"),
        (lambda: make_table(SIGMA, "edm", "ddpm", defaults={}), ValueError, "sampler must be one of 'ddim', "),
        (lambda: check_options({"sampler": "best"}), ValueError, "sampler must be one of 'ddim', "),
    ],
)  # fmt: skip
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


# Any start, any level of signal


DETERMINISTIC = ("euler", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_3s", "unipc", "deis", "ipndm", "plms")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_table_starts_anew_from_any_row_of_any_path(name: str, path: str) -> None:
    """A network that knows x0, and a state of x0 and noise at the level where the rest begins: x0 comes out."""
    table = make_table(PATHS[path], "sample", name, 8, defaults={})
    eps = np.linspace(-2, 2, 9)
    for rows in range(1, len(table) + 1):
        tail = table.last(rows)
        signal, noise = tail.pairs()
        end = walk_columns(tail, lambda x, a, s: np.full_like(x, 0.3), signal[0] * 0.3 + noise[0] * eps)
        np.testing.assert_allclose(end, 0.3, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n != "plms"])
def test_samplers_start_without_signal(name: str) -> None:
    """Zero terminal SNR, where lambda is infinite: finite weights, and the same image but for the first step."""
    unbounded = {"lambda_min_clipped": -np.inf} if name in ("heun", "ipndm") else {}
    table = make_table(ZERO_SNR, "v_prediction", name, 16, defaults={}, **unbounded)
    assert table.pairs()[0][0] == 0
    assert all(np.isfinite(table.column(column)).all() for column in COLUMNS if column != "clip")
    end = walk_columns(table, lambda x, a, s: np.full_like(x, 0.3), np.linspace(-2, 2, 9))
    np.testing.assert_allclose(end, 0.3, atol=1e-9)


def test_names_options_and_defaults() -> None:
    assert [default_sampler(path) for path in PATHS.values()] == ["heun", "euler", "ddim"]
    assert len(make_table(SIGMA, "edm", defaults={})) == 35
    assert samplers_of(SIGMA) == tuple(n for n in SAMPLERS if n not in ("ddpm", "ddim_inversion", "flow_sde"))
    assert "flow_sde" in samplers_of(FLOW)
    assert "ddpm" in samplers_of(LINEAR)
    for name in SAMPLERS:
        if name != "ddim_inversion":
            assert options_of(name).keys() >= {"clip", "guidance_interval", "guidance_rescale", "prediction", "rho"}
    table = make_table(SIGMA, "edm", defaults={"sampler": "euler", "spacing": "linear", "clip": 1.0})
    assert table.name == "euler"
    assert np.isinf(table.column("clip")).all(), "a model's clip is for samplers that clip"
    assert make_table(SIGMA, "edm", "consistency", defaults={"clip": 1.0}).column("clip")[0] == 1.0
    assert make_table(SIGMA, "edm", "euler", levels=[2.0, 1.0], defaults={"spacing": "linear"}).pairs()[1][0] == 2.0
