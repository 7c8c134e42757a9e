"""DPM-Solver++: multistep solvers of the diffusion ODE, and of its SDE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from stepfusion import _checks
from stepfusion.kernels import coefficients as algebra
from stepfusion.samplers.data_prediction import data_step, noise_of_step
from stepfusion.samplers.grid import (
    Grid,
    GridOptions,
    complete_options,
    make_grid,
    prediction_of,
    row_options,
    schedule_levels,
)
from stepfusion.samplers.levels import Visits, ending_known
from stepfusion.samplers.levels import final_level as ends_at
from stepfusion.samplers.path import Path
from stepfusion.samplers.rows import RowWriter
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.table import StepTable

SOLVER_TYPES = ("midpoint", "heun")


def dpmpp_2m(
    schedule: Path,
    steps: int | None = None,
    *,
    lower_order_final: bool | None = None,
    solver_type: str = "midpoint",
    timesteps: Sequence[int] | Visits | None = None,
    levels: Sequence[float] | NDArray[Any] | None = None,
    spacing: str | None = None,
    steps_offset: int = 0,
    rho: float | None = None,
    prediction: str | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    sample_max_value: float = 1.0,
    final_alpha_cumprod: float | None = None,
    final_level: float | None = None,
    lambda_min_clipped: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
) -> StepTable:
    """DPM-Solver++(2M), a multistep solver of second order (Lu et al. 2022, algorithm 2): good images in 15 steps.

    With lambda = log(signal / noise) and h = lambda' - lambda, from a level with noise s to one with a', s':

        x' = s' / s x - a' (e^-h - 1) (x0 + h / (2 h_before) (x0 - x0_before))

    Its first row is of first order, and so is a last one that ends without noise, where h is infinite. It
    extrapolates from one row to the next, so rows should not grow in h: with spacings that reach down to t = 0
    ("leading", "linspace") the row before the last does, and a few steps of it may be worse than DDIM's.

    Args:
        solver_type: "midpoint", or "heun", which weighs the difference of the two x0 by
            a' ((e^-h - 1) / h + 1) in place of -a' (e^-h - 1) / 2 (as in diffusers).
        clip: None by default, as in the authors' code: if x0 reaches a clip, its difference to the row before says
            nothing of where it goes.
        lower_order_final: make the last row of first order too; by default with fewer than 15 steps, as the authors'
            code does.
        lambda_min_clipped: the noisiest level to visit, as lambda = log(signal / noise): ``steps`` are spaced over
            the timesteps from there down. By default -5.1, as in the authors' code, for networks that return epsilon,
            and no bound for others. With less signal than that, x0 is a small difference divided by a number that is
            almost 0, and what a bfloat16 network rounds stays in the image. The linear schedule of 1000 timesteps
            ends at -5.06 and is visited whole; the cosine schedule goes on to -9.9. ``-math.inf`` is no bound, and
            ``timesteps`` has none.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    solver_type = _checks.choice("solver_type", solver_type, SOLVER_TYPES)
    given: dict[str, Any] = {"timesteps": timesteps, "levels": levels, "spacing": spacing, "rho": rho}
    given |= {"steps_offset": steps_offset, "prediction": prediction, "clip": clip, "threshold": threshold}
    given |= {"sample_max_value": sample_max_value, "final_alpha_cumprod": final_alpha_cumprod}
    given |= {"final_level": final_level, "lambda_min_clipped": lambda_min_clipped}
    given |= {"guidance_interval": guidance_interval, "guidance_rescale": guidance_rescale}
    if isinstance(schedule, NoiseSchedule) and solver_type == "midpoint":
        return _on_schedule(schedule, steps, lower_order_final, complete_options(given))
    grid = make_grid(schedule, steps, given, bounded="epsilon")
    return _multistep("dpm-solver++ 2m", grid, 2, 0.0, solver_type, lower_order_final)


def _on_schedule(
    schedule: NoiseSchedule, steps: int | None, lower_order_final: bool | None, options: GridOptions
) -> StepTable:
    """:func:`dpmpp_2m` by alphas_cumprod."""
    prediction = prediction_of(schedule, options)
    visits, abar = schedule_levels(schedule, steps, options, "trailing", bounded="epsilon")
    bounds = row_options(options, visits)
    if lower_order_final is None:
        lower_order_final = len(visits) < 15
    lower_order_final = _checks.boolean("lower_order_final", lower_order_final)
    abar_prev = np.append(abar[1:], ends_at(schedule, options["final_alpha_cumprod"], abar.dtype))
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(np.append(abar, abar_prev[-1:]) / (1 - np.append(abar, abar_prev[-1:]))) / 2
    h = np.diff(half_log_snr)
    history = np.zeros(len(visits))
    history[1:] = h[1:] / (2 * h[:-1])
    if lower_order_final or abar_prev[-1] == 1:
        history[-1] = 0.0
    columns = algebra.dpmpp_2m(abar, abar_prev, history, prediction=prediction)
    columns["keep_x0"] = np.append(history[1:] != 0, False).astype(np.float64)  # only what the next row reads
    columns |= bounds
    return StepTable.from_columns("dpm-solver++ 2m", prediction, schedule, visits, ending_known(columns))


