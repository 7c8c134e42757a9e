"""The residual block in one operator: against its definition in float64, beside PyTorch's operators."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stepfusion.kernels.cpu import resnet
from stepfusion.kernels.cpu.resnet import ResnetWeights, pack_shortcut, resnet_block
from stepfusion.kernels.cpu.winograd import transform_weight
from stepfusion.kernels.cpu.winograd_matrices import F2, F4, Scheme
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.cpu_kernels import rms, thread_counts

#: In bfloat16, the root-mean-square error relative to that of the same block by PyTorch's operators.
LOSS = {"F2": 1.0, "F4": 2.0}
SQUARE = torch.ones(16, 16, 3, 3)


class Problem:
    """A residual block from `channels` + `skips` to `outputs` channels, and what goes in."""

    def __init__(
        self,
        dtype: torch.dtype,
        batch: int,
        channels: int,
        skips: int,
        outputs: int,
        height: int,
        width: int,
        groups: int,
    ) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(channels + 7 * height + outputs)
        inputs = channels + skips
        self.x = self.images(batch, channels, height, width)
        self.skip = self.images(batch, skips, height, width) if skips else None
        self.rows = self.numbers(batch, 4 * outputs)
        self.groups, self.eps, self.output_scale = groups, 1e-5, 1.25
        self.norm1, self.norm2 = ((self.numbers(c) + 1, self.numbers(c)) for c in (inputs, outputs))
        self.conv1 = self.numbers(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5, self.numbers(outputs)
        self.conv2 = self.numbers(outputs, outputs, 3, 3) / (9 * outputs) ** 0.5, self.numbers(outputs)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = self.numbers(outputs, inputs, 1, 1) / inputs**0.5, self.numbers(outputs)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def images(self, *shape: int) -> Tensor:
        return self.numbers(*shape).contiguous(memory_format=torch.channels_last)

    def row(self, index: int) -> Tensor:
        """[B, K] of a longer row: rows lie apart."""
        return self.rows.chunk(4, dim=1)[index]

    def definition(self, dtype: torch.dtype, **rows: Tensor) -> Tensor:
        """The block by PyTorch's own operators."""
        x, norm1, norm2, conv1, conv2 = (
            [t.to(dtype) for t in tensors] for tensors in ((self.x,), self.norm1, self.norm2, self.conv1, self.conv2)
        )
        rows = {name: row.to(dtype)[:, :, None, None] for name, row in rows.items()}
        both = torch.cat([*x, *([] if self.skip is None else [self.skip.to(dtype)])], dim=1)
        h = functional.silu(functional.group_norm(both, self.groups, *norm1, self.eps))
        h = functional.conv2d(h, *conv1, padding=1)
        h = functional.group_norm(h + rows["time"] if "time" in rows else h, self.groups, *norm2, self.eps)
        h = h * (1 + rows["scale"]) + rows["shift"] if "scale" in rows else h
        h = functional.conv2d(functional.silu(h), *conv2, padding=1)
        residual = both
        if self.shortcut is not None:
            residual = functional.conv2d(both, *(t.to(dtype) for t in self.shortcut))
        return (residual + h) / self.output_scale

    def weights(self, scheme: Scheme = F2) -> ResnetWeights:
        return ResnetWeights(
            *self.norm1,
            transform_weight(self.conv1[0], scheme, self.dtype),
            self.conv1[1].float(),
            *self.norm2,
            transform_weight(self.conv2[0], scheme, self.dtype),
            self.conv2[1].float(),
            None if self.shortcut is None else pack_shortcut(self.shortcut[0], self.dtype),
            None if self.shortcut is None else self.shortcut[1].float(),
            self.groups,
            self.eps,
            self.output_scale,
        )


@pytest.mark.parametrize("scheme", [F2, F4], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("rows", ["time", "scale and shift", "none"])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 32, 0, 32, 8, 8, 8),  # the residual is x
        (3, 64, 32, 48, 16, 16, 16),  # groups of 6 of [x, skip], of which one has channels of both
        (1, 256, 128, 128, 16, 16, 32),  # 12 channels a group
        (5, 48, 0, 80, 7, 9, 8),  # ragged tiles, panels of 16 channels
        (9, 16, 16, 16, 4, 4, 4),
        (1, 32, 0, 16, 3, 150, 8),  # a block of tiles is part of a row
        (2, 32, 32, 32, 1, 1, 8),
        (2, 48, 16, 64, 5, 5, 8),  # the residual is [x, skip]
    ],
    ids=str,
)
def test_it_is_the_block(dtype: torch.dtype, sizes: tuple[int, ...], rows: str, scheme: Scheme) -> None:
    problem = Problem(dtype, *sizes)
    given = {
        "time": {"time": problem.row(1)},
        "scale and shift": {"scale": problem.row(0), "shift": problem.row(2)},
        "none": {},
    }[rows]
    y = resnet_block(problem.x, problem.weights(scheme), skip=problem.skip, **given)
    exact = problem.definition(torch.float64, **given)
    assert y.shape == exact.shape
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.float32:
        allowed = tolerance(dtype, float(exact.abs().max()), ROUNDINGS["resnet_block"])
        assert float((y - exact).abs().max()) <= allowed
    else:
        assert rms(y - exact) <= LOSS[scheme.name] * rms(problem.definition(dtype, **given) - exact)


