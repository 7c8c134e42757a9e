"""The one block that EDM's UNets are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks.attention import attend
from stepfusion.networks.blocks import Conditioned
from stepfusion.networks.edm.config import BlockPlan, DhariwalUNetConfig, SongUNetConfig, norm_groups
from stepfusion.networks.edm.resampling import ResampledConv2d, Resampler
from stepfusion.networks.fused import folded
from stepfusion.networks.norm import GroupNormAct

UNetConfig = SongUNetConfig | DhariwalUNetConfig


class Block(Conditioned):
    """A residual block, with attention if the plan has any (Karras et al. 2022, appendix F.2).

    ``h = conv0(act(norm0(x)))``, resampled between the two if the plan says so; then ``norm1(h + time)`` or
    ``norm1(h) * (1 + scale) + shift``; then ``(skip(x) + conv1(dropout(act(h)))) * skip_scale``. Attention adds to
    that, and the sum is scaled once more. Sub-modules have the names that EDM's state dicts have.

    Attributes:
        time_start: the first of this block's columns in the time projections; set by the network.
    """

    def __init__(self, config: UNetConfig, plan: BlockPlan) -> None:
        super().__init__()
        taps, direction, channels = config.resample_filter, plan.resample, plan.out_channels
        self.heads, self.skip_scale, self.adaptive_scale = plan.heads, config.skip_scale, config.adaptive_scale
        self.time_start = 0
        self.norm0 = group_norm(plan.in_channels, config.norm_eps, nn.SiLU())
        self.conv0: nn.Module = nn.Conv2d(plan.in_channels, channels, kernel_size=3, padding=1)
        if direction is not None:
            self.conv0 = ResampledConv2d(plan.in_channels, channels, 3, taps, direction)
        self.affine = nn.Linear(config.emb_channels, channels * (2 if config.adaptive_scale else 1))
        self.norm1 = group_norm(channels, config.norm_eps, nn.SiLU())
        self.dropout = nn.Dropout(config.dropout)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.skip: nn.Module | None = None
        if direction is not None and (config.resample_proj or plan.in_channels != channels):
            self.skip = ResampledConv2d(plan.in_channels, channels, 1, taps, direction)
        elif direction is not None:
            self.skip = Resampler(taps, direction)
        elif plan.in_channels != channels:
            self.skip = nn.Conv2d(plan.in_channels, channels, kernel_size=1)
        if plan.heads:
            self.norm2 = group_norm(channels, config.norm_eps)
            self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
            self.proj = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor, projections: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map x [B, in_channels, H, W] and projections [B, P] to [B, out_channels, H', W'].

        With `skip`, the input is the concatenation of x and skip along the channels.
        """
        if skip is not None and not (self.norm0.fused and self.skip is not None):
            x, skip = torch.cat((x, skip), dim=1), None
        h = self.conv0(self.norm0(x, skip=skip))
        time = projections.narrow(1, self.time_start, self.affine.out_features)
        if self.adaptive_scale:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm1(h, scale=scale, shift=shift)
        else:
            h = self.norm1(h, time=time)
        h = self._scaled(self.conv1(self.dropout(h)) + self._shortcut(x, skip))
        return self._scaled(h + self._attention(h)) if self.heads else h

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """What is added to the result; a 1x1 convolution of a concatenation is a sum of two."""
        if self.skip is None:
            return x
        if skip is None:
            out: Tensor = self.skip(x)
            return out
        weight, bias = self.skip.weight, self.skip.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        of_x, of_skip = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
        return functional.conv2d(x, of_x, bias) + functional.conv2d(skip, of_skip)

    def _attention(self, x: Tensor) -> Tensor:
        """Self-attention over all positions of [B, C, H, W]."""
        tokens = self.norm2(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = functional.linear(tokens, *self._projection()).chunk(3, dim=2)
        mixed = functional.linear(attend(q, k, v, self.heads), self.proj.weight.flatten(1), self.proj.bias)
        return mixed.transpose(1, 2).reshape(x.shape)

    def _projection(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of q, then k, then v; the state dict has them by turns within each head."""
        bias = self.qkv.bias
        assert bias is not None
        rows = self.qkv.weight.flatten(1)
        if not self.norm2.fused:  # the weights may change
            return self._in_order(rows), self._in_order(bias)
        weight = folded(self, "weight", lambda: self._in_order(rows))
        return weight, folded(self, "bias", lambda: self._in_order(bias))

    def _in_order(self, rows: Tensor) -> Tensor:
        """[heads D 3, ...] as [3 heads D, ...]."""
        return rows.reshape(self.heads, -1, 3, *rows.shape[1:]).movedim(2, 0).flatten(0, 2)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.skip_scale == 1 else x * self.skip_scale


def group_norm(channels: int, eps: float, act: nn.Module | None = None) -> GroupNormAct:
    """A group norm with EDM's number of groups."""
    return GroupNormAct(norm_groups(channels), channels, eps, act)
