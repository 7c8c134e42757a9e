"""Docstrings of this package as Markdown: roles become links if the site has the name, else code."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):`~?\.?([^`]+)`")
_LITERAL = re.compile(r"``(.+?)``")
_BLOCK = re.compile(r"::[ \t]*$", re.MULTILINE)


@cache
def hooks() -> ModuleType:
    """docs/site/hooks.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("stepfusion_site_hooks", Path(__file__).with_name("hooks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def documented() -> frozenset[str]:
    """The names that have a heading on the site."""
    return frozenset(f"stepfusion.{name}" for names in hooks().reference().values() for name in names)


def link(target: str, owner: str = "", members: Collection[str] = ()) -> str:
    """What stands for a role: a link to the name if the site has it, else the name as code.

    Args:
        target: the name in the role.
        owner: the class in whose docstring, or in the docstring of whose method, it stands.
        members: of that class.
    """
    shown = target.removeprefix("stepfusion.")
    for name in (target, f"stepfusion.{target}"):
        if name in documented():
            return f"[`{shown}`][{name}]"
    if target in members and not target.startswith("_"):
        for name in documented():
            if name.rpartition(".")[2] == owner:
                return f"[`{shown}`][{name}.{target}]"
    return f"`{shown}`"


def as_markdown(text: str, owner: str = "", members: Collection[str] = ()) -> str:
    """A docstring in reStructuredText's few marks that are used here, in Markdown's."""
    text = _ROLE.sub(lambda match: link(match[1], owner, members), text)
    text = _LITERAL.sub(lambda match: f"`{match[1]}`", text)
    return _BLOCK.sub(":", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is None:
            return
        cls = obj if obj.is_class else obj.parent
        owned = (cls.name, frozenset(_shown(cls))) if cls is not None and cls.is_class else ("", frozenset())
        obj.docstring.value = as_markdown(obj.docstring.value, *owned)


def _shown(cls: Any) -> list[str]:
    """The members of a class that have a docstring, and so a heading."""
    return [name for name, member in cls.members.items() if not member.is_alias and member.docstring is not None]
