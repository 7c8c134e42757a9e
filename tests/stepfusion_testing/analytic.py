"""Denoisers that are known in closed form, and a walk through a table's columns in NumPy, by no kernel of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import stepfusion as sf

Floats = NDArray[np.float64]
#: x0 of a state at a level with a signal and a noise.
Denoiser = Callable[[Floats, float, float], Floats]
HISTORY = ("next_prev", "next_prev2", "next_prev3")


def gaussian(x: Floats, signal: float, noise: float, *, mean: float = 0.4, std: float = 0.5) -> Floats:
    """E[x0 | x] for data N(mean, std^2)."""
    return mean + signal * std**2 * (x - signal * mean) / (signal**2 * std**2 + noise**2)


def mixture(x: Floats, signal: float, noise: float) -> Floats:
    """E[x0 | x] for data of two equal parts N(-0.7, 0.25^2) and N(0.6, 0.25^2)."""
    means, std = (-0.7, 0.6), 0.25
    variance = signal**2 * std**2 + noise**2
    logs = np.stack([-((x - signal * m) ** 2) / (2 * variance) for m in means])
    weights = np.exp(logs - logs.max(0))
    parts = np.stack([gaussian(x, signal, noise, mean=m, std=std) for m in means])
    result: Floats = (weights * parts).sum(0) / weights.sum(0)
    return result


def output_of(path: Any, prediction: str, denoiser: Denoiser) -> Callable[[Floats, Any, float, float], Any]:
    """What a network returns that knows the denoiser: out(x, level, signal, noise) for one level."""

    def out(x: Floats, level: Any, signal: float, noise: float) -> Any:
        x0_x, x0_out = path.predict(prediction, np.array([level]))
        return (denoiser(x, signal, noise) - float(x0_x[0]) * x) / float(x0_out[0])

    return out


def walk_columns(
    table: sf.StepTable, denoiser: Denoiser, x: Floats, noise: Floats | None = None, dtype: Any = np.float64
) -> Floats:
    """x after every row, from the columns alone; ``noise`` [R, ...]."""
    return states(table, denoiser, x, noise, dtype)[-1]


def states(
    table: sf.StepTable, denoiser: Denoiser, x: Floats, noise: Floats | None = None, dtype: Any = np.float64
) -> list[Floats]:
    """The state after each row. The network's output is made of the denoiser, and goes through x0_x and x0_out."""
    signal, level_noise = table.pairs()
    history: list[Any] = [np.nan] * 3
    x = x.astype(dtype)
    found = []
    for i in range(len(table)):
        c = {name: table.column(name)[i].astype(dtype) for name in sf.kernels.COLUMNS}
        out = (denoiser(x, float(signal[i]), float(level_noise[i])) - c["x0_x"] * x) / c["x0_out"]
        x0 = np.clip(c["x0_x"] * x + c["x0_out"] * out.astype(dtype), -c["clip"], c["clip"])
        following = c["next_x0"] * x0 + c["next_x"] * x + c["next_out"] * out
        for name, entry in zip(HISTORY, history, strict=True):
            if c[name] != 0:
                following = following + c[name] * entry
        if c["sigma"] != 0 and noise is not None:
            following = following + c["sigma"] * noise[i].astype(dtype)
        if c["keep_x"] != 0 or c["keep_x0"] != 0:
            history = [c["keep_x"] * x + c["keep_x0"] * x0, *history[:2]]
        x = following
        found.append(x)
    return found


def moments(table: sf.StepTable, columns: dict[str, Floats], mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of what rows with these columns make of their noise, with the exact network.

    Every state is a constant and weights of the initial noise and of each row's, [2 + R]: the network is affine.
    """
    signal, level_noise = table.pairs()
    rows = len(table)
    x = np.zeros(2 + rows)
    x[1] = table.start_scales[0]
    history = [np.zeros(2 + rows)] * 3
    for i in range(rows):
        at_zero = float(gaussian(np.zeros(1), signal[i], level_noise[i], mean=mean, std=std)[0])
        slope = float(gaussian(np.ones(1), signal[i], level_noise[i], mean=mean, std=std)[0]) - at_zero
        x0 = slope * x
        x0[0] += at_zero
        c = {name: float(column[i]) for name, column in columns.items()}
        following = c["next_x0"] * x0 + c["next_x"] * x
        following = following + sum(c[name] * entry for name, entry in zip(HISTORY, history, strict=True))
        following[2 + i] += c["sigma"]
        if c["keep_x"] or c["keep_x0"]:
            history = [c["keep_x"] * x + c["keep_x0"] * x0, *history[:2]]
        x = following
    return float(x[0]), float(np.sqrt((x[1:] ** 2).sum()))
