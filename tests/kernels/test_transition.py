"""Log-probabilities of steps: every implementation against the reference, float64, and the normal distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from stepfusion import kernels
from stepfusion.kernels import cpu_ops, reference
from stepfusion.kernels import transition_reference as formulas
from stepfusion.kernels.coefficients import HISTORY, WHOLE_IMAGE
from stepfusion.kernels.cpu import sampling_library
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.fused import Fused
from stepfusion_testing.twins import assert_same_bits, assert_within

# PyTorch's forward mode itself calls torch.jit.script: which category its warning has depends on the version.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*torch.jit.script.*:{category}")
    for category in ("DeprecationWarning", "FutureWarning")
]

Tensors = dict[str, torch.Tensor]

SHAPES = [(), (3, 5, 7), (1, 32, 32), (2, 33, 31)]
#: A row, one that is unguided, none, the last one.
ROWS = (0, 2, kernels.PARKED, 3)
NEEDS_CPP = pytest.mark.skipif(sampling_library.why_not_sampling_kernels() is not None, reason="no C++ library here")


def table(rows: int = 4) -> torch.Tensor:
    """Rows with noise, the third one unguided, float32."""
    found = torch.randn(rows, len(kernels.COLUMNS))
    for name in (*HISTORY, *WHOLE_IMAGE, "unguided"):
        found[:, kernels.COLUMNS.index(name)] = 0.0
    found[:, kernels.COLUMNS.index("clip")] = torch.tensor([0.75, torch.inf, 0.5, 1.0])
    found[:, kernels.COLUMNS.index("sigma")] = torch.tensor([0.3, 1.0, 0.05, 2.0])
    found[2, kernels.COLUMNS.index("unguided")] = 1.0
    return found


def arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    learned: bool = False,
    guided: bool = False,
    nhwc: bool = False,
    rows: tuple[int, ...] = ROWS,
) -> Tensors:
    """Random states and outputs of a network."""
    lanes = len(rows)
    out = (lanes, shape[0] * (1 + learned), *shape[1:]) if shape else (lanes,)
    coefficients = table()
    given = {"x": torch.randn(lanes, *shape), "x_next": torch.randn(lanes, *shape), "out": torch.randn(out).to(dtype)}
    given |= {"rows": torch.tensor(rows), "coefficients": coefficients}
    given["transitions"] = kernels.transitions_of(coefficients)
    if guided:
        given |= {"out_uncond": torch.randn(out).to(dtype), "guidance": torch.tensor([7.5, 2.0, 3.0, 1.0])[:lanes]}
    if nhwc:
        networks = {
            n: t.to(memory_format=torch.channels_last) for n, t in given.items() if n in ("out", "out_uncond")
        }
        given |= networks
    return given


def doubles(given: Tensors) -> Tensors:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def on(given: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in given.items()}


def halves(out: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the network returned for one image, and v if it learned its variance."""
    return (out,) if out.shape == x.shape else out.split(len(x))


def density(given: Tensors) -> torch.Tensor:
    """The same by PyTorch's normal distribution, in float64, from the equations of the table; parked lanes are 0."""
    a = doubles(given)
    found = torch.zeros(len(a["x"]), dtype=torch.float64)
    for lane, row in enumerate(a["rows"].tolist()):
        if row < 0:
            continue
        c = dict(zip(kernels.COLUMNS, a["coefficients"][row], strict=True))
        parts, uncond = (
            halves(a[name][lane], a["x"][lane]) for name in ("out", "out_uncond" if "guidance" in a else "out")
        )
        eps = parts[0]
        if "guidance" in a and c["unguided"] == 0:
            eps = (1 - a["guidance"][lane]) * uncond[0] + a["guidance"][lane] * eps
        x0 = (c["x0_x"] * a["x"][lane] + c["x0_out"] * eps).clamp(-c["clip"], c["clip"])
        mean = c["next_x0"] * x0 + c["next_x"] * a["x"][lane] + c["next_out"] * eps
        std = c["sigma"].expand(mean.shape)
        if len(parts) > 1:
            std = std * (c["half_log_min"] + (parts[1] + 1) / 2 * c["half_log_span"]).exp()
        found[lane] = torch.distributions.Normal(mean, std).log_prob(a["x_next"][lane]).sum()
    return found


