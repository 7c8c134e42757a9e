"""The literature's functions in float64 NumPy, and how far ours are from them: the last column of docs/literature.md.

Each entry of :data:`DIFFERENCES` runs ours in float32 on states of order 1 and returns the largest absolute
difference. ``python tests/stepfusion_testing/literature.py`` prints them all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

import stepfusion as sf
from stepfusion_testing.guided_diffusion_formulas import GuidedDiffusion, sections
from stepfusion_testing.networks import smooth
from stepfusion_testing.walking import Gaussian, walk

Floats = NDArray[np.float64]

_SHAPE = (4, 3, 8, 8)
_T = torch.tensor([0, 50, 200, 499])
_RANDOM = np.random.default_rng(0)
_X0, _Z, _OUT = (_RANDOM.uniform(-1, 1, _SHAPE), _RANDOM.normal(size=_SHAPE), _RANDOM.normal(size=_SHAPE))
_BETAS = np.linspace(2 * 1e-4, 2 * 0.02, 500)  # the first text's end points at T = 500
_ABAR = np.exp(np.cumsum(np.log1p(-_BETAS)))
_PREV = np.append(1.0, _ABAR[:-1])
_COURSE_B = (0.02 - 1e-4) * np.linspace(0, 1, 501) + 1e-4
_COURSE_AB = np.exp(np.cumsum(np.log(1 - _COURSE_B)))
_COURSE_AB[0] = 1


def _tensor(values: Floats) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _at(values: Floats) -> Floats:
    return values[_T.numpy()][:, None, None, None]


def _gap(ours: torch.Tensor | Floats, theirs: Floats) -> float:
    return float(np.abs(np.asarray(ours, dtype=np.float64) - theirs).max())


def _rounded(values: Floats) -> Floats:
    """What both sides are given: float32 values."""
    return values.astype(np.float32).astype(np.float64)


X0, Z, OUT = _rounded(_X0), _rounded(_Z), _rounded(_OUT)
X_T = _rounded(np.sqrt(_at(_ABAR)) * X0 + np.sqrt(1 - _at(_ABAR)) * Z)


def _diffusion(**options: object) -> sf.GaussianDiffusion:
    return sf.GaussianDiffusion(sf.NoiseSchedule.linear(500), backend="reference", **options)


def _model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return _tensor(OUT)


def schedules() -> float:
    f = np.cos((np.arange(501) / 500 + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return max(_gap(sf.NoiseSchedule.linear(500).betas, _BETAS), _gap(sf.NoiseSchedule.cosine(500).betas, cosine))


def tables() -> float:
    s = sf.NoiseSchedule.linear(500)
    pairs = {
        "alphas_cumprod": _ABAR,
        "alphas_cumprod_prev": _PREV,
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - _ABAR),
        "posterior_variance": _BETAS * (1 - _PREV) / (1 - _ABAR),
        "posterior_mean_coef1": _BETAS * np.sqrt(_PREV) / (1 - _ABAR),
        "posterior_mean_coef2": (1 - _PREV) * np.sqrt(1 - _BETAS) / (1 - _ABAR),
    }
    return max(_gap(getattr(s, name), values) for name, values in pairs.items())


def q_sample() -> float:
    expected = np.sqrt(_at(_ABAR)) * X0 + np.sqrt(1 - _at(_ABAR)) * Z
    return _gap(_diffusion().q_sample(_tensor(X0), _T, _tensor(Z)), expected)


def q_mean_variance() -> float:
    mean, variance, _ = _diffusion().q_mean_variance(_tensor(X0), _T)
    gaps = _gap(mean, np.sqrt(_at(_ABAR)) * X0), _gap(variance.expand(_SHAPE), (1 - _at(_ABAR)) * np.ones(_SHAPE))
    return max(gaps)


def _posterior(x0: Floats, x: Floats) -> Floats:
    one = _at(_BETAS * np.sqrt(_PREV) / (1 - _ABAR)) * x0
    return one + _at((1 - _PREV) * np.sqrt(1 - _BETAS) / (1 - _ABAR)) * x


def q_posterior() -> float:
    return _gap(_diffusion().q_posterior_mean_variance(_tensor(X0), _tensor(X_T), _T)[0], _posterior(X0, X_T))


def p_sample() -> float:
    x0 = np.clip((X_T - np.sqrt(1 - _at(_ABAR)) * OUT) / np.sqrt(_at(_ABAR)), -1, 1)
    sigma = np.sqrt(_at(_BETAS * (1 - _PREV) / (1 - _ABAR)))
    expected = _posterior(x0, X_T) + (_T.numpy() > 0)[:, None, None, None] * sigma * Z
    return _gap(_diffusion().p_sample(_model, _tensor(X_T), _T, noise=_tensor(Z))["sample"], expected)


def losses() -> float:
    ours = _diffusion().training_losses(_model, _tensor(X0), _T, noise=_tensor(Z))
    return _gap(ours, ((Z - OUT) ** 2).mean(axis=(1, 2, 3)))


def _loop(step: Callable[[Floats, Floats, int], Floats], x: Floats, times: list[int]) -> Floats:
    """A loop over ``times`` whose network is the smooth one, seen through float64."""
    for i, t in enumerate(times):
        x = step(x, smooth(torch.from_numpy(x), torch.full((len(x),), t)).numpy(), i)
    return x


def _walked(table: sf.StepTable, x: Floats, noise: Floats | None = None) -> torch.Tensor:
    network = lambda x, t: smooth(x, torch.full((len(x),), t))  # noqa: E731
    return walk(table, network, _tensor(x), None if noise is None else _tensor(noise))


def ddim_loop() -> float:
    """10 steps of 500, each eta, without a clip: the text never clips."""
    times = list(range(450, -1, -50))
    noise, gaps = _rounded(_RANDOM.normal(size=(10, *_SHAPE))), []
    for eta in (0.0, 0.4, 0.8):

        def step(x: Floats, eps: Floats, i: int, eta: float = eta) -> Floats:
            ab, prev = _ABAR[times[i]], _ABAR[times[i + 1]] if i < 9 else 1.0
            sigma = eta * np.sqrt((1 - prev) / (1 - ab) * (1 - ab / prev))
            x0 = (x - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
            return np.sqrt(prev) * x0 + np.sqrt(1 - prev - sigma**2) * eps + sigma * noise[i]

        table = sf.ddim(sf.NoiseSchedule.linear(500), 10, eta=eta, clip=None)
        gaps.append(_gap(_walked(table, Z, noise), _loop(step, Z, times)))
    return max(gaps)


def eta_1_is_ddpm() -> float:
    """The images of one engine, both ways, unclipped, from one seed: an ideal network, all 1000 steps."""
    schedule = sf.NoiseSchedule.linear(1000)
    ideal = Gaussian(torch.from_numpy(schedule.alphas_cumprod.copy()), "epsilon", 0.2, 0.5)
    engine = sf.Engine(ideal, schedule, shape=(1, 8, 8), device="cpu", backend="reference", options={"clip": None})
    one = engine.sample(4, engine.table("ddim", 1000, eta=1.0))
    return _gap(one, engine.sample(4, engine.table("ddpm")).double().numpy())


def inversion() -> float:
    times = list(range(0, 500, 50))

    def step(x: Floats, eps: Floats, i: int) -> Floats:
        ab, after = _ABAR[times[i - 1]] if i else 1.0, _ABAR[times[i]]
        if i == 0:  # the first row starts at the image, and the network is told the first level
            return np.sqrt(after) * x + np.sqrt(1 - after) * eps
        return np.sqrt(after / ab) * (x - np.sqrt(1 - ab) * eps) + np.sqrt(1 - after) * eps

    table = sf.ddim_inversion(sf.NoiseSchedule.linear(500), 10)
    return _gap(_walked(table, X0), _loop(step, X0, [0, *times[:-1]]))


def slerp() -> float:
    theta = np.arccos((Z * X0).sum() / np.sqrt((Z * Z).sum() * (X0 * X0).sum()))
    expected = [(np.sin((1 - w) * theta) * Z + np.sin(w * theta) * X0) / np.sin(theta) for w in np.linspace(0, 1, 7)]
    return _gap(sf.slerp(_tensor(Z), _tensor(X0), 7), np.stack(expected))


def course_levels() -> float:
    return _gap(sf.NoiseSchedule.from_betas(_COURSE_B).alphas_cumprod[1:], _COURSE_AB[1:])


def course_ddpm() -> float:
    """The course's 500 steps, t = 500 .. 1, after the last of which it stands at the level of t = 0, and we at x0."""
    schedule, times = sf.NoiseSchedule.from_betas(_COURSE_B), list(range(500, 0, -1))
    noise = _rounded(_RANDOM.normal(size=(499, 1, 3, 8, 8)))
    start = Z[:1]

    def step(x: Floats, eps: Floats, i: int) -> Floats:
        b, ab = _COURSE_B[times[i]], _COURSE_AB[times[i]]
        return (x - eps * b / np.sqrt(1 - ab)) / np.sqrt(1 - b) + np.sqrt(b) * noise[i]

    table = sf.ddpm(schedule, timesteps=times, clip=None, variance="fixed_large")
    states: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: int) -> torch.Tensor:
        states.append(x)
        return smooth(x, torch.full((len(x),), t))

    walk(table, network, _tensor(start), _tensor(np.concatenate((noise, noise[:1]))))
    return _gap(states[-1], _loop(step, start, times[:-1]))


