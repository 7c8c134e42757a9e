"""What EDM's two UNets have in common: the way down, the way up, and what the blocks take from time and class.

Their forward pass is in the parts of :class:`stepfusion.networks.time_conditioned.TimeConditioned`. The network is
F of Karras et al. 2022, equation 7, without the scales around it: a table has those.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from stepfusion.networks.edm.block import Block
from stepfusion.networks.edm.config import DhariwalUNetConfig, SongUNetConfig
from stepfusion.networks.inputs import check_batch, check_image, check_labels, check_projections
from stepfusion.networks.time_conditioned import TimeConditioned

Config = TypeVar("Config", SongUNetConfig, DhariwalUNetConfig)


class EDMUNet(TimeConditioned, Generic[Config]):
    """A UNet over images, conditioned on a noise level and, if the config says so, on a class.

    Label ``k < label_dim`` stands for class k, and label `label_dim`, the null label, for none.

    Args:
        config: what to build. Weights are initialised as PyTorch's layers do.

    Attributes:
        config: as given.
        in_channels, out_channels: from the config.
        sample_size: height and width, or a pair of them if they differ.
        num_classes: ``label_dim + 1``; None without labels.
        projection_size: P, the columns of the time projections.
        down_plans, up_plans: the blocks of each level, in the order in which they run.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: Config = config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.sample_size = config.img_resolution
        self.num_classes = config.label_dim + 1 if config.label_dim else None
        self.down_plans, self.up_plans = list(config.encoder()), list(config.decoder())
        self._first = f"{config.level_name(0)}_conv"
        self.enc = nn.ModuleDict()
        self.enc[self._first] = nn.Conv2d(config.in_channels, config.first_channels, kernel_size=3, padding=1)
        self.dec = nn.ModuleDict()
        self.projection_size = 0
        self._blocks: list[Block] = []

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate F.

        Args:
            x: [B, in_channels, H, W] in the weights' dtype, NCHW or channels_last; H and W multiples of
                ``2 ** (levels - 1)``.
            timesteps: c_noise, float32, float64 or int64 [B].
            class_labels: int64 [B] if the config has classes, else None. Values are not checked here.

        Returns:
            [B, out_channels, H, W] in the weights' dtype.

        Raises:
            ValueError: an argument's shape or dtype does not fit.
        """
        check_batch(x, timesteps)
        return super().forward(x, timesteps, class_labels)

    def condition(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Join what `embed_time` returned with the class, and project it for every block: [B, projection_size].

        ValueError if the network is conditioned on a class and none is given.
        """
        check_labels(class_labels, time, self.num_classes is not None)
        classes = None if class_labels is None else self._one_hot(class_labels, time.dtype)
        embedding = self.mapped(time, classes)
        return torch.cat([block.affine(embedding) for block in self._blocks], dim=1)

    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        """Run the part of `forward` that depends on `x`, with projections [B, projection_size] from `condition`."""
        check_image(x, self.in_channels, self.dtype, self.config.factor)
        check_projections(projections, x, self.projection_size)
        skips, beside = [self.enc[self._first](x)], x
        for level, plans in self.down_plans:
            for plan in plans:
                h = self.enc[plan.name](skips[-1], projections)
                if plan.resample is not None:
                    h, beside = self.joined(level, h, beside)
                skips.append(h)
        h, out = skips[-1], None
        for level, plans in self.up_plans:
            for plan in plans:
                h = self.dec[plan.name](h, projections, skips.pop() if plan.joins else None)
            out = self.emitted(level, h, out)
        assert out is not None  # level 0 is the last
        return out

    @abstractmethod
    def mapped(self, time: Tensor, classes: Tensor | None) -> Tensor:
        """The embedding [B, D] of what `embed_time` returned and of a class, one-hot [B, label_dim]."""

    def joined(self, level: int, h: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """The first features of a lower level, and what goes down beside the blocks: the image at first."""
        return h, beside

    @abstractmethod
    def emitted(self, level: int, h: Tensor, out: Tensor | None) -> Tensor | None:
        """The output as far as the features h of a level, and those below, tell it; it was `out` before."""

    def register_blocks(self) -> None:
        """Give each block its columns of the time projections; called once all blocks are there."""
        self._blocks = [module for module in self.modules() if isinstance(module, Block)]
        for block in self._blocks:
            block.time_start = self.projection_size
            self.projection_size += block.affine.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def _one_hot(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, label_dim]; zeros for the null label."""
        return (labels[:, None] == torch.arange(self.config.label_dim, device=labels.device)).to(dtype)
