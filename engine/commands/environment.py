"""Defaults of options from the environment: ``STEPFUSION_STEPS=25`` is ``--steps 25`` where it is not given."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

PREFIX = "STEPFUSION_"
RESERVED = frozenset(("BACKEND", "CACHE", "CXXFLAGS", "PYTRITON"))  # variables with a meaning of their own
_TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
_FLAG = 0  # the number of values that a flag takes


class EnvironmentParser(argparse.ArgumentParser):
    """A parser whose options, and those of its subcommands, have their defaults from variables where there are some.

    The variable of ``--first-index`` is ``STEPFUSION_FIRST_INDEX``. A flag is 1 or 0. Options of several values have
    none. The result's ``words_of_environment`` are the options that came from there, as they would be typed.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the library's; what a variable says is refused as what is typed is."""
        given = [(action, value) for action in self._actions if (value := _variable(action)) is not None]
        for action, text in given:
            self._use(action, text)
        found, rest = super().parse_known_args(args, namespace)
        words = [word for action, text in given if self._holds(found, action) for word in _typed(action, text)]
        found.words_of_environment = [*getattr(found, "words_of_environment", []), *words]
        return found, rest

    def _use(self, action: argparse.Action, text: str) -> None:
        name = PREFIX + action.dest.upper()
        if action.nargs == _FLAG:
            if text.lower() not in _TRUTH:
                self.error(f"{name} must be 1 or 0, got {text!r}")
            action.default = _TRUTH[text.lower()]
            return
        if action.choices is not None and text not in action.choices:
            self.error(f"{name} must be one of {', '.join(map(str, action.choices))}, got {text!r}")
        action.default, action.required = text, False

    @staticmethod
    def _holds(found: argparse.Namespace, action: argparse.Action) -> bool:
        """Whether the option has the value that its variable says, and not one that was typed."""
        value, said = getattr(found, action.dest), action.default
        return bool(value == (action.type(said) if callable(action.type) and isinstance(said, str) else said))


def _variable(action: argparse.Action) -> str | None:
    """What the variable of an option says; None without one."""
    longs = [name for name in action.option_strings if name.startswith("--")]
    if not longs or action.nargs not in (None, _FLAG) or isinstance(action, _NO_OPTIONS):
        return None
    name = action.dest.upper()
    return None if name in RESERVED else os.environ.get(PREFIX + name)


def _typed(action: argparse.Action, text: str) -> Sequence[str]:
    option = next(name for name in action.option_strings if name.startswith("--"))
    if action.nargs != _FLAG:
        return (option, text)
    return (option,) if action.default else ()


_NO_OPTIONS = (argparse._HelpAction, argparse._VersionAction, argparse._AppendAction)
