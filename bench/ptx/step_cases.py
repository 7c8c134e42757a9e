"""Steps of the table walker: every dtype, source of noise and option, ragged and single sizes, any alignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

import stepfusion as sf
from stepfusion import kernels
from stepfusion.bench.ptx.agreement import largest, same_bits, within
from stepfusion.bench.ptx.executor import NVIDIA, Executor
from stepfusion.bench.ptx.inputs import (
    BRAIN,
    CIFAR,
    DTYPES,
    FASHION,
    HALF,
    LARGE,
    RAGGED,
    SCHEDULE,
    SINGLE,
    Case,
    Tensors,
    identity,
    plant,
    shifted,
    strided,
    unchanged,
    words,
)
from stepfusion.kernels import reference
from stepfusion.kernels.coefficients import HISTORY
from stepfusion.kernels.tolerance import ROUNDINGS, tolerance

_BUFFERS = ("x_next", "x_net", "x0", "history", "flags")
_PER_LANE = ("rows", "flags", "seeds", "indices", "timesteps")
#: Row 9 is a table's last, 0 its first; 10 lies beyond it.
_ROWS = (3, kernels.PARKED, 9, 10, 0)
_MIXED_ROWS = (3, kernels.PARKED, 7, 10, 4)

#: Ten rows each. Of "mixed", the first five are ddpm's, the last of them silent, and the others dpmpp_2m's.
_TABLES: dict[str, Callable[[], sf.StepTable]] = {
    "ddim": lambda: sf.ddim(SCHEDULE, 10),
    "stochastic ddim": lambda: sf.ddim(SCHEDULE, 10, eta=0.7),
    "ddpm": lambda: sf.ddpm(SCHEDULE, 10),
    "learned": lambda: sf.ddpm(SCHEDULE, 10, variance="learned_range"),
    "learned, with history": lambda: _with_history(sf.ddpm(SCHEDULE, 10, variance="learned_range")),
    "all history": lambda: _with_history(sf.ddpm(SCHEDULE, 10)),
    "multistep": lambda: sf.dpmpp_2m(SCHEDULE, 10),
    "mixed": lambda: sf.StepTable.concatenate([sf.ddpm(SCHEDULE, 5), sf.dpmpp_2m(SCHEDULE, 5)]),
    "no clip": lambda: sf.ddpm(SCHEDULE, 10, clip=None),
    "v": lambda: sf.ddim(SCHEDULE, 10, eta=1.0, prediction="v_prediction"),
}


#: Columns of row 3, of row 9 and of row 0: all that a row can do with a history; the oldest alone; nothing.
_WEIGHTS = {
    "next_prev": (-0.5, 0.0, 0.0),
    "next_prev2": (0.25, 0.0, 0.0),
    "next_prev3": (-0.125, 0.75, 0.0),
    "keep_x": (0.5, 0.0, 0.0),
    "keep_x0": (-0.25, 1.0, 0.0),
    "net_scale": (0.3, 3.0, 1.0),
    "unguided": (0.0, 1.0, 0.0),
}


def _with_history(table: sf.StepTable) -> sf.StepTable:
    """A table of which some rows use a history, scale what the network is shown, and are not guided."""
    coefficients = table.coefficients.copy()
    for name, values in _WEIGHTS.items():
        coefficients[[3, 9, 0], kernels.COLUMNS.index(name)] = values
    return replace(table, coefficients=coefficients)


@dataclass(frozen=True)
class Step:
    """One call of the table walker.

    Attributes:
        shape: of one image. dtype: of the network. noise: "none", "given" or "drawn". table: of :data:`_TABLES`.
        learned, guided, x0, known, flags: arguments that are there. history: how many entries it has. copies: of the
            next state for the network.
        own: the step makes x_next itself.
        nhwc: what the network takes and returns is channels_last. rows: of the lanes. shift: elements by which all
        tensors are shifted.
        strides: inputs are not contiguous. planted: a value in one lane of the network's output.
    """

    shape: tuple[int, ...] = FASHION
    dtype: torch.dtype = BRAIN
    noise: str = "drawn"
    table: str = "ddpm"
    learned: bool = False
    guided: bool = False
    x0: bool = False
    history: int = 0
    known: bool = False
    flags: bool = True
    copies: int = 1
    own: bool = False
    nhwc: bool = False
    rows: tuple[int, ...] = _ROWS
    shift: int = 0
    strides: bool = False
    planted: float | None = None

    def __str__(self) -> str:
        options = [
            name for name in ("learned", "guided", "x0", "known", "own", "nhwc", "strides") if getattr(self, name)
        ]
        more = ["no flags"] * (not self.flags) + [f"{self.copies} copies"] * (self.copies != 1)
        rows = "" if self.rows == _ROWS else f"rows {','.join(map(str, self.rows))}"
        shift = f"shifted {self.shift}" if self.shift else ""
        more += [f"history {self.history}"] * (self.history > 0)
        planted = "" if self.planted is None else f"planted {self.planted}"
        return words("step", self.dtype, self.shape, self.noise, self.table, *options, *more, rows, shift, planted)

    def arguments(self) -> Tensors:
        """Random inputs, and buffers full of NaN."""
        lanes, table = len(self.rows), _TABLES[self.table]()
        batch = (lanes, *self.shape)
        given = {
            "x": torch.randn(batch),
            "out": torch.randn(lanes, self.shape[0] * (1 + self.learned), *self.shape[1:]).to(self.dtype),
            "rows": torch.tensor(self.rows, dtype=torch.int64),
            "coefficients": torch.from_numpy(table.coefficients.copy()).float(),
            "timesteps": torch.from_numpy(table.timesteps.copy()),
        }
        if self.noise == "none":
            given["coefficients"][:, kernels.COLUMNS.index("sigma")] = 0.0
        elif self.noise == "given":
            given["noise"] = torch.randn(batch)
        else:
            given |= identity(lanes, 2**32 - 2)
        given |= self._options(batch, given["out"])
        if self.planted is not None:
            plant(given["out"], 0, self.planted)
        if self.nhwc:
            images = ("out", "out_uncond", "x_net")
            given |= {n: given[n].to(memory_format=torch.channels_last) for n in images if n in given}
        if self.strides:
            given |= {name: strided(given[name]) for name in given.keys() - {*_BUFFERS, "timesteps"}}
        return {n: shifted(t, 1 if n in _PER_LANE else self.shift) if self.shift else t for n, t in given.items()}

    def _options(self, batch: tuple[int, ...], out: torch.Tensor) -> Tensors:
        lanes, given = batch[0], Tensors()
        if self.guided:
            scales = torch.tensor([7.5, 1.0, 0.0, 1.0, 3.0])[:lanes]
            given |= {"out_uncond": torch.randn(out.shape).to(out.dtype), "guidance": scales}
        if self.copies:
            given["x_net"] = torch.full((self.copies * lanes, *self.shape), math.nan, dtype=self.dtype)
        if self.x0:
            given["x0"] = torch.full(batch, math.nan)
        if self.history:
            given["history"] = torch.randn((self.history, *batch))
        if self.known:
            given["known"] = torch.where(torch.rand(batch) < 1 / 3, torch.randn(batch), math.nan)
        if self.flags:
            given["flags"] = torch.full((lanes,), kernels.FINITE)
        return given if self.own else {**given, "x_next": torch.full(batch, math.nan)}

    def check(self, executor: Executor) -> None:
        """The step, and the same in place, equal the reference's; inputs are left alone."""
        given = self.arguments()
        before = {name: tensor.clone() for name, tensor in given.items()}
        with executor.running():
            got = _outputs(kernels.diffusion_step, given)
            in_place = {} if self.own else _in_place(given)
        unchanged(given, before)
        self._compare(got, given)
        active = given["rows"] >= 0
        for name, tensor in in_place.items():
            want = got[name]
            if name == "x_next":  # parked lanes keep their state
                want = torch.where(active.view(-1, *[1] * (tensor.ndim - 1)), want, given["x"])
            same_bits(f"{name} in place", tensor, want)

    def _compare(self, got: Tensors, given: Tensors) -> None:
        """Equal bits; within rounding of float64 if the network learned its variance, for an exp is involved."""
        twin = _outputs(reference.diffusion_step, given)
        exact = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        truth = _outputs(reference.diffusion_step, exact) if self.learned else {}
        for name, tensor in got.items():
            if self.learned and name not in ("flags", "x0", "history"):
                within(name, tensor, truth[name], _bound(exact, name, tensor.dtype))
            else:
                same_bits(name, tensor, twin[name])


