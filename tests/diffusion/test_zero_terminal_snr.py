"""Schedules whose last timestep has no signal: finite if there is an answer, and one sentence if there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.kernels.tolerance import tolerance
from stepfusion_testing.diffusion_models import ElementwiseModel

SHAPE = (2, 3, 5, 4)
SCHEDULES = {
    "linear": sf.NoiseSchedule.linear(60).rescale_zero_terminal_snr(),
    "cosine": sf.NoiseSchedule.cosine(60).rescale_zero_terminal_snr(),
    "scaled_linear": sf.NoiseSchedule.scaled_linear(1000).rescale_zero_terminal_snr(),
    "betas": sf.NoiseSchedule.from_betas([0.1, 0.2, 0.4, 1.0]),
}
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def model(diffusion: sf.GaussianDiffusion) -> ElementwiseModel:
    return ElementwiseModel(diffusion.num_timesteps, learned="learned" in diffusion.variance)


def sentence(t: int) -> str:
    return (
        f"x0 cannot be told from eps at t = {t}, where the signal is zero (zero terminal SNR): "
        "use a model with prediction 'v_prediction' or 'sample'"
    )


def ends(schedule: sf.NoiseSchedule) -> torch.Tensor:
    """Timesteps of a batch of two: one in the middle, and the last one."""
    return torch.tensor([schedule.num_timesteps // 2, schedule.num_timesteps - 1])


def pull(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.3 - torch.tanh(x)


@pytest.mark.parametrize("name", SCHEDULES)
def test_eps_from_x0(name: str) -> None:
    """(x - sqrt(abar) x0) / sqrt(1 - abar): x itself at abar = 0."""
    diffusion, t = sf.GaussianDiffusion(SCHEDULES[name]), ends(SCHEDULES[name])
    x, x0 = torch.randn(SHAPE), torch.randn(SHAPE)
    abar = torch.from_numpy(SCHEDULES[name].alphas_cumprod[t.numpy()]).view(-1, 1, 1, 1)
    expected = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    eps = diffusion.predict_eps_from_x0(x, t, x0)
    torch.testing.assert_close(eps.double(), expected, rtol=0, atol=tolerance(torch.float32, 8.0, 8))
    assert torch.equal(eps[1], x[1])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_everything_is_finite_with_v_and_x0(name: str, prediction: str, variance: str) -> None:
    diffusion = sf.GaussianDiffusion(SCHEDULES[name], prediction=prediction, variance=variance)
    network, t = model(diffusion), ends(SCHEDULES[name])
    x, z = torch.randn(SHAPE), torch.randn(SHAPE)
    images = torch.randint(0, 256, SHAPE) / 127.5 - 1
    timesteps = [int(t[1]), int(t[0]), 0]
    for hooks in ({}, {"cond_fn": pull}, {"cond_fn": pull, "denoised_fn": torch.tanh}):
        found = [
            diffusion.p_sample(network, x, t, noise=z, **hooks),
            diffusion.ddim_sample(network, x, t, noise=z, eta=1.0, **hooks),
            {"loop": diffusion.p_sample_loop(network, SHAPE, timesteps=timesteps, **hooks)},
            {"loop": diffusion.ddim_sample_loop(network, SHAPE, timesteps=timesteps, eta=0.5, **hooks)},
        ]
        assert all(value.isfinite().all() for step in found for value in step.values())
    assert all(value.isfinite().all() for value in diffusion.p_mean_variance(network, x, t).values())
    assert diffusion.ddim_reverse_sample(network, x, t - 1)["sample"].isfinite().all()
    for loss in ("l2", "mse", "rescaled_mse", "kl"):
        losses = diffusion.training_losses(network, images, t, loss=loss, noise=z)
        gradients = torch.autograd.grad(losses.sum(), list(network.parameters()))
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
    if diffusion.num_timesteps <= 60:
        terms = diffusion.calc_bpd_loop(network, images, seed=1)
        assert all(value.isfinite().all() for value in terms.values())


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_eps_of_a_clean_guess_has_no_error_at_the_end(prediction: str) -> None:
    """x_T is eps, whatever x0 was guessed: the first entry of ``mse`` is 0."""
    diffusion = sf.GaussianDiffusion(SCHEDULES["linear"], prediction=prediction)
    terms = diffusion.calc_bpd_loop(model(diffusion), torch.rand(SHAPE) * 2 - 1, seed=3)
    assert terms["mse"][:, 0].tolist() == [0.0, 0.0]
    assert (terms["mse"][:, 1:] > 0).all()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_condition_moves_x0_by_its_scale_and_not_at_the_end(prediction: str) -> None:
    """(1 - abar) / sqrt(abar) gradient (Dhariwal & Nichol 2021, algorithm 2); at abar = 0 there is no condition."""
    schedule = SCHEDULES["linear"]
    diffusion, t, x = sf.GaussianDiffusion(schedule, prediction=prediction), ends(schedule), torch.randn(SHAPE)
    parts = diffusion.p_mean_variance(model(diffusion), x, t)
    guided = diffusion.condition_score(pull, parts, x, t)["pred_xstart"]
    abar = float(schedule.alphas_cumprod[int(t[0])])
    expected = parts["pred_xstart"][0].double() + (1 - abar) / math.sqrt(abar) * pull(x, t)[0].double()
    atol = tolerance(torch.float32, float(expected.detach().abs().max()), 8)
    torch.testing.assert_close(guided[0].double(), expected, rtol=0, atol=atol)
    assert torch.equal(guided[1], parts["pred_xstart"][1])


class TestEpsilon:
    """There is no x0 at T - 1, and there is one everywhere else."""

    CALLS: ClassVar[dict[str, Callable[[sf.GaussianDiffusion, Any, torch.Tensor, torch.Tensor], object]]] = {
        "predict_start_from_noise": lambda d, m, x, t: d.predict_start_from_noise(x, t, x),
        "p_mean_variance": lambda d, m, x, t: d.p_mean_variance(m, x, t),
        "p_sample": lambda d, m, x, t: d.p_sample(m, x, t, noise=x),
        "p_sample, guided": lambda d, m, x, t: d.p_sample(m, x, t, noise=x, cond_fn=pull),
        "ddim_sample": lambda d, m, x, t: d.ddim_sample(m, x, t),
        "ddim_sample, guided": lambda d, m, x, t: d.ddim_sample(m, x, t, cond_fn=pull),
        "vb_terms_bpd": lambda d, m, x, t: d.vb_terms_bpd(m, x, x, t),
        "kl": lambda d, m, x, t: d.training_losses(m, x, t, loss="kl", noise=x),
    }

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_refused_where_it_is_used(self, name: str, call: str) -> None:
        diffusion, t, x = sf.GaussianDiffusion(SCHEDULES[name]), ends(SCHEDULES[name]), torch.randn(SHAPE)
        asked: list[int] = []

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            asked.append(1)
            return x

        with pytest.raises(ValueError, match="^" + re.escape(sentence(int(t[1]))) + "$"):
            self.CALLS[call](diffusion, network, x, t)
        assert not asked

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
    def test_answered_everywhere_else(self, name: str, call: str, variance: str) -> None:
        """With the bits of a schedule's table that has those rows alone."""
        schedule = SCHEDULES[name]
        diffusion = sf.GaussianDiffusion(schedule, variance=variance)
        last = schedule.num_timesteps - 2
        x, t = torch.randn(SHAPE), torch.tensor([last, 0])
        found = self.CALLS[call](diffusion, model(diffusion), x, t)
        values = found.values() if isinstance(found, dict) else [found]
        assert all(isinstance(value, torch.Tensor) and value.isfinite().all() for value in values)

    def test_a_step_is_the_loop_that_takes_it(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULES["linear"])
        start, noise = torch.randn(SHAPE), torch.randn(3, *SHAPE)
        network = model(diffusion)
        loop = list(
            diffusion.p_sample_loop_progressive(network, SHAPE, timesteps=[2, 1, 0], start=start, noise=noise)
        )
        x = start
        for i, t in enumerate((2, 1, 0)):
            x = diffusion.p_sample(network, x, torch.full((2,), t), noise=noise[i])["sample"].detach()
            assert torch.equal(x, loop[i]["sample"])

    def test_a_simple_loss_needs_no_x0(self) -> None:
        diffusion, t = sf.GaussianDiffusion(SCHEDULES["linear"]), ends(SCHEDULES["linear"])
        x, z = torch.randn(SHAPE), torch.randn(SHAPE)
        losses = diffusion.training_losses(lambda x, t: 0.5 * x, x, t, noise=z)
        assert float(losses[1]) == pytest.approx(float(((0.5 * z[1] - z[1]) ** 2).mean()), rel=1e-5)
        assert diffusion.training_losses(model(diffusion), x, t, noise=z, min_snr_gamma=5.0).isfinite().all()

    def test_loops_that_start_there(self) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULES["linear"])
        message = re.escape(sentence(59))
        with pytest.raises(ValueError, match=message):
            diffusion.calc_bpd_loop(model(diffusion), torch.zeros(SHAPE))
        with pytest.raises(ValueError, match="cannot start at timestep 59, where the signal is zero"):
            diffusion.p_sample_loop(model(diffusion), SHAPE)
        assert diffusion.p_sample_loop(model(diffusion), SHAPE, timesteps=[58, 20, 0]).isfinite().all()

    def test_a_signal_that_float32_cannot_hold(self) -> None:
        """abar = 1e-80 is no 0, and 1 / sqrt(abar) no float32: the same sentence, at every such timestep."""
        diffusion = sf.GaussianDiffusion(sf.NoiseSchedule.from_betas([0.1, *[1 - 1e-10] * 9]))
        x = torch.randn(SHAPE)
        for t in (8, 9):
            assert diffusion.schedule.alphas_cumprod[t] > 0
            with pytest.raises(ValueError, match=re.escape(sentence(t))):
                diffusion.p_sample(lambda x, t: x, x, torch.tensor([0, t]), noise=x)
        step = diffusion.p_sample(lambda x, t: x, x, torch.tensor([0, 7]), noise=x)
        assert all(value.isfinite().all() for value in step.values())


