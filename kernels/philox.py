"""Counter-based normal noise: Philox-4x32-10 and Box-Muller, the same numbers in Triton and in PyTorch.

Noise is a pure function of *what* is drawn, never of *when*:

    key     = seed                                          64 bits
    counter = (element // 4, timestep, index, stream)       4 x 32 bits

``element`` counts the values of one image in C order ([C, H, W] flattened), ``index`` is the number of the image
under its seed, and ``stream`` tells purposes apart (:data:`STREAM_STEP`, :data:`STREAM_INITIAL`,
:data:`STREAM_FORWARD`). One Philox call yields four 32-bit words (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3", section 3.3), two Box-Muller pairs turn them into four normals, and all four are used. Word w
becomes the uniform (w + 1) / 2**32 in (0, 1], which keeps the resolution of the tail: the largest radius is
sqrt(64 ln 2) = 6.66 standard deviations.

Logarithm, sine and cosine are the same polynomials on both sides, evaluated in float32 with every product and sum
rounded on its own (kernels are compiled without FMA contraction), and the square root is correctly rounded. So a GPU,
the interpreter and PyTorch on any device give the same bits, and the kernel needs neither library nor local memory.
"""

from __future__ import annotations

import math

import torch

from stepfusion.kernels import launch
from stepfusion.kernels import philox_numbers as numbers
from stepfusion.kernels.backend import require_triton, tl, triton

STREAM_STEP = 0  # the z of a sampling step, keyed by its training timestep
STREAM_INITIAL = 1  # x_T, at timestep 0
STREAM_FORWARD = 2  # the eps of q_sample

ROUNDS = tl.constexpr(numbers.ROUNDS)
M0, M1, W0, W1 = (
    tl.constexpr(numbers.M0),
    tl.constexpr(numbers.M1),
    tl.constexpr(numbers.W0),
    tl.constexpr(numbers.W1),
)
LOG, SIN, COS = tl.constexpr(numbers.LOG), tl.constexpr(numbers.SIN), tl.constexpr(numbers.COS)
MINUS_LN2, ANGLE = tl.constexpr(numbers.MINUS_LN2), tl.constexpr(numbers.ANGLE)
SCALE, TWO_THIRDS = tl.constexpr(numbers.SCALE), tl.constexpr(numbers.TWO_THIRDS)


@triton.jit
def _philox(seed, c0, c1, c2, c3):  # type: ignore[no-untyped-def]
    """Philox-4x32-10: what ``tl.philox`` returns, with one wide multiplication instead of its two narrow ones."""
    k0 = seed.to(tl.uint32)
    k1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c0 = c0.to(tl.uint32)
    c1 = tl.full(c0.shape, 0, tl.uint32) + c1
    c2 = tl.full(c0.shape, 0, tl.uint32) + c2
    c3 = tl.full(c0.shape, 0, tl.uint32) + c3
    for _ in tl.static_range(ROUNDS):
        p0 = c0.to(tl.uint64) * M0
        p1 = c2.to(tl.uint64) * M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + W0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _box_muller(radius_word, angle_word):  # type: ignore[no-untyped-def]
    """Two independent standard normals, float32, from two words of 32 random bits.

    Its twin is :func:`_box_muller_reference`.
    """
    bits = (radius_word.to(tl.float32) + 1.0).to(tl.int32, bitcast=True) - SCALE  # u = (w + 1) / 2**32
    exponent = (bits - TWO_THIRDS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = ((((LOG[5] * f + LOG[4]) * f + LOG[3]) * f + LOG[2]) * f + LOG[1]) * f + LOG[0]
    p = ((p * f + 0.5) * f - 1.0) * f
    radius = tl.sqrt_rn(exponent.to(tl.float32) * MINUS_LN2 + p)  # sqrt(-ln u), the radius of Box-Muller over sqrt(2)

    b = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * ANGLE
    b2 = b * b
    sine = (((SIN[2] * b2 + SIN[1]) * b2 + SIN[0]) * b2 + 1.0) * b
    cosine = ((COS[1] * b2 + COS[0]) * b2 - 0.5) * b2 + 1.0
    # cos(pi/4 + b) and sin(pi/4 + b), times sqrt(2); the two lowest bits of the word choose the quadrant
    x = ((cosine - sine) * radius).to(tl.uint32, bitcast=True) ^ (angle_word << 31)
    y = ((cosine + sine) * radius).to(tl.uint32, bitcast=True) ^ ((angle_word << 30) & 0x80000000)
    return x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True)


