"""What is added by whoever reads next: norms of sums, sums that are resampled, and norms of a batch in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import group_norm, reference
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.twins import assert_same_bits, assert_within

SUMS = ("add_bias", "add_bias_doubled", "add_bias_padded")
DTYPES = (torch.float16, torch.float32)  # Triton's interpreter truncates to bfloat16; compiled code is run elsewhere
#: Channels, of the skip input, height, width, groups: one launch, of one tile and of two, and two launches; ragged,
#: one pixel, one channel.
SHAPES = [
    (64, 0, 8, 8, 8),
    (24, 8, 9, 7, 4),
    (24, 16, 17, 18, 4),
    (24, 16, 41, 41, 4),
    pytest.param((20, 12, 33, 35, 4), marks=pytest.mark.soak),
    pytest.param((32, 32, 40, 40, 8), marks=pytest.mark.soak),
    (6, 0, 1, 1, 3),
    (1, 0, 5, 7, 1),
]


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers in channels_last memory."""
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def norm_inputs(
    channels: int, skip: int, height: int, width: int, groups: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Everything that add_group_norm_silu takes."""
    total, size = channels + skip, (height, width)
    return {
        "x": image(3, channels, *size, dtype=dtype),
        "weight": torch.randn(total),
        "bias": torch.randn(total),
        "groups": groups,
        "eps": 1e-6,
        "residual": image(3, channels, *size, dtype=dtype),
        "skip": image(3, skip, *size, dtype=dtype) if skip else None,
        "time": torch.randn(total).expand(3, total),
    }


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_of_a_sum_and_the_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = norm_inputs(*shape, dtype=dtype)
    out, joined = kernels.add_group_norm_silu(**given)
    assert_same_bits("sum", joined, reference.add_group_norm_silu(**given)[1])
    assert out.is_contiguous(memory_format=torch.channels_last)
    weight, bias = given["weight"].double(), given["bias"].double()
    wanted = reference.group_norm_silu(joined.double(), weight, bias, given["groups"], 1e-6)
    deviations = joined.double().unflatten(1, (given["groups"], -1)).flatten(2)
    spread = (deviations.var(2, correction=0) + 1e-6).sqrt()
    largest = float((deviations.abs().amax(2) / spread).max()) * float(weight.abs().max()) + float(bias.abs().max())
    assert_within("out", out, wanted, tolerance(dtype, largest, ROUNDINGS["group_norm_silu"]))


@pytest.mark.interpreter
@pytest.mark.parametrize("missing", ["residual", "skip", "time"])
def test_each_part_of_a_sum_may_be_missing(missing: str) -> None:
    given = norm_inputs(8, 8, 6, 5, 4) | {missing: None}
    if missing == "skip":
        given |= {name: given[name][..., :8] for name in ("weight", "bias", "time")}
    out, joined = kernels.add_group_norm_silu(**given)
    wanted, wanted_joined = reference.add_group_norm_silu(**given)
    assert_same_bits("sum", joined, wanted_joined)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 32, 8, 8), (1, 5, 3, 7), (2, 200, 5, 4), (1, 1, 1, 1), (0, 4, 3, 3), (2, 4, 0, 3)]
)
@pytest.mark.parametrize("name", SUMS)
def test_sums_have_the_bits_of_the_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, bias = image(*shape, dtype=dtype), image(*shape, dtype=dtype), torch.randn(shape[1])
    for given in (
        (x, bias, residual),
        (x, bias, None),
        (x, None, residual),
        (x.contiguous(), bias.to(dtype), residual),
    ):
        got, wanted = getattr(kernels, name)(*given), getattr(reference, name)(*given)
        for ours, theirs in zip(tuples(got), tuples(wanted), strict=True):
            assert_same_bits(name, ours, theirs)
            assert ours.is_contiguous(memory_format=torch.channels_last)


def test_the_references_are_pytorchs_operators() -> None:
    x, residual, bias = image(2, 6, 3, 5).double(), image(2, 6, 3, 5).double(), torch.randn(6).double()
    wanted = x + residual + bias[:, None, None]
    assert torch.equal(reference.add_bias(x, bias, residual), wanted)
    doubled = torch.nn.functional.interpolate(wanted, scale_factor=2.0, mode="nearest")
    assert torch.equal(reference.add_bias_doubled(x, bias, residual), doubled)
    total, padded = reference.add_bias_padded(x, bias, residual)
    assert torch.equal(total, wanted)
    assert torch.equal(padded, torch.nn.functional.pad(wanted, (0, 1, 0, 1)))
    given = norm_inputs(6, 0, 3, 5, 3)
    joined = given["x"] + given["residual"] + given["time"][:, :, None, None]
    out, total = reference.add_group_norm_silu(**given)
    assert torch.equal(total, joined)
    norm = torch.nn.functional.group_norm(joined, 3, given["weight"], given["bias"], 1e-6)
    torch.testing.assert_close(out, torch.nn.functional.silu(norm), rtol=0, atol=1e-5)


def tuples(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """One result or several, as several."""
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.interpreter
@pytest.mark.parametrize("adds", [False, True])
def test_a_batch_in_parts_has_the_same_bits(adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = norm_inputs(24, 16, 29, 29, 4)
    if not adds:
        del given["residual"]
        given |= {"scale": torch.randn(3, 120)[:, 40:80], "shift": torch.randn(3, 120)[:, 80:]}
    op: Callable[..., Any] = kernels.add_group_norm_silu if adds else kernels.group_norm_silu
    whole, launches = tuples(op(**given)), []
    monkeypatch.setattr(group_norm, "lanes_in_cache", lambda lanes, size: launches.append((lanes, size)) or 2)
    for ours, theirs in zip(tuples(op(**given)), whole, strict=True):
        assert_same_bits("out", ours, theirs)
    assert launches == [(3, 29 * 29 * 40 * 4)]


def test_parts_hold_what_the_cache_holds() -> None:
    from stepfusion.kernels.group_norm_geometry import lanes_in_cache

    image = 256 * 256 * 128 * 2
    assert [lanes_in_cache(lanes, image) for lanes in (1, 8)] == [1, 1]
    assert lanes_in_cache(64, 1 << 20) == 24
    assert lanes_in_cache(5, 1 << 20) == 5
    assert lanes_in_cache(3, 1 << 30) == 1


@pytest.mark.parametrize("name", [*SUMS, "add_group_norm_silu"])
def test_gradients_go_through_the_reference(name: str) -> None:
    if name == "add_group_norm_silu":
        given = norm_inputs(8, 8, 4, 4, 4)
        given |= {
            key: t.requires_grad_() for key, t in given.items() if isinstance(t, torch.Tensor) and t._base is None
        }
    else:
        given = {"x": image(2, 8, 4, 4).requires_grad_(), "bias": torch.randn(8).requires_grad_()}
    sum(t.sum() for t in tuples(getattr(kernels, name)(**given))).backward()  # type: ignore[union-attr]
    assert all(t.grad is not None for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad)


@pytest.mark.interpreter
def test_opcheck() -> None:
    ops = torch.ops.stepfusion
    x, bias = image(2, 8, 4, 6), torch.randn(8)
    larger = image(2, 8, 5, 7)
    torch.library.opcheck(ops.add_bias_.default, (x, x, bias, torch.empty_like(x), None, False))
    torch.library.opcheck(ops.add_bias_.default, (x, None, bias, torch.empty_like(x), larger, True))
    torch.library.opcheck(
        ops.add_group_norm_silu.default, (x, x, x, bias.repeat(2), bias.repeat(2), 4, 1e-6, None, True)
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [*SUMS, "add_group_norm_silu"])
def test_compiles_as_one_graph(name: str) -> None:
    options = {"groups": 4, "eps": 1e-6, "weight": torch.randn(8)} if name == "add_group_norm_silu" else {}
    given = {"x": image(2, 8, 4, 6), "bias": torch.randn(8), "residual": image(2, 8, 4, 6), **options}
    torch.compiler.reset()
    compiled = torch.compile(getattr(kernels, name), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(tuples(compiled(**given)), tuples(getattr(kernels, name)(**given)), strict=True):
        assert_same_bits(name, ours, theirs)


X, B = torch.zeros(2, 4, 3, 3), torch.zeros(4)


@pytest.mark.parametrize("ops", [kernels, reference], ids=["fused", "reference"])
@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("add_bias", (X[0], B), ValueError, r"^x must be images \[B, C, H, W\], got shape \[4, 3, 3\]$"),
        ("add_bias", (X.long(), B), TypeError, "^x must be float16 or bfloat16 or float32"),
        ("add_bias_doubled", (X, B[:3]), ValueError, r"^bias must have shape \[4\], got \[3\]$"),
        ("add_bias_doubled", (X, B.half()), TypeError, "^bias must be float32, got float16$"),
        (
            "add_bias_padded",
            (X, B, X[:1]),
            ValueError,
            r"^residual must have shape \[2, 4, 3, 3\], got \[1, 4, 3, 3\]$",
        ),
        ("add_bias_padded", (X, None, X.half()), TypeError, "^residual must be float32, got float16$"),
    ],
)
def test_bad_input(ops: Any, name: str, given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(ops, name)(*given)


def test_a_residual_is_like_x() -> None:
    with pytest.raises(ValueError, match=r"^residual must have shape \[2, 4, 3, 3\], got \[2, 4, 3, 2\]$"):
        kernels.add_group_norm_silu(X, B, B, 2, 1e-6, residual=X[..., :2])
