"""Rounds, one by one: who enters when, what moves to other lanes, what runs out of room or memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.lanes.request import Request
from stepfusion.lanes.runner import Runner
from stepfusion_testing.networks import labelled, smooth
from stepfusion_testing.recorded_graph import Captures
from stepfusion_testing.serving_twins import NAN_LABEL, SHAPE, Desk, offline, small_engine

WIDTHS = (1, 2, 4, 8)


def test_images_enter_between_ticks_and_leave_when_they_are_done() -> None:
    desk = Desk(small_engine())
    long = desk.ask(n=6, steps=10, labels=0)
    desk.round(4)
    short = desk.ask(n=2, steps=3, labels=1, seed=9)
    assert desk.scheduler.busy == 6
    desk.round()
    assert desk.scheduler.busy == 8, "they did not wait for the others"
    desk.round(2)
    assert short.done()
    assert not long.done()
    assert desk.scheduler.busy == 6
    assert desk.finish() == 3
    assert torch.equal(short.result().images, offline(desk.engine, {"n": 2, "steps": 3, "labels": 1, "seed": 9}))


def test_a_request_of_more_images_than_lanes_trickles_in() -> None:
    desk = Desk(small_engine())
    future = desk.ask(n=20, steps=4, labels=0, seed=2)
    assert desk.finish() == 3 * 4
    assert torch.equal(future.result().images, offline(desk.engine, {"n": 20, "steps": 4, "labels": 0, "seed": 2}))
    empty = desk.ask(n=0, steps=4, labels=0)
    assert empty.result().images.shape == (0, *SHAPE)


def test_guided_images_have_lanes_of_their_own_and_others_do_not_pay() -> None:
    calls: list[int] = []

    def counts(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return labelled(x, timesteps, labels)

    desk = Desk(small_engine(counts))
    plain = desk.ask(n=2, steps=3, labels=0)
    desk.finish()
    assert calls == [8] * 3, "one call a tick"
    guided = desk.ask(n=2, steps=3, labels=0, guidance=2.0)
    again = desk.ask(n=2, steps=3, labels=0)
    calls.clear()
    desk.finish()
    assert calls == [8] * 9, "one for each unguided tick, two for each guided one"
    assert torch.equal(plain.result().images, again.result().images)
    assert torch.equal(guided.result().images, offline(desk.engine, {"n": 2, "steps": 3, "labels": 0, "guidance": 2}))


def test_learned_variance_goes_with_the_others() -> None:
    def learned(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.cat((smooth(x, timesteps), 0.5 * x.clamp(-1, 1)), dim=1)

    arguments: dict[str, Any] = {"num_classes": None, "null_label": None}
    engine = small_engine(learned, **arguments, options={"variance": "learned_range"})
    desk = Desk(engine)
    desk.scheduler.warm_up()
    assert desk.scheduler.learned
    requests: list[dict[str, Any]] = [{"n": 3, "sampler": "ddpm", "steps": 4}, {"n": 2, "steps": 5, "eta": 1.0}]
    futures = [desk.ask(**request) for request in requests]
    assert desk.finish() == 5
    for request, future in zip(requests, futures, strict=True):
        assert torch.equal(future.result().images, offline(engine, request))


class TestWidths:
    """Few images do not pay for many lanes: they move to the narrowest runner that holds them."""

    def test_the_network_sees_as_many_lanes_as_are_needed(self) -> None:
        seen: list[int] = []

        def sees(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return labelled(x, timesteps, labels)

        desk = Desk(small_engine(sees, invariant=False), widths=WIDTHS)
        desk.ask(n=1, steps=7, labels=0)
        desk.round(2)
        desk.ask(n=4, steps=2, labels=0)
        desk.finish()
        assert seen == [1, 1, 8, 8, 1, 1, 1]

    @pytest.mark.parametrize("guidance", [None, 2.0])
    @pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreter)])
    def test_images_that_move_stay_the_same(self, guidance: float | None, backend: str) -> None:
        """The labelled network works pixel by pixel, so that even bits must survive a move."""
        engine = small_engine(labelled, invariant=False, backend=backend)
        desk = Desk(engine, widths=WIDTHS)
        requests = [
            {"n": n, "steps": steps, "eta": 1.0, "seed": seed, "labels": seed % 3, "guidance": guidance}
            for seed, (n, steps) in enumerate([(1, 2), (5, 3), (2, 9), (1, 8), (2, 2)])  # the last to leave sit high
        ]
        futures = []
        for request in requests:
            futures.append(desk.ask(**request))
            desk.round()
        desk.finish()
        for request, future in zip(requests, futures, strict=True):
            assert torch.equal(future.result().images, offline(engine, request)), request

    def test_a_move_that_forgets_part_of_a_lane_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The control: seeds that stay behind."""
        buffers = Runner._lane_buffers
        monkeypatch.setattr(
            Runner, "_lane_buffers", lambda self: [b for b in buffers(self) if b.data_ptr() != self._seeds.data_ptr()]
        )
        with pytest.raises(AssertionError):
            self.test_images_that_move_stay_the_same(None, "reference")


