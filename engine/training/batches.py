"""The batch of each training step: everything random in it is a function of the seed and the step alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfusion.diffusion.step_draws import step_generator, strata
from stepfusion.kernels.launch import plain_torch
from stepfusion.training.config import TrainConfig
from stepfusion.training.datasets import ImageDataset


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes:
        x0, noise: float32 [B, C, H, W].
        levels: timesteps int64 [B], or sigma or t of a path whose levels are real numbers, float64 [B].
        labels: int64 [B] or None.
    """

    x0: Tensor
    noise: Tensor
    levels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return self.x0.shape[0]

    def split(self, size: int) -> list[Batch]:
        """Split into parts of `size` images, the last one possibly smaller."""

        def part(start: int) -> Batch:
            labels = None if self.labels is None else self.labels[start : start + size]
            x0, noise, levels = (t[start : start + size] for t in (self.x0, self.noise, self.levels))
            return Batch(x0, noise, levels, labels)

        return [part(start) for start in range(0, len(self), size)]


@plain_torch(gradients=True)
def make_batch(config: TrainConfig, dataset: ImageDataset, step: int) -> Batch:
    """Draw the batch of step `step`, a function of ``(config.seed, step)`` and the data set alone.

    Every epoch is a new permutation, whose last incomplete batch is left out. Levels are stratified: image i of B
    draws from the i-th of B equally likely parts, which lowers the variance of the loss (Kingma et al. 2021).
    """
    size = config.batch_size
    epoch, place = divmod(step, len(dataset) // size)
    order = torch.randperm(len(dataset), generator=step_generator(config.seed, "order", epoch))
    chosen = order[place * size : (place + 1) * size]
    random = step_generator(config.seed, "step", step)
    x0 = dataset.images[chosen].to(torch.float32) / 127.5 - 1
    levels = config.make_objective().levels(strata(size, random))
    noise = torch.randn(x0.shape, generator=random)
    labels = None
    if dataset.labels is not None:
        dropped = torch.rand(size, generator=random) < config.label_dropout
        labels = torch.where(dropped, dataset.num_classes, dataset.labels[chosen])
    if config.flip:
        mirrored = torch.rand(size, generator=random) < 0.5
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
    return Batch(x0, noise, levels, labels)
