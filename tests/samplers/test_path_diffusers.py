"""Whole loops against diffusers' schedulers on every kind of path: the same analytic denoiser, noise injected.

The table is walked by its columns in float32, by no kernel; theirs run in float32 as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion_testing.analytic import mixture, walk_columns

pytest.importorskip("diffusers")

import diffusers

Network = Callable[[torch.Tensor, int], torch.Tensor]
TOLERANCE = 1e-4  # max abs, float32 on both sides, of images of order 1
LINEAR = sf.NoiseSchedule.linear()
STEPS = 20
pytestmark = pytest.mark.filterwarnings(  # of diffusers' schedulers, with NumPy 2
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__ must accept:DeprecationWarning"
)


def denoised(x: torch.Tensor, signal: float, noise: float) -> torch.Tensor:
    return torch.from_numpy(mixture(x.double().numpy(), signal, noise)).float()


def start(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(seed))


def noise_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, 3, 5, 7, generator=torch.Generator().manual_seed(1))


def ours(table: sf.StepTable, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    given = None if noise is None else noise.numpy()
    return torch.from_numpy(walk_columns(table, mixture, x.numpy(), given, np.float32))


def eps_at(x: torch.Tensor, t: int) -> torch.Tensor:
    """The network of epsilon on the linear schedule."""
    signal, noise = float(LINEAR.sqrt_alphas_cumprod[t]), float(LINEAR.sqrt_one_minus_alphas_cumprod[t])
    return (x - signal * denoised(x, signal, noise)) / noise


def x0_at(x: torch.Tensor, t: int) -> torch.Tensor:
    """The network of x0, which a first level of almost no signal does not divide by that."""
    return denoised(x, float(LINEAR.sqrt_alphas_cumprod[t]), float(LINEAR.sqrt_one_minus_alphas_cumprod[t]))


def their_loop(
    scheduler: Any,
    x: torch.Tensor,
    step: Callable[[int, torch.Tensor], dict[str, Any]] = lambda i, x: {},
    network: Network = eps_at,
) -> torch.Tensor:
    """A loop of a scheduler whose states are variance preserving."""
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, int(t)), t, x, **step(i, x)).prev_sample
    return x


# On training timesteps

#: These end at the level of timestep 0: diffusers' bh1 and its UniPC of eps give NaN where a step ends without noise.
ENDING = {"final_sigmas_type": "sigma_min"}
MULTISTEP: dict[str, tuple[str, dict[str, Any], Callable[..., sf.StepTable], dict[str, Any]]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, sf.dpmpp_2m, {}),
    "dpmpp_2m heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, sf.dpmpp_2m, {"solver_type": "heun"}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, sf.dpmpp_3m, {"compat": "diffusers"}),
    "dpmpp_1s": ("DPMSolverMultistepScheduler", {"solver_order": 1}, sf.dpmpp_1s, {}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}, sf.dpmpp_2s, {}),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun"}, sf.dpmpp_3s, {}),
    "unipc": ("UniPCMultistepScheduler", {}, sf.unipc, {}),
    "unipc bh1": ("UniPCMultistepScheduler", {"solver_type": "bh1", **ENDING}, sf.unipc, {"variant": "bh1"}),
    "unipc 3": ("UniPCMultistepScheduler", {"solver_order": 3}, sf.unipc, {"order": 3}),
    "unipc 1": ("UniPCMultistepScheduler", {"solver_order": 1}, sf.unipc, {"order": 1}),
    "unipc eps": ("UniPCMultistepScheduler", {"predict_x0": False, **ENDING}, sf.unipc, {"predict_x0": False}),
    "deis 2": ("DEISMultistepScheduler", {"solver_order": 2}, sf.deis, {"order": 2}),
    "deis 3": ("DEISMultistepScheduler", {"solver_order": 3}, sf.deis, {"order": 3}),
}


@pytest.mark.parametrize("steps", [7, 8, 20])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_loops_equal_diffusers(name: str, steps: int) -> None:
    kind, config, make, options = MULTISTEP[name]
    theirs = getattr(diffusers, kind)(**config)
    theirs.set_timesteps(steps)
    at_the_first_level = kind.startswith("DEIS") or config.keys() >= ENDING.keys()  # of DEIS there is no other form
    ends = {"final_alpha_cumprod": float(LINEAR.alphas_cumprod[0])} if at_the_first_level else {}
    table = make(LINEAR, timesteps=theirs.timesteps.tolist(), **options, **ends)
    assert len(table) == len(theirs.timesteps)
    x = start()
    torch.testing.assert_close(ours(table, x), their_loop(theirs, x), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_the_sde_of_dpm_solver_equals_diffusers(solver_type: str) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_type=solver_type)
    theirs.set_timesteps(STEPS)
    table = sf.dpmpp_2m_sde(LINEAR, timesteps=theirs.timesteps.tolist(), solver_type=solver_type)
    x, noise = start(), noise_of(STEPS)
    want = their_loop(theirs, x, lambda i, x: {"variance_noise": noise[i]})
    torch.testing.assert_close(ours(table, x, noise), want, rtol=0, atol=TOLERANCE)
    assert (ours(table, x) - want).abs().max() > 0.05


def test_plms_equals_diffusers() -> None:
    theirs = diffusers.PNDMScheduler(skip_prk_steps=True)
    theirs.set_timesteps(STEPS)
    table = sf.plms(
        LINEAR, STEPS, spacing="leading", final_alpha_cumprod=float(LINEAR.alphas_cumprod[0])
    )  # set_alpha_to_one is False
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    x = start()
    torch.testing.assert_close(ours(table, x), their_loop(theirs, x), rtol=0, atol=TOLERANCE)


def test_ipndm_equals_diffusers() -> None:
    """Its path is variance preserving, with noise sin^2: a schedule of as many timesteps has the same levels.

    Its first level has no signal, where it divides 0 by 1e-8; here the path starts just above.
    """
    theirs = diffusers.IPNDMScheduler()
    theirs.set_timesteps(STEPS)
    theirs.betas[0] = 0.9999
    theirs.alphas[0] = (1 - 0.9999**2) ** 0.5
    abar = 1 - theirs.betas[:-1].double().numpy()[::-1] ** 2
    schedule = sf.NoiseSchedule.from_betas(1 - np.append(abar[0], abar[1:] / abar[:-1]))
    table = sf.ipndm(schedule, prediction="v_prediction")
    x = want = start()
    for i, t in enumerate(theirs.timesteps):
        signal, noise = float(theirs.alphas[i]), float(theirs.betas[i])
        x0 = denoised(want, signal, noise)
        want = theirs.step((signal * want - x0) / noise, t, want).prev_sample
    torch.testing.assert_close(ours(table, x), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_heun_equals_diffusers(spacing: str) -> None:
    config: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    theirs = diffusers.HeunDiscreteScheduler(timestep_spacing=spacing, **config)
    theirs.set_timesteps(STEPS)
    visited = np.unique(theirs.timesteps.numpy().astype(np.int64))[::-1]
    table = sf.heun(LINEAR, timesteps=visited.tolist())
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    x = start()
    y = x / float(LINEAR.sqrt_alphas_cumprod[visited[0]])
    for t in theirs.timesteps:
        y = theirs.step(eps_at(theirs.scale_model_input(y, t), int(t)), t, y).prev_sample
    torch.testing.assert_close(ours(table, x), y, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_lcm_equals_diffusers(clip: float | None, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    theirs = diffusers.LCMScheduler(
        clip_sample=clip is not None, clip_sample_range=clip, prediction_type="sample", **config
    )
    theirs.set_timesteps(steps)
    table = sf.lcm(LINEAR, steps, clip=clip, prediction="sample")
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    x, noise = start(), noise_of(steps)
    want = _with_noise(theirs, "lcm", x, noise, monkeypatch, x0_at)
    torch.testing.assert_close(ours(table, x, noise), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 6])
def test_tcd_equals_diffusers(eta: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    theirs = diffusers.TCDScheduler(**config)
    theirs.set_timesteps(steps)
    table = sf.tcd(LINEAR, steps, eta=eta)
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    assert table.stochastic == (eta > 0 and steps > 1)
    x, noise = start(), noise_of(steps)
    want = _with_noise(theirs, "tcd", x, noise, monkeypatch, eps_at, eta=eta)
    torch.testing.assert_close(ours(table, x, noise), want, rtol=0, atol=TOLERANCE)


def _with_noise(
    theirs: Any,
    module: str,
    x: torch.Tensor,
    noise: torch.Tensor,
    patch: pytest.MonkeyPatch,
    network: Network,
    **step: Any,
) -> torch.Tensor:
    def prepare(i: int, x: torch.Tensor) -> dict[str, Any]:
        patch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *_, **__: noise[i])
        return step

    return their_loop(theirs, x, prepare, network)


# On EDM's path

PATH = sf.SigmaPath()


def edm_loop(scheduler: Any, x: torch.Tensor, step: Callable[[int], dict[str, Any]] = lambda i: {}) -> torch.Tensor:
    """The raw output of a preconditioned network, from the state that it would be shown."""
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        more = step(i)
        x0 = denoised(x, 1.0, sigma)
        skip = 0.25 / (sigma**2 + 0.25)
        out = (x0 - skip * x) / (sigma * 0.5 / (sigma**2 + 0.25) ** 0.5)
        scheduler.scale_model_input(x, t)
        x = scheduler.step(out, t, x, **more).prev_sample
    return x


def test_what_a_network_is_shown_and_told_equals_diffusers() -> None:
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(STEPS)
    table = sf.euler(PATH, STEPS)
    np.testing.assert_allclose(table.pairs()[1], theirs.sigmas[:-1].numpy(), rtol=2e-6)
    np.testing.assert_allclose(table.told, theirs.timesteps.numpy(), rtol=0, atol=2e-6)
    x = start(scale=80.0)
    shown = theirs.scale_model_input(x, theirs.timesteps[0])
    torch.testing.assert_close(x * table.in_scale(0), shown, rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_euler_equals_edm_euler(schedule: str) -> None:
    theirs = diffusers.EDMEulerScheduler(sigma_schedule=schedule)
    theirs.set_timesteps(STEPS)
    x = start(scale=80.0)
    table = sf.euler(PATH, STEPS, spacing=schedule)
    torch.testing.assert_close(ours(table, x), edm_loop(theirs, x), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [8, 20])
def test_dpm_solver_equals_edm_dpm_solver(order: int, steps: int) -> None:
    theirs = diffusers.EDMDPMSolverMultistepScheduler(solver_order=order)
    theirs.set_timesteps(steps)
    make: Any = {1: sf.dpmpp_1s, 2: sf.dpmpp_2m, 3: sf.dpmpp_3m}[order]
    table = make(PATH, steps, **({"compat": "diffusers"} if order == 3 else {}))
    x = start(scale=80.0)
    torch.testing.assert_close(ours(table, x), edm_loop(theirs, x), rtol=0, atol=TOLERANCE)


def test_the_sde_equals_edm_dpm_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = diffusers.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    theirs.set_timesteps(STEPS)
    x, noise = start(scale=80.0), noise_of(STEPS)

    def prepare(i: int) -> dict[str, Any]:
        name = "diffusers.schedulers.scheduling_edm_dpmsolver_multistep.randn_tensor"
        monkeypatch.setattr(name, lambda *_, **__: noise[i])
        return {}

    want = edm_loop(theirs, x, prepare)
    table = sf.dpmpp_2m_sde(PATH, STEPS)
    torch.testing.assert_close(ours(table, x, noise), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_consistency_equals_diffusers(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    theirs.set_timesteps(steps)
    path = sf.SigmaPath(0.002, 80.0, 0.5, told_scale=250.0)
    table = sf.consistency(path, steps, prediction="consistency")
    np.testing.assert_allclose(table.pairs()[1], theirs.sigmas[:-1].numpy(), rtol=2e-6)
    np.testing.assert_allclose(table.told, theirs.timesteps.numpy(), rtol=1e-6)
    x, noise = start(scale=80.0), noise_of(steps)
    want = x
    for i, t in enumerate(theirs.timesteps):
        name = "diffusers.schedulers.scheduling_consistency_models.randn_tensor"
        monkeypatch.setattr(name, lambda *_, i=i, **__: noise[i])
        sigma = float(theirs.sigmas[i])
        shown = theirs.scale_model_input(want, t)
        torch.testing.assert_close(want * table.in_scale(i), shown, rtol=1e-5, atol=1e-6)
        skip, out = theirs.get_scalings_for_boundary_condition(theirs.sigmas[i])
        network = (denoised(want, 1.0, sigma) - skip * want) / out
        want = theirs.step(network, t, want).prev_sample
    torch.testing.assert_close(ours(table, x, noise), want, rtol=0, atol=TOLERANCE)


# On a flow


def flow_loop(scheduler: Any, x: torch.Tensor, levels: Any) -> torch.Tensor:
    for i, t in enumerate(scheduler.timesteps):
        level = float(levels[i])
        velocity = (x - denoised(x, 1 - level, level)) / level
        x = scheduler.step(velocity, t, x).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_flow_matching_euler(shift: float) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    path = sf.FlowPath(shift, told_scale=1000.0)
    x = start()
    for spacing, sigmas in (("uniform", np.linspace(1.0, 1 / STEPS, STEPS)), ("linear", None)):
        theirs.set_timesteps(STEPS, **({} if sigmas is None else {"sigmas": sigmas}))
        table = sf.euler(path, STEPS, spacing=spacing)
        np.testing.assert_allclose(table.pairs()[1], theirs.sigmas[:-1].numpy(), rtol=2e-6)
        np.testing.assert_allclose(table.told, theirs.timesteps.numpy(), rtol=2e-6)
        torch.testing.assert_close(ours(table, x), flow_loop(theirs, x, theirs.sigmas), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_spacings_of_flows_equal_diffusers(spacing: str) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **{f"use_{spacing}_sigmas": True})
    theirs.set_timesteps(STEPS)
    table = sf.euler(sf.FlowPath(3.0), STEPS, spacing=spacing)
    np.testing.assert_allclose(table.pairs()[1], theirs.sigmas[:-1].numpy(), rtol=2e-6)


def test_consistency_equals_stochastic_flow_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    theirs.set_timesteps(STEPS, sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    x, noise = start(), noise_of(STEPS)
    drawn, name = iter(noise), "diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor"
    monkeypatch.setattr(name, lambda *_, **__: next(drawn), raising=False)
    monkeypatch.setattr(torch, "randn_like", lambda *_: next(drawn))  # what older releases call
    want = flow_loop(theirs, x, theirs.sigmas)
    table = sf.consistency(sf.FlowPath(3.0), STEPS)
    torch.testing.assert_close(ours(table, x, noise), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_equals_flow_matching_heun(shift: float) -> None:
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    theirs.set_timesteps(STEPS)
    table = sf.heun(sf.FlowPath(shift), STEPS, spacing="linear")
    levels = theirs.timesteps / 1000
    np.testing.assert_allclose(table.pairs()[1], levels.numpy(), rtol=2e-6)
    x = start()
    torch.testing.assert_close(ours(table, x), flow_loop(theirs, x, levels), rtol=0, atol=TOLERANCE)
