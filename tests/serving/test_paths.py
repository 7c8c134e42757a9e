"""Serving engines on EDM's path and on the straight one: any sampler, in the same lanes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.lanes.request import Event
from stepfusion.samplers.registry import samplers_of
from stepfusion_testing.path_networks import FLOW, SIGMA, path_engine
from stepfusion_testing.serving_twins import Desk, offline

PATHS = [SIGMA, FLOW, sf.NoiseSchedule.cosine(100)]
NAMES = ["sigma", "flow", "cosine"]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_every_sampler_shares_the_lanes_of_one_pool(path: sf.Path) -> None:
    engine = path_engine(path, 3, batch=8, invariant=True)
    desk = Desk(engine, widths=(8,))
    desk.scheduler.warm_up()
    before = [runner for pool in desk.scheduler._pools.values() for runner in pool.lanes.runners]
    requests: list[dict[str, Any]] = [
        {"n": 1, "sampler": sampler, "steps": 5, "labels": seed % 3, "seed": seed}
        for seed, sampler in enumerate(samplers_of(path))
    ]
    requests.append({"n": 2, "labels": 1, "seed": 99})  # by default
    futures = []
    for request in requests:
        futures.append(desk.ask(**request))
        desk.round()
    assert desk.scheduler.busy > 2
    desk.finish()
    for request, future in zip(requests, futures, strict=True):
        assert torch.equal(future.result().images, offline(engine, request)), request
    after = [runner for pool in desk.scheduler._pools.values() for runner in pool.lanes.runners]
    assert after == before, "the warm-up made them all"


def test_a_pool_without_room_for_a_history_cannot_run_heun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr("stepfusion.serving.scheduler.HISTORY", ())
    engine = path_engine(SIGMA, 3, batch=8, invariant=True)
    request = {"n": 1, "sampler": "heun", "steps": 3, "labels": 0}
    desk = Desk(engine, widths=(8,))
    future = desk.ask(**request)
    desk.finish()
    assert not torch.equal(future.result().images, offline(engine, request))


def test_events_hold_what_the_network_was_told() -> None:
    engine = path_engine(SIGMA, 3, batch=8, invariant=True)
    desk = Desk(engine, widths=(8,))
    seen: list[Event] = []
    desk.ask(n=1, sampler="heun", steps=3, labels=0, progress=seen.append)
    desk.finish()
    assert [event.timestep for event in seen] == pytest.approx(engine.table("heun", 3).told.tolist())
