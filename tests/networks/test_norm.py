"""The fused normalisation inside the networks: the same images as PyTorch's operators, without the concatenation."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepfusion.networks import UNet2D, UNet2DConfig, prepare_network
from stepfusion.networks.norm import GroupNormAct
from stepfusion_testing.networks import tiny_unet

CPU = torch.device("cpu")


def plain_unet() -> UNet2D:
    """No labels."""
    return tiny_unet(classes=None)


def scale_shift_unet() -> UNet2D:
    """Every kind of block: scale and shift, resampling inside residual blocks, another activation."""
    torch.manual_seed(1)
    config = UNet2DConfig(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        block_out_channels=(8, 24),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        act_fn="mish",
    )
    return UNet2D(config).eval()


class Seen(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        pytest.param(plain_unet, torch.bfloat16, 5e-2, id="plain-bfloat16"),
        pytest.param(scale_shift_unet, torch.float32, 1e-5, id="scale shift-float32"),
        pytest.param(plain_unet, torch.float32, 1e-5, id="plain-float32", marks=pytest.mark.soak),
        pytest.param(scale_shift_unet, torch.bfloat16, 5e-2, id="scale shift-bfloat16", marks=pytest.mark.soak),
    ],
)
@torch.no_grad()
def test_a_fused_network_gives_the_same_output(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    network = make()
    plain = prepare_network(network, CPU, torch.float32, fused=False)
    fused = prepare_network(network, CPU, dtype, fused=True)
    x, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([900, 3])
    wanted = plain(x, timesteps)
    fused(x.to(dtype), timesteps)  # joins weights and biases, once
    with Seen() as seen:
        out = fused(x.to(dtype), timesteps)
    assert out.is_contiguous(memory_format=torch.channels_last) or out.shape[1] == 1
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    norms = sum(isinstance(module, GroupNormAct) for module in network.modules())
    assert seen.names.count("group_norm_silu") + seen.names.count("add_group_norm_silu") == norms
    assert "native_group_norm" not in seen.names
    assert seen.names.count("cat") == 1, "the sinusoid; neither skips nor projections are joined"
    assert not {"add", "addmm_out"} & set(seen.names[seen.names.index("convolution") :]), (
        "nothing has its own addition"
    )


@torch.no_grad()
def test_preparing_lays_the_network_out_and_leaves_the_given_one_alone() -> None:
    network = tiny_unet(classes=None).train()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    prepared = prepare_network(network, CPU, torch.bfloat16, fused=True)
    assert network.training
    assert not prepared.training
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert all(not module.fused for module in network.modules() if isinstance(module, GroupNormAct))
    weights = [weight for weight in prepared.parameters() if weight.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) and w.dtype == torch.bfloat16 for w in weights)
    assert prepare_network(prepared, CPU, torch.bfloat16, fused=True) is prepared
    unfused = prepare_network(prepared, CPU, torch.bfloat16, fused=False)
    assert not any(module.fused for module in unfused.modules() if isinstance(module, GroupNormAct))


def test_a_network_that_is_as_it_should_be_is_not_copied() -> None:
    linear = nn.Linear(2, 2).eval()
    assert prepare_network(linear, CPU, torch.float32, fused=True) is linear
    prepared = prepare_network(tiny_unet(), CPU, torch.float32, fused=False)
    assert prepare_network(prepared, CPU, torch.float32, fused=False) is prepared


@torch.no_grad()
def test_activations_stay_nhwc() -> None:
    """No operator of the forward pass goes back to NCHW, which would cost a copy at every convolution."""
    network = prepare_network(tiny_unet(classes=None), CPU, torch.float32, fused=False)
    crossed = []

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[1] > 1:
            crossed.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in network.modules():
        module.register_forward_hook(watch)
    network(torch.randn(2, 1, 8, 8), torch.tensor([900, 3]))
    assert len(crossed) > 20
    assert all(crossed)


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (12, 4), (6, 6)])
def test_normalising_by_rows_is_the_same(channels: int, groups: int) -> None:
    norm = GroupNormAct(groups, channels, 1e-5, nn.SiLU())
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, time = 3 + torch.randn(2, channels, 5, 4), torch.randn(2, channels)
    wanted = norm(x, time=time)
    norm.by_rows = True
    torch.testing.assert_close(norm(x, time=time), wanted, rtol=0, atol=1e-5)
