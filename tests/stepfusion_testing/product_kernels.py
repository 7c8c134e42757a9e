"""A matrix product in Triton, as it is compiled with and without asynchronous copies, and launches of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def part_of_a_product(
    total,
    x_ptr,
    w_ptr,
    m,
    n,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    KS: tl.constexpr,
    NS: tl.constexpr,
    BK: tl.constexpr,
):
    """total + x w of one tile. Elements of w lie KS apart along K and NS apart along N."""
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + k[:, None] * KS + n[None, :] * NS, mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(x, w, total)
    return total


@triton.jit(do_not_specialize=["M"])
def add_two_products_kernel(
    out_ptr,
    x_ptr,
    skip_ptr,
    w_ptr,
    M,
    N: tl.constexpr,
    KX: tl.constexpr,
    KS: tl.constexpr,
    ACROSS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out += x w[:KX] + skip w[KX:], where w [KX + KS, N] lies column by column, or with ACROSS row by row."""
    pid = tl.program_id(0)
    columns: tl.constexpr = (N + BN - 1) // BN
    m = (pid // columns) * BM + tl.arange(0, BM)
    n = (pid % columns) * BN + tl.arange(0, BN)
    k_step: tl.constexpr = N if ACROSS else 1
    n_step: tl.constexpr = 1 if ACROSS else KX + KS
    total = tl.zeros((BM, BN), tl.float32)
    total = part_of_a_product(total, x_ptr, w_ptr, m, n, M, N, KX, k_step, n_step, BK)
    total = part_of_a_product(total, skip_ptr, w_ptr + KX * k_step, m, n, M, N, KS, k_step, n_step, BK)
    there = (m < M)[:, None] & (n < N)[None, :]
    where = out_ptr + m[:, None] * N + n[None, :]
    total += tl.load(where, mask=there, other=0.0).to(tl.float32)
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class Product:
    """One launch: sizes, how w lies, and how it is compiled."""

    rows: int
    columns: int
    depths: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    across: bool = False
    tile: tuple[int, int, int] = (64, 64, 64)
    warps: int = 4
    stages: int = 3

    def wrong(self) -> str | None:
        """Run it, inside an executor; what is wrong with the result."""
        generator = torch.Generator().manual_seed(self.rows)
        made = [(self.rows, self.columns), *((self.rows, k) for k in self.depths), (sum(self.depths), self.columns)]
        out, x, skip, w = (torch.randn(shape, generator=generator).to(self.dtype) for shape in made)
        exact = out.double() + torch.cat((x, skip), 1).double() @ w.double()
        size = out.double().abs() + torch.cat((x, skip), 1).double().abs() @ w.double().abs()
        bm, bn, bk = self.tile
        grid = (-(-self.rows // bm) * -(-self.columns // bn),)
        add_two_products_kernel[grid](
            *(out, x, skip, w if self.across else w.t().contiguous(), self.rows),
            N=self.columns,
            KX=self.depths[0],
            KS=self.depths[1],
            ACROSS=self.across,
            BM=bm,
            BN=bn,
            BK=bk,
            num_warps=self.warps,
            num_stages=self.stages,
        )
        # of the stored value half a unit of its last place, and of every addition of a sum of float32 one
        instructions = sum(-(-k // bk) * bk // 16 for k in self.depths)
        allowed = exact.abs() * torch.finfo(self.dtype).eps / 2 + size * (1 + 16 * instructions) * 2.0**-23
        wrong = ~((out.double() - exact).abs() <= allowed)
        return f"{int(wrong.sum())} of {wrong.numel()} elements" if wrong.any() else None
