"""The levels of a conditioned UNet: residual blocks, each with a transformer behind it if the level attends.

Sub-module names are those of diffusers' ``UNet2DConditionModel``.
"""

from __future__ import annotations

from torch import Tensor, nn

from stepfusion.networks.blocks import Downsample, ResnetBlock, Upsample
from stepfusion.networks.fused import Activation
from stepfusion.networks.unet2d_condition.config import Level, UNet2DConditionConfig
from stepfusion.networks.unet2d_condition.transformer import Transformer


class DownBlock(nn.Module):
    """One level on the way down: residual blocks with transformers, if any, then a downsampler, if any."""

    def __init__(self, config: UNet2DConditionConfig, level: Level) -> None:
        super().__init__()
        self.resnets, self.attentions = _resnets(config, level), _transformers(config, level)
        self.downsamplers = None
        if level.resamples:
            self.downsamplers = nn.ModuleList([Downsample(level.channels, config.downsample_padding)])

    def forward(
        self, x: Activation, projections: Tensor, keys_values: Tensor, *, resamples: bool = True
    ) -> list[Activation]:
        """Return what the way up will concatenate, in order; the last entry is this level's output.

        Without ``resamples`` the downsampler does not run.
        """
        skips: list[Activation] = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, projections)
            if self.attentions is not None:
                x = self.attentions[index](x, keys_values)
            skips.append(x)
        if self.downsamplers is not None and resamples:
            skips.append(self.downsamplers[0](x))
        return skips


class MidBlock(nn.Module):
    """The lowest level: a residual block, a transformer, a residual block."""

    def __init__(self, config: UNet2DConditionConfig, level: Level) -> None:
        super().__init__()
        self.resnets = _resnets(config, level, config.mid_block_scale_factor)
        self.attentions = _transformers(config, level) or nn.ModuleList()

    def forward(self, x: Activation, projections: Tensor, keys_values: Tensor) -> Activation:
        """Map x [B, C, H, W] to the same shape."""
        x = self.attentions[0](self.resnets[0](x, projections), keys_values)
        out: Activation = self.resnets[1](x, projections)
        return out


class UpBlock(nn.Module):
    """One level on the way up: residual blocks over [x, skip] with transformers, if any; an upsampler, if any."""

    def __init__(self, config: UNet2DConditionConfig, level: Level) -> None:
        super().__init__()
        self.resnets, self.attentions = _resnets(config, level), _transformers(config, level)
        self.upsamplers = nn.ModuleList([Upsample(level.channels)]) if level.resamples else None

    def forward(self, x: Activation, skips: list[Activation], projections: Tensor, keys_values: Tensor) -> Activation:
        """Map x [B, C, H, W] to the next level's input; takes one entry off the end of `skips` for each resnet."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, projections, skips.pop())
            if self.attentions is not None:
                x = self.attentions[index](x, keys_values)
        return x if self.upsamplers is None else self.upsamplers[0](x)


def _resnets(config: UNet2DConditionConfig, level: Level, scale: float = 1.0) -> nn.ModuleList:
    blocks = (ResnetBlock(config, inputs, level.channels, output_scale=scale) for inputs in level.inputs)
    return nn.ModuleList(blocks)


def _transformers(config: UNet2DConditionConfig, level: Level) -> nn.ModuleList | None:
    if not level.transformers:
        return None
    groups, text = config.norm_num_groups, config.cross_attention_dim
    shape = groups, level.channels, text, level.heads, level.depth, level.only_cross, config.use_linear_projection
    return nn.ModuleList(Transformer(*shape) for _ in range(level.transformers))
