"""What guided-diffusion and latent diffusion add to DDPM, against their formulas in float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.diffusion.gaussians import discretized_gaussian_log_likelihood, normal_kl
from stepfusion.kernels.tolerance import tolerance
from stepfusion.samplers.timesteps import sections
from stepfusion_testing.literature_formulas import Array, Diffusion, kl, space_timesteps

SHAPE = (3, 2, 4, 4)
TOTAL = 200
SCHEDULE = sf.NoiseSchedule.linear(TOTAL, 1e-3, 0.02, scaled=False)  # abar from 0.999 to 0.12
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def model_of(library: Any, learned: bool) -> Callable[..., Any]:
    """One function of x and t, in NumPy or PyTorch: bounded, with a variance where it is learned."""

    def model(x: Any, t: Any) -> Any:
        time = t.view(-1, 1, 1, 1) / TOTAL if isinstance(t, torch.Tensor) else t / TOTAL
        out = library.tanh(0.9 * x + time)
        join = torch.cat if library is torch else np.concatenate
        return join((out, library.tanh(x - time) - 0.5), 1) if learned else out

    return model


def gradient_of(library: Any) -> Callable[..., Any]:
    """A condition: pulls towards 0.3, harder early."""

    def gradient(x: Any, t: Any) -> Any:
        time = t.view(-1, 1, 1, 1) / TOTAL if isinstance(t, torch.Tensor) else t / TOTAL
        return (0.3 - library.tanh(x)) * (1 + time)

    return gradient


def halved(x0: Any) -> Any:
    """A denoised_fn."""
    return x0 * 0.5 + 0.1


def pair(**options: Any) -> tuple[sf.GaussianDiffusion, Diffusion, Callable[..., Any], Callable[..., Any]]:
    """Ours and the text's, with their models."""
    ours = sf.GaussianDiffusion(SCHEDULE, **options, backend="reference")
    theirs = Diffusion(np.linspace(1e-3, 0.02, TOTAL), **options)
    learned = ours.variance in ("learned", "learned_range")
    return ours, theirs, model_of(torch, learned), model_of(np, learned)


def close(actual: torch.Tensor, expected: Array, magnitude: float = 4.0, roundings: int = 16) -> None:
    """Equal to what rounding explains: a step is some thirty operations, whose terms reach ``magnitude``."""
    atol = tolerance(torch.float32, magnitude, roundings)
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=0, atol=atol)


def at(t: int) -> torch.Tensor:
    return torch.full((SHAPE[0],), t)


@pytest.fixture
def images() -> torch.Tensor:
    """Pixels of 256 levels, both ends among them."""
    pixels = torch.randint(0, 256, SHAPE)
    pixels[0, 0, 0, :2] = torch.tensor([0, 255])
    return pixels / 127.5 - 1


class TestSections:
    @pytest.mark.parametrize("total", [1000, 4000, 100, 97])
    @pytest.mark.parametrize("text", ["10,10,5", "1", "2", "25", "1,1,30", "7,3,2,2", "ddim25", "ddim1", "ddim10"])
    def test_as_in_guided_diffusion(self, total: int, text: str) -> None:
        try:
            expected = space_timesteps(total, text)
        except ValueError:
            with pytest.raises(ValueError, match=rf"^timesteps '{text}': no stride through {total} timesteps gives"):
                sections(total, text)
            return
        assert sections(total, text).tolist() == expected[::-1]
        assert sf.ddim(sf.NoiseSchedule.linear(total), timesteps=text).timesteps.tolist() == expected[::-1]

    def test_ddim_exists_for_62_counts(self) -> None:
        """Trap 5."""
        made = 0
        for count in range(1, 1001):
            try:
                made += len(sections(1000, f"ddim{count}")) == count
            except ValueError:
                continue
        assert made == 62

    def test_lists_too(self) -> None:
        assert sections(100, [3, 2]).tolist() == sections(100, "3,2").tolist() == [99, 50, 49, 24, 0]

    def test_an_engine_walks_them(self) -> None:
        engine = sf.Engine(model_of(torch, False), SCHEDULE, shape=SHAPE[1:], device="cpu")
        table = engine.table("ddpm", timesteps="3,2")
        assert table.timesteps.tolist() == [199, 100, 99, 50, 0]
        assert engine.sample(1, table).isfinite().all()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ddim60", "timesteps 'ddim60': no stride through 100 timesteps gives 60"),
            ("60,10", "timesteps '60,10': section 0 has 50 timesteps, and 60 were asked for"),
            ("1,x", "timesteps must be a list of integers, or a text like '10,10,5' or 'ddim25', got '1,x'"),
            ("", "timesteps must be a list of integers, or a text like '10,10,5' or 'ddim25', got ''"),
            ("ddim", "timesteps must be a list of integers, or a text like '10,10,5' or 'ddim25', got 'ddim'"),
            ("5,0", "timesteps must be a list of integers, or a text like '10,10,5' or 'ddim25', got '5,0'"),
            ([], "counts must be a text like '10,10,5' or 'ddim25', or a list of integers, got []"),
            ([1.5], "counts must be an integer, got 1.5"),
        ],
    )
    def test_refused(self, text: Any, message: str) -> None:
        with pytest.raises((TypeError, ValueError)) as error:
            sections(100, text)
        assert str(error.value) == message


