"""The losses of EDM and of flow matching: the authors' formulas in float64, Gaussian data, draws, bad input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepfusion.diffusion.path_losses import edm_loss, flow_loss
from stepfusion.kernels.tolerance import tolerance
from stepfusion.samplers.path import FlowPath, SigmaPath
from stepfusion_testing.ambient import AMBIENT

norm = pytest.importorskip("scipy.stats").norm

SHAPES = [(4, 3, 5, 7), (4, 2, 9), (4, 1, 1, 1), (4,), (4, 2, 2, 3, 2)]
EDM, FLOW = SigmaPath(sigma_data=0.7), FlowPath(told_scale=1000.0)
SIGMA = torch.tensor([0.002, 0.3, 1.5, 80.0], dtype=torch.float64)
TIME = torch.tensor([0.0, 0.3, 0.75, 1.0], dtype=torch.float64)


def pictures(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and noise."""
    random = torch.Generator().manual_seed(0)
    x0 = torch.rand(shape, generator=random, dtype=torch.float64) * 2 - 1
    return x0.to(dtype), torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)


def network(x: Tensor, told: Tensor) -> Tensor:
    """Some function of both."""
    return torch.tanh(0.8 * x + told.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) / 7 + 0.1)


def each(values: Tensor, like: Tensor) -> np.ndarray:
    return values.numpy().reshape(-1, *[1] * (like.ndim - 1))


def edm_by_hand(function: Callable[..., Tensor], x0: Tensor, eps: Tensor, sigma: Tensor, data: float) -> np.ndarray:
    """lambda(sigma) |D(x; sigma) - x0|^2 as the paper's tables say, in float64 (Karras et al. 2022, equation 8)."""
    s = each(sigma, x0)
    c_skip, c_out = data**2 / (s**2 + data**2), s * data / np.sqrt(s**2 + data**2)
    c_in, c_noise = 1 / np.sqrt(s**2 + data**2), torch.log(sigma) / 4
    x = x0.numpy() + s * eps.numpy()
    denoised = c_skip * x + c_out * function(torch.from_numpy(c_in * x), c_noise).numpy()
    weight = (s**2 + data**2) / (s * data) ** 2
    return (weight * (denoised - x0.numpy()) ** 2).reshape(len(x0), -1).mean(1)


