"""What the GroupNorm kernels count and sum: places of programs, tiles, means and squared deviations.

Statistics are a mean and the sum of squared deviations from it (M2), by two passes over registers, united as in Chan,
Golub & LeVeque 1979: a sum of squares would cancel if the mean is large. Their unit is a *chunk*, up to 16 bytes
of neighbouring channels that lie in one group and in one thread.
"""

from __future__ import annotations

from stepfusion.kernels.backend import tl, triton


@triton.jit  # type: ignore[untyped-decorator]
def place(program, BLOCKS: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lane, block of channels, and split of a program. Blocks of one pixel run together: they share its DRAM page."""
    return program // (BLOCKS * SPLITS), program % BLOCKS, program // BLOCKS % SPLITS


@triton.jit  # type: ignore[untyped-decorator]
def inside(rows, c, first, P, stop, FULL: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which elements of a tile are there, [T, W]: channels before ``stop``, pixels before P."""
    there = tl.full((rows.shape[0], c.shape[0]), 1, tl.int1)
    if not FULL:
        there = there & (c < stop)[None, :]
    if not EVEN:
        there = there & (first + rows < P)[:, None]
    return there


@triton.jit  # type: ignore[untyped-decorator]
def chunks(tile, U: tl.constexpr):  # type: ignore[no-untyped-def]
    """[T, W] as [T, W / U, U]."""
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] // U, U))


@triton.jit  # type: ignore[untyped-decorator]
def moments(h, there, pixels, U: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and M2 of every chunk of a tile, float32 [W / U]; ``pixels`` of its rows are there."""
    h = chunks(h, U)
    mean = tl.sum(tl.sum(h, axis=2), axis=0) / (pixels * U)
    deviation = tl.where(chunks(there, U), h - mean[None, :, None], 0.0)
    return mean, tl.sum(tl.sum(deviation * deviation, axis=2), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def unite(mean, m2, pixels, D: tl.constexpr, U: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and variance of the group of every chunk [W / U], from the chunks' own; ``pixels`` each."""
    K: tl.constexpr = mean.shape[0]
    if D == U:
        return mean, m2 / (pixels * U)
    k = tl.arange(0, K) * U
    if GROUPS == 1:
        inside = k < D
        center = tl.sum(mean, axis=0) * (U / D)  # chunks beyond the group are 0
        apart = mean - center
        total = tl.sum(tl.where(inside, m2 + apart * apart * (pixels * U), 0.0), axis=0)
        zeros = tl.zeros_like(mean)
        return zeros + center, zeros + total / (pixels * D)
    same = (k // D)[:, None] == (k // D)[None, :]
    center = tl.sum(tl.where(same, mean[None, :], 0.0), axis=1) * (U / D)
    apart = mean[None, :] - center[:, None]
    total = tl.sum(tl.where(same, m2[None, :] + apart * apart * (pixels * U), 0.0), axis=1)
    return center, total / (pixels * D)


@triton.jit
def reciprocal_root(variance):  # type: ignore[no-untyped-def]
    """1 / sqrt(variance). The hardware's takes subnormals for 0, so small ones are scaled by a power of two."""
    small = variance < 2.0**-100
    return tl.rsqrt(tl.where(small, variance * 2.0**64, variance)) * tl.where(small, 2.0**32, 1.0)
