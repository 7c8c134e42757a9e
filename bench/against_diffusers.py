"""Sampling beside diffusers, on the same weights, in one interleaved run: ``python -m
stepfusion.bench.against_diffusers``.

Both sides make the same images from the same start and the same noise; the outputs are compared before anything is
timed.
The rows are ratios of medians: machines are shared and noisy, and a ratio of interleaved runs is what carries over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stepfusion.checkpoint import load_pretrained
from stepfusion.engine import Engine
from stepfusion.kernels import diffusion_step, reference
from stepfusion.kernels.backend import interpreting, why_not_triton
from stepfusion.samplers import ddim, ddpm
from stepfusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Row:
    """One comparison: medians in milliseconds, their ratio, and the largest difference of the outputs."""

    what: str
    ours_ms: float
    theirs_ms: float
    difference: float

    @property
    def ratio(self) -> float:
        """How many times longer diffusers takes."""
        return self.theirs_ms / self.ours_ms


def compare_step(shape: tuple[int, ...], device: torch.device, repeats: int) -> list[Row]:
    """One DDPM and one DDIM (eta = 1) scheduler step with given noise, on images of ``shape`` [B, C, H, W]."""
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    schedule = NoiseSchedule.linear(scaled=False)
    x, out, noise = (torch.randn(shape, device=device) for _ in range(3))
    step = reference.diffusion_step
    if why_not_triton(device) is None and not interpreting():
        step = diffusion_step
    rows = []
    for name in ("DDPM", "DDIM, eta 1"):
        if name == "DDPM":
            peer, table = DDPMScheduler(), ddpm(schedule, 50, compat="diffusers")
        else:
            peer, table = DDIMScheduler(), ddim(schedule, 50, eta=1.0, compat="diffusers")
        peer.set_timesteps(50)
        position, on_device = 20, table.on(device)
        where = torch.full((len(x),), position, device=device)
        t = int(table.timesteps[position])
        buffer = torch.empty_like(x)

        def ours(on_device: Any = on_device, where: Any = where, buffer: Any = buffer) -> torch.Tensor:
            return step(x, out, where, on_device.coefficients, on_device.timesteps, noise=noise, x_next=buffer)

        def theirs(peer: Any = peer, t: int = t, name: str = name) -> torch.Tensor:
            if name == "DDPM":
                return peer.step(out, t, x).prev_sample  # type: ignore[no-any-return]
            return peer.step(out, t, x, eta=1.0, variance_noise=noise).prev_sample  # type: ignore[no-any-return]

        original = scheduling_ddpm.randn_tensor
        scheduling_ddpm.randn_tensor = lambda *_, **__: noise
        try:
            rows.append(_row(f"{name} step, {'x'.join(map(str, shape))}", ours, theirs, device, repeats))
        finally:
            scheduling_ddpm.randn_tensor = original
    return rows


def compare_loop(model: str, images: int, steps: int, device: torch.device, repeats: int) -> Row:
    """A whole DDIM loop of a model directory, network included, float32, from one start."""
    from diffusers import DDIMScheduler, UNet2DModel

    engine = Engine.from_pretrained(model, device=device, dtype="float32")
    loaded = load_pretrained(model)
    config = {k: v for k, v in loaded.network.config.to_dict().items() if not k.startswith("_")}
    unet = UNet2DModel(**config).eval().to(device)
    unet.load_state_dict(loaded.network.state_dict())
    peer = DDIMScheduler.from_config(loaded.scheduler_config)
    labels = None if engine.num_classes is None else torch.arange(images, device=device) % (engine.num_classes - 1)
    start = torch.randn(images, *engine.shape, device=device)
    table = engine.table("ddim", steps, compat="diffusers")

    def ours() -> torch.Tensor:
        return engine.sample(images, table, start=start, labels=labels, progress=False)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        peer.set_timesteps(steps)
        x = start
        for t in peer.timesteps:
            x = peer.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
        return x

    return _row(f"DDIM-{steps}, {images} images of {model}", ours, theirs, device, repeats)


def _row(
    what: str,
    ours: Callable[[], torch.Tensor],
    theirs: Callable[[], torch.Tensor],
    device: torch.device,
    repeats: int,
) -> Row:
    """Compare the outputs, then time both sides in turn."""
    difference = float((ours() - theirs()).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"{what}: the outputs differ by {difference:.2g}, and nothing was timed")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, taken in zip((ours, theirs), times, strict=True):
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(1e3 * (time.perf_counter() - started))
    return Row(what, statistics.median(times[0]), statistics.median(times[1]), difference)


def main() -> None:
    """Print the rows, as a table or as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fashion-mnist", help="a bundled model or a diffusers directory")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = [row for shape in ((1, 3, 32, 32), (16, 3, 256, 256)) for row in compare_step(shape, device, 40)]
    rows.append(compare_loop(args.model, args.images, args.steps, device, args.repeats))
    for row in rows:
        if args.json:
            print(json.dumps({**asdict(row), "ratio": row.ratio, "device": args.device, "torch": torch.__version__}))
        else:
            print(
                f"{row.what:<42} {row.ours_ms:9.3f} ms   diffusers {row.theirs_ms:9.3f} ms   "
                f"{row.ratio:5.2f}x   outputs differ by {row.difference:.1e}"
            )


if __name__ == "__main__":
    main()
