"""The form in which a network of ours runs on a CPU: what it replaces, shares, and promises."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepfusion as sf
from stepfusion.execution import compiled
from stepfusion.execution.compiled import CPU_FORM_TOLERANCE, compile_network, cpp_network, describe_difference
from stepfusion.execution.cpu_form import CpuAttention, CpuForms, CpuResnetBlock, GatheredConv2d, WinogradConv2d
from stepfusion.execution.evaluator import _Hoisted as Hoisted
from stepfusion.kernels.cpu import compiler, library, winograd
from stepfusion.kernels.tolerance import tolerance
from stepfusion.networks import ADMUNet, ADMUNetConfig, UNet2D, UNet2DConfig
from stepfusion.networks.blocks import Attention, Downsample, ResnetBlock, Upsample
from stepfusion.networks.norm import GroupNormAct
from stepfusion.networks.time_conditioned import TimeConditioned
from stepfusion_testing.cpu_kernels import rms, use_variant

CPU = torch.device("cpu")
DTYPE = torch.float32
#: Channels and heads that every kernel takes.
WIDE: dict[str, Any] = {"block_out_channels": (32, 64, 64), "attention_head_dim": 32}
#: One level, which Dynamo traces in a fraction of the time.
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


@pytest.fixture(autouse=True, params=["float32-AVX2", "bfloat16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of the networks of this file, of which float32 is as good in one instruction set as in another."""
    chosen = use_variant(request.param, monkeypatch)
    monkeypatch.setitem(globals(), "DTYPE", chosen)
    return chosen


def unet(**changes: Any) -> UNet2D:
    """Three levels of 16, 8 and 4 pixels, with what is replaced and what is not."""
    options: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 48, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    network = UNet2D(UNet2DConfig(**(options | changes))).eval()
    return network.to(DTYPE, memory_format=torch.channels_last)  # type: ignore[call-overload]


def inputs(batch: int = 2, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, size, size, generator=generator).to(DTYPE)
    return x, torch.arange(batch)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo traces as ever, but what it traced runs as it is."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, example, options: graph.forward)


def products(layer: nn.Module) -> int:
    """The number of products of Winograd's convolutions in a layer."""
    return int(layer.weight.shape[1] if isinstance(layer, WinogradConv2d) else layer.weights.conv1.shape[1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet"},
        {"downsample_padding": 0, "mid_block_scale_factor": 1.5},
        WIDE,
        {"act_fn": "gelu"},
    ],
)
@torch.no_grad()
def test_the_form_is_the_network(changes: dict[str, Any]) -> None:
    """Held to the float64 network: three times the rounding of the bfloat16 network, or a hundred in float32."""
    network = unet(**changes)
    form = CpuForms(network)(inputs())
    assert form is not None
    out, direct = form.network(*inputs()), network(*inputs())
    exact = copy.deepcopy(network).double()(inputs()[0].double(), inputs()[1])
    if DTYPE is torch.float32:
        assert float((out - exact).abs().max()) <= tolerance(DTYPE, float(exact.abs().max()), 100)
    else:
        assert rms(out - exact) < 3 * rms(direct - exact)
    assert describe_difference(out, exact.to(DTYPE), CPU_FORM_TOLERANCE[DTYPE]) is None


@pytest.mark.parametrize("resblock_updown", [True, False])
@torch.no_grad()
def test_the_form_of_guided_diffusions_network(resblock_updown: bool) -> None:
    torch.manual_seed(0)
    config = ADMUNetConfig(
        image_size=16,
        num_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(8,),
        num_head_channels=32,
        learn_sigma=True,
        resblock_updown=resblock_updown,
    )
    network = ADMUNet(config).eval().to(DTYPE)
    form = CpuForms(network)(inputs())
    assert form is not None
    assert sum(isinstance(layer, CpuResnetBlock) for layer in form.network.modules()) == 8
    assert sum(isinstance(layer, CpuAttention) for layer in form.network.modules()) == 4
    out, direct = form.network(*inputs()), network(*inputs())
    exact = network.double()(inputs()[0].double(), inputs()[1])
    error, plain = (rms(y - exact) for y in (out, direct))
    assert error < (3 * plain if DTYPE is torch.bfloat16 else tolerance(DTYPE, float(exact.abs().max()), 100))


