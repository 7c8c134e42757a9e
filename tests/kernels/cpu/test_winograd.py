"""Winograd's convolutions: exact algebra in float64, and the kernels against the definition."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stepfusion.kernels.cpu import library, winograd
from stepfusion.kernels.cpu.winograd import transform_weight, winograd_conv2d
from stepfusion.kernels.cpu.winograd_matrices import F2, F4, UP, Scheme, toom_cook
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.cpu_kernels import rms, thread_counts

SCHEMES = [F2, F4, UP]
#: In bfloat16, the root-mean-square error relative to that of PyTorch's convolution: the most that the module states.
LOSS = {"F2": 2.0, "F4": 5.2, "Up": 1.9}


def name(scheme: Scheme) -> str:
    return scheme.name


def definition(x: Tensor, weight: Tensor, bias: Tensor, scheme: Scheme) -> Tensor:
    """What a scheme computes, by PyTorch's own operators."""
    if scheme is UP:
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    return functional.conv2d(x, weight, bias, padding=1)


def by_algebra(x: Tensor, weight: Tensor, scheme: Scheme, rounded: torch.dtype = torch.float64) -> Tensor:
    """The scheme's formula without a loop over tiles, the transformed input and weights rounded to a dtype."""
    bt, g, at = (torch.tensor(m, dtype=x.dtype) for m in (scheme.input, scheme.weight, scheme.output))
    n, m, (height, width) = len(bt), len(at), x.shape[2:]
    beyond = (1, 1 + -width % scheme.step, 1, 1 + -height % scheme.step)
    d = functional.pad(x, beyond).unfold(2, n, scheme.step).unfold(3, n, scheme.step)  # [B, C, y, x, n, n]
    v = torch.einsum("ia,bcyxad,jd->bcyxij", bt, d, bt).to(rounded).to(x.dtype)
    u = torch.einsum("ia,kcad,jd->kcij", g, weight, g).to(rounded).to(x.dtype)
    tiles = torch.einsum("pi,bkyxij,qj->bkypxq", at, torch.einsum("bcyxij,kcij->bkyxij", v, u), at)
    batch, channels, rows, _, columns, _ = tiles.shape
    whole = tiles.reshape(batch, channels, rows * m, columns * m)
    return whole[:, :, : height * scheme.scale, : width * scheme.scale]


