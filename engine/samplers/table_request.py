"""A request for a sampler's table, in values that can be sent to another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stepfusion.samplers.registry import SAMPLERS_WITH_ETA
from stepfusion.samplers.table import StepTable


class MakesTables(Protocol):
    """A model that makes its samplers' tables: a :class:`stepfusion.model_spec.ModelSpec` or an engine."""

    def table(self, sampler: str | None = ..., steps: int | None = ..., **options: Any) -> StepTable:
        """:func:`stepfusion.samplers.registry.make_table` for this model's schedule and prediction type."""
        ...


@dataclass(frozen=True)
class TableRequest:
    """A sampler and its options, as :func:`stepfusion.samplers.registry.make_table` takes them; None is the default.

    Without a sampler the model's path says which. ``timesteps`` stands in place of ``steps`` and ``spacing``.
    ``reuse`` is :meth:`stepfusion.StepTable.reusing`'s.
    """

    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    spacing: str | None = None
    timesteps: str | Sequence[int] | None = None
    reuse: int | None = None

    def check(self, mark: str = "") -> None:
        """ValueError if options contradict each other, or one is not the sampler's.

        ``mark`` stands before every name, "--" in a command.
        """
        if self.eta is not None and self.sampler not in (None, *SAMPLERS_WITH_ETA):
            accepted = " and ".join([", ".join([*SAMPLERS_WITH_ETA][:-1]), [*SAMPLERS_WITH_ETA][-1]])
            raise ValueError(f"{mark}eta is an option of {mark}sampler {accepted}, got {mark}sampler {self.sampler}")
        if self.reuse is not None and self.reuse < 1:
            raise ValueError(f"{mark}reuse must be at least 1, got {self.reuse}")
        for name in ("steps", "spacing"):
            if self.timesteps is not None and getattr(self, name) is not None:
                raise ValueError(f"{mark}{name} and {mark}timesteps exclude each other, got both")

    def of(self, model: MakesTables) -> StepTable:
        """The table for this model's schedule."""
        names = ("eta", "spacing", "timesteps")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        table = model.table(self.sampler, self.steps, **options)
        return table if self.reuse is None else table.reusing(self.reuse)