@torch.no_grad()
def test_an_image_that_is_not_finite_does_not_decide_how_the_others_are_computed() -> None:
    """Neither in the first call, which compares the form with the eager network, nor later."""
    network = cpp_network(unet(), DTYPE)
    x, timesteps = inputs(3)
    broken = x.clone()
    broken[1] = torch.nan
    first, second, sound = network(broken, timesteps), network(broken, timesteps), network(x, timesteps)
    for out in (first, second):
        assert torch.equal(out[[0, 2]], sound[[0, 2]])
        assert not out[1].isfinite().any()


@torch.no_grad()
def test_the_scheme_follows_the_size_of_the_image() -> None:
    forms = CpuForms(unet())
    small, large = forms(inputs()), forms(inputs(1, 32))
    assert small is not None
    assert large is not None
    blocks = "down_blocks.0.resnets.0", "down_blocks.1.resnets.0"
    assert [products(small.network.get_submodule(name)) for name in blocks] == [36, 16], "at 16 x 16 and 8 x 8"
    expected = [36, 16] if DTYPE is torch.float32 else [16, 36]
    assert [products(large.network.get_submodule(name)) for name in blocks] == expected, "at 32 x 32 and 16 x 16"
    assert products(small.network.get_submodule("up_blocks.0.upsamplers.0")) == 9
    name = "mid_block.resnets.0"
    assert small.network.get_submodule(name) is large.network.get_submodule(name), "transformed once"


def left(**changes: Any) -> set[str]:
    """The blocks and layers that PyTorch runs in the form of a network, time path apart."""
    form = CpuForms(unet(**changes))(inputs())
    assert form is not None
    kinds = (nn.Conv2d, nn.Linear, ResnetBlock, Attention, Upsample, Downsample)
    return {name for name, layer in form.network.named_modules() if isinstance(layer, kinds) and "time" not in name}


@torch.no_grad()
def test_every_layer_is_replaced_where_a_kernel_fits() -> None:
    assert left(**WIDE) == set()
    assert "down_blocks.1.attentions.0" in left(**WIDE | {"attention_head_dim": 16}), "heads of 16 channels"
    assert left(**WIDE, downsample_type="resnet", upsample_type="resnet") == {
        *("down_blocks.1.downsamplers.0", "up_blocks.1.upsamplers.0"),  # their convolutions alone
    }
    assert "mid_block.resnets.0" in left(**WIDE, act_fn="gelu")
    assert not any("conv" in name for name in left(**WIDE, act_fn="gelu"))
    odd = left(block_out_channels=(24, 64, 64), attention_head_dim=32)
    assert {"down_blocks.0.resnets.0", "up_blocks.2.resnets.0"} <= odd, "24 channels"
    assert "mid_block.resnets.0" not in odd


@torch.no_grad()
def test_where_kernels_run_everything_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("Inductor was called")

    monkeypatch.setattr(torch._inductor, "compile", never)
    network = unet(**WIDE)
    hoisted, (x, timesteps) = Hoisted(network), inputs()
    projections = network.condition(network.embed_time(timesteps))
    form = CpuForms(hoisted)((x, projections))
    assert form is not None
    assert form.whole
    own = compile_network(hoisted, CPU, DTYPE)
    assert torch.equal(own(x, projections), form.network(x, projections))
    assert (own.compilations, own.failure, own.declined) == (0, None, None)


@pytest.mark.parametrize(
    "changes",
    [{"attention_head_dim": 16}, {"act_fn": "gelu"}, {"downsample_type": "resnet"}, {"norm_num_groups": 16}],
)
@torch.no_grad()
def test_what_is_left_to_pytorch_is_compiled(changes: dict[str, Any]) -> None:
    network = unet(**WIDE | changes)
    x, timesteps = inputs()
    form = CpuForms(Hoisted(network))((x, network.condition(network.embed_time(timesteps))))
    assert form is not None
    assert form.whole == ("norm_num_groups" in changes)
    with_time_path = CpuForms(network)((x, timesteps))
    assert with_time_path is not None
    assert with_time_path.whole == form.whole, "what depends on the timestep alone is little"


class OtherLinear(nn.Linear):
    """As a user might put into a network of ours: an adapter, a quantised layer."""


