"""Whole loops against diffusers' schedulers and guided-diffusion's formulas, noise injected; and where we differ.

``compat`` gives back a library's images within float32 rounding. Without it each of its quirks is gone, and every
test of a trap shows the difference: it would fail if the default adopted the quirk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from stepfusion.kernels import coefficients, reference
from stepfusion.networks import UNet2D, UNet2DConfig
from stepfusion.samplers import ddim, ddim_inversion, ddpm
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion_testing.guided_diffusion_formulas import GuidedDiffusion, sections
from stepfusion_testing.walking import Network, stand_in, walk

pytest.importorskip("diffusers")

from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler

TOLERANCE = 1e-4  # max abs, float32, states of order 1, after up to 100 steps
SHAPE = (2, 3, 8, 8)
LINEAR = NoiseSchedule.linear()
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
SAMPLERS = ("eta 0", "eta 0.5", "eta 1", "fixed_small", "fixed_large", "learned_range")


def in_their_loop(
    scheduler: Any, network: Network, x: torch.Tensor, noise: torch.Tensor, patch: pytest.MonkeyPatch, **step: Any
) -> torch.Tensor:
    """diffusers' loop over ``scheduler.timesteps`` with our noise."""
    for i, t in enumerate(scheduler.timesteps):
        if isinstance(scheduler, DDPMScheduler):
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, i=i, **__: noise[i])
        else:
            step["variance_noise"] = noise[i] if step.get("eta") else None
        x = scheduler.step(network(x, int(t)), t, x, **step).prev_sample
    return x


def pair(sampler: str, **config: Any) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """Their scheduler and its step options, our sampler and its options."""
    if sampler.startswith("eta"):
        eta = {"eta": float(sampler.split()[1])}
        return DDIMScheduler(**config), eta, ddim, eta
    return DDPMScheduler(variance_type=sampler, **config), {}, ddpm, {"variance": sampler}


