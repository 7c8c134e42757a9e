"""Serving under load: continuous against static batching on the same traffic, and LoadGen's scenarios.

The load is open: requests come when they come, at random (Poisson), whether or not those before are done. Both ways
of batching have the same engine, lanes and requests, of mixed step counts; their images are compared first.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stepfusion.bench.loadgen import label, loadgen_rows
from stepfusion.bench.measure import difference
from stepfusion.bench.models import BenchModel, load_model
from stepfusion.bench.options import Options
from stepfusion.bench.rows import Row
from stepfusion.engine import Engine
from stepfusion.samplers.scheduler_config import read_config
from stepfusion.samplers.table import StepTable
from stepfusion.serving import AsyncEngine, Result, Timings

PART = "serve"
STEPS = (10, 25, 50, 100)
CONTINUOUS, STATIC = "stepfusion continuous", "static batches"
_LOAD = 0.9  # of what the lanes could do if they were always full


@dataclass(frozen=True)
class Arrival:
    """One request for one image, so many seconds after the first."""

    seconds: float
    seed: int
    table: StepTable


@dataclass(frozen=True)
class Outcome:
    """What became of a traffic: seconds of each request from its arrival to its image, seconds in all, the images."""

    latencies: list[float]
    seconds: float
    images: torch.Tensor


def serve_rows(options: Options) -> Iterator[Row]:
    """Rows of both ways of batching and of their ratio, then of LoadGen's scenarios."""
    tiny, device = options.tiny, options.device
    names = options.models or (("tiny",) if tiny else ("cifar10",) if device.type == "cuda" else ("fashion-mnist",))
    for name in names:
        lanes = (options.batches or (4 if tiny else 32 if device.type == "cuda" else 8,))[0]
        model = load_model(name)
        engine = make_engine(model, device, lanes, invariant=True)
        count = (2 if tiny else 12) * lanes
        traffic = poisson_traffic(engine, count, [max(1, steps // 10) if tiny else steps for steps in STEPS])
        yield from _compare(name, engine, traffic)
        yield from loadgen_rows(PART, name, make_engine(model, device, lanes, invariant=False), options)


def make_engine(model: BenchModel, device: torch.device, lanes: int, *, invariant: bool) -> Engine:
    """An engine of so many lanes; never fewer if it is invariant, so that all ticks have one cost."""
    schedule, prediction, options = read_config(model.scheduler_config)
    known: dict[str, Any] = {"null_label": model.null_label, "options": options, "prediction": prediction}
    return Engine(model.network, schedule, **known, device=device, batch=lanes, invariant=invariant)


def poisson_traffic(engine: Engine, count: int, steps: Sequence[int]) -> list[Arrival]:
    """Requests for one image each, as many of each step count, at random times, near what the lanes can do."""
    tables = [engine.table("ddim", number) for number in steps]
    tick = _tick_seconds(engine)
    rng = random.Random(0)
    chosen = [tables[i % len(tables)] for i in range(count)]
    rng.shuffle(chosen)
    rate = _LOAD * engine.batch / (tick * sum(map(len, chosen)) / count)
    arrivals, now = [], 0.0
    for seed, table in enumerate(chosen):
        arrivals.append(Arrival(now, seed, table))
        now += rng.expovariate(rate)
    return arrivals


def drive(traffic: Sequence[Arrival], submit: Callable[[Arrival], Future[Result]]) -> Outcome:
    """Submit each request when its time comes, and wait for all."""
    ends: dict[int, float] = {}

    def note(number: int) -> Callable[[Future[Result]], None]:
        return lambda _: ends.__setitem__(number, time.perf_counter())

    futures, started = [], time.perf_counter()
    for number, arrival in enumerate(traffic):
        time.sleep(max(0.0, started + arrival.seconds - time.perf_counter()))
        futures.append(submit(arrival))
        futures[-1].add_done_callback(note(number))
    images = torch.cat([future.result().images for future in futures])
    while len(ends) < len(futures):  # a result is there before its callbacks are called
        time.sleep(1e-3)
    latencies = [ends[number] - started - arrival.seconds for number, arrival in enumerate(traffic)]
    return Outcome(latencies, max(ends.values()) - started, images)


def continuous(engine: Engine, traffic: Sequence[Arrival]) -> Outcome:
    """By :class:`stepfusion.serving.AsyncEngine`."""
    service = AsyncEngine(engine).start()
    try:
        return drive(traffic, lambda a: service.submit(1, a.table, seed=a.seed, labels=label(engine)))
    finally:
        service.close()


def static(engine: Engine, traffic: Sequence[Arrival]) -> Outcome:
    """By batches: whoever waits when the lanes are empty enters, at most as many as there are lanes, and the next
    enter when all of them are done.
    """
    inbox: queue.SimpleQueue[tuple[Arrival, Future[Result]] | None] = queue.SimpleQueue()
    nothing = Timings(0.0, 0.0, 0.0)

    def serve() -> None:
        while (first := inbox.get()) is not None:
            batch = [first]
            while len(batch) < engine.batch and not inbox.empty():
                if (other := inbox.get()) is None:
                    inbox.put(None)
                    break
                batch.append(other)
            arrivals = [arrival for arrival, _ in batch]
            images = engine.sample(
                table=[arrival.table for arrival in arrivals],
                seed=[arrival.seed for arrival in arrivals],
                indices=[0] * len(arrivals),
                labels=label(engine),
                progress=False,
            ).cpu()
            for (_, future), image in zip(batch, images, strict=True):
                future.set_result(Result(image.unsqueeze(0), nothing))

    def submit(arrival: Arrival) -> Future[Result]:
        result: Future[Result] = Future()
        inbox.put((arrival, result))
        return result

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    outcome = drive(traffic, submit)
    inbox.put(None)
    thread.join()
    return outcome


def _compare(name: str, engine: Engine, traffic: Sequence[Arrival]) -> Iterator[Row]:
    outcomes = {CONTINUOUS: continuous(engine, traffic), STATIC: static(engine, traffic)}
    apart = difference(outcomes[CONTINUOUS].images, outcomes[STATIC].images)
    numbers = sorted({len(arrival.table) for arrival in traffic})
    notes = f"Poisson arrivals, {'/'.join(map(str, numbers))} steps mixed, {engine.batch} lanes, open loop"
    common: dict[str, Any] = {
        "model": name,
        "shape": "x".join(map(str, (1, *engine.shape))),
        "dtype": str(engine.plan.dtype).removeprefix("torch."),
        "max_difference": apart.max,
        "tolerance": "max 0",
        "error": None if apart.max == 0 else "the images of the two differ",
    }
    mean = round(sum(len(arrival.table) for arrival in traffic) / len(traffic))
    p95: dict[str, float] = {}
    for provider, outcome in outcomes.items():
        low, p20, median, p80, p95[provider] = (
            float(q) for q in np.quantile([1e3 * s for s in outcome.latencies], (0.0, 0.2, 0.5, 0.8, 0.95))
        )
        row = Row(PART, "one request", provider, engine.plan.device.type, **common, notes=notes)
        yield replace(row, median_ms=median, p20_ms=p20, p80_ms=p80, p95_ms=p95[provider], min_ms=low)
        whole: dict[str, Any] = {"batch": len(traffic), "steps": mean, "median_ms": 1e3 * outcome.seconds}
        yield replace(row, op="all requests", **whole)
    faster = outcomes[STATIC].seconds / outcomes[CONTINUOUS].seconds
    yield Row(
        PART,
        "continuous against static",
        CONTINUOUS,
        engine.plan.device.type,
        model=name,
        fraction=p95[CONTINUOUS] / p95[STATIC],
        fraction_of="the p95 latency of static batches",
        notes=f"{faster:.2f}x the throughput of static batches",
    )


def _tick_seconds(engine: Engine) -> float:
    """Of a tick with every lane full, the first ones left out."""
    table = engine.table("ddim", min(4, engine.schedule.max_steps))
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        engine.sample(engine.batch, table, labels=label(engine), progress=False).cpu()
        taken.append((time.perf_counter() - started) / len(table))
    return min(taken)
