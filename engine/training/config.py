"""What a small diffusion model is and how it is trained: one configuration, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from stepfusion import _checks
from stepfusion.diffusion.path_losses import TIMES, checked_log_normal
from stepfusion.networks import ContextUNet, UNet2D, UNet2DConfig
from stepfusion.samplers.path import Path
from stepfusion.training.datasets import ImageDataset
from stepfusion.training.objectives import SCHEDULES, DiscreteObjective, EDMObjective, FlowObjective, Objective

AUTO = "auto"
NETWORKS = ("unet2d", "context")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# May differ between a run and its continuation; everything else must be equal.
RESUMABLE = frozenset(
    {"steps", "microbatch", "learning_rate", "warmup_steps", "ema_decay", "precision", "save_every", "log_every"}
)
# Options of one schedule alone; states that were saved before there were any lack these fields.
_OF_SCHEDULE = {
    "sigma_data": "edm",
    "p_mean": "edm",
    "p_std": "edm",
    "times": "flow",
    "logit_mean": "flow",
    "logit_std": "flow",
}
_POSITIVE = (
    "steps",
    "batch_size",
    "microbatch",
    "features",
    "layers_per_block",
    "head_dim",
    "norm_groups",
    "save_every",
    "log_every",
)


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how.

    Attributes:
        steps: optimiser steps in all; the learning rate reaches its end there.
        batch_size: images a step, at most as many as the data set has.
        microbatch: images that go through the network together; their gradients are summed in a fixed order, so the
            result depends on this number (by rounding) and on no count of workers.
        network: "unet2d" (`UNet2D`) or "context" (`ContextUNet`, whose contexts are the classes; it has no use for
            the next five fields).
        features: of the context UNet.
        channels: of each level of the UNet; each level halves height and width.
        layers_per_block: residual blocks a level (one more on the way up).
        attention_levels: levels that attend, counted from 0; the lowest part of the network always attends.
        head_dim: channels of one attention head.
        norm_groups: groups of every GroupNorm; divides every entry of `channels`.
        prediction: what the network returns: "epsilon", "sample" (x0) or "v_prediction"; "edm" with schedule "edm",
            "flow" with schedule "flow". "auto" becomes "v_prediction", "edm" or "flow", as the schedule says.
        schedule: "cosine" (Nichol & Dhariwal 2021), "linear" (Ho et al. 2020), or "course": the same betas, from 1e-4
            to 0.02 whatever T is. The course on sprites counts t from 1 to 500 in 501 of them; here t = 0, whose
            beta it passes over, is a timestep too, so that its 1 .. 500 are ours with ``train_timesteps=501``.
            "edm" (Karras et al. 2022; :func:`stepfusion.diffusion.path_losses.edm_loss`) or "flow" (Lipman et al.
            2023; :func:`stepfusion.diffusion.path_losses.flow_loss`), for the network "unet2d".
        train_timesteps: T of the schedule; "edm" and "flow" have none.
        sigma_data: with "edm", the standard deviation of the images in [-1, 1]. The published 0.5 is that of
            photographs; it is not measured, so that a configuration means the same whatever is trained on.
        p_mean, p_std: with "edm", of the logarithm of the noise levels that are trained on.
        times: with "flow", how t is drawn: "uniform" in [0, 1), or "logit-normal" (Esser et al. 2024), for which
            log(t / (1 - t)) is N(logit_mean, logit_std^2).
        logit_mean, logit_std: of that.
        learning_rate: the highest one, after `warmup_steps` of linear warm-up; then a cosine down to zero.
        weight_decay: of AdamW, on weights of two and more dimensions.
        grad_clip: largest norm of the gradient.
        ema_decay: of the moving average that is exported; it warms up as ``min(ema_decay, (1 + k) / (10 + k))``.
        label_dropout: probability that a label is replaced by the null label (Ho & Salimans 2022).
        flip: mirror half of the images.
        seed: of weights, data order, timesteps, noise and label dropout.
        precision: of the network's arithmetic, float32 for the context UNet; weights, moments, loss and moving
            average are always float32.
        save_every: steps between two saved states.
        log_every: steps between two lines of metrics.

    Raises:
        TypeError, ValueError: a field has a wrong type or value; the sentence names the field.
    """

    steps: int = 20_000
    batch_size: int = 64
    microbatch: int = 16
    network: str = "unet2d"
    features: int = 64
    channels: tuple[int, ...] = (32, 48, 96)
    layers_per_block: int = 1
    attention_levels: tuple[int, ...] = ()
    head_dim: int = 32
    norm_groups: int = 8
    prediction: str = AUTO
    schedule: str = "cosine"
    train_timesteps: int = 1000
    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2
    times: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    flip: bool = False
    seed: int = 0
    precision: str = "bfloat16"
    save_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _checks.integer(name, getattr(self, name), 1, 2**31)
        _checks.integer("train_timesteps", self.train_timesteps, 2, 1 << 20)
        _checks.integer("warmup_steps", self.warmup_steps, 0, 2**31)
        _checks.integer("seed", self.seed, 0, 2**63 - 1)
        self._check_levels()
        _checks.choice("network", self.network, NETWORKS)
        self._check_path()
        _checks.choice("precision", self.precision, PRECISIONS)
        if self.network == "context" and self.precision != "float32":
            raise ValueError(f"precision must be 'float32' for network 'context', got {self.precision!r}")
        _checks.number("learning_rate", self.learning_rate, 0, 1, open_low=True)
        _checks.number("weight_decay", self.weight_decay, 0, 1)
        _checks.number("grad_clip", self.grad_clip, 0, open_low=True)
        _checks.number("ema_decay", self.ema_decay, 0, 1)
        _checks.number("label_dropout", self.label_dropout, 0, 1)
        _checks.boolean("flip", self.flip)

    def _check_path(self) -> None:
        schedule = _checks.choice("schedule", self.schedule, SCHEDULES)
        accepted = SCHEDULES[schedule]
        if self.prediction == AUTO:
            object.__setattr__(self, "prediction", "v_prediction" if "v_prediction" in accepted else accepted[0])
        if self.prediction not in accepted:
            words = ", ".join(map(repr, (*accepted, AUTO)))
            raise ValueError(f"prediction must be one of {words} with schedule {schedule!r}, got {self.prediction!r}")
        _checks.number("sigma_data", self.sigma_data, 0, open_low=True)
        _checks.choice("times", self.times, TIMES)
        checked_log_normal(self.p_mean, self.p_std)
        _checks.number("logit_mean", self.logit_mean)
        _checks.number("logit_std", self.logit_std, 0)
        self._check_unread()

    def _check_unread(self) -> None:
        """Refuse what was set and would not be heeded."""
        set_by_hand = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        for name, schedule in _OF_SCHEDULE.items():
            if name in set_by_hand and self.schedule != schedule:
                raise ValueError(f"{name} is an option of schedule {schedule!r}, and schedule is {self.schedule!r}")
        if self.times == "uniform" and (unread := set_by_hand & {"logit_mean", "logit_std"}):
            raise ValueError(f"{min(unread)} is an option of times 'logit-normal', and times is 'uniform'")
        if self.schedule not in _OF_SCHEDULE.values():
            return
        for name in ("network", "train_timesteps"):
            if name in set_by_hand:
                accepted, given = TrainConfig.__dataclass_fields__[name].default, getattr(self, name)
                raise ValueError(f"{name} must be {accepted!r} with schedule {self.schedule!r}, got {given!r}")

    def _check_levels(self) -> None:
        for name in ("channels", "attention_levels"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"{name} must be a sequence of integers, got {value!r}")
        if not self.channels:
            raise ValueError("channels must have at least one entry, got none")
        channels = [
            _checks.integer(f"channels[{level}]", width, 1, 2**14) for level, width in enumerate(self.channels)
        ]
        highest = len(channels) - 1
        attends = {_checks.integer("attention_levels", level, 0, highest) for level in self.attention_levels}
        object.__setattr__(self, "channels", tuple(channels))
        object.__setattr__(self, "attention_levels", tuple(sorted(attends)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Read what ``dataclasses.asdict`` wrote, the options of "edm" and "flow" left out or not.

        Raises:
            TypeError, ValueError: an unknown field, a missing one, or a wrong value.
        """
        names = {field.name for field in fields(cls)}
        missing = names - set(values) - _OF_SCHEDULE.keys()
        for what, wrong in (("unknown", set(values) - names), ("missing", missing)):
            if wrong:
                raise ValueError(f"the training configuration has {what} fields {sorted(wrong)}")
        return cls(**values)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0: linear warm-up, then a cosine to zero at `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def ema_decay_at(self, step: int) -> float:
        """Decay of the moving average at step `step`, counted from 0."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def make_objective(self) -> Objective:
        """Return what the network learns: the path, the levels that are drawn, and the loss."""
        if self.schedule == "edm":
            return EDMObjective(self.sigma_data, self.p_mean, self.p_std)
        if self.schedule == "flow":
            return FlowObjective(self.times, self.logit_mean, self.logit_std)
        return DiscreteObjective(self.schedule, self.train_timesteps, self.prediction)

    def make_schedule(self) -> Path:
        """Return the noise schedule, or the other path that the network is trained along."""
        return self.make_objective().path

    def scheduler_config(self) -> dict[str, Any]:
        """Return the diffusers scheduler config of a model trained this way."""
        return self.make_objective().scheduler_config()

    def make_network(self, dataset: ImageDataset) -> UNet2D | ContextUNet:
        """Return the network for these images, with PyTorch's random weights.

        Raises:
            ValueError: the network cannot be made for images of this size, or needs labels.
        """
        if self.network == "unet2d":
            return UNet2D(self.network_config(dataset))
        channels, height, width = dataset.images.shape[1:]
        if dataset.labels is None or height != width:
            given = f"{height}x{width} images {'without' if dataset.labels is None else 'with'} labels"
            raise ValueError(f"network 'context' needs square images with labels, got {given}")
        return ContextUNet(channels, self.features, dataset.num_classes, height, self.train_timesteps - 1)

    def network_config(self, dataset: ImageDataset) -> UNet2DConfig:
        """Return the UNet for these images; with labels, its class embedding has one more entry, the null label.

        Raises:
            ValueError: the channels do not fit the norm groups, or the image size the number of levels.
        """
        channels, height, width = dataset.images.shape[1:]
        attends = [level in self.attention_levels for level in range(len(self.channels))]
        return UNet2DConfig(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=self.channels,
            layers_per_block=self.layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            attention_head_dim=self.head_dim,
            norm_num_groups=self.norm_groups,
            num_class_embeds=dataset.num_classes + 1 if dataset.labels is not None else None,
        )