def inputs(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(SHAPE), torch.randn(steps, *SHAPE)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loops_equal_diffusers(
    sampler: str, spacing: str, prediction: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, step, make, options = pair(
        sampler, prediction_type=prediction, clip_sample=clip is not None, timestep_spacing=spacing
    )
    network = stand_in(LINEAR, prediction, learned=sampler == "learned_range")
    for steps in (7, 50):
        table = make(LINEAR, steps, spacing=spacing, prediction=prediction, clip=clip, compat="diffusers", **options)
        theirs.set_timesteps(steps)
        assert theirs.timesteps.tolist() == table.timesteps.tolist()
        x, noise = inputs(steps)
        expected = in_their_loop(theirs, network, x, noise, monkeypatch, **step)
        assert expected.abs().max() < 20
        torch.testing.assert_close(walk(table, network, x, noise), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("sampler", "steps"), [("fixed_small", 1000), ("learned_range", 250), ("eta 0", 250)])
def test_long_loops_equal_diffusers(sampler: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, step, make, options = pair(sampler)
    theirs.set_timesteps(steps)
    network = stand_in(LINEAR, "epsilon", learned=sampler == "learned_range")
    x, noise = inputs(steps)
    expected = in_their_loop(theirs, network, x, noise, monkeypatch, **step)
    actual = walk(make(LINEAR, steps, compat="diffusers", **options), network, x, noise)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, {}),
    "scaled_linear, offset": ({"beta_schedule": "scaled_linear", "steps_offset": 1}, {"steps_offset": 1}),
    "400 timesteps": ({"num_train_timesteps": 400}, {}),
    "clip 2": ({"clip_sample_range": 2.0}, {"clip": 2.0}),
    "zero SNR": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"spacing": "trailing", "prediction": "v_prediction"},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampler", ["eta 0", "eta 0.5", "fixed_small", "fixed_large"])
def test_configs_equal_diffusers(sampler: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ours = CONFIGS[name]
    theirs, step, make, options = pair(sampler, **config)
    schedule = NoiseSchedule.from_config(theirs.config)
    network = stand_in(schedule, theirs.config.prediction_type)
    table = make(schedule, 40, compat="diffusers", **options, **ours)
    theirs.set_timesteps(40)
    assert theirs.timesteps.tolist() == table.timesteps.tolist()
    x, noise = inputs(40)
    expected = in_their_loop(theirs, network, x, noise, monkeypatch, **step)
    torch.testing.assert_close(walk(table, network, x, noise), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_custom_timesteps_equal_diffusers(variance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visits = [999, 700, 401, 400, 90, 3]  # ends above 0: their last row adds noise
    scheduler = DDPMScheduler(variance_type=variance)
    scheduler.set_timesteps(timesteps=visits)
    network = stand_in(LINEAR, "epsilon", learned=variance == "learned_range")
    x, noise = inputs(len(visits))
    expected = in_their_loop(scheduler, network, x, noise, monkeypatch)
    actual = walk(ddpm(LINEAR, timesteps=visits, variance=variance, compat="diffusers"), network, x, noise)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_their_clipped_model_output_is_our_rederived_eps(
    prediction: str, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction)
    scheduler.set_timesteps(50)
    network = stand_in(LINEAR, prediction)
    x, noise = inputs(50)
    expected = in_their_loop(scheduler, network, x, noise, monkeypatch, eta=eta, use_clipped_model_output=True)
    table = ddim(LINEAR, 50, eta=eta, prediction=prediction, rederive_eps=True, compat="diffusers")
    torch.testing.assert_close(walk(table, network, x, noise), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_set_alpha_to_one_is_our_final_alpha_cumprod(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 7: and it matters, by the noise that abar[0] leaves."""
    scheduler = DDIMScheduler(set_alpha_to_one=False, beta_schedule="scaled_linear", steps_offset=1)
    scheduler.set_timesteps(20)
    schedule = NoiseSchedule.from_config(scheduler.config)
    network = stand_in(schedule, "epsilon")
    x, noise = inputs(20)
    expected = in_their_loop(scheduler, network, x, noise, monkeypatch, eta=eta)
    options: dict[str, Any] = {"eta": eta, "steps_offset": 1, "compat": "diffusers"}
    for final in (float(scheduler.final_alpha_cumprod), schedule.alphas_cumprod[0]):
        actual = walk(ddim(schedule, 20, final_alpha_cumprod=final, **options), network, x, noise)
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert (walk(ddim(schedule, 20, **options), network, x, noise) - expected).abs().max() > 10 * TOLERANCE
    assert ddim(schedule, 20, rederive_eps=False).column("next_x0")[-1] == 1


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("sampler", ["eta 0", "eta 1", "fixed_large", "learned_range"])
def test_loops_of_a_unet_equal_diffusers(sampler: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights; not as eps, of which they would make x0 = 160 x at first, and as much of every rounding."""
    learned = sampler == "learned_range"
    config: dict[str, Any] = {
        "sample_size": 8,
        "out_channels": 6 if learned else 3,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    unet = UNet2D(UNet2DConfig.from_dict(config)).eval()

    @torch.inference_mode()
    def network(x: torch.Tensor, t: int) -> torch.Tensor:
        return unet(x, torch.full((len(x),), t))

    theirs, step, make, options = pair(sampler, prediction_type=prediction)
    theirs.set_timesteps(20)
    x, noise = inputs(20)
    expected = in_their_loop(theirs, network, x, noise, monkeypatch, **step)
    actual = walk(make(LINEAR, 20, compat="diffusers", prediction=prediction, **options), network, x, noise)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def guided_loop(
    process: GuidedDiffusion, network: Network, x: torch.Tensor, noise: torch.Tensor, eta: float | None
) -> torch.Tensor:
    state = x.numpy()
    for z, i in zip(noise.numpy(), reversed(range(len(process.timesteps))), strict=True):
        out = network(torch.from_numpy(state), process.timesteps[i]).numpy()
        state = process.p_sample(state, out, i, z) if eta is None else process.ddim_sample(state, out, i, z, eta)
    assert state.dtype == np.float32
    return torch.from_numpy(state)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loops_equal_guided_diffusion(sampler: str, prediction: str, clip: bool) -> None:
    _, _, make, options = pair(sampler)
    learned = sampler == "learned_range"
    network = stand_in(LINEAR, prediction, learned=learned)
    for steps in (7, 27, 100):
        process = GuidedDiffusion(
            LINEAR.alphas_cumprod, sections(1000, steps), prediction, options.get("variance", "fixed_small"), clip
        )
        table = make(
            LINEAR,
            steps,
            spacing="linspace",
            prediction=prediction,
            clip=1.0 if clip else None,
            compat="guided-diffusion",
            **options,
        )
        assert table.timesteps.tolist() == process.timesteps[::-1]
        x, noise = inputs(steps)
        expected = guided_loop(process, network, x, noise, options.get("eta"))
        torch.testing.assert_close(walk(table, network, x, noise), expected, rtol=0, atol=TOLERANCE)


def test_inversion_from_a_level_equals_guided_diffusion() -> None:
    """Theirs takes the image for the first level, ours for abar = 1: from the second row on the two are one."""
    visits = sections(1000, 50)
    process = GuidedDiffusion(LINEAR.alphas_cumprod, visits, clip=False)
    table = ddim_inversion(LINEAR, timesteps=visits[::-1])
    network = stand_in(LINEAR, "epsilon")
    theirs = torch.rand(SHAPE) * 2 - 1
    device = table.on(torch.device("cpu"))
    ours = theirs
    for i in range(len(visits) - 1):
        assert table.timesteps[i + 1] == visits[i]
        rows = torch.full((len(ours),), i + 1)
        ours = reference.diffusion_step(ours, network(ours, visits[i]), rows, device.coefficients, device.timesteps)
        out = network(theirs, visits[i]).numpy()
        theirs = torch.from_numpy(process.ddim_reverse_sample(theirs.numpy(), out, i))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_trap_1_tables_are_float64() -> None:
    """diffusers re-derives beta from float32 products: its variance at the second timestep is off by 1e-4."""
    beta, prev = float(LINEAR.betas[1]), float(LINEAR.betas[0])  # 1 - abar_0 is beta_0
    exact = beta * prev / (1 - (1 - beta) * (1 - prev))
    assert ddpm(LINEAR).column("sigma")[-2] ** 2 == pytest.approx(exact, rel=1e-11)
    theirs = float(DDPMScheduler()._get_variance(1))
    assert ddpm(LINEAR, compat="diffusers").column("sigma")[-2] ** 2 == pytest.approx(theirs, rel=1e-6)
    assert abs(theirs / exact - 1) > 2e-5


def test_trap_2_linear_from_a_config_is_not_scaled() -> None:
    schedule = NoiseSchedule.from_config(DDPMScheduler(num_train_timesteps=400).config)
    assert schedule == NoiseSchedule.linear(400, scaled=False)
    assert schedule.betas[-1] == pytest.approx(0.02)
    assert NoiseSchedule.linear(400).betas[-1] == pytest.approx(0.05)


def test_trap_3_raw_eps_drifts_from_the_clipped_x0() -> None:
    network = stand_in(LINEAR, "epsilon")
    x, _ = inputs(50)
    default = walk(ddim(LINEAR, 50), network, x)

    def drift(**options: Any) -> float:
        return float((walk(ddim(LINEAR, 50, **options), network, x) - default).abs().max())

    assert drift(compat="diffusers") > 0.1
    assert drift(rederive_eps=False) > 0.1
    assert drift(compat="guided-diffusion") == 0
    assert drift(compat="diffusers", rederive_eps=True) < TOLERANCE


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 7), ("leading", 8)])
def test_trap_6_the_previous_timestep_is_the_next_of_the_list(spacing: str, steps: int) -> None:
    table = ddim(LINEAR, steps, spacing=spacing, rederive_eps=False)
    reached = table.column("next_x0") ** 2
    np.testing.assert_allclose(reached, [*LINEAR.alphas_cumprod[table.timesteps[1:]], 1.0], rtol=1e-14)
    theirs = ddim(LINEAR, steps, spacing=spacing, compat="diffusers").column("next_x0") ** 2
    wrong = np.abs(theirs / reached - 1) > 1e-4
    assert wrong.any() == (spacing != "leading")


def test_trap_8_a_variance_of_zero_stays_zero() -> None:
    """diffusers clamps it at 1e-20, which shows where a list ends above 0."""
    options: dict[str, Any] = {"steps_offset": 1}
    assert ddpm(LINEAR, 50, **options).column("sigma")[-1] == 0
    assert ddpm(LINEAR, 50, compat="diffusers", **options).column("sigma")[-1] == pytest.approx(1e-10, rel=1e-6)


@pytest.mark.parametrize("name", ["fixed_small_log", "fixed_large_log"])
def test_trap_8_variances_that_mean_different_things_are_not_offered(name: str) -> None:
    with pytest.raises(ValueError, match=f"^variance must be one of .*, got '{name}'$"):
        ddpm(LINEAR, 50, variance=name)


def test_trap_8_learned_is_a_log_variance_and_not_what_diffusers_takes() -> None:
    assert ddpm(LINEAR, 50, variance="learned").learned_variance
    with pytest.raises(ValueError, match=r"^variance 'learned' is not reproduced with compat='diffusers'"):
        ddpm(LINEAR, 50, variance="learned", compat="diffusers")


def test_trap_8_learned_range_interpolates_between_the_respaced_variances() -> None:
    table = ddpm(LINEAR, 20, variance="learned_range")
    small, large = ddpm(LINEAR, 20), ddpm(LINEAR, 20, variance="fixed_large")
    low, span = (table.column(name)[:-1] for name in ("half_log_min", "half_log_span"))
    np.testing.assert_allclose(np.exp(low), small.column("sigma")[:-1], rtol=1e-12)
    np.testing.assert_allclose(np.exp(low + span), large.column("sigma")[:-1], rtol=1e-12)
    assert large.column("sigma")[0] ** 2 > 10 * LINEAR.betas[table.timesteps[0]]  # not the beta of one timestep


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_trap_9_the_last_step_adds_no_noise(variance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks t > 0 instead: trailing ends above 0, and its images keep noise of this standard deviation."""
    scheduler = DDPMScheduler(variance_type=variance, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    learned = variance == "learned_range"

    def network(x: torch.Tensor, t: int) -> torch.Tensor:
        out = torch.zeros_like(x)
        return torch.cat([out, out + 1], dim=1) if learned else out

    options: dict[str, Any] = {"spacing": "trailing", "variance": variance}
    x, noise = inputs(50)

    def left(with_noise: torch.Tensor, without: torch.Tensor) -> float:
        return float((with_noise - without).std() / noise[-1].std())

    silent = noise.clone()
    silent[-1] = 0
    ours, theirs = ddpm(LINEAR, 50, **options), ddpm(LINEAR, 50, compat="diffusers", **options)
    assert left(walk(ours, network, x, noise), walk(ours, network, x, silent)) == 0
    for kept in (
        left(walk(theirs, network, x, noise), walk(theirs, network, x, silent)),
        left(*(in_their_loop(scheduler, network, x, z, monkeypatch) for z in (noise, silent))),
    ):
        assert kept == pytest.approx(0.076, abs=5e-4)


def test_trap_10_noise_does_not_depend_on_what_was_drawn_before() -> None:
    """Peers draw from a stream, so that another eta, or a batch, shifts every later number."""
    table = ddpm(LINEAR, 10).on(torch.device("cpu"))
    keys = {"seeds": torch.full((4,), 3), "indices": torch.tensor([0, 1, 2, 7])}
    x, out, rows = torch.randn(4, *SHAPE[1:]), torch.randn(4, *SHAPE[1:]), torch.full((4,), 5)
    together = reference.diffusion_step(x, out, rows, table.coefficients, table.timesteps, **keys)
    alone = reference.diffusion_step(
        x[3:], out[3:], rows[3:], table.coefficients, table.timesteps, **{k: v[3:] for k, v in keys.items()}
    )
    assert torch.equal(together[3:], alone)


def test_trap_11_the_state_stays_float32_and_timesteps_stay_integers() -> None:
    """Where diffusers keeps a half state: unclipped cosine at t = 999 overflows to inf in float16."""
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    scheduler.set_timesteps(1000)
    x = torch.randn(SHAPE).half()
    out = torch.randn(SHAPE).half()
    result = scheduler.step(out, 999, x)
    assert result.prev_sample.dtype == torch.float16
    assert result.pred_original_sample.isinf().any()

    table = ddim(NoiseSchedule.cosine(), 1000, clip=None)
    device = table.on(torch.device("cpu"))
    rows, x0 = torch.zeros(2, dtype=torch.int64), torch.empty(SHAPE)
    ours = reference.diffusion_step(x.float(), out, rows, device.coefficients, device.timesteps, x0=x0)
    assert ours.dtype == torch.float32
    assert x0.isfinite().all()
    assert x0.abs().max() > torch.finfo(torch.float16).max
    same = reference.diffusion_step(x.float(), out.float(), rows, device.coefficients, device.timesteps)
    assert torch.equal(ours, same)
    assert table.timesteps.dtype == np.int64
    assert device.timesteps.dtype == torch.int64
    assert torch.tensor(999).to(torch.bfloat16) == 1000  # what a timestep in bfloat16 would be


def test_trap_13_a_radicand_below_zero_is_clamped() -> None:
    """With zero terminal SNR and eta 1, sigma^2 is 1 - abar_prev, and rounding alone decides the radicand's sign.

    IEEE arithmetic rounds correctly, so the same levels have a negative radicand on every machine.
    """
    abar_prev = np.linspace(0.001, 0.999, 999)
    assert (1 - abar_prev - np.sqrt(1 - abar_prev) ** 2 < 0).any()
    columns = coefficients.ddim(
        np.zeros_like(abar_prev), abar_prev, eta=1.0, prediction="v_prediction", rederive_eps=False
    )
    assert all(np.isfinite(column).all() for column in columns.values())

    schedule = NoiseSchedule.linear().rescale_zero_terminal_snr()
    network = stand_in(schedule, "v_prediction")
    for steps in range(2, 40):
        x, noise = inputs(steps)
        for compat in (None, "diffusers"):
            table = ddim(schedule, steps, eta=1.0, spacing="trailing", prediction="v_prediction", compat=compat)
            assert walk(table, network, x, noise).isfinite().all()


def test_trap_14_inversion_asks_the_network_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks it at the target: the same with ``evaluate_at``, and a round trip that is no better."""
    network = stand_in(LINEAR, "epsilon")
    scheduler = DDIMInverseScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    image = torch.rand(SHAPE) * 2 - 1
    theirs = image
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, int(t)), t, theirs).prev_sample
    target = walk(ddim_inversion(LINEAR, 20, evaluate_at="target"), network, image)
    torch.testing.assert_close(target, theirs, rtol=0, atol=TOLERANCE)
    default = walk(ddim_inversion(LINEAR, 20), network, image)
    assert (default - theirs).abs().max() > 0.01


@pytest.mark.parametrize("evaluate_at", ["source", "target"])
def test_trap_14_inversion_of_an_x0_network_stays_finite(evaluate_at: str) -> None:
    scheduler = DDIMInverseScheduler(clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(20)
    network = stand_in(LINEAR, "sample")
    image = torch.rand(SHAPE) * 2 - 1
    assert not scheduler.step(network(image, 0), scheduler.timesteps[0], image).prev_sample.isfinite().all()
    table = ddim_inversion(LINEAR, 20, prediction="sample", evaluate_at=evaluate_at)
    assert walk(table, network, image).abs().max() < 20


def test_trap_15_eta_1_is_ddpm_with_the_clip_too() -> None:
    network = stand_in(LINEAR, "epsilon")
    x, noise = inputs(50)

    def gap(**options: Any) -> float:
        stochastic = ddim(LINEAR, 50, eta=1.0, **options)
        difference = walk(stochastic, network, x, noise) - walk(ddpm(LINEAR, 50, **options), network, x, noise)
        return float(difference.abs().max())

    assert gap() < TOLERANCE
    assert gap(clip=None) < TOLERANCE
    assert gap(clip=None, compat="diffusers") < TOLERANCE
    assert gap(compat="diffusers") > 0.1


def test_trap_16_pixels_are_rounded() -> None:
    """diffusers' rule for every pixel; guided-diffusion's truncation is one level off for about half of them."""
    x = torch.linspace(-1.1, 1.1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    ours = reference.to_uint8(x).permute(0, 3, 1, 2)
    rounded = (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    truncated = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert torch.equal(ours, rounded)
    assert 0.4 < (ours != truncated).float().mean() < 0.5


def test_trap_17_a_learned_variance_is_split_off() -> None:
    """A DDIM step that took it all would broadcast one channel to two without an error, as diffusers does."""
    x, eps, v = torch.randn(3, 4, 1, 8, 8)
    both = torch.cat([eps, v], dim=1)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    assert scheduler.step(both, 980, x).prev_sample.shape == (4, 2, 8, 8)
    table = ddim(LINEAR, 50).on(torch.device("cpu"))
    rows = torch.zeros(4, dtype=torch.int64)
    split, plain = (
        reference.diffusion_step(x, out, rows, table.coefficients, table.timesteps) for out in (both, eps)
    )
    assert torch.equal(split, plain)


def test_the_stand_in_is_clipped_and_stays_realistic() -> None:
    """What the loops above need: some x0 beyond the clip, and states of order 1."""
    network = stand_in(LINEAR, "epsilon")
    x, noise = inputs(50)
    free = walk(ddpm(LINEAR, 50, clip=None), network, x, noise)
    assert 1.2 < free.abs().max() < 20
    assert (free.abs() > 1).float().mean() > 0.02
    assert math.isfinite(float(free.sum()))
