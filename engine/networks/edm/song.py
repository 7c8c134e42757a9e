"""DDPM++ and NCSN++ (Song et al. 2021, appendix H) as EDM has them (Karras et al. 2022, appendix F.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion.networks.blocks import sinusoid
from stepfusion.networks.edm.block import Block, group_norm
from stepfusion.networks.edm.config import SongUNetConfig
from stepfusion.networks.edm.resampling import ConvThenSmaller, Resampler
from stepfusion.networks.edm.unet import EDMUNet
from stepfusion.networks.inputs import check_timesteps

_FOURIER_SCALE = 16.0


class SongUNet(EDMUNet[SongUNetConfig]):
    """EDM's DDPM++ or NCSN++, with the names that its state dicts have.

    Args:
        config: what to build.

    Raises:
        TypeError: the config is something else.
    """

    def __init__(self, config: SongUNetConfig) -> None:
        if not isinstance(config, SongUNetConfig):
            raise TypeError(f"config must be a SongUNetConfig, got {type(config).__name__}")
        super().__init__(config)
        noise, width = config.noise_channels, config.emb_channels
        self.map_noise = FourierEmbedding(noise) if config.embedding_type == "fourier" else None
        self.map_label = nn.Linear(config.label_dim, noise) if config.label_dim else None
        self.map_augment = nn.Linear(config.augment_dim, noise, bias=False) if config.augment_dim else None
        self.map_layer0 = nn.Linear(noise, width)
        self.map_layer1 = nn.Linear(width, width)
        beside = config.in_channels
        for level, plans in self.down_plans:
            for plan in plans:
                self.enc[plan.name] = Block(config, plan)
                if plan.resample is not None:
                    self._add_beside(level, beside, plan.out_channels)
                    beside = plan.out_channels if config.encoder_type == "residual" else beside
        for level, plans in self.up_plans:
            for plan in plans:
                self.dec[plan.name] = Block(config, plan)
            if self._emits(level):
                self._add_output(level, plans[-1].out_channels)
        self.register_blocks()

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed c_noise [B] as waves: [B, noise_channels] in the weights' dtype."""
        check_timesteps(timesteps)
        if self.map_noise is not None:
            waves: Tensor = self.map_noise(timesteps)
        else:
            waves = sinusoid(timesteps, self.config.noise_channels, freq_shift=1, flip_sin_to_cos=False)
        return waves.to(self.dtype)

    def mapped(self, time: Tensor, classes: Tensor | None) -> Tensor:
        """Two layers over the waves and the class, which is scaled by the root of the number of classes."""
        if classes is not None and self.map_label is not None:
            of_class = functional.linear(classes, self.map_label.weight)
            time = time + (of_class * math.sqrt(self.config.label_dim) + self.map_label.bias)
        return functional.silu(self.map_layer1(functional.silu(self.map_layer0(time))))

    def joined(self, level: int, h: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """With the smaller image ("skip"), or with the smaller features of the level above ("residual")."""
        name = self.config.level_name(level)
        if self.config.encoder_type == "skip":
            beside = self.enc[f"{name}_aux_down"](beside)
            return h + self.enc[f"{name}_aux_skip"](beside), beside
        if self.config.encoder_type == "residual":
            h = (h + self.enc[f"{name}_aux_residual"](beside)) * math.sqrt(0.5)
            return h, h
        return h, beside

    def emitted(self, level: int, h: Tensor, out: Tensor | None) -> Tensor | None:
        """What the largest level says; with the "skip" decoder, the sum of what all say."""
        if not self._emits(level):
            return out
        name = self.config.level_name(level)
        more: Tensor = self.dec[f"{name}_aux_conv"](self.dec[f"{name}_aux_norm"](h))
        return more if out is None else more + self.dec[f"{name}_aux_up"](out)

    def _emits(self, level: int) -> bool:
        return level == 0 or self.config.decoder_type == "skip"

    def _add_beside(self, level: int, channels: int, out_channels: int) -> None:
        """The layers of :meth:`joined`."""
        name, taps = self.config.level_name(level), self.config.resample_filter
        if self.config.encoder_type == "skip":
            self.enc[f"{name}_aux_down"] = Resampler(taps, "down")
            self.enc[f"{name}_aux_skip"] = nn.Conv2d(channels, out_channels, kernel_size=1)
        if self.config.encoder_type == "residual":
            self.enc[f"{name}_aux_residual"] = ConvThenSmaller(channels, out_channels, 3, taps)

    def _add_output(self, level: int, channels: int) -> None:
        """The layers of :meth:`emitted`."""
        name = self.config.level_name(level)
        if level < len(self.up_plans) - 1 and self.config.decoder_type == "skip":
            self.dec[f"{name}_aux_up"] = Resampler(self.config.resample_filter, "up")
        self.dec[f"{name}_aux_norm"] = group_norm(channels, self.config.norm_eps, nn.SiLU())
        self.dec[f"{name}_aux_conv"] = nn.Conv2d(channels, self.out_channels, kernel_size=3, padding=1)


class FourierEmbedding(nn.Module):
    """``[sin(2 pi t f), cos(2 pi t f)]`` with frequencies drawn from N(0, 16**2): [B] -> float32 or float64 [B, C].

    The frequencies stay float32 when the network becomes half precision, in which the waves would lose their phase.
    """

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", _FOURIER_SCALE * torch.randn(channels // 2))

    def forward(self, timesteps: Tensor) -> Tensor:
        phase = timesteps[:, None].to(self.freqs.dtype) * (2 * math.pi * self.freqs)
        return torch.cat((phase.sin(), phase.cos()), dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.freqs
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        made = self.freqs
        wide = torch.promote_types(made.dtype, torch.float32)
        if made.dtype != wide:
            self.freqs = kept.to(made.device, wide)
        return self
