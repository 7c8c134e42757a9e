"""The product of a shortcut, added to an image in one launch, of one input or two, and doubled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import add_projection, reference
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.twins import assert_same_bits, assert_within

HALF = (torch.float16, torch.bfloat16)
#: Lanes, channels of the image, of x and of the skip input, height, width: whole blocks, ragged ones, one pixel, one
#: channel, no skip input, large images (whose programs are larger), channels that no depth divides.
SHAPES = [
    (2, 64, 64, 64, 8, 8),
    (3, 40, 24, 16, 9, 7),
    (2, 33, 20, 0, 5, 5),
    (1, 1, 1, 0, 1, 1),
    (1, 136, 96, 32, 64, 65),
    pytest.param((2, 256, 256, 128, 64, 64), marks=pytest.mark.soak),
]


def image(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers in channels_last memory."""
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def inputs(
    lanes: int, channels: int, of_x: int, of_skip: int, height: int, width: int, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Everything that the functions take."""
    return {
        "image": image(lanes, channels, height, width, dtype=dtype),
        "x": image(lanes, of_x, height, width, dtype=dtype),
        "weight": (torch.randn(channels, of_x + of_skip) / 4).to(dtype),
        "skip": image(lanes, of_skip, height, width, dtype=dtype) if of_skip else None,
        "bias": torch.randn(channels),
    }


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Every pixel in a square of 2 x 2."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def exact(given: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """The sum in float64, by PyTorch's convolution, and the largest sum of the terms' absolute values."""
    double = {name: None if t is None else t.double() for name, t in given.items()}
    joined = double["x"] if double["skip"] is None else torch.cat((double["x"], double["skip"]), dim=1)
    results = []
    for f in (lambda t: t, torch.abs):
        weight, bias = f(double["weight"])[:, :, None, None], f(double["bias"])
        results.append(torch.nn.functional.conv2d(f(joined), weight, bias) + f(double["image"]))
    return results[0], float(results[1].max())


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_is_float64s_within_rounding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(*shape, dtype=dtype)
    wanted, largest = exact(given)
    allowed = tolerance(dtype, largest, ROUNDINGS["add_projection"] + given["weight"].shape[1] // 8)
    before = {name: t.clone() for name, t in given.items() if t is not None}
    twice = kernels.add_projection_doubled(**given)
    for name, tensor in before.items():
        assert_same_bits(name, given[name], tensor)
    out = kernels.add_projection_(**given)
    assert out is given["image"]
    assert_within("sum", out, wanted, allowed)
    assert_within("doubled", twice, doubled(wanted), allowed)
    assert torch.equal(twice[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3), twice)
    assert twice.is_contiguous(memory_format=torch.channels_last)
    for name in ("x", "weight", "skip", "bias"):
        assert given[name] is None or torch.equal(given[name], before[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_the_reference_is_a_convolution(dtype: torch.dtype) -> None:
    given = inputs(2, 6, 5, 3, 4, 3, dtype=dtype)
    if dtype == torch.float64:
        given["bias"] = given["bias"].double()
    wanted, largest = exact(given)
    allowed = tolerance(dtype, largest, ROUNDINGS["add_projection"] + 8)
    assert_within("doubled", reference.add_projection_doubled(**given), doubled(wanted), allowed)
    assert_within("sum", reference.add_projection_(**given), wanted, allowed)


@pytest.mark.interpreter
def test_a_product_of_bits_is_none_of_numbers() -> None:
    """The control: what Triton's interpreter makes of bfloat16 by itself is found by the test above."""
    given = inputs(2, 64, 64, 64, 8, 8, dtype=torch.bfloat16)
    wanted, largest = exact(given)
    given["weight"][0, 0] += 3 * largest
    out = kernels.add_projection_(**given)
    with pytest.raises(AssertionError):
        assert_within("sum", out, wanted, tolerance(torch.bfloat16, largest, ROUNDINGS["add_projection"] + 16))


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(8, 8), (64, 64)])
def test_no_bit_depends_on_the_batch(size: tuple[int, int]) -> None:
    given = inputs(3, 24, 16, 16, *size)
    given["x"][1] = torch.nan
    alone = [
        kernels.add_projection_doubled(
            **{name: t[lane : lane + 1] if t is not None and t.ndim == 4 else t for name, t in given.items()}
        )
        for lane in range(3)
    ]
    together = kernels.add_projection_doubled(**given)
    assert_same_bits("first and last", together[[0, 2]], torch.cat((alone[0], alone[2])))
    assert together[1].isnan().all()


