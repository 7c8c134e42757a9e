"""Training a small diffusion model: one network, one loss, a moving average, and a state that resumes exactly.

The objective is the mean squared error in eps (Ho et al. 2020, eq. 14), x0 or v (Salimans & Ho 2022, appendix D) of

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0.

Everything random in step k (which images, which timesteps, which noise, which labels are dropped) is a function of
(seed, k) alone: no generator state is stored, and a resumed run has the bits of an uninterrupted one.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepfusion import _checks
from stepfusion.diffusion.gaussian_diffusion import GaussianDiffusion
from stepfusion.files.atomic import atomic_write
from stepfusion.kernels.coefficients import PREDICTIONS
from stepfusion.networks import ContextUNet, UNet2D, UNet2DConfig
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.training.datasets import ImageDataset
from stepfusion.training.state import TrainState, latest_state, load_state, remove_leftovers, save_state

SCHEDULES: dict[str, tuple[str, Callable[[int], NoiseSchedule]]] = {
    "linear": ("linear", NoiseSchedule.linear),
    "cosine": ("squaredcos_cap_v2", NoiseSchedule.cosine),
    "course": ("linear", partial(NoiseSchedule.linear, scaled=False)),
}
NETWORKS = ("unet2d", "context")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# May differ between a run and its continuation; everything else must be equal.
_RESUMABLE = frozenset(
    {"steps", "microbatch", "learning_rate", "warmup_steps", "ema_decay", "precision", "save_every", "log_every"}
)
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
_METRICS = "metrics.jsonl"


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
        prediction: what the network returns: "epsilon", "sample" (x0) or "v_prediction".
        schedule: "cosine" (Nichol & Dhariwal 2021), "linear" (Ho et al. 2020), or "course": the same betas, from 1e-4
            to 0.02 whatever T is. The course on sprites counts t from 1 to 500 in 501 of them; here t = 0, whose
            beta it passes over, is a timestep too, so that its 1 .. 500 are ours with ``train_timesteps=501``.
        train_timesteps: T of the schedule.
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
    prediction: str = "v_prediction"
    schedule: str = "cosine"
    train_timesteps: int = 1000
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
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention_levels", tuple(sorted(set(self.attention_levels))))
        if not self.channels:
            raise ValueError("channels must have at least one entry, got none")
        for level, width in enumerate(self.channels):
            _checks.integer(f"channels[{level}]", width, 1, 2**14)
        for level in self.attention_levels:
            _checks.integer("attention_levels", level, 0, len(self.channels) - 1)
        _checks.choice("network", self.network, NETWORKS)
        _checks.choice("prediction", self.prediction, PREDICTIONS)
        _checks.choice("schedule", self.schedule, SCHEDULES)
        _checks.choice("precision", self.precision, PRECISIONS)
        if self.network == "context" and self.precision != "float32":
            raise ValueError(f"precision must be 'float32' for network 'context', got {self.precision!r}")
        _checks.number("learning_rate", self.learning_rate, 0, 1, open_low=True)
        _checks.number("weight_decay", self.weight_decay, 0, 1)
        _checks.number("grad_clip", self.grad_clip, 0, open_low=True)
        _checks.number("ema_decay", self.ema_decay, 0, 1)
        _checks.number("label_dropout", self.label_dropout, 0, 1)
        _checks.boolean("flip", self.flip)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Read what ``dataclasses.asdict`` wrote.

        Raises:
            TypeError, ValueError: an unknown field, or a wrong value.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"the training configuration has unknown fields {sorted(unknown)}")
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0: linear warm-up, then a cosine to zero at `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def ema_decay_at(self, step: int) -> float:
        """Decay of the moving average at step `step`, counted from 0."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def make_schedule(self) -> NoiseSchedule:
        """Return the noise schedule."""
        return SCHEDULES[self.schedule][1](self.train_timesteps)

    def scheduler_config(self) -> dict[str, Any]:
        """Return the diffusers scheduler config of a model trained this way."""
        beta_schedule = SCHEDULES[self.schedule][0]
        scale = 1.0 if self.schedule == "course" else 1000 / self.train_timesteps
        ends = {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.train_timesteps,
            "beta_schedule": beta_schedule,
            **(ends if beta_schedule == "linear" else {}),
            "prediction_type": self.prediction,
            "variance_type": "fixed_small",
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "timestep_spacing": "trailing",
        }

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


