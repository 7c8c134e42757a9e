"""The blocks of the DDPM UNet: residual block, attention, resampling, and the levels made of them.

Every block takes the time *projections* of the whole network, float [B, P], and reads its own columns: what depends
on the timestep alone is computed before the blocks run and can be kept from step to step (`UNet2D.project`).
Sub-module names are those of diffusers' ``UNet2DModel``, so that its state dicts load strictly.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks import fused
from stepfusion.networks.attention import attend
from stepfusion.networks.fused import Activation, Value
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.unet2d.config import UNet2DConfig

_INT32_MAX = 2**31 - 1

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


class ResnetConfig(Protocol):
    """What residual blocks read of a network's config."""

    @property
    def norm_num_groups(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def act_fn(self) -> str: ...
    @property
    def resnet_time_scale_shift(self) -> str: ...
    @property
    def time_embed_dim(self) -> int: ...
    @property
    def dropout(self) -> float: ...


class BlockConfig(ResnetConfig, Protocol):
    """What the blocks read of a network's config; :class:`stepfusion.networks.UNet2DConfig` is one."""

    def head_dim(self, channels: int) -> int: ...


def activation(name: str) -> nn.Module:
    """Return the activation that a config's ``act_fn`` names."""
    return _ACTIVATIONS[name]()


def sinusoid(timesteps: Tensor, channels: int, freq_shift: float, flip_sin_to_cos: bool) -> Tensor:
    """Sinusoidal embedding of timesteps, in float32 (Ho et al. 2020, appendix B; Vaswani et al. 2017, section 3.5).

    ``[sin(t w_i), cos(t w_i)]`` with ``w_i = 10000 ** (-i / (channels // 2 - freq_shift))``, halves swapped when
    `flip_sin_to_cos`, and a zero at the end when `channels` is odd.

    Args:
        timesteps: int64, float32 or float64 [B].

    Returns:
        float32 [B, channels].
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(index * -9.210340371976184 / (half - freq_shift))  # -ln(10000)
    phase = timesteps[:, None].to(torch.float32) * frequencies
    waves = (phase.cos(), phase.sin()) if flip_sin_to_cos else (phase.sin(), phase.cos())
    return functional.pad(torch.cat(waves, dim=1), (0, 1)) if channels % 2 else torch.cat(waves, dim=1)


def double_size(x: Tensor) -> Tensor:
    """Repeat every pixel in a 2 x 2 square: [B, C, H, W] -> [B, C, 2H, 2W].

    CUDA's channels_last kernel silently leaves zeros past 2**31 outputs (pytorch#141831, which 256 images of 256x256
    with 128 channels reach); its NCHW kernel does not. Compilers bring kernels of their own.
    """
    if not torch.compiler.is_compiling() and 4 * x.numel() > _INT32_MAX:
        x = x.contiguous()
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


class TimeMLP(nn.Module):
    """Two linear layers with a SiLU between them: [B, inputs] -> [B, width]."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(functional.silu(self.linear_1(x)))
        return out


