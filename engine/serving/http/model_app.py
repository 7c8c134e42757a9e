"""The HTTP application of a model, from what can be sent to another process: names and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette

from stepfusion.engine import Engine
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.validation import Limits


@dataclass(frozen=True)
class ModelApp:
    """A model to serve.

    ``engine`` are arguments of :meth:`stepfusion.Engine.from_pretrained`, ``queue`` is one of :class:`AsyncEngine`,
    and ``max_steps``, by default the model's timesteps, is one of ``limits``.
    """

    model: str
    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    queue: int = 1024
    limits: Limits = field(default_factory=Limits)
    max_steps: int | None = None

    def make(self) -> Starlette:
        """Load the model and make its application."""
        engine = Engine.from_pretrained(self.model, **self.engine)
        steps = engine.schedule.num_timesteps if self.max_steps is None else self.max_steps
        return make_app(
            AsyncEngine(engine, queue=self.queue), limits=replace(self.limits, steps=steps), name=self.name
        )
