"""Samplers on every path against closed forms: orders of convergence, moments, evaluations, EDM's own algorithms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stepfusion as sf
from stepfusion.kernels import COLUMNS
from stepfusion_testing import solvers
from stepfusion_testing.analytic import Floats, gaussian, mixture, moments, states, walk_columns

SIGMA, FLOW = sf.SigmaPath(0.02, 200.0), sf.FlowPath()
PATHS = {"sigma": SIGMA, "flow": FLOW}
X = np.linspace(-1.2, 1.1, 41)

#: The sampler, its options, and its order in theory. UniPC's corrector makes its order one more than its own (Zhao
#: et al. 2023, theorem 3.1).
ORDERS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "euler": (sf.euler, {}, 1),
    "ddim": (sf.ddim, {"clip": None}, 1),
    "dpmpp_1s": (sf.dpmpp_1s, {}, 1),
    "heun": (sf.heun, {}, 2),
    "dpmpp_2s": (sf.dpmpp_2s, {}, 2),
    "dpmpp_3s": (sf.dpmpp_3s, {}, 3),
    "dpmpp_2m": (sf.dpmpp_2m, {"lower_order_final": False}, 2),
    "dpmpp_2m heun": (sf.dpmpp_2m, {"lower_order_final": False, "solver_type": "heun"}, 2),
    "dpmpp_3m": (sf.dpmpp_3m, {"lower_order_final": False}, 3),
    "dpmpp_3m as published": (sf.dpmpp_3m, {"lower_order_final": False, "compat": "diffusers"}, 2),
    "unipc 1": (sf.unipc, {"order": 1, "lower_order_final": False}, 2),
    "unipc 2": (sf.unipc, {"order": 2, "lower_order_final": False}, 3),
    "unipc 2, bh1": (sf.unipc, {"order": 2, "variant": "bh1", "lower_order_final": False}, 3),
    "unipc 2, eps": (sf.unipc, {"order": 2, "predict_x0": False, "lower_order_final": False}, 3),
    "unipc 3": (sf.unipc, {"order": 3, "lower_order_final": False}, 4),
    "deis 1": (sf.deis, {"order": 1, "lower_order_final": False}, 1),
    "deis 2": (sf.deis, {"order": 2, "lower_order_final": False}, 2),
    "deis 3": (sf.deis, {"order": 3, "lower_order_final": False}, 3),
    "deis 4": (sf.deis, {"order": 4, "lower_order_final": False}, 4),
}


def even_in_lambda(path: Any, steps: int, low: float = -9.5, high: float = 3.5) -> dict[str, Any]:
    """Levels so noisy at first that x0 hardly moves there, where multistep solvers have lower orders."""
    lam = np.linspace(low, high, steps + 1)
    levels = np.exp(-lam) if isinstance(path, sf.SigmaPath) else 1 / (1 + np.exp(lam))
    return {"levels": levels[:-1], "final_level": float(levels[-1])}


def even_in_time(path: Any, steps: int) -> dict[str, Any]:
    """Levels whose steps are even in the variable that Adams' methods integrate over: sigma, or t."""
    levels = np.linspace(*((4.0, 0.05) if isinstance(path, sf.SigmaPath) else (0.98, 0.03)), steps + 1)
    return {"levels": levels[:-1], "final_level": float(levels[-1])}


def slope(errors: list[float], counts: list[int]) -> float:
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])


def errors_of(make: Any, path: Any, counts: list[int], grid: Any, limit: Floats, **options: Any) -> list[float]:
    x = X * (start_noise(path, grid))
    found = []
    for steps in counts:
        table = make(path, prediction="sample", **grid(path, steps), **options)
        found.append(float(np.sqrt(np.mean((walk_columns(table, mixture, x) - limit) ** 2))))
    return found


def start_noise(path: Any, grid: Any) -> float:
    return float(grid(path, 1)["levels"][0]) if isinstance(path, sf.SigmaPath) else 1.0


def limit_of(path: Any, grid: Any) -> Floats:
    """The flow's end, by a solver of fourth order in the very variable, with many steps."""
    levels = np.append(grid(path, 4000)["levels"], grid(path, 4000)["final_level"])
    return solvers.runge_kutta(mixture, X * start_noise(path, grid), levels, flow=isinstance(path, sf.FlowPath))


