"""``stepfusion warm``: compile ahead of time what the first images of a model would wait for."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from stepfusion import _checks
from stepfusion.checkpoints.weights_digest import weights_digest
from stepfusion.commands.arguments import (
    add_device_argument,
    add_lora_argument,
    add_model_argument,
    add_path_arguments,
    add_sampler_arguments,
    execution_options,
    open_engine,
    table_request,
)
from stepfusion.commands.prompts import add_size_argument
from stepfusion.commands.threads import add_threads_argument, use_threads
from stepfusion.engine import Engine
from stepfusion.execution.warm_cache import MANIFEST, read_warm_cache
from stepfusion.export.manifest import MANIFEST as BUNDLE
from stepfusion.kernels.cache import cache_directory, make_cache_directory, why_not_private
from stepfusion.warming import warm

_EXAMPLES = """examples:
  stepfusion warm fashion-mnist --batch 1 8 --out cache     # then, here or in a container that the folder ships with:
  STEPFUSION_CACHE=cache stepfusion sample fashion-mnist -n 8
  stepfusion warm path/to/model --network compile --batch 1 --lanes 16 --out cache    # for serve --lanes 16, too

Run it where the images will be made, or with the same versions on a machine with the same instruction set: what was
made for another is of no use, and compiled again. The folder may be read-only where it is used, and lie elsewhere."""
_VARIABLE = "STEPFUSION_CACHE"
_MOST = 1 << 20


def add_warm_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion warm``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    add_model_argument(parser)
    text = "the cache to fill, which STEPFUSION_CACHE then names (default: the cache in use)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)

    add = parser.add_argument_group("for what").add_argument
    text = "numbers of images that a command makes at a time (default: 1)"
    add("--batch", type=int, nargs="+", dest="batches", metavar="N", default=[1], help=text)
    add("--lanes", type=int, metavar="N", help="also for a server with so many lanes (default: for none)")
    add_size_argument(add)
    add_lora_argument(add)
    add_sampler_arguments(parser)

    add = parser.add_argument_group("where and how to run").add_argument
    add_device_argument(add)
    add_threads_argument(add)
    add_path_arguments(add)
    text = "for engines with one batch size for everything, that of --lanes"
    add("--invariant", action="store_true", help=text)
    add("--quiet", action="store_true", help="print no report")


def run_warm(args: argparse.Namespace) -> int:
    """Fill the cache as ``args`` say; returns 0. What can be checked is, before any work."""
    for count in (*args.batches, *([] if args.lanes is None else [args.lanes])):
        _checks.integer("--batch and --lanes", count, 1, _MOST)
    request = table_request(args)
    started = time.perf_counter()
    with _cache(args.out) as directory:
        args.batch = args.lanes if args.invariant else None
        engine = _engine(args)
        table = request.of(engine)
        run = warm(
            engine, args.batches, lanes=args.lanes, table=table, name=args.model, weights=weights_digest(args.model)
        )
        if args.out is not None:
            _let_others_read(directory)
    if not args.quiet:
        compiled = ", ".join(run.compiled) or "nothing, for all of it was there"
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6
        print(f"compiled {compiled}")
        print(f"{directory}: {run}; {size:.1f} MB, {time.perf_counter() - started:.1f} s")
    return 0


def _engine(args: argparse.Namespace) -> Engine:
    """The engine of a model, or of a bundle that ``stepfusion export`` wrote."""
    if not (Path(args.model) / BUNDLE).is_file():
        return open_engine(args)
    use_threads(args)
    return Engine.from_exported(args.model, **asdict(execution_options(args)))


@contextmanager
def _cache(out: Path | None) -> Iterator[Path]:
    """The cache to fill, which is the one in use within the block. If that fails, a new one is as it was before.

    Raises:
        ValueError: it cannot be used, or is a directory of something else.
    """
    before = os.environ.get(_VARIABLE)
    if out is not None:
        _check_out(out)
        os.environ[_VARIABLE] = str(out.absolute())
    directory = cache_directory()
    existed, filled = directory.exists(), directory.is_dir() and any(directory.iterdir())
    try:
        _check_usable(directory)
        yield directory
    except BaseException:
        if not filled:
            _empty(directory)
        if not existed and directory.is_dir():
            directory.rmdir()
        raise
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before


def _empty(directory: Path) -> None:
    """Remove what this command made in a directory that had nothing in it."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_out(out: Path) -> None:
    """Refuse a file, and a directory with other things in it: everything in a cache is made readable."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {out}, and {out.absolute().parent} is not a directory")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a directory, and {out} is a file")
    if out.is_dir() and read_warm_cache(out) is None and any(out.iterdir()):
        raise ValueError(
            f"--out must be a new or empty directory, or one with a {MANIFEST}, and {out} has other files"
        )


def _check_usable(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    reason = why_not_private(directory)
    if reason is not None or make_cache_directory("cpp") is None:
        raise ValueError(f"the cache {directory} cannot be used: {reason or 'it cannot be written to'}")


def _let_others_read(directory: Path) -> None:
    """Drop locks, and let every user read what a container may run as another one than it was built by."""
    for path in (directory, *directory.rglob("*")):
        if path.suffix == ".lock":
            path.unlink()
        elif not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
