"""The UNet over sequences that diffusion policies plan with (Chi et al. 2023, section 3.1; Janner et al. 2022).

It has the state-dict keys of diffusion_policy's ``ConditionalUnet1D`` and the same outputs, for x as [B, C, L] where
that takes [B, L, C]. Its forward pass is in the parts of
:class:`stepfusion.networks.time_conditioned.TimeConditioned`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepfusion import _checks
from stepfusion.networks.blocks import Conditioned, sinusoid
from stepfusion.networks.contexts import context_vectors
from stepfusion.networks.inputs import check_batch, check_projections, check_sequence, check_timesteps
from stepfusion.networks.time_conditioned import TimeConditioned
from stepfusion.networks.unet2d.config import MAX_CHANNELS, MAX_LEVELS, MAX_SIZE

_LAST_GROUPS = 8  # of the last norm, whatever n_groups is


class UNet1D(TimeConditioned):
    """A UNet over sequences, conditioned on a timestep and, with `global_cond_dim`, on a context vector.

    The context, such as the features of an observation, is all zero if there is none. Label ``k < global_cond_dim``
    stands for the vector with a one at entry k, and label `global_cond_dim`, the null label, for no context.
    A condition for each position (``local_cond_dim``) is not implemented.

    Args:
        input_dim: C, channels of x and of the output.
        global_cond_dim: entries of the context vector; None without one.
        diffusion_step_embed_dim: width of the timestep's embedding, even.
        down_dims: channels of each level, multiples of `n_groups`, the first of 8 too.
        kernel_size: of the convolutions, odd.
        n_groups: groups of the norms.
        cond_predict_scale: time and context scale the features of a block, and do not only shift them (FiLM, Perez
            et al. 2018).
        sample_size: L, the length that an engine assumes, a multiple of ``2 ** (levels - 1)``; or None.

    Attributes:
        in_channels, out_channels: C.
        sample_size: (L,), or None.
        context_size: `global_cond_dim`.
        num_classes: ``context_size + 1``, the number of labels; None without a context.
        projection_size: P, the columns of the projections.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        input_dim: int,
        global_cond_dim: int | None = None,
        diffusion_step_embed_dim: int = 256,
        down_dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 3,
        n_groups: int = 8,
        *,
        cond_predict_scale: bool = False,
        sample_size: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = self.out_channels = _checks.integer("input_dim", input_dim, 1, MAX_CHANNELS)
        self.context_size = global_cond_dim
        if global_cond_dim is not None:
            _checks.integer("global_cond_dim", global_cond_dim, 1, MAX_SIZE)
        self.num_classes = None if global_cond_dim is None else global_cond_dim + 1
        self.waves = _checks.integer("diffusion_step_embed_dim", diffusion_step_embed_dim, 4, MAX_CHANNELS)
        if self.waves % 2:
            raise ValueError(f"diffusion_step_embed_dim must be even, got {self.waves}")
        dims = _dims(down_dims, _checks.integer("n_groups", n_groups, 1, MAX_CHANNELS))
        if _checks.integer("kernel_size", kernel_size, 1, 255) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.factor = 2 ** (len(dims) - 1)
        self.sample_size = _length(sample_size, self.factor)
        scales = _checks.boolean("cond_predict_scale", cond_predict_scale)

        def block(in_channels: int, out_channels: int) -> FilmBlock:
            width = self.waves + (global_cond_dim or 0)
            return FilmBlock(in_channels, out_channels, width, kernel_size, n_groups, scales)

        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(self.waves, 4 * self.waves), nn.Mish(), nn.Linear(4 * self.waves, self.waves)
        )
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]) for _ in range(2)])
        self.down_modules = nn.ModuleList()
        for level, (above, here) in enumerate(zip((input_dim, *dims), dims, strict=False)):
            resampler = Resampler(nn.Conv1d(here, here, 3, 2, 1)) if level < len(dims) - 1 else nn.Identity()
            self.down_modules.append(nn.ModuleList([block(above, here), block(here, here), resampler]))
        self.up_modules = nn.ModuleList()
        for here, above in zip(reversed(dims), reversed(dims[:-1]), strict=False):
            resampler = Resampler(nn.ConvTranspose1d(above, above, 4, 2, 1))
            self.up_modules.append(nn.ModuleList([block(2 * here, above), block(above, above), resampler]))
        last = ConvBlock(dims[0], dims[0], kernel_size, _LAST_GROUPS)
        self.final_conv = nn.Sequential(last, nn.Conv1d(dims[0], input_dim, kernel_size=1))
        self._films = [module for module in self.modules() if isinstance(module, FilmBlock)]
        self.projection_size = 0
        for film in self._films:
            film.start = self.projection_size
            self.projection_size += film.size

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict whatever the weights were trained for.

        Args:
            x: [B, C, L] in the weights' dtype; L a multiple of ``2 ** (levels - 1)``.
            timesteps: int64, float32 or float64 [B].
            labels: int64 [B]; or contexts [B, context_size] in the weights' dtype; or None for no context. None if
                the network takes none. Values are not checked here.

        Returns:
            The shape and dtype of x.

        Raises:
            ValueError: an argument's shape or dtype does not fit.
        """
        check_batch(x, timesteps, ndim=3)
        return super().forward(x, timesteps, labels)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B]: [B, diffusion_step_embed_dim] in the weights' dtype."""
        check_timesteps(timesteps)
        waves = sinusoid(timesteps, self.waves, freq_shift=1, flip_sin_to_cos=False)
        embedding: Tensor = self.diffusion_step_encoder(waves.to(self._dtype))
        return embedding

    def condition(self, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Put the context beside what `embed_time` returned, and project both for every block: [B, P]."""
        if self.context_size is not None:
            time = torch.cat((time, context_vectors(labels, time, self.context_size)), dim=1)
        elif labels is not None:
            raise ValueError("labels is given; this network takes none")
        activated = functional.mish(time)
        return torch.cat([film.projection(activated) for film in self._films], dim=1)

    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        """Run the part of `forward` that depends on `x`, with projections [B, P] from `condition`."""
        check_sequence(x, self.in_channels, self._dtype, self.factor)
        check_projections(projections, x, self.projection_size)
        skips = []
        for level in self.down_modules:
            first, second, resampler = cast(nn.ModuleList, level)
            x = second(first(x, projections), projections)
            skips.append(x)
            x = resampler(x)
        for middle in self.mid_modules:
            x = middle(x, projections)
        for level in self.up_modules:
            first, second, resampler = cast(nn.ModuleList, level)
            x = first(torch.cat((x, skips.pop()), dim=1), projections)
            x = resampler(second(x, projections))
        out: Tensor = self.final_conv(x)
        return out

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class ConvBlock(nn.Module):
    """A convolution of the same length, a group norm and Mish."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel, padding=kernel // 2)
        self.block = nn.Sequential(conv, nn.GroupNorm(groups, out_channels), nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class FilmBlock(Conditioned):
    """``shortcut(x) + second(film(first(x)))``, film adding a bias to each channel, or scaling it too.

    `start`, set by the network, is the first of this block's `size` columns in the projections.
    """

    def __init__(
        self, in_channels: int, out_channels: int, width: int, kernel: int, groups: int, scales: bool
    ) -> None:
        super().__init__()
        self.scales, self.start, self.size = scales, 0, out_channels * (2 if scales else 1)
        first = ConvBlock(in_channels, out_channels, kernel, groups)
        self.blocks = nn.ModuleList([first, ConvBlock(out_channels, out_channels, kernel, groups)])
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(width, self.size))
        same = in_channels == out_channels
        self.residual_conv = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, kernel_size=1)

    def projection(self, activated: Tensor) -> Tensor:
        """This block's columns, from the activated embedding [B, width]."""
        out: Tensor = self.cond_encoder[1](activated)
        return out

    def forward(self, x: Tensor, projections: Tensor) -> Tensor:
        """Map x [B, in_channels, L] and projections [B, P] to [B, out_channels, L]."""
        film = projections.narrow(1, self.start, self.size)[:, :, None]
        h: Any = self.blocks[0](x)
        if self.scales:
            scale, bias = film.chunk(2, dim=1)
            h = torch.addcmul(bias, scale, h)
        else:
            h = h + film
        out: Tensor = self.blocks[1](h) + self.residual_conv(x)
        return out


class Resampler(nn.Module):
    """A strided convolution, or a transposed one, under the name "conv" that the state dicts have."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def _dims(down_dims: Sequence[int], groups: int) -> tuple[int, ...]:
    if isinstance(down_dims, str) or not isinstance(down_dims, Sequence) or not 1 <= len(down_dims) <= MAX_LEVELS:
        raise TypeError(f"down_dims must be a sequence of 1 to {MAX_LEVELS} entries, got {down_dims!r}")
    dims = tuple(_checks.integer("down_dims", width, 1, MAX_CHANNELS) for width in down_dims)
    for width in dims:
        if width % groups:
            raise ValueError(f"down_dims must be multiples of n_groups {groups}, got {width}")
    if dims[0] % _LAST_GROUPS:
        raise ValueError(f"down_dims must begin with a multiple of {_LAST_GROUPS}, got {dims[0]}")
    return dims


def _length(sample_size: int | None, factor: int) -> tuple[int] | None:
    if sample_size is None:
        return None
    if _checks.integer("sample_size", sample_size, 1, MAX_SIZE) % factor:
        raise ValueError(f"sample_size must be a multiple of {factor}, got {sample_size}")
    return (sample_size,)
