"""The service as its callers see it: results, refusals, cancelling, closing, dying."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.serving import AsyncEngine, DeadlineExceeded, EngineClosed, EngineDead, Overloaded, Result
from stepfusion_testing.networks import labelled
from stepfusion_testing.serving_twins import SHAPE, Gate, leaks, offline, small_engine, wait_until_idle

REQUEST: dict[str, Any] = {"n": 2, "steps": 4, "labels": [0, 1], "seed": 3}


async def run(engine: sf.Engine, **request: Any) -> Result:
    async with AsyncEngine(engine) as service:
        return await service.generate(**request)


def test_a_result_is_what_sample_returns() -> None:
    engine = small_engine()
    result = asyncio.run(run(engine, **REQUEST))
    assert torch.equal(result.images, engine.sample(**REQUEST))
    assert result.timings.total == pytest.approx(result.timings.queued + result.timings.running)
    pixels = asyncio.run(run(engine, **REQUEST, output="uint8"))
    assert torch.equal(pixels.images, engine.to_uint8(engine.sample(**REQUEST)))


def test_a_request_that_was_made_before() -> None:
    engine = small_engine()
    request = engine.request(**REQUEST)
    result = asyncio.run(run(engine, n=request))
    assert torch.equal(result.images, engine.sample(request))


def test_a_table_and_a_table_for_each_image() -> None:
    engine = small_engine()
    tables = [engine.table(steps=5), engine.table("ddpm", 3)]
    for table in (tables[0], tables):
        result = asyncio.run(run(engine, n=2, table=table, labels=0))
        assert torch.equal(result.images, engine.sample(2, table, labels=0))


@pytest.mark.parametrize(("invariant", "widths"), [(True, {8}), (False, {1, 2, 4, 8})])
def test_an_invariant_engine_has_one_width(invariant: bool, widths: set[int]) -> None:
    seen: set[int] = set()

    def sees(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.add(len(x))
        return x

    engine = small_engine(sees, num_classes=None, null_label=None, invariant=invariant)
    asyncio.run(run(engine, n=3, steps=2))
    assert seen == widths


def test_threads_submit() -> None:
    engine = small_engine()
    wanted = [engine.sample(n=2, steps=4, labels=0, seed=seed) for seed in range(8)]
    with_service = AsyncEngine(engine).start()
    same: list[bool] = []

    def work(seed: int) -> None:
        result = with_service.submit(n=2, steps=4, labels=0, seed=seed).result(30)
        same.append(torch.equal(result.images, wanted[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert with_service.close()
    assert same == [True] * 8


def test_two_services_in_one_process() -> None:
    one, other = small_engine(), small_engine(lambda x, t, labels: -labelled(x, t, labels))

    async def both() -> list[Result]:
        async with AsyncEngine(one) as first, AsyncEngine(other) as second:
            services = [first, second] * 10
            return await asyncio.gather(*(service.generate(**REQUEST) for service in services))

    results = asyncio.run(both())
    for engine, result in zip([one, other] * 10, results, strict=True):
        assert torch.equal(result.images, engine.sample(**REQUEST))
    assert not torch.equal(one.sample(**REQUEST), other.sample(**REQUEST))


class TestStreams:
    @staticmethod
    async def read(engine: sf.Engine, **request: Any) -> list[Any]:
        async with AsyncEngine(engine) as service:
            return [item async for item in service.stream(**request)]

    def test_events_and_then_the_result(self) -> None:
        engine = small_engine()
        *events, result = asyncio.run(self.read(engine, **REQUEST, every=2))
        assert [event.step for event in events] == [1, 3]
        assert torch.equal(events[-1].x, engine.sample(**REQUEST))
        assert torch.equal(result.images, events[-1].x)

    def test_a_failure_comes_out_of_the_loop(self) -> None:
        with pytest.raises(sf.NonFiniteError):
            asyncio.run(self.read(small_engine(), n=1, steps=2, labels=3))
        with pytest.raises(ValueError, match="steps"):
            asyncio.run(self.read(small_engine(), n=1, steps=0))

    def test_leaving_the_loop_frees_the_lanes(self) -> None:
        gate = Gate()

        async def leave() -> dict[str, int]:
            async with AsyncEngine(small_engine(gate)) as service:
                stream = service.stream(n=8, steps=900, labels=0)
                async for _ in stream:
                    break
                await stream.aclose()
                await asyncio.to_thread(wait_until_idle, service)
                return leaks(service)

        assert asyncio.run(leave()) == {}
        assert gate.calls < 800

    def test_a_slow_reader_misses_events_and_gets_the_result(self) -> None:
        async def slow() -> list[Any]:
            async with AsyncEngine(small_engine()) as service:
                items = []
                async for item in service.stream(n=1, steps=300, labels=0):
                    items.append(item)
                    if len(items) == 1:
                        await asyncio.to_thread(wait_until_idle, service)
                        await asyncio.sleep(0.05)
                return items

        *events, result = asyncio.run(slow())
        assert len(events) < 200
        assert events[-1].step == 299
        assert torch.equal(result.images, events[-1].x)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def service(gate: Gate) -> Any:
    """A service with room for 16 waiting images, whose network stops on demand."""
    made = AsyncEngine(small_engine(gate), queue=16).start()
    yield made
    gate.open()
    made.close(drain=False)


class TestRefusals:
    def test_too_much_is_refused_at_once_with_a_hint(self, gate: Gate, service: AsyncEngine) -> None:
        service.submit(n=1, steps=5, labels=0).result(30)
        gate.shut()
        running = service.submit(n=8, steps=2, labels=0)
        gate.wait_for_call()
        waiting = [service.submit(n=8, steps=2, labels=0) for _ in range(2)]
        with pytest.raises(Overloaded, match="16 images are waiting, 1 more would exceed the queue's 16") as caught:
            service.submit(n=1, steps=2, labels=0)
        assert 0 < caught.value.retry_after < 30
        gate.open()
        assert all(future.result(30).images.isfinite().all() for future in (running, *waiting))
        assert service.submit(n=16, steps=1, labels=0).result(30).images.shape == (16, *SHAPE)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n": 17}, "n must be at most 16, the length of the queue, got 17"),
            ({"priority": 1001}, r"priority must be in \[-1000, 1000\]"),
            ({"deadline": 0}, "deadline must be a finite number"),
            ({"output": "png"}, "output must be one of 'float32', 'uint8'"),
            ({"every": 0}, "every must be in"),
            ({"progress": 3}, "progress must be callable, got 3"),
            ({"guidance": -1.0}, "guidance must be a finite number"),
            ({"labels": [9]}, "labels must be in"),
        ],
        ids=str,
    )
    def test_bad_arguments_are_named_before_any_work(
        self, gate: Gate, service: AsyncEngine, arguments: dict[str, Any], message: str
    ) -> None:
        calls = gate.calls
        with pytest.raises((ValueError, TypeError), match=message):
            service.submit(**{"n": 1, "steps": 2, "labels": 0, **arguments})
        assert (gate.calls, leaks(service)) == (calls, {})

    def test_learned_variance_that_nobody_learned(self, service: AsyncEngine) -> None:
        table = service.engine.table("ddpm", 4, variance="learned_range")
        with pytest.raises(ValueError, match="table needs the variance that the network learned"):
            service.submit(1, table, labels=0)

    def test_a_table_longer_than_there_are_rows(self) -> None:
        service = AsyncEngine(small_engine(), rows=15).start()
        with pytest.raises(ValueError, match="table must have at most 15 rows, got 16"):
            service.submit(1, steps=16, labels=0)
        service.close()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"lanes": 4}, "lanes must be the 8 of this invariant engine, got 4"),
            ({"lanes": 0}, "lanes must be in"),
            ({"queue": 0}, "queue must be in"),
            ({"rows": True}, "rows must be an integer"),
            ({"aging": 0}, "aging must be a finite number"),
        ],
        ids=str,
    )
    def test_a_service_that_cannot_be(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            AsyncEngine(small_engine(), **arguments)
        with pytest.raises(TypeError, match="engine must be an Engine, got str"):
            AsyncEngine("fashion-mnist")  # type: ignore[arg-type]


class TestDeadlines:
    def test_what_comes_too_late_ends_and_its_lanes_are_free(self, gate: Gate, service: AsyncEngine) -> None:
        gate.shut()
        late = service.submit(n=4, steps=500, labels=0, deadline=0.2)
        other = service.submit(n=4, steps=5, labels=0)
        gate.wait_for_call()
        time.sleep(0.25)
        gate.open()
        with pytest.raises(DeadlineExceeded, match="when 0 of 4 images were done"):
            late.result(30)
        assert other.result(30).images.isfinite().all()
        wait_until_idle(service)
        assert gate.calls < 100
        assert leaks(service) == {}

    def test_what_cannot_be_done_in_time_is_refused(self, service: AsyncEngine) -> None:
        service.submit(n=1, steps=20, labels=0).result(30)
        with pytest.raises(DeadlineExceeded, match="deadline must be at least"):
            service.submit(n=1, steps=900, labels=0, deadline=1e-4)
        assert service.submit(n=1, steps=2, labels=0, deadline=60).result(30).images.isfinite().all()


class TestCancelling:
    def test_a_running_request_frees_its_lanes_by_the_next_tick(self, gate: Gate, service: AsyncEngine) -> None:
        gate.shut()
        future = service.submit(n=8, steps=500, labels=0)
        gate.wait_for_call()
        assert future.cancel()
        other = service.submit(n=8, steps=1, labels=0)
        calls = gate.calls
        gate.open()
        assert other.result(30).images.isfinite().all()
        assert gate.calls == calls + 1, "the other was in the very next tick"
        with pytest.raises(CancelledError):
            future.result(0)
        wait_until_idle(service)
        assert leaks(service) == {}

    def test_a_waiting_request(self, gate: Gate, service: AsyncEngine) -> None:
        gate.shut()
        calls = gate.calls
        first = service.submit(n=8, steps=2, labels=0)
        gate.wait_for_call()
        second = service.submit(n=8, steps=2, labels=0)
        assert second.cancel()
        gate.open()
        assert first.result(30).images.isfinite().all()
        wait_until_idle(service)
        assert gate.calls == calls + 2, "the ticks of the first"
        assert leaks(service) == {}


def test_an_exception_in_a_callback_ends_its_request_alone(service: AsyncEngine) -> None:
    def fails(event: sf.Event) -> None:
        if event.step == 2:
            raise KeyError("mine")

    good = service.submit(n=4, steps=6, labels=0, seed=1)
    bad = service.submit(n=4, steps=6, labels=0, progress=fails)
    with pytest.raises(KeyError, match="mine"):
        bad.result(30)
    assert torch.equal(good.result(30).images, offline(service.engine, {"n": 4, "steps": 6, "labels": 0, "seed": 1}))
    wait_until_idle(service)
    assert leaks(service) == {}


class TestClosing:
    def test_drain_finishes_what_was_taken(self, gate: Gate, service: AsyncEngine) -> None:
        gate.shut()
        futures = [service.submit(n=8, steps=3, labels=0) for _ in range(2)]
        gate.wait_for_call()
        closing = threading.Thread(target=service.close)
        closing.start()
        while service.status.state == "ready":
            time.sleep(0.001)
        assert not service.ready
        assert service.live
        with pytest.raises(EngineClosed, match="it is being closed"):
            service.submit(n=1, steps=1, labels=0)
        gate.open()
        closing.join(30)
        assert all(future.done() and future.result().images.isfinite().all() for future in futures)
        assert service.status.state == "closed"
        with pytest.raises(EngineClosed, match="it was closed"):
            service.submit(n=1, steps=1, labels=0)

    def test_what_is_not_done_in_time_is_ended(self, service: AsyncEngine) -> None:
        future = service.submit(n=8, steps=900, labels=0, progress=lambda event: time.sleep(0.01))
        assert service.close(timeout=0.1) is False
        with pytest.raises(EngineClosed, match="closed before this request was done"):
            future.result(0)
        assert leaks(service) == {}

    def test_without_draining_and_twice(self, gate: Gate, service: AsyncEngine) -> None:
        gate.shut()
        future = service.submit(n=8, steps=900, labels=0)
        gate.wait_for_call()
        calls = gate.calls
        closed: list[bool] = []
        closing = threading.Thread(target=lambda: closed.append(service.close(drain=False)))
        closing.start()
        with pytest.raises(EngineClosed):
            future.result(30)
        gate.open()
        closing.join(30)
        assert closed == [False]
        assert gate.calls == calls, "what nobody waits for is not finished"
        assert leaks(service) == {}
        service.close()

    def test_before_it_was_started(self) -> None:
        service = AsyncEngine(small_engine())
        with pytest.raises(EngineClosed, match="it was not started"):
            service.submit(n=1)
        assert service.close()
        assert service.close()
        with pytest.raises(EngineClosed, match="it was closed"):
            service.start()

    def test_an_error_in_the_block_ends_what_is_left(self) -> None:
        futures = []

        async def fails() -> None:
            async with AsyncEngine(small_engine()) as service:
                futures.append(service.submit(n=8, steps=900, labels=0, progress=lambda event: time.sleep(0.01)))
                raise KeyError("caller's")

        with pytest.raises(KeyError, match="caller's"):
            asyncio.run(fails())
        with pytest.raises(EngineClosed):
            futures[0].result(0)

    def test_a_service_that_nobody_has_any_more_stops(self) -> None:
        service = AsyncEngine(small_engine()).start()
        thread, gone = service._worker._thread, weakref.ref(service)
        del service
        gc.collect()
        assert gone() is None
        thread.join(10)
        assert not thread.is_alive()


EXITS = """
import sys
import stepfusion as sf

