"""What runs a network and a whole sampling loop, and the work that it is given.

A provider is one class: its name, what it needs, and :meth:`Provider.build`. All get the same weights, start, labels
and timesteps, and return float32 tensors that are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stepfusion.bench.models import BenchModel
from stepfusion.bench.optional import why_not

_OPSET = 20  # the first with a native GroupNormalization in the runtimes measured


@dataclass(frozen=True)
class Case:
    """The work that all providers share.

    Attributes:
        model, device, batch: what runs where. steps: of the loop. sampler: "ddim" (eta 0) or "ddpm".
        evaluations: how many are timed together, so that the host time of a call weighs less on a GPU.
    """

    model: BenchModel
    device: torch.device
    batch: int
    steps: int
    sampler: str = "ddim"
    evaluations: int = 1
    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory, repr=False)

    @cached_property
    def start(self) -> torch.Tensor:
        """The noise that every loop starts from, float32 [B, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, *self.model.image_shape, generator=generator).to(self.device)

    @cached_property
    def noise(self) -> torch.Tensor | None:
        """The z of every step of a stochastic loop, [steps, B, C, H, W], for the comparison; None for DDIM."""
        if self.sampler == "ddim":
            return None
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.steps, self.batch, *self.model.image_shape, generator=generator).to(self.device)

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """One label an image on the device, int64 [B], or None."""
        labels = self.model.labels(self.batch)
        return None if labels is None else labels.to(self.device)

    @property
    def timestep(self) -> int:
        """Of the evaluation that is measured: the middle of the schedule."""
        return self.model.schedule.num_timesteps // 2

    @cached_property
    def onnx(self) -> Path:
        """diffusers' network as an ONNX file of this case's shapes: inputs x and t, and labels if there are any."""
        network = TensorOutput(self.model.diffusers_network()).eval()
        path = Path(self.folder.name) / "network.onnx"
        timesteps = torch.full((self.batch,), self.timestep)
        inputs: tuple[torch.Tensor, ...] = (self.start.cpu(), timesteps)
        if self.labels is not None:
            inputs = (*inputs, self.labels.cpu())
        names = ["x", "t", "labels"][: len(inputs)]
        torch.onnx.export(
            network,
            inputs,
            path,
            dynamo=True,
            opset_version=_OPSET,
            input_names=names,
            external_data=False,
            verbose=False,
        )
        return path


@dataclass(frozen=True)
class Built:
    """What can be run.

    ``evaluate(count)``: so many evaluations of the network, the first on the start; the last output, float32
    [B, C, H, W]. Only that of one evaluation can be compared: what the next ones are given differs.
    ``loop(noise)``: from the start to the last state, float32 [B, C, H, W] on the device; without noise, a stochastic
    sampler draws its own. ``finish()``: the loop, and the finished images on the host.
    """

    evaluate: Callable[[int], torch.Tensor]
    loop: Callable[[torch.Tensor | None], torch.Tensor]
    finish: Callable[[], object]


class Provider(ABC):
    """Somebody who can run a case. ``family`` is what ``--peer`` selects; ``dtype`` the network's; ``compiles``: it
    takes many seconds to prepare.
    """

    family: str
    name: str
    dtype: str
    compiles = False
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")

    def why_not(self, case: Case) -> str | None:
        """The reason why this provider cannot run the case here; None if it can."""
        if case.device.type not in self.devices:
            return f"not for device type '{case.device.type}'"
        return why_not(*self.packages)

    @abstractmethod
    def build(self, case: Case) -> Built:
        """Prepare everything that is not part of a call. :class:`Unavailable` if this cannot run here."""


class Unavailable(RuntimeError):
    """This provider cannot run here; the message says what is missing."""


class TensorOutput(torch.nn.Module):
    """A diffusers network that returns a tensor, for exporters and compilers."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.unet(x, t, class_labels=labels).sample
        return out
