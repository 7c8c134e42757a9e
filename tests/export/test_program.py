"""The exported program is the engine's network, at any batch size, inside the engine's own loop."""

import pytest
import torch

import stepfusion as sf
from stepfusion.export import export_program
from stepfusion_testing.networks import smooth, tiny_unet


def make(network: object, **arguments: object) -> sf.Engine:
    return sf.Engine(network, sf.NoiseSchedule.cosine(), device="cpu", prediction="v_prediction", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [None, 4])
def test_the_program_samples_the_engines_images(classes: int | None) -> None:
    engine = make(tiny_unet(classes=classes))
    module = export_program(engine).module()
    exported = make(module, shape=engine.shape, num_classes=classes)
    labels = None if classes is None else 1
    for n in (1, 3):
        images = engine.sample(n, steps=4, labels=labels)
        torch.testing.assert_close(exported.sample(n, steps=4, labels=labels), images, rtol=0, atol=1e-4)


def test_a_function_cannot_be_exported() -> None:
    with pytest.raises(
        sf.ExportError, match=r"^only a torch.nn.Module can be exported, and the network is a function$"
    ):
        export_program(make(smooth, shape=(1, 8, 8)))


def test_what_cannot_be_traced_is_said_in_a_line() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return x if bool((x > 0).all()) else -x

    with pytest.raises(sf.ExportError, match=r"^torch.export cannot trace the network: .+$"):
        export_program(make(Branching(), shape=(1, 8, 8)))


def test_a_program_that_differs_is_refused() -> None:
    class Stateful(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(sf.ExportError, match=r"^(torch.export cannot trace|the exported program differs)"):
        export_program(make(Stateful(), shape=(1, 8, 8)))


def test_the_program_holds_no_paths_of_this_machine() -> None:
    class Convolution(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + timesteps.view(-1, 1, 1, 1)

    program = export_program(make(Convolution(), shape=(1, 8, 8)))
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)