class TestSteps:
    @pytest.mark.parametrize("t", [0, 1, 90, TOTAL - 1])
    @pytest.mark.parametrize("variance", VARIANCES)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_p_mean_variance(self, prediction: str, variance: str, t: int) -> None:
        ours, theirs, model, reference = pair(prediction=prediction, variance=variance)
        x = torch.randn(SHAPE)
        for hook in ({}, {"denoised_fn": halved}):
            parts = ours.p_mean_variance(model, x, at(t), **hook)
            expected = theirs.p_mean_variance(reference, x.double().numpy(), t, **hook)
            for name, value in zip(("mean", "variance", "log_variance", "pred_xstart"), expected, strict=True):
                close(parts[name], value)

    @pytest.mark.parametrize("t", [0, 1, 90, TOTAL - 1])
    @pytest.mark.parametrize("variance", VARIANCES)
    @pytest.mark.parametrize("hooks", ["none", "cond_fn", "denoised_fn", "both"])
    def test_p_sample(self, hooks: str, variance: str, t: int) -> None:
        ours, theirs, model, reference = pair(variance=variance)
        x, z = torch.randn(SHAPE), torch.randn(SHAPE)
        mine, other = ({} for _ in range(2))
        if hooks in ("cond_fn", "both"):
            mine["cond_fn"], other["cond_fn"] = gradient_of(torch), gradient_of(np)
        if hooks in ("denoised_fn", "both"):
            mine["denoised_fn"] = other["denoised_fn"] = halved
        step = ours.p_sample(model, x, at(t), noise=z, **mine)
        close(step["sample"], theirs.p_sample(reference, x.double().numpy(), t, z.double().numpy(), **other))
        if "cond_fn" in mine:
            parts = ours.p_mean_variance(model, x, at(t), **{k: v for k, v in mine.items() if k != "cond_fn"})
            mean = ours.condition_mean(mine["cond_fn"], parts, x, at(t))
            noise = z * (parts["log_variance"] / 2).exp() * (t > 0)
            close(mean + noise, step["sample"].double().numpy())
            assert float((mean - parts["mean"]).abs().max()) > 1e-4 or (variance, t) == ("fixed_small", 0)

    @pytest.mark.parametrize("t", [0, 1, 90, TOTAL - 1])
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @pytest.mark.parametrize("eta", [0.0, 0.6])
    @pytest.mark.parametrize("hooks", ["cond_fn", "denoised_fn", "both"])
    def test_ddim_sample(self, hooks: str, eta: float, prediction: str, t: int) -> None:
        ours, theirs, model, reference = pair(prediction=prediction, variance="learned_range")
        x, z = torch.randn(SHAPE), torch.randn(SHAPE)
        mine, other = ({} for _ in range(2))
        if hooks in ("cond_fn", "both"):
            mine["cond_fn"], other["cond_fn"] = gradient_of(torch), gradient_of(np)
        if hooks in ("denoised_fn", "both"):
            mine["denoised_fn"] = other["denoised_fn"] = halved
        step = ours.ddim_sample(model, x, at(t), eta=eta, noise=z, **mine)
        expected = theirs.ddim_sample(reference, x.double().numpy(), t, z.double().numpy(), eta, **other)
        close(step["sample"], expected, roundings=32)  # eps back and forth
        assert (
            float((step["sample"] - ours.ddim_sample(model, x, at(t), eta=eta, noise=z)["sample"]).abs().max()) > 1e-4
        )

    @pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
    @pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
    def test_guided_loops_over_sections(self, sampler: str, variance: str) -> None:
        """The respaced process of guided-diffusion, by its own betas, walked from end to end."""
        ours, theirs, model, reference = pair(variance=variance)
        timesteps = space_timesteps(TOTAL, "5,4,3")
        spaced = Diffusion.respaced(theirs.abar, timesteps, variance=variance)
        noise, start = torch.randn(12, *SHAPE), torch.randn(SHAPE)
        hooks = {"cond_fn": gradient_of(torch), "denoised_fn": halved, "timesteps": "5,4,3"}
        x = start.double().numpy()
        for i in range(12):
            t, z = 11 - i, noise[i].double().numpy()
            how: dict[str, Any] = {"cond_fn": gradient_of(np), "denoised_fn": halved}
            if sampler == "ddpm":
                x = spaced.p_sample(reference, x, t, z, **how)
            else:
                x = spaced.ddim_sample(reference, x, t, z, 0.5, **how)
        if sampler == "ddpm":
            result = ours.p_sample_loop(model, SHAPE, start=start, noise=noise, **hooks)
        else:
            result = ours.ddim_sample_loop(model, SHAPE, eta=0.5, start=start, noise=noise, **hooks)
        close(result, x, roundings=12 * 16)

    @pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
    def test_a_loop_without_effect_is_the_fused_loop(self, sampler: str) -> None:
        """A gradient of 0 takes the other path, to the same images: the noise is the same too."""
        ours, _, model, _ = pair()
        fused = getattr(ours, sampler)(model, SHAPE, steps=10, seed=3)
        guided = getattr(ours, sampler)(model, SHAPE, steps=10, seed=3, cond_fn=lambda x, t: torch.zeros_like(x))
        close(guided, fused.double().numpy(), roundings=10 * 16)

    def test_respaced_is_told_the_timesteps_of_the_whole(self) -> None:
        ours, _, _, _ = pair()
        told: list[int] = []

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            told.append(int(t[0]))
            return x

        spaced = ours.respaced("3,2")
        assert spaced.num_timesteps == 5
        for t in range(5):
            spaced.p_mean_variance(model, torch.randn(SHAPE), at(t))
        spaced.respaced([4, 0]).p_mean_variance(model, torch.randn(SHAPE), at(1))
        assert told == [0, 50, 99, 100, 199, 199]

    def test_the_learned_log_variance_is_a_table(self) -> None:
        """The engine's fused step reads sigma = exp(v / 2) off the same columns as learned_range."""
        table = sf.ddpm(SCHEDULE, 4, variance="learned")
        assert table.learned_variance
        assert table.column("half_log_min").tolist() == [-0.5, -0.5, -0.5, 0.0]
        assert table.column("half_log_span").tolist() == [1.0, 1.0, 1.0, 0.0]


