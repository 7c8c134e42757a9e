"""The parts of the suite by name, each a function from options to rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from stepfusion.bench import compare, headline, host, kernel_bench, latency, serve, start, throughput
from stepfusion.bench.conditions import conditions
from stepfusion.bench.options import Options
from stepfusion.bench.rows import End, Record, Row

PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "kernels": lambda options: kernel_bench.kernel_rows(
        options.device,
        compiled=options.compiled,
        tiny=options.tiny,
        rounds=options.rounds or (3 if options.tiny else 15),
    ),
    "latency": latency.latency_rows,
    "throughput": throughput.throughput_rows,
    "compare": compare.compare_rows,
    "exports": compare.export_rows,
    "headline": headline.headline_rows,
    "host": host.host_rows,
}

#: Parts that the suite leaves out: they take the time that they are given.
ALONE: dict[str, Callable[[Options], Iterator[Row]]] = {
    "serve": serve.serve_rows,
    "start": start.start_rows,
}


def measure(part: str, options: Options) -> Iterator[Record]:
    """The conditions, the rows as they are measured, and how long it took."""
    started = time.monotonic()
    yield conditions(part, options)
    yield from {**PARTS, **ALONE}[part](options)
    yield End(part, "done", time.monotonic() - started)
