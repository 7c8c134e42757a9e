"""UNets as a GPU runs them, with nothing added in a pass of its own: the same output, and the launches of a tick."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import stepfusion as sf
from stepfusion import kernels
from stepfusion.bench.launches import PRODUCTS, Tick, count_tick, main, whole
from stepfusion.bench.models import load_model
from stepfusion.kernels import reference
from stepfusion.networks import ADMUNet, ADMUNetConfig, UNet2D, UNet2DConfig, prepare_network
from stepfusion.networks import fused as fused_blocks
from stepfusion.networks.blocks import ResnetBlock
from stepfusion.networks.fused import folded
from stepfusion_testing.networks import tiny_unet
from stepfusion_testing.twins import NETWORK_OPS

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "padding on one side": {"downsample_padding": 0, "attention_head_dim": None},
    "classes": {"num_class_embeds": 11, "layers_per_block": 2},
    "scale shift, mid norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "another activation": {"act_fn": "mish", "center_input_sample": True},
    "no middle": {"mid_block_type": None},
    "no attention": {"add_attention": False, "dropout": 0.5},
    "resampling blocks": {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "a concatenation without a shortcut": {
        "block_out_channels": (16, 16, 32),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}
ADM = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "num_heads": 2}
ADMS: dict[str, dict[str, Any]] = {
    "adm": {},
    "adm, time added": {"use_scale_shift_norm": False, "class_cond": True},
    "adm, resampling blocks": {"resblock_updown": True, "learn_sigma": True},
}


@pytest.fixture
def in_eager_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have tests of their own; here their twins do, which are quick."""
    for name in NETWORK_OPS:
        monkeypatch.setattr(kernels, name, getattr(reference, name))


