"""Modulated layer norms against float64 at published widths and ragged ones, and what they promise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import launch, reference
from stepfusion.kernels.layer_norm_modulate import cut
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance
from stepfusion_testing.planted import planted
from stepfusion_testing.twins import assert_same_bits, assert_within

pytestmark = pytest.mark.filterwarnings(  # NumPy's: roots of nothing, and planted errors
    "ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPS = 1e-6
PUBLISHED = {"S": 384, "B": 768, "L": 1024, "XL": 1152}  # widths of Peebles & Xie 2023, table 1


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
    """One call: images of so many tokens and channels, with the gated residual if it ``adds``."""

    tokens: int
    channels: int
    dtype: torch.dtype = torch.float32
    adds: bool = False
    batch: int = 2
    wide: bool = False  # modulations are float32, whatever x is
    mean: float = 0.0
    std: float = 1.0

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x{self.tokens}x{self.channels}-{name}{'-adds' * self.adds}{'-wide' * self.wide}"

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Random inputs; modulations are columns of one wider tensor, as in a transformer."""
        size = (self.batch, self.tokens, self.channels)
        columns = torch.randn(self.batch, 16 + 3 * self.channels).to(torch.float32 if self.wide else self.dtype)
        shift, scale, gate = columns.to(device)[:, 16:].chunk(3, dim=1)
        given = {"x": (torch.randn(size) * self.std + self.mean).to(self.dtype).to(device)}
        given |= {"scale": scale, "shift": shift, "eps": EPS}
        return given | ({"branch": torch.randn(size).to(self.dtype).to(device), "gate": gate} if self.adds else {})


