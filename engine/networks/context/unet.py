"""The small context UNet that a short course on diffusion models draws 16x16 sprites with.

State-dict names, sizes and arithmetic are those of the course's public notebooks, so their checkpoints load strictly,
with one difference: if the first residual block changes the number of channels, the notebooks draw a new random
1x1 convolution as its shortcut in every call, which no state dict holds. Here the shortcut is then the output of the
block's first convolution, as in cloneofsimo/minDiffusion, from which the architecture descends, so that the network
is a function of its inputs.

Its forward pass is in the parts of :class:`stepfusion.networks.time_conditioned.TimeConditioned`.
"""

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from stepfusion import _checks
from stepfusion.errors import CheckpointError
from stepfusion.networks.contexts import context_vectors
from stepfusion.networks.inputs import check_batch, check_projections, check_timesteps
from stepfusion.networks.time_conditioned import TimeConditioned
from stepfusion.networks.unet2d.config import MAX_CHANNELS, MAX_SIZE

_GROUPS = 8
_RESIDUAL_SCALE = 1.414  # the course's sqrt(2)
_SIZES = ("in_channels", "features", "context_size", "sample_size", "num_timesteps")


class ContextUNet(TimeConditioned):
    """A UNet over small square images that predicts eps, conditioned on a timestep and a context vector.

    The context is a vector of `context_size` entries, all zero if there is none. Label ``k < context_size`` stands
    for the vector with a one at entry k, and label `context_size`, the null label, for no context.

    Args:
        in_channels: C, channels of x and of the output.
        features: F, channels at full size, a multiple of 8; twice as many below.
        context_size: entries of the context vector.
        sample_size: H, height and width, a multiple of 4.
        num_timesteps: T; the network sees timesteps as the fraction t / T. The course counts t from 1 to T, so a
            checkpoint of its wants a schedule of T + 1 betas, and timesteps from 1.

    Attributes:
        in_channels, features, context_size, sample_size, num_timesteps: as given.
        num_classes: `context_size` + 1, the number of labels.
        projection_size: 6F, the columns of the projections.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        in_channels: int = 3,
        features: int = 64,
        context_size: int = 5,
        sample_size: int = 16,
        num_timesteps: int = 500,
    ) -> None:
        super().__init__()
        self.in_channels = _checks.integer("in_channels", in_channels, 1, MAX_CHANNELS)
        self.features = width = _multiple("features", features, _GROUPS, MAX_CHANNELS)
        self.context_size = _checks.integer("context_size", context_size, 1, MAX_CHANNELS)
        self.sample_size = _multiple("sample_size", sample_size, 4, MAX_SIZE)
        self.num_timesteps = _checks.integer("num_timesteps", num_timesteps, 1, 1 << 31)
        self.num_classes = self.context_size + 1
        self.projection_size = 6 * width
        lowest = self.sample_size // 4

        self.init_conv = ConvBlock(self.in_channels, width, residual=True)
        self.down1 = Down(width, width)
        self.down2 = Down(width, 2 * width)
        self.to_vec = nn.Sequential(nn.AvgPool2d(lowest), nn.GELU())
        self.timeembed1 = TimeMLP(2 * width)
        self.timeembed2 = TimeMLP(width)
        self.contextembed1 = MLP(self.context_size, 2 * width)
        self.contextembed2 = MLP(self.context_size, width)
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(2 * width, 2 * width, kernel_size=lowest, stride=lowest),
            nn.GroupNorm(_GROUPS, 2 * width),
            nn.ReLU(),
        )
        self.up1 = Up(4 * width, width)
        self.up2 = Up(2 * width, width)
        self.out = nn.Sequential(
            nn.Conv2d(2 * width, width, kernel_size=3, padding=1),
            nn.GroupNorm(_GROUPS, width),
            nn.ReLU(),
            nn.Conv2d(width, self.in_channels, kernel_size=3, padding=1),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The network that `to_config` described; keys that start with ``_`` are notes and are skipped.

        Raises:
            CheckpointError: a key is missing or unknown, or its value does not fit.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        for key in (*given, *_SIZES):
            if key not in _SIZES or key not in given:
                problem = "lacks" if key in _SIZES else "has the unknown key"
                raise CheckpointError(f"the ContextUNet config {problem} {short(key)}; it has {', '.join(_SIZES)}")
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise CheckpointError(str(error)) from None

    def to_config(self) -> dict[str, Any]:
        """Return what `from_config` reads, JSON types only."""
        return {"_class_name": "ContextUNet", **{name: getattr(self, name) for name in _SIZES}}

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict eps.

        Args:
            x: [B, in_channels, sample_size, sample_size] in the weights' dtype, NCHW or channels_last.
            timesteps: int64, float32 or float64 [B].
            labels: int64 [B]; or contexts, mixed as one likes, [B, context_size] in the weights' dtype; or None for
                no context. Values are not checked here.

        Returns:
            The shape and dtype of x.

        Raises:
            ValueError: an argument's shape or dtype does not fit.
        """
        check_batch(x, timesteps)
        return super().forward(x, timesteps, labels)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] once for each upper level: [B, 3 * features] in the weights' dtype."""
        check_timesteps(timesteps)
        fraction = timesteps.to(torch.promote_types(self._dtype, torch.float32)) / self.num_timesteps
        return torch.cat((self.timeembed1(fraction), self.timeembed2(fraction)), dim=1)

    def condition(self, time_features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Put the context embeddings beside time_features [B, 3 * features]: [B, projection_size].

        The columns are, in order, the scales of the two upper levels (2F and F of them), which the context gives, and
        their shifts (2F and F), which the timestep gives. `labels` as in `forward`.
        """
        wanted = 3 * self.features
        if time_features.ndim != 2 or time_features.shape[1] != wanted or time_features.dtype != self._dtype:
            accepted = f"{_name(self._dtype)} [B, {wanted}]"
            raise ValueError(f"time_features is {_checks.describe(time_features)}; accepted is {accepted}")
        context = context_vectors(labels, time_features, self.context_size)
        return torch.cat((self.contextembed1(context), self.contextembed2(context), time_features), dim=1)

    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        """Run the part of `forward` that depends on `x`, with projections [B, projection_size] from `condition`."""
        self._check_image(x)
        check_projections(projections, x, self.projection_size)
        width = self.features
        scale1, scale2, shift1, shift2 = torch.split(projections[:, :, None, None], [2 * width, width] * 2, dim=1)
        full = self.init_conv(x)  # [B, F, H, H]
        half = self.down1(full)  # [B, F, H/2, H/2]
        quarter = self.down2(half)  # [B, 2F, H/4, H/4]
        up = self.up0(self.to_vec(quarter))  # [B, 2F, H/4, H/4]
        up = self.up1(torch.cat((torch.addcmul(shift1, scale1, up), quarter), dim=1))  # [B, F, H/2, H/2]
        up = self.up2(torch.cat((torch.addcmul(shift2, scale2, up), half), dim=1))  # [B, F, H, H]
        out: Tensor = self.out(torch.cat((up, full), dim=1))
        return out

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _check_image(self, x: Tensor) -> None:
        shape = [self.in_channels, self.sample_size, self.sample_size]
        if x.ndim != 4 or list(x.shape[1:]) != shape or x.dtype != self._dtype:
            accepted = f"{_name(self._dtype)} [B, {', '.join(map(str, shape))}]"
            raise ValueError(f"x is {_checks.describe(x)}; accepted is {accepted}")


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and GELU: [B, in_channels, H, W] -> [B, out_channels, H, W].

    With `residual`, a shortcut is added, x or, where x has other channels, the output of the first convolution, and
    the sum is divided by 1.414.
    """

    def __init__(self, in_channels: int, out_channels: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.keeps_channels = in_channels == out_channels
        self.conv1 = _convolution(in_channels, out_channels)
        self.conv2 = _convolution(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.conv1(x)
        second: Tensor = self.conv2(first)
        return ((x if self.keeps_channels else first) + second) / _RESIDUAL_SCALE if self.residual else second


class Stack(nn.Module):
    """Layers one after the other, under the name "model" that the state dicts have."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class Down(Stack):
    """Two blocks, then the maximum of every 2 x 2 square: [B, in_channels, H, W] -> [B, out_channels, H/2, W/2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        blocks = ConvBlock(in_channels, out_channels), ConvBlock(out_channels, out_channels)
        super().__init__(*blocks, nn.MaxPool2d(2))


class Up(Stack):
    """A transposed convolution, then two blocks: [B, in_channels, H, W] -> [B, out_channels, 2H, 2W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        blocks = ConvBlock(out_channels, out_channels), ConvBlock(out_channels, out_channels)
        super().__init__(nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2), *blocks)


class MLP(Stack):
    """Two linear layers with a GELU between them: [B, inputs] -> [B, width]."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


class TimeMLP(MLP):
    """An MLP of one input, the time: floating point [B] -> [B, width] in the weights' dtype.

    The first layer runs in the dtype of the time, since bfloat16 would give neighbouring timesteps one value.
    """

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, x: Tensor) -> Tensor:
        first, gelu, second = self.model
        line = cast(nn.Linear, first)
        hidden: Tensor = gelu(x[:, None] * line.weight[:, 0] + line.bias)
        out: Tensor = second(hidden.to(line.weight.dtype))
        return out


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.GELU())


def _multiple(name: str, value: int, factor: int, high: int) -> int:
    result = _checks.integer(name, value, factor, high)
    if result % factor:
        raise ValueError(f"{name} must be a multiple of {factor}, got {result}")
    return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
