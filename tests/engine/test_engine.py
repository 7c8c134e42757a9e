"""The engine: lanes, identity of images, given states and noise, guidance, events, failures."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.kernels import reference
from stepfusion.model_spec import ModelSpec
from stepfusion_testing.networks import labelled, smooth, tiny_unet

SHAPE = (2, 6, 5)


@pytest.fixture
def schedule() -> sf.NoiseSchedule:
    return sf.NoiseSchedule.linear()


@pytest.fixture
def engine(schedule: sf.NoiseSchedule) -> sf.Engine:
    return sf.Engine(smooth, schedule, shape=SHAPE, device="cpu", backend="reference")


def by_hand(table: sf.StepTable, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The loop that an engine must be equal to: float64, one formula a line, no table walker."""
    x = x.double()
    for i, t in enumerate(table.timesteps):
        row = dict(zip(sf.kernels.COLUMNS, table.coefficients[i], strict=True))
        out = smooth(x, torch.full((len(x),), int(t)))
        x0 = (row["x0_x"] * x + row["x0_out"] * out).clamp(-row["clip"], row["clip"])
        x = row["next_x0"] * x0 + row["next_x"] * x + row["next_out"] * out + row["sigma"] * noise[i]
    return x


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", None)])
def test_sample_is_the_loop_of_the_table(engine: sf.Engine, sampler: str, eta: float | None) -> None:
    table = engine.table(sampler, 12, **({} if eta is None else {"eta": eta}))
    start, noise = torch.randn(3, *SHAPE), torch.randn(12, 3, *SHAPE)
    images = engine.sample(table=table, start=start, noise=noise)
    torch.testing.assert_close(images.double(), by_hand(table, start, noise.double()), rtol=0, atol=2e-5)


def test_noise_and_start_come_from_seed_index_and_training_timestep(engine: sf.Engine) -> None:
    table = engine.table("ddpm", 5)
    seeds, indices = torch.tensor([9, 9, 4]), torch.tensor([0, 7, 2])
    zero = torch.zeros(3, dtype=torch.int64)
    start = reference.normal(seeds, indices, zero, SHAPE, sf.kernels.STREAM_INITIAL)
    noise = torch.stack([reference.normal(seeds, indices, zero + int(t), SHAPE) for t in table.timesteps])
    drawn = engine.sample(table=table, seed=seeds.tolist(), indices=indices.tolist())
    assert torch.equal(drawn, engine.sample(table=table, start=start, noise=noise))


def test_seeds_of_64_bits_differ(engine: sf.Engine) -> None:
    images = engine.sample(seed=[0, 1 << 32, 1 << 63, (1 << 64) - 1], indices=[0] * 4, steps=3)
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_images_do_not_depend_on_the_company(engine: sf.Engine, schedule: sf.NoiseSchedule) -> None:
    whole = engine.sample(9, steps=7, eta=1.0, seed=3)
    assert torch.equal(engine.sample(indices=[8, 2], steps=7, eta=1.0, seed=3), whole[[8, 2]])
    narrow = sf.Engine(smooth, schedule, shape=SHAPE, device="cpu", batch=2)
    assert torch.equal(narrow.sample(9, steps=7, eta=1.0, seed=3), whole)


def test_lanes_of_one_batch_walk_different_samplers(engine: sf.Engine, schedule: sf.NoiseSchedule) -> None:
    tables = [engine.table(steps=4), engine.table("ddpm", 9), engine.table(steps=6, eta=0.5)]
    chosen = [tables[i] for i in (0, 1, 2, 1, 0, 2, 2)]
    for batch in (3, 64):  # three lanes: images enter as others leave
        mixed = sf.Engine(smooth, schedule, shape=SHAPE, device="cpu", batch=batch).sample(7, chosen, seed=5)
        for i, table in enumerate(chosen):
            assert torch.equal(mixed[i], engine.sample(indices=[i], table=table, seed=5)[0]), (batch, i)


def test_eta_1_is_ddpm_when_nothing_is_clipped(schedule: sf.NoiseSchedule) -> None:
    engine = sf.Engine(smooth, schedule, shape=SHAPE, device="cpu", prediction="v_prediction")
    tables = [engine.table("ddpm", 25, clip=None), engine.table("ddim", 25, eta=1.0, clip=None)]
    ddpm, ddim = engine.sample(2, tables, indices=[0, 0], seed=1)
    assert float((ddpm - ddim).abs().max()) < 1e-5
    different = engine.sample(1, engine.table("ddim", 25, eta=0.9, clip=None), seed=1)[0]
    assert float((ddpm - different).abs().max()) > 1e-2  # the control: another eta is another image


