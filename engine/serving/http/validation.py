"""What an HTTP request may ask for: its JSON, its limits, and one sentence where it is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from stepfusion.engine import Engine
from stepfusion.samplers.table import StepTable
from stepfusion.samplers.table_request import OFFERED, TableRequest
from stepfusion.samplers.timesteps import ALL_SPACINGS

_MAX_SEED = (1 << 64) - 1
_MAX_INDEX = (1 << 32) - 1
_PREVIEWS = 10  # of one image, where nothing else is asked for
_MAX_SHOWN = 60  # characters of a value in a message

_Seed = Annotated[int, Field(ge=0, le=_MAX_SEED)]
_Index = Annotated[int, Field(ge=0, le=_MAX_INDEX)]
_Label = int | str | None


class Refused(ValueError):
    """A request that is wrong; the message says how, in one sentence."""


@dataclass(frozen=True)
class Limits:
    """The most that one HTTP request may ask for.

    ``images``; ``steps`` of one image; ``evaluations`` of the network, a guided image taking two a step; ``elements``
    of all images together, n * C * H * W; ``body`` bytes of its JSON, which arrive within ``body_seconds``.
    """

    images: int = 64
    steps: int = 1000
    evaluations: int = 16_000
    elements: int = 1 << 24
    body: int = 1 << 16
    body_seconds: float = 10.0


class Ask(BaseModel):
    """Images to make. Everything has a default; an image is a function of model, sampler, seed, index and label."""

    # building at import would look for plugins in every installed package
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)

    n: int | None = Field(None, ge=1, description="an integer of at least 1")
    sampler: str = Field("ddim", description="the name of a sampler")
    steps: int | None = Field(None, ge=1, description="an integer of at least 1")
    eta: float | None = Field(None, description="a finite number")
    spacing: str | None = Field(
        None, pattern=f"^({'|'.join(ALL_SPACINGS)})$", description=f"one of {', '.join(map(repr, ALL_SPACINGS))}"
    )
    timesteps: list[_Index] | None = Field(
        None, description="a list of integers from 0 on, each smaller than the one before"
    )
    guidance: float | list[float] | None = Field(None, description="a finite number, or a list of one for each image")
    labels: _Label | list[_Label] = Field(
        None, description="a class's number or name, null for none, or a list of one for each image"
    )
    seed: _Seed | list[_Seed] = Field(
        0, description="an integer from 0 to 2**64 - 1, or a list of one for each image"
    )
    indices: list[_Index] | None = Field(
        None, description="a list of integers from 0 to 2**32 - 1, one for each image"
    )
    priority: int = Field(
        0, ge=-1000, le=1000, description="an integer from -1000 to 1000, of which higher ones get lanes first"
    )
    deadline_s: float | None = Field(None, description="the seconds after which the images are of no use")

    @classmethod
    def read(cls, body: bytes) -> Self:
        """From JSON; Refused where it is none, has a field that is unknown, or one of a wrong type or size."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise Refused(cls._sentence(error.errors(include_url=False)[0])) from None

    @classmethod
    def _sentence(cls, error: ErrorDetails) -> str:
        if error["type"] == "json_invalid":
            return f"the body is not JSON: {error['ctx']['error']}"
        if not error["loc"]:
            return f"the body must be a JSON object, got {_shown(error['input'])}"
        name = str(error["loc"][0])
        if name not in cls.model_fields:
            return f"unknown field {_shown(name)}; accepted are {', '.join(cls.model_fields)}"
        return f"{name} must be {cls.model_fields[name].description}, got {_shown(error['input'])}"

    @property
    def count(self) -> int:
        """How many images: ``n``, or as many as the lists say, or 1."""
        lengths = [len(value) for value in (self.indices, self.seed, self.labels, self.guidance) if _is_list(value)]
        return self.n if self.n is not None else next(iter(lengths), 1)


class PictureAsk(Ask):
    """Images to make, and how to send them."""

    format: str = Field("png", pattern="^(png|npz)$", description="'png' or 'npz'")


class StreamAsk(Ask):
    """Images to make, and how often to tell of them."""

    every: int | None = Field(None, ge=1, le=_MAX_INDEX, description="an integer of at least 1, in steps")


@dataclass(frozen=True)
class Order:
    """What is asked for, checked against an engine and the limits.

    ``seeds``, ``indices`` and ``labels`` have one entry an image; ``labels`` is None for a model without classes.
    """

    ask: Ask
    table: StepTable
    seeds: list[int]
    indices: list[int]
    labels: list[int] | None

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def arguments(self) -> dict[str, Any]:
        """For :meth:`stepfusion.serving.AsyncEngine.submit`."""
        return {
            "n": len(self),
            "table": self.table,
            "seed": self.seeds,
            "indices": self.indices,
            "labels": self.labels,
            "guidance": self.ask.guidance,
            "priority": self.ask.priority,
            "deadline": self.ask.deadline_s,
        }

    def every(self, asked: int | None) -> int:
        """Steps between two previews: as asked for, or some ten previews an image."""
        return asked or math.ceil(len(self.table) / _PREVIEWS)

    def name(self, image: int) -> str:
        """What an image's file is called."""
        return f"{self.seeds[image]}-{self.indices[image]}"


def check_ask(ask: Ask, engine: Engine, limits: Limits) -> Order:
    """What ``ask`` comes to, before anything of its size is allocated.

    Raises:
        Refused: it is over a limit, or does not fit the engine. TypeError, ValueError: naming the argument.
    """
    count = ask.count
    _limit("n", count, limits.images, "images")
    _limit("n", count * math.prod(engine.shape), limits.elements, "elements (n * C * H * W)")
    _limit("steps", ask.steps or 0, limits.steps, "steps")
    if ask.sampler not in OFFERED:
        raise Refused(f"sampler must be one of {', '.join(map(repr, OFFERED))}, got {_shown(ask.sampler)}")
    request = TableRequest(ask.sampler, ask.steps, ask.eta, ask.spacing, ask.timesteps)
    request.check()
    table = request.of(engine)
    _limit("steps", len(table), limits.steps, "steps")
    guided = any(scale not in (None, 1.0) for scale in _each("guidance", ask.guidance, count))
    evaluations = count * len(table) * (2 if guided else 1)
    _limit("n * steps", evaluations, limits.evaluations, "evaluations of the network")
    return Order(
        ask,
        table,
        _each("seed", ask.seed, count),
        _each("indices", list(range(count)) if ask.indices is None else ask.indices, count),
        _labels(engine, ask.labels, count),
    )


def _limit(name: str, value: int, most: int, what: str) -> None:
    if value > most:
        raise Refused(f"{name} is too large: {_shown(value)} {what}, and a request may have {most}")


def _each(name: str, value: Any, count: int) -> list[Any]:
    if not _is_list(value):
        return [value] * count
    if len(value) != count:
        raise Refused(f"{name} must be one value or one for each of the {count} images, got {len(value)}")
    return list(value)


def _labels(engine: Engine, labels: Any, count: int) -> list[int] | None:
    if engine.num_classes is None:
        if labels is not None:
            raise Refused("labels were given, and this model takes none")
        return None
    return [_label(engine, label) for label in _each("labels", labels, count)]


def _label(engine: Engine, given: int | str | None) -> int:
    """The class that a request names, in any case, or numbers."""
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
    raise Refused(f"labels must be among {'; '.join(accepted)}, got {_shown(given)}")


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 4 * _MAX_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