def test_the_residual_passes_unharmed(dtype: torch.dtype) -> None:
    """Where both convolutions are zero, y is the residual: exactly, for a shortcut of ones and zeros."""
    problem = Problem(dtype, 2, 32, 16, 48, 6, 10, 8)
    nothing = {name: torch.zeros_like(getattr(problem.weights(), name)) for name in ("conv2", "conv2_bias")}
    weights = replace(problem.weights(), **nothing, output_scale=1.0, shortcut=None, shortcut_bias=None)
    assert problem.skip is not None
    whole = torch.cat((problem.x, problem.skip), dim=1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(resnet_block(whole, weights), whole)
    ones = replace(
        weights, shortcut=pack_shortcut(torch.eye(48)[:, :, None, None], dtype), shortcut_bias=torch.arange(48.0)
    )
    y = resnet_block(problem.x, ones, skip=problem.skip)
    assert torch.equal(y, (whole.float() + torch.arange(48.0)[:, None, None]).to(dtype))


@pytest.mark.parametrize("scheme", [F2, F4], ids=lambda scheme: scheme.name)
def test_an_images_bits_depend_on_itself_alone(dtype: torch.dtype, scheme: Scheme) -> None:
    """Neither on its place, nor on its neighbours, nor on the number of threads or the layout of the batch."""
    problem = Problem(dtype, 9, 32, 32, 48, 10, 10, 8)
    assert problem.skip is not None
    weights, x, skip, time = problem.weights(scheme), problem.x, problem.skip, problem.row(0)
    y = resnet_block(x, weights, skip=skip, time=time)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resnet_block(x[order], weights, skip=skip[order], time=time[order]), y[order])
    assert torch.equal(resnet_block(x.contiguous(), weights, skip=skip.contiguous(), time=time.clone()), y)
    strange = x.clone()
    strange[1:] = torch.nan
    alone = resnet_block(strange, weights, skip=skip, time=time)
    assert torch.equal(alone[0], y[0])
    assert alone[1:].isnan().all(), "what is not finite shows"
    for _ in thread_counts():
        assert torch.equal(resnet_block(x, weights, skip=skip, time=time), y)
        assert torch.equal(resnet_block(x[:1], weights, skip=skip[:1], time=time[:1]), y[:1])


def test_nothing_to_do(dtype: torch.dtype) -> None:
    problem = Problem(dtype, 2, 16, 0, 32, 4, 4, 4)
    assert resnet_block(problem.x[:0], problem.weights()).shape == (0, 32, 4, 4)


def test_the_op_is_what_torch_library_wants(dtype: torch.dtype) -> None:
    problem = Problem(dtype, 2, 16, 16, 16, 4, 6, 4)
    w = problem.weights()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    tensors = [getattr(w, field.name) for field in fields(w)]
    arguments = (problem.x, problem.skip, problem.row(0), None, None, *tensors)
    torch.library.opcheck(resnet._resnet_block_cpu, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 16, 4, 4)}, TypeError, "x must be bfloat16, got float32"),
        ({"x": torch.ones(1, 24, 4, 4).bfloat16()}, ValueError, r"x must be \[B, C, H, W\], C a multiple of 16"),
        ({"x": torch.ones(1, 32, 4, 4).bfloat16()}, ValueError, "must have 32 channels together.*got 48"),
        ({"skip": torch.ones(1, 16, 4, 5).bfloat16()}, ValueError, r"skip must have shape \[1, 16, 4, 4\]"),
        ({"skip": None}, ValueError, "must have 32 channels together, as conv1 has, got 16"),
        ({"time": torch.ones(1, 17).bfloat16()}, ValueError, r"time must have shape \[1, 16\]"),
        ({"scale": torch.ones(1, 16).bfloat16()}, ValueError, "scale and shift must be given together"),
        ({"conv1": torch.ones(16, 32, 3, 3).bfloat16()}, ValueError, "conv1 must be what transform_weight returns"),
        (
            {"conv2": transform_weight(torch.ones(16, 16, 3, 3), F4, torch.bfloat16)},
            ValueError,
            "conv2 must have shape",
        ),
        ({"groups": 5}, ValueError, "groups must divide 32 and 16, got 5"),
        ({"groups": 0}, ValueError, "groups must divide 32 and 16, got 0"),
        ({"groups": -4}, ValueError, "groups must divide 32 and 16, got -4"),
        ({"norm1_weight": torch.ones(64).bfloat16()[::2]}, ValueError, r"norm1_weight must be contiguous.*\[2\]"),
        ({"conv1_bias": torch.zeros(1).expand(16)}, ValueError, r"conv1_bias must be contiguous, got strides \[0\]"),
        ({"norm1_bias": torch.ones(16).bfloat16()}, ValueError, r"norm1_bias must have shape \[32\]"),
        ({"norm2_weight": torch.ones(16)}, TypeError, "norm2_weight must be bfloat16"),
        ({"conv2_bias": torch.ones(16).bfloat16()}, TypeError, "conv2_bias must be float32"),
        ({"shortcut": None}, ValueError, "shortcut and shortcut_bias must be given from 32 to 16 channels"),
        ({"shortcut_bias": torch.ones(17)}, ValueError, r"shortcut_bias must have shape \[16\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Problem(torch.bfloat16, 1, 16, 16, 16, 4, 4, 4)
    given: dict[str, Any] = {"x": problem.x, "skip": problem.skip, "time": problem.row(0)}
    given |= {name: value for name, value in change.items() if name not in {f.name for f in fields(ResnetWeights)}}
    attributes = {name: value for name, value in change.items() if name not in given}
    with pytest.raises(error, match=message):
        resnet_block(given.pop("x"), replace(problem.weights(), **attributes), **given)
