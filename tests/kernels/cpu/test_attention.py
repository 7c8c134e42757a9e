"""The attention block in one operator: against its definition in float64, beside PyTorch's operators."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stepfusion.kernels.cpu import attention
from stepfusion.kernels.cpu.attention import AttentionWeights, attention_block, fits, pack_projections
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.cpu_kernels import rms, thread_counts


class Problem:
    """An attention block, and images that go in."""

    def __init__(
        self, dtype: torch.dtype, batch: int, channels: int, height: int, width: int, heads: int, norm: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(channels + height)

        def numbers(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        self.dtype = dtype
        self.heads, self.groups, self.eps, self.output_scale = heads, 8, 1e-6, 0.75
        self.x = numbers(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
        self.norm = (numbers(channels) + 1, numbers(channels)) if norm else None
        self.projections = [numbers(channels, channels, scale=1.5 * channels**-0.5) for _ in range(4)]
        self.biases = [numbers(channels) for _ in range(4)]

    def definition(self, dtype: torch.dtype) -> Tensor:
        x = self.x.to(dtype)
        h = x
        if self.norm is not None:
            h = functional.group_norm(x, self.groups, *(t.to(dtype) for t in self.norm), self.eps)
        tokens = h.flatten(2).transpose(1, 2)
        layers = [(w.to(dtype), b.to(dtype)) for w, b in zip(self.projections, self.biases, strict=True)]
        q, k, v = (functional.linear(tokens, *layer).unflatten(2, (self.heads, -1)) for layer in layers[:3])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)
        attended = functional.linear((weights @ v).transpose(1, 2).flatten(2), *layers[3])
        return (x + attended.transpose(1, 2).reshape(x.shape)) / self.output_scale

    def weights(self) -> AttentionWeights:
        return AttentionWeights(
            *(self.norm or (None, None)),
            pack_projections(self.projections, self.heads, self.dtype),
            torch.stack(self.biases).float(),
            self.heads,
            self.groups,
            self.eps,
            self.output_scale,
        )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        (8, 256, 16, 16, 1),
        (3, 256, 4, 4, 1),
        (2, 128, 8, 10, 4),  # heads of 32, a block of 16 queries
        (2, 192, 4, 12, 2),  # heads of 96, panels of 32
        (1, 64, 32, 32, 2),
        (2, 320, 4, 8, 5),
        (3, 96, 7, 7, 3),  # 49 pixels: 15 places of keys and values are empty
        (2, 32, 9, 13, 1),
        (2, 64, 1, 1, 1),
    ],
    ids=str,
)
def test_it_is_the_block(dtype: torch.dtype, sizes: tuple[int, int, int, int, int], norm: bool) -> None:
    problem = Problem(dtype, *sizes, norm=norm)
    y = attention_block(problem.x, problem.weights())
    exact = problem.definition(torch.float64)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.float32:
        allowed = tolerance(dtype, float(exact.abs().max()), ROUNDINGS["attention_block"])
        assert float((y - exact).abs().max()) <= allowed
    else:
        assert rms(y - exact) <= rms(problem.definition(dtype) - exact)


def test_every_query_sees_every_key(dtype: torch.dtype) -> None:
    """A pixel far away decides: its key matches every query a hundred times better, so its value comes out."""
    size = 32
    problem = Problem(dtype, 1, size, 16, 16, 1, norm=False)
    eye, nothing = torch.eye(size), torch.zeros(size, size)
    query = torch.zeros(size)
    query[0] = 1000.0
    for token in (0, 17, 130, 255):
        x = torch.zeros(1, size, 256)
        x[0, 0, token], x[0, 1:, token] = 1.0, torch.arange(1.0, size)
        x = x.view(1, size, 16, 16).to(dtype).contiguous(memory_format=torch.channels_last)
        biases = torch.stack((query, torch.zeros(size), torch.zeros(size), torch.zeros(size)))
        weights = replace(
            problem.weights(),
            projections=pack_projections([nothing, eye, eye, eye], 1, dtype),
            biases=biases,
            output_scale=1.0,
        )
        expected = x + x.flatten(2)[:, :, token][:, :, None, None]
        assert torch.equal(attention_block(x, weights), expected)


def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    problem = Problem(dtype, 2, 64, 8, 8, 1)
    large = replace(problem.weights(), biases=problem.weights().biases + 1e4)
    assert attention_block(problem.x, large).isfinite().all()


def test_an_images_bits_depend_on_itself_alone(dtype: torch.dtype) -> None:
    problem = Problem(dtype, 5, 64, 10, 7, 2)
    x, weights = problem.x, problem.weights()
    y = attention_block(x, weights)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(attention_block(x[order], weights), y[order])
    assert torch.equal(attention_block(x.contiguous(), weights), y)
    strange = x.clone()
    strange[1:] = torch.nan
    alone = attention_block(strange, weights)
    assert torch.equal(alone[0], y[0])
    assert alone[1:].isnan().all(), "what is not finite shows"
    for _ in thread_counts():
        assert torch.equal(attention_block(x, weights), y)
        assert torch.equal(attention_block(x[:1], weights), y[:1])


@pytest.mark.usefixtures("one_thread")
def test_what_another_image_left_in_memory_does_no_harm(dtype: torch.dtype) -> None:
    """The empty places of keys and values must not meet what is not finite."""
    problem = Problem(dtype, 1, 64, 7, 7, 1)
    expected = attention_block(problem.x, problem.weights())
    attention_block(torch.full((1, 64, 16, 16), torch.nan, dtype=dtype), problem.weights())
    keys = torch.full((1 << 16,), torch.nan, dtype=dtype)  # what memory for keys and values may hold
    del keys
    assert torch.equal(attention_block(problem.x, problem.weights()), expected)


def test_nothing_to_do(dtype: torch.dtype) -> None:
    problem = Problem(dtype, 1, 32, 4, 4, 1)
    assert attention_block(problem.x[:0], problem.weights()).shape == (0, 32, 4, 4)


def test_the_op_is_what_torch_library_wants(dtype: torch.dtype) -> None:
    problem = Problem(dtype, 2, 32, 4, 8, 1)
    w = problem.weights()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    arguments = (problem.x, *(getattr(w, field.name) for field in fields(w)))
    torch.library.opcheck(attention._attention_block_cpu, arguments, test_utils=tests)


def test_what_fits() -> None:
    assert fits(256, 1, 256)
    assert fits(128, 4, 16)
    assert not fits(128, 8, 16), "heads of 16 channels"
    assert not fits(100, 3, 16), "heads do not divide the channels"
    assert not fits(64, 1, 128 * 128), "scores that leave the cache"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 64, 4, 4)}, TypeError, "x must be bfloat16, got float32"),
        (
            {"x": torch.ones(1, 64, 65, 64).bfloat16()},
            ValueError,
            r"x must be \[B, 64, H, W\], H W at most 4096, got",
        ),
        ({"x": torch.ones(1, 32, 4, 4).bfloat16()}, ValueError, r"x must be .*got \[1, 32, 4, 4\]"),
        (
            {"projections": torch.ones(4, 64, 64).bfloat16()},
            ValueError,
            r"projections must have shape \[4, 2, 1, 32,",
        ),
        ({"biases": torch.ones(4, 64).bfloat16()}, TypeError, "biases must be float32"),
        ({"norm_bias": None}, ValueError, "norm_weight and norm_bias must be given together"),
        ({"norm_bias": torch.ones(65).bfloat16()}, ValueError, r"norm_bias must have shape \[64\]"),
        ({"heads": 4}, ValueError, "multiple of 32 channels each, got 64 channels and 4 heads"),
        ({"heads": 0}, ValueError, "multiple of 32 channels each, got 64 channels and 0 heads"),
        ({"heads": -2}, ValueError, "multiple of 32 channels each, got 64 channels and -2 heads"),
        ({"groups": -8}, ValueError, "groups must divide 64, got -8"),
        ({"norm_weight": torch.ones(1).bfloat16().expand(64)}, ValueError, "norm_weight must be contiguous"),
        ({"groups": 7}, ValueError, "groups must divide 64, got 7"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Problem(torch.bfloat16, 1, 64, 4, 4, 2)
    x = change.pop("x", problem.x)
    with pytest.raises(error, match=message):
        attention_block(x, replace(problem.weights(), **change))
