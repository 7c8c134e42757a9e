"""The UNet that a well-known annotated implementation of DDPM builds by hand.

Its state-dict names and arithmetic are that text's ("U-Net for DDPM", labml.ai), but for a norm of its attention
blocks that has weights and is never used: it is left out here. Its forward pass is in the parts of
:class:`stepfusion.networks.time_conditioned.TimeConditioned`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import _checks
from stepfusion.networks.attention import attend
from stepfusion.networks.blocks import sinusoid
from stepfusion.networks.inputs import check_batch, check_image, check_projections, check_timesteps
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.time_conditioned import TimeConditioned
from stepfusion.networks.unet2d.config import MAX_CHANNELS, MAX_LAYERS, MAX_LEVELS, MAX_SIZE

_LAST_GROUPS = 8
_NORM_EPS = 1e-5


class AnnotatedUNet(TimeConditioned):
    """A residual UNet with attention, conditioned on a timestep.

    Args:
        image_channels: C, channels of x and of the output.
        n_channels: channels at full size, a multiple of 8, 16 at least.
        ch_mults: for each level, its channels as a multiple of those of the level above.
        is_attn: for each level, whether its blocks attend.
        n_blocks: blocks a level, one more on the way up.
        n_groups: groups of the norms; the text's code has 32, and 8 in the last norm, which is always 8 here.
        dropout: in training.
        sample_size: height and width that an engine assumes, or None.

    Attributes:
        in_channels, sample_size: as given.
        num_classes: None: it takes no labels.
        projection_size: P, the columns of the time projections.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    num_classes: None = None

    def __init__(
        self,
        image_channels: int = 3,
        n_channels: int = 64,
        ch_mults: Sequence[int] = (1, 2, 2, 4),
        is_attn: Sequence[bool] = (False, False, True, True),
        n_blocks: int = 2,
        *,
        n_groups: int = 8,
        dropout: float = 0.1,
        sample_size: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = _checks.integer("image_channels", image_channels, 1, MAX_CHANNELS)
        self.n_channels = _checks.integer("n_channels", n_channels, 16, MAX_CHANNELS)
        if n_channels % _LAST_GROUPS:
            raise ValueError(f"n_channels must be a multiple of {_LAST_GROUPS}, got {n_channels}")
        n_blocks = _checks.integer("n_blocks", n_blocks, 1, MAX_LAYERS)
        n_groups = _checks.integer("n_groups", n_groups, 1, MAX_CHANNELS)
        dropout = _checks.number("dropout", dropout, 0.0, 1.0)
        self.sample_size = None if sample_size is None else _checks.integer("sample_size", sample_size, 1, MAX_SIZE)
        levels = _levels(n_channels, ch_mults, is_attn, n_groups)
        self._factor = 2 ** (len(levels) - 1)

        time = 4 * n_channels
        self.image_proj = nn.Conv2d(image_channels, n_channels, kernel_size=3, padding=1)
        self.time_emb = TimeEmbedding(time)
        self.down = nn.ModuleList()
        width, skips = n_channels, [n_channels]
        for level, (out, attends) in enumerate(levels):
            for _ in range(n_blocks):
                self.down.append(Block(width, out, time, attends, n_groups, dropout))
                width = out
                skips.append(width)
            if level < len(levels) - 1:
                self.down.append(Downsample(width))
                skips.append(width)
        self.middle = MiddleBlock(width, time, n_groups, dropout)
        self.up = nn.ModuleList()
        for level in reversed(range(len(levels))):
            out, attends = levels[level]
            above = levels[level - 1][0] if level else n_channels
            for channels in (*[out] * n_blocks, above):
                self.up.append(Block(width + skips.pop(), channels, time, attends, n_groups, dropout))
                width = channels
            if level:
                self.up.append(Upsample(width))
        self.norm = GroupNormAct(_LAST_GROUPS, width, _NORM_EPS, nn.SiLU())
        self.final = nn.Conv2d(width, image_channels, kernel_size=3, padding=1)

        self._resnets = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        self.projection_size = 0
        for resnet in self._resnets:
            resnet.time_start = self.projection_size
            self.projection_size += resnet.time_emb.out_features

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Predict eps, x0 or v, whatever the weights were trained for.

        Args:
            x: [B, image_channels, H, W] in the weights' dtype, NCHW or channels_last; H and W multiples of
                ``2 ** (levels - 1)``.
            timesteps: int64, float32 or float64 [B].
            class_labels: None.

        Returns:
            The shape and dtype of x.

        Raises:
            ValueError: an argument's shape or dtype does not fit.
        """
        check_batch(x, timesteps)
        if class_labels is not None:
            raise ValueError("class_labels is given; this network takes none")
        return super().forward(x, timesteps)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B]: [B, 4 * n_channels] in the weights' dtype."""
        check_timesteps(timesteps)
        embedding: Tensor = self.time_emb(timesteps)
        return embedding

    def condition(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Project what `embed_time` returned for every block: [B, projection_size]."""
        activated = functional.silu(time)
        return torch.cat([resnet.time_emb(activated) for resnet in self._resnets], dim=1)

    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        """Run the part of `forward` that depends on `x`, with projections [B, projection_size] from `condition`."""
        check_image(x, self.in_channels, self.final.weight.dtype, self._factor)
        check_projections(projections, x, self.projection_size)
        x = self.image_proj(x)
        skips = [x]
        for module in self.down:
            x = module(x, projections)
            skips.append(x)
        x = self.middle(x, projections)
        for module in self.up:
            x = module(x, projections) if isinstance(module, Upsample) else module(x, projections, skips.pop())
        out: Tensor = self.final(self.norm(x))
        return out


class TimeEmbedding(nn.Module):
    """A sinusoid of width / 4 entries and two linear layers with a SiLU between them: [B] -> [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.waves = width // 4
        self.lin1 = nn.Linear(self.waves, width)
        self.lin2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        waves = sinusoid(timesteps, self.waves, freq_shift=1, flip_sin_to_cos=False)
        out: Tensor = self.lin2(functional.silu(self.lin1(waves.to(self.lin1.weight.dtype))))
        return out


class ResidualBlock(nn.Module):
    """``shortcut(x) + conv2(dropout(act(norm2(conv1(act(norm1(x))) + time))))``.

    `time_start`, set by the network, is the first of this block's columns in the time projections.
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.time_start = 0
        self.norm1 = GroupNormAct(groups, in_channels, _NORM_EPS, nn.SiLU())
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = GroupNormAct(groups, out_channels, _NORM_EPS, nn.SiLU())
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.time_emb = nn.Linear(time_channels, out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        """Map x [B, in_channels, H, W] and projections [B, P] to [B, out_channels, H, W]."""
        h = self.conv1(self.norm1(x))
        h = self.norm2(h, time=projections.narrow(1, self.time_start, self.time_emb.out_features))
        out: Tensor = self.shortcut(x) + self.conv2(self.dropout(h))
        return out


class AttentionBlock(nn.Module):
    """Self-attention of one head over all positions, with a residual and without a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.projection(tokens).chunk(3, dim=2)
        mixed: Tensor = self.output(attend(q, k, v, heads=1))
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """A residual block, and attention if any: down with x, up with x and what the way down left."""

    def __init__(
        self, in_channels: int, out_channels: int, time_channels: int, attends: bool, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.res = ResidualBlock(in_channels, out_channels, time_channels, groups, dropout)
        self.attn = AttentionBlock(out_channels) if attends else nn.Identity()

    def forward(self, x: Tensor, projections: Tensor, skip: Tensor | None = None) -> Tensor:
        out: Tensor = self.attn(self.res(x if skip is None else torch.cat((x, skip), dim=1), projections))
        return out


class MiddleBlock(nn.Module):
    """The lowest level: a residual block, attention, a residual block."""

    def __init__(self, channels: int, time_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.res1 = ResidualBlock(channels, channels, time_channels, groups, dropout)
        self.attn = AttentionBlock(channels)
        self.res2 = ResidualBlock(channels, channels, time_channels, groups, dropout)

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        out: Tensor = self.res2(self.attn(self.res1(x, projections)), projections)
        return out


class Downsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Double height and width with a transposed 4x4 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def _levels(
    n_channels: int, ch_mults: Sequence[int], is_attn: Sequence[bool], n_groups: int
) -> list[tuple[int, bool]]:
    """Channels and attention of each level, checked."""
    for name, value in (("ch_mults", ch_mults), ("is_attn", is_attn)):
        if isinstance(value, str) or not isinstance(value, Sequence) or not 1 <= len(value) <= MAX_LEVELS:
            raise TypeError(f"{name} must be a sequence of 1 to {MAX_LEVELS} entries, got {value!r}")
    if len(ch_mults) != len(is_attn):
        raise ValueError(f"is_attn must have {len(ch_mults)} entries, as ch_mults has, got {len(is_attn)}")
    levels, width = [], n_channels
    for factor, attends in zip(ch_mults, is_attn, strict=True):
        width *= _checks.integer("ch_mults", factor, 1, MAX_CHANNELS)
        if width > MAX_CHANNELS:
            raise ValueError(f"ch_mults must keep a level within {MAX_CHANNELS} channels, got {width}")
        levels.append((width, _checks.boolean("is_attn", attends)))
    if n_channels % n_groups:  # all others are multiples of n_channels
        raise ValueError(f"n_groups must divide n_channels {n_channels}, got {n_groups}")
    return levels
