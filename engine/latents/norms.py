"""Group norms of diffusers' blocks together with the SiLU after them, as one kernel on GPUs."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from stepfusion import kernels
from stepfusion.kernels.backend import why_not_triton


class NormAct(nn.GroupNorm):
    """``silu(norm(x))`` (Wu & He 2018), with the state dict of ``nn.GroupNorm``.

    Attributes:
        fused: run it as :func:`stepfusion.kernels.group_norm_silu`; by default on a GPU that Triton drives.
    """

    fused: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H, W]; channels_last where the kernel runs."""
        fused = self.fused
        if fused is None:
            fused = x.device.type != "cpu" and why_not_triton(x.device) is None
        if fused:
            return kernels.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)
        return functional.silu(super().forward(x))


def join_norms(module: nn.Module) -> None:
    """Replace norms and activations in the residual blocks and at the end of an encoder or decoder of diffusers.

    A block calls ``norm1``, ``nonlinearity``, ``norm2``, ``nonlinearity``; an encoder or decoder ends with
    ``conv_norm_out`` and ``conv_act``. Blocks with time embeddings, and others than SiLU, stay as they are. The names
    of all parameters stay.
    """
    for part in list(module.modules()):
        if _is_resnet(part):
            part.norm1, part.norm2 = _joined(part.norm1), _joined(part.norm2)
            part.nonlinearity = nn.Identity()
        elif _is_silu(part, "conv_act") and type(getattr(part, "conv_norm_out", None)) is nn.GroupNorm:
            part.conv_norm_out = _joined(part.conv_norm_out)
            part.conv_act = nn.Identity()


def _is_resnet(part: nn.Module) -> bool:
    norms = [getattr(part, name, None) for name in ("norm1", "norm2")]
    plain = getattr(part, "time_embedding_norm", None) == "default" and getattr(part, "time_emb_proj", 0) is None
    return plain and _is_silu(part, "nonlinearity") and all(type(norm) is nn.GroupNorm for norm in norms)


def _is_silu(part: nn.Module, name: str) -> bool:
    return type(getattr(part, name, None)) is nn.SiLU


def _joined(norm: object) -> NormAct:
    assert isinstance(norm, nn.GroupNorm)
    joined = NormAct(norm.num_groups, norm.num_channels, norm.eps, device="meta")
    joined.weight, joined.bias = norm.weight, norm.bias
    return joined.train(norm.training)
