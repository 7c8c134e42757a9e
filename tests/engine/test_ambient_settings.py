"""What an engine makes depends on its arguments alone: ambient settings change no bit, and come back as they were."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion.kernels.launch import plain_torch
from stepfusion_testing.ambient import AMBIENT, default_device, default_dtype
from stepfusion_testing.tiny_model import NULL_LABEL, save_tiny_model, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, LABELS = (1, 8, 8), [0, 1, 2]


class UsersNetwork(nn.Module):
    """A network as users write them: it makes tensors without saying their dtype or device."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.dropout = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Dropout(0.5)
        nn.init.constant_(self.convolution.weight, 0.05)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        frequencies = torch.linspace(0.1, 1.0, 8)
        time = torch.sin(t[:, None] * frequencies).mean(1)
        return self.dropout(self.convolution(x)) + time[:, None, None, None]


OURS, USERS = tiny_network(), UsersNetwork()  # made before any setting is changed: weights are an argument


def labelled(schedule: sf.NoiseSchedule) -> sf.Engine:
    return sf.Engine(OURS, schedule, num_classes=NULL_LABEL + 1, null_label=NULL_LABEL, batch=2)


def everything(directory: Path) -> dict[str, torch.Tensor]:
    """What engines make by every public way, of our network, of a user's, and of a directory."""
    schedule = sf.NoiseSchedule.linear(100)
    engine = labelled(schedule)
    found = {f"ours: {name}": value for name, value in made_by(engine, {"labels": LABELS, "guidance": 2.0}).items()}
    users = sf.Engine(USERS, schedule, shape=SHAPE, batch=2)
    found |= {f"a user's: {name}": value for name, value in made_by(users, {}).items()}
    read = sf.Engine.from_pretrained(directory)
    service = sf.serving.AsyncEngine(read).start()
    served = service.submit(3, steps=3, seed=5, labels=LABELS).result()
    service.close()
    return {**found, "served": served.images, "read": read.sample(3, steps=3, seed=5, labels=LABELS)}


def made_by(engine: sf.Engine, options: dict[str, object]) -> dict[str, torch.Tensor]:
    image, mask = (
        torch.full((3, *SHAPE), 0.25, dtype=torch.float32, device="cpu"),
        torch.zeros(1, 1, 8, 8, device="cpu"),
    )
    mask[..., 4:] = 1
    labels = options.get("labels")
    noise = engine.encode(image, steps=3, labels=labels)  # type: ignore[arg-type]
    events = list(engine.stream(3, steps=3, eta=1.0, seed=2, **options))  # type: ignore[arg-type]
    return {
        "sample": engine.sample(3, steps=3, eta=0.5, seed=1, **options),  # type: ignore[arg-type]
        "ddpm": engine.sample(3, sampler="ddpm", steps=4, seed=1, **options),  # type: ignore[arg-type]
        "from an image": engine.sample(3, steps=4, image=image, strength=0.6, seed=1, **options),  # type: ignore[arg-type]
        "masked": engine.sample(3, steps=3, image=image, mask=mask, seed=1, **options),  # type: ignore[arg-type]
        "pixels": torch.cat(list(engine.generate(3, steps=2, seed=4, **options))),  # type: ignore[arg-type]
        "events": torch.stack([torch.cat([e.x, e.x0]) for e in events if len(e.x) == 2]),
        "encoded": noise,
        "between": engine.interpolate(3, 4, 3, steps=2, labels=labels and labels[0]),  # type: ignore[arg-type, index]
        "to_uint8": engine.to_uint8(image),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def plain(directory: Path) -> dict[str, torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return everything(directory)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("setting", AMBIENT)
def test_ambient_settings_change_nothing(setting: str, plain: dict[str, torch.Tensor], directory: Path) -> None:
    with AMBIENT[setting]():
        given = everything(directory)
    assert given.keys() == plain.keys()
    for name, value in plain.items():
        assert given[name].dtype == value.dtype, name
        assert given[name].device == value.device, name
        assert "sample" not in name or not given[name].is_inference(), name
        assert torch.equal(given[name], value), name


@pytest.mark.parametrize("setting", AMBIENT)
def test_an_engine_that_was_used_under_a_setting_is_not_spoiled_by_it(setting: str) -> None:
    """A runner's buffers are kept: those made in inference mode could not be written to outside of it."""
    schedule = sf.NoiseSchedule.linear(100)
    expected = labelled(schedule).sample(3, steps=3, seed=1, labels=LABELS)
    engine = labelled(schedule)
    with AMBIENT[setting]():
        engine.sample(3, steps=3, seed=1, labels=LABELS)
    assert torch.equal(engine.sample(3, steps=3, seed=1, labels=LABELS), expected)


def test_between_two_steps_and_after_them_the_callers_settings_hold() -> None:
    engine = labelled(sf.NoiseSchedule.linear(100))
    seen = []

    def note(*_: object) -> None:
        seen.append((torch.get_default_dtype(), torch.get_default_device().type, torch.is_autocast_enabled("cpu")))

    with default_dtype(torch.float64), default_device("meta"), torch.autocast("cpu", torch.bfloat16):
        engine.sample(1, steps=2, labels=0, callback=note)
        for _ in engine.stream(1, steps=2, labels=0):
            note()
        for _ in engine.generate(1, steps=2, labels=0):
            note()
        with pytest.raises(ValueError, match="steps"):
            engine.sample(1, steps=-1, labels=0)
        note()
        assert torch.is_grad_enabled()
    assert set(seen) == {(torch.float64, "meta", True)}
    assert len(seen) == 6


def test_the_default_dtype_comes_back_if_threads_overlap() -> None:
    """Each would restore what it found, if nobody counted: the one that ends last found float32."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with plain_torch(gradients=False):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with default_dtype(torch.float64):
        with plain_torch(gradients=False):
            thread.start()
            assert entered.wait(60)
            assert torch.get_default_dtype() == torch.float32
        leave.set()
        thread.join(60)
        assert torch.get_default_dtype() == torch.float64
