"""The command ``stepfusion``: sample images, look at what runs here, train, export, measure."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import stepfusion
from stepfusion.commands.environment import EnvironmentParser
from stepfusion.commands.streams import standard_streams, tell
from stepfusion.commands.threads import wait_passively

_EPILOG = """exit status: 0 done; 1 it could not be done, and one line says why; 2 the command line is wrong;
130 (Ctrl-C) or 143 (SIGTERM) stopped, and what was finished is kept

An option that is not given has its default from a variable, if there is one: STEPFUSION_STEPS=25 is --steps 25."""

Command = Callable[[argparse.Namespace], int]
Declare = Callable[[argparse.ArgumentParser], None]
Loaded = tuple[Declare, Command]  # what declares a command's arguments, and what runs it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors are one line on stderr, without a traceback."""
    wait_passively()
    with standard_streams():
        given = sys.argv[1:] if arguments is None else list(arguments)
        args = _parser(given).parse_args(given)
        args.words = [*given, *args.words_of_environment]
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    command: Command = args.command
    try:
        with _terminable(), _telling_compilations(quiet=getattr(args, "quiet", False)):
            return command(args)
    except KeyboardInterrupt:
        tell("stepfusion: interrupted")
        return 130
    except (ValueError, TypeError, RuntimeError, ArithmeticError, OSError, ImportError, MemoryError) as error:
        if args.traceback:
            raise
        tell(f"stepfusion: {_one_line(error)}")
        return 1


class _Parser(EnvironmentParser):
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


class _Teller(logging.Handler):
    """Writes what a command waits for to stderr, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(f"stepfusion: {record.getMessage()}")


@contextmanager
def _telling_compilations(*, quiet: bool) -> Iterator[None]:
    """Say on stderr what is being compiled, before which nothing else happens for seconds or minutes."""
    logger, handler = logging.getLogger("stepfusion.compiling"), _Teller()
    before = logger.level
    if not quiet:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _parser(given: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; a command gets its arguments only if ``given`` names it, for its imports take long."""
    parser = _Parser(
        prog="stepfusion",
        description="Fast, exact, reproducible sampling of diffusion models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stepfusion {stepfusion.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (load, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in given:
            declare, run = load()
            declare(command)
            command.set_defaults(command=run)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """The parser with the arguments of every command."""
    return _parser(tuple(_COMMANDS))


def _one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


# Each command is imported when it is asked for.


def _sample() -> Loaded:
    from stepfusion.commands.sample import add_sample_arguments, run_sample

    return add_sample_arguments, run_sample


def _generate() -> Loaded:
    from stepfusion.commands.generate import add_generate_arguments, run_generate

    return add_generate_arguments, run_generate


def _env() -> Loaded:
    from stepfusion.commands.env import add_env_arguments, run_env

    return add_env_arguments, run_env


def _train() -> Loaded:
    from stepfusion.commands.train import add_train_arguments, run_train

    return add_train_arguments, run_train


def _show() -> Loaded:
    from stepfusion.commands.show import add_show_arguments, run_show

    return add_show_arguments, run_show


def _encode() -> Loaded:
    from stepfusion.commands.invert import add_encode_arguments, run_encode

    return add_encode_arguments, run_encode


def _reconstruct() -> Loaded:
    from stepfusion.commands.invert import add_reconstruct_arguments, run_reconstruct

    return add_reconstruct_arguments, run_reconstruct


def _interpolate() -> Loaded:
    from stepfusion.commands.invert import add_interpolate_arguments, run_interpolate

    return add_interpolate_arguments, run_interpolate


def _warm() -> Loaded:
    from stepfusion.commands.warm import add_warm_arguments, run_warm

    return add_warm_arguments, run_warm


def _serve() -> Loaded:
    from stepfusion.commands.serve import add_serve_arguments, run_serve

    return add_serve_arguments, run_serve


def _export() -> Loaded:
    from stepfusion.commands.export import add_export_arguments, run_export

    return add_export_arguments, run_export


def _completion() -> Loaded:
    from stepfusion.commands.completion import add_completion_arguments, run_completion

    return add_completion_arguments, run_completion


def _bench() -> Loaded:
    from stepfusion.bench.cli import add_bench_arguments, run_bench

    return add_bench_arguments, run_bench


#: What loads each command, and its help.
_COMMANDS: dict[str, tuple[Callable[[], Loaded], str]] = {
    "sample": (_sample, "make images with a model"),
    "generate": (_generate, "make many images as shards, resumable at any moment"),
    "env": (_env, "versions, devices, which path runs here and why, and a self-test"),
    "train": (_train, "train a small model on a folder of images"),
    "show": (_show, "draw a figure: of a schedule, of steps, of noise, of contexts"),
    "encode": (_encode, "pictures to the noise that they come from"),
    "reconstruct": (_reconstruct, "pictures to their noise and back"),
    "interpolate": (_interpolate, "images between two noises, or pictures"),
    "serve": (_serve, "put a model behind HTTP, with a form to try it"),
    "warm": (_warm, "compile ahead of time what the first images of a model would wait for"),
    "export": (_export, "write a network, or a whole step, for another runtime"),
    "bench": (_bench, "measure speed, beside peers"),
    "completion": (_completion, "a script by which a shell completes these commands"),
}


if __name__ == "__main__":
    sys.exit(main())
