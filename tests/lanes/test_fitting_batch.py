"""The batch that free memory decides: whatever a model is asked for fits, on a CPU whose memory is counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion_testing.condition_networks import condition_network, options_of
from stepfusion_testing.fake_memory import FakeMemory
from stepfusion_testing.networks import smooth, tiny_unet

SCHEDULE = sf.NoiseSchedule.linear()
IMAGES = 12
HALF = torch.ones(1, 1, 8, 8)
HALF[..., :4] = 0
#: What may be asked of a model without a network to speak of, of a UNet with classes, and of one with a text.
PLAIN: dict[str, dict[str, Any]] = {
    "nothing more": {"steps": 4},
    "history": {"steps": 4, "sampler": "dpmpp_3m"},
    "a mask": {"steps": 4, "image": torch.zeros(1, 1, 8, 8), "mask": HALF},
}
CLASSES: dict[str, dict[str, Any]] = {
    "guidance": {"steps": 2, "labels": 1, "guidance": 2.0},
    "reuse": {"steps": 2, "labels": 1, "reuse": 2},
    "guided reuse": {"steps": 2, "labels": 1, "guidance": 2.0, "reuse": 2},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operators this small wait for other threads, and not for their work, where a machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def engine(network: Any, **arguments: Any) -> sf.Engine:
    known = {"device": "cpu", "backend": "reference", "network": "eager"}
    return sf.Engine(network, SCHEDULE, **{**known, **arguments})


def small(**arguments: Any) -> sf.Engine:
    return engine(smooth, shape=(1, 8, 8), prediction="epsilon", **arguments)


def unet(**arguments: Any) -> sf.Engine:
    return engine(tiny_unet(), null_label=3, **arguments)


def texts(**arguments: Any) -> sf.Engine:
    return engine(condition_network("stable diffusion"), **arguments)


def one_text() -> dict[str, Any]:
    """A text for all images, so that lanes hold it and little else does."""
    options = options_of(texts(), 1)
    return {**options, "conditions": {name: value[0] for name, value in options["conditions"].items()}}


def needed(make: Any, lanes: int, **options: Any) -> int:
    """The bytes of images by so many lanes, that of the images themselves and all."""
    made = make(batch=lanes)
    with FakeMemory() as memory:
        made.sample(IMAGES, **options)
    return memory.peak


def check_fits(make: Any, limit: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """Sample where there are so many bytes; a batch that does not fit warns, which is an error. Returns the batch."""
    memory = FakeMemory(limit)
    memory.decides(monkeypatch)
    made = make()
    with memory:
        made.sample(IMAGES, **options)
    return made.batch


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("asked", PLAIN)
def test_what_is_asked_of_lanes_fits(asked: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = needed(small, lanes, **PLAIN[asked])
    check_fits(small, int(0.95 * limit), monkeypatch, **PLAIN[asked])  # just not enough for so many lanes


@pytest.mark.parametrize("asked", [*CLASSES, "text"])
def test_what_is_asked_of_a_network_fits(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = texts if asked == "text" else unet
    options = CLASSES[asked] if asked in CLASSES else {"steps": 2, **one_text()}
    limit = needed(make, 4, **options)
    check_fits(make, int(0.95 * limit), monkeypatch, **options)


def test_most_of_the_memory_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = needed(small, 8, **PLAIN["history"])
    assert check_fits(small, int(1.6 * limit), monkeypatch, **PLAIN["history"]) >= 8
