"""A sampling option is declared once, and reaches every way to ask for a sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.options import ExecutionOptions, SamplingOptions


def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


@pytest.fixture
def engine() -> sf.Engine:
    schedule = sf.NoiseSchedule.linear(100)
    return sf.Engine(network, schedule, shape=(1, 4, 4), device="cpu", backend="reference", batch=2, invariant=True)


def submitted(engine: sf.Engine, **options: Any) -> torch.Tensor:
    service = sf.serving.AsyncEngine(engine).start()
    try:
        return service.submit(2, steps=3, **options).result(30).images
    finally:
        service.close()


WAYS: dict[str, Callable[..., Any]] = {
    "sample": lambda engine, **options: engine.sample(2, steps=3, **options),
    "generate": lambda engine, **options: torch.cat(list(engine.generate(2, steps=3, **options))),
    "stream": lambda engine, **options: list(engine.stream(2, steps=3, **options)),
    "request": lambda engine, **options: engine.request(2, steps=3, **options),
    "submit": submitted,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_new_option_is_taken_everywhere_once_it_is_declared(
    engine: sf.Engine, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match=r"^'shade' is not a sampling option; the options are sampler, steps, eta,"):
        WAYS[way](engine, shade=3)
    monkeypatch.setitem(SamplingOptions.__annotations__, "shade", int)
    WAYS[way](engine, shade=3)


@pytest.mark.parametrize(
    "options",
    [
        {"start": torch.full((2, 1, 4, 4), 0.25), "eta": 1.0},
        {"noise": torch.linspace(-1, 1, 96).reshape(3, 2, 1, 4, 4), "sampler": "ddpm"},
        {"image": torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4), "strength": 0.5, "seed": [1, 2]},
        {"image": torch.zeros(2, 1, 4, 4), "mask": torch.eye(4).reshape(1, 1, 4, 4), "indices": [5, 0]},
    ],
    ids=lambda options: " ".join(options),
)
def test_given_states_noise_and_images_are_the_same_served(engine: sf.Engine, options: dict[str, Any]) -> None:
    assert torch.equal(submitted(engine, **options), engine.sample(2, steps=3, **options))


def test_execution_options_are_the_engines_own() -> None:
    arguments = inspect.signature(sf.Engine).parameters
    for name, option in inspect.signature(ExecutionOptions).parameters.items():
        assert arguments[name].default == option.default


def test_wrong_execution_options_are_named() -> None:
    with pytest.raises(TypeError, match=r"^invariant must be True or False, got 1$"):
        ExecutionOptions(invariant=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^batch must be in \[1, 1048576\], got 0$"):
        ExecutionOptions(batch=0)


def test_labels_by_name_are_those_by_number() -> None:
    def labelled(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + 0.1 * labels.view(-1, 1, 1, 1)

    made = sf.Engine(
        labelled, sf.NoiseSchedule.linear(100), shape=(1, 4, 4), num_classes=4, null_label=3,
        class_names=("Cat", "Dog", "Ship at sea"), device="cpu",
    )  # fmt: skip
    by_name = made.sample(3, steps=2, labels=["cat", 1, "SHIP AT SEA"])
    torch.testing.assert_close(by_name, made.sample(3, steps=2, labels=[0, 1, 2]), rtol=0, atol=0)
    torch.testing.assert_close(
        made.sample(2, steps=2, labels="dog"), made.sample(2, steps=2, labels=1), rtol=0, atol=0
    )
    for wrong in ("cow", ["dog", "cow"]):
        with pytest.raises(ValueError, match="labels has no class 'cow'; the names are Cat, Dog, Ship at sea"):
            made.sample(2, labels=wrong)
