"""Mean and variance of the forward-process posterior q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equations 6 and 7).

    mean = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t

Cost: 2 s (x_0, x_t) + s (mean) an element in one pass, s the size of the dtype; eager PyTorch moves 7 s. The first
program of each lane gathers its variances as well, so that one launch gives all three.
"""

from __future__ import annotations

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["T"], do_not_specialize_on_alignment=launch.SCALARS
)
def q_posterior_kernel(  # type: ignore[no-untyped-def]
    x_start_ptr,  # [B, E]
    x_t_ptr,  # [B, E]
    mean_ptr,  # [B, E]
    variance_ptr,  # [B], the dtype of its table
    log_variance_ptr,  # [B], the dtype of its table
    t_ptr,  # [B] int64
    coef1_ptr,  # [T] float32, the weight of x_0
    coef2_ptr,  # [T] float32, the weight of x_t
    variance_table_ptr,  # [T] float32
    log_variance_table_ptr,  # [T] float32
    E,
    T,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0)
    start = lane.to(tl.int64) * E
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = None if EVEN else offs < E

    t = tl.load(t_ptr + lane)
    inside = (t >= 0) & (t < T)  # a t outside the schedule gives NaN, and no access outside the tables
    if tl.program_id(1) == 0:
        tl.store(variance_ptr + lane, tl.load(variance_table_ptr + t, mask=inside, other=float("nan")))
        tl.store(log_variance_ptr + lane, tl.load(log_variance_table_ptr + t, mask=inside, other=float("nan")))
    coef1 = tl.load(coef1_ptr + t, mask=inside, other=float("nan")).to(tl.float32)
    coef2 = tl.load(coef2_ptr + t, mask=inside, other=float("nan")).to(tl.float32)

    x_start = tl.load(x_start_ptr + start + offs, mask=mask).to(tl.float32)
    x_t = tl.load(x_t_ptr + start + offs, mask=mask).to(tl.float32)
    mean = coef1 * x_start + coef2 * x_t
    tl.store(mean_ptr + start + offs, mean.to(mean_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("stepfusion::q_posterior", mutates_args=())
def _q_posterior(
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    coef1: torch.Tensor,
    coef2: torch.Tensor,
    variances: torch.Tensor,
    log_variances: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    require_triton(x_start.device)
    mean, variance, log_variance = _q_posterior_fake(x_start, x_t, t, coef1, coef2, variances, log_variances)
    lanes, elements = len(x_start), x_start[:1].numel()
    if lanes == 0:
        return mean, variance, log_variance
    shape = launch.geometry(lanes, elements, x_start.dtype)
    with launch.on(x_start.device):
        q_posterior_kernel[(lanes, max(shape.grid[1], 1))](
            x_start.contiguous(),
            x_t.contiguous(),
            mean,
            variance,
            log_variance,
            t.contiguous(),
            coef1.contiguous(),
            coef2.contiguous(),
            variances.contiguous(),
            log_variances.contiguous(),
            elements,
            len(coef1),
            EVEN=shape.even and elements > 0,
            BLOCK=shape.block,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )
    return mean, variance, log_variance


@_q_posterior.register_fake
def _q_posterior_fake(
    x_start: torch.Tensor, _: torch.Tensor, t: torch.Tensor, *tables: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = torch.empty_like(x_start, memory_format=torch.contiguous_format)
    variance, log_variance = (torch.empty(len(t), dtype=table.dtype, device=t.device) for table in tables[2:])
    return mean, variance, log_variance


def q_posterior_mean_variance(
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    posterior_mean_coef1: torch.Tensor,
    posterior_mean_coef2: torch.Tensor,
    posterior_variance: torch.Tensor,
    posterior_log_variance_clipped: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0).

    Args:
        x_start, x_t: float16, bfloat16 or float32 [B, ...], one dtype.
        t: int64 [B], timesteps in [0, T); one outside gives NaN.
        posterior_mean_coef1, posterior_mean_coef2, posterior_variance, posterior_log_variance_clipped: float32 [T],
            the tables that :class:`stepfusion.NoiseSchedule` calls so.

    Returns:
        The mean [B, ...] in the dtype of x_start; variance and log variance, float32 [B, 1, ...]. Inputs that require
        a gradient go to the reference.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    tables = (posterior_mean_coef1, posterior_mean_coef2, posterior_variance, posterior_log_variance_clipped)
    check_arguments(x_start, x_t, t, tables, launch.FLOATS)
    if launch.needs_gradient(x_start, x_t, *tables):
        return q_posterior_mean_variance_reference(x_start, x_t, t, *tables)
    mean, variance, log_variance = _q_posterior(x_start, x_t, t, *tables)
    return mean, launch.per_lane(variance, x_t), launch.per_lane(log_variance, x_t)


def q_posterior_mean_variance_reference(
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    posterior_mean_coef1: torch.Tensor,
    posterior_mean_coef2: torch.Tensor,
    posterior_variance: torch.Tensor,
    posterior_log_variance_clipped: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin of :func:`q_posterior_mean_variance` in eager PyTorch: same arguments and result. Also in float64."""
    tables = (posterior_mean_coef1, posterior_mean_coef2, posterior_variance, posterior_log_variance_clipped)
    check_arguments(x_start, x_t, t, tables, (*launch.FLOATS, torch.float64))
    compute = torch.promote_types(x_start.dtype, torch.float32)
    coef1, coef2, variance, log_variance = (launch.per_lane(launch.gather(table, t), x_t) for table in tables)
    mean = coef1.to(compute) * x_start.to(compute) + coef2.to(compute) * x_t.to(compute)
    return mean.to(x_start.dtype), variance, log_variance


def check_arguments(
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """TypeError or ValueError that names the argument, for both twins."""
    launch.check_lanes("x_start", x_start, dtypes)
    launch.check_like("x_t", x_t, tuple(x_start.shape), x_start.device, (x_start.dtype,))
    launch.check_like("t", t, (len(x_start),), x_start.device, (torch.int64,))
    names = ("posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "posterior_log_variance_clipped")
    entries: int | None = None
    for name, table in zip(names, tables, strict=True):
        entries = launch.check_table(name, table, x_start.device, entries)