@pytest.mark.interpreter
def test_any_layout_is_read() -> None:
    given = inputs(2, 16, 24, 8, 6, 5)
    wanted = kernels.add_projection_doubled(**given)
    shifted = torch.empty(given["x"].numel() + 1, dtype=torch.float16)[1:].view(2, 6, 5, 24).permute(0, 3, 1, 2)
    others = given | {
        "image": given["image"].contiguous(),
        "x": shifted.copy_(given["x"]),
        "skip": given["skip"].repeat(1, 2, 1, 1)[:, :8],
        "weight": given["weight"].t().contiguous().t(),
        "bias": given["bias"].repeat_interleave(2)[::2],
    }
    assert_same_bits("doubled", kernels.add_projection_doubled(**others), wanted)


@pytest.mark.interpreter
def test_nothing_is_added_to_nothing() -> None:
    given = inputs(0, 8, 8, 8, 4, 4)
    assert kernels.add_projection_(**given).shape == (0, 8, 4, 4)
    assert kernels.add_projection_doubled(**given).shape == (0, 8, 8, 8)


@pytest.mark.parametrize("name", ["add_projection_", "add_projection_doubled"])
def test_gradients_go_through_the_reference(name: str) -> None:
    given = inputs(2, 8, 4, 4, 4, 4)
    for key in ("x", "weight", "skip", "bias"):
        given[key].requires_grad_()
    getattr(kernels, name)(**given).sum().backward()
    assert all(given[key].grad is not None for key in ("x", "weight", "skip", "bias"))


@pytest.mark.interpreter
def test_opcheck() -> None:
    given, larger = inputs(2, 8, 16, 8, 4, 6), torch.empty(2, 8, 8, 12, dtype=torch.float16)
    op = torch.ops.stepfusion.add_projection_.default
    read = (given["x"], given["weight"], given["skip"], given["bias"])
    torch.library.opcheck(op, (None, *read, given["image"], False))
    torch.library.opcheck(op, (given["image"], *read, larger.contiguous(memory_format=torch.channels_last), True))


@pytest.mark.interpreter
def test_compiles_as_one_graph() -> None:
    def whole(image: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        larger = kernels.add_projection_doubled(image, **given)
        return kernels.add_projection_(image.clone(memory_format=torch.preserve_format), **given), larger

    given = inputs(2, 8, 16, 8, 4, 6)
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(**given), whole(**given), strict=True):
        assert_same_bits("sum", ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "channels", "pays"),
    [(torch.bfloat16, 512, True), (torch.float16, 64, True), (torch.float16, 640, False), (torch.float32, 64, False)],
)
def test_when_it_pays(dtype: torch.dtype, channels: int, pays: bool) -> None:
    assert add_projection.projects(dtype, channels) is pays


GIVEN = inputs(2, 8, 4, 4, 3, 3)


@pytest.mark.parametrize("ops", [kernels, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("name", ["add_projection_", "add_projection_doubled"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": GIVEN["x"][0]}, ValueError, r"^x must be images \[B, C, H, W\], got shape \[4, 3, 3\]$"),
        ({"image": GIVEN["image"].long()}, TypeError, "^image must be float16 or bfloat16"),
        ({"x": GIVEN["x"].float()}, TypeError, "^x must be float16, got float32$"),
        ({"weight": GIVEN["weight"].float()}, TypeError, "^weight must be float16, got float32$"),
        ({"weight": GIVEN["weight"][:, :6]}, ValueError, r"^weight must be \[N, 8\] on cpu, got \[8, 6\] on cpu$"),
        ({"skip": GIVEN["skip"].float()}, TypeError, "^skip must be float16, got float32$"),
        ({"skip": GIVEN["skip"][0]}, ValueError, r"^skip must be images \[B, C, H, W\], got shape \[4, 3, 3\]$"),
        ({"skip": GIVEN["skip"][:1]}, ValueError, r"^skip must have shape \[2, 4, 3, 3\], got \[1, 4, 3, 3\]$"),
        ({"image": GIVEN["image"][:, :4]}, ValueError, r"^image must have shape \[2, 8, 3, 3\], got \[2, 4, 3, 3\]$"),
        ({"bias": GIVEN["bias"][:4]}, ValueError, r"^bias must have shape \[8\], got \[4\]$"),
        ({"bias": GIVEN["bias"].double()}, TypeError, "^bias must be float16 or float32, got float64$"),
    ],
)
def test_bad_input(ops: Any, name: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    before = GIVEN["image"].clone()
    with pytest.raises(error, match=message):
        getattr(ops, name)(**{**GIVEN, **wrong})
    assert torch.equal(GIVEN["image"], before)


def test_kernels_take_half_precision_only() -> None:
    given = inputs(2, 8, 4, 4, 3, 3, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^image must be float16 or bfloat16, got float32$"):
        kernels.add_projection_(**given)


def test_an_image_that_is_added_to_is_nhwc() -> None:
    given = GIVEN | {"image": GIVEN["image"].contiguous()}
    with pytest.raises(ValueError, match=r"^image must be channels_last to be added to in place"):
        kernels.add_projection_(**given)
