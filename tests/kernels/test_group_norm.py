"""GroupNorm + SiLU against float64 over every shape of two published UNets and ragged ones, and what it promises."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion import kernels
from stepfusion.execution.float32 import float32_products
from stepfusion.kernels import group_norm, group_norm_statistics, launch, reference
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.twins import assert_same_bits, assert_within, mutate

pytestmark = pytest.mark.filterwarnings(  # NumPy's: SiLU of large negative numbers, and planted errors
    "ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Op = Callable[..., torch.Tensor]


@pytest.fixture
def device(kernel_device: torch.device) -> torch.device:
    return kernel_device


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an element nobody wrote, or that nobody should have read, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """One call. ``skip``: channels of the skip input. ``mean``, ``std``: of x; ``extras``: time, scale and shift."""

    channels: int
    height: int
    width: int
    groups: int
    skip: int = 0
    batch: int = 1
    dtype: torch.dtype = torch.float32
    extras: tuple[str, ...] = ()
    silu: bool = True
    mean: float = 0.0
    std: float = 1.0

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.channels}+{self.skip}x{self.height}x{self.width}", f"{self.groups} groups"]
        return " ".join([*words, str(self.dtype).removeprefix("torch."), *self.extras])

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Random inputs; time, scale and shift are columns of one wider tensor, as in a UNet."""
        channels = self.channels + self.skip
        size = (self.height, self.width)
        image = [
            (torch.randn(self.batch, c, *size) * self.std + self.mean).contiguous(memory_format=torch.channels_last)
            for c in (self.channels, self.skip)
        ]
        wide = torch.randn(self.batch, 16 + 3 * channels).to(self.dtype).to(device)
        columns = wide[:, 16:].split(channels, dim=1)
        given: dict[str, Any] = {
            "x": image[0].to(self.dtype).to(device),
            "weight": torch.randn(channels).to(self.dtype).to(device),
            "bias": torch.randn(channels).to(device),
            "groups": self.groups,
            "eps": 1e-6,
            "silu": self.silu,
        }
        if self.skip:
            given["skip"] = image[1].to(self.dtype).to(device)
        return given | {n: c for n, c in zip(("time", "scale", "shift"), columns, strict=True) if n in self.extras}


def _in_float64(given: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in given.items()}


def _bound(given: dict[str, Any], roundings: int = ROUNDINGS["group_norm_silu"]) -> float:
    """The tolerance, from the largest term: |h| / sigma of its group, times the gain, and the offsets."""
    a = _in_float64(given)
    h = a["x"] if a.get("skip") is None else torch.cat((a["x"], a["skip"]), dim=1)
    if a.get("time") is not None:
        h = h + a["time"][:, :, None, None]
    grouped = h.unflatten(1, (a["groups"], -1)).flatten(2)
    terms = grouped.abs().amax(2) / (grouped.var(2, correction=0) + a["eps"]).sqrt()  # [B, groups]
    terms = terms.repeat_interleave(h.shape[1] // a["groups"], dim=1) * a["weight"].abs() + a["bias"].abs()
    if a.get("scale") is not None:
        terms = terms * (1 + a["scale"]).abs() + a["shift"].abs()
    return tolerance(given["x"].dtype, terms.max().item(), roundings)


def _assert_equivalent(op: Op, given: dict[str, Any]) -> None:
    """``op`` and its twin are float64's result within rounding."""
    got, twin = op(**given), reference.group_norm_silu(**given)
    truth = reference.group_norm_silu(**_in_float64(given))
    for result in (got, twin):
        assert result.dtype == given["x"].dtype
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert_within("out", result, truth, _bound(given))


# Every shape of the published UNets


@cache
def _published() -> list[tuple[int, int, int]]:
    """(channels of x, channels of skip, size) of every norm of the UNets of CIFAR-10 and CelebA-HQ-256."""
    shared = {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
    shared |= {"attention_head_dim": None}
    plain = ("DownBlock2D", "UpBlock2D")
    configs = []
    for size, channels, attention in ((32, (128, 256, 256, 256), 1), (256, (128, 128, 256, 256, 512, 512), 4)):
        down = tuple("AttnDownBlock2D" if i == attention else plain[0] for i in range(len(channels)))
        up = tuple("AttnUpBlock2D" if i == attention else plain[1] for i in reversed(range(len(channels))))
        configs.append(
            sf.networks.UNet2DConfig(
                sample_size=size, block_out_channels=channels, down_block_types=down, up_block_types=up, **shared
            )
        )
    seen = set()

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, torch.nn.GroupNorm)
        assert module.num_groups == 32
        skip = kwargs.get("skip")
        seen.add((args[0].shape[1], 0 if skip is None else skip.shape[1], args[0].shape[-1]))

    for config in configs:
        with torch.device("meta"):
            network = sf.networks.UNet2D(config)
            for module in network.modules():
                if isinstance(module, torch.nn.GroupNorm):
                    module.register_forward_pre_hook(note, with_kwargs=True)
                    module.fused = True
            size = config.sample_size
            network(torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.int64))
    return sorted(seen)


