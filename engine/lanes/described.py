"""What people are told of a request, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepfusion.model_spec import ModelSpec
from stepfusion.samplers.table import StepTable

_SHOWN = 4  # values of a list


def describe_request(
    count: int,
    table: StepTable,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    asked: Mapping[str, Any],
    spec: ModelSpec | None,
) -> str:
    """A request for ``count`` images: the sampler, and what images differ by; seeds and labels of the first ones."""
    steps = sorted({table.steps(part) for part in range(len(table.starts))})
    facts = [
        f"{count} image" + ("" if count == 1 else "s"),
        table.name,
        f"{steps[0]} steps" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps",
        f"seed {_few(seeds)}",
    ]
    if labels and asked.get("labels") is not None:
        names = (spec.class_names if spec is not None else None) or ()
        facts.append(f"labels {_few([names[one] if one < len(names) else one for one in labels])}")
    for name, value in ((name, value) for name, value in asked.items() if value is not None):
        if name in ("guidance", "prompt", "strength"):
            facts.append(f"{name} {_few(value) if isinstance(value, list | tuple) else repr(value)}"[:80])
        elif name in ("start", "image", "mask", "noise"):
            facts.append(f"with {name}")
    return f"Request({', '.join(facts)})"


def _few(values: Sequence[object]) -> str:
    """One value if all are equal, else the first ones."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        return str(distinct[0])
    return ", ".join(map(str, distinct[:_SHOWN])) + (", ..." if len(distinct) > _SHOWN else "")