class TestLosses:
    @pytest.mark.parametrize("t", [0, 1, 90, TOTAL - 1])
    @pytest.mark.parametrize("variance", VARIANCES)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @pytest.mark.parametrize("loss", ["mse", "rescaled_mse", "kl", "rescaled_kl"])
    def test_training_losses(self, images: torch.Tensor, loss: str, prediction: str, variance: str, t: int) -> None:
        ours, theirs, model, reference = pair(prediction=prediction, variance=variance)
        noise = torch.randn(SHAPE)
        losses = ours.training_losses(model, images, at(t), loss=loss, noise=noise)
        expected = theirs.training_loss(reference, images.double().numpy(), t, noise.double().numpy(), loss)
        np.testing.assert_allclose(losses.double().numpy(), expected, rtol=2e-5, atol=1e-6)

    def test_the_bound_teaches_the_variance_alone(self, images: torch.Tensor) -> None:
        """Nichol & Dhariwal 2021, section 3.1: the gradient of the mean stops in the bound, and only there."""
        ours, _, _, _ = pair(variance="learned_range")
        mean, v = (torch.tensor(value, requires_grad=True) for value in (0.3, 0.1))

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.cat((mean * x, v * torch.tanh(x)), 1)

        identity = {"noise": torch.randn(SHAPE), "t": torch.tensor([5, 60, 150])}
        gradients = {}
        for loss in ("l2", "rescaled_mse", "mse", "kl"):
            ours.training_losses(model, images, loss=loss, **identity).mean().backward()
            gradients[loss] = [None if p.grad is None else float(p.grad) for p in (mean, v)]
            mean.grad = v.grad = None
        assert gradients["l2"][1] is None or gradients["l2"][1] == 0
        assert gradients["rescaled_mse"][0] == gradients["mse"][0] == gradients["l2"][0]
        assert gradients["mse"][1] == pytest.approx(gradients["rescaled_mse"][1] * 1000 / TOTAL, rel=1e-5)
        assert gradients["kl"][0] not in (None, 0.0)
        assert gradients["kl"][0] != gradients["l2"][0]

    @pytest.mark.parametrize("v_posterior", [0.0, 0.4])
    @pytest.mark.parametrize("prediction", ["epsilon", "sample"])
    @pytest.mark.parametrize("loss", ["l1", "l2"])
    def test_latent_diffusion(self, images: torch.Tensor, loss: str, prediction: str, v_posterior: float) -> None:
        ours, theirs, model, reference = pair(prediction=prediction, v_posterior=v_posterior)
        weights = theirs.lvlb_weights()
        np.testing.assert_allclose(ours.lvlb_weights, weights, rtol=1e-12)
        noise, t = torch.randn(SHAPE), torch.tensor([0, 80, 199])
        found = ours.p_losses(model, images, t, loss=loss, l_simple_weight=0.7, original_elbo_weight=0.2, noise=noise)
        errors = []
        for i, step in enumerate(t.tolist()):
            x0, eps = (value[i : i + 1].double().numpy() for value in (images, noise))
            out = reference(theirs.q_sample(x0, step, eps), step)
            error = np.abs(theirs.target(x0, eps, step) - out)
            errors.append(float((error if loss == "l1" else error**2).mean()))
        vlb = float(np.mean(weights[t.numpy()] * np.array(errors)))
        assert float(found["loss_simple"]) == pytest.approx(np.mean(errors), rel=1e-5)
        assert float(found["loss_vlb"]) == pytest.approx(vlb, rel=1e-5)
        assert float(found["loss"]) == pytest.approx(0.7 * np.mean(errors) + 0.2 * vlb, rel=1e-5)


