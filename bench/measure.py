"""How things are timed: compared first, then interleaved round by round in one run, medians and percentiles.

Machines are shared and clocks drift, so what carries over to another run is the ratio of interleaved medians.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from stepfusion.bench.budget import OutOfBudget, budget
from stepfusion.bench.device_time import SHORT, Rotation, between_events, device_seconds

Call = Callable[[], object]

#: One sample lasts at least so long: a shorter call is repeated within it.
SAMPLE_SECONDS = 2e-3
_MOST_CALLS = 2000
NO_ROTATIONS: Mapping[str, Rotation] = MappingProxyType({})


@dataclass(frozen=True)
class Timing:
    """Of one call, in milliseconds: wall time until its result is there, and the device's median between events."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    device_ms: float | None = None


@dataclass(frozen=True)
class Difference:
    """Largest and root mean square difference of two outputs; infinite if one is not finite."""

    max: float
    rms: float


@dataclass(frozen=True)
class Limit:
    """The largest difference that is accepted, of ``measure`` "max" or "rms"."""

    allowed: float
    measure: str = "max"

    def holds(self, difference: Difference) -> bool:
        """True if the difference is within the limit."""
        value: float = getattr(difference, self.measure)
        return value <= self.allowed

    def __str__(self) -> str:
        return f"{self.measure} {self.allowed:.2g}"