def _outputs(step: Callable[..., torch.Tensor], given: Tensors) -> Tensors:
    """What a step writes, with the buffers of ``given`` left alone."""
    buffers = {name: given[name].clone() for name in _BUFFERS if name in given}
    result = step(**{**given, **buffers})
    return {**buffers, "x_next": result}


def _in_place(given: Tensors) -> Tensors:
    """What a step writes with x_next = x."""
    buffers = {name: given[name].clone() for name in _BUFFERS if name in given}
    x = given["x"].contiguous().clone()
    kernels.diffusion_step(**(given | buffers | {"x": x, "x_next": x}))
    return buffers | {"x_next": x}


def _bound(given: Tensors, name: str, dtype: torch.dtype) -> float:
    """The tolerance of a step with learned variance, from the largest terms that any lane adds up."""
    rows = given["rows"].clamp(min=0, max=len(given["coefficients"]) - 1)
    c = {n: largest(v) for n, v in zip(kernels.COLUMNS, given["coefficients"][rows].unbind(1), strict=True)}
    x, out, uncond = (largest(given[name]) for name in ("x", "out", "out_uncond" if "out_uncond" in given else "out"))
    if "guidance" in given:
        out = max(out, largest(given["guidance"]) * (out + uncond))
    exponent = c["half_log_min"] + c["half_log_span"] * max(1.0, largest(given["out"]))
    std = c["sigma"] * math.exp(exponent) * (1 + exponent)  # an error of the exponent grows with it
    z = largest(given["noise"]) if "noise" in given else 6.66
    start = max(c["x0_x"] * x, c["x0_out"] * out)
    terms = [c["next_x0"] * start, c["next_x"] * x, c["next_out"] * out, std * z]
    if "history" in given:
        terms += [c[name] * largest(entry) for name, entry in zip(HISTORY, given["history"], strict=False)]
    if "known" in given:
        terms += [c["known_x"] * largest(given["known"]), c["known_sigma"] * z]
    scale = c["net_scale"] if name == "x_net" else 1.0
    return tolerance(dtype, scale * sum(terms), ROUNDINGS["diffusion_step"])


