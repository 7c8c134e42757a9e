"""The forward process, its posterior and noise in C++ for CPUs, with the bits of their references, in one pass each.

See :mod:`stepfusion.kernels.q_sample`, :mod:`stepfusion.kernels.posterior` and :mod:`stepfusion.kernels.philox`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepfusion.kernels import launch, philox, posterior
from stepfusion.kernels.cpu import library
from stepfusion.kernels.cpu import sampling_library as sampling
from stepfusion.kernels.q_sample import check_arguments, q_sample_reference

_DTYPES = (*launch.FLOATS, torch.float64)


def _table(values: Tensor) -> Tensor:
    return values.to(torch.float32).contiguous()


def _nothing(*_: object) -> None:
    return None


@library.op("q_sample_cpu_", fake=_nothing, mutates=("x_t", "noise_out"))
def _q_sample_cpu(
    x_start: Tensor,
    t: Tensor,
    signal: Tensor,
    scale: Tensor,
    seeds: Tensor | None,
    indices: Tensor | None,
    noise: Tensor | None,
    x_t: Tensor,
    noise_out: Tensor | None,
) -> None:
    if x_start.numel() == 0:
        return
    images, channels, pixels, forms = sampling.layout(x_start, noise)
    lists = (t.contiguous(), _table(signal), _table(scale), launch.contiguous(seeds), launch.contiguous(indices))
    sizes = (len(x_start), channels, pixels, len(signal), sampling.TYPES[x_t.dtype], *forms)
    sampling.call("q_sample", (*images, x_t, noise_out, *lists), sizes)


def q_sample(
    x_start: Tensor,
    t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Diffuse every image of a batch to its own timestep: :func:`stepfusion.kernels.q_sample` on a CPU.

    x_start and noise may be channels_last. What the C++ kernel does not take goes to the reference: float64, inputs
    that require a gradient, and programs that are exported.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: there is no C++ library here, or x_start is not on a
            CPU.
    """
    tables = (sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
    check_arguments(x_start, t, *tables, noise, seeds, indices, _DTYPES)
    if sampling.left_to_the_reference(x_start, noise):
        return q_sample_reference(x_start, t, *tables, noise=noise, seeds=seeds, indices=indices)
    x_t = torch.empty_like(x_start, memory_format=torch.contiguous_format)
    noise_out = torch.empty_like(x_t, dtype=torch.float32) if noise is None else None
    _q_sample_cpu(x_start, t, *tables, seeds, indices, noise, x_t, noise_out)
    return x_t, (noise_out if noise is None else noise)  # type: ignore[return-value]


def _three(x_start: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the mean, the variance and its logarithm."""
    mean = torch.empty_like(x_start, memory_format=torch.contiguous_format)
    shape = (len(x_start), *(1,) * (x_start.ndim - 1))
    return mean, x_start.new_empty(shape, dtype=torch.float32), x_start.new_empty(shape, dtype=torch.float32)


@library.op("q_posterior_cpu", fake=_three)
def _q_posterior_cpu(
    x_start: Tensor, x_t: Tensor, t: Tensor, coef1: Tensor, coef2: Tensor, variance: Tensor, log_variance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    results = _three(x_start)
    images, channels, pixels, forms = sampling.layout(x_start, x_t)
    tables = map(_table, (coef1, coef2, variance, log_variance))
    sizes = (len(x_start), channels, pixels, len(coef1), sampling.TYPES[x_start.dtype], *forms)
    sampling.call("q_posterior", (*images, *results, t.contiguous(), *tables), sizes)
    return results


def q_posterior_mean_variance(
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    posterior_mean_coef1: Tensor,
    posterior_mean_coef2: Tensor,
    posterior_variance: Tensor,
    posterior_log_variance_clipped: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variances of q(x_{t-1} | x_t, x_0): :func:`stepfusion.kernels.q_posterior_mean_variance` on a CPU.

    x_start and x_t may be channels_last. What the C++ kernel does not take goes to the reference: float64, inputs
    that require a gradient, and programs that are exported.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: there is no C++ library here, or x_start is not on a
            CPU.
    """
    variances = (posterior_variance, posterior_log_variance_clipped)
    tables = (posterior_mean_coef1, posterior_mean_coef2, *variances)
    posterior.check_arguments(x_start, x_t, t, tables, _DTYPES)
    if sampling.left_to_the_reference(x_start, x_t):
        return posterior.q_posterior_mean_variance_reference(x_start, x_t, t, *tables)
    mean, variance, log_variance = _q_posterior_cpu(x_start, x_t, t, *tables)
    if (
        variances[0].dtype != torch.float32 or variances[1].dtype != torch.float32
    ):  # the results have the tables' type
        variance, log_variance = (launch.per_lane(launch.gather(table, t), x_t) for table in variances)
    return mean, variance, log_variance


@library.op("normal_cpu_", fake=_nothing, mutates=("z",))
def _normal_cpu(seeds: Tensor, indices: Tensor, timesteps: Tensor, stream: int, z: Tensor) -> None:
    if z.numel() > 0:
        identity = (seeds.contiguous(), indices.contiguous(), timesteps.contiguous())
        sampling.call("normal", (*identity, z), (len(z), z[0].numel(), stream))


def normal(
    seeds: Tensor, indices: Tensor, timesteps: Tensor, shape: tuple[int, ...], stream: int = philox.STREAM_STEP
) -> Tensor:
    """Standard normal noise for B images: :func:`stepfusion.kernels.normal` on a CPU, float32 [B, *shape].

    Programs that are exported get the reference.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: there is no C++ library here, or seeds is not on a
            CPU.
    """
    philox.check_arguments(seeds, indices, timesteps)
    launch.check_elements("shape", math.prod(shape))
    if sampling.left_to_the_reference(seeds):
        return philox.normal_reference(seeds, indices, timesteps, shape, stream)
    z = torch.empty((len(seeds), *shape), dtype=torch.float32, device=seeds.device)
    _normal_cpu(seeds, indices, timesteps, stream, z)
    return z
