"""What clients are told of the model and of the engine that serves it."""

from __future__ import annotations

from typing import Any

import stepfusion
from stepfusion.engine import Engine
from stepfusion.samplers.registry import SAMPLERS_WITH_ETA, default_sampler, samplers_of
from stepfusion.samplers.spacing import spacings_of
from stepfusion.samplers.timesteps import ALL_SPACINGS
from stepfusion.serving.async_engine import AsyncEngine
from stepfusion.serving.http.limits import Limits
from stepfusion.serving.http.messages import class_name


def model_metadata(engine: Engine, limits: Limits, name: str) -> dict[str, Any]:
    """What a client must know to make a sensible request; ``name`` is the model's, for people."""
    samplers = samplers_of(engine.schedule)
    return {
        "name": name,
        "version": stepfusion.__version__,
        "shape": list(engine.image_shape),
        "classes": _classes(engine),
        "null_label": engine.null_label,
        "prompts": engine.runners.takes_prompts,
        "guidance": engine.null_label is not None or engine.runners.takes_prompts,
        "samplers": list(samplers),
        "default_sampler": engine.options.get("sampler", default_sampler(engine.schedule)),
        "eta": {sampler: eta for sampler, eta in SAMPLERS_WITH_ETA.items() if sampler in samplers},
        "spacings": list(ALL_SPACINGS if engine.schedule.discrete else spacings_of(engine.schedule)),
        "path": engine.schedule.name,
        "timesteps": engine.schedule.max_steps,
        "prediction": engine.prediction,
        "invariant": engine.invariant,
        "device": str(engine.plan.device),
        "limits": vars(limits),
    }


def engine_status(service: AsyncEngine) -> dict[str, Any]:
    """The state of an engine, the images that wait, and its lanes, busy ones and all."""
    status = service.status
    return {"state": status.state, "waiting": status.waiting, "busy": status.busy, "lanes": status.lanes}


def _classes(engine: Engine) -> list[dict[str, Any]]:
    labels = [label for label in range(engine.num_classes or 0) if label != engine.null_label]
    return [{"label": label, "name": class_name(engine, label)} for label in labels]
