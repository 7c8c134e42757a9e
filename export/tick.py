"""A tick as one program: the network, the table's step and its noise, for consumers that have no stepfusion.

    x_next = tick(x, row, coefficients, timesteps, seed, index[, labels][, guidance][, conditions]
                  [, null conditions][, told, in_scale][, history])
    z      = initial_noise(seed, index)

A consumer starts from ``start_scale`` * z, 1 if the table names none, calls the tick for row 0 (``starts`` of another
sampler of the table), goes on with ``next_row`` of the table until that is -1, and has the image. Everything that
tells samplers apart is data: another table needs no other program.

Conditions are the network's, [B, ...] each, and in a guided tick there is another of each, named ``null_...``, that
stands for none. The tick prepares them in every row, which an engine does once for an image.

``told`` and ``in_scale`` are there on a path that is not discrete: what the network is told at each row, and what x
is multiplied with before the network sees it. ``history`` is there if the program was made for samplers that use what
earlier rows kept; such a tick returns (x_next, history_next), and any history will do for the first row.

The step is that of :mod:`stepfusion.kernels.step` and the noise that of :mod:`stepfusion.kernels.philox`: the same
float32 operations in the same order, so the same noise bit for bit unless a compiler contracts products and sums.
They are written in operators that ONNX has too and that overflow nowhere: int64 arithmetic in place of unsigned
words, and comparisons in place of reading a float's bits. No branch depends on data, so a tick is one graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepfusion.export.manifest import NULL
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
        network: ``network(x, timesteps[, labels], *conditions)``, in eval mode; returns what the table's prediction
            says, or twice as many channels if it learned its variance.
        dtype: of the network's input; the state is float32 in any case.
        null_label: the label without a condition, for a tick with classifier-free guidance (Ho & Salimans 2022),
            which then runs the network for both labels of each lane.
        further: the names of the inputs after ``index``, of ``labels``, ``guidance``, the conditions, those that
            stand for none, ``told``, ``in_scale`` and ``history``, in this order.
        conditions: the names of those that are conditions, in the network's order.
    """

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype = torch.float32,
        null_label: int | None = None,
        further: Sequence[str] = (),
        conditions: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.null_label = null_label
        self.further = tuple(further)
        self.conditions = tuple(conditions)

    def forward(
        self,
        x: Tensor,
        row: Tensor,
        coefficients: Tensor,
        timesteps: Tensor,
        seed: Tensor,
        index: Tensor,
        *further: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Move every lane one row on.

        Args:
            x: float32 [B, C, H, W], the states.
            row: int64 [B], each lane's row of the table; -1 leaves the lane alone.
            coefficients: float32 [R, 21], the columns :data:`stepfusion.kernels.COLUMNS`.
            timesteps: int64 [R], what keys a row's noise and, without ``told``, what the network is told.
            seed: int64 [B], the 64 bits of each lane's seed.
            index: int64 [B], in [0, 2**32), the image's number under its seed.
            further: the inputs that the tick was made with: ``labels`` int64 [B]; ``guidance`` float32 [B], 1 is
                none; conditions float32 or int64 [B, ...]; ``told`` and ``in_scale`` float32 [R]; ``history`` float32
                [B, K, C, H, W], what the lane's last K rows that kept something kept, the latest first.

        Returns:
            float32 [B, C, H, W], and with ``history`` also the next one. A row beyond the table gives NaN.
        """
        given = dict(zip(self.further, further, strict=True))
        told, in_scale, history = (given.get(name) for name in ("told", "in_scale", "history"))
        rows = coefficients.shape[0]
        inside = (row < rows)[:, None]
        safe = row.clamp(0, rows - 1)
        columns = torch.where(inside, coefficients[safe], math.nan)
        t = timesteps[safe]
        guidance = given.get("guidance")
        if guidance is not None:
            guidance = torch.where(columns[:, COLUMNS.index("unguided")] == 0, guidance, 1.0)
        shown = x if in_scale is None else launch.per_lane(in_scale[safe], x) * x
        out = self._evaluate(shown.to(self.dtype), t if told is None else told[safe], given, guidance)
        z = normal(seed, index, t, tuple(x.shape[1:]), philox.STREAM_STEP)
        active = launch.per_lane(row >= 0, x)
        x0 = predict(x, out, columns, 0 if history is None else history.shape[1], scaled=in_scale is not None)
        moved = torch.where(active, advance(x, out, x0, columns, z, history), x)
        if history is None:
            return moved
        return moved, torch.where(active[:, None], remember(x, x0, columns, history), history)

    def _evaluate(self, x: Tensor, t: Tensor, given: Mapping[str, Tensor], guidance: Tensor | None) -> Tensor:
        """The network's output in float32, guided if the tick is; a learned variance is that of the condition."""
        labels = [given["labels"]] if "labels" in given else []
        shown = [x, t, *labels, *self._conditions(given)]
        if guidance is None:
            return self._call(*shown)
        nothing = [label if self.null_label is None else torch.full_like(label, self.null_label) for label in labels]
        null = [x, t, *nothing, *self._conditions(given, NULL)]
        both = self._call(*(torch.cat(pair) for pair in zip(shown, null, strict=True)))
        lanes, channels = x.shape[:2]
        out, uncond = both[:lanes, :channels], both[lanes:, :channels]
        scale = launch.per_lane(guidance, x)
        guided = torch.where(scale == 1.0, out, uncond + scale * (out - uncond))
        return guided if both.shape[1] == channels else torch.cat((guided, both[:lanes, channels:]), dim=1)

    def _conditions(self, given: Mapping[str, Tensor], prefix: str = "") -> list[Tensor]:
        """The conditions in the network's dtype, or int64."""
        values = [given[prefix + name] for name in self.conditions]
        return [value.to(self.dtype) if value.is_floating_point() else value for value in values]

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
    """What :func:`stepfusion.kernels.reference.diffusion_step` computes without a history, and without a branch.

    Args:
        x, z: float32 [B, C, H, W]. out: the same, or [B, 2 C, H, W] with learned variance.
        columns: float32 [B, 21], each lane's row of the table.
    """
    return advance(x, out, predict(x, out, columns), columns, z)


def predict(x: Tensor, out: Tensor, columns: Tensor, entries: int = 0, *, scaled: bool = False) -> Tensor:
    """The x0 of each lane's row, float32 [B, C, H, W].

    NaN for a row that a tick cannot run: one that uses more of the history than ``entries``, a quantile of its x0 or
    rescaled guidance, or that scales what the network is shown if the tick is not ``scaled``.
    """
    c = _columns(columns, x)
    runs = torch.ones_like(c["clip"], dtype=torch.bool) if scaled else c["net_scale"] == 1
    for name in (*HISTORY[entries:], *WHOLE_IMAGE):
        runs = runs & (c[name] == 0)
    x0_x = torch.where(runs, c["x0_x"], math.nan)
    clip = c["clip"]
    return torch.minimum(torch.maximum(x0_x * x + c["x0_out"] * out[:, : x.shape[1]], -clip), clip)


def advance(x: Tensor, out: Tensor, x0: Tensor, columns: Tensor, z: Tensor, history: Tensor | None = None) -> Tensor:
    """The state after each lane's row, float32 [B, C, H, W]; ``history`` is [B, K, C, H, W]."""
    c = _columns(columns, x)
    sigma = c["sigma"]
    result = c["next_x0"] * x0 + c["next_x"] * x + c["next_out"] * out[:, : x.shape[1]]
    for name, kept in zip(HISTORY, () if history is None else history.unbind(1), strict=False):
        result = torch.where(c[name] != 0, result + c[name] * kept, result)
    std = sigma
    if out.shape[1] != x.shape[1]:
        v = out[:, x.shape[1] :]
        std = sigma * (c["half_log_min"] + (v * 0.5 + 0.5) * c["half_log_span"]).exp()
    return torch.where(sigma != 0, result + std * z, result)


def remember(x: Tensor, x0: Tensor, columns: Tensor, history: Tensor) -> Tensor:
    """The history [B, K, C, H, W] after each lane's row, which may keep something of its x and x0."""
    c = _columns(columns, x)
    keeps = (c["keep_x"] != 0) | (c["keep_x0"] != 0)
    kept = c["keep_x"] * x + c["keep_x0"] * x0
    return torch.where(keeps[:, None], torch.cat((kept[:, None], history[:, :-1]), dim=1), history)


def _columns(columns: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Columns [B, 21] by their names, each as it meets x."""
    return {name: launch.per_lane(column, x) for name, column in zip(COLUMNS, columns.unbind(1), strict=True)}


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
