"""Sampling loops against theory, with no weights: for Gaussian data the ideal network is known, and so is every law.

Data is N(MEAN, STD^2) in each pixel. The ideal network is affine in x, so is every unclipped step, and a state that
starts as N(0, 1) stays Gaussian: its mean and variance follow from the papers' equations, without the package.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion_testing import paper
from stepfusion_testing.walking import Gaussian

MEAN, STD = 0.3, 0.5
IMAGES, SHAPE = 1250, (1, 4, 4)
DRAWS = 20_000
V = 0.2  # what the network says of its variance

SCHEDULE = sf.NoiseSchedule.linear()
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm, fixed_small": (sf.ddpm, {"variance": "fixed_small"}),
    "ddpm, fixed_large": (sf.ddpm, {"variance": "fixed_large"}),
    "ddpm, learned_range": (sf.ddpm, {"variance": "learned_range"}),
    "ddim, eta 0": (sf.ddim, {"eta": 0.0}),
    "ddim, eta 0.5": (sf.ddim, {"eta": 0.5}),
    "ddim, eta 1": (sf.ddim, {"eta": 1.0}),
    "ddim, eta 0.5, raw eps": (sf.ddim, {"eta": 0.5, "rederive_eps": False}),
}


def theory(name: str, timesteps: Any) -> tuple[float, float]:
    """Mean and variance of a pixel at the end of a sampler."""
    make, options = SAMPLERS[name]
    step = partial(paper.ddpm_step, v=V, **options) if make is sf.ddpm else partial(paper.ddim_step, **options)
    mean, variance = 0.0, 1.0
    for abar, prev in paper.levels(SCHEDULE.alphas_cumprod, timesteps):

        def move(x: float, z: float, abar: float = abar, prev: float = prev) -> float:
            expected_x0 = (MEAN * (1 - abar) + STD**2 * abar**0.5 * x) / (abar * STD**2 + 1 - abar)  # Bayes' rule
            return step(x, paper.out_of(expected_x0, x, abar, "epsilon"), z, abar, prev)

        offset = move(0, 0)
        slope, sigma = move(1, 0) - offset, move(0, 1) - offset
        mean, variance = offset + slope * mean, slope**2 * variance + sigma**2
    return mean, variance


def sampled(table: sf.StepTable, seed: int = 0) -> torch.Tensor:
    """DRAWS pixels of an engine that runs the ideal network, float64."""
    ideal = Gaussian(torch.from_numpy(SCHEDULE.alphas_cumprod.copy()), table.prediction, MEAN, STD)

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        out = ideal(x, timesteps)
        return torch.cat([out, torch.full_like(out, V)], dim=1) if table.learned_variance else out

    engine = sf.Engine(
        network,
        SCHEDULE,
        prediction=table.prediction,
        shape=SHAPE,
        device="cpu",
        dtype=torch.float32,
        backend="reference",
        batch=2048,
    )
    pixels = engine.sample(IMAGES, table, seed=seed, progress=False).double().flatten()
    assert len(pixels) == DRAWS
    return pixels


def errors(pixels: torch.Tensor, mean: float, variance: float) -> tuple[float, float]:
    """How far the sample's mean and variance are from theory, in standard errors."""
    return (
        float(pixels.mean() - mean) / (variance / DRAWS) ** 0.5,
        float(pixels.var() - variance) / (variance * (2 / DRAWS) ** 0.5),
    )


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("trailing", 7), ("linspace", 10), ("trailing", 1)])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_theory(name: str, prediction: str, spacing: str, steps: int) -> None:
    make, options = SAMPLERS[name]
    table = make(SCHEDULE, steps, spacing=spacing, prediction=prediction, clip=None, **options)
    of_mean, of_variance = errors(sampled(table), *theory(name, table.timesteps))
    assert abs(of_mean) < 5
    assert abs(of_variance) < 5


@pytest.mark.parametrize("name", ["ddpm, fixed_small", "ddpm, fixed_large", "ddim, eta 0", "ddim, eta 1"])
def test_many_steps_reach_the_data(name: str) -> None:
    make, options = SAMPLERS[name]
    distance = []
    for steps in (5, 200):
        pixels = sampled(make(SCHEDULE, steps, spacing="trailing", clip=None, **options))
        distance.append(abs(float(pixels.mean()) - MEAN) + abs(float(pixels.std()) - STD))
    assert distance[1] < 0.02
    assert distance[0] > 3 * distance[1]
    mean, variance = theory(name, range(999, -1, -1))
    assert mean == pytest.approx(MEAN, abs=0.005)
    assert variance**0.5 == pytest.approx(STD, abs=0.005)


WRONG = {
    "beta for beta-tilde": ("ddpm, fixed_small", sf.ddpm(SCHEDULE, 7, clip=None, variance="fixed_large")),
    "beta-tilde for beta": ("ddpm, fixed_large", sf.ddpm(SCHEDULE, 7, clip=None)),
    "eta 0.8 for 1": ("ddim, eta 1", sf.ddim(SCHEDULE, 7, clip=None, eta=0.8)),
    "a clip": ("ddim, eta 0", sf.ddim(SCHEDULE, 7, clip=0.8)),
    "levels that are not the list's": (
        "ddim, eta 0",
        sf.ddim(SCHEDULE, 7, spacing="linspace", clip=None, compat="diffusers"),
    ),
    "noise at the end": (
        "ddpm, fixed_large",
        sf.ddpm(SCHEDULE, 7, spacing="trailing", clip=None, variance="fixed_large", compat="diffusers"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_table_is_detected(wrong: str) -> None:
    """Negative controls: each of these must fail the comparison above."""
    name, table = WRONG[wrong]
    assert max(map(abs, errors(sampled(table), *theory(name, table.timesteps)))) > 5
