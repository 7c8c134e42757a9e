"""Previews of a stream: what waits for its reader is bounded, and the latest is what is left of it."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the HTTP application needs the extra 'serve'")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from starlette.testclient import TestClient

import stepfusion as sf
from stepfusion.serving import AsyncEngine
from stepfusion.serving.http import messages
from stepfusion.serving.http.app import make_app
from stepfusion.serving.http.previews import Preview, PreviewBuffer
from stepfusion_testing.http_service import Gate, call, events_of, gated_engine, idle, until

MEBIBYTE = 1 << 20
ASK = b'{"n": 4, "steps": 60, "every": 1, "labels": 0}'


class Watched:
    """A served engine of larger images, and its application."""

    def __init__(self, gate: Gate, service: AsyncEngine, app: Any) -> None:
        self.gate, self.service, self.app = gate, service, app


@pytest.fixture
def watched() -> Iterator[Watched]:
    gate, engine = gated_engine((3, 128, 128))
    app = make_app(service := AsyncEngine(engine))
    with TestClient(app):
        until(lambda: service.ready)
        yield Watched(gate, service, app)
        gate.opened.set()


def live_bytes() -> int:
    """Bytes of all tensors that anything refers to."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
    return sum(storages.values())


def tensors() -> list[torch.Tensor]:
    return [found for found in gc.get_objects() if type(found) is torch.Tensor and found.device.type == "cpu"]


def test_a_reader_that_never_reads_costs_little_and_nothing_after_it_left(watched: Watched) -> None:
    async def ask() -> tuple[int, list[dict[str, Any]]]:
        gone = asyncio.Event()
        running, _, sent = call(watched.app, "/v1/stream", ASK, gone, reading=asyncio.Event())
        await until_ended(watched.service, 1)
        held = live_bytes()
        gone.set()
        await asyncio.wait_for(running, 60)
        return held, sent

    before = live_bytes()
    held, sent = asyncio.run(ask())
    assert held - before < 8 * MEBIBYTE, "60 events of 4 images have 94 MB"
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert live_bytes() - before < MEBIBYTE // 2, "the images of the last request may wait for the next tick"


async def until_ended(service: AsyncEngine, requests: float) -> None:
    """Wait until so many requests have their images."""
    assert service.registry is not None
    while (service.registry.get_sample_value("stepfusion_requests_total", {"outcome": "done"}) or 0) < requests:
        await asyncio.sleep(0.01)


def test_a_reader_that_reads_late_sees_the_latest_previews_and_the_result(watched: Watched) -> None:
    async def ask() -> bytes:
        reading = asyncio.Event()
        running, _, sent = call(watched.app, "/v1/stream", ASK, asyncio.Event(), reading=reading)
        await until_ended(watched.service, 1)
        reading.set()
        await asyncio.wait_for(running, 30)
        return b"".join(message.get("body", b"") for message in sent)

    events = events_of(asyncio.run(ask()).decode())
    steps = [data["step"] for name, data in events if name == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 60, "the last step is never lost"
    assert len(steps) < 60, "a reader who was too slow does not go through what is over"
    assert (events[0][0], events[-1][0]) == ("accepted", "result")


def test_small_previews_are_all_kept() -> None:
    """A reader in time is not told less: 100 steps of a small image are far below the bound."""
    _, engine = gated_engine()
    with TestClient(make_app(service := AsyncEngine(engine))) as client:
        until(lambda: service.ready)
        text = client.post("/v1/stream", json={"n": 2, "steps": 100, "every": 1, "labels": 0}).text
    told = [(data["step"], data["images"]) for name, data in events_of(text) if name == "progress"]
    assert told == [(step, [0, 1]) for step in range(1, 101)]


def test_previews_are_encoded_one_after_the_other(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, encode, most = threading.Lock(), messages.progress, []

    def alone(preview: Preview) -> bytes:
        most.append(lock.acquire(blocking=False))
        try:
            return encode(preview)
        finally:
            if most[-1]:
                lock.release()

    monkeypatch.setattr(messages, "progress", alone)

    async def ask() -> None:
        streams = [call(watched.app, "/v1/stream", ASK, asyncio.Event())[0] for _ in range(3)]
        await asyncio.wait_for(asyncio.gather(*streams), 60)

    asyncio.run(ask())
    assert len(most) > 3
    assert all(most)
    until(lambda: idle(watched.service))


# The buffer


def test_a_closed_buffer_holds_nothing_and_takes_nothing() -> None:
    buffer = PreviewBuffer()
    buffer.put_preview(preview(1, (0, 1)))
    buffer.close()
    buffer.put_preview(preview(2, (0, 1)))
    assert buffer.nbytes == 0
    assert buffer.take() is None


def preview(step: int, images: tuple[int, ...], side: int = 64) -> Preview:
    x0 = torch.full((len(images), 3, side, side), float(step))
    return Preview(step, 500, 500 - step, images, x0)


def taken(buffer: PreviewBuffer) -> list[Preview]:
    return list(iter(buffer.take, None))


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_what_waits_is_bounded_and_ends_with_the_latest(n: int) -> None:
    buffer = PreviewBuffer()
    each = preview(1, (0,)).x0.nbytes
    for step in range(1, 501):
        buffer.put_preview(preview(step, tuple(range(n))))
        assert buffer.nbytes <= max(MEBIBYTE, n * each)
    previews = taken(buffer)
    assert [p.step for p in previews] == list(range(501 - len(previews), 501)), "the latest, and none twice"
    assert buffer.take() is None
    assert buffer.nbytes == 0


def test_images_in_different_groups_keep_their_own_latest() -> None:
    buffer = PreviewBuffer()
    groups = [(0, 1, 2), (3,), (2, 3), (4, 5, 6, 7, 8)]
    for step in range(400):
        buffer.put_preview(preview(step, groups[step % 3] if step else groups[3]))
    latest: dict[int, int] = {}
    for p in taken(buffer):
        assert p.x0.shape[0] == len(p.images)
        assert (p.x0 == p.step).all()
        latest |= dict.fromkeys(p.images, p.step)
    assert latest == {0: 399, 1: 399, 2: 399, 3: 398, **dict.fromkeys((4, 5, 6, 7, 8), 0)}


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (65, 3), (256, 256), (1000, 40)])
def test_a_preview_holds_nothing_of_its_event(size: tuple[int, int]) -> None:
    x0 = torch.rand(2, 3, *size)
    event = sf.Event(step=4, steps=9, timestep=77, images=(1, 5), x=x0.clone(), x0=x0)
    made = Preview.of_event(event)
    stride = -(-max(size) // 64)
    assert (made.step, made.steps, made.timestep, made.images) == (5, 9, 77, (1, 5))
    assert torch.equal(made.x0, x0[:, :, ::stride, ::stride])
    assert max(made.x0.shape[2:]) <= 64
    assert made.x0.untyped_storage().nbytes() == made.x0.nbytes
    assert made.x0.untyped_storage().data_ptr() != x0.untyped_storage().data_ptr()