def make(name: str) -> UNet2D | ADMUNet:
    """A network with random weights, of which no bias is zero."""
    torch.manual_seed(3)
    network: UNet2D | ADMUNet
    if name in ADMS:
        network = ADMUNet(ADMUNetConfig(**{**ADM, "attention_resolutions": (8,), **ADMS[name]}))
    else:
        network = UNet2D(UNet2DConfig(**{**SMALL, **VARIANTS[name]}))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def inputs(network: UNet2D | ADMUNet, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x, timesteps, and labels if the network takes any."""
    size = network.sample_size
    x = torch.randn(3, network.in_channels, size, size, dtype=dtype)  # type: ignore[arg-type]
    labels = () if network.num_classes is None else (torch.tensor([1, 0, 2]),)
    return (x, torch.tensor([900, 3, 0]), *labels)


@pytest.mark.parametrize("name", [*VARIANTS, *ADMS])
@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_a_fused_network_gives_the_same_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make(name)
    plain = prepare_network(network, CPU, torch.float64, fused=False)
    given = inputs(network, torch.float64)
    wanted = plain(*given)
    for apart in (False, True):  # the input of a shortcut is one tensor, or two: the latter in half precision alone
        monkeypatch.setattr(fused_blocks, "projects", lambda dtype, channels, apart=apart: apart)
        fused = prepare_network(network, CPU, torch.float64, fused=True)
        assert fused.defers
        for _ in range(2):  # what is folded, and what was kept
            torch.testing.assert_close(fused(*given), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
        assert fused.state_dict().keys() == network.state_dict().keys()


@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_half_precision_is_as_near_to_float64_as_pytorchs_operators() -> None:
    network = make("padding on one side")
    exact = prepare_network(network.bfloat16(), CPU, torch.float64, fused=False)
    given = inputs(network, torch.bfloat16)
    wanted = exact(given[0].double(), *given[1:])
    errors = []
    for fused in (False, True):
        prepared = prepare_network(network, CPU, torch.bfloat16, fused=fused)
        errors.append(float((prepared(*given).double() - wanted).square().mean().sqrt()))
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_a_block_that_scales_its_output_runs_by_pytorchs_operators() -> None:
    torch.manual_seed(0)
    network = UNet2D(UNet2DConfig(**SMALL, mid_block_scale_factor=2.0)).eval()
    fused = prepare_network(network, CPU, torch.float32, fused=True)
    assert not fused.defers
    given = inputs(network)
    torch.testing.assert_close(fused(*given), network(*given), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_hooks_see_tensors() -> None:
    """Also one that is registered once the network is fused, whose time projections contain biases by then."""
    network = make("defaults")
    given = inputs(network)
    fused = prepare_network(network, CPU, torch.float32, fused=True)
    wanted = fused(*given)
    projections = fused.condition(fused.embed_time(given[1]))
    seen: list[torch.Tensor] = []
    block = next(module for module in fused.modules() if isinstance(module, ResnetBlock))
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(fused.predict(given[0], projections), wanted, rtol=0, atol=1e-5)
    assert [type(out) for out in seen] == [torch.Tensor]
    handle.remove()
    assert torch.equal(fused(*given), wanted)


@pytest.mark.usefixtures("in_eager_pytorch")
@pytest.mark.parametrize("name", ["defaults", "adm, time added"])
def test_gradients_are_those_of_pytorchs_operators(name: str) -> None:
    """Of every weight, those that are joined too."""
    network = make(name)
    given = inputs(network, torch.float64)
    gradients = []
    for fused in (False, True):
        prepared = prepare_network(network, CPU, torch.float64, fused=fused, copied=True)
        with torch.no_grad():
            prepared(*given)  # keeps what it joins
        prepared(*given).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in prepared.named_parameters()})
    for weight, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][weight], wanted, rtol=1e-5, atol=1e-8, msg=weight)


@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_a_replaced_layer_is_called() -> None:
    network = make("defaults")
    conv = network.conv_in

    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    conv.__class__ = Doubled
    given = inputs(network)
    fused = prepare_network(network, CPU, torch.float32, fused=True)
    torch.testing.assert_close(fused(*given), network(*given), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("in_eager_pytorch")
@torch.no_grad()
def test_what_is_folded_follows_the_weights_of_another_preparation() -> None:
    network = make("defaults")
    given = inputs(network)
    fused = prepare_network(network, CPU, torch.float32, fused=True)
    before = fused(*given)
    changed = copy.deepcopy(fused)
    for parameter in changed.parameters():
        parameter.mul_(0.5)
    again = prepare_network(changed, CPU, torch.float32, fused=True, copied=True)
    plain = prepare_network(changed, CPU, torch.float32, fused=False)
    torch.testing.assert_close(again(*given), plain(*given), rtol=0, atol=1e-5)
    assert torch.equal(fused(*given), before)


@torch.no_grad()
def test_what_is_folded_is_done_before_others_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread reads it on a stream of its own: the stream that makes it is waited for, once."""
    layer, events = nn.Identity(), []

    class Made(torch.Tensor):
        """A tensor that says it is on a GPU."""

        device = torch.device("cuda", 0)  # type: ignore[assignment]

    class Stream:
        def synchronize(self) -> None:
            events.append(dict(vars(layer).get("folded", {})))

    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream())
    made = torch.ones(2).as_subclass(Made)
    monkeypatch.setattr(Made, "detach", lambda self: self)
    for _ in range(2):
        assert folded(layer, "weight", lambda: made) is made
    assert events == [{}]


@pytest.mark.interpreter
@pytest.mark.parametrize("guidance", [pytest.param(None, marks=pytest.mark.soak), 2.0])
def test_an_engine_makes_the_same_images(guidance: float | None) -> None:
    """The whole tick by our kernels, the state in C order and the network in NHWC memory."""
    network = tiny_unet(classes=None if guidance is None else 4, channels=3)
    options: dict[str, Any] = {"device": "cpu", "shape": (3, 8, 8), "batch": 2}
    options |= {} if guidance is None else {"num_classes": 4, "null_label": 3}
    asked = {} if guidance is None else {"labels": [0, 1], "guidance": guidance}
    schedule = sf.NoiseSchedule.linear()
    table = sf.ddim(schedule, 2, eta=1.0)
    images = [
        sf.Engine(network, schedule, backend=backend, network="eager", **options).sample(
            2, table, progress=False, **asked
        )
        for backend in ("triton", "reference")
    ]
    # an error of 1e-5 of the network, as guidance and the first row's x0 / eps enlarge it
    enlarged = float(schedule.alphas_cumprod[table.timesteps[0]] ** -0.5) * (
        1 if guidance is None else 1 + 2 * guidance
    )
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5 * enlarged)


# Launches


@pytest.fixture(scope="module")
def ticks() -> dict[str, Tick]:
    """A tick of each published UNet."""
    pytest.importorskip("triton")
    return {"cifar10": count_tick("cifar10", 8), "celebahq-256": count_tick("celebahq-256", 1)}