class OtherBlock(ResnetBlock):
    """The same of a whole block."""


def changed_layers() -> dict[str, Callable[[UNet2D], str]]:
    """Changes of a network after it was made, by what they are; each returns the layer that must stay."""
    block, attention = "mid_block.resnets.0", "mid_block.attentions.0"

    def subclass(network: UNet2D) -> str:
        network.get_submodule(block).__class__ = OtherBlock
        return block

    def inner_subclass(network: UNet2D) -> str:
        network.get_submodule(f"{attention}.to_out.0").__class__ = OtherLinear
        return attention

    def hook(network: UNet2D) -> str:
        network.get_submodule(block).register_forward_hook(lambda _layer, _inputs, out: 2 * out)
        return block

    def inner_hook(network: UNet2D) -> str:
        network.get_submodule(f"{block}.conv2").register_forward_pre_hook(lambda _layer, _inputs: None)
        return block

    def forward(network: UNet2D) -> str:
        conv = network.conv_out
        conv.forward = lambda x, plain=conv.forward: 2 * plain(x)  # type: ignore[assignment,misc]
        return "conv_out"

    def eps(network: UNet2D) -> str:
        norm = network.get_submodule(f"{block}.norm2")
        norm.eps = 0.5  # type: ignore[assignment]
        return block

    def groups(network: UNet2D) -> str:
        norm = network.get_submodule(f"{block}.norm2")
        norm.num_groups = 32  # type: ignore[assignment]
        return block

    def dropout(network: UNet2D) -> str:
        network.get_submodule(f"{block}.dropout").train().p = 0.5  # type: ignore[assignment]
        return block

    changes = subclass, inner_subclass, hook, inner_hook, forward, eps, groups, dropout
    return {change.__name__: change for change in changes}


@pytest.mark.parametrize("change", changed_layers().values(), ids=changed_layers().keys())
@torch.no_grad()
def test_a_layer_that_somebody_changed_stays(change: Callable[[UNet2D], str]) -> None:
    network = unet(**WIDE)
    name = change(network)
    x, timesteps = inputs()
    form = CpuForms(Hoisted(network))((x, network.condition(network.embed_time(timesteps))))
    assert form is not None
    assert not form.whole
    assert type(form.network.get_submodule(f"network.{name}")) is type(network.get_submodule(name))
    if change.__name__ != "dropout":
        expected, y = network(x, timesteps), form.network(x, network.condition(network.embed_time(timesteps)))
        assert describe_difference(y, expected, CPU_FORM_TOLERANCE[DTYPE]) is None


@torch.no_grad()
def test_hooks_see_no_tensors_of_the_trace() -> None:
    network, seen = unet(**WIDE), []
    network.mid_block.register_forward_hook(lambda _layer, _inputs, out: seen.append(out.device.type))  # type: ignore[union-attr]
    form = CpuForms(network)(inputs())
    assert seen == []
    assert form is not None
    form.network(*inputs())
    assert seen == ["cpu"]


@torch.no_grad()
def test_a_network_whose_calls_cannot_be_followed_is_compiled() -> None:
    class Direct(UNet2D):
        def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return UNet2D.predict(self, x, self.condition(self.embed_time(timesteps), class_labels))

    class Head(TimeConditioned):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = unet(**WIDE), nn.ConvTranspose2d(3, 3, 1).to(DTYPE)

        def embed_time(self, timesteps: Tensor) -> Tensor:
            return self.inner.embed_time(timesteps)

        def condition(self, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
            return self.inner.condition(time, class_labels)

        def predict(self, x: Tensor, projections: Tensor) -> Tensor:
            out: Tensor = self.head(input=self.inner.predict(x, projections))
            return out

    direct = unet(**WIDE)
    direct.__class__ = Direct
    for network in (direct, Head()):
        form = CpuForms(network)(inputs())
        assert form is not None
        assert not form.whole


@torch.no_grad()
def test_a_network_around_ours_is_compiled() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = unet(**WIDE), nn.Conv2d(3, 3, 1).to(DTYPE)

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            out: Tensor = self.outer(self.inner(x, timesteps))
            return out

    around = Around()
    form = CpuForms(around)(inputs())
    assert form is not None
    assert not form.whole
    assert isinstance(form.network.outer, nn.Conv2d)
    assert isinstance(form.network.get_submodule("inner.conv_in"), GatheredConv2d)


@torch.no_grad()
def test_the_network_stays_as_it_is() -> None:
    network = unet()
    before = {name: (t.data_ptr(), t.clone()) for name, t in network.state_dict().items()}
    expected = network(*inputs())
    form = CpuForms(network)(inputs())
    assert form is not None
    form.network(*inputs())
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].data_ptr() == at and torch.equal(after[name], t) for name, (at, t) in before.items())
    assert torch.equal(network(*inputs()), expected)
    assert not any(norm.fused_on_cpu for norm in network.modules() if isinstance(norm, GroupNormAct))
    mine = {t.data_ptr() for t in form.network.parameters()}
    assert mine <= {t.data_ptr() for t in network.parameters()}, "no parameter was copied"