def dpmpp_2m_sde(
    path: Path,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool | None = None,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """DPM-Solver++(2M) of the diffusion SDE (Lu et al. 2022, section 5 and appendix D; k-diffusion's and diffusers').

    With k = (1 + eta) h,

        x' = s' / s e^(-eta h) x - a' (e^-k - 1) (x0 + h / (2 h_before) (x0 - x0_before))
             + s' sqrt(1 - e^(-2 eta h)) z

    Args:
        eta: how much noise: 1 is the SDE, 0 is :func:`stepfusion.dpmpp_2m`.
        solver_type: "midpoint", or "heun", as in :func:`stepfusion.dpmpp_2m` with k in place of h.
        lower_order_final: as in :func:`stepfusion.dpmpp_2m`.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _checks.choice("solver_type", solver_type, SOLVER_TYPES)
    eta = _checks.number("eta", eta, 0.0, 1.0)
    found = make_grid(path, steps, grid, bounded="epsilon")
    return _multistep(f"dpm-solver++ 2m sde, eta {eta:g}", found, 2, eta, solver_type, lower_order_final)


def dpmpp_3m(
    path: Path,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    lower_order_final: bool | None = None,
    compat: str | None = None,
    **grid: Unpack[GridOptions],
) -> StepTable:
    """DPM-Solver++(3M), a multistep solver of third order (Lu et al. 2022; k-diffusion's ``dpmpp_3m_sde``).

    With r0 = h_1 / h, r1 = h_2 / h of the two steps before, D0 = x0, d0 = (x0 - x0_1) / r0, d1 = (x0_1 - x0_2) / r1,
    D1 = d0 + r0 / (r0 + r1) (d0 - d1), D2 = (d0 - d1) / (r0 + r1):

        x' = s' / s x - a' (e^-h - 1) D0 + a' ((e^-h - 1) / h + 1) D1 - 2 a' ((e^-h - 1 + h) / h^2 - 1/2) D2

    The 2 is not in the authors' code nor in others that follow it; without it D2, half of the second derivative, has
    half its weight, and the solver is of second order. Its first rows are of first and second order, and so are its
    last ones with fewer than 15 steps.

    Args:
        eta: above 0, the SDE's form with so much noise, as in :func:`stepfusion.dpmpp_2m_sde`.
        lower_order_final: make the last two rows of second and of first order; by default with fewer than 15 steps.
        compat: "diffusers" leaves the 2 out; without noise alone.
        Others: :class:`stepfusion.samplers.grid.GridOptions`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    eta = _checks.number("eta", eta, 0.0, 1.0)
    if compat not in (None, "diffusers") or (compat and eta):
        raise ValueError(f"compat must be None, or 'diffusers' with eta = 0, got {compat!r} and eta = {eta:g}")
    found = make_grid(path, steps, grid, bounded="epsilon")
    name = "dpm-solver++ 3m" + (f" sde, eta {eta:g}" if eta else "")
    solver_type = "heun" if eta else "midpoint"
    return _multistep(name, found, 3, eta, solver_type, lower_order_final, bend_factor=1.0 if compat else 2.0)


def _multistep(
    name: str,
    grid: Grid,
    order: int,
    eta: float,
    solver_type: str,
    lower_order_final: bool | None,
    *,
    bend_factor: float = 2.0,
) -> StepTable:
    if lower_order_final is None:
        lower_order_final = len(grid) < 15
    lower_order_final = _checks.boolean("lower_order_final", lower_order_final)
    orders = step_orders(grid, order, lower_order_final)
    writer = RowWriter()
    for i, this_order in enumerate(orders):
        reached = data_step(grid, i, this_order, eta, solver_type, bend_factor=bend_factor)
        writer.add(reached, sigma=noise_of_step(grid, i, eta))
    return grid.table(name, writer.columns())


def step_orders(grid: Grid, order: int, lower_order_final: bool) -> list[int]:
    """The order of each step: it has as many evaluations before it as it needs, and levels where lambda is finite.

    Args:
        lower_order_final: the last step is of first order and the one before it at most of second.
    """
    steps = len(grid)
    first = 1 if np.isinf(grid.half_log_snr[0]) else 0
    orders = [max(1, min(order, i - first + 1)) for i in range(steps)]
    if lower_order_final:
        orders = [min(o, steps - i) for i, o in enumerate(orders)]
    if np.isinf(grid.half_log_snr[-1]):
        orders[-1] = 1
    return orders