def _name(shape: tuple[int, int, int]) -> str:
    return "{}+{}x{}".format(*shape)


def test_the_published_shapes_are_there() -> None:
    shapes = _published()
    assert {(c + skip) // 32 for c, skip, _ in shapes} == {4, 8, 12, 16, 24, 32}
    assert {size for _, _, size in shapes} == {4, 8, 16, 32, 64, 128, 256}
    assert {(128, 0, 32), (256, 128, 32), (256, 256, 4), (512, 256, 32), (512, 512, 8), (128, 128, 256)} < set(shapes)


@pytest.mark.parametrize("shape", _published(), ids=_name)
def test_published_channels(shape: tuple[int, int, int], device: torch.device) -> None:
    """All channels. The interpreter gets the first 256 pixels of larger images; a GPU all of them."""
    channels, skip, size = shape
    rows = min(size, 256 // size) if device.type == "cpu" else size
    case = Case(channels, rows, size, 32, skip, dtype=torch.bfloat16, extras=() if skip else ("time",))
    _assert_equivalent(kernels.group_norm_silu, case.arguments(device))


LARGE = sorted({((channels + skip) // 32, size) for channels, skip, size in _published() if size > 32})
QUICK_LARGE = [shape for shape in LARGE if shape[1] == 64 or shape == (4, 256)]  # every size of a group, and the most


@pytest.mark.parametrize(
    ("size_of_group", "size"),
    [pytest.param(*shape, marks=() if shape in QUICK_LARGE else pytest.mark.soak) for shape in LARGE],
)
def test_published_pixels(size_of_group: int, size: int, device: torch.device) -> None:
    """All pixels of the larger images, and one block of channels: what the interpreter leaves out above."""
    together = group_norm.geometry(32 * size_of_group, 32, size * size, torch.float16).groups
    case = Case(together * size_of_group, size, size, together, dtype=torch.float16, mean=0.5)
    _assert_equivalent(kernels.group_norm_silu, case.arguments(device))


# Other shapes, dtypes and options

ALL = ("time", "scale", "shift")
RAGGED = [
    Case(6, 1, 1, 3, batch=3, extras=ALL),  # one pixel
    Case(1, 5, 7, 1, batch=2),  # one channel
    Case(33, 5, 7, 11, skip=22, batch=2, extras=ALL),  # an odd size of a group, which straddles x and skip
    Case(20, 9, 9, 4, skip=4, batch=2, extras=("scale", "shift")),  # blocks with padding
    Case(40, 28, 28, 8, batch=2, extras=("time",)),  # four tiles
    Case(96, 33, 35, 32),  # 3 channels a group; the last split is short
    Case(200, 13, 11, 5, batch=2, extras=ALL),  # 40 channels a group
    Case(72, 17, 18, 2, skip=24, batch=2, extras=ALL),  # 48 channels a group
    Case(16384, 2, 1, 1),  # two tiles of a pixel each
    Case(5000, 4, 5, 1, extras=ALL),  # one group of all channels, four tiles a program, the last two empty
    Case(1000, 9, 9, 1, batch=2),
    Case(67, 8, 9, 1, skip=66, batch=2),  # an odd size, wider than a block
    Case(24, 60, 70, 2, extras=ALL),  # 12 channels a group, many splits
]


def _ragged() -> Iterator[Any]:
    """Every shape with every dtype: the quick ones have bfloat16 and float32 in turn."""
    for i, case in enumerate(RAGGED):
        for dtype in DTYPES:
            quick = dtype == DTYPES[1 + i % 2]
            yield pytest.param(case, dtype, marks=() if quick else pytest.mark.soak, id=f"{case}-{dtype}")


@pytest.mark.parametrize(("case", "dtype"), [*_ragged()])
def test_ragged_shapes(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    given = Case(**{**vars(case), "dtype": dtype}).arguments(device)
    _assert_equivalent(kernels.group_norm_silu, given)


EXTRAS = ((), ("time",), ("scale", "shift"), ALL)
#: Channels, those of skip, size: one tile in one launch, several tiles in one launch, two launches.
IMAGES = ((32, 0, 8), (32, 32, 8), (24, 16, 17), (24, 16, 41))


def _options() -> Iterator[Any]:
    """Every combination. The quick ones have every pair of values, but for those of dtype and extras."""
    for i, (image, extras) in enumerate(product(IMAGES, EXTRAS)):
        for j, dtype in enumerate(DTYPES):
            for silu in (True, False):
                quick = j == i % 3 and silu == bool((i + i // 4) % 2)
                name = f"{image[2]}-{image[1]}-{extras}-{silu}-{dtype}"
                yield pytest.param(image, extras, silu, dtype, marks=() if quick else pytest.mark.soak, id=name)


@pytest.mark.parametrize(("image", "extras", "silu", "dtype"), [*_options()])
def test_options(
    image: tuple[int, int, int], extras: tuple[str, ...], silu: bool, dtype: torch.dtype, device: torch.device
) -> None:
    channels, skip, size = image
    case = Case(channels, size, size, 4, skip, 2, dtype, extras, silu)
    _assert_equivalent(kernels.group_norm_silu, case.arguments(device))


@pytest.mark.parametrize("size", [8, 33, 46])
def test_a_large_mean(size: int, device: torch.device) -> None:
    case = Case(32, size, size, 8, batch=2, mean=1e3, std=0.1)
    _assert_equivalent(kernels.group_norm_silu, case.arguments(device))


def test_extreme_values(device: torch.device) -> None:
    """A constant group gives the bias; SiLU reaches 0 and the identity."""
    given = Case(8, 8, 8, 2, silu=False).arguments(device)
    given["x"].fill_(3.0)
    out = kernels.group_norm_silu(**given)
    assert_same_bits("out", out, given["bias"][:, None, None].expand_as(out))
    given |= {"bias": torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, 3e38], device=device), "silu": True}
    out = kernels.group_norm_silu(**given)[0, :, 0, 0]
    want = torch.nn.functional.silu(given["bias"].double())
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-37)


def test_a_variance_below_the_least_normal_number(device: torch.device) -> None:
    """A GPU's reciprocal root takes it for 0; Triton's interpreter does not."""
    given = Case(8, 8, 8, 2, silu=False, std=4e-20).arguments(device)
    _assert_equivalent(kernels.group_norm_silu, given | {"eps": 0.0})


# What it promises


ONE_LAUNCH, TWO_LAUNCHES = Case(32, 8, 8, 4, 16, 3, extras=ALL), Case(24, 41, 41, 4, 16, 3, extras=ALL)
SEVERAL_TILES = Case(24, 17, 18, 4, 16, 3, extras=ALL)  # in one launch


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (ONE_LAUNCH, torch.bfloat16),
        (ONE_LAUNCH, torch.float32),
        (SEVERAL_TILES, torch.bfloat16),
        (SEVERAL_TILES, torch.float32),
        (TWO_LAUNCHES, torch.float32),
        pytest.param(TWO_LAUNCHES, torch.bfloat16, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_bits_depend_on_neither_batch_nor_place(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    given = Case(**{**vars(case), "dtype": dtype}).arguments(device)
    lanes = ("x", "skip", *ALL)
    together = kernels.group_norm_silu(**given)
    for chosen in ([2], [2, 1, 0]):
        part = kernels.group_norm_silu(**{n: v[chosen] if n in lanes else v for n, v in given.items()})
        assert_same_bits("out", part, together[chosen])
    slices = {n: v[1:] if n in lanes else v for n, v in given.items()}
    assert_same_bits("out", kernels.group_norm_silu(**slices), together[1:])


@pytest.mark.parametrize("size", [8, 33, 46])
def test_nan_stays_in_its_group(size: int, device: torch.device) -> None:
    given = Case(32, size, size, 4, batch=3).arguments(device)
    clean = kernels.group_norm_silu(**given)
    given["x"][1, 9, 3, 3] = torch.nan
    out = kernels.group_norm_silu(**given)
    assert out[1, 8:16].isnan().all()
    clean[1, 8:16] = torch.nan
    assert_same_bits("out", out, clean)


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """``x`` at an address that is no multiple of 16 bytes."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return memory.as_strided(x.shape, x.stride()).copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels of a wider tensor": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "every other pixel": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "unaligned": _shifted,
}


@pytest.mark.parametrize(
    ("layout", "size"),
    [  # one launch, of one tile and of two, and two, which the launcher gives the same images
        *((layout, 8) for layout in LAYOUTS),
        ("unaligned", 17),
        ("unaligned", 41),
        *(pytest.param(layout, 41, marks=pytest.mark.soak) for layout in LAYOUTS if layout != "unaligned"),
    ],
)
def test_layouts(layout: str, size: int, device: torch.device) -> None:
    given = Case(24, size, size, 4, 16, 2, torch.float16, ALL).arguments(device)
    want = kernels.group_norm_silu(**given)
    relaid = {n: LAYOUTS[layout](given[n]) for n in ("x", "skip")}
    if layout == "unaligned":
        assert relaid["x"].data_ptr() % 16 == 2
    relaid |= {n: torch.stack((given[n], given[n]), dim=-1)[..., 0] for n in ALL}
    relaid |= {n: torch.stack((given[n], given[n]), dim=-1)[:, 0] for n in ("weight", "bias")}
    for op, ours in ((kernels, want), (reference, reference.group_norm_silu(**given))):
        out = op.group_norm_silu(**{**given, **relaid})
        assert_same_bits("out", out, ours)
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_time_is_read_where_it_lies() -> None:
    wide = torch.randn(3, 80)
    rows, stride = launch.with_unit_stride(wide[:, 16:48])
    assert rows is not None
    assert rows.data_ptr() == wide.data_ptr() + 64
    assert stride == 80
    assert launch.with_unit_stride(wide[:1, 16:48])[1] == 0
    assert launch.with_unit_stride(wide.t())[1] == 3


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0), (0, 8, 0, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    x, ones = torch.empty(shape, device=device), torch.ones(8, device=device)
    for op in (kernels, reference):
        assert op.group_norm_silu(x, ones, ones, 2, 1e-5).shape == shape
        for result in op.add_group_norm_silu(x, ones, ones, 2, 1e-5, residual=x):
            assert result.shape == shape
            assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_the_gradients_of_nothing_are_zeros(shape: tuple[int, ...], device: torch.device) -> None:
    x, ones = torch.empty(shape, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    kernels.group_norm_silu(x, ones, ones, 2, 1e-5).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(ones.grad, torch.zeros_like(ones))


GEOMETRIES = [
    (c, g, p)
    for c in (1, 24, 100, 128, 384, 640, 768, 1024, 4097)
    for g in (1, 4, 32)
    for p in (1, 49, 64, 256, 784, 1024, 65536, 1_000_003)
    if c % g == 0
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_geometry(dtype: torch.dtype) -> None:
    """Blocks cover the channels, splits the pixels; a split is never empty; chunks lie in one group.

    What several tiles hold is one launch if it is 128 KB at most, and the last of them is not empty.
    """
    for channels, groups, pixels in GEOMETRIES:
        cut = group_norm.geometry(channels, groups, pixels, dtype)
        share = cut.pixels * cut.tiles
        assert (cut.blocks - 1) * cut.groups < groups <= cut.blocks * cut.groups
        assert (cut.splits - 1) * share < pixels <= cut.splits * share
        size = channels // groups
        assert size % cut.chunk == 0
        assert cut.groups * size <= cut.width < 2 * cut.groups * size
        assert cut.pixels * cut.width <= max(16384, cut.width)
        assert 1 <= cut.num_warps <= 16
        block = cut.groups * size * pixels * dtype.itemsize
        assert (cut.splits == 1) == (pixels <= cut.pixels or block <= 128 << 10)
        assert cut.splits > 1 or pixels > (cut.tiles - 1) * cut.pixels


@pytest.mark.parametrize("channels", [128, 256, 384, 512, 768, 1024])
def test_blocks_of_the_published_unets(channels: int) -> None:
    """Rows of a block are whole sectors of 32 bytes. Of two launches, each has 128 programs or more.

    At 32x32 and in half precision one program takes all pixels of a block; at 64x64 if 16 channels are whole groups.
    """
    for dtype in (torch.float16, torch.float32):
        for size in (4, 8, 16, 32, 64, 128, 256):
            cut = group_norm.geometry(channels, 32, size * size, dtype)
            wide = cut.groups * channels // 32
            assert wide * dtype.itemsize % 32 == 0
            assert channels % wide == 0
            largest = {128: 64, 256: 64, 512: 64}.get(channels, 32) if dtype == torch.float16 else 32
            assert (cut.splits == 1) == (size <= largest)
            if cut.splits > 1:
                assert cut.splits * cut.blocks >= 2 * size


# As PyTorch sees it

SMALL = Case(16, 6, 6, 4, 8, 2, torch.float16, ALL)
SPLIT = Case(40, 29, 29, 4, 0, 2, torch.float32, ("time",))


@pytest.mark.parametrize("case", [SMALL, SPLIT], ids=str)
def test_opcheck(case: Case, device: torch.device) -> None:
    given = dict.fromkeys(("skip", *ALL)) | case.arguments(device)
    torch.library.opcheck(torch.ops.stepfusion.group_norm_silu.default, (), given)


@pytest.mark.parametrize("case", [SMALL, SPLIT], ids=str)
def test_compiles_as_one_graph(case: Case, device: torch.device) -> None:
    given = case.arguments(device)
    compiled = torch.compile(kernels.group_norm_silu, fullgraph=True, backend="aot_eager")
    assert_same_bits("out", compiled(**given), kernels.group_norm_silu(**given))


@pytest.mark.slow
@pytest.mark.usefixtures("inductor_cache")
def test_compiles_with_inductor_between_convolutions(device: torch.device) -> None:
    given = SMALL.arguments(device)
    convolution = torch.nn.Conv2d(24, 16, 3, padding=1).to(device).to(memory_format=torch.channels_last)
    given = {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in given.items()}

    def block(x: torch.Tensor, **others: Any) -> torch.Tensor:
        h = convolution(kernels.group_norm_silu(torch.tanh(x), **others))
        return kernels.group_norm_silu(h, others["weight"][:16], others["bias"][:16], 4, 1e-6)

    with torch.no_grad(), float32_products(tf32=False):  # on a GPU PyTorch's convolutions would round to ten bits
        eager, compiled = block(**given), torch.compile(block, fullgraph=True)(**given)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)  # Inductor's tanh is its own


@pytest.mark.parametrize("case", [SMALL, SPLIT], ids=str)
def test_exports(case: Case, device: torch.device) -> None:
    given = case.arguments(device)
    constants = {n: given.pop(n) for n in ("groups", "eps", "silu")}

    class Module(torch.nn.Module):
        def forward(self, **tensors: torch.Tensor) -> torch.Tensor:
            return kernels.group_norm_silu(**tensors, **constants)

    program = torch.export.export(Module(), (), given)
    assert any("stepfusion.group_norm_silu" in str(node.target) for node in program.graph.nodes)
    assert_same_bits("out", program.module()(**given), kernels.group_norm_silu(**given, **constants))


# What it says of a bad argument

HALVES = "float16 or bfloat16 or float32"


def _errors() -> list[tuple[str, Any, type[Exception], str]]:
    x = torch.zeros(2, 8, 3, 5, dtype=torch.float16)
    wide, vector = torch.zeros(2, 12, dtype=torch.float16), torch.zeros(12)
    return [
        ("x", [1.0], TypeError, "x must be a tensor, got list"),
        ("x", x.double(), TypeError, f"x must be {HALVES}, got float64"),
        ("x", x[0], ValueError, "x must be images [B, C, H, W], got shape [8, 3, 5]"),
        ("skip", 3, TypeError, "skip must be a tensor, got int"),
        ("skip", x.float(), TypeError, "skip must be float16, got float32"),
        ("skip", x[0], ValueError, "skip must be images [B, C, H, W], got shape [8, 3, 5]"),
        ("skip", x[:, :4, :2], ValueError, "skip must have shape [2, 4, 3, 5], got [2, 4, 2, 5]"),
        ("skip", x.to("meta"), ValueError, "skip must be on cpu, got meta"),
        ("weight", vector.double(), TypeError, "weight must be float16 or float32, got float64"),
        ("weight", vector[:8], ValueError, "weight must have shape [12], got [8]"),
        ("bias", vector.bfloat16(), TypeError, "bias must be float16 or float32, got bfloat16"),
        ("bias", vector.to("meta"), ValueError, "bias must be on cpu, got meta"),
        ("time", wide[:1], ValueError, "time must have shape [2, 12], got [1, 12]"),
        ("time", wide.int(), TypeError, "time must be float16 or float32, got int32"),
        ("scale", None, ValueError, "scale and shift must be given together, got one of them"),
        ("scale", wide[:, :4], ValueError, "scale must have shape [2, 12], got [2, 4]"),
        ("shift", None, ValueError, "scale and shift must be given together, got one of them"),
        ("shift", wide.to("meta"), ValueError, "shift must be on cpu, got meta"),
        ("groups", 5, ValueError, "groups must be a positive divisor of the 12 channels, got 5"),
        ("groups", 0, ValueError, "groups must be a positive divisor of the 12 channels, got 0"),
        ("groups", -4, ValueError, "groups must be a positive divisor of the 12 channels, got -4"),
        ("groups", 4.0, TypeError, "groups must be an integer, got float"),
        ("groups", True, TypeError, "groups must be an integer, got bool"),
        ("eps", -1e-6, ValueError, "eps must be finite and not negative, got -1e-06"),
        ("eps", float("nan"), ValueError, "eps must be finite and not negative, got nan"),
        ("eps", "small", TypeError, "eps must be a number, got str"),
    ]


@pytest.mark.parametrize(("name", "value", "error", "message"), _errors())
@pytest.mark.parametrize("op", [kernels.group_norm_silu, reference.group_norm_silu])
def test_bad_arguments(op: Op, name: str, value: Any, error: type[Exception], message: str) -> None:
    given = Case(8, 3, 5, 4, 4, 2, torch.float16, ALL).arguments(torch.device("cpu"))
    given |= {"weight": torch.zeros(12), name: value}
    if op is reference.group_norm_silu:
        message = message.replace(HALVES, f"{HALVES} or float64")
        if name == "x" and isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            pytest.skip("the reference takes float64")
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        op(**given)


def test_too_wide_a_group() -> None:
    channels = 2**17
    x, vector = torch.empty(1, channels, 1, 1, device="meta"), torch.empty(channels, device="meta")
    with pytest.raises(ValueError, match=r"^groups must have at most 65536 channels each, got 131072$"):
        kernels.group_norm_silu(x, vector, vector, 1, 1e-5)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.backend, "interpreting", lambda: False)
    with pytest.raises(kernels.BackendError, match="the fused kernels cannot run on cpu"):
        kernels.group_norm_silu(**SMALL.arguments(torch.device("cpu")))


# Planted errors: the comparison above must fail for each, or it would hold nothing

WHOLE = Case(40, 7, 7, 4, 8, 2, extras=ALL)  # 12 channels a group, which straddle x and skip
SPLITS = Case(32, 29, 29, 4, 8, 2, extras=ALL)  # 27 splits, the last of them short
TILES = Case(5000, 4, 5, 1)  # three splits of four tiles, the last with two that are empty
AGAIN = Case(32, 23, 24, 4, 8, 2, extras=ALL)  # one launch, whose three tiles are read twice, the last of them short
FAR = Case(32, 32, 32, 8, mean=1e3, std=0.1)
PADDED = Case(12, 8, 8, 1, mean=5.0)  # one group, in a block that is wider
SIDES = Case(32, 8, 8, 8, 32, 2)  # 8 channels a group: a block of x and one of skip

SUM_OF_SQUARES = "tl.sum(tl.sum(h * h, axis=2), axis=0) - mean * mean * (pixels * U)"
LAST_STORE = "_store(out_ptr, h, mean, gain, offset, lane * P + first, rows, c, there, C, U, SILU)\n    for"
MUTANTS: dict[str, tuple[Case, str, str]] = {
    "a sum of squares": (FAR, "tl.sum(tl.sum(deviation * deviation, axis=2), axis=0)", SUM_OF_SQUARES),
    "padding in the variance": (SPLITS, "chunks(there, U), h - mean", "chunks(there, U) | True, h - mean"),
    "means of chunks alone": (WHOLE, "m2[None, :] + apart * apart * (pixels * U)", "m2[None, :]"),
    "chunks of other groups": (WHOLE, "tl.where(same, mean[None, :], 0.0)", "mean[None, :]"),
    "padding in one group": (PADDED, "inside = k < D", "inside = k >= 0"),
    "splits of equal size": (SPLITS, "tl.maximum(tl.minimum(P - s * SHARE, SHARE), 0)", "(s * 0 + SHARE)"),
    "means of splits alone": (SPLITS, "m2s + apart * apart * (pixels * U)", "m2s"),
    "the mean of later tiles": (TILES, "mean += apart * (more / (pixels + more))", "mean += 0.0"),
    "the M2 of later tiles": (TILES, "m2 += m2_of_more +", "m2 +="),
    "means of tiles alone": (TILES, "m2_of_more + apart * apart * (U * pixels", "m2_of_more + 0.0 * (U * pixels"),
    "the first tile": (TILES, LAST_STORE, "for"),
    "later tiles": (TILES, "first += T\n", "first += 0\n"),
    "the mean of later tiles, in one launch": (AGAIN, "mean += apart * (more / (pixels + more))", "mean += 0.0"),
    "the M2 of later tiles, in one launch": (AGAIN, "m2 += m2_of_more +", "m2 +="),
    "a short tile that weighs as much": (AGAIN, "tl.maximum(tl.minimum(P - first, T), 0)", "(first * 0 + T)"),
    "later tiles of the result": (TILES, "first += STEP", "first += 0"),
    "earlier tiles of the result": (AGAIN, "first += STEP", "first += 0"),
    "results from the first tile on": (AGAIN, "-T if moments_ptr is None else T", "T"),
    "time": (WHOLE, "h + time[None, :], 0.0", "h, 0.0"),
    "time of another lane": (SPLITS, "time_ptr += lane * time_stride", "time_ptr += 0"),
    "no skip": (WHOLE, "_read(skip_ptr, pixel, rows, c - C_X, there &", "_read(x_ptr, pixel, rows, c - C_X, there &"),
    "channels of skip": (
        WHOLE,
        "_read(skip_ptr, pixel, rows, c - C_X, there &",
        "_read(skip_ptr, pixel, rows, c, there &",
    ),
    "a side that does not straddle": (SIDES, "if start < C_X:", "if start <= C_X:"),
    "another lane": (SPLITS, "lane = lane.to(tl.int64)", "lane = lane.to(tl.int64) * 0"),
    "no scale": (WHOLE, "gain *= factor", "gain *= 1.0"),
    "a bias that is not scaled": (WHOLE, "offset * factor +", "offset +"),
    "shift of another lane": (WHOLE, "shift_ptr + lane * shift_stride", "shift_ptr"),
    "scale of another lane": (WHOLE, "scale_ptr + lane * scale_stride", "scale_ptr"),
    "no eps": (Case(8, 8, 8, 2, std=1e-3), "_root(variance + eps)", "_root(variance)"),
    "a sample variance": (Case(8, 3, 3, 2), "return mean, m2 / (pixels * U)", "return mean, m2 / (pixels * U - 1)"),
    "the sign of SiLU": (WHOLE, "tl.exp2(y * -_LOG2_E)", "tl.exp2(y * _LOG2_E)"),
    "the base of SiLU": (WHOLE, "tl.exp2(y * -_LOG2_E)", "tl.exp2(-y)"),
    "the last pixel": (SPLITS, "(first + rows < P)", "(first + rows < P - 1)"),
    "the last channel": (WHOLE, "(c < stop)", "(c < stop - 1)"),
}


def _with_statistics(text: str) -> str:
    """The module with the one of its statistics inside of it."""
    inner = Path(group_norm_statistics.__file__).read_text().split("import tl, triton\n")[1]
    line = re.search(r"^from stepfusion.kernels.group_norm_statistics import .*\n", text, re.MULTILINE)
    assert line is not None
    return text.replace(line.group(), inner)


def _planted(old: str | None, new: str, folder: Path) -> Op:
    """The op of a copy of the module with one text replaced wherever it stands, under an op namespace of its own."""
    text = _with_statistics(Path(group_norm.__file__).read_text())
    assert old is None or old in text, f"{old!r} does not occur"
    text = text if old is None else text.replace(old, new)
    name = f"mutant_{folder.name}".replace("-", "_").lower()
    path = folder / "group_norm.py"
    path.write_text(mutate(text, 'custom_op("stepfusion::', f'custom_op("{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    op: Op = module.group_norm_silu
    return op


@pytest.mark.parametrize("case", [WHOLE, SPLITS, TILES, AGAIN, FAR, PADDED, SIDES], ids=str)
def test_a_copy_without_an_error_passes(case: Case, tmp_path: Path, device: torch.device) -> None:
    _assert_equivalent(_planted(None, "", tmp_path), case.arguments(device))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_error_is_caught(name: str, tmp_path: Path, device: torch.device) -> None:
    case, old, new = MUTANTS[name]
    op = _planted(old, new, tmp_path)
    with pytest.raises(AssertionError, match="beyond"):
        _assert_equivalent(op, case.arguments(device))