def results(ops: Any, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The norm; with a branch, the sum too."""
    if "branch" in given:
        out: tuple[torch.Tensor, ...] = ops.add_layer_norm_modulate(**given)
        return out
    return (ops.layer_norm_modulate(**given),)


def assert_equivalent(ops: Any, given: dict[str, Any]) -> None:
    """The results of ``ops`` and of the reference are float64's within rounding; the norm is that of the sum."""
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    dtype = given["x"].dtype
    for got in (results(ops, given), results(reference, given)):
        h = exact["x"]
        if "branch" in given:
            added = exact["gate"][:, None] * exact["branch"]
            bound = tolerance(dtype, float((h.abs() + added.abs()).max()), 2)
            assert_within("sum", got[1], h + added, bound)
            h = got[1].double()
        terms = h.abs() / (h.var(2, correction=0, keepdim=True) + EPS).sqrt()
        terms = terms * (1 + exact["scale"]).abs()[:, None] + exact["shift"].abs()[:, None]
        wanted = reference.layer_norm_modulate(h, exact["scale"], exact["shift"], EPS)
        bound = tolerance(dtype, float(terms.max()), ROUNDINGS["layer_norm_modulate"])
        assert_within("out", got[0], wanted, bound)
        assert all(value.dtype == dtype and value.is_contiguous() for value in got)


CASES = [
    *(Case(3, width, torch.bfloat16, adds) for width in PUBLISHED.values() for adds in (False, True)),
    *(Case(5, 72, dtype, True, wide=wide) for dtype in DTYPES for wide in (False, True)),
    *(Case(3, width, torch.float32, width % 2 == 0) for width in (1, 2, 3, 5, 7, 100, 1100, 1536, 2047, 4096)),
    Case(1, 33, torch.float16, batch=1),
    Case(70, 64, torch.float16, True, batch=3),  # several programs an image, the last of them short
    Case(4, 96, mean=1e3, std=0.1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equivalence(case: Case, device: torch.device) -> None:
    assert_equivalent(kernels, case.arguments(device))


def test_the_reference_is_pytorchs_operators() -> None:
    given = {
        n: v.double() if n != "eps" else v for n, v in Case(5, 12, adds=True).arguments(torch.device("cpu")).items()
    }
    h = given["x"] + given["gate"][:, None] * given["branch"]
    norm = (h - h.mean(2, keepdim=True)) / (h.var(2, correction=0, keepdim=True) + EPS).sqrt()
    out, total = reference.add_layer_norm_modulate(**given)
    torch.testing.assert_close(total, h)
    torch.testing.assert_close(out, norm * (1 + given["scale"][:, None]) + given["shift"][:, None])


def test_a_constant_token_is_the_shift(device: torch.device) -> None:
    given = Case(3, 80).arguments(device)
    given["x"].fill_(3.0)
    assert_same_bits("out", kernels.layer_norm_modulate(**given), given["shift"][:, None].expand(2, 3, 80))


def test_a_variance_below_the_least_normal_number(device: torch.device) -> None:
    """A GPU's reciprocal root takes it for 0; Triton's interpreter does not."""
    given = Case(3, 80, std=4e-20).arguments(device) | {"eps": 0.0}
    exact = [given[name].double() for name in ("x", "scale", "shift")]
    wanted = reference.layer_norm_modulate(*exact, 0.0)
    torch.testing.assert_close(kernels.layer_norm_modulate(**given).double(), wanted, rtol=0, atol=1e-4)


# What it promises


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_bits_depend_on_neither_batch_nor_place(dtype: torch.dtype, adds: bool, device: torch.device) -> None:
    given = Case(37, 72, dtype, adds, batch=3).arguments(device)
    lanes = [name for name in given if name != "eps"]
    together = results(kernels, given)
    for chosen in ([2], [2, 1, 0]):
        part = results(kernels, given | {name: given[name][chosen] for name in lanes})
        for ours, whole in zip(part, together, strict=True):
            assert_same_bits("out", ours, whole[chosen])


def test_nan_stays_in_its_token(device: torch.device) -> None:
    given = Case(37, 72).arguments(device)
    clean = kernels.layer_norm_modulate(**given)
    given["x"][1, 9, 3] = torch.nan
    out = kernels.layer_norm_modulate(**given)
    assert out[1, 9].isnan().all()
    clean[1, 9] = torch.nan
    assert_same_bits("out", out, clean)


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """``x`` at an address that is no multiple of 16 bytes."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return memory.view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other element": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "unaligned": _shifted,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: torch.device) -> None:
    given = Case(5, 72, torch.float16, True).arguments(device)
    want = results(kernels, given)
    relaid = {name: LAYOUTS[layout](given[name]) for name in ("x", "branch")}
    if layout == "unaligned":
        assert relaid["x"].data_ptr() % 16 == 2
        assert launch.aligned(relaid["x"]).data_ptr() % 16 == 0
    relaid |= {name: torch.stack((given[name], given[name]), dim=-1)[..., 0] for name in ("scale", "shift", "gate")}
    for ours, theirs in zip(results(kernels, given | relaid), want, strict=True):
        assert_same_bits("out", ours, theirs)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    x, modulation = torch.empty(shape, device=device), torch.ones(shape[0], shape[2], device=device)
    for ops in (kernels, reference):
        assert ops.layer_norm_modulate(x, modulation, modulation, EPS).shape == shape
        for result in ops.add_layer_norm_modulate(x, modulation, modulation, EPS, branch=x, gate=modulation):
            assert result.shape == shape


def test_the_cut() -> None:
    """Blocks cover the channels; published widths have no masked element; a thread holds at most 96 elements."""
    for channels in (*range(1, 300), 384, 768, 1023, 1024, 1025, 1152, 1153, 1536, 1537, 2048, 4095, 4096, 16384):
        how = cut(channels)
        assert how.second < how.first
        assert how.first // 2 < channels <= how.first + how.second
        assert not how.second or how.first < channels
        assert {n & (n - 1) for n in (how.first, how.second, how.tokens)} == {0}
        assert how.tokens * (how.first + how.second) <= 96 * 32 * how.num_warps
        assert 1 <= how.num_warps <= 16
    for channels in PUBLISHED.values():
        assert sum(cut(channels)[:2]) == channels
        assert cut(channels).num_warps == 1


# As PyTorch sees it


def test_opcheck(device: torch.device) -> None:
    given = Case(5, 72, torch.float16, True).arguments(device)
    ops = torch.ops.stepfusion
    torch.library.opcheck(ops.add_layer_norm_modulate.default, (), given)
    alone = {name: value for name, value in given.items() if name not in ("branch", "gate")}
    torch.library.opcheck(ops.layer_norm_modulate.default, (), alone)


@pytest.mark.parametrize("adds", [False, True])
def test_compiles_as_one_graph(adds: bool, device: torch.device) -> None:
    given = Case(5, 72, torch.float16, adds).arguments(device)
    op = kernels.add_layer_norm_modulate if adds else kernels.layer_norm_modulate
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(**given)
    for ours, theirs in zip(compiled if adds else (compiled,), results(kernels, given), strict=True):
        assert_same_bits("out", ours, theirs)


@pytest.mark.parametrize("adds", [False, True])
def test_gradients_go_through_the_reference(adds: bool, device: torch.device) -> None:
    given = Case(5, 12, adds=adds).arguments(device)
    leaves = {name: value.clone().requires_grad_() for name, value in given.items() if name != "eps"}
    sum(value.square().sum() for value in results(kernels, given | leaves)).backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves.values())


# What it says of a bad argument

HALVES = "float16 or bfloat16 or float32"


def _errors() -> list[tuple[str, Any, type[Exception], str]]:
    x, wide = torch.zeros(2, 3, 8, dtype=torch.float16), torch.zeros(2, 8, dtype=torch.float16)
    return [
        ("x", [1.0], TypeError, "x must be a tensor, got list"),
        ("x", x.long(), TypeError, f"x must be {HALVES}, got int64"),
        ("x", x[0], ValueError, "x must be tokens [B, N, D], got shape [3, 8]"),
        ("x", x[..., :0], ValueError, "x must have 1 to 16384 channels a token, got 0"),
        ("scale", wide[:1], ValueError, "scale must have shape [2, 8], got [1, 8]"),
        ("scale", wide.bfloat16(), TypeError, "scale must be float16 or float32, got bfloat16"),
        ("shift", wide.to("meta"), ValueError, "shift must be on cpu, got meta"),
        ("branch", x.float(), TypeError, "branch must be float16, got float32"),
        ("branch", x[:, :2], ValueError, "branch must have shape [2, 3, 8], got [2, 2, 8]"),
        ("gate", wide[:, :4], ValueError, "gate must have shape [2, 8], got [2, 4]"),
        ("eps", -1e-6, ValueError, "eps must be finite and not negative, got -1e-06"),
        ("eps", float("nan"), ValueError, "eps must be finite and not negative, got nan"),
        ("eps", "small", TypeError, "eps must be a number, got str"),
    ]


@pytest.mark.parametrize(("name", "value", "error", "message"), _errors())
@pytest.mark.parametrize("ops", [kernels, reference], ids=["fused", "reference"])
def test_bad_arguments(ops: Any, name: str, value: Any, error: type[Exception], message: str) -> None:
    given = Case(3, 8, torch.float16, True).arguments(torch.device("cpu")) | {name: value}
    if ops is reference:
        message = message.replace(HALVES, f"{HALVES} or float64")
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        results(ops, given)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.backend, "interpreting", lambda: False)
    with pytest.raises(kernels.BackendError, match="the fused kernels cannot run on cpu"):
        kernels.layer_norm_modulate(**Case(3, 8).arguments(torch.device("cpu")))


# Planted errors: the comparison above must fail for each, or it would hold nothing

PLAIN, FAR = Case(37, 72, batch=3), Case(5, 100, mean=1e3, std=0.1)
ADDS = Case(37, 72, adds=True, batch=3)
RAGGED = Case(3, 75)  # blocks of 64 and 16
CANCELLING = "squares = tl.sum(h * h, axis=1) - mean * mean * D"
MUTANTS: dict[str, tuple[Case, str, str]] = {
    "the mean of the first block": (PLAIN, "total += tl.sum(more, axis=1)", "total += 0.0"),
    "the variance of the first block": (
        PLAIN,
        "squares += tl.sum(deviation_more * deviation_more",
        "tl.sum(more * more",
    ),
    "a sum of squares": (FAR, "squares = tl.sum(deviation * deviation, axis=1)", CANCELLING),
    "padding in the variance": (Case(3, 7), "tl.where(known[None, :], h - mean[:, None], 0.0)", "h - mean[:, None]"),
    "padding of the second block": (
        RAGGED,
        "tl.where(known_more[None, :], more - mean[:, None], 0.0)",
        "more - mean[:, None]",
    ),
    "a sample variance": (Case(3, 5), "squares / D + eps", "squares / (D - 1) + eps"),
    "no eps": (Case(3, 80, std=1e-3), "squares / D + eps", "squares / D"),
    "no one beside the scale": (PLAIN, "factor = 1.0 +", "factor = 0.0 +"),
    "another image": (PLAIN, "start = (lane * N + token) * D", "start = token * D"),
    "scale of another image": (PLAIN, "scale_ptr += lane * scale_stride", "scale_ptr += 0"),
    "shift of another image": (PLAIN, "shift_ptr += lane * shift_stride", "shift_ptr += 0"),
    "gate of another image": (ADDS, "gate_ptr += lane * gate_stride", "gate_ptr += 0"),
    "no gate": (ADDS, "h += gate *", "h += 1.0 *"),
    "the last token": (PLAIN, "present = token < N", "present = token < N - 1"),
    "the last channel": (PLAIN, "known_more = c_more < D", "known_more = c_more < D - 1"),
}


@pytest.mark.parametrize("case", [PLAIN, FAR, ADDS], ids=str)
def test_a_copy_without_an_error_passes(case: Case, tmp_path: Path, device: torch.device) -> None:
    assert_equivalent(planted(tmp_path, "layer_norm_modulate.py"), case.arguments(device))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_error_is_caught(name: str, tmp_path: Path, device: torch.device) -> None:
    case, old, new = MUTANTS[name]
    ops = planted(tmp_path, "layer_norm_modulate.py", old, new)
    with pytest.raises(AssertionError, match="beyond"):
        assert_equivalent(ops, case.arguments(device))
