"""The UNet of guided-diffusion and improved-diffusion (Dhariwal & Nichol 2021; Nichol & Dhariwal 2021).

Stages are numbered as in their checkpoints, which :mod:`stepfusion.checkpoints.guided_diffusion` converts. Its
forward pass is in the parts of :class:`stepfusion.networks.time_conditioned.TimeConditioned`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks.adm.config import GROUPS, ADMUNetConfig
from stepfusion.networks.blocks import Attention, Conditioned, Downsample, ResnetBlock, TimeMLP, Upsample, sinusoid
from stepfusion.networks.fused import Activation, convolve, normalised, projected
from stepfusion.networks.inputs import check_batch, check_image, check_labels, check_projections, check_timesteps
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.time_conditioned import TimeConditioned

_NORM_EPS = 1e-5


class ADMUNet(TimeConditioned):
    """A UNet over square images, conditioned on a timestep and, if the config says so, on a class label.

    Args:
        config: what to build. Weights are initialised as PyTorch's layers do.

    Attributes:
        config: as given.
        in_channels, out_channels: of x and of the output; with a learned variance the latter is twice the former.
        sample_size: height and width.
        num_classes: number of labels, or None without any.
        projection_size: P, the columns of the time projections.
    """

    def __init__(self, config: ADMUNetConfig) -> None:
        super().__init__()
        if not isinstance(config, ADMUNetConfig):
            raise TypeError(f"config must be an ADMUNetConfig, got {type(config).__name__}")
        self.config = config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.sample_size = config.image_size
        self.num_classes = config.num_classes if config.class_cond else None
        channels, levels = config.channels, len(config.channels)
        down = _Blocks(config, config.num_heads)
        up = _Blocks(config, config.num_heads_upsample or config.num_heads)
        self.time_embedding = TimeMLP(config.num_channels, config.time_embed_dim)
        self.class_embedding = nn.Embedding(config.num_classes, config.time_embed_dim) if config.class_cond else None

        width = channels[0]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(config.in_channels, width, kernel_size=3, padding=1)])])
        skips = [width]
        for level, out in enumerate(channels):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stage(down.residual(width, out, config.attends(level))))
                skips.append(out)
                width = out
            if level < levels - 1:
                self.input_blocks.append(Stage([down.smaller(width)]))
                skips.append(width)
        first, second = down.residual(width, width, True), down.residual(width, width, False)
        self.middle_block = Stage([*first, *second])
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(channels))):
            for block in range(config.num_res_blocks + 1):
                layers = up.residual(width + skips.pop(), out, config.attends(level))
                width = out
                if level and block == config.num_res_blocks:
                    layers.append(up.larger(width))
                self.output_blocks.append(Stage(layers))
        self.conv_norm_out = GroupNormAct(GROUPS, width, _NORM_EPS, nn.SiLU())
        self.conv_out = nn.Conv2d(width, config.out_channels, kernel_size=3, padding=1)

        self._resnets = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        self.projection_size = 0
        for resnet in self._resnets:
            resnet.time_start = self.projection_size
            self.projection_size += resnet.time_emb_proj.out_features

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict eps or x0, and the variance if it is learned.

        Args:
            x: [B, in_channels, H, W] in the weights' dtype, NCHW or channels_last; H and W multiples of
                ``2 ** (levels - 1)``.
            timesteps: int64, float32 or float64 [B].
            class_labels: int64 [B] if the config has classes, else None. Values are not checked here.

        Returns:
            [B, out_channels, H, W] in the weights' dtype.

        Raises:
            ValueError: an argument's shape or dtype does not fit.
        """
        check_batch(x, timesteps)
        check_labels(class_labels, timesteps, self.class_embedding is not None)
        return super().forward(x, timesteps, class_labels)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] by the sinusoid and the time MLP: [B, time_embed_dim] in the weights' dtype."""
        check_timesteps(timesteps)
        times = timesteps.to(torch.float32) * self.config.timestep_scale
        waves = sinusoid(times, self.config.num_channels, freq_shift=0, flip_sin_to_cos=True)
        embedding: Tensor = self.time_embedding(waves.to(self.conv_out.weight.dtype))
        return embedding

    def condition(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Add the class embedding to that of `embed_time`, and project it for every block: [B, projection_size]."""
        if class_labels is not None and self.class_embedding is not None:
            time = time + self.class_embedding(class_labels)
        activated = functional.silu(time)
        if self.fused:
            return projected(self, self._resnets, activated)
        return torch.cat([resnet.time_emb_proj(activated) for resnet in self._resnets], dim=1)

    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        """Run the part of `forward` that depends on `x`, with projections [B, projection_size] from `condition`."""
        check_image(x, self.in_channels, self.conv_out.weight.dtype, 2 ** (len(self.config.channels) - 1))
        check_projections(projections, x, self.projection_size)
        conv = self.get_submodule("input_blocks.0.0")
        if self.defers and isinstance(conv, nn.Conv2d):
            last = normalised(self.conv_norm_out, self._blocks(convolve(conv, x), projections))
        else:
            last = self.conv_norm_out(self._blocks(self.input_blocks[0](x, projections), projections))
        out: Tensor = self.conv_out(last)
        return out

    def _blocks(self, x: Activation, projections: Tensor) -> Activation:
        """Down, and up again."""
        skips = [x]
        for stage in self.input_blocks[1:]:
            x = stage(x, projections)
            skips.append(x)
        x = self.middle_block(x, projections)
        for stage in self.output_blocks:
            x = stage(x, projections, skips.pop())
        return x


class Stage(nn.ModuleList):
    """Layers that run one after the other; the first one also takes what the way down left."""

    def forward(self, x: Activation, projections: Tensor, skip: Activation | None = None) -> Activation:
        """Map x [B, C, H, W], projections [B, P] and skip [B, C2, H, W], if any, to [B, C', H', W']."""
        for layer in self:
            x = layer(x, projections, skip) if isinstance(layer, Conditioned) else layer(x)
            skip = None
        return x


@dataclass(frozen=True)
class _Blocks:
    """What the blocks of one side of the UNet share (a :class:`stepfusion.networks.blocks.BlockConfig`)."""

    config: ADMUNetConfig
    heads: int
    norm_num_groups: int = GROUPS
    norm_eps: float = _NORM_EPS
    act_fn: str = "silu"

    @property
    def resnet_time_scale_shift(self) -> str:
        return "scale_shift" if self.config.use_scale_shift_norm else "default"

    @property
    def time_embed_dim(self) -> int:
        return self.config.time_embed_dim

    @property
    def dropout(self) -> float:
        return self.config.dropout

    def head_dim(self, channels: int) -> int:
        return self.config.num_head_channels or channels // self.heads

    def residual(self, in_channels: int, out_channels: int, attention: bool) -> list[nn.Module]:
        """A residual block, with attention if any."""
        layers: list[nn.Module] = [ResnetBlock(self, in_channels, out_channels)]
        return [*layers, Attention(self, out_channels, GROUPS)] if attention else layers

    def smaller(self, channels: int) -> nn.Module:
        """What halves height and width."""
        if self.config.resblock_updown:
            return ResnetBlock(self, channels, channels, resample="down")
        return Downsample(channels, padding=1)

    def larger(self, channels: int) -> nn.Module:
        """What doubles height and width."""
        return (
            ResnetBlock(self, channels, channels, resample="up")
            if self.config.resblock_updown
            else Upsample(channels)
        )
