"""How commands, bulk jobs and HTTP ask for a sampler's table: in values that can be sent to another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepfusion.engine import SAMPLERS, SAMPLERS_WITH_ETA, Engine
from stepfusion.samplers.table import StepTable

#: What can be asked for by name: every sampler that starts from noise.
OFFERED = tuple(name for name in SAMPLERS if name != "ddim_inversion")


@dataclass(frozen=True)
class TableRequest:
    """A sampler and its options, as :meth:`stepfusion.Engine.table` takes them; None is its default.

    ``timesteps`` stands in place of ``steps`` and ``spacing``.
    """

    sampler: str = "ddim"
    steps: int | None = None
    eta: float | None = None
    spacing: str | None = None
    timesteps: str | Sequence[int] | None = None

    def check(self, mark: str = "") -> None:
        """ValueError where options contradict each other, or one is not the sampler's.

        ``mark`` stands before every name, "--" in a command.
        """
        if self.eta is not None and self.sampler not in SAMPLERS_WITH_ETA:
            accepted = " and ".join(SAMPLERS_WITH_ETA)
            raise ValueError(f"{mark}eta is an option of {mark}sampler {accepted}, got {mark}sampler {self.sampler}")
        for name in ("steps", "spacing"):
            if self.timesteps is not None and getattr(self, name) is not None:
                raise ValueError(f"{mark}{name} and {mark}timesteps exclude each other, got both")

    def of(self, engine: Engine) -> StepTable:
        """The table of this engine's schedule."""
        names = ("eta", "spacing", "timesteps")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        return engine.table(self.sampler, self.steps, **options)
