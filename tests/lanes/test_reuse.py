"""Rows that reuse what the inner levels of a UNet made at an earlier row (Ma et al. 2024, "DeepCache")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stepfusion as sf
from stepfusion.networks import UNet2D, UNet2DCondition, UNet2DConditionConfig
from stepfusion_testing.networks import smooth, tiny_unet
from stepfusion_testing.twins import assert_same_bits

SCHEDULE = sf.NoiseSchedule.linear(100)


def engine(model: Any = None, **arguments: Any) -> sf.Engine:
    known = {"device": "cpu", "backend": "reference", "network": "eager", "null_label": 3, "batch": 4}
    return sf.Engine(model or tiny_unet(), SCHEDULE, **{**known, **arguments})


class ByHand:
    """The same network and the same reuse, kept by hand: the features that enter the last level on the way up."""

    def __init__(self, network: UNet2D, every: int) -> None:
        self._network, self._every, self._calls = network, every, 0
        self._kept: Tensor | None = None

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        network = self._network
        last = network.up_blocks[-1]
        whole = self._calls % self._every == 0
        self._calls += 1

        def replace(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if whole:
                self._kept = inputs[0].clone()
                return inputs
            assert self._kept is not None
            return (self._kept, *inputs[1:])

        with last.register_forward_pre_hook(replace), torch.no_grad():
            return network(x, timesteps, labels)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_images_are_those_of_reuse_by_hand(every: int) -> None:
    """By hand all levels run, and what the inner ones make is thrown away."""
    network = tiny_unet()
    images = engine(network).sample(2, steps=7, reuse=every, seed=3, labels=[0, 1])
    twin = sf.Engine(
        ByHand(network, every), SCHEDULE, shape=(1, 8, 8), num_classes=4, device="cpu", backend="reference", batch=4
    )
    torch.testing.assert_close(images, twin.sample(2, steps=7, seed=3, labels=[0, 1]), rtol=0, atol=2e-5)
    exact = engine(network).sample(2, steps=7, seed=3, labels=[0, 1])
    assert torch.equal(images, exact) is (every == 1)


@pytest.mark.parametrize("way", ["eager", "cpp", "traced", pytest.param("compile", marks=pytest.mark.soak)])
def test_an_images_bits_do_not_depend_on_whether_its_neighbours_reuse(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables that reuse, that do not, and that reuse at other rows, guided and not, in one batch.

    "traced" is "compile" with what Dynamo traced run as it is.
    """
    if way == "traced":
        monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph.forward)
    made = engine(invariant=True, network="compile" if way == "traced" else way)
    tables = [made.table("ddim", 6).reusing(2), made.table("ddim", 5), made.table("ddpm", 7).reusing(3)]
    asked: dict[str, list[Any]] = {"seed": [1, 2, 3], "labels": [0, 1, 2], "guidance": [1.0, 2.0, 3.0]}
    together = made.sample(3, tables, **asked)
    for image in range(3):
        alone = {name: values[image] for name, values in asked.items()}
        # guided, as the three together are: the network is called without a label, too
        one = made.sample(
            2, [tables[image]] * 2, **{**alone, "guidance": [alone["guidance"], 5.0]}, indices=[image, 0]
        )
        assert_same_bits("image", together[image], one[0])


def counted(name: str, method: Any, seen: list[str]) -> Any:
    def call(*inputs: Tensor) -> Any:
        seen.append(name)
        return method(*inputs)

    return call


def test_what_runs_is_counted() -> None:
    made = engine()
    network = made.network
    assert isinstance(network, UNet2D)
    seen: list[str] = []
    for name in ("predict", "predict_keeping", "predict_outer"):
        setattr(network, name, counted(name, getattr(network, name), seen))
    made.sample(2, steps=5, reuse=2)
    assert seen == ["predict_keeping", "predict_outer", "predict_keeping", "predict_outer", "predict_keeping"]
    seen.clear()
    made.sample(2, steps=5)
    made.sample(2, steps=5, reuse=1)
    assert seen == ["predict"] * 10


