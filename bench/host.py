"""What stepfusion costs on the host alone, which needs no GPU: Python of a tick, and the import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch

from stepfusion.bench.measure import Timing, summarise
from stepfusion.bench.options import Options
from stepfusion.bench.rows import Row
from stepfusion.engine import Engine
from stepfusion.execution.cuda_graph import CapturePolicy, Graph, GraphPool
from stepfusion.samplers.schedule import NoiseSchedule

PART = "host"
_IMPORTS = (
    "import time, torch, triton; t = time.perf_counter(); "
    "import stepfusion; stepfusion.Engine; print(time.perf_counter() - t)"
)
_SHORT, _LONG = 50, 1000  # steps of two loops, whose difference has no cost of the request in it


def host_rows(options: Options) -> Iterator[Row]:
    """The Python of one tick with no-ops for graph replay, network and kernels; and the import."""
    notes = "kernels, network and graph replay replaced by no-ops"
    yield Row(PART, "python of a tick", "stepfusion", "cpu", notes=notes, **vars(tick_cost(options.rounds or 15)))
    repeats = 1 if options.tiny else options.rounds or 7
    notes = "above importing torch and triton, in fresh processes"
    yield Row(PART, "import stepfusion", "stepfusion", "cpu", notes=notes, **vars(import_cost(repeats)))


def tick_cost(rounds: int, lanes: int = 8) -> Timing:
    """Host time of one tick that launches nothing, in milliseconds: long loops less short ones, by their ticks."""
    schedule = NoiseSchedule.linear(_LONG)
    engine = _silent_engine(schedule, lanes)
    run = {steps: _sampling(engine, steps, lanes) for steps in (_SHORT, _LONG)}
    taken = []
    for _ in range(rounds + 1):
        short, long = (_seconds(run[steps]) for steps in (_SHORT, _LONG))
        taken.append((long - short) / (_LONG - _SHORT))
    return summarise([(seconds, None) for seconds in taken[1:]])  # the first round warms up


def import_cost(repeats: int) -> Timing:
    """Milliseconds that stepfusion and its engine add in a process that has imported torch and triton."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats + 1):
            done = subprocess.run(
                [sys.executable, "-c", _IMPORTS],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise RuntimeError(f"a process that imports stepfusion failed: {done.stderr.strip()[-200:]}")
            taken.append(float(done.stdout))
    return summarise([(seconds, None) for seconds in taken[1:]])  # the first reads the disk


class _Nothing:
    """A captured tick that does nothing when it is replayed."""

    def replay(self) -> None:
        pass


class _Silent(CapturePolicy):
    """Replaces every tick by a replay of nothing: what is left is the engine's own Python."""

    def capture(self, body: Callable[[], None], device: torch.device, pool: GraphPool | None = None) -> Graph | None:
        return _Nothing()


def _silent_engine(schedule: NoiseSchedule, lanes: int) -> Engine:
    """An engine whose ticks do nothing."""

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return x

    engine = Engine(network, schedule, shape=(1, 2, 2), device="cpu", batch=lanes)
    engine.runners.policy = _Silent()
    return engine


def _sampling(engine: Engine, steps: int, lanes: int) -> Callable[[], object]:
    table = engine.table("ddim", steps)
    return lambda: engine.sample(lanes, table, progress=False)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
