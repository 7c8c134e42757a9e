"""Single steps and losses are differentiated: in x, in the clean images, and in a model's weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion.kernels.tolerance import tolerance
from stepfusion_testing.diffusion_models import ConvolutionalModel, ElementwiseModel
from stepfusion_testing.literature_formulas import Array, Diffusion
from stepfusion_testing.networks import tiny_unet

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STEPS = ("p_sample", "ddim_sample", "ddim_reverse_sample")
TOTAL = 200
SCHEDULE = sf.NoiseSchedule.linear(TOTAL, 1e-3, 0.02, scaled=False)
LINEAR = sf.NoiseSchedule.linear(1000)
ONE = torch.ones(1, 1, 2, 2)
SHAPE = (3, 2, 3, 5)


def half(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


def pull(library: Any) -> Callable[..., Any]:
    """A condition, in NumPy or PyTorch."""
    return lambda x, t: 0.3 - library.tanh(x)


def damped(x0: Any) -> Any:
    """A denoised_fn."""
    return x0 * 0.5 + 0.1


def hooks(names: str, library: Any) -> dict[str, Any]:
    known = {"cond_fn": pull(library), "denoised_fn": damped}
    return {name: known[name] for name in names.split()}


def rise(function: Callable[[Any], Array], at: Any, step: float = 1e-5) -> Array:
    """The derivative of a function in float64, element by element."""
    return (function(at + step) - function(at - step)) / (2 * step)


def close(actual: torch.Tensor, expected: Any, magnitude: float = 4.0) -> None:
    """Equal to what the rounding of a step and of its backward pass explains."""
    expected = np.asarray(expected)
    magnitude = max(magnitude, float(np.abs(expected).max()))
    np.testing.assert_allclose(
        actual.detach().double().numpy(), expected, rtol=0, atol=tolerance(torch.float32, magnitude, 64)
    )


def reversed_ddim(process: Diffusion, model: Callable[..., Array], x: Array, t: int) -> Array:
    """One DDIM step up without a clip (Song et al. 2021, section 4.3)."""
    x0 = process.p_mean_variance(model, x, t, clip=False)[3]
    return math.sqrt(process.abar[t + 1]) * x0 + math.sqrt(1 - process.abar[t + 1]) * process.eps_of(x, x0, t)


class TestSteps:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("step", "arguments", "slope"),
        [("ddim_sample", {}, 1.00242884), ("p_sample", {"noise": ONE}, 0.99980386)],
    )
    def test_the_slope_of_half_of_x(self, step: str, arguments: Any, slope: float, backend: str) -> None:
        diffusion = sf.GaussianDiffusion(LINEAR, clip=None, backend=backend)
        x = ONE.clone().requires_grad_()
        sample = getattr(diffusion, step)(half, x, torch.tensor([500]), **arguments)["sample"]
        (gradient,) = torch.autograd.grad(sample.sum(), x)
        close(gradient, np.full((1, 1, 2, 2), slope), 1.0)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @pytest.mark.parametrize("variance", VARIANCES)
    @pytest.mark.parametrize(
        ("step", "named"),
        [
            *((step, named) for step in STEPS[:2] for named in ("", "cond_fn", "denoised_fn", "cond_fn denoised_fn")),
            ("ddim_reverse_sample", ""),
        ],
    )
    def test_in_x_and_in_a_weight(self, step: str, named: str, variance: str, prediction: str, backend: str) -> None:
        """Against differences of the formulas in float64; x0 is clipped in some pixels and not in others."""
        how = {"prediction": prediction, "variance": variance}
        diffusion = sf.GaussianDiffusion(SCHEDULE, **how, backend=backend)
        theirs = Diffusion(np.linspace(1e-3, 0.02, TOTAL), **how)
        model = ElementwiseModel(TOTAL, learned="learned" in variance)
        t, z = 90, torch.randn(SHAPE)

        def exact(x: Array, weight: float) -> Array:
            twin = partial(model.in_numpy, weight=weight)
            if step == "ddim_reverse_sample":
                return reversed_ddim(theirs, twin, x, t)
            given: dict[str, Any] = {"z": z.double().numpy(), **hooks(named, np)}
            return getattr(theirs, step)(twin, x, t, **given | ({} if step == "p_sample" else {"eta": 0.5}))

        x = torch.randn(SHAPE, requires_grad=True)
        given: dict[str, Any] = {"p_sample": {"noise": z}, "ddim_sample": {"noise": z, "eta": 0.5}}.get(step, {})
        found = getattr(diffusion, step)(model, x, torch.full((3,), t), **given, **hooks(named, torch))
        of_x, of_weight = torch.autograd.grad(found["sample"].sum(), (x, model.weight))
        close(of_x, rise(lambda value: exact(value, 0.9), x.detach().double().numpy()))
        expected = rise(lambda weight: exact(x.detach().double().numpy(), weight), 0.9)
        close(of_weight, expected.sum(), float(np.abs(expected).sum()))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_of_the_predicted_x0(self, prediction: str, backend: str) -> None:
        """Posterior sampling differentiates a measurement of ``pred_xstart`` (Chung et al. 2023, algorithm 1)."""
        diffusion = sf.GaussianDiffusion(SCHEDULE, prediction=prediction, clip=None, backend=backend)
        theirs = Diffusion(np.linspace(1e-3, 0.02, TOTAL), prediction=prediction, clip=False)
        model = ElementwiseModel(TOTAL)
        x, t = torch.randn(SHAPE, requires_grad=True), torch.full((3,), 90)
        expected = rise(lambda x: theirs.p_mean_variance(model.in_numpy, x, 90)[3] ** 2, x.detach().double().numpy())
        noise = torch.randn(SHAPE)
        for found in (
            diffusion.p_mean_variance(model, x, t),
            diffusion.p_sample(model, x, t, noise=noise),
            diffusion.ddim_sample(model, x, t),
            diffusion.ddim_reverse_sample(model, x, t),
        ):
            (gradient,) = torch.autograd.grad((found["pred_xstart"] ** 2).sum(), x)
            close(gradient, expected)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("named", ["", "cond_fn denoised_fn"])
    def test_models_with_parameters(self, named: str, training: bool, backend: str) -> None:
        """A convolution with dropout and a hook, and a UNet: parameters get gradients, on images of odd sizes."""
        diffusion = sf.GaussianDiffusion(SCHEDULE, backend=backend)
        models: list[tuple[nn.Module, tuple[int, ...]]] = [
            (ConvolutionalModel(), (2, 3, 5, 7)),
            (tiny_unet(classes=None), (2, 1, 8, 8)),
        ]
        for model, shape in models:
            model.train(training)
            calls: list[object] = []
            model.register_forward_hook(lambda *_, calls=calls: calls.append(None))
            x, t, z = torch.randn(shape), torch.tensor([3, 150]), torch.randn(shape)
            given = {"p_sample": {"noise": z}, "ddim_sample": {}, "ddim_reverse_sample": {}}
            for step in STEPS if not named else STEPS[:2]:
                found = getattr(diffusion, step)(model, x, t, **given[step], **hooks(named, torch))
                gradients = torch.autograd.grad(found["sample"].square().sum(), list(model.parameters()))
                assert all(gradient.isfinite().all() for gradient in gradients)
                assert sum(float(gradient.abs().max()) > 0 for gradient in gradients) > len(gradients) / 2
            assert len(calls) == (3 if not named else 2)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_chain_of_steps(self, backend: str) -> None:
        """A reward of the last sample reaches the first state through three steps."""
        diffusion = sf.GaussianDiffusion(SCHEDULE, clip=None, backend=backend).respaced("3")
        theirs = Diffusion.respaced(SCHEDULE.alphas_cumprod, [0, 100, 199], clip=False)
        model = ElementwiseModel(TOTAL)

        def walked(x: Array) -> Array:
            for t in (2, 1, 0):
                x = theirs.ddim_sample(model.in_numpy, x, t, np.zeros(SHAPE), 0.0)
            return x

        start = torch.randn(SHAPE, requires_grad=True)
        x = start
        for t in (2, 1, 0):
            x = diffusion.ddim_sample(model, x, torch.full((3,), t))["sample"]
        (gradient,) = torch.autograd.grad(x.sum(), start)
        close(gradient, rise(walked, start.detach().double().numpy()), 40.0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_states_of_other_dtypes(self, dtype: torch.dtype) -> None:
        diffusion = sf.GaussianDiffusion(LINEAR, clip=None)
        x = ONE.to(dtype).requires_grad_()
        sample = diffusion.ddim_sample(half, x, torch.tensor([500]))["sample"]
        (gradient,) = torch.autograd.grad(sample.sum(), x)
        assert gradient.dtype == dtype
        np.testing.assert_allclose(
            gradient.double().numpy(), 1.00242884, rtol=0, atol=tolerance(dtype, 4.0, 4) + 1e-6
        )

    def test_loops_leave_autograd_out(self) -> None:
        """As the peers' loops do: a chain of a thousand models would not fit a memory."""
        diffusion = sf.GaussianDiffusion(SCHEDULE)
        assert not diffusion.p_sample_loop(ConvolutionalModel(), (2, 3, 5, 7), steps=3).requires_grad
        start = torch.randn(2, 3, 5, 7, requires_grad=True)
        model, how = ConvolutionalModel(), {"cond_fn": pull(torch), "steps": 3, "start": start}
        assert not diffusion.ddim_sample_loop(model, (2, 3, 5, 7), **how).requires_grad
        assert torch.is_grad_enabled()

    def test_a_guided_loop_may_differentiate_inside(self) -> None:
        """guided-diffusion's conditions turn autograd on for themselves."""
        asked: list[torch.Tensor] = []

        def cond_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                asked.append(torch.autograd.grad(-(x**2).sum(), x)[0])
            return asked[-1]

        sf.GaussianDiffusion(SCHEDULE).p_sample_loop(half, (2, 1, 3, 3), steps=4, cond_fn=cond_fn)
        assert len(asked) == 4