class TestTables:
    def test_tables_come_and_go_while_lanes_run(self) -> None:
        desk = Desk(small_engine(), rows=31)  # no two of the longer ones fit beside each other
        requests = [{"n": 1, "steps": steps, "labels": 0, "eta": 1.0} for steps in (20, 5, 18, 3, 20, 25, 1)]
        futures = []
        for request in requests:
            futures.append(desk.ask(**request))
            desk.round()
        assert desk.finish() > 25, "some waited for room"
        for request, future in zip(requests, futures, strict=True):
            alone = small_engine()  # with no other table in its store
            assert torch.equal(future.result().images, offline(alone, request)), request
        assert desk.scheduler.tables_held == 0

    def test_who_waits_for_room_is_next(self) -> None:
        """A stream of short tables would keep a long one out for ever."""
        desk = Desk(small_engine(), rows=31)
        desk.ask(n=1, steps=10, labels=0)
        desk.round()
        long = desk.ask(n=1, steps=30, labels=0)
        rounds = 0
        while not long.done():
            desk.ask(n=1, steps=5 + rounds % 3, labels=0)
            desk.round()
            rounds += 1
            assert rounds < 60
        assert rounds < 45


@pytest.mark.interpreter
@pytest.mark.parametrize("widths", [(4,), (1, 2, 4)], ids=str)
def test_no_traffic_captures_again(captures: Captures, widths: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"batch": 4, "invariant": len(widths) == 1, "dtype": "float32"}
    engine = small_engine(labelled, backend="triton", network="graph", **options)
    eager = small_engine(labelled, backend="triton", network="eager", **options)
    desk = Desk(engine, widths=widths)
    with torch.no_grad():
        desk.scheduler.warm_up()
    captured = len(captures.graphs)
    assert captured == 2 * len(widths), "guided and not, each width"
    requests: list[dict[str, Any]] = [
        {"n": 1, "steps": 4, "labels": 1},
        {"n": 3, "steps": 2, "eta": 0.5, "labels": 2, "seed": 5},
        {"n": 2, "sampler": "ddpm", "steps": 3, "labels": 0, "guidance": 1.5},
        {"n": 2, "steps": 5, "labels": 3, "seed": 1 << 63},
    ]
    futures = []
    for request in requests:
        futures.append(desk.ask(**request))
        desk.round()
    desk.finish()
    assert len(captures.graphs) == captured
    assert sum(graph.replays for graph in captures.graphs) > 5
    for request, future in zip(requests, futures, strict=True):
        assert torch.equal(future.result().images, offline(eager, request))


