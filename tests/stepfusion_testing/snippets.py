"""The fenced snippets of a Markdown page, and what a command line of one says."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("python", "sh")
_COMMAND = re.compile(r"^\s*(\$ )?(stepfusion|python|pip|make|curl|docker|torchrun|import|from) ", re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README.md and every page of docs/, as paths in the repository."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]


def snippets(page: str) -> list[Snippet]:
    """All fenced blocks of a page, whatever their language, in order."""
    return list(_blocks(page, (ROOT / page).read_text(encoding="utf-8")))


def _blocks(page: str, text: str) -> Iterator[Snippet]:
    start, language, lines = 0, "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif start:
            yield Snippet(page, start, language, "\n".join(lines) + "\n")
            start = 0
        else:
            start, language, lines = number, line.strip().removeprefix("```").strip(), []
    assert not start, f"{page}:{start}: a fence that is not closed"


def looks_like_a_snippet(text: str) -> bool:
    """Whether a block without a language has lines that somebody would run."""
    return bool(_COMMAND.search(text))


def commands(snippet: Snippet) -> list[str]:
    """The command lines of a shell snippet, without comments, continued lines joined."""
    joined = snippet.text.replace("\\\n", " ")
    lines = (shlex.join(shlex.split(line, comments=True)) for line in joined.splitlines())
    return [line for line in lines if line]


def run_python(code: str, names: dict[str, Any], where: str) -> None:
    """Execute a snippet in ``names``; one may await, as a notebook may."""
    import asyncio

    compiled = compile(code, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    waiting = eval(compiled, names)
    if waiting is not None:
        asyncio.run(waiting)


class Parsed(Exception):
    """A command line was parsed, and nothing was run."""


def parse(main: Callable[[list[str]], object], words: list[str]) -> argparse.Namespace:
    """What a program's own parser makes of a command line; it runs no further. SystemExit if it refuses it."""
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *arguments: Any, **named: Any) -> argparse.Namespace:
        raise Parsed(original(self, *arguments, **named))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            main(words)
    namespace: argparse.Namespace = parsed.value.args[0]
    return namespace


def _example(path: str) -> Callable[[list[str]], int]:
    """An example as a program that takes its arguments."""

    def main(words: list[str]) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [path, *words])
            runpy.run_path(str(ROOT / path), run_name="__main__")
        return 0

    return main


def arguments_of(command: str) -> tuple[Callable[[list[str]], object], list[str]] | None:
    """The program of this package that a command line runs, and its arguments; None if it runs none."""
    words = shlex.split(command)
    if ">" in words:
        words = words[: words.index(">")]
    while words and re.fullmatch(r"\w+=.*", words[0]):
        del words[0]
    for image in ("stepfusion:cpu", "stepfusion:cuda"):
        if words[0] == "docker" and image in words[:-1] and "build" not in words:
            words = ["stepfusion", *words[words.index(image) + 1 :]]
    if "-m" in words and words[words.index("-m") + 1].startswith("stepfusion"):
        place = words.index("-m") + 1
        return import_module(words[place]).main, words[place + 1 :]
    if words[0] == "python" and words[1].startswith("examples/"):
        return _example(words[1]), words[2:]
    if words[0] == "stepfusion":
        return import_module("stepfusion.commands.main").main, words[1:]
    return None