class Downsample(nn.Module):
    """Halve height and width with a strided convolution; `padding` 0 pads right and bottom only (as DDPM did)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.pads_one_side = padding == 0
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=padding)

    def forward(self, x: Activation) -> Activation:
        if isinstance(x, Value):
            return fused.downsampled(self, x)
        out: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)) if self.pads_one_side else x)
        return out


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Activation) -> Activation:
        if isinstance(x, Value):
            return fused.upsampled(self, x)
        out: Tensor = self.conv(double_size(x))
        return out


class Conditioned(nn.Module):
    """A layer that takes (x, projections) or (x, projections, skip); other layers take x alone."""


class ResnetBlock(Conditioned):
    """Residual block with time conditioning (Ho et al. 2020; "scale_shift": Dhariwal & Nichol 2021, section 3.1).

    ``h = conv1(act(norm1(x)))``; then ``norm2(h + time)`` or ``norm2(h) * (1 + scale) + shift``; then
    ``(shortcut(x) + conv2(dropout(act(h)))) / output_scale``. With `resample`, x and h change size before conv1.
    `time_start`, set by the network, is the first of this block's columns in the time projections. With
    `time_has_bias` they contain the bias of conv1 (:func:`stepfusion.networks.fused.projected`).
    """

    def __init__(
        self,
        config: ResnetConfig,
        in_channels: int,
        out_channels: int,
        resample: Literal["up", "down"] | None = None,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        groups, eps, act = config.norm_num_groups, config.norm_eps, activation(config.act_fn)
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.resample = resample
        self.output_scale = output_scale
        self.time_start = 0
        self.time_has_bias = False
        self.norm1 = GroupNormAct(groups, in_channels, eps, act)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_embed_dim, 2 * out_channels if self.scale_shift else out_channels)
        self.norm2 = GroupNormAct(groups, out_channels, eps, act)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Activation, projections: Tensor, skip: Activation | None = None) -> Activation:
        """Map x [B, in_channels, H, W] and projections [B, P] to [B, out_channels, H', W'].

        With `skip`, the input is the concatenation of x and skip along the channels.
        """
        if isinstance(x, Value):
            return fused.residual_block(self, x, projections, skip)
        if skip is not None and not self.norm1.fused:
            x, skip = torch.cat((x, skip), dim=1), None
        h = self.norm1(x, skip=skip)
        if self.resample is not None:
            x, h = self.resampled(x), self.resampled(h)
        time = projections.narrow(1, self.time_start, self.time_emb_proj.out_features)
        h = fused.convolve(self.conv1, h).x if self.time_has_bias else self.conv1(h)
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, time=time)
        h = self.conv2(self.dropout(h))
        out = h + x if self.conv_shortcut is None else self._add_shortcut(self.conv_shortcut, h, x, skip)
        return out if self.output_scale == 1 else out / self.output_scale

    def _add_shortcut(self, shortcut: nn.Conv2d, h: Tensor, x: Tensor, skip: Tensor | None) -> Tensor:
        """``h + shortcut([x, skip])``; a 1x1 convolution of a concatenation is a sum of two matrix products."""
        if skip is None:
            added: Tensor = h + shortcut(x)
            return added
        weight = shortcut.weight.flatten(1)  # [out_channels, in_channels]
        of_x, of_skip = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
        out = torch.addmm(_pixels(h), _pixels(x), of_x.t())
        out.addmm_(_pixels(skip), of_skip.t())
        if shortcut.bias is not None:
            out += shortcut.bias
        batch, channels, height, width = h.shape
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def resampled(self, x: Tensor) -> Tensor:
        """x at the size of the output."""
        if self.resample == "down":
            return functional.avg_pool2d(x, 2)
        return double_size(x)


class Attention(nn.Module):
    """Self-attention over all positions, with a residual (Ho et al. 2020; Wang et al. 2018)."""

    def __init__(self, config: BlockConfig, channels: int, groups: int | None, output_scale: float = 1.0) -> None:
        super().__init__()
        self.head_dim = config.head_dim(channels)
        self.heads = channels // self.head_dim
        self.output_scale = output_scale
        inner = self.heads * self.head_dim
        self.group_norm = GroupNormAct(groups, channels, config.norm_eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Activation) -> Activation:
        """Map x [B, C, H, W] to the same shape."""
        if isinstance(x, Value):
            return fused.attention_block(self, x)
        tokens = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)  # [B, HW, C]
        attended = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), self.heads)
        mixed: Tensor = self.to_out[0](attended)
        out = x + mixed.transpose(1, 2).reshape(x.shape)
        return out if self.output_scale == 1 else out / self.output_scale


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, each followed by attention if any, then a downsampler if any."""

    def __init__(self, config: UNet2DConfig, in_channels: int, out_channels: int, kind: str, resamples: bool) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, out_channels) for channels in inputs)
        self.attentions = _attentions(config, out_channels, len(inputs)) if "Attn" in kind else None
        self.downsamplers = None
        if resamples and config.resamples_by_resnet(kind):
            self.downsamplers = nn.ModuleList([ResnetBlock(config, out_channels, out_channels, resample="down")])
        elif resamples:
            self.downsamplers = nn.ModuleList([Downsample(out_channels, config.downsample_padding)])

    def forward(self, x: Activation, projections: Tensor, *, resamples: bool = True) -> list[Activation]:
        """Return what the way up will concatenate, in order; the last entry is this level's output.

        Without ``resamples`` the downsampler does not run.
        """
        skips: list[Activation] = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, projections)
            if self.attentions is not None:
                x = self.attentions[index](x)
            skips.append(x)
        if self.downsamplers is not None and resamples:
            skips.append(_run_resampler(self.downsamplers[0], x, projections))
        return skips


class MidBlock(nn.Module):
    """The lowest level: a residual block, attention if any, a residual block."""

    def __init__(self, config: UNet2DConfig, channels: int) -> None:
        super().__init__()
        scale = config.mid_block_scale_factor
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, channels, output_scale=scale) for _ in range(2))
        self.attentions = None
        if config.add_attention:
            self.attentions = nn.ModuleList([Attention(config, channels, config.mid_attention_groups, scale)])

    def forward(self, x: Activation, projections: Tensor) -> Activation:
        """Map x [B, C, H, W] to the same shape."""
        x = self.resnets[0](x, projections)
        if self.attentions is not None:
            x = self.attentions[0](x)
        out: Activation = self.resnets[1](x, projections)
        return out


class UpBlock(nn.Module):
    """One level on the way up: residual blocks over [x, skip], each with attention if any; an upsampler if any."""

    def __init__(
        self,
        config: UNet2DConfig,
        below_channels: int,
        out_channels: int,
        above_channels: int,
        kind: str,
        resamples: bool,
    ) -> None:
        super().__init__()
        layers = config.layers_per_block + 1
        states = [below_channels] + [out_channels] * (layers - 1)
        skips = [out_channels] * (layers - 1) + [above_channels]
        inputs = [state + skip for state, skip in zip(states, skips, strict=True)]
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, out_channels) for channels in inputs)
        self.attentions = _attentions(config, out_channels, layers) if "Attn" in kind else None
        self.upsamplers = None
        if resamples and config.resamples_by_resnet(kind):
            self.upsamplers = nn.ModuleList([ResnetBlock(config, out_channels, out_channels, resample="up")])
        elif resamples:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x: Activation, skips: list[Activation], projections: Tensor) -> Activation:
        """Map x [B, C, H, W] to the next level's input; takes one entry off the end of `skips` for each resnet."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, projections, skips.pop())
            if self.attentions is not None:
                x = self.attentions[index](x)
        return x if self.upsamplers is None else _run_resampler(self.upsamplers[0], x, projections)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels_last as the matrix [B H W, C], without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _attentions(config: UNet2DConfig, channels: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(Attention(config, channels, config.norm_num_groups) for _ in range(count))


def _run_resampler(resampler: nn.Module, x: Activation, projections: Tensor) -> Activation:
    out: Activation = resampler(x, projections) if isinstance(resampler, Conditioned) else resampler(x)
    return out
