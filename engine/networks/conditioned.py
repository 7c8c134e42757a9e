"""Networks whose images have conditions: named tensors, beside a timestep and perhaps a label.

::

    prepared    = prepare({name: condition})                [B, ...] each  what depends on the conditions alone
    time        = embed_time(timesteps)                     [B, K]         what depends on the timestep alone
    projections = condition(time, class_labels, *prepared)  [B, P]         with labels and conditions, if it uses any
    out         = predict(x, projections, *prepared)        [B, C, H, W]   what depends on x

A condition does not change while its image is sampled, so that a sampler prepares it once, when the image enters its
lane: keys and values of cross-attention, embeddings of sizes and pooled texts, what is concatenated to x.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfusion import _checks
from stepfusion.networks.time_conditioned import TimeConditioned


@dataclass(frozen=True)
class ConditionSpec:
    """One condition that a network takes: a tensor of one shape for each image.

    Attributes:
        name: the keyword argument of the network, e.g. ``encoder_hidden_states``.
        shape: of one image's, e.g. (77, 768).
        integer: int64 if True; else floating point, in whatever dtype, which the network's replaces.

    Raises:
        TypeError, ValueError: naming the field.
    """

    name: str
    shape: tuple[int, ...]
    integer: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"name of a condition must be a keyword argument of the network, got {self.name!r}")
        sizes = tuple(_checks.integer(f"shape of {self.name}", size, 1, 1 << 31) for size in self.shape)
        object.__setattr__(self, "shape", sizes)
        _checks.boolean("integer", self.integer)

    def check(self, value: object, batch: int | None = None) -> Tensor:
        """The value, if it is a condition of one image, or of ``batch`` images.

        Raises:
            TypeError, ValueError: naming the condition.
        """
        wanted = list(self.shape) if batch is None else [batch, *self.shape]
        accepted = f"{'int64' if self.integer else 'floating point'} {wanted}"
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.name} is {type(value).__name__}; accepted is a tensor, {accepted}")
        kind = value.dtype == torch.int64 if self.integer else value.is_floating_point()
        if not kind or list(value.shape) != wanted:
            raise ValueError(f"{self.name} is {_checks.describe(value)}; accepted is {accepted}")
        if value.is_meta:
            raise ValueError(f"{self.name} must hold values, got a tensor on the meta device")
        return value


class ConditionedNetwork(TimeConditioned):
    """A network with conditions, in four parts; ``forward`` is their composition.

    Attributes:
        projects_conditions: `condition` uses what `prepare` returned, so that projections are a lane's own; False if
            they follow from the timestep (and the label) alone.
    """

    projects_conditions = False

    @property
    @abstractmethod
    def conditions(self) -> tuple[ConditionSpec, ...]:
        """What the network is conditioned on."""

    @abstractmethod
    def prepare(self, conditions: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What depends on the conditions [B, ...] alone, all of `conditions` by name: tensors [B, ...]."""

    @abstractmethod
    def condition(self, time: Tensor, class_labels: Tensor | None = None, *prepared: Tensor) -> Tensor:
        """Join what `embed_time` returned with labels and prepared conditions: [B, P]."""

    @abstractmethod
    def predict(self, x: Tensor, projections: Tensor, *prepared: Tensor) -> Tensor:
        """Run what depends on `x`: [B, C', H, W]."""

    def forward(
        self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None, **conditions: Tensor
    ) -> Tensor:
        """Map x [B, C, H, W], timesteps [B], labels, if the network takes any, and every condition [B, ...] by name.

        Returns:
            [B, C', H, W].

        Raises:
            TypeError, ValueError: a condition is missing, unknown, or of another shape or dtype.
        """
        prepared = self.prepare(self.checked(conditions, x.shape[0]))
        projections = self.condition(self.embed_time(timesteps), class_labels, *prepared)
        return self.predict(x, projections, *prepared)

    def checked(self, conditions: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """The conditions [batch, ...] by name, in the network's dtype; TypeError or ValueError naming one."""
        specs = {spec.name: spec for spec in self.conditions}
        for name in (*conditions, *specs):
            if name not in specs or name not in conditions:
                problem = "needs the condition" if name in specs else "takes no condition"
                raise TypeError(f"this network {problem} {name!r}; it has {', '.join(specs) or 'none'}")
        dtype = next(self.parameters()).dtype
        given = {name: spec.check(conditions[name], batch) for name, spec in specs.items()}
        return {name: value if specs[name].integer else value.to(dtype) for name, value in given.items()}
