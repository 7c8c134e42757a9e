"""Device time of short calls, on a fake device with two clocks: a launch takes the host longer than the device."""

import time
from collections.abc import Callable

import pytest
import torch

from stepfusion.bench import device_time
from stepfusion.bench.device_time import Rotation, between_events, device_seconds
from stepfusion.bench.measure import Contender, Limit, contest
from stepfusion_testing import fake_cuda
from stepfusion_testing.fake_cuda import FakeCuda

CUDA = torch.device("cuda", 0)
KERNEL, LAUNCH = 2e-6, 10e-6


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(torch.accelerator, "synchronize", fake.synchronize)
    return fake


def short(fake: FakeCuda) -> Callable[[], None]:
    return lambda: fake.launch(KERNEL, LAUNCH)


def test_between_events_around_launches_lies_the_hosts_time(fake: FakeCuda) -> None:
    """The negative control."""
    call = short(fake)
    _, measured = between_events(lambda: [call() for _ in range(50)], CUDA)
    assert measured / 50 == pytest.approx(LAUNCH, rel=0.1)


def test_behind_a_backlog_there_is_none_of_it(fake: FakeCuda) -> None:
    call = short(fake)
    assert device_seconds(lambda: [call() for _ in range(50)], CUDA) / 50 == pytest.approx(KERNEL)


def test_a_rotation_is_captured_once_and_replayed(fake: FakeCuda) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        fake.launch(KERNEL, LAUNCH)

    rotation = Rotation(call, 5, CUDA)
    assert rotation.why_not is None
    assert len(calls) == 4 * 5, "three times to warm up, once captured"
    assert device_seconds(rotation.launch, CUDA) / 5 == pytest.approx(KERNEL)
    assert len(calls) == 20


def test_what_cannot_be_captured_is_launched_behind_a_backlog(fake: FakeCuda) -> None:
    def waits() -> None:
        if fake.is_current_stream_capturing():
            fake.synchronizes()
        fake.launch(KERNEL, LAUNCH)

    rotation = Rotation(waits, 5, CUDA)
    assert "not permitted when stream is capturing" in (rotation.why_not or "")
    assert device_seconds(rotation.launch, CUDA) / 5 == pytest.approx(KERNEL)
    assert fake.is_clean()


def contender(name: str, run: Callable[[], object], rotation: int | None) -> Contender:
    return Contender(name, torch.zeros(2), lambda: torch.zeros(2), run, Limit(0.1), rotation=rotation)


def test_a_contest_of_short_calls_gives_their_device_time_and_says_how(fake: FakeCuda) -> None:
    """The wall time has the host in it, the device time has not."""

    def waits() -> None:
        if fake.is_current_stream_capturing():
            fake.synchronizes()
        fake.launch(3 * KERNEL, LAUNCH)

    verdicts = contest([contender("fused", short(fake), 8), contender("waits", waits, 8)], CUDA, rounds=3)
    fused, other = (verdicts[name].timing for name in ("fused", "waits"))
    assert fused is not None
    assert other is not None
    assert fused.device_ms == pytest.approx(1e3 * KERNEL)
    assert other.device_ms == pytest.approx(3e3 * KERNEL)
    assert fused.median_ms == pytest.approx(1e3 * LAUNCH, rel=0.1)
    assert verdicts["fused"].notes == "device time of a CUDA graph of 8 calls"
    assert (verdicts["waits"].notes or "").startswith("device time of single launches, for they cannot be captured: ")


def test_replays_take_turns_round_by_round(fake: FakeCuda) -> None:
    order: list[int] = []
    replay = fake_cuda.FakeGraph.replay

    def watched(graph: fake_cuda.FakeGraph) -> None:
        order.append(fake.graphs.index(graph))
        replay(graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_cuda.FakeGraph, "replay", watched)
        contest([contender(name, short(fake), 4) for name in "ab"], CUDA, rounds=3)
    assert order[-12:] == [0, 0, 1, 1] * 3, "one that is timed follows one that says how long the backlog must be"


def test_a_long_call_runs_once_a_sample(fake: FakeCuda) -> None:
    """A backlog would cost its time again, and change nothing."""
    calls: list[int] = []

    def long() -> None:
        calls.append(1)
        fake.launch(0.5, LAUNCH)

    timing = contest([contender("long", long, None)], CUDA, rounds=3)["long"].timing
    assert timing is not None
    assert timing.device_ms == pytest.approx(500.0, rel=1e-3)
    assert len(calls) == 2 + 3, "one to warm up, one to count, one a round"


def test_the_backlog_has_an_end(fake: FakeCuda) -> None:
    device_time._occupy(3600.0)
    assert fake.busy_until < 1.0
