"""Where a picture comes from, as text that goes into its file: what was asked for, and the command that asks again.

Every value is what a user gave or what follows from it, so that the same command writes the same bytes. No path of
the machine is among them but one that a user typed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import stepfusion

#: What the names of our texts begin with.
PREFIX = "stepfusion."
SOFTWARE = "Software"  # PNG specification, 11.3.3.2
_MOST_VALUES = 256  # of a list that is written out


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What one picture, or the pictures of a grid, are a function of.

    Attributes:
        model: as the user named it.
        sampler: the name of its table.
        steps: rows of the table that were walked.
        seeds, indices, labels, guidance: one for each picture; None for what was not given.
        classes: what each label is called, if it is.
        weights: SHA-256 of the file of weights; None if it is not known.
        command: what makes it again; None if no command does.
        prompts: one for each picture. negatives: what guidance leads away from, likewise.
        others: further facts by their names.
    """

    model: str
    sampler: str
    steps: int
    seeds: Sequence[int]
    indices: Sequence[int]
    labels: Sequence[int] | None = None
    classes: Sequence[str | None] | None = None
    guidance: Sequence[float] | None = None
    weights: str | None = None
    command: str | None = None
    prompts: Sequence[str] | None = None
    negatives: Sequence[str] | None = None
    others: Mapping[str, str] | None = None

    def text(self) -> dict[str, str]:
        """The texts of the file, by their keywords."""
        named = self.classes is not None and None not in self.classes
        facts: dict[str, str | None] = {
            "model": self.model,
            "weights": None if self.weights is None else f"sha256:{self.weights}",
            "sampler": self.sampler,
            "steps": str(self.steps),
            "seed": listed(self.seeds),
            "index": listed(self.indices),
            "label": None if self.labels is None else listed(self.labels),
            "class": listed(self.classes or ()) if named else None,
            "prompt": None if self.prompts is None else _texts_of(self.prompts),
            "negative": None if self.negatives is None else _texts_of(self.negatives),
            "guidance": None if self.guidance is None else listed(self.guidance),
            **(self.others or {}),
            "command": self.command,
        }
        return texts(facts)


def texts(facts: Mapping[str, str | None]) -> dict[str, str]:
    """Facts as the texts of a file, those that are None left out, after the version of this package."""
    known = {
        f"{PREFIX}{name}": value.encode(errors="replace").decode()
        for name, value in facts.items()
        if value is not None
    }
    return {SOFTWARE: f"stepfusion {stepfusion.__version__}", **known}


def listed(values: Sequence[Any]) -> str:
    """Values in short: one if all are equal, a range of integers, or a list, once if it repeats itself."""
    if not values:
        return ""
    if all(value == values[0] for value in values):
        return _shown(values[0])
    first = values[0]
    if isinstance(first, int) and all(value == first + i for i, value in enumerate(values)):
        return f"{first}-{values[-1]}"
    period = next((k for k in range(2, min(_MOST_VALUES, len(values) // 2) + 1) if _repeats(values, k)), len(values))
    shown = [_shown(value) for value in values[: min(period, _MOST_VALUES)]]
    rest = ", ..." if period > _MOST_VALUES else " in turn" if period < len(values) else ""
    return ",".join(shown) + rest


def command_line(*words: str, options: Mapping[str, object]) -> str:
    """The line that a shell runs: ``stepfusion``, ``words``, and those options that are neither None nor False.

    True stands for a flag, and a list for an option that is given once for each of its texts; ``first_index`` is
    written ``--first-index``.
    """
    line = ["stepfusion", *words]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            line.append(option)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                # a text that begins as an option does is joined to its own
                line += [f"{option}={one}"] if isinstance(one, str) and one.startswith("-") else [option, _shown(one)]
    return shlex.join(line)


def _texts_of(prompts: Sequence[str]) -> str:
    """The prompt of all pictures, or a JSON list, once if it repeats itself: prompts have commas of their own."""
    if len(set(prompts)) == 1:
        return prompts[0]
    period = next((k for k in range(2, min(_MOST_VALUES, len(prompts))) if _repeats(prompts, k)), len(prompts))
    shown = json.dumps(list(prompts[: min(period, _MOST_VALUES)]), ensure_ascii=False)
    return shown + (" and so on" if period > _MOST_VALUES else " in turn" if period < len(prompts) else "")


def _repeats(values: Sequence[Any], period: int) -> bool:
    return all(value == values[i % period] for i, value in enumerate(values))


def _shown(value: object) -> str:
    """A value as a command line takes it; a float with as many digits as it needs."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