def test_edits_start_with_a_whole_row_and_inpaint() -> None:
    made = engine()
    image, mask = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    mask[..., :4] = 0
    table = made.table("ddim", 10).reusing(3)
    assert table.last(5).reuses is not None
    assert table.last(5).reuses.tolist() == [False, False, True, True, False]  # row 5 is whole now, and row 6 was
    images = made.sample(2, table, image=image, mask=mask, strength=0.5)
    assert_same_bits("kept", images[..., :4], image.expand(2, -1, -1, -1)[..., :4])


def test_serving_gives_the_offline_bits() -> None:
    made = engine(invariant=True)
    asked: list[dict[str, Any]] = [
        {"steps": 6, "reuse": 2, "labels": 1},
        {"steps": 5, "reuse": 3, "labels": 2, "seed": 4},
        {"steps": 4, "labels": 0},
    ]
    service = sf.serving.AsyncEngine(made).start()
    try:
        results = [service.submit(1, **options) for options in asked]
        images = [result.result(60).images for result in results]
    finally:
        service.close()
    for options, served in zip(asked, images, strict=True):
        assert_same_bits("served", served, made.sample(1, **options))


def test_networks_with_texts_reuse_too() -> None:
    torch.manual_seed(0)
    config = UNet2DConditionConfig.from_dict({
        "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 12, "attention_head_dim": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    })  # fmt: skip
    network = UNet2DCondition(config, sequence_length=5).eval()
    made = sf.Engine(network, SCHEDULE, device="cpu", backend="reference", network="eager")
    texts = {"encoder_hidden_states": torch.randn(2, 5, 12)}
    nothing = {"encoder_hidden_states": torch.zeros(5, 12)}
    asked: dict[str, Any] = {"conditions": texts, "null_conditions": nothing, "guidance": 3.0, "steps": 8}
    exact, near = made.sample(**asked), made.sample(**asked, reuse=2)
    assert not torch.equal(exact, near)
    torch.testing.assert_close(near, exact, rtol=0, atol=0.5 * float(exact.std()))


class Own(UNet2D):
    """A subclass with a `predict` of its own, which has not told what it keeps."""

    def predict(self, x: Tensor, projections: Tensor) -> Tensor:
        return super().predict(x, projections) * 0.5


def test_what_cannot_reuse_says_so() -> None:
    message = "reuse needs a UNet2D or UNet2DCondition of two levels or more"
    plain = sf.Engine(smooth, SCHEDULE, shape=(1, 8, 8), device="cpu")
    own = Own(tiny_unet().config)
    hooked = tiny_unet()
    hooked.register_forward_hook(lambda *_: None)
    for made in (plain, engine(own), engine(hooked)):
        with pytest.raises(ValueError, match=message):
            made.sample(1, steps=4, reuse=2)
        made.sample(1, steps=4, reuse=1)
    made = engine()
    with pytest.raises(ValueError, match="table and reuse exclude each other"):
        made.sample(1, made.table("ddim", 4), reuse=2)
    for wrong in (0, -1, 2.5, "2"):
        with pytest.raises((TypeError, ValueError), match="reuse"):
            made.sample(1, steps=4, reuse=wrong)


def test_tables_that_reuse() -> None:
    table = engine().table("ddim", 5)
    both = sf.StepTable.concatenate([table.reusing(2), table, table.reusing(4)])
    assert both.reuses is not None
    assert both.reuses.astype(int).tolist() == [0, 1, 0, 1, 0] + [0] * 5 + [0, 1, 1, 1, 0]
    assert table.reusing(2).digest != table.digest
    assert table.reusing(1).digest == table.digest
    assert table.reusing(2).last(2).reuses.tolist() == [False, False]  # type: ignore[union-attr]
    assert repr(table.reusing(2)).startswith("StepTable(ddim, eta 0, whole every 2 rows, 5 rows")
    for wrong in (np.ones(5, np.bool_), np.zeros(4, np.bool_), [False] * 5):
        with pytest.raises((TypeError, ValueError), match="reuses must be"):
            replace(table, reuses=wrong)