def bound(given: Tensors) -> float:
    """What the roundings of a float32 mean and exponent can change of a sum: of each term, all of one sign."""
    size = float(density(given).abs().max())
    exponents = 1 + float(given["coefficients"].abs().amax()) * (1 + float(given["out"].float().abs().max()))
    return tolerance(torch.float32, size * exponents * 10, ROUNDINGS["transition_logprob"])


OPTIONS: list[dict[str, bool]] = [
    {},
    {"guided": True},
    {"nhwc": True, "guided": True},
    {"learned": True},
    {"learned": True, "guided": True, "nhwc": True},
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("options", "dtype"), list(zip(OPTIONS, DTYPES, strict=True)))
def test_equal_bits_everywhere_and_the_normal_density(
    implementation: Fused, options: dict[str, bool], dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        if (options.get("nhwc") and len(shape) != 3) or (options.get("learned") and not shape):
            continue
        given = arguments(shape, dtype, **options)
        got = implementation.ops.transition_logprob(**on(given, implementation.device)).cpu()
        twin = reference.transition_logprob(**given)
        assert got.dtype == torch.float64
        if options.get("learned"):  # an exp is involved
            assert_within("logprob", got, twin, bound(given))
        else:
            assert_same_bits("logprob", got, twin)
        assert_within("logprob", got, density(given), bound(given))
        exact = reference.transition_logprob(**doubles(given))
        torch.testing.assert_close(exact, density(given), rtol=1e-12, atol=1e-9)


def test_a_lane_has_its_bits_alone_and_in_any_batch(implementation: Fused) -> None:
    """Also beside lanes that are not finite, and at another place."""
    given = on(arguments((3, 33, 31), torch.bfloat16, guided=True), implementation.device)
    together = implementation.ops.transition_logprob(**given)
    order = [3, 1, 0, 0, 2, 1, 3]
    of_lanes = {n: t for n, t in given.items() if n not in ("coefficients", "transitions")}
    mixed = given | {name: tensor[order].clone() for name, tensor in of_lanes.items()}
    mixed["out"][2] = torch.nan
    found = implementation.ops.transition_logprob(**mixed)
    keep = [0, 1, 3, 4, 5, 6]
    assert torch.equal(found[keep], together[order][keep])
    assert found[2].isnan()
    for lane in range(len(together)):
        alone = given | {name: tensor[lane : lane + 1] for name, tensor in of_lanes.items()}
        assert torch.equal(implementation.ops.transition_logprob(**alone), together[lane : lane + 1])


def test_another_order_of_additions_has_other_bits() -> None:
    """The control of equal bits: the sum of the same terms, one after the other."""
    given = arguments((3, 32, 32), rows=(0, 1, 3))
    twin = reference.transition_logprob(**given)
    nothing = {"timesteps": torch.zeros(4, dtype=torch.int64)}
    step = {name: given[name] for name in ("x", "out", "rows", "coefficients")}
    mean = reference.diffusion_step(**step, **nothing).double()
    weight, normalizer = given["transitions"][given["rows"]].unbind(1)
    terms = weight.view(-1, 1, 1, 1) * (given["x_next"].double() - mean) ** 2
    summed = -terms.flatten(1).cumsum(1)[:, -1] - normalizer * 3072
    assert not torch.equal(summed, twin)
    torch.testing.assert_close(summed, twin, rtol=1e-12, atol=0)


def test_of_drawn_noise_it_is_that_of_the_noise(implementation: Fused) -> None:
    """A step's own x_next: -z^2 / 2 - log(sigma) - log(2 pi) / 2, within what rounding x_next leaves of z."""
    given = arguments((3, 32, 32), rows=(0, 1, 3, 0))
    lanes, draws = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    step = {name: given[name] for name in ("x", "out", "rows", "coefficients")} | {"timesteps": draws}
    given["x_next"] = reference.diffusion_step(**step, seeds=lanes, indices=lanes)
    z = kernels.reference.normal(lanes, lanes, draws, (3, 32, 32), kernels.STREAM_STEP)
    want = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).flatten(1).sum(1)
    want -= 3072 * given["coefficients"][given["rows"], kernels.COLUMNS.index("sigma")].double().log()
    got = implementation.ops.transition_logprob(**on(given, implementation.device)).cpu()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_rows_without_a_gaussian_are_nan(implementation: Fused) -> None:
    given = arguments((7,), rows=(0, 1, 2, 3, 4))
    given["coefficients"][0, kernels.COLUMNS.index("sigma")] = 0.0
    given["coefficients"][1, kernels.COLUMNS.index("next_prev2")] = 0.5
    given["transitions"] = kernels.transitions_of(given["coefficients"])
    found = implementation.ops.transition_logprob(**on(given, implementation.device))
    assert found.isnan().tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("column", WHOLE_IMAGE)
