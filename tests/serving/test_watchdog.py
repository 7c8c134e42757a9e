"""An engine thread that hangs: deadlines are kept, everybody is told, and nobody waits for it."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import Any

import pytest
import torch

from stepfusion.serving import AsyncEngine, DeadlineExceeded, EngineClosed, EngineDead, Result, worker
from stepfusion.serving.metrics import Metrics
from stepfusion.serving.open_requests import OpenRequests
from stepfusion.serving.served_request import ServedRequest, Timings
from stepfusion.serving.tracing import Tracing
from stepfusion.serving.watchdog import Patience, Watchdog
from stepfusion_testing.serving_twins import Gate, leaks, offline, small_engine, wait_until_idle

SOON = 0.5  # seconds after which an engine hangs, here
GAUGES = ("lanes", "lanes_busy", "queue_images", "requests_active")
Services = list[AsyncEngine]


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever closes waits only a moment for the tick under way."""
    monkeypatch.setattr(worker, "_LAST_ROUND_SECONDS", 0.2)


def hanging(gate: Gate, hang_after: float | None = None) -> tuple[AsyncEngine, list[Future[Result]]]:
    """A service that has worked and whose thread hangs in a tick, and its requests: in lanes and in the inbox.

    ``hang_after`` holds from this tick on: the ones before may take as long as a busy machine makes them.
    """
    service = AsyncEngine(small_engine(gate), hang_after=None).start()
    service.submit(n=8, steps=1, labels=0).result(30)
    until(lambda: service.registry is None or gauges(service)["lanes"] == 16)
    gate.shut()
    futures = [service.submit(n=8, steps=900, labels=0)]
    gate.wait_for_call()
    futures += [service.submit(n=n, steps=900, labels=0, guidance=g) for n, g in ((8, None), (1, 2.0))]
    be_patient(service, hang_after)
    return service, futures


def be_patient(service: AsyncEngine, seconds: float | None) -> None:
    """Let rounds take so long from now on."""
    service._worker._watchdog._patience = Patience(seconds)


