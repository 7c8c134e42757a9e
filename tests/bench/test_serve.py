"""``stepfusion bench serve``: the rows it makes, and that its judgement is of what happened."""

from collections.abc import Iterator
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from stepfusion.bench import loadgen, serve
from stepfusion.bench.models import load_model
from stepfusion.bench.options import Options
from stepfusion.bench.rows import Row
from stepfusion.engine import Engine
from stepfusion.serving import Result, Timings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(serve.serve_rows(Options(CPU, tiny=True)))


def test_a_rehearsal_measures_both_ways_on_equal_images(rows: list[Row]) -> None:
    assert [row.error for row in rows] == [None] * len(rows)
    measured = {(row.op, row.provider): row for row in rows}
    for provider in (serve.CONTINUOUS, serve.STATIC):
        one, together = measured["one request", provider], measured["all requests", provider]
        assert one.max_difference == 0
        assert 0 < (one.min_ms or 0) <= (one.median_ms or 0) <= (one.p95_ms or 0)
        assert together.images_per_second is not None
    verdict = measured["continuous against static", serve.CONTINUOUS]
    ratio = [measured["all requests", name].median_ms or 0.0 for name in (serve.STATIC, serve.CONTINUOUS)]
    assert verdict.notes == f"{ratio[0] / ratio[1]:.2f}x the throughput of static batches"


@pytest.mark.skipif(find_spec("mlperf_loadgen") is None, reason="needs mlcommons-loadgen")
def test_a_rehearsal_runs_the_scenarios_of_loadgen(rows: list[Row]) -> None:
    scenarios = {row.op: row for row in rows if row.op.startswith("LoadGen")}
    assert list(scenarios) == ["LoadGen SingleStream", "LoadGen Offline", "LoadGen Server"]
    assert all((row.median_ms or 0) > 0 for row in scenarios.values())
    assert not any("mlperf" in str(vars(row)).lower() for row in scenarios.values())


def test_without_loadgen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadgen, "why_not", lambda *names: f"not installed: {names}")
    engine = serve.make_engine(load_model("tiny"), CPU, 2, invariant=True)
    (row,) = loadgen.loadgen_rows("serve", "tiny", engine, Options(CPU, tiny=True))
    assert row.notes == "not installed: ('mlperf_loadgen',)"


def test_images_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a way of batching that makes other images."""
    honest = serve.static

    def other(engine: Engine, traffic: Any) -> serve.Outcome:
        outcome = honest(engine, traffic)
        return serve.Outcome(outcome.latencies, outcome.seconds, outcome.images + 1e-3)

    def none(*_: Any) -> Iterator[Row]:
        return iter(())

    monkeypatch.setattr(serve, "static", other)
    monkeypatch.setattr(serve, "loadgen_rows", none)
    found = list(serve.serve_rows(Options(CPU, tiny=True, batches=(2,))))
    assert "the images of the two differ" in [row.error for row in found]


def test_traffic_is_the_same_each_time_and_near_what_the_lanes_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_tick_seconds", lambda engine: 0.01)
    engine = serve.make_engine(load_model("tiny"), CPU, 4, invariant=True)
    traffic = serve.poisson_traffic(engine, 4000, (10, 30))
    again = serve.poisson_traffic(engine, 4000, (10, 30))
    assert [(a.seconds, len(a.table)) for a in traffic] == [(a.seconds, len(a.table)) for a in again]
    rate = len(traffic) / traffic[-1].seconds
    assert rate == pytest.approx(0.9 * 4 / (0.01 * 20), rel=0.1)
    assert sum(len(arrival.table) == 10 for arrival in traffic) == 2000


def test_latency_counts_from_the_arrival() -> None:
    engine = serve.make_engine(load_model("tiny"), CPU, 2, invariant=True)
    table = engine.table("ddim", 1)
    pending: list[Future[Result]] = []

    def submit(arrival: serve.Arrival) -> Future[Result]:
        pending.append(Future())
        if len(pending) == 2:
            for future in pending:
                future.set_result(Result(torch.zeros(1, 1), Timings(0.0, 0.0, 0.0)))
        return pending[-1]

    outcome = serve.drive([serve.Arrival(0.0, 0, table), serve.Arrival(0.2, 1, table)], submit)
    assert outcome.latencies[0] >= 0.2
    assert outcome.latencies[1] < 0.15
    assert outcome.seconds >= 0.2


def test_a_summary_is_read() -> None:
    text = (
        "Scenario : Server\nScheduled samples per second : 9.5\nResult is : INVALID\n  Min duration satisfied : Yes\n"
    )
    assert loadgen.parse_summary(text) == {"valid": 0.0, "Scheduled samples per second": 9.5}
    assert loadgen.parse_summary(text.replace("INVALID", "VALID"))["valid"] == 1.0
