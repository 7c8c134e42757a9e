"""Many requests at once: every good one is its offline twin, every bad one is refused alone, and nothing is left."""

import asyncio
import gc
import random
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.lanes.request import LaneStart
from stepfusion.lanes.runner import Runner
from stepfusion.serving import AsyncEngine, Result
from stepfusion.serving.open_requests import OpenRequests
from stepfusion.serving.served_request import ServedRequest
from stepfusion_testing.serving_twins import NAN_LABEL, leaks, offline, small_engine, wait_until_idle


class CallerError(Exception):
    """What a callback of a caller raises."""


def good_request(rng: random.Random) -> dict[str, Any]:
    """Any size, sampler, number of steps, eta, label, scale and output."""
    sampler = rng.choice(["ddim", "ddim", "ddpm"])
    arguments: dict[str, Any] = {
        "sampler": sampler,
        "steps": rng.randint(1, 9),
        "seed": rng.getrandbits(64),
        "output": rng.choice(["float32", "uint8"]),
        "priority": rng.randint(-1, 1),
        "labels": rng.choice([0, 1, 2]),
    }
    if sampler == "ddim":
        arguments["eta"] = rng.choice([0.0, 0.5, 1.0])
    if rng.random() < 0.3:
        arguments["guidance"] = rng.choice([0.5, 2.0])
    size = rng.choice([1, 1, 1, 2, 5, 13])
    if rng.random() < 0.3:
        arguments["indices"] = [rng.getrandbits(32) for _ in range(size)]
    else:
        arguments["n"] = size
    return arguments


def bad_request(rng: random.Random) -> tuple[dict[str, Any], type[Exception]]:
    """Something wrong: an argument, an image that breaks, a callback that raises, a deadline that has passed."""

    def fails(event: sf.Event) -> None:
        raise CallerError

    faults: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"steps": 0}, ValueError),
        ({"labels": 99}, ValueError),
        ({"n": -1, "indices": None}, ValueError),
        ({"guidance": "much"}, TypeError),
        ({"n": 3, "indices": None, "labels": [0, NAN_LABEL, 1]}, sf.NonFiniteError),
        ({"progress": fails}, CallerError),
        ({"deadline": 1e-6}, sf.serving.DeadlineExceeded),
    ]
    fault, error = rng.choice(faults)
    return {**good_request(rng), **fault}, error


async def serve(engine: sf.Engine, requests: Sequence[dict[str, Any]], cancelled: dict[int, float]) -> list[Any]:
    """What becomes of each request; those in ``cancelled`` are given up after so many seconds."""
    async with AsyncEngine(engine, queue=10_000) as service:

        async def one(number: int) -> Any:
            task = asyncio.ensure_future(service.generate(**requests[number]))
            if number in cancelled:
                await asyncio.sleep(cancelled[number])
                task.cancel()
            return await task

        outcomes = await asyncio.gather(*map(one, range(len(requests))), return_exceptions=True)
        await asyncio.to_thread(wait_until_idle, service)
        assert leaks(service) == {}
    return outcomes


def mixed_traffic(
    rng: random.Random, count: int
) -> tuple[list[dict[str, Any]], dict[int, type[Exception]], dict[int, float]]:
    """Requests; the errors of the bad tenth of them; and when the cancelled fifth is given up."""
    numbers = rng.sample(range(count), 3 * count // 10)
    requests = [good_request(rng) for _ in range(count)]
    expected = {}
    for number in numbers[: count // 10]:
        requests[number], expected[number] = bad_request(rng)
    return requests, expected, {number: rng.choice([0.0, 0.05, 0.3]) for number in numbers[count // 10 :]}


@pytest.mark.slow
def test_500_requests_each_get_what_they_would_have_got_alone() -> None:
    requests, expected, cancelled = mixed_traffic(random.Random(0), 500)
    engine = small_engine()
    outcomes = asyncio.run(serve(engine, requests, cancelled))
    given_up = 0
    for number, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
        if number in expected:
            assert isinstance(outcome, expected[number]), (request, outcome)
        elif isinstance(outcome, asyncio.CancelledError):
            assert number in cancelled
            given_up += 1
        else:
            assert torch.equal(outcome.images, offline(engine, request)), request
    assert given_up > 50


def test_lanes_that_are_mixed_up_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an admission that gives images to each other's lanes."""
    admit = Runner.admit

    def mixed_up(self: Runner, lanes: Sequence[int], starts: Sequence[LaneStart], *rest: Any) -> None:
        admit(self, lanes, starts[::-1], *rest)

    engine = small_engine()
    requests = [{"n": 1, "steps": 3, "seed": seed, "labels": 0} for seed in range(8)]
    wanted = [offline(engine, request) for request in requests]
    monkeypatch.setattr(Runner, "admit", mixed_up)
    outcomes = asyncio.run(serve(engine, requests, {}))
    same = [torch.equal(o.images, w) for o, w in zip(outcomes, wanted, strict=True)]
    assert not all(same)


# Memory


def growth(service: AsyncEngine, requests: int) -> int:
    """Blocks of memory that Python holds more after so many small requests, the first fifth of them left out."""
    blocks = []
    for count in (requests // 5, requests - requests // 5):
        under_way: deque[Future[Result]] = deque()
        for seed in range(count):
            if len(under_way) == 64:
                under_way.popleft().result(30)
            under_way.append(service.submit(1, steps=1, seed=seed, labels=0))
        while under_way:
            under_way.popleft().result(30)
        wait_until_idle(service)
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    return blocks[1] - blocks[0]


@pytest.mark.soak
def test_memory_is_flat_over_10000_requests() -> None:
    service = AsyncEngine(small_engine()).start()
    assert growth(service, 10_000) < 2_000
    service.close()


def test_a_service_that_keeps_its_requests_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one object a request is found."""
    kept: list[ServedRequest] = []
    end = OpenRequests.end

    def keeps(self: OpenRequests, job: ServedRequest, *rest: Any) -> bool:
        kept.append(job)
        return end(self, job, *rest)

    monkeypatch.setattr(OpenRequests, "end", keeps)
    service = AsyncEngine(small_engine()).start()
    assert growth(service, 1_000) > 800
    service.close()
