"""MLCommons' LoadGen against a serving engine: its SingleStream, Server and Offline scenarios.

LoadGen decides when requests come and judges the latencies. Its runs are short here, on models and limits of our
choosing, so they are no MLPerf results and are not called so.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepfusion.bench.optional import need, why_not
from stepfusion.bench.options import Options
from stepfusion.bench.rows import Row
from stepfusion.engine import Engine
from stepfusion.serving import AsyncEngine

_SAMPLES = 64  # distinct requests
_MS = 1e-6  # of a nanosecond
_SERVER_LOAD = 0.5  # of the offline rate: what the server scenario asks for
_SUMMARY = "mlperf_log_summary.txt"
_PROVIDER = "stepfusion continuous"


@dataclass(frozen=True)
class Length:
    """How long a scenario runs, at least: both, and until its statistics are settled."""

    queries: int
    seconds: float


def loadgen_rows(part: str, name: str, engine: Engine, options: Options) -> Iterator[Row]:
    """A row for each scenario: latencies of a request of one image; for Offline the time of all."""
    device, steps = engine.plan.device.type, options.steps or (2 if options.tiny else 10)
    length = Length(4, 0.0) if options.tiny else Length(64, 10.0)
    common: dict[str, Any] = {
        "model": name,
        "shape": "x".join(map(str, (1, *engine.shape))),
        "dtype": str(engine.plan.dtype).removeprefix("torch."),
    }
    reason = why_not("mlperf_loadgen")
    if reason is not None:
        yield Row(part, "LoadGen", _PROVIDER, device, notes=reason, **common)
        return
    service = AsyncEngine(engine, queue=1 << 20).start()
    try:
        single = run_scenario(service, "SingleStream", steps, length)
        yield _row(part, "SingleStream", device, steps, single, common)
        offline = run_scenario(service, "Offline", steps, length, rate=1e9 / single["50.00 percentile latency (ns)"])
        yield _row(part, "Offline", device, steps, offline, common)
        asked = _SERVER_LOAD * offline["Samples per second"]
        limit = 4e-9 * single["90.00 percentile latency (ns)"]
        server = run_scenario(service, "Server", steps, length, rate=asked, limit_seconds=limit)
        yield _row(part, "Server", device, steps, server, common, f", {asked:.3g} a second, limit {limit:.3g} s")
    finally:
        service.close()


def run_scenario(
    service: AsyncEngine,
    scenario: str,
    steps: int,
    length: Length,
    *,
    rate: float = 1.0,
    limit_seconds: float = 1.0,
) -> dict[str, float]:
    """Run one scenario, and return the numbers of LoadGen's summary by their names; "valid" is 1 or 0.

    Args:
        rate: requests a second, which Server sends and Offline expects. limit_seconds: what Server holds the 99th
            percentile of the latencies against.
    """
    lg = need("mlperf_loadgen")
    table = service.engine.table("ddim", steps)

    def answer(query: int) -> Any:
        return lambda future: lg.QuerySamplesComplete([lg.QuerySampleResponse(query, 0, 0)])

    def issue(samples: Any) -> None:
        for sample in samples:
            future = service.submit(1, table, seed=sample.index, labels=label(service.engine), output="uint8")
            future.add_done_callback(answer(sample.id))

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_query_count = length.queries
    settings.min_duration_ms = int(1e3 * length.seconds)
    settings.offline_expected_qps = settings.server_target_qps = rate
    settings.server_target_latency_ns = int(1e9 * limit_seconds)
    with tempfile.TemporaryDirectory() as folder:
        logs = lg.LogSettings()
        logs.log_output.outdir = folder
        logs.log_output.copy_summary_to_stdout = False
        logs.enable_trace = False
        system = lg.ConstructSUT(issue, _nothing)
        library = lg.ConstructQSL(_SAMPLES, _SAMPLES, _ignore, _ignore)
        try:
            lg.StartTestWithLogSettings(system, library, settings, logs, str(Path(folder) / "audit.config"))
        finally:
            lg.DestroyQSL(library)
            lg.DestroySUT(system)
        return parse_summary((Path(folder) / _SUMMARY).read_text(encoding="utf-8"))


def parse_summary(text: str) -> dict[str, float]:
    """The numbers of a LoadGen summary by their names, and "valid"."""
    pairs = re.findall(r"^\s*(\S[^:\n]*?)\s*:\s*(\S+)\s*$", text, re.MULTILINE)
    found = {"valid": float(dict(pairs).get("Result is") == "VALID")}
    for name, value in pairs:
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


def label(engine: Engine) -> int | None:
    """A label for an engine whose model wants one."""
    return None if engine.num_classes is None else 0


def _row(
    part: str,
    scenario: str,
    device: str,
    steps: int,
    found: Mapping[str, float],
    common: Mapping[str, Any],
    conditions: str = "",
) -> Row:
    valid = "valid" if found["valid"] else "not valid: too short or too slow for LoadGen's rules"
    row = Row(part, f"LoadGen {scenario}", _PROVIDER, device, **common, steps=steps, notes=f"{valid}{conditions}")
    if scenario == "Offline":
        return Row(**{**vars(row), "batch": 1, "median_ms": 1e3 / found["Samples per second"]})
    latency = {f"{p}": found[f"{p}.00 percentile latency (ns)"] * _MS for p in (50, 95)}
    return Row(
        **{
            **vars(row),
            "median_ms": latency["50"],
            "p95_ms": latency["95"],
            "min_ms": found["Min latency (ns)"] * _MS,
        }
    )


def _nothing() -> None:
    """LoadGen's flush: nothing is held back."""


def _ignore(samples: list[int]) -> None:
    """Requests are numbers: nothing is loaded."""
