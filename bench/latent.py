"""Guided loops of latent denoisers beside diffusers': ``python -m stepfusion.bench.latent``.

The networks are Stable Diffusion 1.5's and DiT-XL/2's at their published sizes, or small ones of each kind
(``--model tiny-text``, ``--model tiny-dit``), with random weights. All walk the same DDIM loop with classifier-free
guidance from the same noise: diffusers' network with diffusers' scheduler, step by step as its pipelines do it, and
the engine, eagerly and with the CPU's kernels. Latents are compared before anything is timed, and then everybody is
timed in one interleaved run. Autoencoders and text encoders are left out: both sides would use the same library's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stepfusion.bench.measure import interleave
from stepfusion.bench.models import LATENT, TINY_LATENT, diffusers_twin, fill_zeros, image_shape, latent_network
from stepfusion.bench.optional import need
from stepfusion.bench.ours import check_runs_as_asked
from stepfusion.bench.rows import markdown
from stepfusion.engine import Engine
from stepfusion.kernels import BackendError
from stepfusion.networks import DiT, UNet2DCondition
from stepfusion.options import DType, NetworkMode
from stepfusion.samplers.schedule import NoiseSchedule

CPU = torch.device("cpu")
DIFFUSERS = "diffusers float32"
#: What is measured beside it: the engine's network modes and dtypes.
OURS: tuple[tuple[NetworkMode, DType], ...] = (("eager", "float32"), ("cpp", "float32"), ("cpp", "bfloat16"))
#: The largest difference of latents, in parts of diffusers' largest: rounding, added up over some steps.
ACCEPTED = {"float32": 1e-3, "bfloat16": 0.1}
_GUIDANCE = 4.0


@dataclass(frozen=True)
class Work:
    """A guided loop that everybody walks.

    Attributes:
        network: of ours, float32, on the CPU. start: noise, float32 [B, C, H, W]. steps: of DDIM.
        given: what conditions it beside x and t, as keyword arguments of :meth:`Engine.sample`.
        theirs: the same for diffusers' network, both halves of the guided batch, the unconditional one first.
    """

    network: UNet2DCondition | DiT
    start: Tensor
    steps: int
    given: dict[str, Any]
    theirs: dict[str, Tensor]


@dataclass(frozen=True)
class LoopTime:
    """Milliseconds of a loop of ``steps`` guided steps for ``batch`` images, the median of ``rounds``.

    ``difference``: of the latents to diffusers', in parts of diffusers' largest. ``faster``: how many times as long
    diffusers takes.
    """

    model: str
    provider: str
    batch: int
    latent: int
    steps: int
    rounds: int
    milliseconds: float
    faster: float
    difference: float


def make_work(model: str, batch: int, latent: int | None, steps: int) -> Work:
    """The loop of one of the models, with latents of ``latent`` x ``latent``, or of the size of its config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = latent_network(model, latent).eval()
        fill_zeros(network)
        start = torch.randn(batch, *image_shape(network))
        if isinstance(network, DiT):
            labels = torch.arange(batch)
            null = network.config.num_embeds_ada_norm
            theirs = {"class_labels": torch.cat((torch.full((batch,), null), labels))}
            return Work(network, start, steps, {"labels": labels}, theirs)
        (spec,) = network.conditions
        text, nothing = torch.randn(2, batch, *spec.shape)
        given = {"conditions": {spec.name: text}, "null_conditions": {spec.name: nothing}}
        return Work(network, start, steps, given, {"encoder_hidden_states": torch.cat((nothing, text))})


def diffusers_loop(work: Work) -> Callable[[], Tensor]:
    """diffusers' network in diffusers' DDIM loop, guided as its pipelines do it; ImportError without diffusers."""
    kind = "DiTTransformer2DModel" if isinstance(work.network, DiT) else "UNet2DConditionModel"
    network = diffusers_twin(work.network, kind)
    scheduler = need("diffusers").DDIMScheduler(clip_sample=False)
    channels = work.network.in_channels

    @torch.no_grad()
    def loop() -> Tensor:
        scheduler.set_timesteps(work.steps)
        x = work.start
        for t in scheduler.timesteps:
            twice = torch.cat((x, x))
            out = network(twice, timestep=t.expand(len(twice)), **work.theirs).sample[:, :channels]
            without, given = out.chunk(2)
            x = scheduler.step(without + _GUIDANCE * (given - without), t, x).prev_sample
        return x

    return loop


