"""The ops as PyTorch sees them (opcheck, torch.compile, torch.export), and what each says of a bad argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import backend, launch, reference
from stepfusion_testing.twins import StepCase, assert_same_bits

Call = Callable[[], object]

STEPS = [
    StepCase((3, 4, 5), torch.float16, "drawn", copies=2),
    StepCase((3, 4, 5), torch.bfloat16, "given", learned=True, guidance=(7.5, 1.0, 0.0, 2.0)),
    StepCase((7,), torch.float32, "none", copies=0, x0=False),
    StepCase((3, 4), torch.float32, "drawn", history=1, known=True),
    StepCase((3, 4), torch.bfloat16, "none", history=3, x0=False),
]
T = 10


def _step_arguments(case: StepCase, device: torch.device) -> dict[str, Any]:
    """Every argument of the op, by name."""
    optional = ("seeds", "indices", "noise", "out_uncond", "guidance", "x_net", "x0", "flags", "known", "history")
    return dict.fromkeys(optional) | case.arguments(device) | {"fill": False}


def _forward(device: torch.device) -> dict[str, Any]:
    return {
        "x_start": torch.randn(2, 3, 4, device=device),
        "t": torch.tensor([0, T - 1], device=device),
        "sqrt_alphas_cumprod": torch.linspace(0.9, 0.1, T, device=device),
        "sqrt_one_minus_alphas_cumprod": torch.linspace(0.1, 0.9, T, device=device),
        "noise": torch.randn(2, 3, 4, device=device),
    }


def _posterior(device: torch.device) -> dict[str, Any]:
    names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped")
    given = {"x_start": torch.randn(2, 3, 4), "x_t": torch.randn(2, 3, 4), "t": torch.tensor([0, T - 1])}
    return {n: tensor.to(device) for n, tensor in (given | {name: torch.rand(T) for name in names}).items()}


def _lanes(device: torch.device) -> dict[str, Any]:
    return {name: torch.tensor([1, 2], device=device) for name in ("seeds", "indices", "timesteps")}


def _single(device: torch.device) -> dict[str, Any]:
    return {
        "x": torch.randn(2, 3, 4, device=device),
        "out": torch.randn(2, 3, 4, device=device),
        "t": torch.tensor([5, 9], device=device),
        "t_prev": torch.tensor([-1, 4], device=device),
        "alphas_cumprod": torch.linspace(0.99, 0.01, T, dtype=torch.float64, device=device),
    }


# As PyTorch sees them


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_opcheck_of_the_step(case: StepCase, kernel_device: torch.device) -> None:
    op = torch.ops.stepfusion.diffusion_step_.default
    torch.library.opcheck(op, (), _step_arguments(case, kernel_device))


def test_opcheck_of_the_others(kernel_device: torch.device) -> None:
    ops = torch.ops.stepfusion
    x, _, *tables = _forward(kernel_device).values()
    t = torch.tensor([0, T - 1], device=kernel_device)
    torch.library.opcheck(ops.q_sample_.default, (x, t, *tables[:2], t, t, None, torch.empty_like(x), x.clone()))
    torch.library.opcheck(ops.q_sample_.default, (x, t, *tables[:2], None, None, x, torch.empty_like(x), None))
    torch.library.opcheck(ops.q_posterior.default, tuple(_posterior(kernel_device).values()))
    torch.library.opcheck(ops.to_uint8.default, (torch.randn(2, 3, 4, 5, device=kernel_device),))
    torch.library.opcheck(ops.normal_.default, (t, t, t, 0, x.clone()))


def _keeping(history: torch.Tensor, **others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A step, and what it leaves in a copy of the history."""
    kept = history.clone()
    return kernels.diffusion_step(**others, history=kept), kept