@dataclass(frozen=True)
class Contender:
    """One rival.

    Attributes:
        check: makes the output that is compared with ``reference``; within ``budget_s`` seconds, for the first call
            may compile. run: what is timed.
        rotation: how many calls of ``run`` go once through its inputs, if the host's time may matter: on a CUDA
            device the device time is then that of replays (:mod:`stepfusion.bench.device_time`).
    """

    name: str
    reference: torch.Tensor
    check: Callable[[], torch.Tensor]
    run: Call
    limit: Limit
    budget_s: float | None = None
    rotation: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a contender: either an error, or a timing. ``warmup_s`` is its first output's; ``notes`` say how
    its device time was taken.
    """

    limit: Limit
    difference: Difference | None = None
    timing: Timing | None = None
    warmup_s: float | None = None
    error: str | None = None
    notes: str | None = None

    def fields(self) -> dict[str, float | str | None]:
        """The fields of a :class:`stepfusion.bench.rows.Row` that it fills."""
        values: dict[str, float | str | None] = {"tolerance": str(self.limit), "error": self.error}
        values["warmup_s"] = self.warmup_s
        if self.difference is not None and math.isfinite(self.difference.max):
            values |= {"max_difference": self.difference.max, "rms_difference": self.difference.rms}
        if self.timing is not None:
            values |= vars(self.timing)
        return values


def difference(out: torch.Tensor, reference: torch.Tensor) -> Difference:
    """How far two outputs of one shape are apart, computed where the first is. ValueError if the shapes differ."""
    if out.shape != reference.shape:
        raise ValueError(f"the output has shape {list(out.shape)}, and the reference {list(reference.shape)}")
    if out.numel() == 0:
        return Difference(0.0, 0.0)
    apart = out.detach().double() - reference.detach().to(out.device).double()
    # one copy of two numbers; if anything is NaN, so is the largest
    largest, rms = torch.stack((apart.abs().max(), apart.square().mean().sqrt())).tolist()
    return Difference(largest, rms) if math.isfinite(largest) else Difference(math.inf, math.inf)


def contest(contenders: Sequence[Contender], device: torch.device, rounds: int) -> dict[str, Verdict]:
    """Compare every contender with its reference output, then time those that pass, interleaved.

    One that fails, or whose output is further away than its limit, gets an error and is not timed; the others are.
    """
    verdicts = {contender.name: _compared(contender, device) for contender in contenders}
    accepted = {c.name: c for c in contenders if verdicts[c.name].error is None}
    rotations = {
        name: Rotation(c.run, c.rotation, device)
        for name, c in accepted.items()
        if c.rotation is not None and device.type == "cuda"
    }
    timings = interleave({name: c.run for name, c in accepted.items()}, device, rounds, rotations)
    for name, timing in timings.items():
        if isinstance(timing, str):
            verdicts[name] = replace(verdicts[name], error=timing)
        else:
            verdicts[name] = replace(verdicts[name], timing=timing, notes=_how(rotations.get(name)))
    return verdicts


def _compared(contender: Contender, device: torch.device) -> Verdict:
    """The verdict on an output, before anything is timed."""
    limit = contender.limit
    try:
        started = time.perf_counter()
        with budget(contender.budget_s):
            out = contender.check()
            synchronize(device)
        warmup = time.perf_counter() - started
        apart = difference(out, contender.reference)
    except OutOfBudget as error:
        torch._dynamo.reset()
        return Verdict(limit, error=one_line(error))
    except Exception as error:  # whatever a rival raises is its result, and the others go on
        return Verdict(limit, error=one_line(error))
    message = None
    if not limit.holds(apart):
        message = (
            f"the output differs from the reference by max {apart.max:.3g}, rms {apart.rms:.3g}, "
            f"accepted is {limit}; nothing was timed"
        )
    return Verdict(limit, apart, None, warmup, message)


def _how(rotation: Rotation | None) -> str | None:
    """How a device time was taken, if not between events around plain calls."""
    if rotation is None:
        return None
    if rotation.why_not is None:
        return f"device time of a CUDA graph of {rotation.calls} calls"
    return f"device time of single launches, for they cannot be captured: {rotation.why_not}"


def interleave(
    calls: Mapping[str, Call], device: torch.device, rounds: int, rotations: Mapping[str, Rotation] = NO_ROTATIONS
) -> dict[str, Timing | str]:
    """Time every call once a round, in turn; a call that raises drops out, with one line that says why.

    Those with a rotation have their device time from one launch of it in each round.
    """
    results: dict[str, Timing | str] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            call()
            repeats[name] = _repeats(call, device)
        except Exception as error:  # see contest
            results[name] = one_line(error)
    samples: dict[str, list[tuple[float, float | None]]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for name in list(samples):
            try:
                samples[name].append(_sample(calls[name], repeats[name], device, rotations.get(name)))
            except Exception as error:  # see contest
                results[name] = one_line(error)
                del samples[name]
    return {**{name: summarise(taken) for name, taken in samples.items()}, **results}


def summarise(samples: Sequence[tuple[float, float | None]]) -> Timing:
    """Median and percentiles of pairs of wall and device time, in seconds; no device time if one has none."""
    low, p20, median, p80 = (float(q) for q in np.quantile([1e3 * s[0] for s in samples], (0.0, 0.2, 0.5, 0.8)))
    on_device = [1e3 * seconds for _, seconds in samples if seconds is not None]
    return Timing(median, p20, p80, low, float(np.median(on_device)) if len(on_device) == len(samples) else None)


def time_alone(call: Call, device: torch.device, rounds: int) -> Timing:
    """The timing of one call that has no rival. RuntimeError if it fails."""
    timing = interleave({"call": call}, device, rounds)["call"]
    if isinstance(timing, str):
        raise RuntimeError(timing)
    return timing


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters, with its kind."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _repeats(call: Call, device: torch.device) -> int:
    """How many calls make one sample long enough."""
    taken, _ = _sample(call, 1, device)
    return max(1, min(_MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(taken, 1e-9))))


def _sample(
    call: Call, repeats: int, device: torch.device, rotation: Rotation | None = None
) -> tuple[float, float | None]:
    """Seconds of one call: wall, host time included, and of a CUDA device."""

    def launch() -> None:
        for _ in range(repeats):
            call()

    if device.type != "cuda":
        synchronize(device)
        started = time.perf_counter()
        launch()
        synchronize(device)
        return (time.perf_counter() - started) / repeats, None
    wall, on_device = (seconds / repeats for seconds in between_events(launch, device))
    if rotation is not None:
        on_device = device_seconds(rotation.launch, device) / rotation.calls
    elif wall < SHORT:
        on_device = device_seconds(launch, device) / repeats
    return wall, on_device
