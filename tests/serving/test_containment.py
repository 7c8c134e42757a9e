"""Whatever a caller's code raises in the engine's threads ends at most that caller's request."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.serving import AsyncEngine, Result, async_engine
from stepfusion.serving.containment import contained
from stepfusion.serving.metrics import Metrics
from stepfusion.serving.served_request import ResultFuture, Timings
from stepfusion.serving.tracing import Tracing
from stepfusion_testing.serving_twins import Gate, leaks, offline, small_engine, wait_until_idle


class OwnBaseException(BaseException):
    """What no ``except Exception`` holds."""


class UnreadableError(Exception):
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise SystemExit(3)


NOT_EXCEPTIONS = [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit, OwnBaseException]
NOT_FOR_FUTURES = [*NOT_EXCEPTIONS, StopIteration, StopAsyncIteration]
ANY = [*NOT_FOR_FUTURES, KeyError, UnreadableError]
GOOD: dict[str, Any] = {"n": 4, "steps": 6, "labels": 0, "seed": 1}


@pytest.fixture
def service() -> Iterator[AsyncEngine]:
    made = AsyncEngine(small_engine()).start()
    yield made
    assert made.close(), "the thread is well"


def raising(kind: type[BaseException]) -> Callable[..., Any]:
    def fails(*arguments: object, **named: object) -> None:
        raise kind("mine")

    return fails


def works_on(service: AsyncEngine, neighbour: Future[Result]) -> None:
    """The request beside, and one that comes later, are what they are alone; nothing is left."""
    for future in (neighbour, service.submit(**GOOD)):
        assert torch.equal(future.result(30).images, offline(service.engine, GOOD))
    wait_until_idle(service)
    assert leaks(service) == {}
    assert service.ready


@pytest.mark.parametrize("kind", ANY)
def test_progress(service: AsyncEngine, kind: type[BaseException]) -> None:
    good = service.submit(**GOOD)
    bad = service.submit(n=4, steps=6, labels=0, progress=raising(kind))
    error = bad.exception(30)
    if kind in NOT_FOR_FUTURES:
        assert type(error) is RuntimeError
        assert str(error) == f"progress raised {kind.__name__}"
        assert isinstance(error.__cause__, kind)
    else:
        assert isinstance(error, kind)
    works_on(service, good)


@pytest.mark.parametrize("kind", ANY)
def test_progress_of_a_coroutine(service: AsyncEngine, kind: type[BaseException]) -> None:
    """An event loop takes neither the kinds that would stop it, nor those that it would not deliver."""

    async def ask() -> BaseException:
        good = asyncio.create_task(service.generate(**GOOD))
        try:
            await asyncio.wait_for(service.generate(1, steps=3, labels=0, progress=raising(kind)), 30)
        except Exception as error:
            assert torch.equal((await good).images, offline(service.engine, GOOD))
            return error
        raise AssertionError("it raised nothing")

    assert isinstance(asyncio.run(ask()), RuntimeError if kind in NOT_FOR_FUTURES else kind)


@pytest.mark.parametrize("kind", ANY)
@pytest.mark.parametrize("ends", ["done", "progress", "closed"])
def test_callbacks_of_a_future(kind: type[BaseException], ends: str, caplog: pytest.LogCaptureFixture) -> None:
    """The others of the same future are called all the same, by whichever thread resolves it."""
    gate = Gate()
    service = AsyncEngine(small_engine(gate)).start()
    gate.shut()
    good = service.submit(**GOOD)
    gate.wait_for_call()
    future = service.submit(n=2, steps=2, labels=0, progress=raising(KeyError) if ends == "progress" else None)
    called: list[str] = []
    future.add_done_callback(lambda future: called.append("before"))
    future.add_done_callback(raising(kind))
    future.add_done_callback(lambda future: called.append("after"))
    if ends == "closed":
        closing = threading.Thread(target=lambda: service.close(drain=False))
        closing.start()
        future.exception(30)
        gate.open()
        closing.join(30)
        assert service.status.state == "closed"
    else:
        gate.open()
        future.exception(30)
        works_on(service, good)
        assert service.close()
    assert called == ["before", "after"]
    assert any(record.getMessage().endswith(f"future raised {kind.__name__}") for record in caplog.records)


class Failing(Metrics, Tracing):
    """Metrics and tracing that always fail."""

    def __init__(self, kind: type[BaseException]) -> None:
        for name in ("tick", "lanes", "queue", "ended"):
            setattr(self, name, raising(kind))


@pytest.mark.parametrize("kind", ANY)
def test_metrics_and_tracing(monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]) -> None:
    for name in ("make_metrics", "make_tracing"):
        monkeypatch.setattr(async_engine, name, lambda: Failing(kind))
    service = AsyncEngine(small_engine()).start()
    works_on(service, service.submit(**GOOD))
    assert service.close()


class FailingHandler(logging.Handler):
    """A log handler that fails, as one whose server is gone."""

    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0

    def emit(self, record: logging.LogRecord) -> None:
        self.calls += 1
        raise self.kind("mine")


@pytest.mark.parametrize("kind", ANY)
def test_a_log_handler(kind: type[BaseException]) -> None:
    """For the lines of requests, and for that of a death."""
    logger, handler = logging.getLogger("stepfusion.serving"), FailingHandler(kind)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        service = AsyncEngine(small_engine()).start()
        works_on(service, service.submit(**GOOD))
        assert service.close()
        assert handler.calls > 1
        with pytest.raises(sf.serving.EngineDead, match="NotImplementedError: mine"):
            AsyncEngine(small_engine(raising(NotImplementedError))).start()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize("kind", ANY)
def test_a_network_that_raises_anything_is_a_death_with_a_cause(kind: type[BaseException]) -> None:
    """It is no caller's own; whoever waits is told, and nobody waits for ever."""
    failing, submitted = threading.Event(), threading.Event()

    def network(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if failing.is_set():
            assert submitted.wait(30)
            raise kind("mine")
        return x

    service = AsyncEngine(small_engine(network)).start()
    failing.set()
    futures = [service.submit(n=4, steps=2, labels=0) for _ in range(3)]
    submitted.set()
    for future in futures:
        error = future.exception(30)
        assert isinstance(error, sf.serving.EngineDead)
        assert isinstance(error.__cause__, kind)
    assert service.close() is False


@pytest.mark.parametrize("kind", ANY)
def test_the_main_thread_keeps_what_is_its_own(kind: type[BaseException]) -> None:
    """Ctrl-C while the main thread closes an engine reaches whoever pressed it; what is an Exception is logged."""

    def resolve() -> None:
        future = ResultFuture()
        future.add_done_callback(raising(kind))
        future.resolve(Result(torch.zeros(0), Timings(0, 0, 0)))

    if issubclass(kind, Exception):
        resolve()
    else:
        with pytest.raises(kind):
            resolve()


def test_containment_lets_nothing_out_of_other_threads() -> None:
    out: list[BaseException] = []

    def run() -> None:
        for kind in ANY:
            try:
                with contained("it"):
                    raise kind("mine")
            except BaseException as error:
                out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert out == []


# On the caller's own thread


@pytest.mark.parametrize("kind", [*NOT_EXCEPTIONS, KeyError])
def test_a_callback_of_sample_raises_to_its_caller_and_the_engine_stays_usable(kind: type[BaseException]) -> None:
    engine = small_engine()
    wanted = engine.sample(**GOOD)
    for step in (0, 3):

        def fails(event: sf.Event, step: int = step) -> None:
            if event.step == step:
                raise kind("mine")

        with pytest.raises(kind, match="mine") as raised:
            engine.sample(**GOOD, callback=fails)
        idle = engine.runners.pool.idle
        assert [int((runner.rows != -1).sum()) for runner in idle] == [0] * len(idle)
        assert torch.equal(engine.sample(**GOOD), wanted)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        del raised


@pytest.mark.parametrize("kind", NOT_EXCEPTIONS)
def test_a_reader_of_a_stream_or_of_pixels_who_raises(kind: type[BaseException]) -> None:
    engine = small_engine()
    wanted = engine.sample(**GOOD)

    def read(items: Iterable[object]) -> None:
        for _ in items:
            raise kind

    for items in (engine.stream(**GOOD), engine.generate(**{**GOOD, "n": 20})):
        with pytest.raises(kind):
            read(items)
        assert torch.equal(engine.sample(**GOOD), wanted)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_signal_inside_a_tick(kind: type[BaseException]) -> None:
    """Ctrl-C arrives wherever the caller's thread is, also in the network."""
    calls: list[int] = []

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise kind
        return 0.5 * x

    engine = small_engine(network, num_classes=None, null_label=None)
    with pytest.raises(kind):
        engine.sample(4, steps=6, seed=1)
    again = engine.sample(4, steps=6, seed=1)
    fresh = small_engine(lambda x, t: 0.5 * x, num_classes=None, null_label=None)
    assert torch.equal(again, fresh.sample(4, steps=6, seed=1))
