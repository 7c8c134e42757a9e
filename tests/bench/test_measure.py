"""How things are timed and compared: with clocks and contenders made up here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

from stepfusion.bench import host, measure
from stepfusion.bench.floors import measure_floors, rates
from stepfusion.bench.kernel_bench import kernel_rows
from stepfusion.bench.latency import idle_share
from stepfusion.bench.measure import Contender, Difference, Limit, contest, difference, interleave, summarise
from stepfusion.engine import Engine

CPU = torch.device("cpu")


def contender(
    name: str, out: torch.Tensor | Exception, run: Callable[[], object] = list, limit: Limit | None = None
) -> Contender:
    def check() -> torch.Tensor:
        if isinstance(out, Exception):
            raise out
        return out

    return Contender(name, torch.zeros(4), check, run, limit or Limit(0.1))


def test_difference_in_closed_form() -> None:
    assert difference(torch.tensor([3.0, -4.0, 0.0, 0.0]), torch.zeros(4)) == Difference(4.0, 2.5)
    assert difference(torch.empty(0), torch.empty(0)) == Difference(0.0, 0.0)
    assert difference(torch.tensor([math.nan]), torch.zeros(1)).max == math.inf


def test_difference_of_integers_does_not_wrap() -> None:
    low, high = torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)
    assert difference(low, high).max == 1.0


def test_difference_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the output has shape \[2\], and the reference \[3\]$"):
        difference(torch.zeros(2), torch.zeros(3))


def test_who_differs_is_refused_before_anything_is_timed() -> None:
    calls: list[str] = []
    verdicts = contest(
        [
            contender("right", torch.full((4,), 0.05), lambda: calls.append("right")),
            contender("wrong", torch.full((4,), 0.2), lambda: calls.append("wrong")),
            contender("nan", torch.full((4,), math.nan), lambda: calls.append("nan")),
        ],
        CPU,
        rounds=2,
    )
    assert set(calls) == {"right"}
    assert verdicts["right"].timing is not None
    assert verdicts["right"].error is None
    assert verdicts["wrong"].timing is None
    assert verdicts["wrong"].error == (
        "the output differs from the reference by max 0.2, rms 0.2, accepted is max 0.1; nothing was timed"
    )
    assert verdicts["nan"].timing is None
    assert "max_difference" not in verdicts["nan"].fields()  # JSON has no infinity


def test_a_limit_on_the_root_mean_square_lets_single_elements_pass() -> None:
    out = torch.tensor([0.3, 0.0, 0.0, 0.0])
    assert not Limit(0.2).holds(difference(out, torch.zeros(4)))
    assert Limit(0.2, "rms").holds(difference(out, torch.zeros(4)))


def test_who_fails_leaves_the_others() -> None:
    late = iter([None, None, None])
    verdicts = contest(
        [
            contender("first", RuntimeError("no\n such luck")),
            contender("later", torch.zeros(4), lambda: next(late)),
            contender("fine", torch.zeros(4)),
        ],
        CPU,
        rounds=3,
    )
    assert verdicts["first"].error == "RuntimeError: no such luck"
    assert verdicts["later"].error is not None
    assert verdicts["later"].error.startswith("StopIteration")
    assert verdicts["fine"].timing is not None


def test_calls_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    order: list[str] = []
    interleave({name: lambda name=name: order.append(name) for name in "ab"}, CPU, rounds=3)  # type: ignore[misc]
    assert "".join(order[-6:]) == "ababab"


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls: list[None] = []
    timing = interleave({"a": lambda: calls.append(None)}, CPU, rounds=4)["a"]
    assert not isinstance(timing, str)
    assert len(calls) > 100
    assert timing.median_ms < 0.5


def test_the_median_is_of_one_call() -> None:
    timing = interleave({"a": lambda: time.sleep(0.01)}, CPU, rounds=3)["a"]
    assert not isinstance(timing, str)
    assert 10 <= timing.median_ms < 100
    assert timing.p20_ms <= timing.median_ms <= timing.p80_ms


def test_quantiles_and_device_time() -> None:
    timing = summarise([(wall / 1e3, wall / 2e3) for wall in (5.0, 1.0, 2.0, 4.0, 3.0, 6.0)])
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms, timing.device_ms) == pytest.approx((3.5, 2.0, 5.0, 1.75))
    assert timing.min_ms == pytest.approx(1.0)
    assert summarise([(1.0, 0.5), (1.0, None)]).device_ms is None


def test_idle_is_what_no_kernel_covers() -> None:
    assert idle_share([(6.0, 10.0), (0.0, 4.0), (1.0, 2.0), (3.0, 5.0)]) == pytest.approx(0.1)
    assert idle_share([(0.0, 1.0)]) == 0.0
    with pytest.raises(ValueError, match=r"^intervals must hold at least one kernel, got none$"):
        idle_share([])


def test_ceilings_are_rates_of_what_was_measured() -> None:
    floors = measure_floors("kernels", CPU, tiny=True)
    found = {(name, dtype): rate for name, dtype, rate in rates(list(floors.rows))}
    assert found["copy", "uint8"] == pytest.approx(floors.copy)
    assert found["matmul", "float32"] == pytest.approx(floors.matmul["float32"])
    copy = floors.rows[0]
    assert copy.bytes == 2 * int(copy.shape or 0)
    assert floors.copy == pytest.approx(1e3 * copy.bytes / (copy.min_ms or 0))


def test_kernels_on_a_cpu_time_the_reference_and_never_the_interpreter() -> None:
    rows = [r for r in kernel_rows(CPU, compiled=False, tiny=True, rounds=2) if not r.op.startswith("ceiling")]
    assert {row.op for row in rows} == {
        "ddim step, no noise",
        "ddim step, noise given",
        "ddim step, noise drawn",
        "ddpm step, noise given",
        "q_sample, noise given",
        "q_sample, noise drawn",
        "posterior",
        "to_uint8",
        "group_norm_silu",
        "layer_norm_modulate",
        "add_layer_norm_modulate",
        "add_projection_",
        "add_projection_doubled",
    }
    assert len([row for row in rows if row.provider == "stepfusion fused"]) == len({(r.op, r.shape) for r in rows})
    for row in rows:
        assert row.error is None
        timed = row.provider not in ("stepfusion fused", "inductor")
        assert (row.median_ms is not None) == timed
        assert timed or (row.notes or "").startswith("not timed: ")
        assert row.bytes
        assert row.flops


def test_a_silent_tick_replays_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed are the engine's own ticks, all of them, and no network."""
    replays: list[None] = []
    monkeypatch.setattr(host._Nothing, "replay", lambda self: replays.append(None))
    engine: Engine = host._silent_engine(host.NoiseSchedule.linear(100), 2)
    host._sampling(engine, 40, 2)()
    assert len(replays) == 40


def test_host_costs_are_small() -> None:
    """Bounds far above the budget, which the report holds: other work on the machine must not fail a test."""
    assert abs(host.tick_cost(3).median_ms) < 0.5
