"""A request for a sampler's table, in values that can be sent to another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack, cast

from stepfusion import _checks
from stepfusion.options import Sampler, SamplerOptions, StepOptions, TableOptions
from stepfusion.samplers.registry import OFFERED, options_of
from stepfusion.samplers.table import StepTable


class MakesTables(Protocol):
    """A model that makes its samplers' tables: a :class:`stepfusion.model_spec.ModelSpec` or an engine."""

    def table(
        self, sampler: Sampler | None = ..., steps: int | None = ..., **options: Unpack[SamplerOptions]
    ) -> StepTable:
        """:func:`stepfusion.samplers.registry.make_table` for this model's schedule and prediction type."""
        ...


@dataclass(frozen=True, init=False)
class TableRequest:
    """A sampler and its options, as :func:`stepfusion.samplers.registry.make_table` takes them; None is the default.

    Without a sampler the model's path says which. ``timesteps`` or ``levels`` stand in place of ``steps`` and
    ``spacing``. ``reuse`` is :meth:`stepfusion.StepTable.reusing`'s.

    Attributes:
        given: the options of :class:`stepfusion.options.TableOptions` that are not None, by their names.
    """

    given: Mapping[str, Any]

    def __init__(self, **options: Unpack[TableOptions]) -> None:
        names = TableOptions.__annotations__
        for name in options:
            if name not in names:
                raise TypeError(f"{name!r} is no option of a table; the options are {', '.join(names)}")
        given = {name: options.get(name) for name in names if options.get(name) is not None}
        object.__setattr__(self, "given", given)

    @property
    def options(self) -> StepOptions:
        """Those that are options of the sampler's function."""
        return cast(
            StepOptions, {name: self.given[name] for name in self.given if name in StepOptions.__annotations__}
        )

    def __repr__(self) -> str:
        return f"TableRequest({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"

    def check(self, mark: str = "") -> None:
        """ValueError if options contradict each other, or one is not the sampler's.

        ``mark`` stands before every name, "--" in a command.
        """
        sampler, reuse = self.given.get("sampler"), self.given.get("reuse")
        for name in self.options:
            if sampler in OFFERED and name not in options_of(sampler):
                takers = takers_of(name)
                accepted = " and ".join([", ".join(takers[:-1]), takers[-1]] if len(takers) > 1 else takers)
                said = f"{mark}{name.replace('_', '-') if mark else name}"
                raise ValueError(f"{said} is an option of {mark}sampler {accepted}, got {mark}sampler {sampler}")
        if reuse is not None and reuse < 1:
            raise ValueError(f"{mark}reuse must be at least 1, got {reuse}")
        for places in ("timesteps", "levels"):
            for name in ("steps", "spacing"):
                if places in self.given and name in self.given:
                    raise ValueError(f"{mark}{name} and {mark}{places} exclude each other, got both")

    def of(self, model: MakesTables) -> StepTable:
        """The table for this model's schedule."""
        table = model.table(self.given.get("sampler"), self.given.get("steps"), **self.options)
        if (reuse := self.given.get("reuse")) is None:
            return table
        return table.reusing(_checks.integer("reuse", reuse, 1, 1 << 31))

    def words(self) -> dict[str, str | int | float] | None:
        """The options as a command line takes them; None if it does not take one of them, a list of timesteps."""
        words: dict[str, str | int | float] = {}
        for name, value in self.given.items():
            if isinstance(value, bool):
                words[name] = "yes" if value else "no"
            elif isinstance(value, str | int | float):
                words[name] = value
            elif name == "timesteps":
                return None
            else:
                words[name] = ",".join(repr(float(number)) for number in value)
        return words


def takers_of(name: str) -> Sequence[str]:
    """The samplers that take an option, of those that start from noise."""
    return [sampler for sampler in OFFERED if name in options_of(sampler)]
