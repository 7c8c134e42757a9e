"""What an engine does beside sampling, on EDM's path and on the straight one."""

from __future__ import annotations

import math

import pytest
import torch

import stepfusion as sf
from stepfusion.kernels import STREAM_INITIAL, reference
from stepfusion.lanes.editing import make_edit
from stepfusion_testing.path_networks import FLOW, SHAPE, SIGMA, path_engine
from stepfusion_testing.twins import assert_same_bits

PATHS = [SIGMA, FLOW]
NAMES = ["sigma", "flow"]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
@pytest.mark.parametrize("sampler", ["heun", "euler", "dpmpp_3m"])
def test_an_edit_may_start_at_any_row(path: sf.Path, sampler: str) -> None:
    """Between a predictor and its corrector, too: the corrector would change nothing, and is left out."""
    engine = path_engine(path)
    image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(4)) * 2 - 1
    table = engine.table(sampler, 5)
    signal, noise = table.pairs()
    rows = len(table)
    between = [k for k in range(2, rows) if noise[rows - k] == noise[rows - k + 1]]
    assert len(between) == (4 if sampler == "heun" else 0)
    edited = {}
    for kept in range(1, rows):
        # a little less than so many rows: strength takes the next whole number of them
        edited[kept] = engine.sample(2, table, image=image, strength=(kept - 0.5) / rows, seed=6)
        short = table.last(kept)
        assert len(make_edit(image, (kept - 0.5) / rows, None, None).shorten(table)) == kept - (kept in between)  # type: ignore[union-attr]
        zeros = torch.zeros(2, dtype=torch.int64)
        keys = torch.full_like(zeros, int(table.timesteps[rows - kept]))
        z = reference.normal(zeros + 6, torch.arange(2), keys, SHAPE, sf.kernels.STREAM_FORWARD)
        start = signal[rows - kept] * image + noise[rows - kept] * z
        expected = engine.sample(2, short, start=start.float(), seed=6)
        torch.testing.assert_close(edited[kept], expected, rtol=0, atol=1e-5)
    for kept in between:
        assert_same_bits(f"{kept} rows", edited[kept], edited[kept - 1])


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_interpolation_of_seeds_starts_where_images_start(path: sf.Path) -> None:
    engine = path_engine(path)
    table = engine.table("ddim", 6, eta=0.0)
    ends = engine.interpolate(3, 4, 3, steps=6)
    for seed, image in ((3, ends[0]), (4, ends[2])):
        torch.testing.assert_close(image, engine.sample(1, table, seed=seed)[0], rtol=0, atol=1e-5)
    keys = torch.zeros(1, dtype=torch.int64)
    given = table.start_scales[0] * reference.normal(keys + 3, keys, keys, SHAPE, STREAM_INITIAL)[0]
    torch.testing.assert_close(engine.interpolate(given, 4, 3, steps=6), ends, rtol=0, atol=1e-5)


def test_explain_says_what_the_network_is_told() -> None:
    for path, prediction, wanted in (
        (SIGMA, "edm", "sigma         the network is told 0.25 * log(sigma), a float32, shown x / sqrt(sigma^2 +"),
        (SIGMA, "sample", "told 0.25 * log(sigma), a float32, shown x as it is, and returns sample"),
        (FLOW, "flow", "flow          the network is told t, a float32, shown x as it is, and returns flow"),
        (sf.FlowPath(told_scale=1000.0), "flow", "told 1000 * t, a float32"),
        (sf.NoiseSchedule.cosine(100), "epsilon", "told the timestep, an integer, shown x as it is, and returns eps"),
    ):
        lines = path_engine(path, prediction=prediction).explain().splitlines()
        assert wanted in next(line for line in lines if line.startswith("path "))


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_streams_callbacks_given_noise_and_indices(path: sf.Path) -> None:
    engine = path_engine(path)
    table = engine.table("heun", 4)
    events = list(engine.stream(3, table, seed=5, indices=[4, 0, 9]))
    assert [event.step for event in events] == list(range(7))
    assert [event.timestep for event in events] == pytest.approx(table.told.tolist())
    assert all(type(event.timestep) is float and math.isfinite(event.timestep) for event in events)
    images = engine.sample(3, table, seed=5, indices=[4, 0, 9])
    assert_same_bits("stream", events[-1].x, images)
    seen: list[int] = []
    again = engine.sample(3, table, seed=5, indices=[4, 0, 9], callback=lambda event: seen.append(event.step))
    assert_same_bits("callback", again, images)
    assert seen == list(range(7))
    stochastic = engine.table("euler_ancestral", 4)
    keys = torch.from_numpy(stochastic.timesteps.copy())
    index = torch.arange(2)
    z = [reference.normal(torch.full_like(index, 7), index, key.expand(2), SHAPE) for key in keys]
    given = engine.sample(2, stochastic, seed=7, noise=torch.stack(z))
    torch.testing.assert_close(given, engine.sample(2, stochastic, seed=7), rtol=0, atol=1e-5)
