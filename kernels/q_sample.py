"""The forward process in one pass: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, equation 4).

The noise is given, or drawn in the kernel and returned as the training target. Cost: s (x_0) + s (x_t) + 4 B (noise)
an element, s the size of the dtype; eager PyTorch moves at least 3 times that.
"""

from __future__ import annotations

import torch

from stepfusion.kernels import launch
from stepfusion.kernels.backend import require_triton, tl, triton
from stepfusion.kernels.philox import STREAM_FORWARD, normal_block, normal_reference

STREAM = tl.constexpr(STREAM_FORWARD)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=launch.SCALARS)  # type: ignore[untyped-decorator]
def q_sample_kernel(  # type: ignore[no-untyped-def]
    x_start_ptr,  # [B, E]
    noise_ptr,  # [B, E] float32, or None: draw it
    x_t_ptr,  # [B, E], the dtype of x_start
    noise_out_ptr,  # [B, E] float32, or None
    t_ptr,  # [B] int64
    signal_ptr,  # [T] float32, sqrt(abar)
    scale_ptr,  # [T] float32, sqrt(1 - abar)
    seed_ptr,  # [B] int64, or None with noise given
    index_ptr,  # [B] int64, or None with noise given
    E,
    T,
    EVEN: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0)
    block = tl.program_id(1)
    start = lane.to(tl.int64) * E
    offs = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = None if EVEN else offs < E

    t = tl.load(t_ptr + lane)
    inside = (t >= 0) & (t < T)  # a t outside the schedule gives NaN, and no access outside the tables
    signal = tl.load(signal_ptr + t, mask=inside, other=float("nan")).to(tl.float32)
    scale = tl.load(scale_ptr + t, mask=inside, other=float("nan")).to(tl.float32)

    x_start = tl.load(x_start_ptr + start + offs, mask=mask).to(tl.float32)
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + start + offs, mask=mask)
    else:
        index = tl.load(index_ptr + lane).to(tl.uint32)
        seed = tl.load(seed_ptr + lane)
        noise = normal_block(seed, block * (BLOCK // 4), t.to(tl.uint32), index, STREAM, BLOCK, VEC)
    x_t = signal * x_start + scale * noise
    tl.store(x_t_ptr + start + offs, x_t.to(x_t_ptr.dtype.element_ty), mask=mask)
    if noise_out_ptr is not None:
        tl.store(noise_out_ptr + start + offs, noise, mask=mask)


@torch.library.custom_op("stepfusion::q_sample_", mutates_args=("x_t", "noise_out"))
def _q_sample(
    x_start: torch.Tensor,
    t: torch.Tensor,
    signal: torch.Tensor,
    scale: torch.Tensor,
    seeds: torch.Tensor | None,
    indices: torch.Tensor | None,
    noise: torch.Tensor | None,
    x_t: torch.Tensor,
    noise_out: torch.Tensor | None,
) -> None:
    require_triton(x_start.device)
    if x_start.numel() == 0:
        return
    elements = x_start[:1].numel()
    shape = launch.geometry(len(x_start), elements, x_start.dtype)
    with launch.on(x_start.device):
        q_sample_kernel[shape.grid](
            x_start.contiguous(),
            None if noise is None else noise.to(torch.float32).contiguous(),
            x_t,
            noise_out,
            t.contiguous(),
            signal.contiguous(),
            scale.contiguous(),
            launch.contiguous(seeds),
            launch.contiguous(indices),
            elements,
            len(signal),
            EVEN=shape.even,
            VEC=shape.vec,
            BLOCK=shape.block,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )


@_q_sample.register_fake
def _q_sample_fake(*_: object, **__: object) -> None:
    return None


def q_sample(
    x_start: torch.Tensor,
    t: torch.Tensor,
    sqrt_alphas_cumprod: torch.Tensor,
    sqrt_one_minus_alphas_cumprod: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Diffuse every image of a batch to its own timestep.

    Args:
        x_start: float16, bfloat16 or float32 [B, ...].
        t: int64 [B], timesteps in [0, T); one outside gives NaN.
        sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: float32 [T].
        noise: [B, ...] like x_start, the eps to use. Or
        seeds, indices: int64 [B], draw the noise of (seed, t, index).

    Returns:
        x_t in the dtype of x_start, and eps, float32: the noise as given, or as drawn. Inputs that require a gradient
        go to the reference.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(
        x_start, t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, noise, seeds, indices, launch.FLOATS
    )
    if launch.needs_gradient(x_start, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, noise):
        tables = (sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod)
        return q_sample_reference(x_start, t, *tables, noise=noise, seeds=seeds, indices=indices)
    x_t = torch.empty_like(x_start, memory_format=torch.contiguous_format)
    noise_out = torch.empty_like(x_t, dtype=torch.float32) if noise is None else None
    _q_sample(x_start, t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, seeds, indices, noise, x_t, noise_out)
    return x_t, (noise_out if noise is None else noise)  # type: ignore[return-value]


def q_sample_reference(
    x_start: torch.Tensor,
    t: torch.Tensor,
    sqrt_alphas_cumprod: torch.Tensor,
    sqrt_one_minus_alphas_cumprod: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of :func:`q_sample` in eager PyTorch: same arguments, same result. Also in float64."""
    dtypes = (*launch.FLOATS, torch.float64)
    check_arguments(x_start, t, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, noise, seeds, indices, dtypes)
    compute = torch.promote_types(x_start.dtype, torch.float32)
    if noise is None:
        assert seeds is not None
        assert indices is not None
        noise = normal_reference(seeds, indices, t, tuple(x_start.shape[1:]), STREAM_FORWARD, dtype=compute)
    signal = launch.per_lane(launch.gather(sqrt_alphas_cumprod.to(compute), t), x_start)
    scale = launch.per_lane(launch.gather(sqrt_one_minus_alphas_cumprod.to(compute), t), x_start)
    return (signal * x_start.to(compute) + scale * noise.to(compute)).to(x_start.dtype), noise


def check_arguments(
    x_start: torch.Tensor,
    t: torch.Tensor,
    signal: torch.Tensor,
    scale: torch.Tensor,
    noise: torch.Tensor | None,
    seeds: torch.Tensor | None,
    indices: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """TypeError or ValueError that names the argument, for both twins."""
    launch.check_lanes("x_start", x_start, dtypes)
    launch.check_like("t", t, (len(x_start),), x_start.device, (torch.int64,))
    entries = launch.check_table("sqrt_alphas_cumprod", signal, x_start.device)
    launch.check_table("sqrt_one_minus_alphas_cumprod", scale, x_start.device, entries)
    launch.check_source(noise, seeds, indices, x_start)
    if noise is None and seeds is None:
        raise ValueError("q_sample needs noise, or seeds and indices to draw it")
