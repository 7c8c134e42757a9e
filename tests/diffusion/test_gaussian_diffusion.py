"""GaussianDiffusion: the literature's methods against formulas written out here in float64."""

from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.kernels.tolerance import tolerance
from stepfusion_testing.networks import smooth

SHAPE = (4, 3, 5, 6)
T = torch.tensor([0, 1, 500, 999])
BETAS = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETAS)


def at(values: np.ndarray) -> torch.Tensor:
    """float64 values at T, [4, 1, 1, 1]."""
    return torch.from_numpy(values[T.numpy()]).view(-1, 1, 1, 1)


@pytest.fixture
def diffusion() -> sf.GaussianDiffusion:
    return sf.GaussianDiffusion(sf.NoiseSchedule.linear())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(SHAPE) * 2 - 1


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE)


def close(actual: torch.Tensor, expected: torch.Tensor, magnitude: float, roundings: int = 8) -> None:
    """Equal to what rounding explains."""
    atol = tolerance(actual.dtype, magnitude, roundings)
    torch.testing.assert_close(actual.double(), expected.double().expand_as(actual), rtol=0, atol=atol)


class TestForward:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_q_sample(
        self, diffusion: sf.GaussianDiffusion, images: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype
    ) -> None:
        x_t = diffusion.q_sample(images.to(dtype), T, noise)
        assert x_t.dtype == dtype
        expected = at(ABAR) ** 0.5 * images.to(dtype).double() + (1 - at(ABAR)) ** 0.5 * noise.double()
        close(x_t, expected, float(expected.abs().max()))

    def test_q_sample_draws_by_seed_timestep_and_index(
        self, diffusion: sf.GaussianDiffusion, images: torch.Tensor
    ) -> None:
        identity = {"seeds": torch.tensor([5, 5, 6, 6]), "indices": torch.tensor([0, 1, 0, 1])}
        whole = diffusion.q_sample(images, T, **identity)
        alone = diffusion.q_sample(images[2:3], T[2:3], **{name: value[2:3] for name, value in identity.items()})
        assert torch.equal(whole[2:3], alone)
        assert not torch.equal(whole, diffusion.q_sample(images, T.flip(0), **identity))

    def test_q_mean_variance(self, diffusion: sf.GaussianDiffusion, images: torch.Tensor) -> None:
        mean, variance, log_variance = diffusion.q_mean_variance(images, T)
        close(mean, at(ABAR) ** 0.5 * images.double(), 1.0)
        close(variance, 1 - at(ABAR), 1.0)
        close(log_variance, torch.log(1 - at(ABAR)), 10.0)

    def test_q_posterior(self, diffusion: sf.GaussianDiffusion, images: torch.Tensor, noise: torch.Tensor) -> None:
        """By completing the square: precision and mean of q(x_{t-1} | x_0) q(x_t | x_{t-1}) (Ho et al. 2020)."""
        mean, variance, log_variance = diffusion.q_posterior_mean_variance(images, noise, T)
        prev = np.append(1.0, ABAR[:-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = (1 - BETAS) / BETAS + 1 / (1 - prev)
            weights = (np.sqrt(prev) / (1 - prev) / precision, np.sqrt(1 - BETAS) / BETAS / precision)
        weights[0][0], weights[1][0], precision[0] = 1.0, 0.0, np.inf  # t = 0: x_{-1} is x_0
        close(mean, at(weights[0]) * images.double() + at(weights[1]) * noise.double(), 6.0)
        close(variance, at(1 / precision), 1.0)
        precision[0] = precision[1]
        close(log_variance, -torch.log(at(precision)), 10.0)


class TestConversions:
    def test_start_eps_and_v_are_inverses(
        self, diffusion: sf.GaussianDiffusion, images: torch.Tensor, noise: torch.Tensor
    ) -> None:
        x_t = diffusion.q_sample(images, T, noise)
        v = at(ABAR) ** 0.5 * noise.double() - (1 - at(ABAR)) ** 0.5 * images.double()
        amplified = float(1 / ABAR[-1] ** 0.5) * 4
        close(diffusion.predict_start_from_noise(x_t, T, noise), images, amplified)
        close(diffusion.predict_start_from_v(x_t, T, v.float()), images, 8.0)
        amplified = float((1 - ABAR[0]) ** -0.5) * 4
        close(diffusion.predict_eps_from_x0(x_t, T, images), noise, amplified)


class TestReverse:
    @pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
    def test_p_mean_variance_is_what_p_sample_draws_from(self, prediction: str, variance: str) -> None:
        diffusion = sf.GaussianDiffusion(sf.NoiseSchedule.linear(), prediction=prediction, variance=variance)

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            out = smooth(x, t)
            return torch.cat((out, out.clamp(-1, 1)), 1) if variance == "learned_range" else out

        x, z = torch.randn(SHAPE), torch.randn(SHAPE)
        parts = diffusion.p_mean_variance(model, x, T)
        step = diffusion.p_sample(model, x, T, noise=z)
        nonzero = (T > 0).view(-1, 1, 1, 1)
        expected = parts["mean"] + nonzero * (parts["log_variance"] / 2).exp() * z
        torch.testing.assert_close(step["sample"], expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(step["pred_xstart"], parts["pred_xstart"], rtol=0, atol=2e-4)
        assert all(value.shape == SHAPE for value in parts.values())
        if variance != "fixed_small":
            torch.testing.assert_close(parts["variance"].log(), parts["log_variance"], rtol=0, atol=1e-4)

    def test_variances_are_the_papers(self, diffusion: sf.GaussianDiffusion) -> None:
        large = sf.GaussianDiffusion(diffusion.schedule, variance="fixed_large")
        small_variance = diffusion.p_mean_variance(smooth, torch.randn(SHAPE), T)["variance"]
        large_variance = large.p_mean_variance(smooth, torch.randn(SHAPE), T)["variance"]
        prev = np.append(1.0, ABAR[:-1])
        tilde = BETAS * (1 - prev) / (1 - ABAR)
        close(small_variance, at(tilde), 1.0)
        close(large_variance, at(np.append(tilde[1], BETAS[1:])), 1.0)

    def test_loops_are_the_engines(self, diffusion: sf.GaussianDiffusion) -> None:
        engine = sf.Engine(smooth, diffusion.schedule, shape=SHAPE[1:], device="cpu")
        ancestral = diffusion.p_sample_loop(smooth, SHAPE, steps=20, seed=4)
        assert torch.equal(ancestral, engine.sample(4, sampler="ddpm", steps=20, seed=4))
        implicit = diffusion.ddim_sample_loop(smooth, SHAPE, steps=20, eta=0.7, seed=4)
        assert torch.equal(implicit, engine.sample(4, steps=20, eta=0.7, seed=4))

    def test_a_whole_loop_is_its_single_steps(self) -> None:
        diffusion = sf.GaussianDiffusion(sf.NoiseSchedule.linear(40))
        noise = torch.randn(40, *SHAPE)
        x = start = torch.randn(SHAPE)
        steps = list(diffusion.p_sample_loop_progressive(smooth, SHAPE, start=start, noise=noise))
        assert len(steps) == 40
        for i, t in enumerate(range(39, -1, -1)):
            x = diffusion.p_sample(smooth, x, torch.full((4,), t), noise=noise[i])["sample"]
            assert torch.equal(x, steps[i]["sample"])
        assert torch.equal(diffusion.p_sample_loop(smooth, SHAPE, start=start, noise=noise), x)

    def test_ddim_reverse_sample_undoes_ddim_sample_for_a_fixed_eps(self, diffusion: sf.GaussianDiffusion) -> None:
        """With one eps for both, up and down are exact inverses (Song et al. 2021, section 4.3)."""
        unclipped = sf.GaussianDiffusion(diffusion.schedule, clip=None)
        eps, x = torch.randn(SHAPE), torch.randn(SHAPE)
        t = torch.tensor([0, 1, 500, 998])
        up = unclipped.ddim_reverse_sample(lambda x, t: eps, x, t)["sample"]
        down = unclipped.ddim_sample(lambda x, t: eps, up, t + 1)["sample"]
        torch.testing.assert_close(down, x, rtol=0, atol=2e-5)

    def test_model_arguments_arrive(self, diffusion: sf.GaussianDiffusion) -> None:
        def model(x: torch.Tensor, t: torch.Tensor, *, y: int) -> torch.Tensor:
            return smooth(x, t) * y

        first = diffusion.ddim_sample_loop(model, SHAPE, steps=3, y=1)
        assert torch.equal(first, diffusion.ddim_sample_loop(smooth, SHAPE, steps=3))
        assert not torch.equal(first, diffusion.ddim_sample_loop(model, SHAPE, steps=3, y=0))


class TestLosses:
    @pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
    @pytest.mark.parametrize("gamma", [None, 5.0])
    def test_against_the_formulas(
        self, images: torch.Tensor, noise: torch.Tensor, prediction: str, loss: str, gamma: float | None
    ) -> None:
        diffusion = sf.GaussianDiffusion(sf.NoiseSchedule.linear(), prediction=prediction)
        losses = diffusion.training_losses(smooth, images, T, loss=loss, min_snr_gamma=gamma, noise=noise)
        signal, scale = at(ABAR) ** 0.5, (1 - at(ABAR)) ** 0.5
        x_t = signal * images.double() + scale * noise.double()
        targets = {
            "epsilon": noise.double(),
            "sample": images.double(),
            "v_prediction": signal * noise.double() - scale * images.double(),
        }
        error = (smooth(x_t, T) - targets[prediction]).abs()
        each = {"l1": error, "l2": error**2, "huber": torch.where(error < 1, error**2 / 2, error - 0.5)}[loss]
        expected = each.flatten(1).mean(1)
        if gamma is not None:
            snr = (at(ABAR) / (1 - at(ABAR))).flatten()
            implied = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction]
            expected = expected * snr.clamp(max=gamma) / implied
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)

    def test_gradients_reach_the_model(self, diffusion: sf.GaussianDiffusion, images: torch.Tensor) -> None:
        weight = torch.zeros((), requires_grad=True)
        identity: dict[str, Any] = {"seeds": torch.arange(4), "indices": torch.arange(4)}
        diffusion.training_losses(lambda x, t: weight * x, images, T, **identity).mean().backward()
        assert weight.grad is not None
        assert float(weight.grad) < 0  # predicting more of x_t, most of which is noise, is better than nothing

    def test_learned_variance_uses_the_first_half(self, images: torch.Tensor, noise: torch.Tensor) -> None:
        learned = sf.GaussianDiffusion(sf.NoiseSchedule.linear(), variance="learned_range")
        fixed = sf.GaussianDiffusion(sf.NoiseSchedule.linear())
        both = learned.training_losses(lambda x, t: torch.cat((smooth(x, t), x), 1), images, T, noise=noise)
        assert torch.equal(both, fixed.training_losses(smooth, images, T, noise=noise))

    def test_a_model_of_the_wrong_shape_is_refused(
        self, diffusion: sf.GaussianDiffusion, images: torch.Tensor
    ) -> None:
        with pytest.raises(
            ValueError, match=r"^the model returned shape \[4, 1, 5, 6\], and variance 'fixed_small' needs"
        ):
            diffusion.training_losses(lambda x, t: x[:, :1], images, T, noise=images)


@pytest.mark.parametrize("t", [[-1, 0, 0, 0], [0, 0, 0, 1000]])
def test_t_out_of_range(diffusion: sf.GaussianDiffusion, images: torch.Tensor, t: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"^t must lie in \[0, 999\], got {min(t)} to {max(t)}$"):
        diffusion.q_sample(images, torch.tensor(t), images)


def test_a_step_with_noise_needs_its_noise(diffusion: sf.GaussianDiffusion, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="this step adds noise: give noise, or seeds and indices"):
        diffusion.p_sample(smooth, images, T)
    diffusion.ddim_sample(smooth, images, T)  # eta = 0 needs none


@pytest.mark.interpreter
def test_the_fused_path_is_the_reference_path(images: torch.Tensor, noise: torch.Tensor) -> None:
    schedule = sf.NoiseSchedule.linear()
    fused, plain = (sf.GaussianDiffusion(schedule, backend=backend) for backend in ("triton", "reference"))
    identity: dict[str, Any] = {"seeds": torch.arange(4), "indices": torch.arange(4)}
    assert torch.equal(fused.q_sample(images, T, **identity), plain.q_sample(images, T, **identity))
    for left, right in zip(
        fused.q_posterior_mean_variance(images, noise, T),
        plain.q_posterior_mean_variance(images, noise, T),
        strict=True,
    ):
        assert torch.equal(left, right)
    for step in ("p_sample", "ddim_sample"):
        left, right = (getattr(d, step)(smooth, images, T, **identity) for d in (fused, plain))
        assert torch.equal(left["sample"], right["sample"])