def until(condition: Callable[[], bool], seconds: float = 25.0) -> None:
    """Wait for it; AssertionError if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def thread_of(service: AsyncEngine) -> threading.Thread:
    return service._worker._thread


def gauges(service: AsyncEngine) -> dict[str, float]:
    if service.registry is None:  # prometheus-client is not installed
        return dict.fromkeys(GAUGES, 0.0)
    return {name: service.registry.get_sample_value(f"stepfusion_{name}") or 0.0 for name in GAUGES}


def is_over(service: AsyncEngine, state: str) -> bool:
    """Whether nothing is said to be under way."""
    status = service.status
    said = (status.state, status.waiting, status.busy, status.lanes, status.quiet_seconds)
    return said == (state, 0, 0, 0, 0.0) and gauges(service) == dict.fromkeys(GAUGES, 0.0)


class TestDeadlines:
    def test_they_are_kept_while_the_thread_hangs(self, gate: Gate) -> None:
        service, others = hanging(gate)
        late = [service.submit(n=n, steps=1, labels=0, deadline=1.0) for n in (1, 8)]
        for future, n in zip(late, (1, 8), strict=True):
            with pytest.raises(DeadlineExceeded, match=f"the deadline passed when 0 of {n} images were done"):
                future.result(25)
        assert not any(future.done() for future in others), "the gate is still shut"
        gate.open()
        assert all(bool(future.result(100).images.isfinite().all()) for future in others)
        wait_until_idle(service)
        assert leaks(service) == {}
        assert service.close()

    def test_of_a_request_in_lanes(self, gate: Gate) -> None:
        service = AsyncEngine(small_engine(gate)).start()
        gate.shut()
        late = service.submit(n=8, steps=500, labels=0, deadline=0.4)
        gate.wait_for_call()
        with pytest.raises(DeadlineExceeded):
            late.result(25)
        other = service.submit(n=8, steps=2, labels=1, seed=5)
        calls = gate.calls
        gate.open()
        assert torch.equal(
            other.result(30).images, offline(small_engine(), {"n": 8, "steps": 2, "labels": 1, "seed": 5})
        )
        assert gate.calls <= calls + 3, "its lanes were free by the next tick"
        wait_until_idle(service)
        assert leaks(service) == {}
        service.close()

    @pytest.mark.parametrize("first", [(), (1000.0,)])
    def test_a_watchdog_that_sleeps_long_wakes_for_a_deadline(self, first: tuple[float, ...]) -> None:
        """For one that it was told of before it slept, and for one that comes earlier than what it sleeps for."""
        requests, patience, engine = OpenRequests(Metrics(), Tracing()), Patience(None), small_engine()
        patience.interval = 3600.0

        def job(seconds: float) -> ServedRequest:
            deadline = time.monotonic() + seconds
            made = ServedRequest(engine.request(1, steps=1, labels=0), number=next(numbers), submitted=0.0)
            made.deadline = deadline
            requests.add(made)
            return made

        numbers = itertools.count()
        watchdog = Watchdog(requests, patience, lambda: None, lambda since: False)
        before = [job(seconds) for seconds in (*first, 0.1)]
        watchdog.start()
        assert isinstance(before[-1].future.exception(25), DeadlineExceeded)
        late = job(0.1)
        watchdog.expect(late.deadline)
        assert isinstance(late.future.exception(25), DeadlineExceeded)
        assert not any(one.future.done() for one in before[:-1])
        watchdog.stop()
        watchdog.thread.join(25)
        assert not watchdog.thread.is_alive()


class TestHangs:
    def test_everybody_is_told_and_the_engine_is_dead(self, gate: Gate) -> None:
        service, futures = hanging(gate, hang_after=SOON)
        for future in futures:
            with pytest.raises(EngineDead, match=r"^the engine is dead: TimeoutError: no tick has ended for \d.* s$"):
                future.result(25)
        assert (service.live, service.ready, service.left_behind) == (False, False, True)
        assert is_over(service, "dead")
        with pytest.raises(EngineDead, match="no tick has ended"):
            service.submit(1, steps=1, labels=0)
        assert service.close() is False, "and whoever closes does not wait for it"

    def test_a_thread_that_comes_back_ends_and_touches_nothing(
        self, gate: Gate, caplog: pytest.LogCaptureFixture
    ) -> None:
        told: list[str] = []
        service, futures = hanging(gate, hang_after=SOON)
        for future in futures:
            future.add_done_callback(lambda future: told.append(type(future.exception()).__name__))
        wait_for(futures, 25)
        calls = gate.calls
        caplog.clear()
        gate.open()
        thread_of(service).join(25)
        assert not thread_of(service).is_alive()
        assert gate.calls <= calls + 1, "two pools may tick in the round that it was in"
        assert told == ["EngineDead"] * 3
        assert is_over(service, "dead")
        assert not service.left_behind
        assert caplog.records == []

    def test_a_thread_that_comes_back_with_an_error(self, gate: Gate) -> None:
        def network(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            out = gate(x, timesteps, labels)
            if failing.is_set():
                raise RuntimeError("the device was reset")
            return out

        failing = threading.Event()
        service = AsyncEngine(small_engine(network), hang_after=SOON).start()
        gate.shut()
        failing.set()
        assert isinstance(service.submit(1, steps=2, labels=0).exception(25), EngineDead)
        gate.open()
        thread_of(service).join(25)
        with pytest.raises(EngineDead, match="no tick has ended"):
            service.submit(1, steps=1, labels=0)

    def test_the_log_says_where_it_hangs(self, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
        service, futures = hanging(gate, hang_after=SOON)
        wait_for(futures, 25)
        (record,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
        assert "no tick has ended for" in record.getMessage()
        assert "serving_twins.py" in record.getMessage()
        service.close()

    def test_a_callback_that_hangs_is_a_hang(self) -> None:
        release = threading.Event()
        service = AsyncEngine(small_engine(), hang_after=SOON).start()
        stuck = service.submit(1, steps=3, labels=0, progress=lambda event: release.wait(30))
        assert isinstance(stuck.exception(25), EngineDead)
        release.set()
        thread_of(service).join(25)
        assert not thread_of(service).is_alive()

    def test_start_up_does_not_count(self, gate: Gate) -> None:
        gate.shut()
        service = AsyncEngine(small_engine(gate), hang_after=0.1)
        starting = threading.Thread(target=service.start)
        starting.start()
        gate.wait_for_call()
        time.sleep(1.0)
        assert service.status.state == "starting"
        gate.open()
        starting.join(25)
        assert service.ready
        be_patient(service, None)
        assert service.close()

    def test_idle_time_does_not_count(self, gate: Gate) -> None:
        service = AsyncEngine(small_engine(gate), hang_after=60).start()
        service.submit(1, steps=1, labels=0).result(30)
        wait_until_idle(service)
        time.sleep(1.0)
        gate.shut()
        before = time.monotonic()
        service.submit(1, steps=1, labels=0)
        gate.wait_for_call()
        assert service.status.quiet_seconds <= time.monotonic() - before
        gate.open()
        service.close()

    @pytest.mark.parametrize(
        ("given", "error"), [(0, ValueError), (-1, ValueError), (math.nan, ValueError), ("1", TypeError)]
    )
    def test_bad_times(self, given: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match=f"hang_after must be a .*got {given!r}"):
            AsyncEngine(small_engine(), hang_after=given)


class TestPatience:
    def test_rounds_that_end_never_hang(self) -> None:
        patience = Patience(10.0)
        assert not any(patience.look(float(now), now - now % 9) for now in range(1000))

    def test_a_round_that_does_not_end_hangs_after_its_time(self) -> None:
        patience = Patience(10.0)
        assert next(now for now in range(30) if patience.look(float(now), 3.0)) == 13
        assert not any(patience.look(30.0 + now, None) for now in range(100)), "there is nothing to do"

    def test_time_in_which_the_process_was_stopped_does_not_count(self) -> None:
        patience = Patience(10.0)
        assert not patience.look(4.0, 3.0)
        assert not patience.look(1000.0, 3.0)
        assert next(now for now in range(1000, 1020) if patience.look(float(now), 3.0)) == 1010

    def test_for_ever(self) -> None:
        patience = Patience(None)
        assert not any(patience.look(float(now), 0.0) for now in range(10_000))

    @pytest.mark.parametrize("seconds", [0.01, 1.0, 300.0, None])
    def test_it_looks_often_enough(self, seconds: float | None) -> None:
        assert 0 < Patience(seconds).interval <= min(1.0, (seconds or 10) / 4)


@pytest.mark.usefixtures("impatient")
class TestClosing:
    @pytest.mark.parametrize("drain", [False, True])
    def test_close_ends_in_time_whatever_the_thread_does(self, gate: Gate, drain: bool) -> None:
        service, futures = hanging(gate)
        assert service.close(drain=drain, timeout=0.1) is False
        for future in futures:
            with pytest.raises(EngineClosed, match="closed before this request was done"):
                future.result(0)
        assert service.left_behind
        assert is_over(service, "closed")
        with pytest.raises(EngineClosed, match="it was closed"):
            service.submit(1, steps=1, labels=0)
        gate.open()
        thread_of(service).join(25)
        assert not service.left_behind
        assert is_over(service, "closed")

    def test_draining_without_a_limit_ends_when_the_engine_is_declared_dead(self, gate: Gate) -> None:
        service, futures = hanging(gate, hang_after=SOON)
        closed: list[bool] = []
        closing = threading.Thread(target=lambda: closed.append(service.close()))
        closing.start()
        closing.join(25)  # before the gate itself gives up
        assert closed == [False]
        assert all(isinstance(future.exception(0), EngineDead) for future in futures)
        assert service.status.state == "dead"

    def test_while_it_hangs_in_warming_up(self, gate: Gate) -> None:
        gate.shut()
        service = AsyncEngine(small_engine(gate))
        errors: list[str] = []

        def start() -> None:
            with pytest.raises(EngineClosed) as raised:
                service.start()
            errors.append(str(raised.value))

        starting = threading.Thread(target=start)
        starting.start()
        gate.wait_for_call()
        service.close()
        starting.join(25)
        assert errors == ["the engine takes no requests: it was closed"]
        gate.open()
        thread_of(service).join(25)
        assert service.status.state == "closed"

    def test_a_service_that_nobody_has_any_more(self, gate: Gate) -> None:
        service, futures = hanging(gate)
        thread = thread_of(service)
        del service
        gc.collect()
        assert all(isinstance(future.exception(0), EngineClosed) for future in futures)
        gate.open()
        thread.join(25)
        assert not thread.is_alive()

    @pytest.mark.parametrize("way", ["progress", "future"])
    def test_from_its_own_thread_it_is_refused(self, gate: Gate, way: str) -> None:
        said: list[str] = []

        def close(_: object) -> None:
            with pytest.raises(RuntimeError) as raised:
                service.close()
            said.append(str(raised.value))

        service = AsyncEngine(small_engine(gate)).start()
        gate.shut()
        future = service.submit(1, steps=1, labels=0, progress=close if way == "progress" else None)
        if way == "future":
            future.add_done_callback(close)
        gate.open()
        assert future.result(30).images.isfinite().all()
        wait_until_idle(service)
        assert service.close()
        assert said == ["close was called in a thread of the engine, which it would have to wait for"]


HANGS = """
import threading, time
import stepfusion as sf
from stepfusion.serving import worker