@triton.jit
def _normal4(seed, quad, timestep, index, stream):  # type: ignore[no-untyped-def]
    """The normals of elements 4 quad .. 4 quad + 3. ``quad``: block [Q]; the rest scalars. Returns 4 float32 [Q]."""
    w0, w1, w2, w3 = _philox(seed, quad, timestep, index, stream)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit  # type: ignore[untyped-decorator]
def normal_block(  # type: ignore[no-untyped-def]
    seed, first_quad, timestep, index, stream, BLOCK: tl.constexpr, VEC: tl.constexpr
):
    """Normals of BLOCK consecutive elements from 4 first_quad on; all counters scalar. Returns float32 [BLOCK].

    VEC, 4 or 8, is the number of consecutive elements that a thread holds in the caller's loads and stores: making
    the noise in that layout spares an exchange through shared memory.
    """
    i = tl.arange(0, BLOCK // VEC)
    if VEC == 4:
        a0, a1, a2, a3 = _normal4(seed, first_quad + i, timestep, index, stream)
        z = tl.interleave(tl.interleave(a0, a2), tl.interleave(a1, a3))
    else:
        a0, a1, a2, a3 = _normal4(seed, first_quad + 2 * i, timestep, index, stream)
        b0, b1, b2, b3 = _normal4(seed, first_quad + 2 * i + 1, timestep, index, stream)
        even = tl.interleave(tl.interleave(a0, b0), tl.interleave(a2, b2))
        odd = tl.interleave(tl.interleave(a1, b1), tl.interleave(a3, b3))
        z = tl.interleave(even, odd)
    return z


def philox_words(counter: tuple[torch.Tensor, ...], key: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10 in PyTorch: four words in [0, 2**32), int64.

    ``counter`` has four words and ``key`` 64 bits, all int64, broadcast together. Source: Salmon et al. 2011, section
    3.3. Equal bit for bit to Triton's ``tl.philox``.
    """
    c0, c1, c2, c3 = (c.to(torch.int64) & numbers.MASK for c in counter)
    k0, k1 = key & numbers.MASK, (key >> 32) & numbers.MASK
    for _ in range(numbers.ROUNDS):
        p0, p1 = c0 * numbers.M0, c2 * numbers.M1  # 64-bit products; int64 wraps around, which keeps the bits
        c0, c1 = ((p1 >> 32) & numbers.MASK) ^ c1 ^ k0, p1 & numbers.MASK
        c2, c3 = ((p0 >> 32) & numbers.MASK) ^ c3 ^ k1, p0 & numbers.MASK
        k0, k1 = (k0 + numbers.W0) & numbers.MASK, (k1 + numbers.W1) & numbers.MASK
    return c0, c1, c2, c3


def _box_muller_reference(radius_word: torch.Tensor, angle_word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of :func:`_box_muller`: words as int64, results float32, the same operations in the same order."""
    bits = (radius_word.to(torch.float32) + 1.0).view(torch.int32) - numbers.SCALE
    exponent = (bits - numbers.TWO_THIRDS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = f * numbers.LOG[5]
    for c in (*numbers.LOG[4::-1], 0.5, -1.0):
        p = (p + c) * f
    square = exponent.to(torch.float32) * numbers.MINUS_LN2 + p
    radius = square.to(torch.float64).sqrt().to(torch.float32)  # correctly rounded, as not every float32 sqrt is

    b = _signed(angle_word).to(torch.float32) * numbers.ANGLE
    b2 = b * b
    sine = (((b2 * numbers.SIN[2] + numbers.SIN[1]) * b2 + numbers.SIN[0]) * b2 + 1.0) * b
    cosine = ((b2 * numbers.COS[1] + numbers.COS[0]) * b2 - 0.5) * b2 + 1.0
    return quadrant((cosine - sine) * radius, (cosine + sine) * radius, angle_word)


def _box_muller_exact(radius_word: torch.Tensor, angle_word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same map in float64 with the library's functions: the truth that the float32 twins are measured against."""
    uniform = (radius_word.to(torch.float32) + 1.0).to(torch.float64) * 2.0**-32
    radius = (-2.0 * uniform.log()).sqrt()
    angle = math.pi / 4 + _signed(angle_word).to(torch.float64) * numbers.ANGLE
    return quadrant(radius * angle.cos(), radius * angle.sin(), angle_word)


def _signed(word: torch.Tensor) -> torch.Tensor:
    """A 32-bit word held in int64, read as a signed integer."""
    return word - ((word >> 31) << 32)


def quadrant(x: torch.Tensor, y: torch.Tensor, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip x and y by the two lowest bits of ``word``."""
    return torch.where(word & 1 != 0, -x, x), torch.where(word & 2 != 0, -y, y)


def normal_reference(
    seeds: torch.Tensor,
    indices: torch.Tensor,
    timesteps: torch.Tensor,
    shape: tuple[int, ...],
    stream: int = STREAM_STEP,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The twin of :func:`normal` in eager PyTorch, on any device: the same bits.

    With ``dtype=torch.float64`` the same words go through Box-Muller with exact functions, in float64.
    """
    check_arguments(seeds, indices, timesteps)
    elements = math.prod(shape)
    quads = torch.arange((elements + 3) // 4, device=seeds.device)
    counter = (quads[None], timesteps[:, None], indices[:, None], torch.full_like(seeds, stream)[:, None])
    w0, w1, w2, w3 = philox_words(counter, seeds[:, None])
    transform = _box_muller_exact if dtype == torch.float64 else _box_muller_reference
    pairs = (*transform(w0, w1), *transform(w2, w3))
    return torch.stack(pairs, dim=-1).flatten(1)[:, :elements].reshape(len(seeds), *shape)


@triton.jit(do_not_specialize=["stream"], do_not_specialize_on_alignment=launch.SCALARS)  # type: ignore[untyped-decorator]
def normal_kernel(  # type: ignore[no-untyped-def]
    z_ptr,  # [B, E] float32
    seed_ptr,  # [B] int64
    index_ptr,  # [B] int64
    timestep_ptr,  # [B] int64
    stream,
    E,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0)
    block = tl.program_id(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    timestep = tl.load(timestep_ptr + lane).to(tl.uint32)
    index = tl.load(index_ptr + lane).to(tl.uint32)
    z = normal_block(tl.load(seed_ptr + lane), block * (BLOCK // 4), timestep, index, stream, BLOCK, 4)
    tl.store(z_ptr + lane.to(tl.int64) * E + offs, z, mask=None if EVEN else offs < E)


@torch.library.custom_op("stepfusion::normal_", mutates_args=("z",))
def _normal(
    seeds: torch.Tensor, indices: torch.Tensor, timesteps: torch.Tensor, stream: int, z: torch.Tensor
) -> None:
    require_triton(seeds.device)
    if z.numel() == 0:
        return
    elements = z[:1].numel()
    shape = launch.geometry(len(z), elements, torch.float32)
    with launch.on(z.device):
        normal_kernel[shape.grid](
            z,
            seeds.contiguous(),
            indices.contiguous(),
            timesteps.contiguous(),
            stream,
            elements,
            EVEN=shape.even,
            BLOCK=shape.block,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )


@_normal.register_fake
def _normal_fake(*_: object, **__: object) -> None:
    return None


def normal(
    seeds: torch.Tensor,
    indices: torch.Tensor,
    timesteps: torch.Tensor,
    shape: tuple[int, ...],
    stream: int = STREAM_STEP,
) -> torch.Tensor:
    """Standard normal noise for B images, the same numbers that the other kernels draw.

    Args:
        seeds: int64 [B], the 64 bits of each image's seed.
        indices: int64 [B], the number of each image under its seed, in [0, 2**32).
        timesteps: int64 [B], training timesteps, in [0, 2**32).
        shape: the shape of one image, e.g. (C, H, W); its elements are counted in C order.
        stream: what the noise is for, e.g. :data:`STREAM_STEP`.

    Returns:
        float32 [B, *shape] on the device of ``seeds``.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: Triton cannot run on this device.
    """
    check_arguments(seeds, indices, timesteps)
    launch.check_elements("shape", math.prod(shape))
    z = torch.empty((len(seeds), *shape), dtype=torch.float32, device=seeds.device)
    _normal(seeds, indices, timesteps, stream, z)
    return z


def check_arguments(seeds: torch.Tensor, indices: torch.Tensor, timesteps: torch.Tensor) -> None:
    """TypeError or ValueError that names the argument, for both twins."""
    launch.check_dtype("seeds", seeds, (torch.int64,))
    for name, tensor in (("seeds", seeds), ("indices", indices), ("timesteps", timesteps)):
        launch.check_like(name, tensor, (seeds.numel(),), seeds.device, (torch.int64,))
