"""A tick is the engine's: its noise bit for bit, its step, its network, and so its images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import stepfusion as sf
from stepfusion.export.batch import Batch
from stepfusion.export.tick import InitialNoise, normal, step
from stepfusion.export.tick import _box_muller as box_muller
from stepfusion.export.tick_program import (
    check_tick,
    initial_noise_program,
    tick_example,
    tick_module,
    tick_program,
    tick_specs,
)
from stepfusion.kernels import COLUMNS, philox, reference
from stepfusion_testing.aoti_bundle import consume
from stepfusion_testing.networks import labelled, tiny_unet
from stepfusion_testing.tiny_model import tiny_network

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SHAPE = (3, 4, 5)


class Labelled(nn.Module):
    """:func:`networks.labelled` as a module; with ``learned``, a variance as well."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        out = labelled(x, timesteps, labels)
        return torch.cat((out, torch.sin(3 * x)), dim=1) if self.learned else out


def make(network: nn.Module, prediction: str = "v_prediction", **arguments: object) -> sf.Engine:
    settings = {"shape": SHAPE, "num_classes": 4, "null_label": 3, "device": "cpu", **arguments}
    return sf.Engine(network, sf.NoiseSchedule.cosine(100), prediction=prediction, **settings)  # type: ignore[arg-type]


# The noise


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("stream", [philox.STREAM_STEP, philox.STREAM_INITIAL])
def test_the_noise_is_the_kernels_bit_for_bit(shape: tuple[int, ...], stream: int) -> None:
    seeds = torch.cat((torch.randint(-(2**63), 2**63 - 1, (60,)), torch.tensor([0, -1, 2**32, -(2**63), 2**63 - 1])))
    indices = torch.cat((torch.randint(0, 2**32, (62,)), torch.tensor([0, 1, 2**32 - 1])))
    timesteps = torch.randint(0, 1000, (65,))
    expected = reference.normal(seeds, indices, timesteps, shape, stream)
    assert torch.equal(normal(seeds, indices, timesteps, shape, stream), expected)


def test_every_size_of_word_gives_the_kernels_normals() -> None:
    powers = 2.0 ** torch.arange(33, dtype=torch.float64)
    corners = torch.cat((powers, powers * 4 / 3, powers * 2 / 3)).round().long()
    words = (corners[:, None] + torch.arange(-300, 300)).flatten().clamp(0, 2**32 - 1)
    for actual, expected in zip(
        box_muller(words, words.flip(0)), philox._box_muller_reference(words, words.flip(0)), strict=True
    ):
        assert torch.equal(actual, expected)


# The step


@pytest.mark.parametrize("learned", [False, True])
def test_the_step_is_the_references(learned: bool) -> None:
    variance = "learned_range" if learned else "fixed_small"
    table = make(Labelled(learned)).table("ddpm", 10, variance=variance).on(torch.device("cpu"))
    rows = torch.arange(10)
    x, z = torch.randn(10, *SHAPE), torch.randn(10, *SHAPE)
    out = torch.randn(10, 6 if learned else 3, 4, 5)
    expected = reference.diffusion_step(x, out, rows, table.coefficients, table.timesteps, noise=z)
    assert torch.equal(step(x, out, table.coefficients, z), expected)


def test_a_row_without_noise_adds_nothing_even_where_the_variance_overflows() -> None:
    columns = torch.zeros(2, len(COLUMNS))
    columns[:, [COLUMNS.index(name) for name in ("next_x", "net_scale")]] = 1.0
    columns[:, COLUMNS.index("half_log_min")] = 100.0
    columns[1, COLUMNS.index("sigma")] = 1.0
    x, z = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    moved = step(x, torch.zeros(2, 6, 4, 5), columns, z)
    assert torch.equal(moved[0], x[0])
    assert moved[1].isinf().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, 0.5) for n in ("next_prev", "next_prev2", "next_prev3", "threshold", "rescale", "net_scale")],
)
def test_a_row_that_a_tick_cannot_run_gives_nan(name: str, value: float) -> None:
    table = make(Labelled()).table("ddpm", 3).on(torch.device("cpu"))
    x = torch.randn(3, *SHAPE)
    plain = step(x, x, table.coefficients, x)
    table.coefficients[1, COLUMNS.index(name)] = value
    moved = step(x, x, table.coefficients, x)
    assert moved[1].isnan().all()
    assert torch.equal(moved[[0, 2]], plain[[0, 2]])


def test_an_unguided_row_takes_the_conditional_output() -> None:
    engine = make(Labelled())
    x, row, coefficients, timesteps, seed, index, labels, scale = tick_example(engine, 3, guided=True)
    tick, given = tick_module(engine, guided=True), (x, row, coefficients, timesteps, seed, index, labels)
    guided, alone = tick(*given, scale), tick(*given, torch.ones_like(scale))
    assert not torch.equal(guided[2], alone[2])
    coefficients[2, COLUMNS.index("unguided")] = 1.0
    moved = tick(*given, scale)
    assert torch.equal(moved[2], alone[2])
    assert torch.equal(moved[:2], guided[:2])


def test_parked_lanes_stay_and_rows_beyond_the_table_are_nan() -> None:
    engine = make(Labelled())
    x, _, coefficients, timesteps, seed, index, labels = tick_example(engine, 3)
    row = torch.tensor([-1, 0, len(timesteps)])
    moved = tick_module(engine)(x, row, coefficients, timesteps, seed, index, labels)
    assert torch.equal(moved[0], x[0])
    assert moved[1].isfinite().all()
    assert not torch.equal(moved[1], x[1])
    assert moved[2].isnan().all()