def _calls(device: torch.device) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every public op with arguments that it takes."""
    step = STEPS[0].arguments(device)
    in_place = {name: tensor for name, tensor in step.items() if name not in ("x_next", "x_net", "x0", "flags")}
    drawn = {name: value for name, value in _forward(device).items() if name != "noise"}
    lanes = {name: torch.tensor([3, 4], device=device) for name in ("seeds", "indices")}
    return {
        "diffusion_step": (kernels.diffusion_step, in_place),
        "diffusion_step with a history": (
            _keeping,
            {n: t for n, t in STEPS[3].arguments(device).items() if n not in ("x_next", "x_net", "x0", "flags")},
        ),
        "ddim_step": (kernels.ddim_step, _single(device)),
        "ddpm_step": (kernels.ddpm_step, _single(device) | lanes),
        "q_sample": (kernels.q_sample, drawn | lanes),
        "q_posterior_mean_variance": (kernels.q_posterior_mean_variance, _posterior(device)),
        "to_uint8": (kernels.to_uint8, {"x": torch.randn(2, 3, 4, 5, device=device)}),
        "normal": (kernels.normal, _lanes(device) | {"shape": (3, 4)}),
    }


NAMES = sorted(_calls(torch.device("cpu")))


def _same(got: object, want: object) -> None:
    if isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert_same_bits("result", got.float(), want.float())
        return
    assert isinstance(want, tuple)
    assert isinstance(got, tuple)
    for a, b in zip(got, want, strict=True):
        _same(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name: str, kernel_device: torch.device) -> None:
    function, arguments = _calls(kernel_device)[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _same(compiled(**arguments), function(**arguments))


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_cache")
def test_compiles_with_inductor(kernel_device: torch.device) -> None:
    """Buffers that the op writes in place stay the caller's."""
    case = StepCase((3, 4, 5), torch.float32, "drawn", copies=2, history=2, rows=(1, 2))
    given = case.arguments(kernel_device)

    def tick(x: torch.Tensor, x_net: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(x_net[: len(x)]) * 0.5
        kernels.diffusion_step(x, **{**others, "out": out, "x_next": x, "x_net": x_net})
        return out

    results = []
    for function in (tick, torch.compile(tick, fullgraph=True)):
        buffers = {name: tensor.clone() for name, tensor in given.items()}
        buffers["x_net"] = torch.ones_like(buffers["x_net"])
        for _ in range(2):
            function(**buffers)
        results.append(buffers)
    eager, compiled = results
    assert_same_bits("flags", compiled["flags"], eager["flags"])
    for name in ("x", "x_net", "x0", "history"):  # Inductor's tanh is its own
        torch.testing.assert_close(compiled[name], eager[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_exports(name: str, kernel_device: torch.device) -> None:
    function, arguments = _calls(kernel_device)[name]

    class Module(torch.nn.Module):
        def forward(self, **tensors: torch.Tensor) -> Any:
            return function(**tensors, **constants)

    constants = {n: value for n, value in arguments.items() if not isinstance(value, torch.Tensor)}
    tensors = {n: value for n, value in arguments.items() if isinstance(value, torch.Tensor)}
    program = torch.export.export(Module(), (), tensors)
    assert any("stepfusion" in str(node.target) for node in program.graph.nodes)
    _same(program.module()(**tensors), function(**arguments))


# What each says of a bad argument

META = torch.device("meta")


def _bad(value: torch.Tensor, how: str) -> Any:
    """``value`` spoilt in one way."""
    return {
        "list": lambda: [1.0],
        "long": lambda: torch.cat([value, value[:1]]),
        "short": lambda: value[:-1],
        "flat": lambda: value[0],
        "none": lambda: value[:0],
        "many": lambda: torch.cat([value, value]),
        "lanes": lambda: value[:, :-1],
        "uint8": lambda: value.to(torch.uint8),
        "double": lambda: value.to(torch.float64),
        "float": lambda: value.to(torch.float32),
        "half": lambda: value.to(torch.float16),
        "meta": lambda: value.to(META),
        "strided": lambda: torch.stack([value, value], dim=-1)[..., 0],
        "wide": lambda: torch.empty(1, 2**27, device=META),
    }[how]()


HALVES = "float16 or bfloat16 or float32"
WIDEST = 65535 * 2048

STEP_ERRORS = [
    ("x", "list", TypeError, "x must be a tensor, got list"),
    ("x", "half", TypeError, "x must be float32, got float16"),
    ("x", "double", TypeError, "x must be float32, got float64"),
    ("x", "wide", ValueError, f"x must have at most {WIDEST} elements an image, got {2**27}"),
    ("out", "uint8", TypeError, f"out must be {HALVES}, got uint8"),
    ("out", "double", TypeError, f"out must be {HALVES}, got float64"),
    (
        "out",
        "short",
        ValueError,
        "out must have shape [4, 3, 4, 5], or [4, 6, 4, 5] with learned variance, got [3, 3, 4, 5]",
    ),
    ("out", "meta", ValueError, "out must be on cpu, got meta"),
    ("rows", "float", TypeError, "rows must be int64, got float32"),
    ("rows", "short", ValueError, "rows must have shape [4], got [3]"),
    ("rows", "meta", ValueError, "rows must be on cpu, got meta"),
    ("coefficients", "list", TypeError, "coefficients must be a tensor, got list"),
    ("coefficients", "double", TypeError, "coefficients must be float32, got float64"),
    ("coefficients", "flat", ValueError, "coefficients must have shape [21, 21], got [21]"),
    ("coefficients", "meta", ValueError, "coefficients must be on cpu, got meta"),
    ("timesteps", "float", TypeError, "timesteps must be int64, got float32"),
    ("timesteps", "long", ValueError, "timesteps must have shape [5], got [6]"),
    ("timesteps", "meta", ValueError, "timesteps must be on cpu, got meta"),
    ("seeds", "float", TypeError, "seeds must be int64, got float32"),
    ("seeds", "long", ValueError, "seeds must have shape [4], got [5]"),
    ("indices", "float", TypeError, "indices must be int64, got float32"),
    ("indices", "meta", ValueError, "indices must be on cpu, got meta"),
    ("out_uncond", "half", TypeError, "out_uncond must be float32, got float16"),
    ("out_uncond", "short", ValueError, "out_uncond must have shape [4, 3, 4, 5], got [3, 3, 4, 5]"),
    ("guidance", "half", TypeError, "guidance must be float32 or float64, got float16"),
    ("guidance", "long", ValueError, "guidance must have shape [4], got [5]"),
    ("x_next", "half", TypeError, "x_next must be float32, got float16"),
    ("x_next", "short", ValueError, "x_next must have shape [4, 3, 4, 5], got [3, 3, 4, 5]"),
    (
        "x_next",
        "strided",
        ValueError,
        "x_next must be contiguous, got strides [120, 40, 10, 2] for shape [4, 3, 4, 5]",
    ),
    ("x_net", "uint8", TypeError, f"x_net must be {HALVES} or float64, got uint8"),
    ("x_net", "long", ValueError, "x_net must hold 4 or 8 images like x on cpu, got [5, 3, 4, 5]"),
    ("x_net", "meta", ValueError, "x_net must hold 4 or 8 images like x on cpu, got [4, 3, 4, 5]"),
    ("x_net", "strided", ValueError, "x_net must be contiguous, got strides [120, 40, 10, 2] for shape [4, 3, 4, 5]"),
    ("x0", "half", TypeError, "x0 must be float32, got float16"),
    ("x0", "strided", ValueError, "x0 must be contiguous, got strides [120, 40, 10, 2] for shape [4, 3, 4, 5]"),
    ("known", "half", TypeError, "known must be float32, got float16"),
    ("known", "long", ValueError, "known must have shape [4, 3, 4, 5], got [5, 3, 4, 5]"),
    ("history", "half", TypeError, "history must be float32, got float16"),
    ("history", "list", TypeError, "history must be a tensor, got list"),
    ("history", "flat", ValueError, "history must hold 1 to 3 batches like x, [4, 3, 4, 5], got [4, 3, 4, 5]"),
    ("history", "none", ValueError, "history must hold 1 to 3 batches like x, [4, 3, 4, 5], got [0, 4, 3, 4, 5]"),
    ("history", "many", ValueError, "history must hold 1 to 3 batches like x, [4, 3, 4, 5], got [4, 4, 3, 4, 5]"),
    ("history", "lanes", ValueError, "history must have shape [2, 4, 3, 4, 5], got [2, 3, 3, 4, 5]"),
    ("history", "meta", ValueError, "history must be on cpu, got meta"),
    (
        "history",
        "strided",
        ValueError,
        "history must be contiguous, got strides [480, 120, 40, 10, 2] for shape [2, 4, 3, 4, 5]",
    ),
    ("flags", "float", TypeError, "flags must be int64, got float32"),
    ("flags", "long", ValueError, "flags must have shape [4], got [5]"),
    ("flags", "strided", ValueError, "flags must be contiguous, got strides [2] for shape [4]"),
]


def _refuses(call: Call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()


@pytest.mark.parametrize(("name", "how", "error", "message"), STEP_ERRORS)
def test_bad_arguments_of_the_step(name: str, how: str, error: type[Exception], message: str) -> None:
    case = StepCase((3, 4, 5), torch.float32, "drawn", guidance=(1.0, 1.0, 1.0, 1.0), known=True, history=2)
    given = case.arguments(torch.device("cpu"))
    before = {n: tensor.clone() for n, tensor in given.items()}
    call = {**given, name: _bad(given[name], how)}
    _refuses(lambda: kernels.diffusion_step(**call), error, message)
    for buffer in ("x", "x_next", "x_net", "x0", "flags", "history"):
        assert_same_bits(buffer, given[buffer], before[buffer])  # nothing is written half


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": "x"}, "noise must be given or drawn, got both noise and seeds or indices"),
        ({"seeds": None}, "seeds and indices must be given together, got one of them"),
        ({"indices": None}, "seeds and indices must be given together, got one of them"),
        ({"guidance": None}, "out_uncond and guidance must be given together, got one of them"),
        ({"out_uncond": None}, "out_uncond and guidance must be given together, got one of them"),
    ],
)
@pytest.mark.parametrize("step", [kernels.diffusion_step, reference.diffusion_step])
def test_arguments_of_the_step_that_belong_together(
    step: Callable[..., object], changes: dict[str, str | None], message: str
) -> None:
    case = StepCase((3, 4, 5), torch.float32, "drawn", guidance=(1.0, 1.0, 1.0, 1.0))
    given = case.arguments(torch.device("cpu"))
    _refuses(
        lambda: step(**{**given, **{n: given[v] if v else None for n, v in changes.items()}}), ValueError, message
    )


def test_bad_noise_of_the_step() -> None:
    given = StepCase((3, 4), torch.float32, "given").arguments(torch.device("cpu"))
    for how, error, message in (
        ("short", ValueError, "noise must have shape [4, 3, 4], got [3, 3, 4]"),
        ("meta", ValueError, "noise must be on cpu, got meta"),
        ("uint8", TypeError, f"noise must be {HALVES} or float64, got uint8"),
    ):
        call = {**given, "noise": _bad(given["noise"], how)}
        _refuses(lambda call=call: kernels.diffusion_step(**call), error, message)  # type: ignore[misc]


def test_a_step_needs_a_batch() -> None:
    given = StepCase((), torch.float32, "none").arguments(torch.device("cpu"))
    message = "x must have a batch dimension, got a 0-dimensional tensor"
    _refuses(lambda: kernels.diffusion_step(**{**given, "x": torch.tensor(1.0)}), ValueError, message)


OTHER_ERRORS = [
    ("normal", "seeds", "list", TypeError, "seeds must be a tensor, got list"),
    ("normal", "seeds", "float", TypeError, "seeds must be int64, got float32"),
    ("normal", "indices", "long", ValueError, "indices must have shape [2], got [3]"),
    ("normal", "timesteps", "meta", ValueError, "timesteps must be on cpu, got meta"),
    ("q_sample", "x_start", "list", TypeError, "x_start must be a tensor, got list"),
    ("q_sample", "x_start", "double", TypeError, f"x_start must be {HALVES}, got float64"),
    ("q_sample", "t", "float", TypeError, "t must be int64, got float32"),
    ("q_sample", "t", "long", ValueError, "t must have shape [2], got [3]"),
    ("q_sample", "sqrt_alphas_cumprod", "list", TypeError, "sqrt_alphas_cumprod must be a tensor, got list"),
    (
        "q_sample",
        "sqrt_alphas_cumprod",
        "half",
        TypeError,
        "sqrt_alphas_cumprod must be float32 or float64, got float16",
    ),
    ("q_sample", "sqrt_alphas_cumprod", "meta", ValueError, "sqrt_alphas_cumprod must be on cpu, got meta"),
    (
        "q_sample",
        "sqrt_one_minus_alphas_cumprod",
        "short",
        ValueError,
        "sqrt_one_minus_alphas_cumprod must have shape [10], got [9]",
    ),
    ("q_sample", "noise", "short", ValueError, "noise must have shape [2, 3, 4], got [1, 3, 4]"),
    ("q_posterior_mean_variance", "x_start", "double", TypeError, f"x_start must be {HALVES}, got float64"),
    ("q_posterior_mean_variance", "x_t", "half", TypeError, "x_t must be float32, got float16"),
    ("q_posterior_mean_variance", "x_t", "short", ValueError, "x_t must have shape [2, 3, 4], got [1, 3, 4]"),
    ("q_posterior_mean_variance", "t", "meta", ValueError, "t must be on cpu, got meta"),
    (
        "q_posterior_mean_variance",
        "posterior_mean_coef1",
        "list",
        TypeError,
        "posterior_mean_coef1 must be a tensor, got list",
    ),
    (
        "q_posterior_mean_variance",
        "posterior_variance",
        "short",
        ValueError,
        "posterior_variance must have shape [10], got [9]",
    ),
    (
        "q_posterior_mean_variance",
        "posterior_log_variance_clipped",
        "half",
        TypeError,
        "posterior_log_variance_clipped must be float32 or float64, got float16",
    ),
    ("to_uint8", "x", "list", TypeError, "x must be a tensor, got list"),
    ("to_uint8", "x", "double", TypeError, f"x must be {HALVES}, got float64"),
    ("to_uint8", "x", "flat", ValueError, "x must be images [B, C, H, W], got shape [3, 4, 5]"),
    ("ddim_step", "x", "list", TypeError, "x must be a tensor, got list"),
    ("ddim_step", "x", "half", TypeError, "x must be float32, got float16"),
    (
        "ddim_step",
        "out",
        "short",
        ValueError,
        "out must have shape [2, 3, 4], or [2, 6, 4] with learned variance, got [1, 3, 4]",
    ),
    ("ddim_step", "t", "float", TypeError, "t must be int64, got float32"),
    ("ddim_step", "t_prev", "long", ValueError, "t_prev must have shape [2], got [3]"),
    ("ddim_step", "alphas_cumprod", "half", TypeError, "alphas_cumprod must be float32 or float64, got float16"),
    ("ddpm_step", "alphas_cumprod", "meta", ValueError, "alphas_cumprod must be on cpu, got meta"),
    ("ddpm_step", "t", "meta", ValueError, "t must be on cpu, got meta"),
]


@pytest.mark.parametrize(("op", "name", "how", "error", "message"), OTHER_ERRORS)
def test_bad_arguments(op: str, name: str, how: str, error: type[Exception], message: str) -> None:
    function, given = _calls(torch.device("cpu"))[op]
    if name == "noise":
        given = _forward(torch.device("cpu"))
    _refuses(lambda: function(**{**given, name: _bad(given[name], how)}), error, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta must be in [0, 1], got 1.5"),
        ({"clip": 0.0}, "clip must be positive or None, got 0.0"),
        ({"prediction": "eps"}, "prediction must be one of 'epsilon', 'sample', 'v_prediction', got 'eps'"),
    ],
)
@pytest.mark.parametrize("step", [kernels.ddim_step, reference.ddim_step])
def test_bad_options_of_ddim(step: Callable[..., object], options: dict[str, Any], message: str) -> None:
    _refuses(lambda: step(**_single(torch.device("cpu")), **options), ValueError, message)


def test_bad_options_of_ddpm() -> None:
    message = "variance must be one of 'fixed_small', 'fixed_large', 'learned', 'learned_range', got 'small'"
    for step in (kernels.ddpm_step, reference.ddpm_step):
        _refuses(lambda s=step: s(**_single(torch.device("cpu")), variance="small"), ValueError, message)  # type: ignore[misc]


def test_too_large_an_image() -> None:
    lanes = _lanes(META)
    message = f"shape must have at most {WIDEST} elements an image, got {2**27}"
    _refuses(lambda: kernels.normal(**lanes, shape=(2**27,)), ValueError, message)
    assert launch.geometry(1, WIDEST, torch.float16).grid[1] <= 65535


def test_q_sample_needs_noise() -> None:
    given = _forward(torch.device("cpu"))
    del given["noise"]
    for op in (kernels.q_sample, reference.q_sample):
        _refuses(lambda op=op: op(**given), ValueError, "q_sample needs noise, or seeds and indices to draw it")  # type: ignore[misc]


# Where Triton cannot run

NO_TRITON = "the package 'triton' is not installed"
ON_CPU = "the device is a CPU and Triton drives GPUs (TRITON_INTERPRET=1 runs kernels on a CPU, for tests)"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("missing", "reason"), [({"HAS_TRITON": False}, NO_TRITON), ({"interpreting": lambda: False}, ON_CPU)]
)
def test_without_triton(name: str, missing: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for attribute, value in missing.items():
        monkeypatch.setattr(backend, attribute, value)
    function, arguments = _calls(torch.device("cpu"))[name]
    message = f"the fused kernels cannot run on cpu: {reason}; use backend='reference'"
    _refuses(lambda: function(**arguments), kernels.BackendError, message)


@pytest.mark.parametrize(
    ("device", "interpreting", "reason"),
    [
        ("cpu", True, None),
        ("cpu", False, ON_CPU),
        ("cuda", False, None),
        ("xpu", False, None),
        ("cuda", True, "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors only"),
        ("mps", False, "Triton has no backend for device type 'mps'"),
    ],
)
def test_why_not_triton(device: str, interpreting: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "interpreting", lambda: interpreting)
    assert backend.why_not_triton(torch.device(device)) == reason


@pytest.mark.parametrize("shape", [(3, 0), (3, 2, 0, 4), (0, 5)], ids=str)
def test_variances_of_images_without_elements(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    """They are gathered by the kernel that makes the mean, of which there is nothing here."""
    x = torch.zeros(shape, device=kernel_device)
    t = torch.tensor([0, T - 1, T], device=kernel_device)[: len(x)]
    tables = [torch.arange(T, dtype=torch.float32, device=kernel_device) + offset for offset in range(4)]
    got = kernels.q_posterior_mean_variance(x, x, t, *tables)
    wanted = kernels.reference.q_posterior_mean_variance(x, x, t, *tables)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
