"""Log-probabilities of steps in C++ for CPUs: :mod:`stepfusion.kernels.transition` with the bits of its reference.

If the network learned its variance an exponential is involved: that of the kernel has the same bits on every CPU,
PyTorch's has not, and the two agree within rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepfusion.kernels import launch
from stepfusion.kernels.cpu import library
from stepfusion.kernels.cpu import sampling_library as sampling
from stepfusion.kernels.transition import transition_logprob_fake
from stepfusion.kernels.transition_reference import (
    check_transition,
    runs_of,
    save_for_backward,
    transition_gradients,
    transition_logprob_reference,
)


@library.op("transition_logprob_cpu", fake=transition_logprob_fake)
def _transition_logprob_cpu(
    x: Tensor,
    x_next: Tensor,
    out: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    transitions: Tensor,
    out_uncond: Tensor | None,
    guidance: Tensor | None,
) -> Tensor:
    lanes, elements = len(x), x[:1].numel()
    result = torch.zeros(lanes, dtype=torch.float64)
    if lanes == 0:
        return result
    sums = torch.zeros((lanes, runs_of(elements)), dtype=torch.float64)
    images, channels, pixels, forms = sampling.layout(x, x_next, out, out_uncond)
    guidance = None if guidance is None else guidance.to(torch.float32)
    lists = (rows, coefficients, transitions, guidance)
    sampling.call(
        "transition_logprob",
        (*images, sums, result, *map(launch.contiguous, lists)),
        (lanes, channels, pixels, sums.shape[1], len(coefficients), out.numel() != x.numel(), *forms),
    )
    return result


torch.library.register_autograd(
    "stepfusion::transition_logprob_cpu", transition_gradients, setup_context=save_for_backward
)


def transition_logprob(
    x: Tensor,
    x_next: Tensor,
    out: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    transitions: Tensor,
    *,
    out_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
) -> Tensor:
    """The log-probability of every lane's step, in nats: :func:`stepfusion.kernels.transition_logprob` on a CPU.

    What the C++ kernel does not take goes to the reference: float64, gradients by the table or in forward mode, and
    programs that are exported.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: there is no C++ library here, or x is not on a CPU.
    """
    check_transition(x, x_next, out, rows, coefficients, transitions, out_uncond, guidance)
    given = (x, x_next, out, rows, coefficients, transitions)
    table_has_gradient = launch.has_tangent(*given, out_uncond) or launch.needs_gradient(coefficients, guidance)
    if table_has_gradient or sampling.not_compiled_for(x, x_next, out, coefficients, out_uncond):
        return transition_logprob_reference(*given, out_uncond=out_uncond, guidance=guidance)
    result: Tensor = _transition_logprob_cpu(*given, out_uncond, guidance)
    return result
