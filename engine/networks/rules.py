"""What the fields of a network's config accept, and the one sentence that refuses what they do not."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass

from stepfusion.errors import CheckpointError

#: What an exponential moving average adds to the config of the network that it saves (diffusers' ``EMAModel``).
EMA_KEYS = frozenset(
    {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
)


@dataclass(frozen=True)
class Rule:
    """What a field accepts: a predicate, and the words that say so."""

    accepts: str
    holds: Callable[[object], bool]


def integer(low: int, high: int) -> Rule:
    """An integer from low to high."""
    return Rule(f"an integer from {low} to {high}", lambda value: _is_integer(value, low, high))


def number(words: str, holds: Callable[[float], bool]) -> Rule:
    """A finite number for which `holds`."""

    def check(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (isinstance(value, int) or math.isfinite(value)) and holds(value)

    return Rule(words, check)


def choice(*names: str) -> Rule:
    """One of these names."""
    return Rule(
        f"{' or '.join(map(repr, names))} (nothing else is implemented)",
        lambda value: isinstance(value, str) and value in names,
    )


def optional(rule: Rule) -> Rule:
    """None, or what the rule accepts."""
    return Rule(f"null or {rule.accepts}", lambda value: value is None or rule.holds(value))


def per_level(item: Rule, most: int) -> Rule:
    """A tuple of 1 to `most` entries, each of which the rule accepts."""
    return Rule(
        f"a list of 1 to {most} entries, each {item.accepts}",
        lambda value: isinstance(value, tuple) and 1 <= len(value) <= most and all(map(item.holds, value)),
    )


def for_all_or_per_level(item: Rule, most: int) -> Rule:
    """What the rule accepts, or a tuple of it."""
    levels = per_level(item, most)
    return Rule(f"{item.accepts}, or {levels.accepts}", lambda value: item.holds(value) or levels.holds(value))


def height_and_width(most: int) -> Rule:
    """The height and width of an image: an integer for both, or a pair."""

    def check(value: object) -> bool:
        sizes = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        return all(_is_integer(each, 1, most) for each in sizes)

    return Rule(f"an integer from 1 to {most}, or a pair of them", check)


BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))


def refusal(key: str, value: object, accepts: str) -> CheckpointError:
    """The error that names a key, its value and what is accepted."""
    given = reprlib.repr(list(value) if isinstance(value, tuple) else value)
    return CheckpointError(f"the UNet config has {key} = {given}; accepted is {accepts}")


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
