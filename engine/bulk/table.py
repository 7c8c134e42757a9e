"""How a sampler's table is asked for, in values that can be sent to another process."""

from __future__ import annotations

from dataclasses import dataclass

from stepfusion.engine import Engine
from stepfusion.table import StepTable


@dataclass(frozen=True)
class TableRequest:
    """A sampler with its steps and eta, as :meth:`stepfusion.Engine.table` takes them; None is its default."""

    sampler: str = "ddim"
    steps: int | None = None
    eta: float | None = None

    def of(self, engine: Engine) -> StepTable:
        """The table of this engine's schedule."""
        return engine.table(self.sampler, self.steps, **({} if self.eta is None else {"eta": self.eta}))