class TestForward:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_in_everything_that_is_given(self, backend: str) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE, backend=backend)
        x_start, x_t, noise = (torch.randn(SHAPE, requires_grad=True) for _ in range(3))
        t = torch.full((3,), 90)
        signal, scale = (float(v[90]) for v in (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod))
        of_start, of_noise = torch.autograd.grad(diffusion.q_sample(x_start, t, noise).sum(), (x_start, noise))
        close(of_start, np.full(SHAPE, signal))
        close(of_noise, np.full(SHAPE, scale))
        drawn = diffusion.q_sample(x_start, t, seeds=torch.arange(3), indices=torch.arange(3))
        close(torch.autograd.grad(drawn.sum(), x_start)[0], np.full(SHAPE, signal))
        mean = diffusion.q_posterior_mean_variance(x_start, x_t, t)[0]
        of_start, of_x = torch.autograd.grad(mean.sum(), (x_start, x_t))
        close(of_start, np.full(SHAPE, SCHEDULE.posterior_mean_coef1[90]))
        close(of_x, np.full(SHAPE, SCHEDULE.posterior_mean_coef2[90]))


class TestLosses:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("prediction", "slope"), [("sample", -0.0584914), ("v_prediction", 0.3525582), ("epsilon", -0.0323589)]
    )
    def test_the_slope_in_x_start(self, prediction: str, slope: float, backend: str) -> None:
        """Of pixels of 0.4 under noise of 1, and a model that returns half of what it sees."""
        diffusion = sf.GaussianDiffusion(LINEAR, prediction=prediction, backend=backend)
        x_start = (0.4 * ONE).requires_grad_()
        losses = diffusion.training_losses(half, x_start, torch.tensor([500]), noise=ONE)
        (gradient,) = torch.autograd.grad(losses.sum(), x_start)
        close(gradient, np.full((1, 1, 2, 2), slope), 1.0)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @pytest.mark.parametrize("loss", ["mse", "kl", "rescaled_kl"])
    @pytest.mark.parametrize("t", [0, 90, TOTAL - 1])
    def test_in_x_start_and_in_a_weight(self, t: int, loss: str, prediction: str, backend: str) -> None:
        diffusion = sf.GaussianDiffusion(SCHEDULE, prediction=prediction, backend=backend)
        theirs = Diffusion(np.linspace(1e-3, 0.02, TOTAL), prediction=prediction)
        model, noise = ElementwiseModel(TOTAL), torch.randn(SHAPE)
        images = (torch.rand(SHAPE) * 0.8 - 0.4).requires_grad_()  # far tails drown in the formulas' own differences
        x0, eps = images.detach().double().numpy(), noise.double().numpy()
        losses = diffusion.training_losses(model, images, torch.full((3,), t), loss=loss, noise=noise)
        of_images, of_weight = torch.autograd.grad(losses.sum(), (images, model.weight))

        def exact(x0: Array, weight: float) -> float:
            return float(theirs.training_loss(partial(model.in_numpy, weight=weight), x0, t, eps, loss).sum())

        size = sum(float(value.detach().abs().sum()) for value in (of_images, of_weight, losses))
        bound = tolerance(torch.float32, size, 1024)  # exponents and logarithms of the bound magnify roundings
        assert float(of_weight) == pytest.approx(rise(lambda w: np.array(exact(x0, w)), 0.9), rel=0, abs=bound)
        for place in ((0, 0, 0, 0), (1, 1, 2, 4), (2, 0, 1, 3)):

            def moved(value: Any, place: tuple[int, ...] = place) -> Array:
                changed = x0.copy()
                changed[place] = value
                return np.array(exact(changed, 0.9))

            assert float(of_images[place]) == pytest.approx(float(rise(moved, x0[place])), rel=0, abs=bound)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_bound_of_a_learned_variance_in_x_start(self, backend: str) -> None:
        """Both backends give one gradient, and it is there."""
        model = ConvolutionalModel(learned=True).eval()
        images, noise = torch.rand(2, 3, 5, 7) * 2 - 1, torch.randn(2, 3, 5, 7)
        gradients = []
        for name in (backend, "reference"):
            x_start = images.clone().requires_grad_()
            diffusion = sf.GaussianDiffusion(SCHEDULE, variance="learned_range", backend=name)
            loss = diffusion.training_losses(model, x_start, torch.tensor([0, 70]), loss="rescaled_mse", noise=noise)
            gradients.append(torch.autograd.grad(loss.sum(), x_start)[0])
        assert torch.equal(*gradients)
        assert (gradients[0] != 0).any()
