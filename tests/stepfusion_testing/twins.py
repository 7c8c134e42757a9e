"""The comparison that holds a fused kernel to its twin and both to float64: equivalence tests and their controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stepfusion import kernels
from stepfusion.kernels import reference
from stepfusion.kernels.coefficients import HISTORY
from stepfusion.kernels.tolerance import ROUNDINGS, UNIT, tolerance

Step = Callable[..., torch.Tensor]
Tensors = dict[str, torch.Tensor]

#: What a UNet runs of the kernels once it is fused.
NETWORK_OPS = (
    *("group_norm_silu", "add_group_norm_silu", "add_bias", "add_bias_doubled", "add_bias_padded"),
    *("add_projection_", "add_projection_doubled"),
)
BUFFERS = ("x_next", "x_net", "x0", "history", "flags")
ROWS = 5


@dataclass(frozen=True)
class StepCase:
    """One call of the table walker: four lanes, each on a row of its own, one of them parked.

    Attributes:
        shape: of one image. dtype: of the network.
        noise: "none", "given" or "drawn". learned: the network returned v as well.
        guidance: a scale a lane, or None. unguided: row 3 is not guided.
        copies: of the next state for the network. x0: keep x0. clip: bound of |x0|.
        history: entries that rows but row 0 read, and rows but row 1 write. known: a third of the image.
    """

    shape: tuple[int, ...] = (7,)
    dtype: torch.dtype = torch.float32
    noise: str = "drawn"
    learned: bool = False
    guidance: tuple[float, ...] | None = None
    copies: int = 1
    x0: bool = True
    clip: float = 0.75
    history: int = 0
    known: bool = False
    unguided: bool = False
    rows: tuple[int, ...] = (3, 0, kernels.PARKED, 1)

    def __str__(self) -> str:
        words = [self.noise, str(self.dtype).removeprefix("torch."), "x".join(map(str, self.shape)) or "scalar"]
        words += [name for name in ("learned", "guidance", "unguided", "known") if getattr(self, name)]
        words += [f"history {self.history}"] * (self.history > 0)
        return "-".join([*words, str(self.copies)])

    def arguments(self, device: torch.device) -> Tensors:
        """Random inputs, and output buffers full of NaN. Row 0 has sigma = 0."""
        lanes = len(self.rows)
        batch = (lanes, *self.shape)
        out = (lanes, self.shape[0] * (1 + self.learned), *self.shape[1:]) if self.shape else (lanes,)
        table = torch.randn(ROWS, len(kernels.COLUMNS))
        table[:, kernels.COLUMNS.index("clip")] = self.clip
        table[:, kernels.COLUMNS.index("sigma")] = torch.arange(ROWS) / ROWS if self.noise != "none" else 0.0
        for name in ("threshold", "threshold_max", "rescale", "unguided", *HISTORY[self.history :]):
            table[:, kernels.COLUMNS.index(name)] = 0.0
        table[0, [kernels.COLUMNS.index(name) for name in HISTORY]] = 0.0
        table[1, [kernels.COLUMNS.index(name) for name in ("known_sigma", "keep_x", "keep_x0")]] = 0.0
        table[3, kernels.COLUMNS.index("unguided")] = float(self.unguided)
        given: Tensors = {
            "x": torch.randn(batch),
            "out": torch.randn(out).to(self.dtype),
            "rows": torch.tensor(self.rows, dtype=torch.int64),
            "coefficients": table,
            "timesteps": torch.tensor([999, 2**31 + 3, 0, 500, 17]),
            "flags": torch.full((lanes,), kernels.FINITE),
            "x_next": torch.full(batch, torch.nan),
        }
        if self.noise == "drawn":
            given |= {
                "seeds": torch.randint(-(2**63), 2**63 - 1, (lanes,)),
                "indices": torch.arange(lanes) + 2**32 - 2,
            }
        if self.noise == "given":
            given["noise"] = torch.randn(batch)
        if self.guidance is not None:
            given |= {"out_uncond": torch.randn(out).to(self.dtype), "guidance": torch.tensor(self.guidance)}
        if self.copies:
            given["x_net"] = torch.full((self.copies * lanes, *self.shape), torch.nan, dtype=self.dtype)
        if self.x0:
            given["x0"] = torch.full(batch, torch.nan)
        if self.history:
            reads = torch.tensor(self.rows, dtype=torch.int64) > 0
            kept = torch.randn(self.history, *batch)
            given["history"] = torch.where(reads.view(-1, *[1] * len(self.shape)), kept, torch.nan)
        if self.known:
            given["known"] = torch.where(torch.rand(batch) < 1 / 3, torch.randn(batch), torch.nan)
        on_device = {name: tensor.to(device) for name, tensor in given.items()}
        # zeros stand before the table: what reads a parked lane's row finds a state that is not NaN
        on_device["coefficients"] = torch.cat((torch.zeros_like(table[:1]), table)).to(device)[1:]
        return on_device


def outputs(step: Step, arguments: Tensors) -> Tensors:
    """What ``step`` writes, on the CPU, with the buffers in ``arguments`` left alone."""
    buffers = {name: arguments[name].clone() for name in BUFFERS if name in arguments}
    result = step(**{**arguments, **buffers})
    assert "x_next" not in buffers or result is buffers["x_next"]
    return {name: tensor.cpu() for name, tensor in {**buffers, "x_next": result}.items()}


def in_float64(arguments: Tensors) -> Tensors:
    """The same arguments for the reference in float64; the network copy too."""
    return {name: t.double() if t.is_floating_point() else t for name, t in arguments.items()}


def assert_step_equivalent(step: Step, arguments: Tensors, *, truncated: bool | None = None) -> None:
    """``step`` writes what the reference writes, bit for bit, and both are float64's result within rounding.

    Where the network learned its variance an exp is involved, and the two agree within rounding. Triton's interpreter
    truncates to bfloat16, so there a copy may differ by one unit: ``truncated``, by default on a CPU.
    """
    if truncated is None:
        truncated = arguments["x"].device.type == "cpu"
    got, twin = outputs(step, arguments), outputs(reference.diffusion_step, arguments)
    truth = outputs(reference.diffusion_step, in_float64(arguments))
    bounds = _bounds(arguments)
    exact = arguments["out"].shape == arguments["x"].shape
    for name in got:
        if name == "flags" or (exact and not (truncated and _is_bfloat16_copy(name, arguments))):
            assert_same_bits(name, got[name], twin[name])
        else:
            assert_within(name, got[name], twin[name], 2 * bounds[name])
        for result in (got, twin):
            assert_within(name, result[name], truth[name], bounds.get(name, 0.0))


def _is_bfloat16_copy(name: str, arguments: Tensors) -> bool:
    return name == "x_net" and arguments[name].dtype == torch.bfloat16


def _bounds(arguments: Tensors) -> dict[str, float]:
    """The tolerance of every output, from the largest term that any lane adds up."""
    a = in_float64(arguments)
    rows = a["rows"].clamp(min=0, max=len(a["coefficients"]) - 1)
    columns = {n: _largest(c) for n, c in zip(kernels.COLUMNS, a["coefficients"][rows].unbind(1), strict=True)}
    x, out = (_largest(a[name]) for name in ("x", "out"))
    if "guidance" in a:
        out = max(out, _largest(a["guidance"]) * (out + _largest(a["out_uncond"])))
    z = _largest(a["noise"]) if "noise" in a else 6.66
    exponent = columns["half_log_min"] + columns["half_log_span"] * max(1.0, out)
    std = columns["sigma"]
    if a["out"].shape != a["x"].shape:
        std *= torch.tensor(exponent).exp().item() * (1 + exponent)  # an error of the exponent grows with it
    start = max(columns["x0_x"] * x, columns["x0_out"] * out)
    terms = [columns["next_x0"] * start, columns["next_x"] * x, columns["next_out"] * out, std * z]
    if "history" in a:
        terms += [columns[name] * _largest(kept) for name, kept in zip(HISTORY, a["history"], strict=False)]
    if "known" in a:
        terms += [columns["known_x"] * _largest(a["known"]), columns["known_sigma"] * z]
    rounding = ROUNDINGS["diffusion_step"]
    bounds = {
        "x_next": tolerance(torch.float32, max(terms), rounding),
        "x0": tolerance(torch.float32, start, rounding),
    }
    if "x_net" in a:
        shown = columns["net_scale"] * sum(terms)
        bounds["x_net"] = tolerance(arguments["x_net"].dtype, shown, rounding)
    if "history" in a:
        bounds["history"] = tolerance(torch.float32, max(columns["keep_x"] * x, columns["keep_x0"] * start), rounding)
    return bounds


def _largest(x: torch.Tensor) -> float:
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_same_bits(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bit for bit; any NaN equals any other."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    differ = ~((got.isnan() & want.isnan()) | ((got == want) & (got.signbit() == want.signbit())))
    assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} differ, {_example(got, want, differ)}"


def assert_within(name: str, got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    """At most ``bound`` apart, and NaN or infinite in the same places."""
    got, want = got.double(), want.double()
    near = (got - want).abs() <= bound
    differ = ~(near | (got == want) | (got.isnan() & want.isnan()))
    assert not differ.any(), (
        f"{name}: {int(differ.sum())} of {differ.numel()} beyond {bound}, {_example(got, want, differ)}"
    )


def _example(got: torch.Tensor, want: torch.Tensor, differ: torch.Tensor) -> str:
    where = differ.nonzero()[0].tolist()
    return f"first at {where}: {got[tuple(where)].item()} and {want[tuple(where)].item()}"


def final_bound(dtype: torch.dtype, op: str, *terms: torch.Tensor) -> float:
    """The tolerance of an op whose result is a sum of ``terms``."""
    return tolerance(dtype, sum(_largest(term) for term in terms), ROUNDINGS[op])


def assert_rounded_alike(name: str, got: torch.Tensor, twin: torch.Tensor, *, interpreted: bool) -> None:
    """Equal bit for bit, but for the interpreter's truncation to bfloat16: then within one unit."""
    if interpreted and got.dtype == torch.bfloat16:
        assert_within(name, got, twin, UNIT[torch.bfloat16] * _largest(twin.double()))
    else:
        assert_same_bits(name, got, twin)


def mutate(text: str, old: str, new: str) -> str:
    """``text`` with its one ``old`` replaced; a mutation that no longer applies is an error, never a silent pass."""
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    return text.replace(old, new)
