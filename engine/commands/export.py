"""``stepfusion export``: write a network for another runtime, as a verified bundle."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.commands.arguments import add_sampler_arguments, table_request
from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.execution.plan import DTYPES
from stepfusion.export.batch import DYNAMIC, Batch
from stepfusion.export.bundle import check_out
from stepfusion.export.exporters import exporter
from stepfusion.export.formats import FORMATS, find_format
from stepfusion.export.manifest import KINDS
from stepfusion.export.program import export_program
from stepfusion.export.to_triton_server import BACKENDS

_EXAMPLES = """examples:
  stepfusion export fashion-mnist --format onnx --out bundle
  stepfusion export fashion-mnist --format tensorrt-rtx --dtype float16 --batch-range 1:8:64 --out bundle
  stepfusion export fashion-mnist --format aoti --kind tick --batch 4 --sampler ddim --steps 25 --out bundle"""


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion export``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    names = ", ".join(bundled_models()) or "none in this installation"
    parser.add_argument("model", help=f"a bundled model ({names}), or the path of a diffusers model directory")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle; must not exist")

    add = parser.add_argument_group("what to write").add_argument
    add("--format", required=True, choices=tuple(FORMATS), help="the runtime that it is for")
    add("--kind", choices=KINDS, default="network", help="the network, or one step of a sampler around it")
    add("--guided", action="store_true", help="tick: with classifier-free guidance, whose network runs twice a step")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="the number format of the network's arithmetic (default: %(default)s)",
    )
    add("--batch", default="dynamic", metavar="B", help="a number of images, or 'dynamic' (the default)")
    add(
        "--batch-range",
        metavar="LOW:BEST:HIGH",
        help="the sizes of a dynamic batch: the smallest, the usual and the largest (default: 1:8:64)",
    )
    add("--device", help="the device to write for, if the format is for one (default: the format's)")
    add("--strip-weights", action="store_true", help="tensorrt, tensorrt-rtx: an engine that is refitted when loaded")
    add("--server-backend", choices=BACKENDS, default="onnx", help="triton-server: what runs it there")
    add("--dry-run", action="store_true", help="torch-tensorrt: say how much it covers, and write nothing")

    add_sampler_arguments(parser, "the sampler whose table goes with it")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar, and print no report")


def run_export(args: argparse.Namespace) -> int:
    """Export as ``args`` say; returns 0. Everything that can be checked is, before any work."""
    found = find_format(args.format, kind=args.kind, dtype=args.dtype)
    batch = read_batch(args.batch, args.batch_range)
    _check_options(args)
    request = table_request(args)
    if not args.dry_run:
        check_out(args.out)
    export = exporter(args.format)
    started = time.perf_counter()
    engine = Engine.from_pretrained(
        args.model,
        device=args.device or {"any": "cpu", "cuda": "cuda"}.get(found.device, "cpu"),
        dtype=args.dtype,
        backend="reference",
        network="eager",
    )
    table = request.of(engine)
    if args.dry_run:
        from stepfusion.export.to_torch_tensorrt import dry_run

        print(dry_run(export_program(engine, batch), engine, batch))
        return 0
    options: dict[str, Any] = {}
    if len(found.kinds) > 1:
        options |= {"kind": args.kind, "guided": args.guided}
    if args.format == "triton-server":
        options["backend"] = args.server_backend
    with tqdm(unit="step", disable=args.quiet or not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        if args.format in ("tensorrt", "tensorrt-rtx"):
            options |= {"strip_weights": args.strip_weights, "progress": _shown_on(bar)}
        bundle = export(engine, args.out, batch=batch, table=table, **options)
    if not args.quiet:
        files = bundle.manifest.files
        size = sum((args.out / name).stat().st_size for name in files) / 1e6
        seconds = time.perf_counter() - started
        what = f"{args.dtype} {args.kind} as {args.format}"
        print(f"{args.out}: {what}, {len(files)} files, {size:.1f} MB, {seconds:.1f} s")
    return 0


def read_batch(batch: str, limits: str | None = None) -> Batch:
    """``--batch`` and ``--batch-range`` as a :class:`stepfusion.export.batch.Batch`.

    Raises:
        ValueError: they are not numbers, or contradict each other.
    """
    if batch != "dynamic":
        if limits is not None:
            raise ValueError(f"--batch-range is for --batch dynamic, got --batch {batch}")
        if not batch.isdecimal() or int(batch) < 1:
            raise ValueError(f"--batch must be a number from 1 or 'dynamic', got {batch!r}")
        return Batch.fixed(int(batch))
    if limits is None:
        return DYNAMIC
    sizes = limits.split(":")
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"--batch-range must be LOW:BEST:HIGH, as 1:8:64, got {limits!r}")
    low, best, high = map(int, sizes)
    if not 1 <= low <= best <= high or low == high:
        raise ValueError(f"--batch-range must have 1 <= LOW <= BEST <= HIGH and LOW < HIGH, got {limits!r}")
    return Batch(low, best, high)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options of another format, and a command without a place to write to."""
    if args.out is None and not args.dry_run:
        raise ValueError("--out is needed: the directory of the bundle, which must not exist")
    if args.strip_weights and args.format not in ("tensorrt", "tensorrt-rtx"):
        raise ValueError(f"--strip-weights is an option of --format tensorrt and tensorrt-rtx, got {args.format}")
    if args.guided and args.kind != "tick":
        raise ValueError(f"--guided is an option of --kind tick, got --kind {args.kind}")
    if args.dry_run and args.format != "torch-tensorrt":
        raise ValueError(f"--dry-run is an option of --format torch-tensorrt, got {args.format}")
    if args.server_backend != "onnx" and args.format != "triton-server":
        raise ValueError(f"--server-backend is an option of --format triton-server, got {args.format}")
    device = FORMATS[args.format].device
    if args.device is not None and device != "any" and args.device.partition(":")[0] != device:
        raise ExportError(f"the format {args.format} is written on {device}, got --device {args.device}")


def _shown_on(bar: Any) -> Any:
    """A builder's progress on a bar."""

    def show(phase: str, step: int, steps: int) -> bool:
        bar.set_description(phase)
        bar.update()
        return True

    return show