@pytest.fixture(scope="module")
def limits() -> dict[tuple[str, str], Floats]:
    return {
        (name, grid.__name__): limit_of(path, grid)
        for name, path in PATHS.items()
        for grid in (even_in_lambda, even_in_time)
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str, path: str, limits: dict[tuple[str, str], Floats]) -> None:
    make, options, order = ORDERS[name]
    counts = {1: [160, 320, 640], 2: [240, 480, 960], 3: [240, 480], 4: [480, 720, 1000]}[order]
    errors = errors_of(make, PATHS[path], counts, even_in_lambda, limits[path, "even_in_lambda"], **options)
    assert abs(slope(errors, counts) - order) < 0.2, errors


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [1, 2])
def test_order_of_adams_methods(order: int, path: str, limits: dict[tuple[str, str], Floats]) -> None:
    """With even steps in their own variable; a start of first order lets no more than the second be seen."""
    counts = [160, 320, 640]
    limit = limits[path, "even_in_time"]
    errors = errors_of(sf.ipndm, PATHS[path], counts, even_in_time, limit, order=order)
    assert abs(slope(errors, counts) - order) < 0.2, errors


@pytest.mark.parametrize("path", PATHS)
def test_higher_orders_of_adams_methods(path: str) -> None:
    """A polynomial of degree k - 1 in u is integrated without error by order k, once the history is filled."""
    for make, order in ((sf.ipndm, 3), (sf.ipndm, 4), (sf.plms, 4), (sf.plms, 3)):
        table = make(PATHS[path], order=order, prediction="sample", **even_in_time(PATHS[path], 12))
        signal, noise = table.pairs()
        scale = np.ones_like(signal)
        u = noise / scale
        end = even_in_time(PATHS[path], 12)["final_level"]
        u_after = np.append(u[1:], end)

        def derivative(time: Any, degree: int) -> Any:
            return np.asarray(time) ** degree

        for degree in range(order):
            # y at a level is given, and x0 = y - u d makes the network say d: the last rows must add the integral.
            history = [float(derivative(u[-1 - k], degree)) for k in range(order)]
            y = 0.3
            x0 = y - u[-1] * history[0]
            c = {name: float(table.column(name)[-1]) for name in COLUMNS}
            reached = c["next_x0"] * x0 + c["next_x"] * y
            reached += sum(
                c[name] * h for name, h in zip(("next_prev", "next_prev2", "next_prev3"), history[1:], strict=False)
            )
            want = y + (u_after[-1] ** (degree + 1) - u[-1] ** (degree + 1)) / (degree + 1)
            assert reached == pytest.approx(want, rel=1e-9), (make, order, degree)


def test_plms_starts_by_the_mean_of_two_slopes() -> None:
    """Its first two rows are one step of Heun's, whose rows are computed otherwise."""
    for path in PATHS.values():
        given = even_in_time(path, 8)
        x = X * start_noise(path, even_in_time)
        of_plms = states(sf.plms(path, prediction="sample", **given), mixture, x)[1]
        of_heun = states(sf.heun(path, prediction="sample", **given), mixture, x)[1]
        np.testing.assert_allclose(of_plms, of_heun, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [sf.euler, sf.heun, sf.dpmpp_2m, sf.unipc, sf.deis, sf.dpmpp_3m, sf.ipndm])
def test_one_flow_on_three_paths(make: Any) -> None:
    """Levels of equal signal-to-noise ratio, states of equal scale: the flow is one, and so is where it ends."""
    schedule = sf.NoiseSchedule.linear()
    visits = np.linspace(900, 20, 60).astype(np.int64)
    sigma = np.sqrt(1 / schedule.alphas_cumprod[visits] - 1)
    tables = [
        make(schedule, timesteps=visits, prediction="sample"),
        make(SIGMA, levels=sigma, prediction="sample"),
        make(FLOW, levels=sigma / (1 + sigma), prediction="sample"),
    ]
    ends = []
    for table in tables:
        signal, _ = table.pairs()
        ends.append(walk_columns(table, mixture, X * signal[0] * np.sqrt(1 + sigma[0] ** 2)))
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-10)  # rows are the same but for the scale of x
    np.testing.assert_allclose(ends[2], ends[1], atol=5e-2 if make in (sf.heun, sf.ipndm) else 1e-10)