@pytest.mark.parametrize(("name", "most"), [("cifar10", 142), ("celebahq-256", 229)])
def test_launches_of_a_tick(name: str, most: int, ticks: dict[str, Tick]) -> None:
    assert ticks[name].launches <= most
    kinds = ticks[name].kinds()
    assert kinds["convolution"][0] == {"cifar10": 52, "celebahq-256": 76}[name]
    assert kinds["bias"][0] == 1, "the last convolution's"


def test_a_condition_costs_five_launches_and_joins_nothing() -> None:
    """Rows of features, class embeddings, their sum, its activation, and one product for all blocks."""
    pytest.importorskip("triton")
    names = [kernel.name for kernel in count_tick("cifar10", 8, guided=True).kernels]
    first = names[: names.index("convolution")]
    assert first == ["index", "embedding", "add", "silu", "addmm"]
    assert len(names) <= 150
    assert not {"cat", "clone", "layout of a convolution"} & set(names), "the step reads and writes NHWC"


def test_bytes_beside_products(ticks: dict[str, Tick]) -> None:
    """At most 1.2 times what the norms alone moved when biases and residuals were added by others."""
    assert ticks["cifar10"].bytes_beside_products <= 1.2 * 140.3e6
    assert ticks["celebahq-256"].bytes_beside_products <= 1.2 * 991e6


def test_a_shortcut_reads_its_inputs_where_they_are(ticks: dict[str, Tick], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is moved in all is less as well, and not only counted elsewhere; the products are the same ones."""
    ours = ticks["celebahq-256"]
    names = Counter(kernel.name for kernel in ours.kernels)
    assert names["add_projection_kernel"] == 17 + 1, "the shortcuts on the way up, and an attention that is doubled"
    monkeypatch.setattr(fused_blocks, "projects", lambda dtype, channels: False)
    joined = count_tick("celebahq-256", 1)
    assert joined.flops == ours.flops
    assert (joined.launches - ours.launches, joined.kinds()["matrix product"][0]) == (5, 44)
    assert sum(k.bytes for k in ours.kernels) < sum(k.bytes for k in joined.kernels) - 150e6


def test_the_count_sees_a_bias_a_copy_and_a_residual() -> None:
    """The same network as PyTorch's operators run it, with our norms alone."""
    pytest.importorskip("triton")

    def plain(module: nn.Module) -> nn.Module:
        prepared = prepare_network(module, torch.device("meta"), torch.bfloat16, fused=True)
        prepared.get_submodule("conv_in").register_forward_hook(lambda *_: None)  # so that nothing is deferred
        return prepared

    tick = count_tick("cifar10", 8, network=plain)
    kinds = tick.kinds()
    assert kinds["bias"][0] == 53 - 22, "but for those in the time projections"
    assert tick.launches >= 230
    assert sum(kinds[kind][1] for kind in PRODUCTS) + tick.bytes_beside_products == sum(k.bytes for k in tick.kernels)


@pytest.mark.parametrize(("name", "now"), [("sd-1.5", 530), ("dit-xl-2", 246)])
def test_launches_of_a_latent_tick(name: str, now: int) -> None:
    """What a text or a label alone decides is computed beforehand; docs/gpu.md has the table.

    How many launches the whole network has depends on what PyTorch's operators are made of.
    """
    pytest.importorskip("triton")
    ticks = count_tick(name, 8, guided=True, network=whole), count_tick(name, 8, guided=True)
    assert ticks[1].launches == now < ticks[0].launches / 1.5
    assert ticks[1].flops < ticks[0].flops
    assert ticks[1].bytes_beside_products < 0.75 * ticks[0].bytes_beside_products


def test_flops_are_those_that_pytorch_counts() -> None:
    """Of convolutions and matrix products, attention's included."""
    pytest.importorskip("triton")
    assert count_tick("cifar10", 2, network=whole).flops == load_model("cifar10").flops(2)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["--model", "tiny", "--batch", "2"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny, batch 2, bfloat16: ")
    assert any(line.split()[0] == "norm" for line in rest)


def test_a_network_of_guided_diffusion_is_counted_without_its_weights() -> None:
    pytest.importorskip("triton")
    assert count_tick("adm-64", 1).launches > 100
