"""Lanes of tables whose rows use what earlier rows kept, scale what the network is shown, or leave guidance out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.kernels import STREAM_INITIAL, reference
from stepfusion.lanes.runner import Runner
from stepfusion_testing.networks import labelled
from stepfusion_testing.serving_twins import NULL_LABEL, SHAPE, Desk, offline, small_engine

SCHEDULE = sf.NoiseSchedule.linear()
ROWS = 7
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]


def long_memory(entries: int = 3, *, guided: bool = True) -> sf.StepTable:
    """A stochastic sampler of no use, whose row i uses all of the i entries that were kept, at most ``entries``."""
    rng = np.random.default_rng(entries)
    names = ("x0_x", "x0_out", "next_x0", "next_x", "next_out", "keep_x", "keep_x0")
    columns = {name: rng.uniform(0.2, 0.6, ROWS) for name in names}
    columns |= {"clip": np.full(ROWS, 3.0), "sigma": np.full(ROWS, 0.2), "net_scale": rng.uniform(0.5, 2.0, ROWS)}
    for age, name in enumerate(("next_prev", "next_prev2", "next_prev3")[:entries], 1):
        columns[name] = np.where(np.arange(ROWS) >= age, rng.uniform(0.2, 0.4, ROWS), 0.0)
    columns["unguided"] = np.array([0.0, 1.0] * ROWS)[:ROWS] if guided else np.ones(ROWS)
    return sf.StepTable.from_columns(
        "memory", "epsilon", SCHEDULE, np.arange(ROWS, dtype=np.int64)[::-1] * 100, columns
    )


def by_hand(table: sf.StepTable, seed: int, indices: list[int], guidance: float) -> torch.Tensor:
    """What the table makes of images, walked with the reference step."""
    lanes = torch.tensor(indices)
    keys = {"seeds": torch.full_like(lanes, seed), "indices": lanes}
    x = reference.normal(keys["seeds"], lanes, torch.zeros_like(lanes), SHAPE, STREAM_INITIAL)
    on, shown = table.on(torch.device("cpu")), x.clone()
    labels, history = torch.zeros_like(lanes), torch.full((3, *x.shape), torch.nan)
    for row in range(len(table)):
        t = on.timesteps[row].expand(len(lanes))
        out, uncond = labelled(shown, t, labels), labelled(shown, t, torch.full_like(labels, NULL_LABEL))
        shown = torch.empty_like(x)
        guided = {"out_uncond": uncond, "guidance": torch.full((len(lanes),), guidance)}
        given = (x, out, torch.full_like(lanes, row), on.coefficients, on.timesteps)
        x = reference.diffusion_step(*given, **keys, **guided, history=history, x_net=shown)
    return x


@pytest.mark.parametrize(
    ("backend", "entries"),
    [
        *((backend, entries) for backend in ("reference", "cpu") for entries in (1, 2, 3)),
        *(
            pytest.param("triton", entries, marks=[pytest.mark.interpreter, *([pytest.mark.soak] * (entries < 3))])
            for entries in (1, 2, 3)
        ),
    ],
)
def test_an_engine_walks_the_table(backend: str, entries: int) -> None:
    engine = small_engine(labelled, backend=backend)
    table = long_memory(entries)
    images = engine.sample(3, table, labels=0, guidance=2.5, seed=9)
    assert torch.equal(images, by_hand(table, 9, [0, 1, 2], 2.5))
    assert not torch.equal(images, engine.sample(3, table, labels=0, guidance=4.0, seed=9))


def test_rows_that_are_not_guided_leave_guidance_out() -> None:
    engine, table = small_engine(labelled, backend="reference"), long_memory(guided=False)
    plain = engine.sample(2, table, labels=0)
    assert torch.equal(engine.sample(2, table, labels=0, guidance=7.5), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_is_the_same_beside_others(backend: str) -> None:
    """In one batch: three histories of other lengths, and none."""
    engine = small_engine(labelled, backend=backend)
    tables = [long_memory(3), engine.table(steps=4), long_memory(1), engine.table("dpmpp_2m", 5), long_memory(2)]
    mixed = engine.sample(5, tables, labels=0, guidance=2.0, seed=3)
    for i, table in enumerate(tables):
        alone = engine.sample(table=table, indices=[i], labels=0, guidance=2.0, seed=3)
        assert torch.equal(mixed[i], alone[0]), table


def serve(backend: str) -> None:
    """Images of several lengths and tables, moved between runners of several widths, against offline ones."""
    engine = small_engine(labelled, invariant=False, backend=backend)
    desk = Desk(engine, widths=(1, 2, 8))
    requests: list[dict[str, Any]] = [
        {"n": n, "table": long_memory(3), "seed": seed, "labels": seed % 3, "guidance": 2.0}
        for seed, n in enumerate((1, 4, 2))
    ]
    futures = []
    for request in requests:
        futures.append(desk.ask(**request))
        desk.round(2)
    desk.finish()
    for request, future in zip(requests, futures, strict=True):
        assert torch.equal(future.result().images, offline(engine, request)), request


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_history_moves_with_its_image(backend: str) -> None:
    serve(backend)


def test_a_move_that_forgets_the_history_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    buffers = Runner._lane_buffers

    def forgetful(self: Runner) -> list[torch.Tensor]:
        assert self._history is not None
        return [b for b in buffers(self) if b.data_ptr() != self._history.data_ptr()]

    monkeypatch.setattr(Runner, "_lane_buffers", forgetful)
    with pytest.raises(AssertionError):
        serve("reference")


@pytest.mark.parametrize("entries", [0, 1, 2, 3])
def test_a_runner_has_the_history_that_its_tables_need(entries: int) -> None:
    engine = small_engine(labelled, backend="reference")
    table = long_memory(entries)
    request = engine.request(2, table, labels=0)
    key = engine.runners.key(request, 4)
    assert key.history == entries == table.history
    runner = engine.runners.make(key)
    assert [list(b.shape) for b in runner._lane_buffers()].count([entries, 4, *SHAPE]) >= (entries > 0)
    pointers = {b.data_ptr() for b in runner.buffers}
    assert runner._history is None or runner._history.data_ptr() in pointers


def test_rescaled_guidance_runs_where_it_can() -> None:
    """By the reference in an engine that chose the kernels itself, and not at all in one that was told to."""
    coefficients = sf.ddim(SCHEDULE, 4).coefficients.copy()
    coefficients[:, sf.kernels.COLUMNS.index("rescale")] = 0.7
    plain = sf.ddim(SCHEDULE, 4)
    table = sf.StepTable("rescaled", "epsilon", SCHEDULE, coefficients, plain.timesteps, plain.next_row)
    options: dict[str, Any] = {"labels": 0, "guidance": 3.0}
    want = small_engine(labelled, backend="reference").sample(3, table, **options)
    assert want.isfinite().all()
    assert not torch.equal(want, small_engine(labelled, backend="reference").sample(3, plain, **options))
    told = small_engine(labelled, backend="triton")
    with pytest.raises(sf.BackendError, match=r"^backend='triton' cannot run rescaled guidance: it needs"):
        told.sample(3, table, **options)
    assert "rescale        refused       it needs the standard deviation" in told.explain()
    chose = small_engine(labelled)
    assert torch.equal(chose.sample(3, table, **options), want)