class TestInvariance:
    """With ``invariant=True`` an image's bits depend on nothing but its identity, on a real network too."""

    @pytest.fixture
    def unet(self) -> sf.networks.UNet2D:
        return tiny_unet(classes=5)

    @staticmethod
    def make(unet: sf.networks.UNet2D, **arguments: Any) -> sf.Engine:
        schedule = sf.NoiseSchedule.cosine()
        options: dict[str, Any] = {"prediction": "v_prediction", "null_label": 4, "device": "cpu", **arguments}
        return sf.Engine(unet, schedule, **options)

    @staticmethod
    def variants(engine: sf.Engine) -> list[torch.Tensor]:
        """Image (11, 6, label 2): alone, at either end of batches, beside other samplers, beside guided lanes."""
        table = engine.table(steps=6, eta=1.0)
        others = [engine.table("ddpm", 9), engine.table(steps=3)]
        alone = engine.sample(1, table, seed=11, indices=[6], labels=2)
        many = engine.sample(13, table, seed=11, labels=[i % 4 for i in range(13)])
        last = engine.sample(3, table, seed=[1, 2, 11], indices=[5, 5, 6], labels=[0, 4, 2])
        mixed = engine.sample(
            4,
            [others[0], table, others[1], others[1]],
            seed=[7, 11, 11, 0],
            indices=[0, 6, 6, 1],
            labels=[1, 2, 2, 3],
        )
        guided = engine.sample(
            3, [others[1], others[0], table], seed=11, indices=[1, 2, 6], labels=[0, 1, 2], guidance=[3.0, 1.5, 1.0]
        )
        return [alone[0], many[6], last[2], mixed[1], guided[2]]

    def test_bits_are_the_same_in_any_company(self, unet: sf.networks.UNet2D) -> None:
        first, *rest = self.variants(self.make(unet, invariant=True, batch=8))
        assert all(torch.equal(first, other) for other in rest)
        assert float(first.std()) > 0.05

    def test_without_it_only_rounding_differs(self, unet: sf.networks.UNet2D) -> None:
        first, *rest = self.variants(self.make(unet, batch=8))
        assert all(float((first - other).abs().max()) < 1e-4 for other in rest)

    def test_control_a_network_that_sees_its_neighbours_is_caught(self) -> None:
        def nosy(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return labelled(x, timesteps, labels) + 1e-6 * x.mean()

        engine = sf.Engine(
            nosy,
            sf.NoiseSchedule.cosine(),
            prediction="v_prediction",
            shape=(1, 8, 8),
            num_classes=5,
            null_label=4,
            device="cpu",
            invariant=True,
            batch=8,
        )
        first, *rest = self.variants(engine)
        assert not any(torch.equal(first, other) for other in rest)

    def test_control_a_network_whose_bits_depend_on_the_bucket(self) -> None:
        """What libraries do: another algorithm for another batch size. Invariant engines never show it two sizes."""

        def by_size(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return labelled(x, timesteps, labels) * (1.0 + 1e-6 * len(x))

        arguments: dict[str, Any] = {"shape": (1, 8, 8), "num_classes": 5}
        first, *rest = self.variants(self.make(by_size, invariant=True, batch=8, **arguments))
        assert all(torch.equal(first, other) for other in rest)
        first, *rest = self.variants(self.make(by_size, batch=8, **arguments))
        assert not all(torch.equal(first, other) for other in rest)

    def test_batches_never_change_size(self) -> None:
        sizes = set()

        def watching(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            sizes.add(len(x))
            return labelled(x, timesteps, labels)

        arguments: dict[str, Any] = {"shape": (1, 8, 8), "num_classes": 5}
        self.variants(self.make(watching, invariant=True, batch=8, **arguments))
        assert sizes == {8}


def test_buckets_are_powers_of_two(schedule: sf.NoiseSchedule) -> None:
    sizes: list[int] = []

    def watching(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return smooth(x, timesteps)

    engine = sf.Engine(watching, schedule, shape=SHAPE, device="cpu", batch=8)
    for n in (1, 3, 5, 8, 11):
        engine.sample(n, steps=1)
    assert sizes == [1, 4, 8, 8, 8, 8]


def test_padded_lanes_are_never_computed_on(schedule: sf.NoiseSchedule) -> None:
    """A parked lane holds zeros, and NaN that its output would be goes nowhere."""

    def poisoned(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        out = smooth(x, timesteps)
        out[3:] = torch.nan
        return out

    images = sf.Engine(poisoned, schedule, shape=SHAPE, device="cpu").sample(3, steps=4)
    assert images.isfinite().all()


class TestGuidance:
    @pytest.fixture
    def engine(self, schedule: sf.NoiseSchedule) -> sf.Engine:
        return sf.Engine(labelled, schedule, shape=SHAPE, num_classes=4, null_label=3, device="cpu")

    def test_scale_per_lane_is_the_formula(self, schedule: sf.NoiseSchedule, engine: sf.Engine) -> None:
        scales = torch.tensor([1.0, 0.0, 2.5])

        def by_formula(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            labels = torch.tensor([0, 1, 2, 3])[: len(x)]
            conditional = labelled(x, timesteps, labels)
            nothing = labelled(x, timesteps, torch.full_like(labels, 3))
            padded = torch.ones(len(x))
            padded[:3] = scales
            return nothing + padded.view(-1, 1, 1, 1) * (conditional - nothing)

        expected = sf.Engine(by_formula, schedule, shape=SHAPE, device="cpu").sample(3, steps=6, seed=2)
        guided = engine.sample(3, steps=6, seed=2, labels=[0, 1, 2], guidance=scales.tolist())
        torch.testing.assert_close(guided, expected, rtol=0, atol=1e-5)

    def test_scale_1_is_exactly_no_guidance(self, engine: sf.Engine) -> None:
        plain = engine.sample(2, steps=6, labels=[1, 2])
        assert torch.equal(engine.sample(2, steps=6, labels=[1, 2], guidance=1.0), plain)
        assert torch.equal(engine.sample(2, steps=6, labels=[1, 2], guidance=[1.0, 4.0])[0], plain[0])

    def test_no_label_is_the_null_label(self, engine: sf.Engine) -> None:
        assert torch.equal(engine.sample(2, steps=4), engine.sample(2, steps=4, labels=3))


def test_learned_variance_takes_twice_the_channels(schedule: sf.NoiseSchedule) -> None:
    def both(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.cat((smooth(x, timesteps), torch.full_like(x, -1.0)), dim=1)  # v = -1: the smallest variance

    learned = sf.Engine(both, schedule, shape=SHAPE, device="cpu", options={"variance": "learned_range"})
    fixed = sf.Engine(smooth, schedule, shape=SHAPE, device="cpu")
    images = learned.sample(2, sampler="ddpm", steps=9, seed=1)
    torch.testing.assert_close(images, fixed.sample(2, sampler="ddpm", steps=9, seed=1), rtol=0, atol=1e-5)
    split = learned.sample(2, steps=9, seed=1)  # a DDIM row takes the first half and leaves the other
    assert torch.equal(split, fixed.sample(2, steps=9, seed=1))


def test_learned_variance_needs_twice_the_channels(engine: sf.Engine) -> None:
    with pytest.raises(ValueError, match="the network returned"):
        engine.sample(1, engine.table("ddpm", 4, variance="learned_range"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_state_stays_float32_and_timesteps_stay_whole(schedule: sf.NoiseSchedule, dtype: str) -> None:
    seen: list[Any] = []

    def watching(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, timesteps.dtype, int(timesteps[0])))
        return smooth(x.float(), timesteps).to(x.dtype)

    engine = sf.Engine(watching, schedule, shape=SHAPE, device="cpu", dtype=dtype)
    images = engine.sample(1, engine.table(timesteps=[999, 500, 3]))
    assert images.dtype == torch.float32
    assert seen == [(getattr(torch, dtype), torch.int64, t) for t in (999, 500, 3)]


def test_a_diffusers_model_runs_as_it_is(schedule: sf.NoiseSchedule) -> None:
    from diffusers import UNet2DModel

    ours = tiny_unet(classes=None)
    theirs = UNet2DModel(**{k: v for k, v in ours.config.to_dict().items() if not k.startswith("_")})
    theirs.load_state_dict(ours.state_dict())
    engines = [sf.Engine(net, schedule, shape=(1, 8, 8), device="cpu", prediction="sample") for net in (ours, theirs)]
    first, second = (engine.sample(2, steps=3, seed=1) for engine in engines)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_the_model_given_is_not_changed(schedule: sf.NoiseSchedule) -> None:
    unet = tiny_unet().train()
    sf.Engine(unet, schedule, device="cpu", dtype="bfloat16")
    assert unet.training
    assert next(unet.parameters()).dtype == torch.float32


class OneConvolution(torch.nn.Module):
    """Compiles in a few seconds."""

    in_channels, sample_size = 1, 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return smooth(self.conv(x), timesteps)


@pytest.mark.parametrize("network", ["convolution", pytest.param("unet", marks=pytest.mark.soak)])
def test_network_compile_gives_eager_images(network: str, schedule: sf.NoiseSchedule) -> None:
    module = tiny_unet(classes=None) if network == "unet" else OneConvolution().eval()
    eager, compiled = (
        sf.Engine(module, schedule, device="cpu", prediction="sample", network=mode, dtype="float32")
        for mode in ("eager", "compile")
    )
    images = eager.sample(2, steps=3, seed=1)
    torch.testing.assert_close(compiled.sample(2, steps=3, seed=1), images, rtol=0, atol=1e-5)


class TestEvents:
    def test_stream_shows_every_nth_step_and_the_last(self, engine: sf.Engine) -> None:
        table = engine.table(steps=10)
        events = list(engine.stream(3, table, every=4, seed=2))
        assert [event.step for event in events] == [3, 7, 9]
        assert [event.timestep for event in events] == [int(table.timesteps[i]) for i in (3, 7, 9)]
        assert all(event.images == (0, 1, 2) and event.steps == 10 for event in events)
        assert torch.equal(events[-1].x, engine.sample(3, table, seed=2))

    def test_events_carry_the_predicted_x0(self, engine: sf.Engine) -> None:
        *_, last = engine.stream(2, steps=5)
        assert torch.equal(last.x0, last.x)  # the last row of DDIM ends in x0 itself
        assert all(float(event.x0.abs().max()) <= 1.0 for event in engine.stream(2, steps=5))

    def test_an_early_break_stops_the_network(self, schedule: sf.NoiseSchedule) -> None:
        calls = []

        def counting(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return smooth(x, timesteps)

        for event in sf.Engine(counting, schedule, shape=SHAPE, device="cpu").stream(2, steps=50):
            if event.step == 4:
                break
        assert len(calls) == 5

    def test_bad_arguments_are_refused_at_the_call(self, engine: sf.Engine) -> None:
        with pytest.raises(ValueError, match="every must be in"):
            engine.stream(2, every=0)

    def test_callback_sees_all_and_may_cancel(self, engine: sf.Engine) -> None:
        seen: list[int] = []
        engine.sample(2, steps=6, callback=lambda event: seen.append(event.step))
        assert seen == list(range(6))
        with pytest.raises(sf.SamplingCancelled, match="cancelled sampling after 4 of 12 steps"):
            engine.sample(2, steps=6, callback=lambda event: event.step < 1)

    def test_gradients_stay_off_inside_and_on_outside(self, engine: sf.Engine) -> None:
        stream = engine.stream(1, steps=3)
        next(stream)
        assert torch.is_grad_enabled()
        stream.close()

    def test_the_progress_bar_counts_images(self, engine: sf.Engine, capsys: pytest.CaptureFixture[str]) -> None:
        engine.sample(3, steps=5, progress=True)
        assert "3/3 images" in capsys.readouterr().err
        engine.sample(3, steps=5)
        assert capsys.readouterr().err == ""


class TestNonFinite:
    @staticmethod
    def broken(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Breaks the lane at position 1, from timestep 400 on."""
        out = smooth(x, timesteps)
        out[1, 0, 0, 0] = torch.where(timesteps[1] <= 400, torch.inf, out[1, 0, 0, 0])
        return out

    def test_names_the_image_and_the_step(self, schedule: sf.NoiseSchedule) -> None:
        engine = sf.Engine(self.broken, schedule, shape=SHAPE, device="cpu")
        message = r"^image 1 \(seed 8, index 21\) became non-finite at step 6 of 10 \(timestep 400\)$"
        with pytest.raises(sf.NonFiniteError, match=message):
            engine.sample(3, steps=10, seed=8, indices=[20, 21, 22])

    def test_kept_on_request_and_the_others_are_untouched(self, schedule: sf.NoiseSchedule) -> None:
        images = sf.Engine(self.broken, schedule, shape=SHAPE, device="cpu").sample(3, steps=10, nonfinite="keep")
        clean = sf.Engine(smooth, schedule, shape=SHAPE, device="cpu").sample(3, steps=10)
        assert not images[1].isfinite().all()
        assert torch.equal(images[[0, 2]], clean[[0, 2]])


def test_out_of_memory_halves_the_batch_and_goes_on(schedule: sf.NoiseSchedule, engine: sf.Engine) -> None:
    def hungry(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return smooth(x, timesteps)

    small = sf.Engine(hungry, schedule, shape=SHAPE, device="cpu")
    with pytest.warns(RuntimeWarning) as warned:
        images = small.sample(7, steps=4, seed=1)
    assert [str(w.message) for w in warned] == [f"out of memory: going on with {n} lanes at a time" for n in (4, 2)]
    assert torch.equal(images, engine.sample(7, steps=4, seed=1))
    fixed = sf.Engine(hungry, schedule, shape=SHAPE, device="cpu", invariant=True, batch=4)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):  # another bucket would be other bits
        fixed.sample(7, steps=4)


def test_encode_and_sample_are_a_round_trip(schedule: sf.NoiseSchedule) -> None:
    abar = torch.from_numpy(np.array(schedule.alphas_cumprod)).float()

    def ideal(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The ideal eps for pixels from N(0, 1/4)."""
        level = abar[timesteps].view(-1, 1, 1, 1)
        return (1 - level).sqrt() * x / (level / 4 + 1 - level)

    engine = sf.Engine(ideal, schedule, shape=SHAPE, device="cpu", options={"clip": None})
    images = torch.randn(2, *SHAPE) / 2
    errors = []
    for steps in (25, 100, 500):
        noise = engine.encode(images, steps=steps)
        errors.append(float((engine.sample(start=noise, steps=steps) - images).abs().max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.02
    assert 0.7 < float(noise.std()) < 1.3


def test_explain_names_every_part_and_its_reason(engine: sf.Engine) -> None:
    text = engine.explain()
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        "device",
        "network dtype",
        "step",
        "network",
        "path",
        "lanes",
        "guidance",
    ]
    assert "asked for: eager PyTorch" in text


def test_sample_of_nothing_is_empty(engine: sf.Engine) -> None:
    assert engine.sample(0, steps=3).shape == (0, *SHAPE)


def test_to_uint8_rounds_to_nhwc(engine: sf.Engine) -> None:
    pixels = engine.to_uint8(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1))
    assert pixels.tolist() == [[[[0, 128, 255]]]]


def test_the_same_call_gives_the_same_bits(engine: sf.Engine) -> None:
    assert torch.equal(engine.sample(4, steps=9, eta=1.0), engine.sample(4, steps=9, eta=1.0))


@pytest.mark.interpreter
def test_the_fused_path_gives_the_reference_paths_bits(schedule: sf.NoiseSchedule) -> None:
    fused, plain = (
        sf.Engine(labelled, schedule, shape=SHAPE, num_classes=4, null_label=3, device="cpu", backend=backend)
        for backend in ("triton", "reference")
    )
    arguments: dict[str, Any] = {"labels": [0, 1, 2], "guidance": [1.0, 2.0, 0.5], "seed": 5}
    tables = [fused.table("ddpm", 4), fused.table(steps=3, eta=1.0), fused.table(steps=2)]
    assert torch.equal(fused.sample(3, tables, **arguments), plain.sample(3, tables, **arguments))


def test_sample_and_stream_take_the_same_request() -> None:
    """One signature: what names an image is spelled alike everywhere."""

    def names(function: Callable[..., Any]) -> set[str]:
        return set(inspect.signature(function).parameters)

    assert names(sf.Engine.stream) - {"every"} == names(sf.Engine.sample) - {"progress", "callback", "nonfinite"}


def test_table_takes_the_checkpoints_options(schedule: sf.NoiseSchedule) -> None:
    options = {"clip": None, "spacing": "trailing", "variance": "fixed_large"}
    engine = sf.Engine(smooth, schedule, shape=SHAPE, device="cpu", options=options)
    assert engine.table(steps=4).timesteps.tolist() == [999, 749, 499, 249]
    assert np.isposinf(engine.table("ddpm", 4).column("clip")).all()
    expected = sf.ddpm(schedule, 4, spacing="trailing", clip=None, variance="fixed_large")
    assert np.array_equal(engine.table("ddpm", 4).coefficients, expected.coefficients)
    assert engine.table(steps=4, spacing="leading").timesteps.tolist() == [750, 500, 250, 0]


class TestGenerate:
    """Pixels in bulk."""

    def test_gives_the_images_of_sample_in_order(self, schedule: sf.NoiseSchedule) -> None:
        engine = sf.Engine(labelled, schedule, shape=(3, 4, 4), device="cpu", batch=4, num_classes=5, null_label=4)
        request: dict[str, Any] = {"steps": 3, "eta": 0.5, "seed": 2, "labels": list(range(5)) * 2}
        batches = list(engine.generate(10, **request))
        assert [len(pixels) for pixels in batches] == [4, 4, 2]
        assert torch.equal(torch.cat(batches), engine.to_uint8(engine.sample(10, **request)))

    def test_checks_its_request_before_the_first_batch(self, engine: sf.Engine) -> None:
        with pytest.raises(ValueError, match="labels were given"):
            engine.generate(3, labels=1)

    def test_nothing_to_make(self, engine: sf.Engine) -> None:
        assert list(engine.generate(0)) == []

    def test_computes_one_batch_ahead_of_the_reader(self, schedule: sf.NoiseSchedule) -> None:
        calls = []

        def counts(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return smooth(x, timesteps)

        engine = sf.Engine(counts, schedule, shape=(1, 4, 4), device="cpu", batch=2)
        assert [len(calls) for _ in engine.generate(6, steps=2)] == [4, 6, 6]

    def test_names_a_broken_image_by_its_place_in_the_request(self, schedule: sf.NoiseSchedule) -> None:
        def breaks(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return smooth(x, timesteps) / (labels - 2).view(-1, 1, 1, 1)

        engine = sf.Engine(breaks, schedule, shape=(1, 4, 4), device="cpu", batch=2, num_classes=3)
        batches = engine.generate(5, steps=2, labels=[0, 1, 0, 2, 1])
        assert next(batches).shape == (2, 4, 4, 1)
        with pytest.raises(sf.NonFiniteError, match=r"^image 3 \(seed 0, index 3\)"):
            next(batches)


class TestFromExported:
    """What an engine adds to a loaded bundle; the formats have tests of their own."""

    BUNDLE = SimpleNamespace(path="DIR", manifest=SimpleNamespace(format="onnx"))

    @pytest.fixture
    def loaded(self, schedule: sf.NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        """Stands for the loader: a network that :func:`labelled` computes."""

        def load(*arguments: Any) -> Callable[..., torch.Tensor]:
            asked.append(arguments)

            def network(*inputs: torch.Tensor) -> torch.Tensor:
                return labelled(*inputs)

            spec = ModelSpec(schedule, "v_prediction", (1, 4, 4), 3, 2, ("a", "b"), options={"clip": None})
            found = {
                "spec": spec, "device": torch.device("cpu"), "dtype": torch.float32, "bundle": self.BUNDLE,
            }  # fmt: skip
            vars(network).update(found)
            return network

        asked: list[tuple[Any, ...]] = []
        monkeypatch.setattr("stepfusion.export.load.load_network", load)
        return asked

    def test_takes_everything_from_the_bundle(self, loaded: list[Any], schedule: sf.NoiseSchedule) -> None:
        engine = sf.Engine.from_exported("DIR", batch=4)
        same = sf.Engine(
            labelled, schedule, prediction="v_prediction", shape=(1, 4, 4), num_classes=3, null_label=2,
            options={"clip": None}, device="cpu", batch=4,
        )  # fmt: skip
        assert loaded == [("DIR", "auto", "auto")]
        assert engine.class_names == ("a", "b")
        assert torch.equal(engine.sample(3, steps=4, guidance=2.0), same.sample(3, steps=4, guidance=2.0))
        assert "exported       onnx          DIR" in engine.explain()

    def test_device_and_dtype_are_for_the_loader(self, loaded: list[Any]) -> None:
        sf.Engine.from_exported("DIR", device="cpu", dtype="float32")
        assert loaded == [("DIR", "cpu", "float32")]

    def test_what_is_compiled_is_not_compiled_again(self, loaded: list[Any]) -> None:
        with pytest.raises(ValueError, match=r"^network must be 'auto', 'eager' or 'graph' for an exported network"):
            sf.Engine.from_exported("DIR", network="compile")
        assert not loaded


class TestCompiledNetwork:
    """What an engine promises of ``network="compile"``; the compiler's side is in test_compiled.py."""

    def test_other_samplers_steps_etas_and_labels_compile_nothing(
        self, schedule: sf.NoiseSchedule, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One graph for each bucket; Dynamo traces and guards as ever, and what it traced runs as it is."""
        monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph.forward)
        engine = sf.Engine(tiny_unet(), schedule, device="cpu", network="compile", dtype="float32", null_label=3)
        eager = sf.Engine(tiny_unet(), schedule, device="cpu", network="eager", null_label=3)
        for sampler, options in (
            ("ddim", {"eta": 0.0}),
            ("ddim", {"eta": 1.0}),
            ("ddpm", {}),
            ("ddim_inversion", {}),
        ):
            for steps in (2, 4):
                for labels in ([0, 1, 2], [3, 3, 0]):
                    table = engine.table(sampler, steps, **options)
                    images = engine.sample(3, table, labels=labels)
                    torch.testing.assert_close(images, eager.sample(3, table, labels=labels), rtol=0, atol=1e-4)
        assert engine.evaluator.compiled.compilations == 1
        engine.sample(5, steps=2)
        assert engine.evaluator.compiled.compilations == 2, "another bucket"

    def test_a_request_gives_the_same_bits_first_and_later(
        self, schedule: sf.NoiseSchedule, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def off_by_little(graph: torch.fx.GraphModule, inputs: Any, options: Any) -> Callable[..., Any]:
            return lambda *arguments: tuple(1.0001 * out for out in graph.forward(*arguments))

        monkeypatch.setattr(torch._inductor, "compile", off_by_little)
        engine = sf.Engine(tiny_unet(), schedule, device="cpu", network="compile", dtype="float32", null_label=3)
        assert torch.equal(engine.sample(2, steps=3), engine.sample(2, steps=3))


class TestSnapshot:
    """An engine has the weights of the moment at which it was made."""

    @staticmethod
    def network() -> torch.nn.Module:
        class Scaled(torch.nn.Module):
            in_channels, sample_size = 1, 4

            def __init__(self) -> None:
                super().__init__()
                self.scale = torch.nn.Parameter(torch.tensor(0.5))
                self.dropout = torch.nn.Dropout(0.5)

            def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
                return self.dropout(x) * self.scale

        return Scaled()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_later_changes_of_the_module_do_not_show(
        self, schedule: sf.NoiseSchedule, training: bool, dtype: str
    ) -> None:
        network = self.network().train(training)
        engine = sf.Engine(network, schedule, device="cpu", dtype=dtype)
        before = engine.sample(2, steps=3)
        with torch.no_grad():
            network.scale.fill_(-0.5)  # type: ignore[operator, union-attr]
        assert torch.equal(engine.sample(2, steps=3), before)
        assert network.training is training
        assert not torch.equal(sf.Engine(network, schedule, device="cpu", dtype=dtype).sample(2, steps=3), before)

    def test_without_a_copy_the_module_itself_runs(self, schedule: sf.NoiseSchedule) -> None:
        network = self.network().eval()
        assert sf.Engine(network, schedule, device="cpu", dtype="float32", copy=False).network is network
        assert sf.Engine(network, schedule, device="cpu", dtype="bfloat16", copy=False).network is not network

    def test_a_module_that_cannot_be_copied_is_named(self, schedule: sf.NoiseSchedule) -> None:
        network = self.network().eval()
        network.cached = network.scale * 2  # type: ignore[operator, assignment]
        with pytest.raises(TypeError, match=r"^model cannot be copied \(Only Tensors created explicitly.*copy=False"):
            sf.Engine(network, schedule, device="cpu", dtype="float32")
        assert (
            sf.Engine(network, schedule, device="cpu", dtype="float32", copy=False)
            .sample(1, steps=2)
            .isfinite()
            .all()
        )