def problem(
    dtype: torch.dtype, batch: int, inputs: int, outputs: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * inputs + 10 * height + width)
    x = torch.randn(batch, inputs, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator, dtype=torch.float64) / (9 * inputs) ** 0.5
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_the_algebra_is_exact(scheme: Scheme) -> None:
    x, weight, _ = problem(torch.float64, 2, 3, 5, 8, 14)
    expected = definition(x, weight, torch.zeros(5, dtype=torch.float64), scheme)
    torch.testing.assert_close(by_algebra(x, weight, scheme), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_transforms_multiply_polynomials(m: int) -> None:
    """Transposed, F(m, 3) multiplies a polynomial of m terms by one of 3: the unit polynomials give shifted units."""
    points = (0.0, 1.0, -1.0, 0.5, -2.0)[: m + 1]
    inputs, weights, outputs = (torch.tensor(matrix, dtype=torch.float64) for matrix in toom_cook(m, points))
    for i in range(m):
        for k in range(3):
            product = inputs.T @ (outputs.T[:, i] * weights[:, k])
            assert torch.allclose(product, torch.eye(m + 2, dtype=torch.float64)[i + k], rtol=0, atol=1e-14)


def test_known_matrices() -> None:
    """F(2, 3) as Lavin & Gray print it, equation (9), up to the signs of rows that cancel."""
    inputs, weights, outputs = toom_cook(2, (0.0, 1.0, -1.0))
    assert inputs == ((-1.0, 0.0, 1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, -1.0, 0.0, 1.0))
    assert weights == ((-1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
    assert outputs == ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, 1.0))


def test_points_must_differ() -> None:
    with pytest.raises(ValueError, match=r"points must be 3 different numbers, got \(0.0, 1.0, 1.0\)"):
        toom_cook(2, (0.0, 1.0, 1.0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 32, 32, 8, 8),
        (9, 64, 80, 8, 12),  # an uneven number of tiles, blocks of 80 channels
        (3, 48, 96, 14, 14),  # F4 leaves half a tile over
        (2, 128, 64, 5, 7),
        (1, 16, 16, 1, 1),
        (1, 512, 144, 16, 16),
        (2, 32, 512, 32, 32),
    ],
    ids=str,
)
def test_the_kernel_rounds_little_more_than_a_direct_convolution(
    dtype: torch.dtype, scheme: Scheme, shape: tuple[int, int, int, int, int]
) -> None:
    x, weight, bias = problem(dtype, *shape)
    exact = definition(x.double(), weight.double(), bias.double(), scheme)
    y = winograd_conv2d(x, transform_weight(weight, scheme, dtype), bias.float())
    assert y.shape == exact.shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.float32:
        magnitude = float(definition(x.abs(), weight.abs(), bias.abs(), scheme).max())
        assert float((y - exact).abs().max()) <= tolerance(dtype, magnitude, ROUNDINGS["winograd_conv2d"])
    else:
        assert rms(y - exact) <= LOSS[scheme.name] * rms(definition(x, weight, bias, scheme) - exact)
        rounded = by_algebra(x.double(), weight.double(), scheme, dtype) + bias.double()[:, None, None]
        assert rms(y - rounded) <= 2.0**-9 * rms(rounded), "more than rounding the result explains"


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_small_whole_numbers_are_exact(dtype: torch.dtype, scheme: Scheme) -> None:
    """Where every transformed value has at most 8 bits nothing is rounded; F4's constants are no such numbers."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (2, 32, 6, 10), generator=generator).to(dtype)
    weight = 4.0 * torch.randint(-1, 2, (32, 32, 3, 3), generator=generator).to(dtype)
    weight[:, 2:] = 0  # the sums stay below 2**8
    bias = torch.arange(32.0)
    y = winograd_conv2d(x, transform_weight(weight, scheme, dtype), bias)
    expected = definition(x.float(), weight.float(), bias, scheme)
    assert torch.equal(y.float(), expected) or (scheme is F4 and rms(y - expected) < 0.02 * rms(expected))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_an_images_bits_depend_on_itself_alone(dtype: torch.dtype, scheme: Scheme) -> None:
    """Neither on its place, nor on its neighbours, nor on the number of threads or the layout of the batch."""
    x, weight, bias = problem(dtype, 9, 96, 48, 10, 10)
    u = transform_weight(weight, scheme, dtype)
    y = winograd_conv2d(x, u, bias.float())
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(winograd_conv2d(x[order], u, bias.float()), y[order])
    strange = x.clone()
    strange[1:] = torch.nan
    assert torch.equal(winograd_conv2d(strange, u, bias.float())[0], y[0])
    assert torch.equal(winograd_conv2d(x.contiguous(), u, bias.float()), y)
    for _ in thread_counts():
        assert torch.equal(winograd_conv2d(x, u, bias.float()), y)
        assert torch.equal(winograd_conv2d(x[:1], u, bias.float()), y[:1])


def test_every_output_is_written_and_nothing_else(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = problem(dtype, 2, 16, 32, 7, 9)
    whole = torch.full((4, 32, 7, 9), torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
    expected = winograd_conv2d(x, transform_weight(weight, F4, dtype), bias.float())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: whole[1:3] if k.get("memory_format") else empty(*a, **k))
    library.load(dtype)  # before, for it asks for memory too
    y = winograd._winograd_conv2d(x, transform_weight(weight, F4, dtype), bias.float())
    assert y.data_ptr() == whole[1:3].data_ptr()
    assert torch.equal(y, expected)
    assert whole[0].isnan().all()
    assert whole[3].isnan().all()


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)], ids=str)
def test_nothing_to_do(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=dtype)
    u = transform_weight(torch.randn(32, 16, 3, 3), F4, dtype)
    assert winograd_conv2d(x, u, torch.zeros(32)).shape == (shape[0], 32, *shape[2:])


def test_threads_do_not_disturb_each_other(dtype: torch.dtype) -> None:
    """Different problems at once, again and again: buffers are every thread's own."""
    problems = [
        problem(dtype, 2, 32, 64, 16, 16),
        problem(dtype, 3, 64, 32, 9, 9),
        problem(dtype, 1, 128, 16, 8, 8),
        problem(dtype, 4, 16, 80, 5, 5),
    ]
    arguments = [
        (x, transform_weight(weight, scheme, dtype), bias.float())
        for (x, weight, bias), scheme in zip(problems, (F4, F2, UP, F4), strict=True)
    ]
    expected = [winograd_conv2d(*a) for a in arguments]
    barrier = threading.Barrier(len(arguments))
    wrong: list[int] = []

    def repeat(index: int) -> None:
        barrier.wait()
        outputs = [winograd_conv2d(*arguments[index]) for _ in range(100)]
        wrong.extend(index for output in outputs if not torch.equal(output, expected[index]))

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_the_op_is_what_torch_library_wants(dtype: torch.dtype, scheme: Scheme) -> None:
    x, weight, bias = problem(dtype, 2, 16, 32, 6, 8)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    arguments = (x, transform_weight(weight, scheme, dtype), bias.float())
    torch.library.opcheck(winograd._winograd_conv2d, arguments, test_utils=tests)


