"""The batch of each training step: everything random in it is a function of the seed and the step alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfusion.kernels.launch import plain_torch
from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset


@dataclass(frozen=True)
class Batch:
    """What one step trains on: x0 and noise float32 [B, C, H, W], timesteps int64 [B], labels int64 [B] or None."""

    x0: Tensor
    noise: Tensor
    timesteps: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return self.x0.shape[0]

    def split(self, size: int) -> list[Batch]:
        """Split into parts of `size` images, the last one possibly smaller."""

        def part(start: int) -> Batch:
            labels = None if self.labels is None else self.labels[start : start + size]
            x0, noise, timesteps = (t[start : start + size] for t in (self.x0, self.noise, self.timesteps))
            return Batch(x0, noise, timesteps, labels)

        return [part(start) for start in range(0, len(self), size)]


@plain_torch(gradients=True)
def make_batch(config: TrainConfig, dataset: ImageDataset, step: int) -> Batch:
    """Draw the batch of step `step`, a function of ``(config.seed, step)`` and the data set alone.

    Every epoch is a new permutation, whose last incomplete batch is left out. Timesteps are stratified: image i of B
    draws from the i-th of B equal parts of [0, T), which lowers the variance of the loss (Kingma et al. 2021).
    """
    size = config.batch_size
    epoch, place = divmod(step, len(dataset) // size)
    order = torch.randperm(len(dataset), generator=_generator(config.seed, "order", epoch))
    chosen = order[place * size : (place + 1) * size]
    random = _generator(config.seed, "step", step)
    x0 = dataset.images[chosen].to(torch.float32) / 127.5 - 1
    strata = (torch.arange(size) + torch.rand(size, generator=random, dtype=torch.float64)) / size
    timesteps = (strata * config.train_timesteps).long().clamp_(max=config.train_timesteps - 1)
    noise = torch.randn(x0.shape, generator=random)
    labels = None
    if dataset.labels is not None:
        dropped = torch.rand(size, generator=random) < config.label_dropout
        labels = torch.where(dropped, dataset.num_classes, dataset.labels[chosen])
    if config.flip:
        mirrored = torch.rand(size, generator=random) < 0.5
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
    return Batch(x0, noise, timesteps, labels)


def _generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator for one purpose and index; PyTorch's CPU generator looks at 32 bits, so indices never collide."""
    mixed = seed * 0x9E3779B97F4A7C15 + int.from_bytes(purpose.encode(), "little") * 0xC2B2AE3D27D4EB4F
    mixed = ((mixed & (2**64 - 1)) >> 32) * 0x85EBCA6B + (mixed & 0xFFFFFFFF)
    return torch.Generator().manual_seed((mixed + index) & 0xFFFFFFFF)
