"""The HTTP application of a model, from what can be sent to another process: names and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.applications import Starlette

from stepfusion.checkpoints.weights_digest import weights_digest
from stepfusion.engine import Engine
from stepfusion.options import ExecutionOptions
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.limits import Limits


@dataclass(frozen=True)
class ModelApp:
    """A model to serve.

    Attributes:
        model: a bundled name or a path, as :meth:`stepfusion.Engine.from_pretrained` takes it.
        name: of the model, for people.
        execution: where and how the model is run.
        queue: the most images that may wait for a lane.
        hang_after: seconds after which a tick that has not ended makes the engine dead; None for never.
        limits: of a request; their ``steps`` are replaced by ``max_steps``.
        max_steps: of one image; by default the model's timesteps.
        metadata: PNG files say where they come from.
        lora: LoRA files that are added to the model, each with its scale.
        host, allowed_hosts: as for :func:`stepfusion.serving.http.app.make_app`.
    """

    model: str
    name: str
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    queue: int = 1024
    hang_after: float | None = 300.0
    limits: Limits = field(default_factory=Limits)
    max_steps: int | None = None
    metadata: bool = True
    lora: tuple[tuple[str, float], ...] = ()
    host: str | None = None
    allowed_hosts: tuple[str, ...] | None = None

    def make(self) -> Starlette:
        """Load the model and make its application."""
        engine = Engine.from_pretrained(self.model, lora=self.lora or None, **vars(self.execution))
        steps = engine.schedule.max_steps if self.max_steps is None else self.max_steps
        return make_app(
            AsyncEngine(engine, queue=self.queue, hang_after=self.hang_after),
            limits=replace(self.limits, steps=steps),
            name=self.name,
            host=self.host,
            allowed_hosts=self.allowed_hosts,
            metadata=self.metadata,
            weights=weights_digest(self.model) if self.metadata else None,
            lora=",".join(f"{Path(file).name}:{scale:g}" for file, scale in self.lora) or None,
        )