class TestRowsOutsideTheTable:
    """What cannot be looked at on a device is NaN there, and never a state that stays as it was."""

    @pytest.mark.parametrize("step", ["p_sample", "ddim_sample", "ddim_reverse_sample"])
    @pytest.mark.parametrize("t", [-3, -1, 60, 61, 4000])
    def test_nan(self, step: str, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULES["linear"], prediction="v_prediction")
        monkeypatch.setattr("stepfusion.diffusion.reverse.check_step", lambda *_, **__: None)
        x = torch.randn(SHAPE)
        given = {"noise": x} if step == "p_sample" else {}
        found = getattr(diffusion, step)(lambda x, t: x, x, torch.tensor([5, t]), **given)["sample"]
        assert found[1].isnan().all()
        assert found[0].isfinite().all()

    def test_nan_where_eps_tells_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        diffusion, x = sf.GaussianDiffusion(SCHEDULES["linear"]), torch.randn(SHAPE)
        monkeypatch.setattr("stepfusion.diffusion.reverse.check_step", lambda *_, **__: None)
        found = diffusion.ddim_sample(lambda x, t: x, x, torch.tensor([5, 59]))["sample"]
        assert found[1].isnan().all()
        assert found[0].isfinite().all()


class TestLatentDiffusion:
    @pytest.mark.parametrize("loss", ["l1", "l2"])
    def test_a_weight_of_zero_leaves_the_bound_out(self, loss: str) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULES["linear"])
        network, t = model(diffusion), ends(SCHEDULES["linear"])
        found = diffusion.p_losses(network, torch.randn(SHAPE), t, loss=loss, noise=torch.randn(SHAPE))
        assert torch.equal(found["loss"], found["loss_simple"])
        (gradient,) = torch.autograd.grad(found["loss"], network.weight)
        assert gradient.isfinite()
        assert float(found["loss_vlb"].detach()) == math.inf  # as its weight is

    def test_a_perfect_model_has_no_bound_to_pay(self) -> None:
        diffusion, z = sf.GaussianDiffusion(SCHEDULES["linear"]), torch.randn(SHAPE)
        found = diffusion.p_losses(lambda x, t: z, torch.randn(SHAPE), ends(SCHEDULES["linear"]), noise=z)
        assert [float(value) for value in found.values()] == [0.0, 0.0, 0.0]

    def test_an_infinite_weight_is_refused_where_it_is_used(self) -> None:
        diffusion, x = sf.GaussianDiffusion(SCHEDULES["linear"]), torch.randn(SHAPE)
        network = model(diffusion)
        message = (
            "original_elbo_weight must be 0 for t = 59, where the signal is zero and the weight of the bound "
            "infinite (zero terminal SNR), got 0.1"
        )
        with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
            diffusion.p_losses(network, x, ends(SCHEDULES["linear"]), original_elbo_weight=0.1, noise=x)
        found = diffusion.p_losses(network, x, torch.tensor([3, 58]), original_elbo_weight=0.1, noise=x)
        assert all(value.isfinite() for value in found.values())
        for prediction in ("v_prediction", "sample"):
            other = sf.GaussianDiffusion(SCHEDULES["linear"], prediction=prediction)
            found = other.p_losses(network, x, ends(SCHEDULES["linear"]), original_elbo_weight=0.1, noise=x)
            assert all(value.isfinite() for value in found.values())

    def test_weights(self) -> None:
        weights = sf.GaussianDiffusion(SCHEDULES["linear"]).lvlb_weights
        assert np.isfinite(weights[:-1]).all()
        assert weights[-1] == np.inf
