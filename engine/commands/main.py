"""The command ``stepfusion``: sample images, look at what runs here, train, export, measure."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NoReturn

import stepfusion
from stepfusion.commands.env import add_env_arguments, run_env
from stepfusion.commands.generate import add_generate_arguments, run_generate
from stepfusion.commands.invert import (
    add_encode_arguments,
    add_interpolate_arguments,
    add_reconstruct_arguments,
    run_encode,
    run_interpolate,
    run_reconstruct,
)
from stepfusion.commands.sample import add_sample_arguments, run_sample
from stepfusion.commands.show import add_show_arguments, run_show
from stepfusion.commands.train import add_train_arguments, run_train

_EPILOG = """exit status: 0 done; 1 it could not be done, and one line says why; 2 the command line is wrong;
130 (Ctrl-C) or 143 (SIGTERM) stopped, and what was finished is kept"""

Command = Callable[[argparse.Namespace], int]

#: Commands that are imported when they are called: they come from folders that the engine does not depend on, or need
#: more than it does.
_BROUGHT = {
    "serve": ("put a model behind HTTP, with a form to try it", "stepfusion.commands.serve"),
    "export": ("write a network, or a whole step, for another runtime", "stepfusion.export.cli"),
    "bench": ("measure speed, beside peers", "stepfusion.bench.cli"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors are one line on stderr, without a traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser(given).parse_args(given)
    command: Command = args.command
    try:
        with _terminable():
            return command(args)
    except KeyboardInterrupt:
        print("stepfusion: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, ArithmeticError, OSError, ImportError, MemoryError) as error:
        if args.traceback:
            raise
        print(f"stepfusion: {_one_line(error)}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that no half-written file stays behind."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        print("stepfusion: terminated", file=sys.stderr)
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser(given: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; a command that another folder brings gets its arguments where ``given`` names it."""
    parser = _Parser(
        prog="stepfusion",
        description="Fast, exact, reproducible sampling of diffusion models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stepfusion {stepfusion.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text, declare, run in (
        ("sample", "make images with a model", add_sample_arguments, run_sample),
        ("generate", "make many images as shards, resumable at any moment", add_generate_arguments, run_generate),
        ("env", "versions, devices, which path runs here and why, and a self-test", add_env_arguments, run_env),
        ("train", "train a small model on a folder of images", add_train_arguments, run_train),
        ("show", "draw a figure: of a schedule, of steps, of noise, of contexts", add_show_arguments, run_show),
        ("encode", "pictures to the noise that they come from", add_encode_arguments, run_encode),
        ("reconstruct", "pictures to their noise and back", add_reconstruct_arguments, run_reconstruct),
        ("interpolate", "images between two noises, or pictures", add_interpolate_arguments, run_interpolate),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        declare(command)
        command.set_defaults(command=run)
    for name, (text, module) in _BROUGHT.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in given:
            brought = import_module(module)
            getattr(brought, f"add_{name}_arguments")(command)
            command.set_defaults(command=getattr(brought, f"run_{name}"))
    return parser


def _one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
