"""Time from the start noise to finished images on the host for small batches, and where a tick's time goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from stepfusion.bench.floors import measure_floors
from stepfusion.bench.host import tick_cost
from stepfusion.bench.measure import interleave, one_line
from stepfusion.bench.models import load_model
from stepfusion.bench.options import Options, stages
from stepfusion.bench.ours import check_runs_as_asked, make_engine
from stepfusion.bench.providers import Case
from stepfusion.bench.race import Race
from stepfusion.bench.rows import Row
from stepfusion.kernels import BackendError

PART = "latency"
#: What a tick consists of, in the order of the plot.
TICK_PARTS = ("network", "step", "rest")
_TICK_MODES = {"cpu": (("eager", "float32"),), "cuda": (("eager", "bfloat16"), ("graph", "bfloat16"))}


def latency_rows(options: Options) -> Iterator[Row]:
    """Rows of DDIM loops until the images are on the host, of one DDPM loop, and of the time split of a tick."""
    device, tiny = options.device, options.tiny
    on_gpu = device.type == "cuda"
    floors = measure_floors(PART, device, tiny=tiny)
    yield from floors.rows
    steps = options.steps or (2 if tiny else 50)
    rounds = options.rounds or (2 if tiny else 7 if on_gpu else 3)
    names = options.models or (("tiny",) if tiny else ("cifar10", "fashion-mnist"))
    batches = options.batches or ((1, 2) if tiny else (1, 4, 16) if on_gpu else (1, 4))
    for taking_part in stages(options.select()):
        for name, batch in product(names, batches):
            with Race(PART, Case(load_model(name), device, batch, steps), taking_part, floors) as race:
                yield from race.absent()
                yield from race.loops(rounds, finish=True)
        if any(provider.compiles for provider in taking_part):
            continue  # what follows compiles nothing, and was measured before
        model = load_model(names[0])
        with Race(PART, Case(model, device, 1, steps, "ddpm"), taking_part, floors) as race:
            yield from race.loops(rounds, finish=True)
        for mode, dtype in _TICK_MODES[device.type]:
            yield from tick_rows(Case(model, device, 1, steps), mode, dtype, rounds)


def tick_rows(case: Case, mode: str, dtype: str, rounds: int) -> Iterator[Row]:
    """Where the time of a tick goes, in milliseconds of one tick of one batch.

    Timed are whole loops, loops of an engine whose network returns its input, and the step alone, interleaved: the
    network is the first less the second, the rest the second less the third. On a GPU also the share of the loop in
    which no kernel runs.
    """
    common: dict[str, Any] = {
        "model": case.model.name,
        "shape": "x".join(map(str, (case.batch, *case.model.image_shape))),
        "dtype": dtype,
        "batch": case.batch,
        "steps": None,
    }
    name = f"stepfusion {mode} {dtype}"
    try:
        engine = make_engine(case, case.model.network, mode, dtype)
    except BackendError as error:
        yield Row(PART, "tick", name, case.device.type, notes=one_line(error), **common)
        return
    idle = make_engine(case, _input, mode, dtype)
    table, labels = engine.table("ddim", case.steps), case.labels
    on_device = table.on(case.device)
    x, out = case.start.clone(), case.start.to(engine.plan.dtype)
    rows = torch.full((case.batch,), case.steps // 2, device=case.device)
    x_net = torch.empty_like(out)
    step, columns, timesteps = engine.plan.ops.diffusion_step, on_device.coefficients, on_device.timesteps

    def whole_loop() -> torch.Tensor:
        images = engine.sample(table=table, start=case.start, labels=labels, progress=False)
        check_runs_as_asked(engine)
        return images

    timings = interleave(
        {
            "whole": whole_loop,
            "idle": lambda: idle.sample(table=table, start=case.start, labels=labels, progress=False),
            "step": lambda: step(x, out, rows, columns, timesteps, x_next=x, x_net=x_net),
        },
        case.device,
        rounds,
    )
    failed = [timing for timing in timings.values() if isinstance(timing, str)]
    if failed:
        yield Row(PART, "tick", name, case.device.type, error=failed[0], **common)
        return
    medians = {key: timing.median_ms for key, timing in timings.items() if not isinstance(timing, str)}
    whole, empty, alone = medians["whole"] / case.steps, medians["idle"] / case.steps, medians["step"]
    measured = {"whole": whole, "network": whole - empty, "step": alone, "rest": empty - alone}
    row = Row(PART, "tick", name, case.device.type, **common, notes="from differences of medians")
    for key, milliseconds in measured.items():
        yield replace(row, op=f"tick: {key}", median_ms=milliseconds)
    host = tick_cost(5)
    notes = "kernels, network and graph replay replaced by no-ops"
    yield replace(
        row, op="tick: python", median_ms=host.median_ms, p20_ms=host.p20_ms, p80_ms=host.p80_ms, notes=notes
    )
    if case.device.type == "cuda":
        share = _idle_share(lambda: engine.sample(table=table, start=case.start, labels=labels, progress=False))
        yield replace(
            row, op=f"DDIM-{case.steps} loop", fraction=share, fraction_of="device idle", notes="from a profile"
        )


def idle_share(intervals: Sequence[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no interval covers. ValueError for none."""
    if not intervals:
        raise ValueError("intervals must hold at least one kernel, got none")
    ordered = sorted(intervals)
    covered, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - ordered[0][0]
    return 1.0 - covered / span if span > 0 else 0.0


def _idle_share(call: Any) -> float:
    """The idle share of a CUDA device during a call, from a profile of its kernels and copies."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        call()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() or [] if event.device_type == DeviceType.CUDA]
    return idle_share([(event.time_range.start, event.time_range.end) for event in events])


def _input(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """A network that costs nothing."""
    return x