def flow_by_hand(function: Callable[..., Tensor], x0: Tensor, eps: Tensor, t: Tensor) -> np.ndarray:
    s = each(t, x0)
    x = torch.from_numpy((1 - s) * x0.numpy() + s * eps.numpy())
    errors = (function(x, 1000 * t).numpy() - (eps.numpy() - x0.numpy())) ** 2
    return errors.reshape(len(x0), -1).mean(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_has_the_authors_formulas(shape: tuple[int, ...]) -> None:
    """Where sigma is small, the weighted difference loses digits that the loss here keeps: 1 / sigma^2 of them."""
    x0, eps = pictures(shape)

    def told_in_float32(x: Tensor, told: Tensor) -> Tensor:
        return network(x, told.float())

    loss = edm_loss(network, EDM, x0, sigma=SIGMA, noise=eps)
    assert (loss.shape, loss.dtype) == ((4,), torch.float64)
    np.testing.assert_allclose(loss, edm_by_hand(told_in_float32, x0, eps, SIGMA, 0.7), rtol=1e-9)
    loss = flow_loss(network, FLOW, x0, t=TIME, noise=eps)
    assert (loss.shape, loss.dtype) == ((4,), torch.float64)
    np.testing.assert_allclose(loss, flow_by_hand(told_in_float32, x0, eps, TIME), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("levels", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_differ_by_rounding(dtype: torch.dtype, levels: torch.dtype) -> None:
    x0, eps = pictures((4, 3, 5, 7), dtype)
    seen = []

    def watched(x: Tensor, told: Tensor) -> Tensor:
        seen.append((x.dtype, told.dtype))
        return network(x, told)

    found = {
        "edm": edm_loss(watched, EDM, x0, sigma=SIGMA.to(levels), noise=eps),
        "flow": flow_loss(watched, FLOW, x0, t=TIME.to(levels), noise=eps),
    }
    wide = x0.double(), eps.double()
    exact = {"edm": edm_by_hand(network, *wide, SIGMA, 0.7), "flow": flow_by_hand(network, *wide, TIME)}
    assert seen == [(dtype, torch.float32)] * 2
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        # the error of the output, at most 5, times its rounding, twice: the derivative of a square
        atol = 2 * 5 * tolerance(dtype, 5.0, 64)
        np.testing.assert_allclose(loss, exact[name], rtol=0, atol=atol)


def test_labels_reach_the_network_and_their_absence_too() -> None:
    x0, eps = pictures((4, 2, 3))
    labels = torch.tensor([3, 1, 4, 1])
    given: list[tuple[Tensor, ...]] = []

    def conditioned(x: Tensor, *others: Tensor) -> Tensor:
        given.append(others)
        return x

    edm_loss(conditioned, EDM, x0, sigma=SIGMA, noise=eps, labels=labels)
    flow_loss(conditioned, FLOW, x0, t=TIME, noise=eps, labels=labels)
    flow_loss(conditioned, FLOW, x0, t=TIME, noise=eps)
    assert [len(others) for others in given] == [2, 2, 1]
    assert given[0][1] is labels
    torch.testing.assert_close(given[0][0], (SIGMA.log() / 4).float())
    torch.testing.assert_close(given[1][0], (1000 * TIME).float())


# Gaussian data: the best network, and the loss that is left, are known.

ELEMENTS = 1 << 16
MEAN, STD = 0.3, 0.4


def gaussian(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Images whose pixels are N(MEAN, STD^2), and noise: float64 [B, ELEMENTS]."""
    random = torch.Generator().manual_seed(1)
    x0, eps = torch.randn((2, len(sigma), ELEMENTS), generator=random, dtype=torch.float64)
    return MEAN + STD * x0, eps


def best_edm(data: float, skew: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The raw output whose D is E[x0 | x]."""

    def function(shown: Tensor, c_noise: Tensor) -> Tensor:
        sigma = (4 * c_noise.double()).exp()[:, None]
        root = (sigma**2 + data**2).sqrt()
        x = shown * root
        denoised = MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)
        return (denoised - data**2 / root**2 * x) * root / (sigma * data) + skew

    return function


@pytest.mark.parametrize("data", [STD, 0.5, 1.3])
def test_the_loss_that_edms_best_network_leaves(data: float) -> None:
    """lambda Var(x0 | x) = (sigma^2 + sigma_data^2) s^2 / (sigma_data^2 (sigma^2 + s^2)): 1 if sigma_data is s."""
    sigma = torch.tensor([0.01, 0.2, 1.0, 5.0, 80.0], dtype=torch.float64)
    x0, eps = gaussian(sigma)
    path = SigmaPath(sigma_data=data)
    loss = edm_loss(best_edm(data), path, x0, sigma=sigma, noise=eps)
    left = (sigma**2 + data**2) * STD**2 / (data**2 * (sigma**2 + STD**2))
    torch.testing.assert_close(loss / left, torch.ones_like(left), rtol=0, atol=5 * math.sqrt(2 / ELEMENTS))
    worse = edm_loss(best_edm(data, skew=0.2), path, x0, sigma=sigma, noise=eps)
    torch.testing.assert_close(worse - loss, torch.full_like(loss, 0.04), rtol=0, atol=0.01)


def best_flow(x: Tensor, told: Tensor, skew: float = 0.0) -> Tensor:
    """E[eps - x0 | x] on the straight path, by the regression of eps - x0 on x."""
    t = (told.double() / 1000)[:, None]
    slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return slope * (x - (1 - t) * MEAN) - MEAN + skew


def test_the_loss_that_the_best_velocity_leaves() -> None:
    """Var(eps - x0 | x) = s^2 / ((1 - t)^2 s^2 + t^2)."""
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    x0, eps = gaussian(t)
    loss = flow_loss(best_flow, FLOW, x0, t=t, noise=eps)
    left = STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    torch.testing.assert_close(loss / left, torch.ones_like(left), rtol=0, atol=5 * math.sqrt(2 / ELEMENTS))
    worse = flow_loss(lambda x, told: best_flow(x, told, 0.2), FLOW, x0, t=t, noise=eps)
    torch.testing.assert_close(worse - loss, torch.full_like(loss, 0.04), rtol=0, atol=0.01)


class Weighted(torch.nn.Module):
    """A network with parameters, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.6, dtype=torch.float64))
        self.shift = torch.nn.Parameter(torch.tensor(-0.2, dtype=torch.float64))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return torch.tanh(self.gain * x + self.shift) + told.view(-1, 1, 1, 1).to(x.dtype) / 1000


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_gradients_are_those_of_the_formula(name: str) -> None:
    model, (x0, eps) = Weighted(), pictures((4, 2, 3, 5))

    def loss(gain: Tensor, shift: Tensor, x_start: Tensor) -> Tensor:
        def function(x: Tensor, told: Tensor) -> Tensor:
            return torch.func.functional_call(model, {"gain": gain, "shift": shift}, (x, told))

        if name == "edm":
            return edm_loss(function, EDM, x_start, sigma=SIGMA, noise=eps)
        return flow_loss(function, FLOW, x_start, t=TIME, noise=eps)

    inputs = (model.gain, model.shift, x0.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    gradients = torch.autograd.grad(loss(*inputs).mean(), inputs)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_an_image_has_its_loss_whatever_is_beside_it(name: str) -> None:
    x0, eps = pictures((4, 3, 4, 4), torch.float32)

    def losses(part: slice) -> Tensor:
        if name == "edm":
            return edm_loss(network, EDM, x0[part], sigma=SIGMA[part], noise=eps[part])
        return flow_loss(network, FLOW, x0[part], t=TIME[part], noise=eps[part])

    whole = losses(slice(None))
    alone = torch.cat([losses(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=0)
    assert losses(slice(0, 0)).shape == (0,)


# What is drawn


def drawn(name: str, count: int = 500, **options: Any) -> tuple[Tensor, Tensor]:
    """What a network is shown and told of images that are all zero, of one pixel."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x: Tensor, told: Tensor) -> Tensor:
        seen.append((x, told.double()))
        return x

    loss, path = (edm_loss, EDM) if name == "edm" else (flow_loss, options.pop("path", FLOW))
    loss(watched, path, torch.zeros(count, 1), **{"step": 0, **options})
    return seen[0]


def quantiles(name: str, told: Tensor, options: dict[str, Any]) -> np.ndarray:
    """Where in its distribution each level lies."""
    if name == "edm":
        mean, std = options.get("p_mean", -1.2), options.get("p_std", 1.2)
        return norm.cdf((4 * told.numpy() - mean) / std)
    t = told.numpy() / 1000
    if options.get("times") != "logit-normal":
        return t
    return norm.cdf((np.log(t / (1 - t)) - options.get("logit_mean", 0.0)) / options.get("logit_std", 1.0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("edm", {}),
        ("edm", {"p_mean": 0.5, "p_std": 0.7}),
        ("flow", {}),
        ("flow", {"times": "logit-normal"}),
        ("flow", {"times": "logit-normal", "logit_mean": -0.5, "logit_std": 2.0}),
    ],
    ids=str,
)
def test_levels_are_one_of_each_part_of_their_distribution(name: str, options: dict[str, Any]) -> None:
    _, told = drawn(name, **options)
    places = 500 * quantiles(name, told, options)
    assert (np.abs(places - np.arange(500) - 0.5) <= 0.5 + 1e-3).all()  # rounded to float32
    assert 0.4 < (places % 1).std() * math.sqrt(12) / 2 < 0.6  # and evenly within their part


def test_a_path_shifts_the_times_that_are_drawn() -> None:
    _, plain = drawn("flow")
    _, shifted = drawn("flow", path=FlowPath(3.0, told_scale=1000.0))
    t = plain / 1000
    torch.testing.assert_close(shifted / 1000, 3 * t / (1 + 2 * t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"p_mean": 100.0, "p_std": 10.0}, {"p_mean": -100.0, "p_std": 10.0}, {"p_std": 0.0}], ids=str
)
def test_extreme_distributions_are_drawn_from_too(options: dict[str, float]) -> None:
    shown, told = drawn("edm", **options)
    assert shown.isfinite().all()
    assert told.isfinite().all()


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_draws_are_a_function_of_seed_and_step(name: str) -> None:
    first, again = drawn(name, seed=3, step=7), drawn(name, seed=3, step=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ({"seed": 4, "step": 7}, {"seed": 3, "step": 8}):
        assert all(not torch.equal(a, b) for a, b in zip(first, drawn(name, **other), strict=True))


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_the_noise_does_not_depend_on_given_levels(name: str) -> None:
    shown, told = drawn(name, 64, step=2)
    given = {"sigma": (4 * told).exp()} if name == "edm" else {"t": told / 1000}
    torch.testing.assert_close(drawn(name, 64, step=2, **given)[0], shown, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", AMBIENT)
def test_ambient_settings_change_nothing(setting: str) -> None:
    x0 = pictures((4, 2, 3, 5), torch.float32)[0]

    def losses() -> list[Tensor]:
        return [
            edm_loss(network, EDM, x0, step=1),
            flow_loss(network, FLOW, x0, step=1, times="logit-normal"),
        ]

    plain = losses()
    with AMBIENT[setting]():
        given = losses()
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))


def test_a_network_may_return_what_diffusers_models_do() -> None:
    class Output:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    x0, eps = pictures((4, 2, 3), torch.float32)
    wrapped = edm_loss(lambda x, told: Output(network(x, told)), EDM, x0, sigma=SIGMA, noise=eps)
    assert torch.equal(wrapped, edm_loss(network, EDM, x0, sigma=SIGMA, noise=eps))


@pytest.mark.parametrize("loss", [edm_loss, flow_loss])
@pytest.mark.parametrize("given", [True, False])
def test_all_that_a_network_sees_is_on_the_device_of_the_images(loss: Callable[..., Tensor], given: bool) -> None:
    """Levels stay on the CPU, where they are looked at."""
    x0 = torch.empty(4, 2, 3, device="meta")
    seen: list[Tensor] = []

    def watched(x: Tensor, told: Tensor) -> Tensor:
        seen.extend((x, told))
        return x

    levels = {"sigma" if loss is edm_loss else "t": torch.full((4,), 0.5)}
    arguments = {**levels, "noise": torch.empty_like(x0)} if given else {"step": 0}
    losses = loss(watched, EDM if loss is edm_loss else FLOW, x0, **arguments)
    assert [x.device.type for x in (*seen, losses)] == ["meta"] * 3


X, S = torch.zeros(2, 1, 4), torch.ones(2)


def never(x: Tensor, told: Tensor) -> Tensor:
    raise AssertionError("the network was called")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: edm_loss(never, FLOW, X, step=0), TypeError, "path must be a SigmaPath, got FlowPath"),
        (lambda: flow_loss(never, EDM, X, step=0), TypeError, "path must be a FlowPath, got SigmaPath"),
        (lambda: edm_loss(never, EDM, X), ValueError, "step is needed to draw what is not given: another one in"),
        (lambda: flow_loss(never, FLOW, X, t=S), ValueError, "step is needed to draw what is not given"),
        (lambda: edm_loss(never, EDM, X, step=-1), ValueError, "step must be in [0, 2147483647], got -1"),
        (lambda: edm_loss(never, EDM, X, seed=0.5, step=1), TypeError, "seed must be an integer, got 0.5"),
        (lambda: edm_loss(never, EDM, X.long(), step=0), TypeError, "x_start must be float16 or bfloat16 or float32"),
        (lambda: edm_loss(never, EDM, X[0, 0, 0], step=0), ValueError, "x_start must have a batch dimension"),
        (
            lambda: edm_loss(never, EDM, X, noise=X[:1], step=0),
            ValueError,
            "noise must have shape [2, 1, 4], got [1,",
        ),
        (lambda: edm_loss(never, EDM, X, sigma=2.0, noise=X), TypeError, "sigma must be a tensor, got float"),
        (
            lambda: edm_loss(never, EDM, X, sigma=S.long(), noise=X),
            TypeError,
            "sigma must be float32 or float64, got",
        ),
        (
            lambda: edm_loss(never, EDM, X, sigma=S.half(), noise=X),
            TypeError,
            "sigma must be float32 or float64, got",
        ),
        (lambda: edm_loss(never, EDM, X, sigma=S[:1], noise=X), ValueError, "sigma must have shape [2], got [1]"),
        (
            lambda: edm_loss(never, EDM, X, sigma=S - 1, noise=X),
            ValueError,
            "sigma must be a finite number above 0 f",
        ),
        (lambda: edm_loss(never, EDM, X, sigma=S / 0, noise=X), ValueError, "for each image, got inf"),
        (lambda: edm_loss(never, EDM, X, sigma=S * math.nan, noise=X), ValueError, "for each image, got nan"),
        (lambda: edm_loss(never, EDM, X, p_std=-1, step=0), ValueError, "p_std must be a finite number in [0, 10]"),
        (lambda: edm_loss(never, EDM, X, p_mean=math.nan, step=0), ValueError, "p_mean must be a finite number in"),
        (
            lambda: flow_loss(never, FLOW, X, t=S + 0.1, noise=X),
            ValueError,
            "t must be a number in [0, 1] for each i",
        ),
        (lambda: flow_loss(never, FLOW, X, t=S - 1.1, noise=X), ValueError, "for each image, got -0.1"),
        (
            lambda: flow_loss(never, FLOW, X, times="cosine", step=0),
            ValueError,
            "times must be one of 'uniform', 'lo",
        ),
        (lambda: flow_loss(never, FLOW, X, logit_std="a", step=0), TypeError, "logit_std must be a number, got 'a'"),
        (
            lambda: edm_loss(lambda x, c: x[:1], EDM, X, step=0),
            ValueError,
            "the network's output must have shape [2,",
        ),
        (
            lambda: edm_loss(lambda x, c: None, EDM, X, step=0),
            TypeError,
            "the network's output must be a tensor, got",
        ),
    ],
)
def test_refuses(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