def course_ddim() -> float:
    times = list(range(500, 0, -25))

    def step(x: Floats, eps: Floats, i: int) -> Floats:
        ab, prev = _COURSE_AB[times[i]], _COURSE_AB[times[i] - 25]
        return np.sqrt(prev / ab) * (x - np.sqrt(1 - ab) * eps) + np.sqrt(1 - prev) * eps

    table = sf.ddim(sf.NoiseSchedule.from_betas(_COURSE_B), timesteps=times, clip=None)
    return _gap(_walked(table, Z), _loop(step, Z, times))


def guided_loops() -> float:
    """DDPM with both fixed variances and DDIM with three etas, clipped, over guided-diffusion's own timesteps."""
    schedule, gaps = sf.NoiseSchedule.linear(), []
    visits = sections(1000, 50)
    noise = _rounded(_RANDOM.normal(size=(50, *_SHAPE)))
    for options in (
        {"variance": "fixed_small"},
        {"variance": "fixed_large"},
        {"eta": 0.0},
        {"eta": 0.5},
        {"eta": 1.0},
    ):
        variance = options.get("variance", "fixed_small")
        process = GuidedDiffusion(schedule.alphas_cumprod, visits, "epsilon", variance, True)
        make = sf.ddpm if "variance" in options else sf.ddim
        table = make(schedule, timesteps=visits[::-1], compat="guided-diffusion", **options)

        def step(
            x: Floats, out: Floats, i: int, process: GuidedDiffusion = process, eta: object = options.get("eta")
        ) -> Floats:
            place = len(visits) - 1 - i
            if eta is None:
                return process.p_sample(x, out, place, noise[i])
            return process.ddim_sample(x, out, place, noise[i], eta)

        gaps.append(_gap(_walked(table, Z, noise), _loop(step, Z, visits[::-1])))
    return max(gaps)


DIFFERENCES: dict[str, Callable[[], float]] = {
    function.__name__: function
    for function in (
        schedules,
        tables,
        q_sample,
        q_mean_variance,
        q_posterior,
        p_sample,
        losses,
        ddim_loop,
        eta_1_is_ddpm,
        inversion,
        slerp,
        course_levels,
        course_ddpm,
        course_ddim,
        guided_loops,
    )
}

if __name__ == "__main__":
    for name, difference in DIFFERENCES.items():
        print(f"{name:<16} {difference():.1e}", flush=True)
