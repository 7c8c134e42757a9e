"""An engine on paths that are no discrete schedule: EDM's and rectified flow's, beside closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stepfusion as sf
from stepfusion_testing.twins import assert_same_bits

MEAN, STD = 0.3, 0.4  # of the data, a normal distribution
SIGMA = sf.SigmaPath()
FLOW = sf.FlowPath()


def denoised(x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """E[x0 | x] of data N(MEAN, STD^2) at a level."""
    gain = signal * STD**2 / (signal**2 * STD**2 + noise**2)
    return MEAN + gain * (x - signal * MEAN)


class EDMNetwork(nn.Module):
    """The raw output of a preconditioned network, exact for the data; labels shift the mean."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.num_classes = num_classes
        self.told: list[Tensor] = []

    def forward(self, shown: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        self.told.append(c_noise)
        sigma = (4 * c_noise).exp().view(-1, *[1] * (shown.ndim - 1)).to(shown.dtype)
        c_in = 1 / (sigma**2 + SIGMA.sigma_data**2).sqrt()
        skip = SIGMA.sigma_data**2 * c_in**2
        out = sigma * SIGMA.sigma_data * c_in
        x = shown / c_in
        start = denoised(x, torch.ones_like(sigma), sigma)
        if labels is not None:
            start = start + 0.1 * labels.view(-1, *[1] * (shown.ndim - 1))
        result: Tensor = self.scale * self.dropout((start - skip * x) / out)
        return result


class FlowNetwork(nn.Module):
    """The velocity eps - x0, exact for the data."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        start = denoised(x, 1 - t, t)
        result: Tensor = self.scale * (x - start) / t
        return result


def edm_engine(shape: tuple[int, ...] = (2, 5, 3), num_classes: int | None = None, **given: object) -> sf.Engine:
    given = {"device": "cpu", "dtype": "float32", "batch": 4, **given}
    null = {} if num_classes is None else {"null_label": num_classes - 1}
    return sf.Engine(EDMNetwork(num_classes), SIGMA, shape=shape, **null, **given)  # type: ignore[arg-type]


def flow_engine(shape: tuple[int, ...] = (2, 5, 3)) -> sf.Engine:
    return sf.Engine(FlowNetwork(), FLOW, shape=shape, device="cpu", dtype="float32", batch=4)


def edm_solution(x: Tensor) -> Tensor:
    """Where the probability flow takes a state at sigma_max."""
    return MEAN + (x - MEAN) * STD / math.sqrt(STD**2 + SIGMA.sigma_max**2)


def errors(engine: sf.Engine, x: Tensor, want: Tensor) -> list[float]:
    """The largest errors of Heun's method with 40 and 80 steps."""
    return [float((engine.sample(start=x, sampler="heun", steps=n) - want).abs().max()) for n in (40, 80)]


@pytest.mark.parametrize("shape", [(2, 5, 3), (7, 11), (3, 8, 8)], ids=str)
def test_heun_goes_to_the_solution_of_edms_path_with_second_order(shape: tuple[int, ...]) -> None:
    x = 80 * torch.randn((3, *shape), generator=torch.Generator().manual_seed(0))
    coarse, fine = errors(edm_engine(shape), x, edm_solution(x))
    assert fine < 6e-3
    assert 3.5 < coarse / fine < 5


def test_heun_goes_to_the_solution_of_flows_path_with_second_order() -> None:
    x = torch.randn((3, 2, 5, 3), generator=torch.Generator().manual_seed(0))
    coarse, fine = errors(flow_engine(), x, MEAN + x * STD)
    assert fine < 1e-3
    assert 3.5 < coarse / fine < 5


@pytest.mark.parametrize("make", [edm_engine, flow_engine])
def test_inversion_climbs_to_the_noise_that_leads_back(make: Callable[[], sf.Engine]) -> None:
    """To the closed form with first order, and round with the same (Song et al. 2021, section 4.3)."""
    engine = make()
    images = MEAN + STD * torch.randn((3, 2, 5, 3), generator=torch.Generator().manual_seed(0))
    top = SIGMA.sigma_max if engine.schedule == SIGMA else 1.0
    signal = 1.0 if engine.schedule == SIGMA else 0.0
    noise = signal * MEAN + (images - MEAN) / STD * math.hypot(signal * STD, top)
    off, back = [], []
    for steps in (40, 80):
        off.append(float((engine.encode(images, steps=steps) - noise).abs().max()))
        back.append(float((engine.reconstruct(images, steps=steps) - images).abs().max()))
    for coarse, fine in (off, back):
        assert 1.6 < coarse / fine < 2.6
    assert off[1] < 0.15 * top
    assert back[1] < 0.1


def test_an_inversion_that_the_network_cannot_be_told() -> None:
    for options in ({"steps": 1}, {"steps": 4, "evaluate_at": "target"}):
        with pytest.raises(
            ValueError, match="cannot tell the network the level 1, where the signal is zero: take two"
        ):
            sf.ddim_inversion(FLOW, **options)  # type: ignore[arg-type]
    one = sf.ddim_inversion(SIGMA, 4, evaluate_at="target")
    assert one.told.tolist() == sorted(one.told.tolist())
    assert len(sf.ddim_inversion(SIGMA, levels=[80.0, 3.0, 0.5], final_level=0.002)) == 3


def test_the_defaults_are_edms() -> None:
    engine = edm_engine()
    assert engine.prediction == "edm"
    assert len(engine.table()) == 35  # 18 steps, two evaluations each but for the last
    assert flow_engine().prediction == "flow"


def test_a_first_state_has_the_noise_of_sigma_max() -> None:
    engine = edm_engine((3, 16, 16))
    first = next(iter(engine.stream(4, steps=2, seed=3)))
    one = sf.Engine(lambda x, t: x, sf.NoiseSchedule.linear(), shape=(3, 16, 16), device="cpu", dtype="float32")
    noise = next(iter(one.stream(4, engine_table_of_nothing(one), seed=3))).x
    table = engine.table(steps=2)
    row = dict(zip(sf.kernels.COLUMNS, table.coefficients[0], strict=True))
    start = 80.0 * noise
    out = (first.x0 - row["x0_x"] * start) / row["x0_out"]
    assert torch.isfinite(out).all()
    torch.testing.assert_close(first.x, row["next_x0"] * first.x0 + row["next_x"] * start, rtol=1e-5, atol=1e-4)


def engine_table_of_nothing(engine: sf.Engine) -> sf.StepTable:
    """One row that leaves x as it is."""
    import numpy as np

    columns = {"next_x": np.ones(1), "clip": np.full(1, np.inf), "x0_x": np.ones(1)}
    timesteps = np.array([5], dtype=np.int64)
    return sf.StepTable.from_columns("nothing", "epsilon", engine.schedule, timesteps, columns)


def test_an_image_is_itself_whatever_its_batch() -> None:
    engine = edm_engine(num_classes=3, invariant=True)
    tables = [
        engine.table("heun", 4),
        engine.table("euler", 3),
        engine.table("heun", 5, s_churn=10.0),
        engine.table("dpmpp_2m", 6),
    ]
    options = {"labels": [0, 1, 2, 1], "guidance": [1.0, 2.0, 0.5, 3.0], "seed": [5, 6, 7, 8]}
    together = engine.sample(4, tables, indices=[0, 9, 3, 2], **options)  # type: ignore[arg-type]
    for image, table in enumerate(tables):
        alone = {name: values[image] for name, values in options.items()}
        index = [0, 9, 3, 2][image]
        assert_same_bits(table.name, engine.sample(1, table, indices=[index], **alone)[0], together[image])  # type: ignore[arg-type]


def test_events_say_what_the_network_was_told() -> None:
    engine = edm_engine()
    table = engine.table("euler", 3)
    told = [event.timestep for event in engine.stream(1, table)]
    assert told == pytest.approx([0.25 * math.log(level) for level in table.levels.noise])  # type: ignore[union-attr]


def test_editing_keeps_what_the_mask_keeps() -> None:
    engine = edm_engine()
    image = torch.rand(2, 2, 5, 3) * 2 - 1
    mask = (torch.rand(1, 1, 5, 3) > 0.5).float()
    for sampler in ("euler", "heun"):
        edited = engine.sample(image=image, mask=mask, strength=0.7, sampler=sampler, steps=8, seed=2)
        kept = (mask == 0).expand_as(image)
        assert_same_bits(sampler, edited[kept], image[kept])
        assert (edited != image)[:, :, mask[0, 0] == 1].all()


def test_an_engine_refuses_what_does_not_fit_its_path() -> None:
    engine = edm_engine()
    with pytest.raises(ValueError, match="prediction"):
        sf.Engine(EDMNetwork(), SIGMA, prediction="flow", shape=(1, 2, 2))
    with pytest.raises(ValueError, match="table is for"):
        engine.sample(1, sf.euler(sf.SigmaPath(sigma_max=70.0), 3, prediction="edm"))
    with pytest.raises(ValueError, match="ddpm"):
        engine.table("ddpm")


def test_an_export_remembers_the_path(tmp_path: Path) -> None:
    from stepfusion.export.spec_json import spec_from_json, spec_to_json

    for engine in (edm_engine(), flow_engine()):
        spec = spec_from_json(spec_to_json(engine.spec))
        assert (spec.schedule, spec.prediction) == (engine.schedule, engine.prediction)