def test_what_the_library_cannot_do_is_an_error_not_a_crash(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="winograd_conv2d failed: there is no scheme with so many products"):
        library.call(dtype, "winograd_conv2d", (None,) * 4, (1, 1, 1, 16, 16, 25, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_transformed_weights_have_the_stated_size_and_leave_the_weights_alone(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 48, 3, 3, dtype=dtype)
    before = weight.clone()
    for scheme, products in ((F2, 16), (F4, 36), (UP, 9)):
        u = transform_weight(weight, scheme, dtype)
        assert u.shape == ((2, products, 24, 48, 2) if dtype == torch.bfloat16 else (2, products, 3, 48, 16))
        assert u.dtype == dtype
        assert u.numel() * 9 == weight.numel() * products
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (
            torch.ones(16, 16, 5, 5),
            ValueError,
            r"weight must be \[K, C, 3, 3\].*multiples of 16, got \[16, 16, 5, 5\]",
        ),
        (torch.ones(16, 24, 3, 3), ValueError, "multiples of 16"),
        (torch.ones(0, 16, 3, 3), ValueError, "multiples of 16"),
        (torch.ones(16, 16, 3, 3, dtype=torch.int8), TypeError, "weight must be float16 or .*, got int8"),
    ],
)
def test_weights_that_do_not_fit_are_named(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        transform_weight(weight, F2, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 16, 4, 4)}, TypeError, "x must be bfloat16, got float32"),
        ({"x": torch.ones(1, 32, 4, 4).bfloat16()}, ValueError, r"x must be \[B, 16, H, W\].*got \[1, 32, 4, 4\]"),
        ({"x": torch.ones(16, 4, 4).bfloat16()}, ValueError, r"x must be \[B, 16, H, W\]"),
        ({"weight": torch.ones(16, 16, 3, 3).bfloat16()}, ValueError, "weight must be what transform_weight returns"),
        (
            {"weight": torch.ones(2, 16, 8, 8, 2).bfloat16()},
            ValueError,
            "weight must be what transform_weight returns",
        ),
        ({"weight": torch.ones(16, 16, 3, 3).half()}, TypeError, "weight must be float32 or bfloat16, got float16"),
        ({"bias": torch.ones(16).bfloat16()}, TypeError, "bias must be float32, got bfloat16"),
        ({"bias": torch.ones(17)}, ValueError, r"bias must have shape \[16\], got \[17\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    right = {
        "x": torch.ones(1, 16, 4, 4).bfloat16(),
        "weight": transform_weight(torch.ones(16, 16, 3, 3), F2, torch.bfloat16),
        "bias": torch.ones(16),
    }
    with pytest.raises(error, match=message):
        winograd_conv2d(**(right | change))