class Trainer:
    """A network in training: weights, their moving average, and the optimiser's state.

    Args:
        config: how to train.
        dataset: on what.
        device: where.
        workers: threads, each of which takes the next microbatch when it is free; on a busy machine that is faster
            than splitting every operation. Each computes with PyTorch's threads, of which there should be one then.

    Raises:
        ValueError: the batch is larger than the data set, the network does not fit the images, or it normalises
            by running statistics and there are several workers.
    """

    def __init__(
        self, config: TrainConfig, dataset: ImageDataset, device: str | torch.device = "cpu", workers: int = 1
    ) -> None:
        _checks.integer("workers", workers, 1, 1024)
        if config.batch_size > len(dataset):
            raise ValueError(
                f"batch_size must be at most the {len(dataset)} images of the data set, got {config.batch_size}"
            )
        self.config = config
        self.dataset = dataset
        self.device = torch.device(device)
        self.step = 0
        self.elapsed = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = config.make_network(dataset)
        if workers > 1 and any(True for _ in self.network.buffers()):
            raise ValueError(
                f"workers must be 1 for network {config.network!r}: its running statistics have an order"
            )
        self.network.to(self.device)
        self.ema = {name: value.clone() for name, value in _averaged(self.network).items()}
        self.optimizer = _make_optimizer(self.network, config)
        self._parameters = list(self.network.parameters())
        self._workers = ThreadPoolExecutor(workers) if workers > 1 else None
        self.diffusion = GaussianDiffusion(config.make_schedule(), prediction=config.prediction)

    @property
    def done(self) -> bool:
        """Whether all steps have been made."""
        return self.step >= self.config.steps

    def train_step(self) -> Tensor:
        """Make one step; returns its loss, float32 [], on the device."""
        batch = make_batch(self.config, self.dataset, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        loss, gradients = self.gradients(batch)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip)
        self.optimizer.step()
        weights = list(_averaged(self.network).values())
        torch._foreach_lerp_(list(self.ema.values()), weights, 1 - self.config.ema_decay_at(self.step))
        self.step += 1
        return loss

    def gradients(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss over `batch`, float32 [], and its gradient for every parameter."""
        parts = batch.split(self.config.microbatch)
        run = map if self._workers is None else self._workers.map
        loss, gradients = torch.zeros((), device=self.device), [torch.zeros_like(p) for p in self._parameters]
        for part, (part_loss, part_gradients) in zip(parts, run(self._part_gradients, parts), strict=True):
            loss += part_loss * (len(part) / len(batch))
            torch._foreach_add_(gradients, part_gradients, alpha=len(part) / len(batch))
        return loss, gradients

    def _part_gradients(self, part: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self.loss(part)
        return loss.detach(), torch.autograd.grad(loss, self._parameters)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the network's prediction for `batch`, float32 []."""
        x0, noise, t = batch.x0.to(self.device), batch.noise.to(self.device), batch.timesteps.to(self.device)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        return self.diffusion.training_losses(self._predict, x0, t, noise=noise, labels=labels).mean()

    def _predict(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        low = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, low, enabled=low != torch.float32, cache_enabled=False):
            out: Tensor = self.network(x_t, t, labels)
        return out

    def state(self) -> TrainState:
        """Return what is needed to go on, tensors by reference."""
        tensors = {f"weights.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.network.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}
        facts = {
            "step": self.step,
            "elapsed_s": self.elapsed,
            "config": asdict(self.config),
            "data": _fingerprint(self.dataset),
        }
        return TrainState(tensors, facts)

    def restore(self, state: TrainState) -> None:
        """Go on from `state`.

        Raises:
            ValueError: it was made with another configuration or other data, or is incomplete.
        """
        _check_same_run(self.config, state.facts, _fingerprint(self.dataset))
        step = _checks.integer("step of the saved state", state.facts.get("step"), 0, 2**31)
        for name, value in self.network.state_dict().items():
            value.copy_(_stored(state, f"weights.{name}", value))
        for name, value in self.ema.items():
            value.copy_(_stored(state, f"ema.{name}", value))
        for name, parameter in self.network.named_parameters():
            if step:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),
                    **{
                        key: torch.empty_like(parameter).copy_(_stored(state, f"{key}.{name}", parameter))
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }
        self.step = step
        self.elapsed = _checks.number("elapsed_s of the saved state", state.facts.get("elapsed_s"), 0)

    def ema_network(self) -> UNet2D | ContextUNet:
        """Return a copy of the network with the averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.network)
        network.load_state_dict({**network.state_dict(), **self.ema})
        return network.eval()


def _averaged(network: nn.Module) -> dict[str, Tensor]:
    """What is averaged: parameters, and running statistics where there are any."""
    return {name: value for name, value in network.state_dict().items() if value.is_floating_point()}


def _make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    decayed = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def _fingerprint(dataset: ImageDataset) -> dict[str, Any]:
    """Say of a data set what tells it from another: shape, sums of pixels and labels."""
    return {
        "shape": list(dataset.images.shape),
        "pixel_sum": int(dataset.images.sum(dtype=torch.int64)),
        "label_sum": None if dataset.labels is None else int((dataset.labels + 1).sum()),
    }


def _check_same_run(config: TrainConfig, facts: dict[str, Any], data: dict[str, Any]) -> None:
    saved = TrainConfig.from_dict(facts.get("config", {}))
    for field in fields(TrainConfig):
        before, now = getattr(saved, field.name), getattr(config, field.name)
        if field.name not in _RESUMABLE and before != now:
            raise ValueError(f"{field.name} is {now!r}, but the saved run has {before!r}; it cannot change on resume")
    if facts.get("data") != data:
        raise ValueError(f"the data set is {data}, but the saved run was trained on {facts.get('data')}")


def _stored(state: TrainState, key: str, like: Tensor) -> Tensor:
    value = state.tensors.get(key)
    if value is None or value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"the saved state has no {key} of shape {list(like.shape)} and dtype {like.dtype}")
    return value


def train(
    config: TrainConfig,
    dataset: ImageDataset,
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    workers: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Trainer:
    """Train, or go on from the newest state in `directory`, until ``config.steps`` or until `should_stop`.

    Writes ``metrics.jsonl`` and ``state-*/`` (the last two) in `directory`; the last step made is always saved.

    Args:
        config: how to train.
        dataset: on what.
        directory: of the run; made if it is not there.
        device: where to train.
        workers: threads (see `Trainer`).
        should_stop: asked after every step.
        report: called with each row of metrics: step, loss (mean since the row before), lr, images_per_s, elapsed_s.

    Returns:
        The trainer as it stands; ``trainer.done`` says whether it was finished.

    Raises:
        ValueError: `directory` has a state of another run, or `dataset` does not fit `config`.
        FloatingPointError: the loss is not finite.
    """
    directory = Path(directory)
    trainer = Trainer(config, dataset, device, workers)
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    newest = latest_state(directory)
    if newest is not None:
        trainer.restore(load_state(newest))
    _forget_metrics_after(directory / _METRICS, trainer.step)
    saved = trainer.step
    for row in _run(trainer, should_stop):
        if row:
            _append_row(directory / _METRICS, row)
            report(row)
        if trainer.step % config.save_every == 0:
            save_state(directory, trainer.state())
            saved = trainer.step
    if trainer.step != saved:
        save_state(directory, trainer.state())
    return trainer


def _run(trainer: Trainer, should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Make steps; yields after each a row of metrics, or an empty one between two rows.

    The loss is looked at when a row or a state is due, so that no state of a run that went astray is saved.
    """
    config, start, before = trainer.config, time.monotonic(), trainer.elapsed
    total, count, since = torch.zeros((), device=trainer.device), 0, start
    while not trainer.done and not should_stop():
        total += trainer.train_step()
        count += 1
        now = time.monotonic()
        trainer.elapsed = before + now - start
        logs = trainer.done or trainer.step % config.log_every == 0
        if not logs and trainer.step % config.save_every:
            yield {}
            continue
        loss = total.item() / count
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {trainer.step}; a lower learning_rate may help")
        if not logs:
            yield {}
            continue
        yield {
            "step": trainer.step,
            "loss": loss,
            "lr": config.learning_rate_at(trainer.step - 1),
            "images_per_s": round(count * config.batch_size / (now - since), 1),
            "elapsed_s": round(trainer.elapsed, 1),
        }
        total, count, since = torch.zeros_like(total), 0, time.monotonic()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a last line that was cut short by a crash is left out."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _forget_metrics_after(path: Path, step: int) -> None:
    """Drop the rows of steps that are about to be made again."""
    rows = read_metrics(path)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if len(kept) < len(rows):
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
