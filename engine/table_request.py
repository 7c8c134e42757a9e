"""How commands, bulk jobs and HTTP ask for a sampler's table: in values that can be sent to another process."""

from __future__ import annotations

from dataclasses import dataclass

from stepfusion.engine import SAMPLERS, SAMPLERS_WITH_ETA, Engine
from stepfusion.table import StepTable

#: What can be asked for by name: every sampler that starts from noise.
OFFERED = tuple(name for name in SAMPLERS if name != "ddim_inversion")


@dataclass(frozen=True)
class TableRequest:
    """A sampler with its steps and eta, as :meth:`stepfusion.Engine.table` takes them; None is its default."""

    sampler: str = "ddim"
    steps: int | None = None
    eta: float | None = None

    def check(self, mark: str = "") -> None:
        """ValueError where an option is not one of the sampler's; ``mark`` stands before names, "--" in a command."""
        if self.eta is not None and self.sampler not in SAMPLERS_WITH_ETA:
            accepted = " and ".join(SAMPLERS_WITH_ETA)
            raise ValueError(f"{mark}eta is an option of {mark}sampler {accepted}, got {mark}sampler {self.sampler}")

    def of(self, engine: Engine) -> StepTable:
        """The table of this engine's schedule."""
        return engine.table(self.sampler, self.steps, **({} if self.eta is None else {"eta": self.eta}))
