"""3x3 convolutions on CPUs that multiply bfloat16 matrices, by Winograd's algorithm (Lavin & Gray 2016, section 4).

A tile of m x m outputs is ``A^T [(G g G^T) * (B^T d B)] A`` with g the 3x3 weights and d the (m + 2) x (m + 2) inputs
under the tile: (m + 2)^2 products for each pair of channels where the definition has 9 m^2. Summed over the input
channels, they are (m + 2)^2 matrix products, which are nearly all of the work.

=====  ==================================================  ========  ====================  =========================
name   points                                              products  of the definition     rounding, against direct
=====  ==================================================  ========  ====================  =========================
F2     0, 1, -1, infinity                                  16        36, for 2 x 2         1.7 to 2.0
F4     0, +-sqrt(1/2), +-sqrt(2), infinity                 36        144, for 4 x 4        4.6 to 5.2
Up     a 3x3 convolution of an image whose pixels are       9        36, for 2 x 2         1.6 to 1.9
       repeated in 2 x 2 squares, from the small image
=====  ==================================================  ========  ====================  =========================

Transforms and sums are float32; the transformed input and weights are rounded to bfloat16. F4's points keep its
constants near 1: at the usual 0, +-1, +-2 the error is half as large again. The weights are transformed once
(:func:`transform_weight`), in float64.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu_library import LANES, library

Matrix = tuple[tuple[float, ...], ...]

_WIDEST = 64  # output channels of a block
_TILES = 64, 16  # of a block: at most; and at least, even if threads are left without work


@dataclass(frozen=True)
class Scheme:
    """One way to compute a tile, along one of its two axes: the other has the same.

    Attributes:
        name: "F2", "F4" or "Up".
        step: input pixels from a tile to the next.
        output: B^T, G, A^T below: ``y = A^T ((G g) * (B^T d))`` with d [n], g [3], y [m].
    """

    name: str
    step: int
    input: Matrix
    weight: Matrix
    output: Matrix

    @property
    def products(self) -> int:
        """Matrix products of a convolution: n x n."""
        return len(self.input) ** 2

    @property
    def scale(self) -> int:
        """Output pixels for each input pixel along an axis."""
        return len(self.output) // self.step


def toom_cook(m: int, points: tuple[float, ...]) -> tuple[Matrix, Matrix, Matrix]:
    """B^T [n, n], G [n, 3] and A^T [m, n] for m outputs of a filter of 3, n = m + 2, in float64.

    The n - 1 finite points are where both polynomials are evaluated, infinity is the last one (Lavin & Gray 2016,
    section 5.1; Blahut 2010, section 5.3).
    """
    n = m + 2
    if len(set(points)) != n - 1:
        raise ValueError(f"points must be {n - 1} different numbers, got {points}")
    others = [[q for q in points if q != p] for p in points]
    inputs = [(*_polynomial(rest), 0.0) for rest in others]
    scales = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    weights = [tuple(p**k / scale for k in range(3)) for p, scale in zip(points, scales, strict=True)]
    outputs = [(*(p**k for p in points), 1.0 if k == m - 1 else 0.0) for k in range(m)]
    return (*inputs, tuple(_polynomial(points))), (*weights, (0.0, 0.0, 1.0)), tuple(outputs)


def _polynomial(roots: list[float] | tuple[float, ...]) -> list[float]:
    """The coefficients of ``prod (z - root)``, the constant first."""
    coefficients = [1.0]
    for root in roots:
        shifted, scaled = [0.0, *coefficients], [*(root * c for c in coefficients), 0.0]
        coefficients = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


_NEAR, _FAR = math.sqrt(0.5), math.sqrt(2.0)
F2 = Scheme("F2", 2, *toom_cook(2, (0.0, 1.0, -1.0)))
F4 = Scheme("F4", 4, *toom_cook(4, (0.0, _NEAR, -_NEAR, _FAR, -_FAR)))
#: Of d = (left, middle, right): ``g0 left + (g1 + g2) middle`` and ``(g0 + g1) middle + g2 right``.
UP = Scheme(
    "Up",
    1,
    ((1.0, -1.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, -1.0)),
    ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)),
    ((1.0, 1.0, 0.0), (0.0, 1.0, -1.0)),
)
SCHEMES = {scheme.products: scheme for scheme in (F2, F4, UP)}


def fits(in_channels: int, out_channels: int) -> bool:
    """Whether a convolution between so many channels can be transformed."""
    return in_channels > 0 and out_channels > 0 and in_channels % LANES == 0 and out_channels % LANES == 0


def transform_weight(weight: Tensor, scheme: Scheme) -> Tensor:
    """``G g G^T`` of every filter, as :func:`winograd_conv2d` reads it.

    Args:
        weight: [K, C, 3, 3], any floating dtype; C and K multiples of 16.

    Returns:
        bfloat16 [K / k, N, C / 2, k, 2]: N products, k output channels of a block; pairs of input channels together,
        which is how processors multiply bfloat16. ``N / 9`` times as many elements as `weight` has.
    """
    launch.check_dtype("weight", weight, (*launch.FLOATS, torch.float64))
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not fits(weight.shape[1], weight.shape[0]):
        raise ValueError(f"weight must be [K, C, 3, 3], C and K multiples of {LANES}, got {list(weight.shape)}")
    out_channels, in_channels = weight.shape[:2]
    block = _block(out_channels)
    g = torch.tensor(scheme.weight, dtype=torch.float64)
    u = torch.einsum("ia,kcab,jb->ijck", g, weight.detach().double(), g).to(torch.bfloat16)
    u = u.reshape(scheme.products, in_channels // 2, 2, out_channels // block, block)
    return u.permute(3, 0, 1, 4, 2).contiguous()


def _block(channels: int) -> int:
    """Output channels of a block: the largest multiple of 16 up to 64 that divides `channels`."""
    return max(width for width in range(LANES, _WIDEST + 1, LANES) if channels % width == 0)


@functools.cache
def load() -> Any:
    """The C++ function, compiled or found; see :func:`stepfusion.kernels.cpu_library.library`."""
    constants = "\n".join(_constants(scheme) for scheme in SCHEMES.values())
    function = library("winograd", constants).winograd_conv2d
    function.argtypes = [ctypes.c_int64] + [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 7
    function.restype = ctypes.c_char_p
    return function


def _constants(scheme: Scheme) -> str:
    """The scheme as a C++ struct, its constants rounded to float32."""
    n, m = len(scheme.input), len(scheme.output)
    return (
        f"struct {scheme.name} {{ static constexpr int INPUT = {n}, OUTPUT = {m}, STEP = {scheme.step};"
        f" static constexpr float BT[{n}][{n}] = {_array(scheme.input)}, AT[{m}][{n}] = {_array(scheme.output)}; }};"
    )


def _array(matrix: Matrix) -> str:
    return "{" + ", ".join("{" + ", ".join(f"{value!r}f" for value in row) + "}" for row in matrix) + "}"


@torch.library.custom_op("stepfusion::winograd_conv2d", mutates_args=(), device_types="cpu")
def _winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = _empty(x, weight, bias)
    if y.numel() == 0:
        return y
    batch, channels, height, width = x.shape
    scheme = SCHEMES[weight.shape[1]]
    tiles = batch * -(-height // scheme.step) * -(-width // scheme.step)
    most, least = _TILES
    block = min(most, max(least, -(-tiles // torch.get_num_threads())))
    x, weight, bias = x.contiguous(memory_format=torch.channels_last), weight.contiguous(), bias.contiguous()
    pointers = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr()
    shape = batch, height, width, channels, y.shape[1], block, weight.shape[3]
    error = load()(scheme.products, *pointers, *shape)
    if error is not None:
        raise RuntimeError(f"winograd_conv2d failed: {error.decode(errors='replace')}")
    return y


@_winograd_conv2d.register_fake
def _winograd_conv2d_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _empty(x, weight, bias)


def _empty(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale = SCHEMES[int(weight.shape[1])].scale
    shape = (x.shape[0], len(bias), scale * x.shape[2], scale * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with padding 1; with the scheme `UP`, of the image that repeats every pixel in 2 x 2.

    Args:
        x: bfloat16 [B, C, H, W] on the CPU, read as channels_last: anything else is copied to it. Any H and W.
        weight: bfloat16, from :func:`transform_weight`, which has chosen the scheme.
        bias: float32 [K].

    Returns:
        bfloat16 [B, K, H, W], or [B, K, 2 H, 2 W], in channels_last. An image's bits depend on neither its place in
        the batch nor the number of threads. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    launch.check_dtype("x", x, (torch.bfloat16,))
    launch.check_dtype("weight", weight, (torch.bfloat16,))
    if weight.ndim != 5 or weight.shape[1] not in SCHEMES or weight.shape[4] != 2:
        raise ValueError(f"weight must be what transform_weight returns, got shape {list(weight.shape)}")
    launch.check_like("bias", bias, (weight.shape[0] * weight.shape[3],), x.device, (torch.float32,))
    if x.ndim != 4 or x.shape[1] != 2 * weight.shape[2]:
        raise ValueError(f"x must be [B, {2 * weight.shape[2]}, H, W], as weight has, got {list(x.shape)}")
    out: Tensor = _winograd_conv2d(x, weight, bias)
    return out