@pytest.mark.usefixtures("uncompiled")
def test_other_networks_are_compiled_as_they_are() -> None:
    other = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).to(DTYPE).eval()
    network = compile_network(other, CPU, DTYPE)
    x = torch.randn(1, 16, 8, 8).to(DTYPE)
    with torch.no_grad():
        assert torch.equal(network(x), other(x))
    assert (network.compilations, network.failure, network.declined) == (1, None, None)


@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_network_is_its_form() -> None:
    network = unet(**ONE_LEVEL)
    own = compile_network(network, CPU, DTYPE)
    form = CpuForms(network)(inputs())
    assert form is not None
    with torch.no_grad():
        assert torch.equal(own(*inputs()), form.network(*inputs()))
        assert not torch.equal(own(*inputs()), network(*inputs()))
    own(*inputs(4))
    own(*inputs())
    assert (own.compilations, own.failure, own.declined) == (2, None, None)


@pytest.mark.usefixtures("uncompiled")
def test_a_form_that_differs_too_much_is_declined_once_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whose transform overflows what rounding explains: the network itself is compiled, and says why."""
    right = winograd.transform_weight
    monkeypatch.setattr(winograd, "transform_weight", lambda *given: 1.5 * right(*given))
    network = unet(**ONE_LEVEL)
    own = compile_network(network, CPU, DTYPE)
    with pytest.warns(
        RuntimeWarning, match=r"compiled as it is: the compiled network differs by .* where the largest"
    ):
        out = own(*inputs())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(out, network(*inputs()))
        assert torch.equal(own(*inputs(4)), network(*inputs(4)))
    assert own.failure is None
    assert own.declined is not None
    assert own.compilations == 3


@pytest.mark.usefixtures("uncompiled")
def test_kernels_that_do_not_compile_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.dtype) -> None:
        raise RuntimeError("no working C++ compiler\nand so on")

    library._function.cache_clear()

    monkeypatch.setattr(library, "load", fail)
    engine = sf.Engine(unet(**ONE_LEVEL), sf.NoiseSchedule.linear(1000), device="cpu", network="compile", dtype=DTYPE)
    with pytest.warns(
        RuntimeWarning, match=r"compiled as it is: its C\+\+ form failed with RuntimeError: no working"
    ):
        assert engine.sample(2, steps=2).isfinite().all()
    assert "declined      its C++ form failed with RuntimeError: no working C++ compiler" in engine.explain()


def test_explain_says_what_runs_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(**options: Any) -> str:
        arguments = {"device": "cpu", "network": "compile", "dtype": DTYPE} | options
        return sf.Engine(unet(), sf.NoiseSchedule.linear(1000), **arguments).explain()

    whole = "layers         C++           residual and attention blocks of our networks whole, 3x3"
    assert whole in explain()
    assert "layers" not in explain(network="eager")
    assert "layers         PyTorch       the C++ kernels are for float32 and bfloat16" in explain(dtype="float16")
    monkeypatch.setattr(compiler, "instruction_set", lambda: "DEFAULT")
    assert "layers         PyTorch       PyTorch uses DEFAULT here" in explain()


def test_the_fast_form_is_what_a_cpu_runs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, and eagerly where the kernels cannot run, for which there is a reason."""
    monkeypatch.setattr(torch, "compile", None)
    network, schedule = unet(**WIDE), sf.NoiseSchedule.linear(1000)
    chosen = DTYPE
    options: dict[str, Any] = {"device": "cpu", "dtype": chosen}
    engine, eager = (sf.Engine(network, schedule, network=name, **options) for name in ("auto", "eager"))
    assert "network        cpp           auto: C++ kernels run networks of ours" in engine.explain()
    images, expected = (one.sample(2, steps=3) for one in (engine, eager))
    assert not torch.equal(images, expected)
    if chosen == torch.float32:
        assert describe_difference(images, expected, 10 * CPU_FORM_TOLERANCE[chosen]) is None
    monkeypatch.setattr(compiler, "at_hand", lambda *_: None)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    reason = "there is no C++ compiler '/no/such/compiler', which CXX names"
    without = sf.Engine(network, schedule, **options)
    assert f"network        eager         auto: {reason}" in without.explain()
    assert torch.equal(without.sample(2, steps=3), expected)
    with pytest.raises(sf.BackendError, match=r"network='cpp' cannot run: there is no C.*; use network='eager'"):
        sf.Engine(network, schedule, network="cpp", **options)


