"""The ways in which :mod:`stepfusion.kernels.cpu.winograd` computes 3x3 convolutions, and their constants.

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

F4's points keep its constants near 1: at the usual 0, +-1, +-2 the error is half as large again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Matrix = tuple[tuple[float, ...], ...]


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


def _constants(scheme: Scheme) -> str:
    """The scheme as a C++ struct, its constants rounded to float32."""
    n, m = len(scheme.input), len(scheme.output)
    return (
        f"struct {scheme.name} {{ static constexpr int INPUT = {n}, OUTPUT = {m}, STEP = {scheme.step};"
        f" static constexpr float BT[{n}][{n}] = {_array(scheme.input)}, AT[{m}][{n}] = {_array(scheme.output)}; }};"
    )


def _array(matrix: Matrix) -> str:
    return "{" + ", ".join("{" + ", ".join(f"{value!r}f" for value in row) + "}" for row in matrix) + "}"


#: The schemes as C++ structs.
CONSTANTS = "\n".join(_constants(scheme) for scheme in SCHEMES.values())
