"""Images from an image: a start from it noised, a part of it kept; and latents that become images."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import stepfusion as sf
from stepfusion.kernels import STREAM_FORWARD, STREAM_STEP, reference
from stepfusion.samplers.registry import samplers_of
from stepfusion_testing.networks import labelled, smooth
from stepfusion_testing.recorded_graph import Captures

SHAPE = (2, 6, 5)
LINEAR = sf.NoiseSchedule.linear()
MAKERS = samplers_of(sf.NoiseSchedule.linear())
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]


def make_engine(model: Any = smooth, **arguments: Any) -> sf.Engine:
    fixed = {"shape": SHAPE, "device": "cpu", "dtype": "float32", "backend": "reference"}
    return sf.Engine(model, LINEAR, **{**fixed, **arguments})


@pytest.fixture
def engine() -> sf.Engine:
    return make_engine()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, *SHAPE) * 2 - 1


@pytest.fixture
def mask() -> torch.Tensor:
    """1 where to repaint: everything of the first image, a part of the second, nothing of the third."""
    mask = torch.ones(3, 1, *SHAPE[1:])
    mask[1, :, 2:] = 0
    mask[2] = 0
    return mask


# Strength


@pytest.mark.parametrize(("strength", "steps", "rows"), [(0.6, 10, 6), (0.07, 100, 7), (0.01, 10, 1), (0.55, 10, 6)])
def test_strength_starts_from_the_noised_image(
    engine: sf.Engine, image: torch.Tensor, strength: float, steps: int, rows: int
) -> None:
    table = engine.table(steps=steps, eta=0.5)
    got = engine.sample(table=table, image=image, strength=strength, seed=[1, 1, 2])
    seeds, indices = torch.tensor([1, 1, 2]), torch.arange(3)
    t = torch.full((3,), int(table.timesteps[-rows]))
    eps = reference.normal(seeds, indices, t, SHAPE, STREAM_FORWARD)
    abar = float(LINEAR.alphas_cumprod[t[0]])
    start = abar**0.5 * image + (1 - abar) ** 0.5 * eps
    want = engine.sample(table=table.last(rows), start=start, seed=[1, 1, 2])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    events = list(engine.stream(table=table, image=image, strength=strength, seed=[1, 1, 2]))
    assert [event.step for event in events] == list(range(rows))
    assert events[-1].steps == rows
    assert torch.equal(events[-1].x, got)


@pytest.mark.parametrize("sampler", MAKERS)
def test_little_strength_changes_little(engine: sf.Engine, image: torch.Tensor, sampler: str) -> None:
    table = engine.table(sampler, 50, clip=None)
    far = [
        float((engine.sample(table=table, image=image, strength=s) - image).abs().mean()) for s in (0.04, 0.3, 0.9)
    ]
    assert far[0] < far[1] < far[2]


def test_strength_of_one_is_noise_alone(engine: sf.Engine, image: torch.Tensor) -> None:
    assert torch.equal(engine.sample(image=image, strength=1.0, steps=5), engine.sample(3, steps=5))


def test_one_image_for_all(engine: sf.Engine, image: torch.Tensor) -> None:
    several = engine.sample(4, image=image[:1], strength=0.5, steps=6)
    assert torch.equal(several, engine.sample(image=image[:1].expand(4, -1, -1, -1), strength=0.5, steps=6))
    assert not torch.equal(several[0], several[1])


# A mask


# Triton's interpreter is slow: the quick ones are one sampler each without noise and a history, with noise, with two
# evaluations a step, and with the longest history.
IN_TRITON = {("ddim", 0.5), ("ddpm", None), ("heun", None), ("dpmpp_3m", 0.5)}
KEPT = [
    pytest.param(
        backend,
        sampler,
        strength,
        marks=[pytest.mark.interpreter] * (backend == "triton")
        + [pytest.mark.soak] * (backend == "triton" and (sampler, strength) not in IN_TRITON),
    )
    for backend in ("reference", "triton")
    for sampler in MAKERS
    for strength in (None, 0.5)
]


@pytest.mark.parametrize(("backend", "sampler", "strength"), KEPT)
def test_what_is_kept_ends_as_the_image(
    image: torch.Tensor, mask: torch.Tensor, sampler: str, strength: float | None, backend: str
) -> None:
    engine = make_engine(backend=backend)
    table = engine.table(sampler, 7)
    got = engine.sample(table=table, image=image, mask=mask, strength=strength)
    kept = (mask == 0).expand_as(image)
    assert torch.equal(got[kept], image[kept])
    assert not torch.isclose(got[~kept], image[~kept]).any()
    if strength is None:
        assert torch.equal(got[0], engine.sample(table=table, indices=[0])[0]), "a lane that keeps nothing is free"


@pytest.mark.parametrize(
    "table",
    [
        sf.ddpm(LINEAR, 4, spacing="trailing", variance="fixed_large", compat="diffusers"),
        sf.ddim(LINEAR, 4, final_alpha_cumprod=float(LINEAR.alphas_cumprod[0])),
        sf.dpmpp_2m(LINEAR, 4, final_alpha_cumprod=float(LINEAR.alphas_cumprod[0])),
    ],
    ids=str,
)
def test_noise_that_a_sampler_leaves_is_not_the_images(
    engine: sf.Engine, image: torch.Tensor, mask: torch.Tensor, table: sf.StepTable
) -> None:
    kept = (mask == 0).expand_as(image)
    assert torch.equal(engine.sample(table=table, image=image, mask=mask)[kept], image[kept])


def test_what_is_kept_is_noised_to_the_level_of_every_step(
    engine: sf.Engine, image: torch.Tensor, mask: torch.Tensor
) -> None:
    """By the step's own noise, of which a free element uses its own part."""
    table = engine.table(steps=6)
    kept = (mask == 0).expand_as(image)
    zero = torch.zeros(3, dtype=torch.int64)
    for event in engine.stream(table=table, image=image, mask=mask, seed=9):
        if event.step == 5:
            continue
        abar = float(LINEAR.alphas_cumprod[table.timesteps[event.step + 1]])
        z = reference.normal(zero + 9, torch.arange(3), zero + event.timestep, SHAPE, STREAM_STEP)
        want = abar**0.5 * image + (1 - abar) ** 0.5 * z
        torch.testing.assert_close(event.x[kept], want[kept], rtol=0, atol=1e-6)