worker._LAST_ROUND_SECONDS = 0.5
hanging = threading.Event()
def network(x, t):
    if hanging.is_set():
        print("hangs", flush=True)
        {hang}
    return x

engine = sf.Engine(network, sf.NoiseSchedule.linear(), shape=(1, 2, 2), device="cpu")
service = sf.serving.AsyncEngine(engine).start()
hanging.set()
future = service.submit(4, steps=1000)
while service.status.quiet_seconds < 0.2:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    "hang",
    ["import ctypes; ctypes.CDLL(None).pause()", pytest.param("threading.Event().wait()", marks=pytest.mark.soak)],
)
def test_the_interpreter_exits_while_the_thread_hangs(hang: str) -> None:
    """In Python code, and in a library."""
    command = [sys.executable, "-P", "-c", HANGS.format(hang=hang)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "hangs\n")


# Once each


class Counts(Metrics):
    """Metrics that count the ends."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def ended(self, outcome: str, images: int, timings: Timings) -> None:
        with self._lock:
            self.outcomes[outcome] += 1


def test_of_many_threads_one_ends_a_request() -> None:
    engine, metrics = small_engine(), Counts()
    requests = OpenRequests(metrics, Tracing())
    jobs = [ServedRequest(engine.request(1, steps=1, labels=0), number=i, submitted=0.0) for i in range(500)]
    for job in jobs:
        requests.add(job)
    together, ended = threading.Barrier(4), list[int]()

    def end_all(name: str) -> None:
        together.wait(30)
        ended.append(requests.end_all(name, KeyError(name)))

    threads = [threading.Thread(target=end_all, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(ended) == sum(metrics.outcomes.values()) == 500
    assert len(requests) == 0
    assert Counter(job.future.exception(0).args[0] for job in jobs) == metrics.outcomes  # type: ignore[union-attr]


def test_deadlines_that_both_threads_keep_end_each_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that pass at any moment of a round, beside cancellations and results."""
    from stepfusion.serving import async_engine

    metrics, rng = Counts(), random.Random(3)
    monkeypatch.setattr(async_engine, "make_metrics", lambda: metrics)
    service = AsyncEngine(small_engine(), queue=100_000).start()
    futures: list[Future[Result]] = []
    for number in range(600):
        deadline = rng.uniform(0.001, 0.2) if number % 2 else None
        try:
            futures.append(service.submit(rng.randint(1, 9), steps=rng.randint(1, 30), labels=0, deadline=deadline))
        except DeadlineExceeded:
            continue
        if number % 7 == 0:
            rng.choice(futures).cancel()
    wait_for(futures, 100)
    wait_until_idle(service)
    assert leaks(service) == {}
    assert service.close()
    assert sum(metrics.outcomes.values()) == len(futures)
    assert metrics.outcomes["done"] + metrics.outcomes["deadline"] + metrics.outcomes["cancelled"] == len(futures)
    assert metrics.outcomes["done"] > 0
    for future in futures:
        with suppress(DeadlineExceeded, CancelledError):
            assert future.result(0).images.isfinite().all()
