"""Gradients: the references against finite differences, and the fused functions, which leave them to these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from stepfusion import kernels
from stepfusion.kernels import launch, reference
from stepfusion.kernels.coefficients import DEFAULTS
from stepfusion.kernels.tolerance import tolerance

# PyTorch's forward mode itself calls torch.jit.script: which category its warning has depends on the version.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*torch.jit.script.*:{category}")
    for category in ("DeprecationWarning", "FutureWarning")
]

Arguments = dict[str, Any]

SHAPE = (4, 2, 3)  # four lanes
ROWS = torch.tensor([2, 0, kernels.PARKED, 1])
T = 5


def table(**columns: float | torch.Tensor) -> torch.Tensor:
    """A table of three rows that use every column but those for history, knowledge and thresholds, float64."""
    names = ("x0_x", "x0_out", "next_x0", "next_x", "next_out")
    values = {name: torch.tensor([0.9, -0.4, 1.2]) + 0.1 * i for i, name in enumerate(names)}
    values |= {"clip": torch.tensor([torch.inf, 0.6, 0.8]), "sigma": torch.tensor([0.0, 0.7, 0.5])}
    values |= {"half_log_min": torch.tensor([0.0, -0.3, -0.2]), "half_log_span": torch.tensor([0.0, 0.4, 0.5])}
    values |= {name: torch.as_tensor(value).expand(3) for name, value in columns.items()}
    rest = {name: torch.full((3,), value) for name, value in DEFAULTS.items()}
    return torch.stack([(rest | values).get(name, torch.zeros(3)) for name in kernels.COLUMNS], dim=1).double()


def step(**options: Any) -> Arguments:
    """Arguments of a step in float64, those that may have a gradient and those that may not."""
    given: Arguments = {"x": torch.randn(SHAPE).double(), "out": torch.randn(SHAPE).double(), "rows": ROWS}
    given |= {"coefficients": table(), "timesteps": torch.tensor([7, 8, 9])}
    return given | options


def forward() -> Arguments:
    levels = torch.rand(2, T).double() + 0.1
    tables = dict(zip(("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"), levels, strict=True))
    return {"x_start": torch.randn(SHAPE).double(), "t": torch.tensor([0, 4, 2, 2]), **tables}


def posterior() -> Arguments:
    names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped")
    images = {"x_start": torch.randn(SHAPE).double(), "x_t": torch.randn(SHAPE).double()}
    return {**images, "t": torch.tensor([0, 4, 2, 2]), **{name: torch.rand(T).double() for name in names}}


def single() -> Arguments:
    abar = torch.linspace(0.95, 0.05, T).double()
    between = {"t": torch.tensor([4, 3, 2, 0]), "t_prev": torch.tensor([2, 2, 1, -1]), "alphas_cumprod": abar}
    return {"x": torch.randn(SHAPE).double(), "out": torch.randn(SHAPE).double(), **between}


def norm(**options: Any) -> Arguments:
    x = torch.randn(2, 6, 3, 2).double()
    return {
        "x": x,
        "weight": torch.randn(6).double(),
        "bias": torch.randn(6).double(),
        "groups": 3,
        "eps": 1e-2,
        **options,
    }


def layer_norm(*more: str) -> Arguments:
    modulations = {name: torch.randn(2, 5).double() for name in ("scale", "shift", *more)}
    return {"x": torch.randn(2, 3, 5).double(), **modulations, "eps": 1e-2}


def images() -> torch.Tensor:
    return torch.randn(SHAPE).double()


LANES: Arguments = {"seeds": torch.arange(4), "indices": torch.arange(4)}
CASES: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "step": ("diffusion_step", step),
    "step, noise given": ("diffusion_step", lambda: step(noise=images())),
    "step, noise drawn": ("diffusion_step", lambda: step(**LANES)),
    "step, learned variance": ("diffusion_step", lambda: step(out=torch.randn(4, 4, 3).double(), noise=images())),
    "step, guidance": (
        "diffusion_step",
        lambda: step(out_uncond=images(), guidance=torch.tensor([1.5, 0.0, 3.0, 7.5]).double()),
    ),
    "step, x0": ("diffusion_step", lambda: step(x0=images())),
    "step, history": ("diffusion_step", lambda: step(coefficients=table(next_prev=0.3), history=images()[None])),
    "step, all history": (
        "diffusion_step",
        lambda: step(
            coefficients=table(next_prev=0.3, next_prev2=-0.2, next_prev3=0.1, keep_x=0.4, keep_x0=-0.7),
            history=torch.randn(3, *SHAPE).double(),
        ),
    ),
    "step, rescaled guidance": (
        "diffusion_step",
        lambda: step(
            coefficients=table(rescale=torch.tensor([0.7, 0.0, 1.0]), unguided=torch.tensor([0.0, 0.0, 1.0])),
            out_uncond=images(),
            guidance=torch.tensor([1.5, 3.0, 3.0, 7.5]).double(),
        ),
    ),
    "step, threshold": (
        "diffusion_step",
        lambda: step(coefficients=table(threshold=torch.tensor([0.0, 0.7, 0.8]), threshold_max=1.5)),
    ),
    "step, a known region": (
        "diffusion_step",
        lambda: step(
            coefficients=table(known_x=0.8, known_sigma=0.3),
            known=torch.where(torch.arange(3) < 1, images(), torch.nan),
            noise=images(),
        ),
    ),
    "ddim_step": ("ddim_step", lambda: single() | {"eta": 0.7, "noise": images()}),
    "ddpm_step": ("ddpm_step", lambda: single() | {"noise": images()}),
    "q_sample, noise given": ("q_sample", lambda: forward() | {"noise": images()}),
    "q_sample, noise drawn": ("q_sample", lambda: forward() | LANES),
    "q_posterior": ("q_posterior_mean_variance", posterior),
    "group norm": ("group_norm_silu", norm),
    "group norm, all": (
        "group_norm_silu",
        lambda: norm(
            skip=torch.randn(2, 3, 3, 2).double(),
            weight=torch.randn(9).double(),
            bias=torch.randn(9).double(),
            **{name: torch.randn(2, 9).double() for name in ("time", "scale", "shift")},
        ),
    ),
    "layer norm": ("layer_norm_modulate", layer_norm),
    "layer norm of a sum": (
        "add_layer_norm_modulate",
        lambda: layer_norm("gate") | {"branch": torch.randn(2, 3, 5).double()},
    ),
}  # fmt: skip

# Through these no gradient is asked for: a row's columns switch parts on and off, a level of 1 has a root of 0, a
# free pixel is NaN, and a buffer is written to.
CONSTANT = ("coefficients", "alphas_cumprod", "known", "x0")


def leaves(arguments: Arguments) -> list[str]:
    """The arguments through which a gradient passes."""
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    return [key for key, value in tensors.items() if value.is_floating_point() and key not in CONSTANT]


def result(function: Callable[..., Any], arguments: Arguments) -> torch.Tensor:
    """All that a function returns, and what it writes beside it."""
    buffers = {name: arguments[name].clone() for name in ("x0", "history") if name in arguments}
    found = function(**{**arguments, **buffers})
    returned = found if isinstance(found, tuple) else (found,)
    return torch.cat([value.flatten() for value in (*returned, *buffers.values())])


@pytest.mark.parametrize("name", CASES)
def test_the_references_have_the_gradient_of_what_they_compute(name: str) -> None:
    function, make = CASES[name]
    arguments = make()
    names = leaves(arguments)
    values = [arguments[key].requires_grad_() for key in names]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return result(getattr(reference, function), arguments | dict(zip(names, tensors, strict=True)))

    assert len(names) >= 2
    assert torch.autograd.gradcheck(call, values, check_forward_ad=True)


def float32(arguments: Arguments) -> Arguments:
    """The same arguments in the dtypes that kernels take; abar stays float64."""
    return {
        name: value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value
        for name, value in arguments.items()
    }


def gradients(function: Callable[..., Any], arguments: Arguments, names: list[str]) -> dict[str, torch.Tensor]:
    """The gradient, for each of ``names``, of a weighted sum of what the function returns."""
    given = arguments | {key: arguments[key].detach().clone().requires_grad_() for key in names}
    found = result(function, given)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype, device=found.device)
    grads = torch.autograd.grad((found * weights).sum(), [given[key] for key in names])
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if not {"threshold", "rescaled"} & set(name.split())])
def test_the_fused_functions_have_it_too(name: str, kernel_device: torch.device) -> None:
    """Each input alone requires a gradient, then all of them; the truth is the reference in float64."""
    function, make = CASES[name]
    exact = make()
    names = leaves(exact)
    on_device = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in float32(exact).items()}
    truth = gradients(getattr(reference, function), exact, names)
    for asked in ([key] for key in names):
        found = gradients(getattr(kernels, function), on_device, asked)
        magnitude = float(truth[asked[0]].abs().max()) + 10.0
        atol = tolerance(torch.float32, magnitude, 64)
        torch.testing.assert_close(found[asked[0]].double().cpu(), truth[asked[0]], rtol=0, atol=atol)
    assert set(gradients(getattr(kernels, function), on_device, names)) == set(names)


@pytest.mark.parametrize("name", ["step", "q_sample, noise given"])
def test_without_the_rule_a_fused_result_is_a_constant(
    name: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: it is the rule that keeps the gradient."""
    function, make = CASES[name]
    arguments = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in float32(make()).items()}
    first = leaves(arguments)[0]
    arguments[first].requires_grad_()
    assert result(getattr(kernels, function), arguments).requires_grad
    monkeypatch.setattr(launch, "needs_gradient", lambda *_: False)
    assert not result(getattr(kernels, function), arguments).requires_grad


