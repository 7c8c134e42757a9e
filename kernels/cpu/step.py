"""The table walker in C++ for CPUs: :mod:`stepfusion.kernels.step` with the bits of its reference.

One pass over memory, threaded over runs of 1024 elements: every operand is read once, the arithmetic happens in the
first cache, and the state, the network's copies, x0, the history and the flag are written. If the network learned
its variance an exponential is involved: that of the kernel has the same bits on every CPU, PyTorch's has not, and the
two agree within the tolerance table. A flag is exact: it tells of elements that are not finite; the reference's and
Triton's are sums, which can overflow if states are beyond 2**100.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu import library
from stepfusion.kernels.cpu import sampling_library as sampling
from stepfusion.kernels.step_reference import check_arguments, diffusion_step_reference


def _nothing(*_: object) -> None:
    return None


@library.op("diffusion_step_cpu_", fake=_nothing, mutates=("x_next", "x_net", "x0", "flags", "history"))
def _diffusion_step_cpu(
    x: Tensor,
    out: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    seeds: Tensor | None,
    indices: Tensor | None,
    noise: Tensor | None,
    out_uncond: Tensor | None,
    guidance: Tensor | None,
    x_next: Tensor,
    x_net: Tensor | None,
    x0: Tensor | None,
    flags: Tensor | None,
    known: Tensor | None,
    history: Tensor | None,
    fill: bool,
) -> None:
    lanes = len(x)
    if x.numel() == 0:
        return
    images, channels, pixels, forms = sampling.layout(x, out, out_uncond, noise, known)
    guidance = None if guidance is None else guidance.to(torch.float32)
    lists = (rows, coefficients, timesteps, seeds, indices, guidance)
    x_type, copies = (0, 0) if x_net is None else (sampling.TYPES[x_net.dtype], len(x_net) // lanes)
    kept = 0 if history is None else len(history)
    sampling.call(
        "diffusion_step",
        (*images, x_next, x_net, x0, history, flags, *map(launch.contiguous, lists)),
        (lanes, channels, pixels, len(coefficients), x_type, copies, kept, out.numel() != x.numel(), fill, *forms),
    )


def diffusion_step(
    x: Tensor,
    out: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    *,
    seeds: Tensor | None = None,
    indices: Tensor | None = None,
    noise: Tensor | None = None,
    out_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    x_next: Tensor | None = None,
    x_net: Tensor | None = None,
    x0: Tensor | None = None,
    flags: Tensor | None = None,
    known: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """Move every lane one row on, in one pass: :func:`stepfusion.kernels.diffusion_step` on a CPU.

    x, out, out_uncond, noise and known may be channels_last. What the C++ kernel does not take goes to the reference:
    float64, inputs that require a gradient, and programs that are exported. Rows with a threshold or with rescale
    give NaN.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: there is no C++ library here, or x is not on a CPU.
    """
    given = (seeds, indices, noise, out_uncond, guidance, x_next, x_net, x0, flags, known, history)
    check_arguments(x, out, rows, coefficients, timesteps, *given)
    laid_out = x_net is None or x_net.is_contiguous()
    if not laid_out or sampling.left_to_the_reference(x, out, coefficients, noise, out_uncond, x_net, known, history):
        return diffusion_step_reference(
            x,
            out,
            rows,
            coefficients,
            timesteps,
            seeds=seeds,
            indices=indices,
            noise=noise,
            out_uncond=out_uncond,
            guidance=guidance,
            x_next=x_next,
            x_net=x_net,
            x0=x0,
            flags=flags,
            known=known,
            history=history,
        )
    into = torch.empty_like(x, memory_format=torch.contiguous_format) if x_next is None else x_next
    _diffusion_step_cpu(
        x,
        out,
        rows,
        coefficients,
        timesteps,
        seeds,
        indices,
        noise,
        out_uncond,
        guidance,
        into,
        x_net,
        x0,
        flags,
        known,
        history,
        x_next is None,
    )
    return into