def _quick() -> list[tuple[Step, tuple[str, ...]]]:
    """A few steps that reach every line of the kernel between them, and the targets to run them on."""
    hopper = ("sm_90",)
    mixed = Step((7,), HALF, "drawn", "mixed", known=True, strides=True, copies=0, rows=_MIXED_ROWS)
    return [
        (
            replace(mixed, shape=(1, 33, 32), dtype=BRAIN, x0=True, history=1, guided=True, copies=2, strides=False),
            NVIDIA,
        ),
        (Step(LARGE, HALF, "none", "mixed", x0=True, history=1, rows=(7, kernels.PARKED, 3), shift=1), NVIDIA),
        (Step((1, 33, 32), BRAIN, "drawn", "all history", history=3, guided=True, copies=2), NVIDIA),
        (Step(LARGE, HALF, "none", "all history", history=2, rows=(3, kernels.PARKED, 0), shift=1), NVIDIA),
        (Step((5, 5), SINGLE, "given", "all history", x0=True, history=3, own=True), hopper),
        (Step(FASHION, SINGLE, "drawn", planted=math.nan, own=True), NVIDIA),
        (Step((3, 8, 8), BRAIN, "given", "learned", learned=True, guided=True, copies=2), NVIDIA),
        (mixed, hopper),
        (Step(RAGGED, BRAIN, "drawn", rows=(3, kernels.PARKED, 9)), hopper),
        (Step((1, 1, 1), BRAIN, "given", copies=0, rows=(4,)), hopper),
        (Step((1, 1, 1), BRAIN, "given", copies=0, rows=(kernels.PARKED,)), hopper),
        (Step(CIFAR, SINGLE, "none", "ddim", known=True), hopper),
        (Step((3, 9, 7), BRAIN, "drawn", "learned", learned=True, guided=True, copies=2, nhwc=True), NVIDIA),
        (Step((3, 5, 5), BRAIN, "drawn", "no clip", planted=-math.inf, shift=2), hopper),
    ]


