"""Negative controls of the C++ kernels of networks: errors in their sources that the tests' tolerance must catch."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from stepfusion.execution.cpu_form import CpuForms
from stepfusion.kernels.cpu import compiler, library
from stepfusion.kernels.tolerance import tolerance
from stepfusion.networks import UNet2D, UNet2DConfig
from stepfusion_testing.cpu_kernels import use_variant

FLOAT32 = torch.float32
#: What is wrong, and how: a text of the sources and what stands in its place.
MUTANTS = {
    "nothing": ("", ""),
    "a product without its last channel": ("k < depth; k++", "k < depth - 1; k++"),
    "a sum that is begun again at the skip": ("add ? Vec::loadu(products", "false ? Vec::loadu(products"),
    "keys that are not transposed": ("to + c * CHANNELS + r, CHANNELS", "to + r * CHANNELS + c, CHANNELS"),
    "places of keys by the size of vectors": (
        "(tokens + CHANNELS - 1) / CHANNELS * CHANNELS",
        "(tokens + LANES - 1) / LANES * LANES",
    ),
    "empty places that are weighed": ("std::clamp<int64_t>(tokens - t, 0, LANES)", "LANES + 0 * t"),
    "softmax that does not divide": ("1.0f / sums[r]", "1.0f / tokens"),
    "an exponential of another base": ("6.9314718e-1f", "6.93e-1f"),
    "a reciprocal of 12 bits": ("x * (r * at::vec::fnmadd(d, r, Vec(2.0f)))", "x * r"),
    "a variance about another mean": ("squares[i] * share - m * m", "squares[i] * share"),
    "a norm without time": ("return q.time ?", "return false ?"),
    "a residual that is left out": ("y = (y + load(output.residual + at)) * scale", "y = y * scale"),
    "a sum that is not scaled": (
        "y = (y + load(output.residual + at)) * scale",
        "y = y + load(output.residual + at)",
    ),
    "a tile beside its place": ("(column - band.left) * S::STEP * in", "(column - band.left) * S::STEP * 0"),
    "a row of pixels of the image before": ("if (image != band.image)", "if (image < 0)"),
    "a window one pixel too low": ("% out_height * stride - before", "% out_height * stride"),
}


def mutated(text: str, number: int, before: str, after: str) -> str:
    """The kernels without their includes, with an error, under names of their own."""
    assert before in text
    text = text.replace(before, after) if before else text
    body = text[text.index("namespace {") :].replace(
        'extern "C" const char* ', f'extern "C" const char* mutant_{number}_'
    )
    return f"namespace mutant_{number} {{\n{body}\n}}\n"


@pytest.fixture(scope="session")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of all mutants, for AVX2."""
    text = library.source(FLOAT32)
    whole = text[: text.index("namespace {")]
    whole += "".join(mutated(text, number, *change) for number, change in enumerate(MUTANTS.values()))
    target = tmp_path_factory.mktemp("mutants") / "mutants.so"
    compiler.build(whole, [*library.flags(FLOAT32, "AVX2"), "-O0"], target)
    return ctypes.CDLL(str(target))


class Mutant:
    """What stands in for the library: one of the mutants in it."""

    def __init__(self, library: ctypes.CDLL, number: int) -> None:
        self._library, self._number = library, number

    def __getattr__(self, name: str) -> Any:
        return self._library[f"mutant_{self._number}_{name}"]


@torch.no_grad()
def outputs() -> tuple[Tensor, Tensor]:
    """A small UNet by the kernels, and in float64: two images, ragged tiles, 100 pixels under attention."""
    torch.manual_seed(0)
    config = UNet2DConfig(
        sample_size=20,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=8,
        mid_block_scale_factor=1.5,
    )
    network = UNet2D(config).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    x, timesteps = torch.randn(2, 3, 20, 20), torch.tensor([3, 700])
    form = CpuForms(network)((x, timesteps))
    assert form is not None
    exact: Tensor = copy.deepcopy(network).double()(x.double(), timesteps)
    return form.network(x, timesteps), exact


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MUTANTS)
def test_an_error_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    use_variant("float32-AVX2", monkeypatch)
    mutant = Mutant(request.getfixturevalue("mutants"), list(MUTANTS).index(name))
    monkeypatch.setattr(library, "load", lambda _: mutant)
    monkeypatch.setattr(library, "_function", library._function.__wrapped__)
    out, exact = outputs()
    allowed = tolerance(FLOAT32, float(exact.abs().max()), 100)
    error = float((out - exact).abs().max())
    assert (error <= allowed) == (name == "nothing"), f"{error:.3g}, and {allowed:.3g} is allowed"