def test_in_forward_mode_too(kernel_device: torch.device) -> None:
    arguments = {k: v.to(kernel_device) for k, v in float32(forward() | {"noise": images()}).items()}
    with torch.no_grad(), forward_ad.dual_level():
        arguments["x_start"] = forward_ad.make_dual(arguments["x_start"], torch.ones_like(arguments["x_start"]))
        x_t, _ = kernels.q_sample(**arguments)
        tangent = forward_ad.unpack_dual(x_t).tangent
        assert tangent is not None
        signal = arguments["sqrt_alphas_cumprod"][arguments["t"]].view(-1, 1, 1)
        assert torch.equal(tangent, signal.expand(SHAPE))


def test_without_autograd_the_kernels_run(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, what requires a gradient is as any other."""
    arguments = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in float32(step()).items()}
    arguments["x"].requires_grad_()
    monkeypatch.setattr("stepfusion.kernels.step.diffusion_step_reference", None)
    with torch.no_grad():
        kernels.diffusion_step(**arguments)
    with pytest.raises(TypeError, match="not callable"):
        kernels.diffusion_step(**arguments)


def test_a_result_is_the_same_with_a_gradient_and_without() -> None:
    arguments = step(noise=images())
    plain = reference.diffusion_step(**arguments)
    arguments["x"].requires_grad_()
    assert torch.equal(reference.diffusion_step(**arguments).detach(), plain)


def test_the_gradient_of_the_clip() -> None:
    """1 inside and at the bounds, and 0 beyond, whatever this version of PyTorch has for ``clamp``."""
    x = torch.tensor([[-1.5, -1.0, 0.2, 1.0, 1.5]], requires_grad=True)
    columns = table(x0_x=1.0, x0_out=0.0, clip=1.0, next_x0=1.0, next_x=0.0, next_out=0.0, sigma=0.0).float()
    given = (torch.zeros(1, 5), torch.tensor([1]), columns, torch.tensor([7, 8, 9]))
    (gradient,) = torch.autograd.grad(reference.diffusion_step(x, *given).sum(), x)
    assert gradient.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


def test_a_threshold_of_other_lanes_leaves_gradients_finite() -> None:
    """Lane 1 has no threshold: what thresholding would make of it has no gradient."""
    arguments = step(
        coefficients=table(threshold=torch.tensor([0.0, 0.7, 0.8]), threshold_max=torch.tensor([0.0, 1, 1]))
    )
    arguments["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(reference.diffusion_step(**arguments).sum(), arguments["x"])
    assert gradient.isfinite().all()
    assert (gradient[1] != 0).all()
