"""The history of the table walker, the scale of what the network is shown, and guidance as rows have it."""

from __future__ import annotations

import pytest
import torch

from stepfusion import kernels
from stepfusion.kernels import coefficients as algebra
from stepfusion.kernels import reference
from stepfusion_testing.fused import Fused
from stepfusion_testing.twins import StepCase, assert_rounded_alike, assert_same_bits, assert_within, outputs

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, for inf * 0

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _without(given: dict[str, torch.Tensor], *columns: str) -> dict[str, torch.Tensor]:
    """The same arguments, these columns of the table being 0."""
    table = given["coefficients"].clone()
    table[:, [algebra.COLUMNS.index(name) for name in columns]] = 0.0
    return {**given, "coefficients": table}


@pytest.mark.parametrize("entries", [0, 1, 2])
def test_what_is_not_in_the_history_is_left_out(entries: int, implementation: Fused) -> None:
    """Nothing is read for it, and the others come from where they are."""
    step = implementation.ops.diffusion_step
    given = StepCase((7,), torch.float32, "none", history=3, rows=(0, 1)).arguments(implementation.device)
    less = {name: tensor for name, tensor in given.items() if name != "history"}
    if entries:
        less["history"] = given["history"][:entries].clone()
    bare = outputs(step, less)["x_next"]
    assert_same_bits("x_next", bare, outputs(step, _without(given, *algebra.HISTORY[entries:]))["x_next"])
    assert not torch.equal(outputs(step, given)["x_next"][1], bare[1])


@pytest.mark.parametrize("entries", [1, 2, 3])
def test_a_history_is_shifted_by_rows_that_keep_something(entries: int, implementation: Fused) -> None:
    """And by no other row; a lane that is parked keeps its own."""
    step = implementation.ops.diffusion_step
    case = StepCase((1030,), torch.float32, "drawn", history=entries, rows=(3, 1, kernels.PARKED, 2))
    given = case.arguments(implementation.device)
    got = outputs(step, given)
    before, after = given["history"].cpu(), got["history"]
    assert_same_bits("without a row that keeps", after[:, [1, 2]], before[:, [1, 2]])
    assert_same_bits("one further", after[1:, [0, 3]], before[:-1, [0, 3]])
    table, x = given["coefficients"].cpu(), given["x"].cpu()
    for lane, row in ((0, 3), (3, 2)):
        keep_x, keep_x0 = (table[row, algebra.COLUMNS.index(name)] for name in ("keep_x", "keep_x0"))
        assert_same_bits("what is kept", after[0, lane], keep_x * x[lane] + keep_x0 * got["x0"][lane])


@pytest.mark.parametrize("column", ["keep_x", "keep_x0"])
def test_one_weight_is_enough_to_keep_something(column: str, implementation: Fused) -> None:
    given = StepCase((9,), torch.float32, "none", history=2, rows=(3, 2)).arguments(implementation.device)
    got = outputs(implementation.ops.diffusion_step, _without(given, column))
    assert_same_bits("one further", got["history"][1], given["history"][0].cpu())
    assert got["history"][0].isfinite().all()


def test_a_history_that_is_not_weighed_is_not_read(implementation: Fused) -> None:
    step = implementation.ops.diffusion_step
    given = StepCase((1030,), torch.float32, "drawn", history=3, rows=(3, 1)).arguments(implementation.device)
    plain = {name: tensor for name, tensor in given.items() if name != "history"}
    for age, name in enumerate(algebra.HISTORY):
        poisoned = _without({**given, "history": given["history"].clone()}, name)
        clean = outputs(step, poisoned)
        poisoned["history"][age] = torch.nan
        got = outputs(step, poisoned)
        for output in plain.keys() & got.keys():
            assert_same_bits(output, got[output], clean[output])
    unweighed = _without(given, *algebra.HISTORY)
    unweighed["history"][:] = torch.nan
    got = outputs(step, unweighed)
    for output, tensor in outputs(step, plain | {"coefficients": unweighed["coefficients"]}).items():
        assert_same_bits(output, got[output], tensor)
    assert got["history"][0, 0].isfinite().all()


@pytest.mark.parametrize("entries", [1, 2, 3])
def test_lanes_with_and_without_a_history_stand_side_by_side(entries: int, implementation: Fused) -> None:
    """Each has the bits that it has alone."""
    step = implementation.ops.diffusion_step
    case = StepCase((3, 7, 7), torch.float32, "drawn", history=entries, rows=(3, 0, 1, 2, kernels.PARKED))
    given = case.arguments(implementation.device)
    together = outputs(step, given)
    for lane in range(len(case.rows)):
        alone = {n: t for n, t in given.items() if n in ("coefficients", "timesteps")}
        alone |= {n: t[lane : lane + 1].clone() for n, t in given.items() if n not in (*alone, "history")}
        alone["history"] = given["history"][:, lane : lane + 1].clone()
        for name, tensor in outputs(step, alone).items():
            want = together[name][:, lane] if name == "history" else together[name][lane]
            assert_same_bits(name, tensor[:, 0] if name == "history" else tensor[0], want)