# Stochastic samplers


@pytest.mark.parametrize(
    ("make", "path", "options", "tolerance"),
    [
        (sf.ddim, SIGMA, {"eta": 1.0, "clip": None}, 0.02),
        (sf.euler_ancestral, FLOW, {}, 0.01),
        (sf.euler_ancestral, SIGMA, {"eta": 0.5}, 0.02),
        (sf.dpmpp_2m_sde, SIGMA, {}, 0.004),
        (sf.dpmpp_2m_sde, FLOW, {"eta": 0.5}, 0.004),
        (sf.dpmpp_3m, SIGMA, {"eta": 1.0}, 0.004),
        (sf.flow_sde, FLOW, {}, 0.02),
        (sf.flow_sde, FLOW, {"eta": 0.3}, 0.01),
        (sf.heun, SIGMA, {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0}, 0.01),
        (sf.euler, SIGMA, {"s_churn": 40.0}, 0.04),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_moments_of_stochastic_samplers(make: Any, path: Any, options: dict[str, Any], tolerance: float) -> None:
    """With the exact network of N(0.4, 0.5^2) the moments follow from the columns, without a draw."""
    table = make(path, 200, prediction="sample", **options)
    assert table.stochastic
    mean, std = moments(table, {name: table.column(name) for name in COLUMNS}, 0.4, 0.5)
    assert mean == pytest.approx(0.4, abs=tolerance)
    assert std == pytest.approx(0.5, abs=tolerance)
    # Without the noise it has another variance: the noise is what keeps it.
    silent = {name: table.column(name) * (name != "sigma") for name in COLUMNS}
    assert abs(moments(table, silent, 0.4, 0.5)[1] - 0.5) > 2 * tolerance


def test_distilled_samplers_reach_the_data_in_one_step_of_a_perfect_network() -> None:
    """A network that knows x0 whatever the noise: every row gives it back."""
    for path in (SIGMA, FLOW, sf.NoiseSchedule.linear()):
        for make in (sf.consistency, sf.lcm, sf.tcd):
            for steps in (1, 4):
                table = make(path, steps, prediction="sample")
                assert len(table) == steps
                x0 = walk_columns(table, lambda x, a, s: np.full_like(x, 0.3), X, np.ones((steps, len(X))))
                np.testing.assert_allclose(x0, 0.3, atol=0.02 if make is sf.tcd and path.discrete else 1e-4)


# EDM


def test_edms_deterministic_sampler() -> None:
    """18 steps of algorithm 1: 35 evaluations."""
    table = sf.heun(sf.SigmaPath(), 18)
    assert len(table) == 35
    assert table.start_scales == pytest.approx((80.0,), rel=1e-14)
    x = 80.0 * X
    want = solvers.edm_sampler(lambda x, sigma: mixture(x, 1.0, sigma), x, np.zeros((18, 1)), steps=18)
    np.testing.assert_allclose(walk_columns(table, mixture, x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [(40.0, 0.05, 50.0, 1.003), (80.0, 0.05, 1.0, 1.007), (1e9, 0.0, np.inf, 1.0)])
def test_edms_stochastic_sampler(settings: tuple[float, float, float, float]) -> None:
    """Algorithm 2 with the paper's settings for CIFAR-10-like and other data (table 5), and the largest gamma."""
    churn, low, high, s_noise = settings
    steps, path = 18, sf.SigmaPath()
    table = sf.heun(path, steps, s_churn=churn, s_min=low, s_max=high, s_noise=s_noise)
    assert len(table) == 2 * steps - 1
    rng = np.random.default_rng(0)
    initial, noise = rng.standard_normal(X.shape), rng.standard_normal((steps, *X.shape))
    want = solvers.edm_sampler(
        lambda x, sigma: mixture(x, 1.0, sigma), 80.0 * initial, noise, steps=steps, churn=settings
    )
    # Ours has the noise of step i in the row before it, and that of step 0 in the start, as one draw of both.
    gamma = min(churn / steps, np.sqrt(2) - 1) if low <= 80.0 <= high else 0.0
    first = 80.0 * initial + 80.0 * np.sqrt((1 + gamma) ** 2 - 1) * s_noise * noise[0]
    assert table.start_scales[0] == pytest.approx(80.0 * np.sqrt(1 + s_noise**2 * ((1 + gamma) ** 2 - 1)))
    drawn = np.zeros((len(table), *X.shape))
    drawn[1::2] = noise[1:]
    np.testing.assert_allclose(walk_columns(table, mixture, first, drawn), want, rtol=0, atol=1e-11)
    assert len(set(table.timesteps[table.column("sigma") != 0].tolist())) == (table.column("sigma") != 0).sum()


def test_churn_of_eulers_method() -> None:
    """Algorithm 2 without its corrector; diffusers' EDMEulerScheduler asks the network before it adds the noise."""
    settings, steps, path = (40.0, 0.05, 50.0, 1.003), 18, sf.SigmaPath()
    table = sf.euler(path, steps, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    rng = np.random.default_rng(0)
    initial, noise = rng.standard_normal(X.shape), rng.standard_normal((steps, *X.shape))

    def denoise(x: Floats, sigma: float) -> Floats:
        return mixture(x, 1.0, sigma)

    want = solvers.edm_sampler(denoise, 80.0 * initial, noise, steps=steps, churn=settings, corrects=False)
    drawn = np.append(noise[1:], noise[:1], axis=0)  # the row before a step adds its noise; the first has none at 80
    np.testing.assert_allclose(walk_columns(table, mixture, 80.0 * initial, drawn), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("column", ["next_x0", "next_prev", "next_x", "keep_x0"])
def test_a_broken_coefficient_is_seen(column: str) -> None:
    """The control of the tests above: one weight that is off by 1 % moves the image by more than they allow."""
    table = sf.heun(sf.SigmaPath(), 18)
    broken = sf.StepTable.from_columns(
        "broken", "edm", table.schedule, table.timesteps,
        {name: table.column(name) * (1.01 if name == column else 1.0) for name in COLUMNS}, levels=table.levels,
    )  # fmt: skip
    difference = walk_columns(broken, mixture, 80.0 * X) - walk_columns(table, mixture, 80.0 * X)
    assert np.abs(difference).max() > 1e-4


# What all have


@pytest.mark.parametrize("path", [SIGMA, FLOW, sf.NoiseSchedule.linear()], ids=["sigma", "flow", "schedule"])
def test_evaluations_rows_and_histories(path: Any) -> None:
    from stepfusion.samplers.registry import make_table, samplers_of

    #: Rows for 10 steps, and the history that lanes need.
    wanted = {"heun": (19, 1), "plms": (11, 3), "ipndm": (10, 3), "unipc": (10, 2), "deis": (10, 2)}
    wanted |= {"dpmpp_2m": (10, 1), "dpmpp_2m_sde": (10, 1), "dpmpp_3m": (10, 2), "dpmpp_2s": (10, 1)}
    wanted |= {"dpmpp_3s": (10, 2)}
    for name in samplers_of(path):
        table = make_table(path, "sample", name, 10, defaults={})
        rows, history = wanted.get(name, (10, 0))
        assert (len(table), int(table.history)) == (rows, history), name
        assert table.edits
        assert np.isfinite(walk_columns(table, gaussian, X * table.start_scales[0])).all()


def test_guidance_options_fill_their_columns() -> None:
    table = sf.heun(SIGMA, 8, guidance_interval=(0.3, 5.0), guidance_rescale=0.7)
    _, noise = table.pairs()
    assert (table.column("unguided") == ((noise < 0.3) | (noise > 5.0))).all()
    assert 0 < table.column("unguided").sum() < len(table)
    assert (table.column("rescale") == 0.7).all()
    on_schedule = sf.ddim(sf.NoiseSchedule.linear(), 10, guidance_interval=(100, 500))
    assert on_schedule.column("unguided").tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    for make in (sf.ddpm, sf.dpmpp_2m, sf.euler_ancestral):
        assert make(sf.NoiseSchedule.linear(), 10, guidance_rescale=0.5).column("rescale").tolist() == [0.5] * 10