# Whole loops


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}])
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_a_consumer_gets_the_engines_images(
    prediction: str, sampler: dict[str, object], guidance: float | None
) -> None:
    engine = make(Labelled(), prediction)
    table = engine.table(steps=6, **sampler)  # type: ignore[arg-type]
    labels = torch.tensor([0, 1, 2, 0])
    tick = tick_module(engine, guided=guidance is not None)
    condition = (labels,) if guidance is None else (labels, torch.full((4,), guidance))
    images = consume(tick, InitialNoise(SHAPE), table, 5, [0, 1, 7, 4096], *condition)
    expected = engine.sample(table=table, seed=5, indices=[0, 1, 7, 4096], labels=labels, guidance=guidance)
    assert torch.equal(images, expected)


def test_a_guidance_of_one_is_the_conditional_output_exactly() -> None:
    engine = make(Labelled())
    *example, labels = tick_example(engine, 4)
    guided = tick_module(engine, guided=True)(*example, labels, torch.ones(4))
    assert torch.equal(guided, tick_module(engine)(*example, labels))


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_learned_variance(guidance: float | None) -> None:
    """Beside the reference, whose exponential the program has; that of the C++ step may differ in its last bit."""
    engine = make(Labelled(learned=True), "epsilon", backend="reference")
    table = engine.table("ddpm", 6, variance="learned_range")
    labels = torch.tensor([0, 2])
    condition = (labels,) if guidance is None else (labels, torch.full((2,), guidance))
    tick = tick_module(engine, guided=guidance is not None)
    images = consume(tick, InitialNoise(SHAPE), table, 5, [0, 1], *condition)
    assert torch.equal(images, engine.sample(2, table, seed=5, labels=labels, guidance=guidance))


def test_a_unet_in_a_program_of_any_batch_and_any_table() -> None:
    """The engine hoists the time path and the program does not: images agree to rounding."""
    engine = make(tiny_network(), shape=(1, 8, 8))
    tick = tick_program(engine, Batch(1, 2, 8), guided=True).module()
    noise = initial_noise_program(engine, Batch(1, 2, 8)).module()
    for n, steps in ((1, 3), (5, 12)):
        table = engine.table("ddim", steps, eta=1.0)
        labels, scale = torch.arange(n) % 3, torch.full((n,), 1.5)
        with torch.no_grad():
            images = consume(tick, noise, table, 2, range(n), labels, scale)
        expected = engine.sample(n, table, seed=2, labels=labels, guidance=1.5)
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


def test_the_state_stays_float32_around_a_half_network() -> None:
    engine = make(tiny_unet(classes=None), shape=(1, 8, 8), num_classes=None, null_label=None, dtype="bfloat16")
    table = engine.table("ddim", 3)
    images = consume(tick_module(engine), InitialNoise((1, 8, 8)), table, 0, [0, 1])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, engine.sample(2, table), rtol=0, atol=0.05)


# What is refused, and what is written down


def test_the_specs_name_what_the_tick_takes() -> None:
    engine = make(Labelled())
    inputs, outputs = tick_specs(engine, Batch(1, 2, 8), guided=True)
    example = tick_example(engine, 2, guided=True)
    for spec, value in zip(inputs, example, strict=True):
        assert spec.dtype == str(value.dtype).removeprefix("torch.")
        assert len(spec.shape) == value.ndim
    assert [spec.name for spec in inputs][-2:] == ["labels", "guidance"]
    assert outputs[0].shape == ("batch", *SHAPE)


def test_a_tick_needs_a_fitting_table_and_a_null_label_for_guidance() -> None:
    engine = make(Labelled())
    with pytest.raises(sf.ExportError, match=r"^a tick needs a table"):
        check_tick(engine, None, False)
    with pytest.raises(sf.ExportError, match=r"^the table is for epsilon and .* the engine for v_prediction"):
        check_tick(engine, make(Labelled(), "epsilon").table("ddim", 3), False)
    with pytest.raises(
        sf.ExportError, match=r"^a tick has no dynamic thresholding and no rescaled .*, and StepTable"
    ):
        check_tick(engine, engine.table("ddim", 5, threshold=0.9), False)
    for name, message in (
        ("rescale", "a tick has no dynamic thresholding and no rescaled guidance, and StepTable"),
        ("net_scale", "a tick shows the network x as it is, and StepTable"),
    ):
        columns = engine.table("ddim", 5).coefficients.copy()
        columns[2, COLUMNS.index(name)] = 0.5
        with pytest.raises(sf.ExportError, match=f"^{message}"):
            check_tick(engine, replace(engine.table("ddim", 5), coefficients=columns), False)
    with pytest.raises(
        sf.ExportError, match=r"^a guided tick needs a null label or conditions, and the model has none$"
    ):
        check_tick(make(Labelled(), null_label=None), engine.table("ddim", 3), True)


def test_what_cannot_be_traced_is_said_in_a_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            return x if bool((x > 0).all()) else -x

    with pytest.raises(sf.ExportError, match=r"^torch.export cannot trace the tick: .+$"):
        tick_program(make(Branching()), Batch.fixed(2))