def test_an_old_history_can_be_followed_by_hand(implementation: Fused) -> None:
    """Four rows that hand their x0 on, of which the last is what the three before it kept."""
    step, device = implementation.ops.diffusion_step, implementation.device
    table = torch.zeros(4, len(algebra.COLUMNS), device=device)
    columns = {"x0_out": 1.0, "clip": torch.inf, "keep_x0": 1.0, "net_scale": 1.0}
    for name, value in columns.items():
        table[:, algebra.COLUMNS.index(name)] = value
    for name, value in zip(algebra.HISTORY, (1.0, 10.0, 100.0), strict=True):
        table[3, algebra.COLUMNS.index(name)] = value
    history = torch.full((3, 1, 5), torch.nan, device=device)
    x = torch.zeros(1, 5, device=device)
    for row, predicted in enumerate((1.0, 2.0, 3.0, 4.0)):
        at = torch.tensor([row], device=device)
        x = step(x, torch.full_like(x, predicted), at, table, torch.arange(4, device=device), history=history)
    assert x.tolist() == [[123.0] * 5]
    assert history[:, 0, 0].tolist() == [4.0, 3.0, 2.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 2])
def test_what_the_network_is_shown_is_scaled_in_float32(copies: int, dtype: torch.dtype, fused: Fused) -> None:
    given = StepCase((1030,), dtype, "drawn", copies=copies, rows=(1, 3)).arguments(fused.device)
    table = given["coefficients"].cpu()
    for step in (fused.ops.diffusion_step, reference.diffusion_step):
        got = outputs(step, given)
        scale = table[[1, 3], algebra.COLUMNS.index("net_scale")].view(-1, 1)
        shown = (scale * got["x_next"]).to(dtype).repeat(copies, 1)
        interpreted = fused.truncates and step is not reference.diffusion_step
        assert_rounded_alike("x_net", got["x_net"], shown, interpreted=interpreted)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_the_scale_leaves_the_state_alone(scale: float, implementation: Fused) -> None:
    step = implementation.ops.diffusion_step
    given = StepCase((33,), torch.float32, "drawn", copies=2, history=1, rows=(1, 3)).arguments(implementation.device)
    plain = outputs(step, given)
    given["coefficients"][:, algebra.COLUMNS.index("net_scale")] = scale
    got = outputs(step, given)
    for name in ("x_next", "x0", "history", "flags"):
        assert_same_bits(name, got[name], plain[name])
    assert_same_bits("x_net", got["x_net"], (scale * plain["x_next"]).repeat(2, 1))


def test_unguided_rows_take_the_conditional_output(implementation: Fused) -> None:
    """Exactly, even where the other output is not finite; guided lanes beside them are guided."""
    step = implementation.ops.diffusion_step
    case = StepCase((3, 5), torch.float32, "drawn", guidance=(7.5, 7.5), unguided=True, rows=(3, 1))
    given = case.arguments(implementation.device)
    guided = outputs(step, _without(given, "unguided"))
    alone = outputs(step, {name: t for name, t in given.items() if name not in ("out_uncond", "guidance")})
    given["out_uncond"][0] = torch.nan
    got = outputs(step, given)
    for name in ("x_next", "x0", "x_net", "flags"):
        assert_same_bits(name, got[name][0], alone[name][0])
        assert_same_bits(name, got[name][1], guided[name][1])
    assert not torch.equal(alone["x_next"][1], guided["x_next"][1])


def test_rescaled_guidance_is_for_the_reference(fused: Fused) -> None:
    case = StepCase((3, 5), torch.float32, "drawn", guidance=(3.0, 3.0), rows=(1, 2))
    given = case.arguments(fused.device)
    plain = outputs(fused.ops.diffusion_step, given)
    given["coefficients"][2, algebra.COLUMNS.index("rescale")] = 0.7
    got, want = outputs(fused.ops.diffusion_step, given), outputs(reference.diffusion_step, given)
    assert got["x_next"][1].isnan().all()
    assert want["x_next"].isfinite().all()
    for name in ("x_next", "x0"):
        assert_same_bits(name, got[name][0], plain[name][0])
        assert_same_bits(name, want[name][0], plain[name][0])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rescaled_guidance_follows_its_paper(dtype: torch.dtype, learned: bool) -> None:
    """Lin et al. 2024, equations 15 and 16, of guided lanes alone."""
    lanes = {"guidance": (7.5, 1.0, 2.0, -1.0, 7.5), "rows": (1, 1, 3, 2, 4), "unguided": True}
    given = StepCase((4, 5, 5), torch.float32, "none", learned=learned, **lanes).arguments(torch.device("cpu"))
    given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
    phi = torch.tensor([0.3, 0.7, 1.0, 0.4, 0.0], dtype=dtype)
    given["coefficients"][:, algebra.COLUMNS.index("rescale")] = phi
    cond, uncond = (given[name].double()[:, :4] for name in ("out", "out_uncond"))
    mixed = uncond + torch.tensor(lanes["guidance"]).double().view(-1, 1, 1, 1) * (cond - uncond)
    want = cond.clone()
    for lane, row in ((0, 1), (3, 2), (4, 4)):
        factor = cond[lane].numpy().std() / mixed[lane].numpy().std()
        want[lane] = phi[row] * mixed[lane] * factor + (1 - phi[row]) * mixed[lane]
    bare = {name: tensor for name, tensor in given.items() if name not in ("out_uncond", "guidance")}
    bare["out"] = torch.cat([want, given["out"].double()[:, 4:]], dim=1).to(dtype)
    got, expected = (outputs(reference.diffusion_step, arguments) for arguments in (given, bare))
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    for name in ("x_next", "x0"):
        assert_within(name, got[name], expected[name], bound)


def test_rescaled_guidance_of_a_constant_output() -> None:
    """It has no deviation to scale: it stays as it is."""
    given = StepCase((1,), torch.float32, "none", guidance=(3.0,), rows=(1,)).arguments(torch.device("cpu"))
    plain = outputs(reference.diffusion_step, given)
    given["coefficients"][:, algebra.COLUMNS.index("rescale")] = 1.0
    for name, tensor in outputs(reference.diffusion_step, given).items():
        assert_same_bits(name, tensor, plain[name])