engine = sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(), shape=(1, 2, 2), device="cpu")
service = sf.serving.AsyncEngine(engine).start()
future = service.submit(4, steps=1000)
print(service.status.state)
"""


def test_the_interpreter_exits_with_a_service_at_work() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", EXITS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


class TestDeath:
    """What the worker does not expect ends every request with the reason, at once, and leaves nobody waiting."""

    @staticmethod
    def dying(gate: Gate) -> AsyncEngine:
        def network(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            if bool((timesteps == 999).any()):
                gate(x, timesteps, labels)
                raise RuntimeError("device-side assert\nand more")
            return labelled(x, timesteps, labels)

        return AsyncEngine(small_engine(network)).start()

    def test_every_pending_and_future_request(self, gate: Gate) -> None:
        service = self.dying(gate)
        table = service.engine.table("ddim", timesteps=[999, 5])
        gate.shut()
        pending = [service.submit(8, table, labels=0)]
        gate.wait_for_call()
        pending += [service.submit(8, steps=3, labels=0) for _ in range(3)]
        gate.open()
        for future in pending:
            with pytest.raises(EngineDead, match=r"^the engine is dead: RuntimeError: device-side assert$") as caught:
                future.result(30)
            assert isinstance(caught.value.__cause__, RuntimeError)
        assert (service.live, service.ready, service.status.state) == (False, False, "dead")
        with pytest.raises(EngineDead, match="device-side assert"):
            service.submit(1, steps=1, labels=0)
        assert service.close() is False
        assert service.status.waiting == 0

    def test_while_it_warms_up(self) -> None:
        def broken(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return x[:, :1]

        with pytest.raises(EngineDead, match="the network returned shape"):
            AsyncEngine(small_engine(broken)).start()


def test_status() -> None:
    gate = Gate()
    service = AsyncEngine(small_engine(gate))
    assert service.status.state == "new"
    service.start()
    assert service.status.lanes == 16
    gate.shut()
    service.submit(n=20, steps=2, labels=0)
    gate.wait_for_call()
    time.sleep(0.05)
    status = service.status
    assert (status.state, status.busy, status.waiting) == ("ready", 8, 12)
    assert status.quiet_seconds >= 0.05
    gate.open()
    wait_until_idle(service)
    assert service.status.tick_seconds > 0
    service.close()
