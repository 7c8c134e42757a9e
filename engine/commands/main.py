"""The command ``stepfusion``: sample images, look at what runs here, train, export, measure."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from stepfusion.commands.streams import standard_streams, tell
from stepfusion.commands.train import add_train_arguments, run_train

_EPILOG = """exit status: 0 done; 1 it could not be done, and one line says why; 2 the command line is wrong;
130 (Ctrl-C) or 143 (SIGTERM) stopped, and what was finished is kept"""

Command = Callable[[argparse.Namespace], int]
Declare = Callable[[argparse.ArgumentParser], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors are one line on stderr, without a traceback."""
    with standard_streams():
        given = sys.argv[1:] if arguments is None else list(arguments)
        return _run(_parser(given).parse_args(given))


def _run(args: argparse.Namespace) -> int:
    command: Command = args.command
    try:
        with _terminable():
            return command(args)
    except KeyboardInterrupt:
        tell("stepfusion: interrupted")
        return 130
    except (ValueError, TypeError, RuntimeError, ArithmeticError, OSError, ImportError, MemoryError) as error:
        if args.traceback:
            raise
        tell(f"stepfusion: {_one_line(error)}")
        return 1


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that no half-written file stays behind."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        tell("stepfusion: terminated")
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
    """The parser; a command with imports of its own gets its arguments only if ``given`` names it."""
    parser = _Parser(
        prog="stepfusion",
        description="Fast, exact, reproducible sampling of diffusion models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stepfusion {stepfusion.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text, declare, run in _COMMANDS:
        _declare(_add_command(commands, name, text), declare, run)
    for name, text, load in _IMPORTED_WHEN_NAMED:
        command = _add_command(commands, name, text)
        if name in given:
            _declare(command, *load())
    return parser


def _add_command(commands: argparse._SubParsersAction[_Parser], name: str, text: str) -> _Parser:
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def _declare(parser: argparse.ArgumentParser, declare: Declare, run: Command) -> None:
    declare(parser)
    parser.set_defaults(command=run)


def _serve() -> tuple[Declare, Command]:
    from stepfusion.commands.serve import add_serve_arguments, run_serve

    return add_serve_arguments, run_serve


def _export() -> tuple[Declare, Command]:
    from stepfusion.commands.export import add_export_arguments, run_export

    return add_export_arguments, run_export


def _bench() -> tuple[Declare, Command]:
    from stepfusion.bench.cli import add_bench_arguments, run_bench

    return add_bench_arguments, run_bench


def _one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


_COMMANDS: tuple[tuple[str, str, Declare, Command], ...] = (
    ("sample", "make images with a model", add_sample_arguments, run_sample),
    ("generate", "make many images as shards, resumable at any moment", add_generate_arguments, run_generate),
    ("env", "versions, devices, which path runs here and why, and a self-test", add_env_arguments, run_env),
    ("train", "train a small model on a folder of images", add_train_arguments, run_train),
    ("show", "draw a figure: of a schedule, of steps, of noise, of contexts", add_show_arguments, run_show),
    ("encode", "pictures to the noise that they come from", add_encode_arguments, run_encode),
    ("reconstruct", "pictures to their noise and back", add_reconstruct_arguments, run_reconstruct),
    ("interpolate", "images between two noises, or pictures", add_interpolate_arguments, run_interpolate),
)
# Their imports take long or need packages that the others do without, so they wait until the command is named.
_IMPORTED_WHEN_NAMED: tuple[tuple[str, str, Callable[[], tuple[Declare, Command]]], ...] = (
    ("serve", "put a model behind HTTP, with a form to try it", _serve),
    ("export", "write a network, or a whole step, for another runtime", _export),
    ("bench", "measure speed, beside peers", _bench),
)


if __name__ == "__main__":
    sys.exit(main())
