"""The one table of tolerances: what rounding alone can explain, derived, for tests, benchmarks and self-tests.

Nothing here is tuned to make a comparison pass. Kernels compute in float32 whatever the dtype of their tensors, so an
error has two parts: the roundings of the computation, each at most one unit in the last place of float32 at the
magnitude of the largest term, and one rounding to the dtype of the result. A fused operation and its reference
perform the same float32 operations in the same order, so they are held to equality if no exp is involved.
"""

from __future__ import annotations

import torch

#: One unit in the last place relative to the magnitude: a whole one, for Triton's interpreter truncates to bfloat16
#: where GPUs round to nearest.
UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

#: Roundings of one fused operation: products, sums, and the table entries' own.
#: group_norm_silu: 24 of a mean (time, a tree of 13 sums over a tile and of 8 over its splits, weights), 14 of a root
#: of a variance (half as many, and its own 2), 8 of the affine part, 8 of SiLU.
#: layer_norm_modulate: 60 of a mean (48 sums in a thread, 5 in a warp, 4 of warps, 3 more), 32 of a root of a
#: variance (half as many, and its own 2), 8 of the modulation.
#: transition_logprob: 12 of the mean, and twice the 6 of an exponential and its exponent, for a deviation is squared.
#: winograd_conv2d, relative to the sum of absolute values: 6 of the input's transform, 1 of the weight's, 1 of the
#: sum of products (whose terms have either sign), 10 of the output's transform.
#: add_projection, relative to the sum of absolute values: 2 of image and bias, and those of `projection_roundings`.
#: resnet_block: two norms, two convolutions, and 2 of the residual. attention_block: a norm, 18 of three products in
#: a row, 8 of softmax, and 48 that scores, which are larger than what comes of them, bring into its exponential.
ROUNDINGS = {
    "diffusion_step": 12,
    "transition_logprob": 24,
    "q_sample": 5,
    "q_posterior_mean_variance": 5,
    "group_norm_silu": 54,
    "layer_norm_modulate": 100,
    "winograd_conv2d": 18,
    "add_projection": 2,
    "resnet_block": 146,
    "attention_block": 128,
}

#: The largest difference that a float32 network by C++ kernels may have from the same by PyTorch's operators,
#: relative to the largest output: 839 roundings, six residual blocks in a row.
NETWORK_FLOAT32 = 1e-4


def projection_roundings(channels: int) -> int:
    """Of a projection of so many channels: 2, and one for every 8: matrix units add up 16 products, and truncate."""
    return ROUNDINGS["add_projection"] + channels // 8


def tolerance(dtype: torch.dtype, magnitude: float, roundings: int) -> float:
    """The largest absolute error that ``roundings`` in float32 (float64 for float64) and one to ``dtype`` can make.

    ``magnitude`` is the largest absolute value of any term of the sum, not only of the result: cancellation keeps the
    error of its terms.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    final = 0.0 if dtype == compute else UNIT[dtype]
    return magnitude * (roundings * UNIT[compute] + final)