def our_loop(work: Work, mode: NetworkMode, dtype: DType) -> Callable[[], Tensor]:
    """The engine's loop. BackendError if it cannot run here in this way."""
    classes = work.network.config.num_embeds_ada_norm + 1 if isinstance(work.network, DiT) else None
    engine = Engine(
        work.network,
        NoiseSchedule.linear(),
        shape=work.start.shape[1:],
        num_classes=classes,
        null_label=None if classes is None else classes - 1,
        options={"clip": None},
        device=CPU,
        dtype=dtype,
        network=mode,
        batch=len(work.start),
        copy=False,
    )
    table = engine.table("ddim", work.steps, compat="diffusers", clip=None)

    def loop() -> Tensor:
        x = engine.sample(table=table, start=work.start, guidance=_GUIDANCE, progress=False, **work.given)
        check_runs_as_asked(engine)
        return x

    return loop


def measure(
    model: str, work: Work, rounds: int, ours: Sequence[tuple[NetworkMode, DType]] = OURS
) -> Iterator[LoopTime]:
    """Compare, then time, everybody who can run here; a line on stderr says who cannot, and why.

    Raises:
        RuntimeError: latents are further from diffusers' than rounding explains, or a loop fails.
    """
    loops = {DIFFUSERS: diffusers_loop(work)}
    expected = loops[DIFFUSERS]()
    differences = {DIFFUSERS: 0.0}
    for mode, dtype in ours:
        name = f"stepfusion {mode} {dtype}"
        try:
            loops[name] = our_loop(work, mode, dtype)
        except BackendError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        difference = float((loops[name]() - expected).abs().max() / expected.abs().max())
        if not difference <= ACCEPTED[str(dtype)]:
            raise RuntimeError(f"{name}: latents differ by {difference:.2g} of the largest, nothing was timed")
        differences[name] = difference
    timings = interleave(loops, CPU, rounds)
    first = timings[DIFFUSERS]
    for name, timing in timings.items():
        if isinstance(timing, str) or isinstance(first, str):
            raise RuntimeError(f"{name}: {timing}")
        yield LoopTime(
            model, name, len(work.start), work.start.shape[-1], work.steps, rounds,
            timing.median_ms, first.median_ms / timing.median_ms, differences[name],
        )  # fmt: skip


def as_markdown(found: Sequence[LoopTime]) -> str:
    """A table for a page."""
    header = ["model", "latents", "batch", "who", "ms a step", "faster than diffusers", "largest difference"]
    rows = [
        [r.model, f"{r.latent} x {r.latent}", str(r.batch), r.provider, f"{r.milliseconds / r.steps:.3g}",
         f"{r.faster:.2f}x", f"{r.difference:.1e}"]
        for r in found
    ]  # fmt: skip
    return markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stepfusion.bench.latent", description=__doc__)
    parser.add_argument("--model", action="append", choices=(*LATENT, *TINY_LATENT), help="may be repeated")
    parser.add_argument("--latent", type=int, help="height and width of latents (default: the model's)")
    parser.add_argument("--batch", type=int, default=1, help="images, each guided (default: 1)")
    parser.add_argument("--steps", type=int, default=4, help="of DDIM (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="of interleaved timing (default: 5)")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="of ours (default: both)")
    parser.add_argument("--json", action="store_true", help="print rows as lines of JSON")
    args = parser.parse_args(argv)
    ours = [(mode, dtype) for mode, dtype in OURS if args.dtype is None or dtype in args.dtype]
    found: list[LoopTime] = []
    for model in args.model or LATENT:
        work = make_work(model, args.batch, args.latent, args.steps)
        found.extend(measure(model, work, args.rounds, ours))
    for row in found if args.json else ():
        print(json.dumps(asdict(row)))
    if not args.json:
        print(as_markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
