"""Layer normalisation with the modulation that transformers conditioned by adaLN put after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import kernels


class LayerNormModulate(nn.Module):
    """``norm(x) * (1 + scale) + shift`` without weights of its own (Peebles & Xie 2023, section 3.2).

    Attributes:
        fused: run it as :func:`stepfusion.kernels.layer_norm_modulate`, which needs a GPU that Triton drives and has
            no gradient; otherwise as PyTorch's own operators.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.fused = False

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Map x [B, N, D], scale and shift [B, D], whose rows may lie apart, to [B, N, D]."""
        if self.fused:
            return kernels.layer_norm_modulate(x, scale, shift, self.eps)
        norm = functional.layer_norm(x, (self.width,), eps=self.eps)
        return torch.addcmul(shift[:, None], norm, 1 + scale[:, None])

    def of_sum(self, x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` makes of h = x + gate * branch, and h, by the kernel: branch [B, N, D], gate [B, D]."""
        return kernels.add_layer_norm_modulate(x, scale, shift, self.eps, branch=branch, gate=gate)
