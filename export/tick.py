"""A tick as one program: the network, the table's step and its noise, for consumers that have no stepfusion.

    x_next = tick(x, row, coefficients, timesteps, seed, index[, labels[, guidance]])
    x_T    = initial_noise(seed, index)

A consumer starts from x_T, calls the tick for row 0 (``starts`` of another sampler of the table), goes on with
``next_row`` of the table until that is -1, and has the image. Everything that tells samplers apart is data: another
table needs no other program.

The step is that of :mod:`stepfusion.kernels.step` and the noise that of :mod:`stepfusion.kernels.philox`: the same
float32 operations in the same order, so the same noise bit for bit unless a compiler contracts products and sums.
They are written in operators that ONNX has too and that overflow nowhere: int64 arithmetic in place of unsigned
words, and comparisons in place of reading a float's bits. No branch depends on data, so a tick is one graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepfusion.kernels import COLUMNS, launch, philox
from stepfusion.kernels import philox_numbers as numbers
from stepfusion.kernels.coefficients import HISTORY, WHOLE_IMAGE

_WORD = 1 << 32
_MASK = _WORD - 1
_FOUR_THIRDS = 1.3333334  # the float32 above 4/3, where philox puts the end of a mantissa
_LARGEST_EXPONENT = 32  # of a word + 1


class Tick(nn.Module):
    """One row of a table for every lane, network included.

    Args:
        network: ``network(x, timesteps[, labels])``, in eval mode; returns what the table's prediction says, or twice
            as many channels if it learned its variance.
        dtype: of the network's input; the state is float32 in any case.
        null_label: the label without a condition, for a tick with classifier-free guidance (Ho & Salimans 2022),
            which then runs the network for both labels of each lane.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32, null_label: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.null_label = null_label

    def forward(
        self,
        x: Tensor,
        row: Tensor,
        coefficients: Tensor,
        timesteps: Tensor,
        seed: Tensor,
        index: Tensor,
        labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Move every lane one row on.

        Args:
            x: float32 [B, C, H, W], the states.
            row: int64 [B], each lane's row of the table; -1 leaves the lane alone.
            coefficients: float32 [R, 21], the columns :data:`stepfusion.kernels.COLUMNS`.
            timesteps: int64 [R], what the network is told and what keys a row's noise.
            seed: int64 [B], the 64 bits of each lane's seed.
            index: int64 [B], in [0, 2**32), the image's number under its seed.
            labels: int64 [B], if the network takes labels.
            guidance: float32 [B], if the tick was made with a null label; 1 is none.

        Returns:
            float32 [B, C, H, W]. A row beyond the table gives NaN.
        """
        rows = coefficients.shape[0]
        inside = (row < rows)[:, None]
        safe = row.clamp(0, rows - 1)
        columns = torch.where(inside, coefficients[safe], math.nan)
        t = timesteps[safe]
        if guidance is not None:
            guidance = torch.where(columns[:, COLUMNS.index("unguided")] == 0, guidance, 1.0)
        out = self._evaluate(x.to(self.dtype), t, labels, guidance)
        z = normal(seed, index, t, tuple(x.shape[1:]), philox.STREAM_STEP)
        return torch.where(launch.per_lane(row >= 0, x), step(x, out, columns, z), x)

    def _evaluate(self, x: Tensor, t: Tensor, labels: Tensor | None, guidance: Tensor | None) -> Tensor:
        """The network's output in float32, guided if the tick is; a learned variance is that of the condition."""
        if labels is None:
            return self._call(x, t)
        if self.null_label is None or guidance is None:
            return self._call(x, t, labels)
        nothing = torch.full_like(labels, self.null_label)
        both = self._call(torch.cat((x, x)), torch.cat((t, t)), torch.cat((labels, nothing)))
        lanes, channels = x.shape[:2]
        out, uncond = both[:lanes, :channels], both[lanes:, :channels]
        scale = launch.per_lane(guidance, x)
        guided = torch.where(scale == 1.0, out, uncond + scale * (out - uncond))
        return guided if both.shape[1] == channels else torch.cat((guided, both[:lanes, channels:]), dim=1)

    def _call(self, *arguments: Tensor) -> Tensor:
        out: Any = self.network(*arguments)
        result: Tensor = getattr(out, "sample", out)
        return result.to(torch.float32)


class InitialNoise(nn.Module):
    """Where every image of a shape starts: x_T of (seed, index), float32 [B, *shape]."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, seed: Tensor, index: Tensor) -> Tensor:
        """Map seed and index, int64 [B], to standard normal noise, the same that an engine starts from."""
        return normal(seed, index, torch.zeros_like(seed), self.shape, philox.STREAM_INITIAL)


def step(x: Tensor, out: Tensor, columns: Tensor, z: Tensor) -> Tensor:
    """What :func:`stepfusion.kernels.reference.diffusion_step` computes, without a branch.

    Args:
        x, z: float32 [B, C, H, W]. out: the same, or [B, 2 C, H, W] with learned variance.
        columns: float32 [B, 21], each lane's row of the table. A row that uses a history, a quantile of its x0 or
            rescaled guidance gives NaN, and so does one that scales what the network is shown: a tick has none.
    """
    c = {name: launch.per_lane(column, x) for name, column in zip(COLUMNS, columns.unbind(1), strict=True)}
    sigma, clip = c["sigma"], c["clip"]
    eps = out[:, : x.shape[1]]
    runs = c["net_scale"] == 1
    for name in (*HISTORY, *WHOLE_IMAGE):
        runs = runs & (c[name] == 0)
    x0_x = torch.where(runs, c["x0_x"], math.nan)
    x0 = torch.minimum(torch.maximum(x0_x * x + c["x0_out"] * eps, -clip), clip)
    result = c["next_x0"] * x0 + c["next_x"] * x + c["next_out"] * eps
    std = sigma
    if out.shape[1] != x.shape[1]:
        v = out[:, x.shape[1] :]
        std = sigma * (c["half_log_min"] + (v * 0.5 + 0.5) * c["half_log_span"]).exp()
    return torch.where(sigma != 0, result + std * z, result)


def normal(seed: Tensor, index: Tensor, timesteps: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """What :func:`stepfusion.kernels.reference.normal` returns, bit for bit, in portable operators.

    Args:
        seed, index, timesteps: int64 [B]. shape: of one image. stream: one of :mod:`stepfusion.kernels.philox`.

    Returns:
        float32 [B, *shape].
    """
    elements = math.prod(shape)
    # Masked although it is small: Inductor folds products into a bare range, and computes ranges in 32 bits.
    quads = torch.arange((elements + 3) // 4, device=seed.device) & _MASK
    counter = (quads[None], (timesteps & _MASK)[:, None], (index & _MASK)[:, None], stream)
    w0, w1, w2, w3 = _philox(counter, ((seed & _MASK)[:, None], ((seed >> 32) & _MASK)[:, None]))
    pairs = (*_box_muller(w0, w1), *_box_muller(w2, w3))
    return torch.stack(pairs, dim=-1).flatten(1)[:, :elements].reshape(-1, *shape)


def _philox(counter: tuple[Any, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011) on words in [0, 2**32) held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(numbers.ROUNDS):
        (high0, low0), (high1, low1) = _multiply(c0, numbers.M0), _multiply(c2, numbers.M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + numbers.W0) & _MASK, (k1 + numbers.W1) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of word * constant.

    The 64-bit product does not fit int64, but word * (constant - 2**32) does, and is less by word * 2**32: it has the
    same low word, and a high word less by ``word``.
    """
    product = word * (constant - _WORD)
    return (product >> 32) + word, product & _MASK


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals, float32, from two words: the bits of :mod:`stepfusion.kernels.philox`."""
    mantissa = radius_word.to(torch.float32) + 1.0
    exponent = torch.full_like(mantissa, -_LARGEST_EXPONENT)
    for shift in (32, 16, 8, 4, 2, 1):  # to a mantissa in [2/3, 4/3); every product is exact
        large = mantissa >= _FOUR_THIRDS * 2.0 ** (shift - 1)
        mantissa = torch.where(large, mantissa * 2.0**-shift, mantissa)
        exponent = torch.where(large, exponent + shift, exponent)
    f = mantissa - 1.0
    p = f * numbers.LOG[5]
    for c in (*numbers.LOG[4::-1], 0.5, -1.0):
        p = (p + c) * f
    square = exponent * numbers.MINUS_LN2 + p
    radius = square.to(torch.float64).sqrt().to(torch.float32)

    b = torch.where(angle_word >= _WORD // 2, angle_word - _WORD, angle_word).to(torch.float32) * numbers.ANGLE
    b2 = b * b
    sine = (((b2 * numbers.SIN[2] + numbers.SIN[1]) * b2 + numbers.SIN[0]) * b2 + 1.0) * b
    cosine = ((b2 * numbers.COS[1] + numbers.COS[0]) * b2 - 0.5) * b2 + 1.0
    return philox.quadrant((cosine - sine) * radius, (cosine + sine) * radius, angle_word)
