"""The two ceilings of a device, measured in the run that quotes fractions of them: copying and matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from stepfusion.bench.measure import Timing, time_alone
from stepfusion.bench.rows import Row

_COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes of a buffer: far more than any cache holds
_SIDE = {"cpu": 2048, "cuda": 8192}
_TINY_COPIED, _TINY_SIDE = 4 << 20, 512


@dataclass(frozen=True)
class Floors:
    """Bytes a second of a copy, read and written bytes together, and FLOP/s of a matrix product by dtype.

    From the device's own time, or else the fastest round: what other work on the machine takes away is no ceiling.
    """

    rows: tuple[Row, ...]
    copy: float
    matmul: dict[str, float]


def measure_floors(part: str, device: torch.device, *, tiny: bool = False) -> Floors:
    """Measure both on ``device``; ``tiny`` is for rehearsals: caches hold the buffers, and three rounds do."""
    rounds = 3 if tiny else 15
    copied = _TINY_COPIED if tiny else _COPIED.get(device.type, 1 << 30)
    side = _TINY_SIDE if tiny else _SIDE.get(device.type, 8192)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_alone(partial(target.copy_, source), device, rounds)
    copy = 2 * copied / _seconds(timing)
    rows = [
        Row(
            part,
            "ceiling: copy",
            "torch",
            device.type,
            shape=str(copied),
            dtype="uint8",
            bytes=2 * copied,
            **vars(timing),
        ),
    ]
    del source, target
    matmul = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        timing = time_alone(partial(torch.matmul, a, b), device, rounds)
        matmul[name] = 2 * side**3 / _seconds(timing)
        shape = f"{side}x{side}x{side}"
        rows.append(
            Row(
                part,
                "ceiling: matmul",
                "torch",
                device.type,
                shape=shape,
                dtype=name,
                flops=2 * side**3,
                **vars(timing),
            )
        )
    return Floors(tuple(rows), copy, matmul)


def rates(rows: list[Row]) -> Iterator[tuple[str, str, float]]:
    """Name, dtype and rate (bytes or FLOP a second) of every ceiling among the rows."""
    for row in rows:
        work = row.bytes or row.flops
        if row.op.startswith("ceiling: ") and row.min_ms and work:
            yield row.op.removeprefix("ceiling: "), row.dtype or "", 1e3 * work / (row.device_ms or row.min_ms)


def _seconds(timing: Timing) -> float:
    return (timing.device_ms or timing.min_ms) / 1e3
