"""Solvers that divide x by the signal stay away from levels without signal, whatever the network returns."""

from __future__ import annotations

import numpy as np
import pytest

import stepfusion as sf
from stepfusion.kernels import COLUMNS
from stepfusion.samplers.registry import make_table

MEAN, STD = 0.3, 0.4  # of the data
SCHEDULE = sf.NoiseSchedule.cosine()  # ends at lambda = -9.9
ZERO = sf.NoiseSchedule.linear().rescale_zero_terminal_snr()


def walk(table: sf.StepTable, start: np.ndarray, error: float) -> np.ndarray:
    """Run a table in float64 with nearly the v of normal data: off by up to this at each level."""
    x, history = start, [np.zeros_like(start)] * 3
    generator = np.random.default_rng(0)
    for values, timestep in zip(table.coefficients, table.timesteps, strict=True):
        c = dict(zip(COLUMNS, values, strict=True))
        abar = table.schedule.alphas_cumprod[timestep]
        x0 = MEAN + abar**0.5 * STD**2 / (abar * STD**2 + 1 - abar) * (x - abar**0.5 * MEAN)
        v = (abar**0.5 * x - x0) / (1 - abar) ** 0.5
        v = v + error * generator.uniform(-1, 1)
        x0 = c["x0_x"] * x + c["x0_out"] * v
        following = c["next_x0"] * x0 + c["next_x"] * x + c["next_out"] * v
        following = following + sum(
            c[name] * h for name, h in zip(COLUMNS[9:10] + COLUMNS[15:17], history, strict=True)
        )
        if c["keep_x"] or c["keep_x0"]:
            history = [c["keep_x"] * x + c["keep_x0"] * x0, *history[:2]]
        x = following
    return x


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO], ids=["cosine", "zero terminal SNR"])
@pytest.mark.parametrize("sampler", ["heun", "ipndm", "plms"])
def test_a_network_with_errors_gives_nearly_the_data(sampler: str, schedule: sf.NoiseSchedule) -> None:
    table = getattr(sf, sampler)(schedule, 12, prediction="v_prediction")
    images = walk(table, np.random.default_rng(1).standard_normal(20_000), error=0.05)
    assert abs(images.mean() - MEAN) < 0.2
    assert abs(images.std() - STD) < 0.2


@pytest.mark.parametrize("sampler", ["heun", "plms"])
def test_without_the_bound_they_fail(sampler: str) -> None:
    """The control: the same with every level of the schedule."""
    table = getattr(sf, sampler)(SCHEDULE, 12, prediction="v_prediction", lambda_min_clipped=-np.inf)
    images = walk(table, np.random.default_rng(1).standard_normal(20_000), error=0.05)
    assert abs(images.mean() - MEAN) + abs(images.std() - STD) > 1


@pytest.mark.parametrize(("sampler", "takes"), [("heun", False), ("ipndm", False), ("plms", True), ("unipc", True)])
def test_a_models_last_level_is_for_samplers_that_end_there(sampler: str, takes: bool) -> None:
    """diffusers' Heun and iPNDM end at the image whatever a config's ``set_alpha_to_one`` says."""
    end = float(SCHEDULE.alphas_cumprod[0])
    given = make_table(SCHEDULE, "v_prediction", sampler, 6, defaults={"final_alpha_cumprod": end})
    plain = make_table(SCHEDULE, "v_prediction", sampler, 6, defaults={})
    assert (given.digest != plain.digest) is takes
