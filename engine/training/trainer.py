"""Training a small diffusion model: one network, one loss, a moving average, and a state that resumes exactly.

What is learned, and by which loss, say :mod:`stepfusion.training.objectives`.

Everything random in step k (which images, which noise levels, which noise, which labels are dropped) is a function of
(seed, k) alone: no generator state is stored, and a resumed run has the bits of an uninterrupted one.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields

import torch
from torch import Tensor, nn

from stepfusion import _checks
from stepfusion.kernels.launch import plain_torch
from stepfusion.networks import ContextUNet, UNet2D
from stepfusion.training.batches import Batch, make_batch
from stepfusion.training.config import PRECISIONS, RESUMABLE, TrainConfig
from stepfusion.training.datasets import ImageDataset
from stepfusion.training.state import DataFingerprint, RunMetadata, TrainState


class Trainer:
    """A network in training: weights, their moving average, and the optimiser's state.

    Args:
        config: what to train and how.
        dataset: the images to train on.
        device: the device to train on.
        workers: threads, each of which takes the next microbatch when it is free; on a busy machine that is faster
            than splitting every operation. Each computes with PyTorch's threads, of which there should be one then.

    Raises:
        ValueError: the batch is larger than the data set, the network does not fit the images, or it normalises
            by running statistics and there are several workers.
    """

    @plain_torch(gradients=True)
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
        self.objective = config.make_objective()

    @property
    def done(self) -> bool:
        """Whether all steps have been made."""
        return self.step >= self.config.steps

    @plain_torch(gradients=True)
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

    @plain_torch(gradients=True)
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

    @plain_torch(gradients=True)
    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of the network's predictions for `batch`, float32 []."""
        x0, noise = batch.x0.to(self.device), batch.noise.to(self.device)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        return self.objective.losses(self._predict, x0, batch.levels, noise, labels).mean()

    def _predict(self, x: Tensor, told: Tensor, labels: Tensor | None = None) -> Tensor:
        low = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, low, enabled=low != torch.float32, cache_enabled=False):
            out: Tensor = self.network(x, told, labels)
        return out

    def state(self) -> TrainState:
        """Return what is needed to go on, tensors by reference."""
        tensors = {f"weights.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.network.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments}
        metadata = RunMetadata(
            step=self.step,
            elapsed_s=self.elapsed,
            config=asdict(self.config),
            data=fingerprint(self.dataset),
        )
        return TrainState(tensors, metadata)

    @plain_torch(gradients=True)
    def restore(self, state: TrainState) -> None:
        """Go on from `state`.

        Raises:
            ValueError: it was made with another configuration or other data, or is incomplete; nothing is changed.
        """
        _check_same_run(self.config, state.metadata, fingerprint(self.dataset))
        step = state.metadata.step
        parameters = dict(self.network.named_parameters())
        stored = [
            (value, _stored(state, f"weights.{name}", value)) for name, value in self.network.state_dict().items()
        ]
        stored += [(value, _stored(state, f"ema.{name}", value)) for name, value in self.ema.items()]
        moments = {
            parameter: {key: _stored(state, f"{key}.{name}", parameter) for key in ("exp_avg", "exp_avg_sq")}
            for name, parameter in (parameters.items() if step else ())
        }
        for value, tensor in stored:
            value.copy_(tensor)
        for parameter, tensors in moments.items():
            kept = {key: torch.empty_like(parameter).copy_(tensor) for key, tensor in tensors.items()}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **kept}
        self.step, self.elapsed = step, state.metadata.elapsed_s

    @plain_torch(gradients=True)
    def start_from(self, network: nn.Module) -> None:
        """Take the weights of `network` for the first step and for the moving average, whatever it predicts.

        Raises:
            ValueError: it is another network than the one in training; nothing is changed.
        """
        weights, own = network.state_dict(), self.network.state_dict()
        shapes = [{name: list(value.shape) for name, value in state.items()} for state in (weights, own)]
        for name in sorted(weights.keys() | own.keys()):
            given, needed = (of.get(name, "none") for of in shapes)
            if given != needed:
                raise ValueError(
                    f"the network to start from is not the one to train: {name} has shape {given}, not {needed}"
                )
        for name, value in own.items():
            value.copy_(weights[name])
        for name, value in _averaged(self.network).items():
            self.ema[name].copy_(value)

    @plain_torch(gradients=True)
    def ema_network(self) -> UNet2D | ContextUNet:
        """Return a copy of the network with the averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.network)
        network.load_state_dict({**network.state_dict(), **self.ema})
        return network.eval()


def _averaged(network: nn.Module) -> dict[str, Tensor]:
    """What is averaged: parameters, and running statistics if there are any."""
    return {name: value for name, value in network.state_dict().items() if value.is_floating_point()}


def _make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    decayed = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def fingerprint(dataset: ImageDataset) -> DataFingerprint:
    """Say of a data set what tells it from another."""
    return DataFingerprint(
        shape=list(dataset.images.shape),
        pixel_sum=int(dataset.images.sum(dtype=torch.int64)),
        label_sum=None if dataset.labels is None else int((dataset.labels + 1).sum()),
    )


def _check_same_run(config: TrainConfig, metadata: RunMetadata, data: DataFingerprint) -> None:
    saved = TrainConfig.from_dict(metadata.config)
    for field in fields(TrainConfig):
        before, now = getattr(saved, field.name), getattr(config, field.name)
        if field.name not in RESUMABLE and before != now:
            raise ValueError(f"{field.name} is {now!r}, but the saved run has {before!r}; it cannot change on resume")
    if metadata.data != data:
        given, trained = data.model_dump(), metadata.data.model_dump()
        raise ValueError(f"the data set is {given}, but the saved run was trained on {trained}")


def _stored(state: TrainState, key: str, like: Tensor) -> Tensor:
    value = state.tensors.get(key)
    if value is None or value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"the saved state has no {key} of shape {list(like.shape)} and dtype {like.dtype}")
    return value