def test_rows_of_whole_images_are_the_references(implementation: Fused, column: str) -> None:
    given = arguments((7,), rows=(0, 1), guided=True)
    given["coefficients"][0, kernels.COLUMNS.index(column)] = 0.5
    given["coefficients"][0, kernels.COLUMNS.index("threshold_max")] = 1.0
    found = implementation.ops.transition_logprob(**on(given, implementation.device))
    assert found.isnan().tolist() == [implementation.ops is not reference, False]


def test_no_lanes_and_no_elements(implementation: Fused) -> None:
    for shape, rows in (((3, 4), ()), ((0, 4), (0, 1))):
        given = arguments(shape, rows=rows)
        given["rows"] = given["rows"].to(torch.int64)
        found = implementation.ops.transition_logprob(**on(given, implementation.device))
        assert found.tolist() == [0.0] * len(rows)


# Gradients


class Analytic(torch.autograd.Function):
    """The gradient in closed form, in whatever dtype."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        formulas.save_for_backward(ctx, given, given[0])
        return reference.transition_logprob(*given[:6], out_uncond=given[6], guidance=given[7])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return formulas.transition_gradients(ctx, gradient)


def leaves(given: Tensors) -> list[str]:
    return [name for name in ("x", "x_next", "out", "out_uncond") if name in given]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("analytic", [False, True])
def test_gradients_are_those_of_finite_differences(options: dict[str, bool], analytic: bool) -> None:
    """Of the reference by autograd, and of the formula; some elements are clipped, one lane is parked."""
    given = doubles(arguments((2, 2, 1), **options))
    given["coefficients"] = given["coefficients"].clamp(-0.9, 0.9)
    given["coefficients"][:, kernels.COLUMNS.index("clip")] = 0.4
    names = leaves(given)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        one = given | dict(zip(names, tensors, strict=True))
        if not analytic:
            return reference.transition_logprob(**one)
        return Analytic.apply(*(one.get(name) for name in ORDER))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, [given[name].clone().requires_grad_() for name in names])


ORDER = ("x", "x_next", "out", "rows", "coefficients", "transitions", "out_uncond", "guidance")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_the_fused_functions_have_the_gradient(fused: Fused, options: dict[str, bool]) -> None:
    """Each input alone, then all; the truth is the reference's in float64. The value keeps its bits."""
    given = arguments((3, 5, 7), **options)
    names = leaves(given)
    exact = {n: t.clone().requires_grad_(n in names) for n, t in doubles(given).items()}
    weights = torch.tensor([0.5, -1.0, 2.0, 1.5], dtype=torch.float64)
    truth = dict(
        zip(
            names,
            torch.autograd.grad((reference.transition_logprob(**exact) * weights).sum(), [exact[n] for n in names]),
            strict=True,
        )
    )
    plain = fused.ops.transition_logprob(**on(given, fused.device))
    for asked in ([name] for name in names):
        there = on(given, fused.device)
        there = {n: t.detach().clone().requires_grad_(n in asked) for n, t in there.items()}
        found = fused.ops.transition_logprob(**there)
        assert torch.equal(found.detach(), plain)
        (gradient,) = torch.autograd.grad((found * weights.to(fused.device)).sum(), [there[asked[0]]])
        assert gradient.dtype == there[asked[0]].dtype
        atol = tolerance(torch.float32, 10 * float(truth[asked[0]].abs().max()), ROUNDINGS["transition_logprob"])
        torch.testing.assert_close(gradient.double().cpu(), truth[asked[0]], rtol=0, atol=atol)