def test_other_networks_run_as_they_are() -> None:
    other = nn.Conv2d(16, 16, 3, padding=1)
    assert cpp_network(other, DTYPE) is other


@pytest.mark.usefixtures("uncompiled")
def test_a_form_that_is_wrong_leaves_the_eager_network(monkeypatch: pytest.MonkeyPatch) -> None:
    right = winograd.transform_weight
    monkeypatch.setattr(winograd, "transform_weight", lambda *given: 1.5 * right(*given))
    network = unet(**ONE_LEVEL)
    own = cpp_network(network, DTYPE)
    with pytest.warns(RuntimeWarning, match="the network runs eagerly: the compiled network differs by"):
        out = own(*inputs())
    with torch.no_grad():
        assert torch.equal(out, network(*inputs()))
        assert torch.equal(own(*inputs(3)), network(*inputs(3)))


@pytest.mark.usefixtures("uncompiled")
def test_an_invariant_engine_gives_the_same_bits_in_any_company() -> None:
    options: dict[str, Any] = {"device": "cpu", "network": "compile", "dtype": "bfloat16", "batch": 4}
    engine = sf.Engine(unet(**ONE_LEVEL), sf.NoiseSchedule.linear(1000), invariant=True, **options)
    images = engine.sample(6, steps=3, eta=1.0)
    assert torch.equal(engine.sample(indices=[5], steps=3, eta=1.0), images[5:])
    assert torch.equal(engine.sample(indices=[4, 0, 2], steps=3, eta=1.0), images[[4, 0, 2]])


@pytest.mark.usefixtures("uncompiled")
def test_two_engines_in_two_threads_do_not_disturb_each_other() -> None:
    def engine(size: int) -> sf.Engine:
        made = sf.Engine(
            unet(**ONE_LEVEL, sample_size=size),
            sf.NoiseSchedule.linear(1000),
            device="cpu",
            network="compile",
            dtype=DTYPE,
        )
        made.sample(2, steps=1)
        return made

    engines = [engine(16), engine(32)]
    expected = [one.sample(2, steps=4) for one in engines]
    results: list[list[Tensor]] = [[], []]

    def run(index: int) -> None:
        for _ in range(4):
            results[index].append(engines[index].sample(2, steps=4))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for images, wanted in zip(results, expected, strict=True):
        assert len(images) == 4
        assert all(torch.equal(image, wanted) for image in images)


@pytest.mark.slow
def test_what_inductor_makes_of_the_form_is_trusted() -> None:
    network = unet(**ONE_LEVEL)
    own = compile_network(network, CPU, DTYPE)
    out = own(*inputs())
    with torch.no_grad():
        assert describe_difference(out, network(*inputs()), CPU_FORM_TOLERANCE[DTYPE]) is None
    assert (own.compilations, own.failure, own.declined) == (1, None, None)


def test_other_dtypes_and_devices_have_no_form() -> None:
    check: Callable[..., str | None] = compiled.why_not_cpu_form
    assert check(torch.device("cuda"), DTYPE) == "the C++ kernels are for CPUs"
    assert check(CPU, torch.float16) == "the C++ kernels are for float32 and bfloat16"
