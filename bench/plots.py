"""The four pictures of a report: roofline, latency, throughput, time split of a tick. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from stepfusion.bench.floors import rates
from stepfusion.bench.latency import TICK_PARTS
from stepfusion.bench.optional import need
from stepfusion.bench.rows import Row, number, rows_of

_STYLE = {
    "figure.dpi": 120,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MARKERS = "osD^vP*X<>pHd8h"


def draw(rows: Sequence[Row]) -> dict[str, bytes]:
    """File name -> PNG, of every picture that the rows have data for. ImportError without matplotlib."""
    pictures = {
        "roofline.png": roofline(rows_of(rows, "kernels")),
        "latency.png": against_batch(rows_of(rows, "latency"), "latency"),
        "throughput.png": against_batch(rows_of(rows, "throughput"), "throughput"),
        "tick.png": tick_split(rows_of(rows, "latency")),
    }
    return {name: picture for name, picture in pictures.items() if picture is not None}


def roofline(rows: Sequence[Row]) -> bytes | None:
    """Arithmetic intensity against the rate reached, under the measured ceilings."""
    ceilings = list(rates(list(rows)))
    bandwidth = max((rate for name, _, rate in ceilings if name == "copy"), default=None)
    points = [r for r in rows if r.bytes and r.flops and r.median_ms and not r.op.startswith("ceiling")]
    if bandwidth is None or not points:
        return None
    largest: dict[tuple[str, str], Row] = {}
    for row in points:  # the largest work of each: the host's time does not matter there
        key = (row.op, row.provider)
        if key not in largest or (row.bytes or 0) > (largest[key].bytes or 0):
            largest[key] = row

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        low, high = 0.05, 1e3
        matmuls = [(dtype, rate) for name, dtype, rate in ceilings if name == "matmul"]
        for dtype, rate in matmuls:
            start = rate / bandwidth
            axes.plot([start, high], [rate / 1e9] * 2, "k--", lw=0.8)
            axes.annotate(f"{dtype} matmul {rate / 1e12:.3g} TFLOP/s", (high, rate / 1e9), ha="right", va="bottom")
        end = max((rate for _, rate in matmuls), default=high * bandwidth) / bandwidth
        axes.plot([low, end], [low * bandwidth / 1e9, end * bandwidth / 1e9], "k-", lw=1)
        label = f"copy {number(bandwidth / 1e9)} GB/s "
        axes.annotate(label, (end / 4, end / 4 * bandwidth / 1e9), ha="right", va="bottom")
        operations = list(dict.fromkeys(op for op, _ in largest))
        providers = list(dict.fromkeys(provider for _, provider in largest))
        colours = need("matplotlib").colormaps["tab10"]
        for (op, provider), row in largest.items():
            rate = (row.flops or 0) / ((row.device_ms or row.median_ms or 1.0) / 1e3) / 1e9
            axes.plot(
                (row.flops or 0) / (row.bytes or 1),
                rate,
                _MARKERS[operations.index(op) % len(_MARKERS)],
                color=colours(providers.index(provider) % 10),
                ms=6,
                alpha=0.85,
            )
        for i, provider in enumerate(providers):
            axes.plot([], [], "s", color=colours(i % 10), label=provider)
        for i, op in enumerate(operations):
            axes.plot([], [], _MARKERS[i % len(_MARKERS)], color="0.4", label=op)
        axes.set(xscale="log", yscale="log", xlim=(low, high))
        plain_numbers(axes.xaxis, axes.yaxis)
        axes.set_ylim(top=3 * max(rate for _, rate in matmuls) / 1e9 if matmuls else None)
        axes.set(xlabel="arithmetic intensity (FLOP / byte)", ylabel="rate (GFLOP/s)")
        axes.set_title("Fused operations, largest size of each, under the measured ceilings")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)

    return png(paint, (10, 5.5))


def against_batch(rows: Sequence[Row], part: str) -> bytes | None:
    """Time until the images are on the host, or images a second, against the batch; a panel for each model."""
    chosen = [row for row in rows if row.op.startswith("DDIM") and row.batch and row.median_ms and row.steps]
    models = list(dict.fromkeys(row.model or "" for row in chosen))
    providers = list(dict.fromkeys(row.provider for row in chosen))
    if not chosen:
        return None

    def value(row: Row) -> float:
        return (row.median_ms if part == "latency" else row.images_per_second) or 0.0

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        colours, ticker = need("matplotlib").colormaps["tab20"], need("matplotlib.ticker")
        for axes, model in zip(panels, models, strict=True):
            batches: set[int] = set()
            for i, provider in enumerate(providers):
                points = sorted(
                    (row.batch or 0, value(row))
                    for row in chosen
                    if (row.model or "", row.provider) == (model, provider)
                )
                if points:
                    batches |= {batch for batch, _ in points}
                    ours = provider.startswith("stepfusion")
                    axes.plot(
                        *zip(*points, strict=True),
                        "o-" if ours else "s--",
                        color=colours(i % 20),
                        lw=2 if ours else 1.2,
                        label=provider,
                    )
            axes.set(xscale="log", yscale="log", xlabel="batch (images)")
            plain_numbers(axes.yaxis, minor=True)
            axes.set_xticks(sorted(batches), [str(batch) for batch in sorted(batches)], minor=False)
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.set_title(f"{model}, {next(row.op for row in chosen if row.model == model).split(' to ')[0]}")
        panels[0].set_ylabel("time to the batch's images (ms)" if part == "latency" else "images / s")
        handles: dict[str, Any] = {}
        for axes in panels:
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside right upper",
            fontsize=8,
            title="provider",
            title_fontsize=8,
        )

    return png(paint, (4.2 * len(models) + 3.8, 4.5))


def tick_split(rows: Sequence[Row]) -> bytes | None:
    """A bar for each way of running: network, step and rest of a tick; beside it the engine's own Python."""
    ticks = [row for row in rows if row.op.startswith("tick: ") and row.median_ms is not None]
    names = list(dict.fromkeys(row.provider for row in ticks))
    if not names:
        return None
    found = {(row.provider, row.op.removeprefix("tick: ")): row.median_ms or 0.0 for row in ticks}
    idle = {row.provider: row.fraction for row in rows if row.fraction_of == "device idle"}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        left = [0.0] * len(names)
        for part in TICK_PARTS:
            widths = [max(0.0, found.get((name, part), 0.0)) for name in names]
            axes.barh(names, widths, left=left, height=0.5, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for i, name in enumerate(names):
            python = found.get((name, "python"))
            text = "" if python is None else f" Python {1e3 * python:.1f} us"
            if idle.get(name) is not None:
                text += f", device idle {100 * (idle[name] or 0.0):.1f} %"
            axes.annotate(text, (left[i], i), va="center", fontsize=8)
        axes.set(xlabel="milliseconds of one tick, batch 1", xlim=(0, 1.45 * max(left)))
        axes.set_title(f"Where a tick's time goes, {ticks[0].model} {ticks[0].shape}")
        figure.legend(loc="outside right upper", fontsize=8)

    return png(paint, (8.5, 1.6 + 0.8 * len(names)))


def plain_numbers(*every: Any, minor: bool = False) -> None:
    """Label the ticks of axes with numbers as one writes them, and not with powers of ten."""
    ticker = need("matplotlib.ticker")
    for axis in every:
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        if minor:
            axis.set_minor_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def png(paint: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """Draw off screen, with a canvas of its own: nothing global of matplotlib is touched."""
    matplotlib = need("matplotlib")
    figure_module, backend = need("matplotlib.figure"), need("matplotlib.backends.backend_agg")
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        backend.FigureCanvasAgg(figure)
        paint(figure)
        target = io.BytesIO()
        figure.savefig(target, format="png")
    return target.getvalue()