def _every() -> Iterator[Step]:
    """The whole matrix."""
    yield Step(CIFAR, HALF, "drawn", nhwc=True, rows=(3, kernels.PARKED, 9))
    for dtype in DTYPES:
        for noise, table in (("none", "ddim"), ("given", "ddpm"), ("drawn", "ddpm")):
            plain = Step(LARGE, dtype, noise, table)
            for shape in (LARGE, FASHION, CIFAR, RAGGED, (1, 1, 1), (7,), (3, 5, 5)):
                yield replace(plain, shape=shape)
            yield replace(plain, shape=FASHION, rows=(kernels.PARKED,) * 2)
            yield replace(plain, shape=(3, 64, 64), rows=(4,))
            yield replace(plain, shape=(1, 1, 1), rows=(4,))
            everything = replace(
                plain, x0=True, history=1, known=True, guided=True, copies=2, table="mixed", rows=_MIXED_ROWS
            )
            kept = replace(everything, table="all history", rows=_ROWS)
            for shift in (1, 2, 4, 8):
                yield replace(everything, shape=(1, 8, 131), shift=shift)
                yield replace(kept, shape=(1, 8, 131), history=3, shift=shift)
            for history in (1, 2, 3):
                yield replace(plain, table="all history", history=history)
                yield replace(kept, shape=(3, 9, 7), history=history, strides=True)
                yield replace(kept, shape=(4, 9, 7), history=history, nhwc=True)
                yield replace(plain, shape=(1, 1, 1), table="all history", history=history)
            yield replace(plain, shift=1, rows=(3, kernels.PARKED))
            yield replace(everything, shape=(3, 9, 7), strides=True)
            yield replace(plain, shape=RAGGED, known=True)
            yield replace(everything, shape=CIFAR)
            yield replace(everything, shape=CIFAR, table="stochastic ddim", rows=_ROWS)
            yield replace(plain, shape=(1, 33, 31), copies=0, flags=False)
            yield replace(plain, shape=(1, 33, 31), copies=0, own=True)
            yield replace(plain, shape=(3, 40, 36), nhwc=True)
            yield replace(plain, shape=(4, 9, 7), nhwc=True, guided=True, copies=2)
        yield from _options_of(dtype)


def _options_of(dtype: torch.dtype) -> Iterator[Step]:
    learned = Step(LARGE, dtype, "drawn", "learned", learned=True)
    yield learned
    yield replace(learned, table="learned, with history", noise="given", guided=True, copies=2, x0=True, history=1)
    yield replace(learned, table="learned, with history", guided=True, history=3)
    yield replace(learned, shape=(2, 7, 9), known=True)
    yield replace(learned, shape=FASHION, noise="none")
    silent = Step(LARGE, dtype, "none", "ddim")
    yield replace(silent, copies=0)
    yield replace(silent, table="multistep", copies=0, x0=True, history=1)
    yield replace(silent, table="multistep", history=1)
    yield replace(silent, x0=True)
    drawn = Step(CIFAR, dtype, "drawn")
    yield replace(drawn, shape=LARGE, guided=True, copies=2)
    yield replace(drawn, shape=(3, 7, 7), table="mixed", rows=_MIXED_ROWS, x0=True, history=1)
    yield replace(drawn, shape=LARGE, table="mixed", rows=_MIXED_ROWS, x0=True, history=1, known=True)
    yield replace(drawn, table="no clip")
    yield replace(drawn, table="v")
    for planted in (math.nan, math.inf, -math.inf):
        for shape in ((1030,), (4101,)):
            yield replace(drawn, shape=shape, table="no clip", planted=planted)
            yield replace(drawn, shape=shape, planted=planted)


def step_cases() -> list[Case]:
    """Every case, each once."""
    quick = _quick()
    full = dict.fromkeys([step for step, _ in quick] + list(_every()))
    targets = dict(quick)
    return [Case(str(step), step.check, targets.get(step, ())) for step in full]
