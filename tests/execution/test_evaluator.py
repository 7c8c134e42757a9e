"""How an engine calls its network: what is hoisted out of the loop, and that nothing changes by it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import stepfusion as sf
from stepfusion.execution.evaluator import Evaluator
from stepfusion.networks import UNet2D
from stepfusion_testing.networks import labelled, smooth, tiny_unet


class Shifted(UNet2D):
    """A network that changes the composition of the parts."""

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return super().forward(x, timesteps, class_labels) + 1


@pytest.mark.parametrize("classes", [None, 4])
@torch.no_grad()
def test_the_hoisted_time_path_gives_the_forward_pass(classes: int | None) -> None:
    network = tiny_unet(classes=classes)
    evaluator = Evaluator(network, classes is not None)
    x, timesteps, rows = torch.randn(3, 1, 8, 8), torch.tensor([999, 500, 20, 0]), torch.tensor([2, 0, 0])
    labels = torch.tensor([1, 3, 0])
    features = evaluator.features(timesteps)
    assert evaluator.hoisted
    assert features.is_floating_point()
    out = evaluator.network(x, features[rows], labels)
    plain = network(x, timesteps[rows], *([labels] if classes else []))
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_the_length_of_its_table() -> None:
    """Matrix products of another height may sum in another order, so all have one height."""
    evaluator = Evaluator(tiny_unet(classes=None), False)
    timesteps = torch.arange(200).flip(0)
    whole = evaluator.features(timesteps)
    for first, last in ((0, 1), (3, 70), (64, 128), (150, 200)):
        assert torch.equal(evaluator.features(timesteps[first:last]), whole[first:last])


def test_without_labels_the_whole_time_path_is_hoisted() -> None:
    """The label joins within the tick; without one, a row holds what every block adds."""
    plain, conditional = tiny_unet(classes=None), tiny_unet()
    timesteps = torch.arange(2)
    assert Evaluator(plain, False).features(timesteps).shape == (2, plain.projection_size)
    assert Evaluator(conditional, True).features(timesteps).shape == (2, conditional.config.time_embed_dim)


@pytest.mark.parametrize("network", [smooth, labelled])
def test_other_networks_are_given_the_timestep(network: Any) -> None:
    evaluator = Evaluator(network, network is labelled)
    timesteps, labels = torch.tensor([7, 3]), torch.tensor([1, 0])
    assert torch.equal(evaluator.features(timesteps), timesteps)
    x = torch.randn(2, 1, 4, 4)
    wanted = network(x, timesteps, labels) if network is labelled else network(x, timesteps)
    assert torch.equal(evaluator.network(x, timesteps, labels), wanted)


@torch.no_grad()
def test_a_forward_pass_that_someone_changed_or_watches_is_called_whole() -> None:
    changed = Shifted(tiny_unet().config).eval()
    watched, seen = tiny_unet(), []
    watched.register_forward_hook(lambda *_: seen.append(1))
    x, timesteps, labels = torch.randn(2, 1, 8, 8), torch.tensor([5, 5]), torch.tensor([0, 1])
    for network in (changed, watched):
        evaluator = Evaluator(network, True)
        assert not evaluator.hoisted
        out = evaluator.network(x, evaluator.features(timesteps), labels)
        assert torch.equal(out, network(x, timesteps, labels))
    assert len(seen) == 2


def test_what_diffusers_returns_is_unwrapped() -> None:
    class Output:
        sample = torch.ones(1)

    out = Evaluator(lambda x, t: Output(), False).network(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert torch.equal(out, Output.sample)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_what_is_no_tensor_is_refused(guidance: float | None) -> None:
    engine = sf.Engine(
        lambda x, t, y: [x], sf.NoiseSchedule.linear(100), shape=(1, 4, 4), num_classes=2, null_label=1, device="cpu"
    )
    with pytest.raises(TypeError, match=r"^the network must return a tensor, got list$"):
        engine.sample(1, steps=2, guidance=guidance)
