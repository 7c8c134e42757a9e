"""What "fast" means here, and what the rows of a run say about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepfusion.bench.peers import Diffusers, DiffusersCompiled, OpenVINO
from stepfusion.bench.rows import Row, number

LARGE_BYTES = 256 << 20
SMALL_SHAPE = "1x3x32x32"  # 12 KiB
_DEFAULT, _BEST = Diffusers.name, DiffusersCompiled.name
_FUSED, _CPP = "stepfusion fused", "stepfusion C++"
CPU_LARGE, CPU_SMALL = "64x3x64x64", "1x1x28x28"


@dataclass(frozen=True)
class Figure:
    """A measured figure: the worst of the rows it speaks for, as text and against its target."""

    text: str
    met: bool


@dataclass(frozen=True)
class Target:
    """One target. ``device`` is where it counts; ``measure`` returns None if the rows do not have it."""

    what: str
    target: str
    device: str
    measure: Callable[[Sequence[Row]], Figure | None]

    def verdict(self, rows: Sequence[Row]) -> tuple[str, str]:
        """The measured figure as text, and "met", "not met" or "not measured here"."""
        figure = self.measure([row for row in rows if row.device == self.device])
        if figure is None:
            return "", "not measured here"
        return figure.text, "met" if figure.met else "not met"


def ratios(rows: Sequence[Row], ours: str, peer: str) -> dict[tuple[object, ...], float]:
    """How many times longer the peer takes than the best of ours, for each work that both did.

    Providers are given by the start of their names.
    """
    times: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        if row.median_ms is None or row.error:
            continue
        work = (row.part, row.op, row.model, row.shape, row.batch, row.steps)
        for side, prefix in (("ours", ours), ("peer", peer)):
            if row.provider.startswith(prefix) and (side == "ours" or row.provider == peer):
                best = times.setdefault(work, {})
                best[side] = min(row.median_ms, best.get(side, row.median_ms))
    return {work: t["peer"] / t["ours"] for work, t in times.items() if len(t) == 2}


def _pick(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows whose fields have these values; for ``op``, whose op starts so."""
    op = str(wanted.pop("op", ""))
    return [r for r in rows if r.op.startswith(op) and all(getattr(r, k) == v for k, v in wanted.items())]


def _fraction(ops: tuple[str, ...], drawn: bool, least: float) -> Callable[[Sequence[Row]], Figure | None]:
    def measure(rows: Sequence[Row]) -> Figure | None:
        found = [
            row.fraction
            for row in _pick(rows, part="kernels", provider=_FUSED)
            if row.op.startswith(ops)
            and row.op.endswith("drawn") == drawn
            and row.fraction is not None
            and (row.bytes or 0) >= LARGE_BYTES
        ]
        return _least(found, least, "%")

    return measure


def _step_ratio(rows: Sequence[Row]) -> Figure | None:
    steps = [row for row in rows if row.part == "kernels" and " step, " in row.op]
    large = [row for row in steps if (row.bytes or 0) >= LARGE_BYTES]
    found = [
        _least(list(ratios(chosen, _FUSED, "diffusers").values()), least, "x")
        for chosen, least in ((large, 6.0), (_pick(steps, shape=SMALL_SHAPE), 20.0))
    ]
    return _both(found)


def _cpu_steps(rows: Sequence[Row]) -> Figure | None:
    def worst(shape: str, drawn: bool | None, least: float, unit: str) -> Figure | None:
        chosen = [
            row for row in _pick(rows, part="kernels", shape=shape) if drawn in (None, row.op.endswith("drawn"))
        ]
        return _least(list(ratios(chosen, _CPP, "diffusers").values()), least, unit)

    return _both(
        [
            worst(CPU_LARGE, False, 4.0, "x"),
            worst(CPU_LARGE, True, 8.0, "x with noise drawn"),
            worst(CPU_SMALL, None, 1.0, "x on one image"),
        ]
    )


def _inductor(rows: Sequence[Row]) -> Figure | None:
    fused = ratios([row for row in rows if row.part == "kernels"], _FUSED, "inductor")
    drawn = [ratio for work, ratio in fused.items() if str(work[1]).endswith("drawn")]
    return _both([_least(list(fused.values()), 1.0, "x"), _least(drawn, 1.5, "x where drawn")])


def _group_norm(rows: Sequence[Row]) -> Figure | None:
    chosen = _pick(rows, part="kernels", op="group_norm_silu")
    fractions = [row.fraction for row in chosen if row.provider == _FUSED and row.fraction is not None]
    over_aten = list(ratios(chosen, _FUSED, "aten").values())
    return _both([_least(fractions, 0.85, "%"), _least(over_aten, 2.0, "x aten")])


def _latency(rows: Sequence[Row]) -> Figure | None:
    chosen = _pick(rows, part="latency", op="DDIM-50 to", model="cifar10", batch=1)
    default, best = (list(ratios(chosen, "stepfusion", peer).values()) for peer in (_DEFAULT, _BEST))
    idle = [
        row.fraction
        for row in _pick(rows, part="latency", fraction_of="device idle", model="cifar10")
        if row.fraction is not None and "graph" in row.provider
    ]
    share = Figure(f"idle {100 * min(idle):.1f} %", min(idle) <= 0.02) if idle else None
    return _both([_least(default, 15.0, "x default"), _least(best, 1.5, "x compiled"), share])