def test_given_noise_noises_what_is_kept_too(engine: sf.Engine, image: torch.Tensor, mask: torch.Tensor) -> None:
    table = engine.table("ddpm", 4)
    lanes, zero = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    noise = torch.stack([reference.normal(zero, lanes, zero + int(t), SHAPE) for t in table.timesteps])
    drawn = engine.sample(table=table, image=image, mask=mask)
    assert torch.equal(engine.sample(table=table, image=image, mask=mask, noise=noise), drawn)


def test_masks_broadcast(engine: sf.Engine, image: torch.Tensor, mask: torch.Tensor) -> None:
    one = mask[1:2]
    want = engine.sample(image=image, mask=one.expand(3, *SHAPE), steps=4)
    for kind in (one, one.bool(), one.to(torch.uint8), one.expand(1, *SHAPE), one.expand(3, 1, *SHAPE[1:])):
        assert torch.equal(engine.sample(image=image, mask=kind, steps=4), want)


# Lanes


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_edit_does_not_depend_on_the_company(image: torch.Tensor, mask: torch.Tensor, backend: str) -> None:
    """Nor on lanes that are used again: three lanes, nine images, masked and unmasked, of several samplers."""
    engine = make_engine(backend=backend, batch=3)
    tables = [engine.table("dpmpp_2m", 4), engine.table(steps=2, eta=1.0), engine.table("ddpm", 5)]
    arguments: dict[str, Any] = {"strength": 0.7, "seed": 5}
    images, masks = image.repeat(3, 1, 1, 1), mask.repeat_interleave(3, dim=0)
    chosen = [tables[i // 3] for i in range(9)]
    whole = engine.sample(table=chosen, image=images, mask=masks, **arguments)
    for i in range(9):
        alone = engine.sample(
            table=chosen[i], image=images[i : i + 1], mask=masks[i : i + 1], indices=[i], **arguments
        )
        assert torch.equal(whole[i], alone[0]), i
    assert torch.equal(engine.sample(3, tables[1]), make_engine(backend=backend).sample(3, tables[1])), (
        "and none after"
    )


def test_out_of_memory_starts_edits_again(image: torch.Tensor, mask: torch.Tensor) -> None:
    calls = 0

    def scarce(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if len(x) > 1 and calls > 2:
            raise torch.OutOfMemoryError("no room")
        return smooth(x, timesteps)

    arguments: dict[str, Any] = {"image": image, "mask": mask, "strength": 0.6, "steps": 6, "sampler": "dpmpp_2m"}
    with pytest.warns(RuntimeWarning, match="out of memory"):
        images = make_engine(scarce).sample(**arguments)
    assert torch.equal(images, make_engine().sample(**arguments))


@pytest.mark.interpreter
def test_captured_ticks_edit(monkeypatch: pytest.MonkeyPatch, image: torch.Tensor, mask: torch.Tensor) -> None:
    """One graph for everything that keeps and remembers: masks, strengths, solvers and images are data."""
    captures = Captures()
    monkeypatch.setattr(sf.execution.plan, "why_not_graph", lambda device: None)
    monkeypatch.setattr(sf.execution.cuda_graph, "capture", captures)
    arguments: dict[str, Any] = {"num_classes": 4, "null_label": 3, "backend": "triton"}
    captured, eager = (make_engine(labelled, network=way, **arguments) for way in ("graph", "eager"))
    for steps, strength, flip in ((3, None, False), (4, 0.5, True)):
        edit = {"image": -image if flip else image, "mask": 1 - mask if flip else mask, "strength": strength}
        table = captured.table("dpmpp_2m", steps)
        images = captured.sample(table=table, labels=[0, 1, 2], guidance=2.0, **edit)
        assert torch.equal(images, eager.sample(table=table, labels=[0, 1, 2], guidance=2.0, **edit))
    plain = captured.table("dpmpp_2m", 3)
    assert len({id(graph) for graph in captures.graphs}) <= 2, "with a history or without; tables are data"
    before = len(captures.graphs)
    assert torch.equal(captured.sample(3, plain, labels=1), eager.sample(3, plain, labels=1))
    assert len(captures.graphs) == before + 1, "other features, another graph"


def test_generate_edits(engine: sf.Engine, image: torch.Tensor, mask: torch.Tensor) -> None:
    engine = make_engine(shape=(1, 6, 5), batch=2)
    arguments: dict[str, Any] = {"image": image[:, :1], "mask": mask, "strength": 0.8, "steps": 5}
    pixels = torch.cat(list(engine.generate(**arguments)))
    assert torch.equal(pixels, engine.to_uint8(engine.sample(**arguments)))


# What is refused

NAN = float("nan")
IMAGE = torch.zeros(2, *SHAPE)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"strength": 0.5}, ValueError, "strength needs an image, got none"),
    ({"mask": IMAGE}, ValueError, "mask needs an image, got none"),
    ({"image": IMAGE}, ValueError, "image needs a strength in (0, 1], or a mask, got neither"),
    ({"image": IMAGE, "start": IMAGE, "strength": 0.5}, ValueError, "image and start exclude each other, got both"),
    ({"image": IMAGE, "strength": 0}, ValueError, "strength must be a finite number in (0, 1], got 0"),
    ({"image": IMAGE, "strength": 1.5}, ValueError, "strength must be a finite number in (0, 1], got 1.5"),
    ({"image": IMAGE, "strength": "most"}, TypeError, "strength must be a number, got 'most'"),
    ({"image": [0], "strength": 0.5}, TypeError,
     "image must be a tensor, a PIL.Image, the path of a picture, or a list of pictures, got list"),
    ({"image": IMAGE.int(), "strength": 0.5}, TypeError,
     "image must be a floating-point tensor in [-1, 1], got torch.int32"),
    ({"image": IMAGE + NAN, "strength": 0.5}, ValueError, "image must be finite, got NaN or infinite values"),
    ({"image": IMAGE[:, :1], "strength": 0.5}, ValueError,
     "image must have shape [1, 2, 6, 5] or [2, 2, 6, 5], got [2, 1, 6, 5]"),
    ({"n": 3, "image": IMAGE, "strength": 0.5}, ValueError,
     "image must have shape [1, 2, 6, 5] or [3, 2, 6, 5], got [2, 2, 6, 5]"),
    ({"image": IMAGE.to("meta"), "strength": 0.5}, ValueError,
     "image must hold values, got a tensor on the meta device"),
    ({"image": IMAGE, "mask": 1}, TypeError,
     "mask must be a tensor, a PIL.Image, the path of a picture, or a list of pictures, got int"),
    ({"image": IMAGE, "mask": IMAGE[0]}, ValueError,
     "mask must have shape [1, 1, 6, 5] or [2, 1, 6, 5] or [1, 2, 6, 5] or [2, 2, 6, 5], got [2, 6, 5]"),
    ({"image": IMAGE, "mask": IMAGE + 0.5}, ValueError,
     "mask must hold 1 where to repaint and 0 where to keep, and nothing else"),
    ({"image": IMAGE, "mask": IMAGE, "table": sf.ddim_inversion(LINEAR, 4)}, ValueError,
     "image needs a sampler's table, whose rows lead to images, "
     "got StepTable(ddim inversion, 4 rows, epsilon, linear)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_bad_edits(engine: sf.Engine, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        engine.sample(**arguments)


# Latents


class Decoder(torch.nn.Module):
    """Twice the size, three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.ConvTranspose2d(2, 3, 2, 2)
        self.largest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.largest = max(self.largest, len(x))
        return torch.tanh(self.up(x))


def test_a_decoder_turns_latents_into_pixels() -> None:
    decoder = Decoder().eval()
    engine = make_engine(decode=decoder, batch=2)
    latents = engine.sample(5, steps=3)
    assert torch.equal(latents, make_engine(batch=2).sample(5, steps=3)), "sample returns latents as ever"
    images = engine.decode_latents(latents)
    assert images.shape == (5, 3, 12, 10)
    assert decoder.largest == 2, "a batch at a time"
    with torch.no_grad():
        torch.testing.assert_close(images, decoder(latents))
    pixels = engine.to_uint8(latents)
    assert pixels.shape == (5, 12, 10, 3)
    assert torch.equal(pixels, reference.to_uint8(images))
    assert torch.equal(torch.cat(list(engine.generate(5, steps=3))), pixels)
    assert make_engine().decode_latents(latents) is latents


def test_a_decoder_in_training_is_copied() -> None:
    decoder = Decoder()
    make_engine(decode=decoder).to_uint8(torch.zeros(1, *SHAPE))
    assert decoder.training
    assert decoder.largest == 0


def test_bad_decoders() -> None:
    with pytest.raises(TypeError, match="decode must be callable, got int"):
        make_engine(decode=3)
    latents = torch.zeros(2, *SHAPE)
    message = r"decode must return floating-point images \[2, C, H, W\], got "
    for decode, given in (
        (lambda x: x[0], r"float32 \[2, 6, 5\]"),
        (lambda x: x[:1], r"float32 \[1, 2, 6, 5\]"),
        (lambda x: x.int(), r"int32 \[2, 2, 6, 5\]"),
        (lambda x: None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=message + given):
            make_engine(decode=decode).to_uint8(latents)
    with pytest.raises(ValueError, match=r"x must have shape \[2, 2, 6, 5\], got \[2, 1, 6, 5\]"):
        make_engine(decode=Decoder()).decode_latents(latents[:, :1])