class TestLatentDiffusion:
    @pytest.mark.parametrize("t", [0, 1, 90, TOTAL - 1])
    @pytest.mark.parametrize("prediction", ["epsilon", "sample"])
    def test_v_posterior_mixes_the_variances(self, prediction: str, t: int) -> None:
        ours, theirs, model, reference = pair(prediction=prediction, v_posterior=0.3)
        x, z = torch.randn(SHAPE), torch.randn(SHAPE)
        sample = ours.p_sample(model, x, at(t), noise=z)["sample"]
        close(sample, theirs.p_sample(reference, x.double().numpy(), t, z.double().numpy()))
        parts = ours.p_mean_variance(model, x, at(t))
        close(parts["variance"], theirs.p_mean_variance(reference, x.double().numpy(), t)[1])
        plain = sf.GaussianDiffusion(SCHEDULE, prediction=prediction).p_sample(model, x, at(t), noise=z)["sample"]
        assert torch.equal(sample, plain) == (t == 0)

    @pytest.mark.parametrize("given", [True, False])
    def test_repeat_noise(self, given: bool) -> None:
        """Every image gets the first one's noise; a batch of equal states stays one."""
        ours, _, model, _ = pair()
        x = torch.randn(1, *SHAPE[1:]).expand(SHAPE)
        seeds = torch.tensor([7, 8, 9])
        source = {"noise": torch.randn(SHAPE)} if given else {"seeds": seeds, "indices": seeds}
        same = ours.p_sample(model, x, at(90), repeat_noise=True, **source)["sample"]
        assert torch.equal(same, same[:1].expand(SHAPE))
        own = ours.p_sample(model, x, at(90), **source)["sample"]
        assert torch.equal(own[0], same[0])
        assert not torch.equal(own[1], own[0])
        noise = {"noise": torch.randn(TOTAL, *SHAPE)} if given else {"seed": 5}
        loop = ours.p_sample_loop(model, SHAPE, start=x, repeat_noise=True, **noise)
        assert torch.equal(loop, loop[:1].expand(SHAPE))

    def test_intermediates(self) -> None:
        ours, _, model, _ = pair()
        last, intermediates = ours.p_sample_loop_intermediates(model, SHAPE, log_every_t=50, seed=2)
        steps = [step["sample"] for step in ours.p_sample_loop_progressive(model, SHAPE, seed=2)]
        expected = [steps[TOTAL - 1 - t] for t in (199, 150, 100, 50, 0)]
        assert all(torch.equal(a, b) for a, b in zip(intermediates, expected, strict=True))
        assert torch.equal(last, steps[-1])


