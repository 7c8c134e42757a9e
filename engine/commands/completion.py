"""``stepfusion completion``: a script by which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepfusion.checkpoints.bundled import bundled_models

SHELLS = ("bash", "zsh", "fish")
_EXAMPLES = """examples:
  stepfusion completion bash > ~/.local/share/bash-completion/completions/stepfusion
  stepfusion completion zsh > ~/.zfunc/_stepfusion        # with fpath+=(~/.zfunc) before compinit in ~/.zshrc
  stepfusion completion fish > ~/.config/fish/completions/stepfusion.fish

Write it again after an upgrade: it holds the options of one version. It needs shtab, of stepfusion[completion]."""


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion completion``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    parser.add_argument("shell", choices=SHELLS, help="which shell it is for")


def run_completion(args: argparse.Namespace) -> int:
    """Print the script; returns 0."""
    try:
        import shtab
    except ImportError as error:
        message = "stepfusion completion needs shtab: pip install 'stepfusion[completion]'"
        raise ImportError(message) from error
    from stepfusion.commands.main import whole_parser  # which knows this command

    parser = whole_parser()
    for action in _actions(parser):
        if action.dest == "model":
            action.complete = {**shtab.FILE, "bash": "_stepfusion_models"}
        elif action.type is Path:
            action.complete = shtab.FILE
    print(shtab.complete(parser, shell=args.shell, preamble=_preamble()))
    return 0


def _preamble() -> Any:  # shtab takes a dictionary by shell, and its annotation says a string
    """The functions that the script calls: names of bundled models, and files."""
    names = " ".join(bundled_models())
    return {"bash": f'_stepfusion_models() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}'}


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Every argument of a parser and of its commands'."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
