"""An HTTP request, validated against the engine that serves it and the limits, before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stepfusion.engine import Engine
from stepfusion.samplers.registry import samplers_of
from stepfusion.samplers.table import StepTable
from stepfusion.serving.http.errors import InvalidRequest, shown
from stepfusion.serving.http.limits import Limits, check_limit, counted
from stepfusion.serving.http.requests import GenerateRequest, is_list

_PREVIEWS = 10  # of one image at most, if the request does not say how many


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that an engine can serve within the limits.

    ``seeds``, ``indices`` and ``labels`` have one entry an image; ``labels`` is None for a model without classes, and
    ``prompts`` and ``negatives`` are if there are none.
    """

    request: GenerateRequest
    table: StepTable
    seeds: list[int]
    indices: list[int]
    labels: list[int] | None
    prompts: list[str] | None = None
    negatives: list[str] | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def arguments(self) -> dict[str, Any]:
        """For :meth:`stepfusion.serving.AsyncEngine.submit`."""
        return {
            **self.request.image_options,
            "n": len(self),
            "table": self.table,
            "seed": self.seeds,
            "indices": self.indices,
            "labels": self.labels,
            "priority": self.request.priority,
            "deadline": self.request.deadline_s,
        }

    def name(self, image: int) -> str:
        """What an image's file is called."""
        return f"{self.seeds[image]}-{self.indices[image]}"


def validate(request: GenerateRequest, engine: Engine, limits: Limits) -> ValidatedRequest:
    """``request`` with everything that follows from it, before anything of its size is allocated.

    Raises:
        InvalidRequest: it is over a limit, or does not fit the engine. TypeError, ValueError: naming the argument.
    """
    if request.priority > limits.priority:
        raise InvalidRequest(f"priority must be at most {limits.priority} on this server, got {request.priority}")
    count = request.count
    check_limit("n", count, limits.images, "images")
    elements = max(math.prod(engine.shape), math.prod(engine.image_shape))
    sizes = " x ".join(map(str, engine.image_shape))
    check_limit("n", count * elements, limits.elements, "elements", f"{counted(count, 'image')} of {sizes}")
    table = _table(request, engine, limits)
    guided = any(scale not in (None, 1.0) for scale in _each("guidance", request.guidance, count))
    evaluations = count * len(table) * (2 if guided else 1)
    asked = f"{counted(count, 'image')} of {counted(len(table), 'step')}"
    asked += ", with guidance two evaluations a step," if guided else ""
    check_limit("n * steps", evaluations, limits.evaluations, "evaluations of the network", asked)
    return ValidatedRequest(
        request,
        table,
        _each("seed", request.seed, count),
        _each("indices", list(range(count)) if request.indices is None else request.indices, count),
        _labels(engine, request.labels, count),
        _texts(engine, "prompt", request.prompt, count),
        _texts(engine, "negative_prompt", request.negative_prompt, count),
    )


def preview_interval(request: ValidatedRequest, every: int | None, limits: Limits) -> int:
    """Steps between two previews of an image: ``every``, or by default so many that ten previews or fewer are made of
    an image, and fewer still if the limit would not hold otherwise.

    InvalidRequest if ``every`` would make more previews than the limit.
    """
    images, steps = len(request), len(request.table)
    if every is None:
        return math.ceil(steps / max(1, min(_PREVIEWS, limits.previews // images)))
    previews = images * math.ceil(steps / every)
    asked = f"{counted(images, 'image')} of {counted(steps, 'step')} with every = {shown(every)}"
    check_limit("n * steps / every", previews, limits.previews, "previews", asked)
    return min(every, steps)


def _table(request: GenerateRequest, engine: Engine, limits: Limits) -> StepTable:
    """The table that was asked for; steps that are given are limited before any table is made of them."""
    check_limit("steps", request.steps or 0, limits.steps, "steps")
    accepted = samplers_of(engine.schedule)
    if request.sampler not in (None, *accepted):
        raise InvalidRequest(f"sampler must be one of {', '.join(map(repr, accepted))}, got {shown(request.sampler)}")
    asked = request.table_request
    asked.check()
    table = asked.of(engine)
    check_limit("steps", len(table), limits.steps, "steps")
    return table


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each image."""
    if not is_list(value):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(f"{name} must be one value or one for each of the {count} images, got {len(value)}")
    return list(value)


def _texts(engine: Engine, name: str, value: Any, count: int) -> list[str] | None:
    """One text for each image; None if none was given."""
    if value is None:
        return None
    if not engine.runners.takes_prompts:
        raise InvalidRequest(f"{name} was given, and this model has no text encoder", param=name)
    texts: list[str] = _each(name, value, count)
    if any("\0" in text for text in texts):
        raise InvalidRequest(f"{name} must not have a NUL character", param=name)
    return texts


def _labels(engine: Engine, labels: Any, count: int) -> list[int] | None:
    if engine.num_classes is None:
        if labels is not None:
            raise InvalidRequest("labels were given, and this model takes none")
        return None
    return [_label(engine, label) for label in _each("labels", labels, count)]


def _label(engine: Engine, given: int | str | None) -> int:
    """The class that a request names, in upper or lower case, or numbers."""
    assert engine.num_classes is not None
    names = [name.lower() for name in engine.class_names or ()]
    if given is None and engine.null_label is not None:
        return engine.null_label
    if isinstance(given, int) and 0 <= given < engine.num_classes:
        return given
    if isinstance(given, str) and given.lower() in names:
        return names.index(given.lower())
    accepted = [f"numbers from 0 to {engine.num_classes - 1}"]
    accepted += [f"names such as {engine.class_names[0]!r} (GET /v1/model has them)"] if engine.class_names else []
    accepted += ["null"] if engine.null_label is not None else []
    raise InvalidRequest(f"labels must be among {'; '.join(accepted)}, got {shown(given)}")