def test_a_gradient_by_the_table_or_in_forward_mode_is_the_references(fused: Fused) -> None:
    given = on(arguments((7,), guided=True), fused.device)
    given["guidance"].requires_grad_()
    assert torch.autograd.grad(fused.ops.transition_logprob(**given)[0], given["guidance"])[0][0] != 0
    with torch.no_grad(), forward_ad.dual_level():
        tangent = torch.ones_like(given["x_next"])
        dual = given | {"x_next": forward_ad.make_dual(given["x_next"], tangent)}
        found = forward_ad.unpack_dual(fused.ops.transition_logprob(**dual)).tangent
    given["x_next"].requires_grad_()
    (want,) = torch.autograd.grad(fused.ops.transition_logprob(**given).sum(), given["x_next"])
    torch.testing.assert_close(found, want.double().sum(1), rtol=1e-5, atol=1e-5)


# As PyTorch sees it


def test_opcheck(kernel_device: torch.device) -> None:
    given = on(arguments((3, 4, 5), guided=True), kernel_device)
    for name in leaves(given):
        given[name].requires_grad_()
    values = tuple(given.get(name) for name in ORDER)
    torch.library.opcheck(torch.ops.stepfusion.transition_logprob.default, values)


@NEEDS_CPP
def test_opcheck_in_cpp() -> None:
    given = arguments((3, 4, 5), guided=True)
    given["out"].requires_grad_()
    values = tuple(given.get(name) for name in ORDER)
    torch.library.opcheck(torch.ops.stepfusion.transition_logprob_cpu.default, values)


@pytest.mark.parametrize(
    "ops",
    [pytest.param(cpu_ops.transition_logprob, marks=NEEDS_CPP), kernels.transition_logprob],
    ids=["cpp", "triton"],
)
def test_compiles_as_one_graph_with_its_gradient(
    ops: Callable[..., torch.Tensor], kernel_device: torch.device
) -> None:
    given = on(arguments((3, 4)), kernel_device if ops is kernels.transition_logprob else torch.device("cpu"))
    results = []
    for function in (ops, torch.compile(ops, fullgraph=True, backend="aot_eager")):
        out = given["out"].clone().requires_grad_()
        value = function(**(given | {"out": out}))
        results.append((value.detach(), *torch.autograd.grad(value.sum(), out)))
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(4, 7).half(), TypeError, "x must be float32"),
        ("x_next", torch.zeros(4, 6), ValueError, "x_next must have shape [4, 7], got [4, 6]"),
        ("x_next", torch.zeros(4, 7).double(), TypeError, "x_next must be float32, got float64"),
        ("out", torch.zeros(4, 6), ValueError, "out must have shape [4, 7]"),
        ("rows", torch.zeros(4), TypeError, "rows must be int64, got float32"),
        ("transitions", torch.zeros(4, 2), TypeError, "transitions must be float64, got float32"),
        ("transitions", torch.zeros(3, 2).double(), ValueError, "transitions must have shape [4, 2], got [3, 2]"),
        ("coefficients", torch.zeros(4, 20), ValueError, "coefficients must have shape [4, 21], got [4, 20]"),
        ("guidance", torch.zeros(4), ValueError, "out_uncond and guidance must be given together"),
    ],
)
def test_a_bad_argument_is_named(
    fused: Fused, name: str, value: torch.Tensor, error: type[Exception], message: str
) -> None:
    given = on(arguments((7,)) | {name: value}, fused.device)
    with pytest.raises(error) as raised:
        fused.ops.transition_logprob(**given)
    assert message in str(raised.value)