def _bulk(model: str, matmul: float | None) -> Callable[[Sequence[Row]], Figure | None]:
    """The best batch of ours against the best batch of the peer's."""

    def measure(rows: Sequence[Row]) -> Figure | None:
        chosen = [row for row in _pick(rows, part="throughput", model=model) if row.images_per_second]
        ours = max(
            (row for row in chosen if row.provider.startswith("stepfusion") and row.dtype == "bfloat16"),
            key=lambda row: row.images_per_second or 0.0,
            default=None,
        )
        peer = max((row.images_per_second or 0.0 for row in chosen if row.provider == _BEST), default=0.0)
        if ours is None or not peer:
            return None
        ratio = _least([(ours.images_per_second or 0.0) / peer], 1.3, "x compiled")
        if matmul is None:
            return ratio
        return _both([ratio, _least([ours.fraction or 0.0], matmul, "%")])

    return measure


def _on_cpu(rows: Sequence[Row]) -> Figure | None:
    chosen = _pick(rows, part="compare", model="cifar10", batch=8)
    found = []
    for peer, least, name in (
        (_DEFAULT, 4.0, "x default"),
        (_BEST, 1.2, "x compiled"),
        (OpenVINO("bfloat16").name, 1.0, "x OpenVINO"),
    ):
        found.append(_least(list(ratios(chosen, "stepfusion", peer).values()), least, name))
    return _both(found)


def _host(op: str, most_ms: float, unit: str, scale: float) -> Callable[[Sequence[Row]], Figure | None]:
    def measure(rows: Sequence[Row]) -> Figure | None:
        for row in _pick(rows, part="host", op=op):
            if row.median_ms is not None:
                return Figure(f"{number(scale * row.median_ms)} {unit}", row.median_ms <= most_ms)
        return None

    return measure


def _least(values: Sequence[float], least: float, unit: str) -> Figure | None:
    """The smallest of the values, against the least that is wanted."""
    if not values:
        return None
    low = min(values)
    text = f"{100 * low:.1f} %" if unit == "%" else f"{low:.2f}{unit}"
    return Figure(text, low >= least)


def _both(figures: Sequence[Figure | None]) -> Figure | None:
    """Several figures of one target: all must be there, and all must be met."""
    known = [figure for figure in figures if figure is not None]
    if len(known) < len(figures):
        return None
    return Figure(", ".join(figure.text for figure in known), all(figure.met for figure in known))


_POINTWISE = ("ddim step", "ddpm step", "q_sample", "posterior")
TARGETS = (
    Target(
        "step, q_sample, posterior, >= 256 MiB moved, noise given or none",
        ">= 90 % of device copy bandwidth",
        "cuda",
        _fraction(_POINTWISE, False, 0.90),
    ),
    Target("the same, drawing its own noise", ">= 85 %", "cuda", _fraction(_POINTWISE, True, 0.85)),
    Target(
        "step against diffusers' eager scheduler step, large / 12 KiB image incl. host time",
        ">= 6x / >= 20x",
        "cuda",
        _step_ratio,
    ),
    Target(
        "any fused op against torch.compile of its reference",
        "never slower; >= 1.5x where noise is drawn",
        "cuda",
        _inductor,
    ),
    Target(
        "GroupNorm+SiLU, NHWC, bf16, every shape of the two UNets",
        ">= 85 % of copy bandwidth, >= 2x aten",
        "cuda",
        _group_norm,
    ),
    Target(
        "one image, DDIM-50, 32x32 CIFAR UNet (35.7 M)",
        ">= 15x diffusers' default, >= 1.5x its best compiled; device idle <= 2 %",
        "cuda",
        _latency,
    ),
    Target(
        "bulk, same UNet, bf16, best batch",
        ">= 1.3x diffusers' best compiled; >= 50 % of measured matmul rate",
        "cuda",
        _bulk("cifar10", 0.5),
    ),
    Target("bulk, 256x256 UNet (113.7 M)", ">= 1.3x diffusers' best compiled", "cuda", _bulk("celebahq-256", None)),
    Target(
        "CPU, CIFAR UNet, batch 8, one evaluation and a DDIM loop",
        ">= 4x diffusers' float32 default, >= 1.2x its bf16 channels_last compiled, faster than OpenVINO bf16",
        "cpu",
        _on_cpu,
    ),
    Target(
        "CPU, fused step, q_sample, posterior against diffusers' scheduler, 64 x 3 x 64 x 64 / one 28 x 28 image",
        ">= 4x, >= 8x with noise drawn / never slower",
        "cpu",
        _cpu_steps,
    ),
    Target("host: Python of a tick", "<= 15 us", "cpu", _host("python of a tick", 0.015, "us", 1e3)),
    Target(
        "host: import stepfusion above torch and triton",
        "<= 0.3 s",
        "cpu",
        _host("import stepfusion", 300.0, "s", 1e-3),
    ),
)
