"""Group normalisation together with what the UNets do right before and after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import kernels
from stepfusion.kernels.cpu import group_norm as cpu


class GroupNormAct(nn.GroupNorm):
    """``act(scale_shift(norm([x, skip] + time)))`` (Wu & He 2018), with the state dict of ``nn.GroupNorm``.

    Attributes:
        fused: run it as :func:`stepfusion.kernels.group_norm_silu`, which needs a GPU that Triton drives and has no
            gradient; otherwise as PyTorch's own operators.
        fused_on_cpu: run it as :func:`stepfusion.kernels.cpu.group_norm.group_norm_silu_cpu`, where it fits.
        by_rows: normalise rows of a matrix, a row for each group, which some runtimes do faster than group norms.
    """

    def __init__(self, groups: int, channels: int, eps: float, act: nn.Module | None = None) -> None:
        super().__init__(groups, channels, eps)
        self.act = nn.Identity() if act is None else act
        self.fused = False
        self.fused_on_cpu = False
        self.by_rows = False

    def forward(
        self,
        x: Tensor,
        *,
        skip: Tensor | None = None,
        time: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Map x [B, C1, H, W] and skip [B, C2, H, W], if any, to [B, C, H, W] with C = C1 + C2.

        `time` [B, C] is added before the norm; `scale` and `shift` [B, C] make ``norm * (1 + scale) + shift`` of it
        (Dhariwal & Nichol 2021, section 3.1).
        """
        silu = isinstance(self.act, nn.SiLU)
        if self.fused:
            fused: Tensor = kernels.group_norm_silu(
                x,
                self.weight,
                self.bias,
                self.num_groups,
                self.eps,
                skip=skip,
                time=time,
                scale=scale,
                shift=shift,
                silu=silu,
            )
            return fused if silu else self.act(fused)
        if skip is not None:
            x = torch.cat((x, skip), dim=1)
        if self.fused_on_cpu and cpu.fits(x.shape[1]):
            options = {"time": time, "scale": scale, "shift": shift}
            fused = cpu.group_norm_silu_cpu(
                x, self.weight, self.bias, self.num_groups, self.eps, **options, silu=silu
            )
            return fused if silu else self.act(fused)
        if time is not None:
            x = x + time[:, :, None, None]
        x = self._normalise_rows(x) if self.by_rows else super().forward(x)
        if scale is not None and shift is not None:
            x = torch.addcmul(shift[:, :, None, None], x, 1 + scale[:, :, None, None])
        out: Tensor = self.act(x)
        return out

    def with_input(
        self, x: Tensor, *, residual: Tensor | None = None, skip: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `forward` makes of h = [x + residual, skip] + time, and h, by the kernels of `fused`."""
        silu = isinstance(self.act, nn.SiLU)
        options = {"residual": residual, "skip": skip, "time": time}
        out, h = kernels.add_group_norm_silu(
            x, self.weight, self.bias, self.num_groups, self.eps, **options, silu=silu
        )
        return (out if silu else self.act(out)), h

    def _normalise_rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), self.num_groups, -1)
        rows = functional.layer_norm(rows, rows.shape[2:], eps=self.eps)
        return rows.reshape(x.shape) * self.weight[:, None, None] + self.bias[:, None, None]
