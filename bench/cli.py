"""``stepfusion bench``: measure kernels, latency, throughput and peers, or all of it with one report."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stepfusion import _checks
from stepfusion.bench.models import PUBLISHED, load_model
from stepfusion.bench.options import Options, check_names
from stepfusion.bench.parts import PARTS, measure
from stepfusion.bench.report import REPORT_FILE, read, replace_part, write
from stepfusion.bench.rows import End, Record, aligned, latest, rows_of, table, to_line
from stepfusion.bench.suite import CPU_FACTOR, LIMITS, run_suite
from stepfusion.execution.plan import DTYPES, choose_device

_EXAMPLES = """examples:
  stepfusion bench suite --out results           everything, in under ten minutes on one GPU
  stepfusion bench suite --out rehearsal --tiny  the same with every size shrunk, in a minute on a CPU
  stepfusion bench compare --peer diffusers --device cpu --json
  stepfusion bench kernels --device cuda --out results"""
_HELP = {
    "kernels": "every fused operation against its reference, Inductor, PyTorch and diffusers",
    "latency": "time to the images of small batches, and where a tick's time goes",
    "throughput": "images a second against the batch",
    "compare": "one evaluation and a whole loop, by everyone who can run them",
    "exports": "the network in every format it can be exported to, loaded back",
    "headline": "32 images of a small UNet: DDPM-500 against DDIM-25, as a notebook loop and by the engine",
    "host": "what the engine's own Python costs a tick, and what the import costs",
    "start": "a fresh process to its first image, by sample, serve and an exported bundle: caches empty, and warm",
    "serve": "continuous against static batching of mixed requests, and LoadGen's scenarios",
}
_PEERS = ("diffusers", "openvino", "onnxruntime", "inductor", "eager")
_MOST = 1 << 20


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``stepfusion bench``."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, text in _HELP.items():
        part = parts.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        _add_common(part)
        if name in ("latency", "throughput", "compare", "exports", "serve", "start"):
            models = ", ".join(PUBLISHED)
            part.add_argument(
                "--model", action="append", help=f"{models} (random weights), a bundled model, or a model directory"
            )
            part.add_argument("--steps", type=int, metavar="K", help="how many steps the loops have")
        if name in ("latency", "throughput", "compare"):
            part.add_argument(
                "--peer",
                action="append",
                choices=(*_PEERS, "all"),
                help="measure these peers alone, beside stepfusion (default: all)",
            )
            part.add_argument(
                "--providers", metavar="NAMES", help="measure these providers alone, by name, separated by commas"
            )
            part.add_argument("--dtype", choices=tuple(DTYPES)[:2], help="measure networks in this dtype alone")
        if name in ("latency", "throughput", "compare", "exports", "headline", "serve"):
            part.add_argument("--batch", type=int, action="append", metavar="B", help="images; may be repeated")
        part.add_argument("--rounds", type=int, metavar="R", help="how many rounds of interleaved timing")
    text = "all parts, each in a process of its own, and one report; a part that is done is not measured again"
    suite = parts.add_parser("suite", help=text, description=text[0].upper() + text[1:] + ".")
    _add_common(suite)
    suite.add_argument("--parts", metavar="NAMES", help=f"separated by commas (default: {','.join(PARTS)})")
    suite.add_argument("--force", action="store_true", help="measure parts that are done, too")
    suite.add_argument("--limit", type=float, metavar="S", help="seconds for each part, instead of its own limit")


def run_bench(args: argparse.Namespace) -> int:
    """Measure as ``args`` say. Returns 0, or 1 if something failed: its row, and one line on stderr, say why.

    Raises:
        TypeError, ValueError: naming the argument, before any work.
    """
    return _run_suite(args) if args.part == "suite" else _run_part(args)


def _run_part(args: argparse.Namespace) -> int:
    options = _options(args)
    _check_folder(args.out)
    before = [] if args.out is None else read(args.out)
    told = f"stepfusion: {args.part} on {options.device}: {_estimate(args.part, options, before)}"
    print(told, file=sys.stderr, flush=True)
    records: list[Record] = []
    started = time.monotonic()
    try:
        for record in measure(args.part, options):
            records.append(record)
            if args.json:
                print(to_line(record), flush=True)
    except (KeyboardInterrupt, SystemExit):
        # What was measured is kept: a part of an hour may be ended because its first rows said enough.
        records.append(End(args.part, "stopped", time.monotonic() - started, "It was ended before it was done."))
        _finish(args, records)
        raise
    return _status(_finish(args, records))


def _finish(args: argparse.Namespace, records: Sequence[Record]) -> list[Record]:
    """Print and write what was measured; returns the records, the latest of each."""
    found = latest(records)
    if not args.json:
        print(aligned(*table(rows_of(found))), flush=True)
    if args.out is not None and rows_of(found):
        write(args.out, replace_part(read(args.out), args.part, found))
    return found


def _estimate(part: str, options: Options, before: Sequence[Record]) -> str:
    """How long a part takes: as the last time, if that is known, else at most as the suite lets it."""
    known = [
        record.seconds
        for record in before
        if isinstance(record, End) and (record.part, record.status) == (part, "done")
    ]
    early = "Ctrl-C ends it and keeps what was measured"
    if known:
        return f"about {duration(known[-1])}, as the last time; {early}"
    if options.tiny or part not in LIMITS:
        return f"a minute or a few; {early}" if options.tiny else early
    limit = LIMITS[part] * (1.0 if options.device.type == "cuda" else CPU_FACTOR)
    return f"up to {duration(limit)}, after which the suite stops it; {early}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _run_suite(args: argparse.Namespace) -> int:
    if args.out is None:
        raise ValueError("--out is needed: the folder of the suite's rows, pictures and report")
    parts = tuple(PARTS) if args.parts is None else tuple(args.parts.split(","))
    check_names("--parts", parts, tuple(PARTS))
    if args.limit is not None:
        _checks.number("--limit", args.limit, 0.0, 1e6, open_low=True)
    device, _ = choose_device(args.device)
    _check_folder(args.out)
    factor = 1.0 if device.type == "cuda" else CPU_FACTOR
    limits = {part: factor * limit if args.limit is None else args.limit for part, limit in LIMITS.items()}
    flags = [flag for flag, given in (("--tiny", args.tiny), ("--compile", args.compile)) if given]

    def command(part: str) -> list[str]:
        # -P: the folder it is started in does not come before what is installed
        return [sys.executable, "-P", "-m", __spec__.name, part, "--json", "--device", str(device), *flags]

    ends = run_suite(args.out, parts, command, limits, force=args.force)
    records = [record for record in read(args.out) if record.part in parts]
    if args.json:
        print("\n".join(to_line(record) for record in records))
    else:
        print(aligned(("part", "ended", "seconds"), [(e.part, e.status, f"{e.seconds:.0f}") for e in ends]))
        print(args.out / REPORT_FILE)
    return _status(records)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print rows as lines of JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write rows, pictures and a report into this folder")
    parser.add_argument("--tiny", action="store_true", help="shrink every size, to rehearse; nothing is compiled")
    parser.add_argument("--compile", action="store_true", help="let compilers take part with --tiny, too")


def _options(args: argparse.Namespace) -> Options:
    """The options of one part, each checked; models are looked for, too."""
    device, _ = choose_device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be a CPU or a CUDA device, got {args.device!r}")
    given = vars(args)
    for name in ("steps", "rounds"):
        if given.get(name) is not None:
            _checks.integer(f"--{name}", given[name], 1, _MOST)
    batches = given.get("batch")
    for batch in batches or ():
        _checks.integer("--batch", batch, 1, _MOST)
    models = given.get("model")
    for model in models or ():
        load_model(model)
    peers = given.get("peer")
    names = given.get("providers")
    options = Options(
        device=device,
        tiny=args.tiny,
        compiled=not args.tiny or args.compile,
        models=None if models is None else tuple(models),
        batches=None if batches is None else tuple(batches),
        steps=given.get("steps"),
        rounds=given.get("rounds"),
        dtype=given.get("dtype"),
        families=None if peers is None or "all" in peers else tuple(peers),
        providers=None if names is None else tuple(names.split(",")),
        command=_told(["stepfusion", *args.words], args.out),
    )
    options.select()
    return options


def _told(words: Sequence[str], out: Path | None) -> str:
    """A command line as rows and reports have it: of the folder for results its name, and nothing of this machine."""
    told = shlex.join(words)
    return told if out is None else told.replace(shlex.quote(str(out)), shlex.quote(out.name or "."))


def _check_folder(folder: Path | None) -> None:
    """Refuse, before any work, what cannot be the folder of results."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, got {str(folder)!r}, which is a file")
    read(folder)


def _status(records: Sequence[Record]) -> int:
    """0, or 1 and one line on stderr if a part or a row failed."""
    parts = [f"{end.part} {end.status}" for end in records if isinstance(end, End) and end.status != "done"]
    failed = [row for row in rows_of(records) if row.error is not None]
    rows = [f"{failed[0].provider}, {failed[0].op}: {failed[0].error} ({len(failed)} rows failed)"] if failed else []
    if parts or failed:
        print(f"stepfusion: {'; '.join((*parts, *rows))}", file=sys.stderr)
    return 1 if parts or failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``stepfusion bench`` alone; what the suite starts for each part."""
    parser = argparse.ArgumentParser(prog="stepfusion bench")
    add_bench_arguments(parser)
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser.parse_args(given)
    args.words = ["bench", *given]
    return run_bench(args)


if __name__ == "__main__":
    sys.exit(main())
