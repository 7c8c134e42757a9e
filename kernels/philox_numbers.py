"""The numbers that the noise is made of: Philox's multipliers, and the polynomials of the normal distribution.

They stand apart from the kernel because a kernel sees them as Triton constants, and the reference and exported
programs as numbers of Python.
"""

from __future__ import annotations

import math

ROUNDS = 10
M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and Weyl constants of Philox-4x32 (Salmon et al. 2011, table 2)
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

# Minimax fits (Lawson iteration), relative error in brackets:
# -ln(1 + f) = f (-1 + f (1/2 + f L(f))) for f in [-1/3, 1/3] (2.0e-7),
# sin(b) = b + b^3 S(b^2) (3.8e-9) and cos(b) = 1 + b^2 (-1/2 + b^2 C(b^2)) (8.2e-8) for |b| <= pi/4.
LOG = (
    -0.33336564898490906,
    0.25004664063453674,
    -0.1982250213623047,
    0.16462457180023193,
    -0.16964882612228394,
    0.15177200734615326,
)
SIN = (-0.16666655242443085, 0.00833216030150652, -0.0001951526792254299)
COS = (0.04166107252240181, -0.0013648702297359705)
MINUS_LN2 = -math.log(2.0)
ANGLE = math.pi / 4 * 2.0**-31  # a signed 32-bit word to an angle in [-pi/4, pi/4)
SCALE = 32 << 23  # 2**32 in the exponent field of a float32
TWO_THIRDS = 0x3F2AAAAB  # the bits of 2/3: subtracting them leaves the exponent that puts the mantissa in [2/3, 4/3)