class TestOutOfMemory:
    @staticmethod
    def full_above(lanes: int) -> Any:
        """A network for which there is memory for so many lanes."""

        def network(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            if len(x) > lanes:
                raise torch.OutOfMemoryError("full")
            return labelled(x, timesteps, labels)

        return network

    def test_half_the_lanes_go_on_and_images_are_the_same(self, caplog: pytest.LogCaptureFixture) -> None:
        desk = Desk(small_engine(self.full_above(2), invariant=False), widths=WIDTHS)
        early = desk.ask(n=1, steps=6, labels=0, seed=4, eta=1.0)
        desk.round(3)
        late = desk.ask(n=7, steps=3, labels=1, seed=5)
        desk.finish()
        roomy = small_engine(labelled, invariant=False)
        wanted = offline(roomy, {"n": 1, "steps": 6, "labels": 0, "seed": 4, "eta": 1.0})
        assert torch.equal(early.result().images, wanted)
        assert torch.equal(late.result().images, offline(roomy, {"n": 7, "steps": 3, "labels": 1, "seed": 5}))
        assert "out of memory: going on with 2 lanes" in caplog.text
        assert (desk.backlog.images, desk.backlog.steps, desk.scheduler.tables_held) == (0, 0, 0)

    def test_during_warm_up(self) -> None:
        desk = Desk(small_engine(self.full_above(4), invariant=False), widths=WIDTHS)
        desk.scheduler.warm_up()
        assert desk.scheduler.lanes == 4 + 2, "guided lanes, which the network sees twice, are half as many"

    def test_as_images_enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        failures, admit = iter([True]), Runner.admit

        def full(self: Runner, *arguments: Any) -> None:
            if next(failures, False):
                raise torch.OutOfMemoryError("full")
            admit(self, *arguments)

        desk = Desk(small_engine(labelled, invariant=False), widths=WIDTHS)
        future = desk.ask(n=3, steps=2, labels=0)
        with monkeypatch.context() as patched:
            patched.setattr(Runner, "admit", full)
            desk.finish()
        assert torch.equal(future.result().images, offline(desk.engine, {"n": 3, "steps": 2, "labels": 0}))
        assert (desk.backlog.images, desk.backlog.steps, desk.scheduler.lanes) == (0, 0, 4)

    def test_in_the_copy_of_what_is_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        failures: Iterator[bool] = iter([True])
        engine = small_engine(labelled, invariant=False)
        to_uint8 = engine.to_uint8

        def full(x: torch.Tensor) -> torch.Tensor:
            if next(failures, False):
                raise torch.OutOfMemoryError("full")
            return to_uint8(x)

        desk = Desk(engine, widths=WIDTHS)
        plain, pixels = desk.ask(n=2, steps=2, labels=0), desk.ask(n=2, steps=2, labels=1)
        next(job for job in desk.scheduler._requests.values() if job.future is pixels).pixels = True
        monkeypatch.setattr(engine, "to_uint8", full)
        desk.finish()
        assert torch.equal(plain.result().images, offline(engine, {"n": 2, "steps": 2, "labels": 0}))
        assert torch.equal(pixels.result().images, to_uint8(offline(engine, {"n": 2, "steps": 2, "labels": 1})))

    def test_for_an_image_to_start_from_ends_its_request_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = small_engine(labelled)
        noised, image = engine.runners.noised, torch.rand(2, *SHAPE) * 2 - 1

        def full(request: Request) -> Request:
            if request.image is not None and len(request) > 1:
                raise torch.OutOfMemoryError("full")
            return noised(request)

        desk = Desk(engine)
        plain = desk.ask(n=2, steps=4, labels=0)
        desk.round()
        monkeypatch.setattr(engine.runners, "noised", full)
        large = desk.ask(image=image, strength=0.5, steps=4, labels=0)
        small = desk.ask(image=image[:1], strength=0.5, steps=4, labels=0)
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            large.result(0)
        desk.finish()
        assert torch.equal(plain.result().images, offline(engine, {"n": 2, "steps": 4, "labels": 0}))
        wanted = {"image": image[:1], "strength": 0.5, "steps": 4, "labels": 0}
        assert torch.equal(small.result().images, offline(engine, wanted))
        assert (desk.backlog.images, desk.backlog.steps, desk.scheduler.tables_held) == (0, 0, 0)
        assert desk.scheduler.idle

    @pytest.mark.parametrize("invariant", [True, False])
    def test_where_not_one_lane_fits_or_lanes_must_not_change(self, invariant: bool) -> None:
        room = 7 if invariant else 0
        desk = Desk(small_engine(self.full_above(room), invariant=invariant), widths=(8,) if invariant else WIDTHS)
        desk.ask(n=8, steps=2, labels=0)
        with pytest.raises(torch.OutOfMemoryError):
            desk.finish()


def test_an_image_that_breaks_ends_its_request_alone() -> None:
    desk = Desk(small_engine())
    good = desk.ask(n=2, steps=6, labels=0)
    bad = desk.ask(n=3, steps=3, labels=[1, NAN_LABEL, 1], seed=7)
    desk.round(2)
    assert desk.scheduler.busy == 5
    desk.round()
    assert desk.scheduler.busy == 2
    with pytest.raises(sf.NonFiniteError, match=r"^image 1 \(seed 7, index 1\) became non-finite at step 1 of 3 "):
        bad.result()
    desk.finish()
    assert torch.equal(good.result().images, offline(desk.engine, {"n": 2, "steps": 6, "labels": 0}))


def test_events_are_those_of_a_stream() -> None:
    desk = Desk(small_engine())
    events: list[sf.Event] = []
    desk.ask(n=2, steps=5, labels=0, eta=1.0, progress=events.append, every=2)
    desk.ask(n=1, steps=9, labels=1)
    desk.finish()
    for ours, theirs in zip(events, desk.engine.stream(2, steps=5, labels=0, eta=1.0, every=2), strict=True):
        assert (ours.step, ours.steps, ours.timestep, ours.images) == (
            theirs.step,
            theirs.steps,
            theirs.timestep,
            theirs.images,
        )
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.x0, theirs.x0)