class TestLikelihood:
    def test_normal_kl(self) -> None:
        values = [torch.randn(5, 4, dtype=torch.float64) for _ in range(4)]
        expected = kl(*(value.numpy() for value in values))
        np.testing.assert_allclose(normal_kl(*values).numpy(), expected, rtol=1e-12, atol=1e-15)
        assert float(normal_kl(values[0], values[1], values[0], values[1]).abs().max()) == 0

    def test_the_bins_of_a_pixel_are_a_distribution(self) -> None:
        """All 256 probabilities sum to 1, whatever mean and scale."""
        pixels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None].expand(256, 3)
        means, scales = torch.tensor([0.2, -0.9, 1.3]).double(), torch.tensor([-1.0, -2.0, -1.5]).double()
        logs = discretized_gaussian_log_likelihood(pixels, means=means, log_scales=scales)
        torch.testing.assert_close(logs.exp().sum(0), torch.ones(3).double(), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("variance", VARIANCES)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_calc_bpd_loop(self, images: torch.Tensor, prediction: str, variance: str) -> None:
        ours, theirs, model, reference = pair(prediction=prediction, variance=variance)
        noise, x0 = torch.randn(TOTAL, *SHAPE), images.double().numpy()
        terms = ours.calc_bpd_loop(model, images, noise=noise)
        vb, xstart, mse = [], [], []
        for row, t in enumerate(range(TOTAL - 1, -1, -1)):
            eps = noise[row].double().numpy()
            x = theirs.q_sample(x0, t, eps)
            vb.append(theirs.vb(reference, x0, x, t))
            predicted = theirs.p_mean_variance(reference, x, t)[3]
            xstart.append(((predicted - x0) ** 2).reshape(len(x0), -1).mean(1))
            mse.append(((theirs.eps_of(x, predicted, t) - eps) ** 2).reshape(len(x0), -1).mean(1))
        close(terms["prior_bpd"], theirs.prior(x0), 1.0)
        for name, values in (("vb", vb), ("xstart_mse", xstart), ("mse", mse)):
            np.testing.assert_allclose(terms[name].double().numpy(), np.stack(values, 1), rtol=1e-4, atol=1e-6)
        total = np.sum(vb, axis=0) + theirs.prior(x0)
        np.testing.assert_allclose(terms["total_bpd"].double().numpy(), total, rtol=1e-5)

    def test_the_ideal_model_of_gaussian_pixels(self) -> None:
        """A closed form: for x_0 ~ N(0, s^2), eps and the variance of p(x_{t-1} | x_t) are known.

        With them the bound is tight: it is minus the log likelihood of these pixels under N(0, s^2), a bin of
        2 / 255 each. Any other model is above it.
        """
        schedule = sf.NoiseSchedule.linear(50)
        scale = 0.2
        abar, prev, beta = (
            torch.from_numpy(values.copy()).float()
            for values in (schedule.alphas_cumprod, schedule.alphas_cumprod_prev, schedule.betas)
        )
        log_variance = -((1 - beta) / beta + 1 / (prev * scale**2 + 1 - prev)).log()

        def ideal(x: torch.Tensor, t: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
            level = abar[t].view(-1, 1, 1, 1)
            eps = (1 - level).sqrt() * x / (level * scale**2 + 1 - level)
            return torch.cat((factor * eps, log_variance[t].view(-1, 1, 1, 1).expand_as(x)), 1)

        pixels = ((torch.randn(12, 1, 32, 32) * scale).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        diffusion = sf.GaussianDiffusion(schedule, variance="learned", clip=None)
        found = sf.bits_per_dimension(diffusion, ideal, pixels)
        squares = float(((pixels / 127.5 - 1) ** 2).mean())
        expected = np.log2(scale * np.sqrt(2 * np.pi) * 127.5) + squares / (2 * scale**2 * np.log(2))
        assert found.total == pytest.approx(expected, abs=0.02)  # of which chance makes 0.007
        worse = sf.bits_per_dimension(diffusion, lambda x, t: ideal(x, t, 0.8), pixels)
        assert worse.total > found.total + 0.1

    def test_a_data_set_is_its_batches(self, images: torch.Tensor) -> None:
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        ours, _, model, _ = pair()
        labels = torch.tensor([0.0, 0.1, 0.2])

        def labelled(x: torch.Tensor, t: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = model(x, t) + y.view(-1, 1, 1, 1)
            return out

        whole = sf.bits_per_dimension(ours, labelled, pixels, model_kwargs={"y": labels})
        parts = sf.bits_per_dimension(ours, labelled, pixels, batch=2, model_kwargs={"y": labels})
        assert parts.total == pytest.approx(whole.total, rel=1e-6)
        terms = ours.calc_bpd_loop(labelled, pixels.float() / 127.5 - 1, y=labels)
        np.testing.assert_allclose(whole.vb, terms["vb"].mean(0).flip(0).double().numpy(), rtol=1e-5)
        assert whole.total == pytest.approx(float(terms["total_bpd"].mean()), rel=1e-6)
        assert whole.total == pytest.approx(whole.vb.sum() + whole.prior, rel=1e-6)
        assert whole.images == 3
        again = sf.bits_per_dimension(ours, labelled, pixels, seed=1, model_kwargs={"y": labels})
        assert again.total != whole.total


class TestRefused:
    X, T = torch.zeros(SHAPE), torch.zeros(SHAPE[0], dtype=torch.int64)
    PIXELS = torch.zeros(SHAPE, dtype=torch.uint8)
    DIFFUSION = sf.GaussianDiffusion(SCHEDULE, backend="reference")

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda d, m, x, t: sf.GaussianDiffusion(SCHEDULE, variance="learned", v_posterior=0.5),
             "v_posterior must be 0 with variance 'learned', got 0.5"),
            (lambda d, m, x, t: sf.ddpm(SCHEDULE, 4, variance="fixed_large", v_posterior=0.5),
             "v_posterior must be 0 with variance 'fixed_large', got 0.5"),
            (lambda d, m, x, t: sf.ddpm(SCHEDULE, 4, v_posterior=2),
             "v_posterior must be a finite number in [0, 1], got 2"),
            (lambda d, m, x, t: sf.ddpm(SCHEDULE, 4, variance="learned", compat="diffusers"),
             "variance 'learned' is not reproduced with compat='diffusers', which takes v as a variance"),
            (lambda d, m, x, t: d.p_sample(m, x, t, noise=x, cond_fn=lambda x, t: x[:1]),
             "cond_fn must return shape [3, 2, 4, 4], got [1, 2, 4, 4]"),
            (lambda d, m, x, t: d.ddim_sample(m, x, t, cond_fn=lambda x, t: None),
             "cond_fn must return shape [3, 2, 4, 4], got NoneType"),
            (lambda d, m, x, t: d.p_mean_variance(m, x, t, denoised_fn=lambda x: x[:1]),
             "denoised_fn must return shape [3, 2, 4, 4], got [1, 2, 4, 4]"),
            (lambda d, m, x, t: d.p_mean_variance(lambda x, t: x[:, :1], x, t),
             "the model returned shape [3, 1, 4, 4], and variance 'fixed_small' needs [3, 2, 4, 4]"),
            (lambda d, m, x, t: d.p_sample(m, x, t, noise=x, repeat_noise=1),
             "repeat_noise must be True or False, got 1"),
            (lambda d, m, x, t: d.training_losses(m, x, t, noise=x, loss="kl", min_snr_gamma=5.0),
             "min_snr_gamma weights the losses 'l1', 'l2', 'huber', got loss 'kl'"),
            (lambda d, m, x, t: d.p_losses(m, x, t, noise=x, loss="huber"),
             "loss must be one of 'l1', 'l2', got 'huber'"),
            (lambda d, m, x, t: d.p_losses(m, x, t, noise=x, original_elbo_weight=-1),
             "original_elbo_weight must be a finite number in [0, inf], got -1"),
            (lambda d, m, x, t: d.p_sample_loop_intermediates(m, SHAPE, log_every_t=0),
             "log_every_t must be in [1, 2147483648], got 0"),
            (lambda d, m, x, t: d.p_sample_loop_intermediates(m, SHAPE, steps=5),
             "steps cannot be given: intermediates are those of all timesteps"),
            (lambda d, m, x, t: d.p_sample_loop(m, SHAPE, timesteps="ddim150"),
             "timesteps 'ddim150': no stride through 200 timesteps gives 150"),
            (lambda d, m, x, t: d.respaced([0, 5]), "timesteps must be strictly decreasing, got 0 followed by 5"),
            (lambda d, m, x, t: d.calc_bpd_loop(m, x, noise=x),
             "noise must have shape [200, 3, 2, 4, 4], got [3, 2, 4, 4]"),
            (lambda d, m, x, t: d.calc_bpd_loop(m, x, seed=-1),
             "seed must be in [0, 18446744073709551615], got -1"),
            (lambda d, m, x, t: sf.bits_per_dimension(d, m, x),
             "images must be pixels, uint8 [N, C, H, W] with N >= 1, got float32 [3, 2, 4, 4]"),
            (lambda d, m, x, t: sf.bits_per_dimension(None, m, x),
             "diffusion must be a GaussianDiffusion, got NoneType"),
            (lambda d, m, x, t: sf.bits_per_dimension(d, m, TestRefused.PIXELS, model_kwargs={"y": t[:2]}),
             "model_kwargs['y'] must have an entry for each of 3 images, got int64 [2]"),
            (lambda d, m, x, t: sf.GaussianDiffusion(sf.NoiseSchedule.from_betas([0.5])).lvlb_weights,
             "lvlb_weights needs a schedule of at least 2 timesteps, got 1"),
        ],
    )  # fmt: skip
    def test_one_sentence(self, call: Callable[..., object], message: str) -> None:
        with pytest.raises((TypeError, ValueError)) as error:
            call(self.DIFFUSION, model_of(torch, False), self.X, self.T)
        assert str(error.value) == message


@pytest.mark.interpreter
@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
def test_the_fused_step_follows_the_hooks(variance: str) -> None:
    """With Triton's kernels the guided steps are those of the reference."""
    learned = variance != "fixed_small"
    fused, plain = (
        sf.GaussianDiffusion(SCHEDULE, variance=variance, backend=backend) for backend in ("triton", "reference")
    )
    x, z, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 50, 199])
    hooks: dict[str, Any] = {"cond_fn": gradient_of(torch), "denoised_fn": halved, "noise": z}
    for step in ("p_sample", "ddim_sample"):
        left, right = (getattr(d, step)(model_of(torch, learned), x, t, **hooks)["sample"] for d in (fused, plain))
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance(torch.float32, 8.0, 32))
