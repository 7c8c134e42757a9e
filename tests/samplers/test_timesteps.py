"""Which timesteps a sampler visits: all step counts, all spacings, and what peers do instead."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.timesteps import SPACINGS, given, largest_offset, spaced
from stepfusion_testing.guided_diffusion_formulas import sections

pytest.importorskip("diffusers")

from diffusers import DDPMScheduler

T = 1000
COUNTS = range(1, T + 1)


def trailing_of_diffusers(count: int) -> np.ndarray[Any, Any]:
    return np.round(np.arange(T, 0, -T / count)).astype(np.int64) - 1


@pytest.mark.parametrize("compat", [None, "guided-diffusion"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_gives_that_many_decreasing_timesteps(spacing: str, compat: str | None) -> None:
    for count in COUNTS:
        visits = spaced(T, count, spacing, compat=compat)
        assert visits.dtype == np.int64
        assert len(visits) == count
        assert (np.diff(visits) < 0).all()
        assert 0 <= visits[-1] <= visits[0] < T


@pytest.mark.parametrize(
    ("spacing", "count", "expected"),
    [
        ("leading", 4, [750, 500, 250, 0]),
        ("leading", 3, [999, 500, 0]),
        ("leading", 7, [994, 828, 663, 497, 331, 166, 0]),
        ("trailing", 4, [999, 749, 499, 249]),
        ("trailing", 3, [999, 666, 332]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("linspace", 3, [999, 500, 0]),  # 499.5 rounds to the even neighbour
        ("leading", 1, [999]),
        ("trailing", 1, [999]),
        ("linspace", 1, [999]),
    ],
)
def test_known_lists(spacing: str, count: int, expected: list[int]) -> None:
    assert spaced(T, count, spacing).tolist() == expected


@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_timesteps(spacing: str) -> None:
    assert spaced(T, T, spacing).tolist() == list(range(999, -1, -1))
    assert spaced(1, 1, spacing).tolist() == [0]


@pytest.mark.parametrize("compat", [None, "diffusers"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_equal_to_diffusers_for_every_count(spacing: str, compat: str | None) -> None:
    """Trap 5: but for the 62 counts at which its trailing list runs on to t = -1, and those that start too low."""
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    for count in COUNTS:
        scheduler.set_timesteps(count)
        theirs = scheduler.timesteps.tolist()
        low = count == 1 if spacing == "linspace" else count == 1 or T % count != 0
        if len(theirs) != count:
            assert spacing == "trailing"
            assert theirs[-1] == -1
            assert spaced(T, count, spacing).tolist() == theirs[:-1]
        elif compat is None and spacing != "trailing" and low:
            assert spaced(T, count, spacing)[0] > theirs[0]
        else:
            assert spaced(T, count, spacing, compat=compat).tolist() == theirs


@pytest.mark.parametrize("total", [1000, 997, 100, 12, 2])
def test_leading_reaches_where_song_et_als_range_ends(total: int) -> None:
    for count in range(2, total + 1):
        for offset in {0, 1, largest_offset(total, count)} & set(range(largest_offset(total, count) + 1)):
            visits = spaced(total, count, steps_offset=offset)
            assert visits[0] == max(range(offset, total, total // count))
            assert visits[-1] == offset
            assert len(visits) == count
            assert (np.abs(np.diff(visits) + (visits[0] - offset) / (count - 1)) < 1).all()


def test_leading_of_peers_stops_below() -> None:
    """501 of 1000: peers take the lowest 501 timesteps, and a lone step of theirs takes t = 0."""
    assert spaced(T, 501)[[0, 1, -1]].tolist() == [999, 997, 0]
    for compat in ("diffusers", "guided-diffusion"):
        assert spaced(T, 501, compat=compat).tolist() == list(range(500, -1, -1))
        assert spaced(T, 1, compat=compat).tolist() == spaced(T, 1, "linspace", compat=compat).tolist() == [0]
        assert spaced(T, 1, compat=compat, steps_offset=3).tolist() == [3]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("total", "offset"), [(1000, 0), (1000, 7), (3, 2), (1, 0)])
def test_a_single_step_starts_from_noise(spacing: str, total: int, offset: int) -> None:
    assert spaced(total, 1, spacing, steps_offset=offset).tolist() == [total - 1]


def test_counts_that_diffusers_gets_wrong_are_refused_in_its_name() -> None:
    wrong = [count for count in COUNTS if len(trailing_of_diffusers(count)) != count]
    assert len(wrong) == 62
    assert wrong[:3] == [61, 103, 121]
    for count in wrong:
        message = (
            f"steps = {count} with spacing 'trailing' is a count for which diffusers makes {count + 1} timesteps, "
            "the last one -1: use another count, or compat=None"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            spaced(T, count, "trailing", compat="diffusers")


def test_guided_diffusion_rounds_a_running_sum() -> None:
    """Trap 5: that differs from linspace for 278 of the counts 2 .. 1000."""
    different = 0
    for count in COUNTS:
        visits = spaced(T, count, "linspace", compat="guided-diffusion").tolist()
        assert visits == sections(T, count)[::-1]
        different += visits != spaced(T, count, "linspace", compat="diffusers").tolist()
    assert different == 278


def test_strided_lists_of_guided_diffusion_exist_for_62_counts() -> None:
    """Trap 5: "ddimN", the smallest stride with N timesteps, is leading where N divides T, another list elsewhere."""
    strided = {len(range(0, T, stride)): list(range(0, T, stride))[::-1] for stride in range(T - 1, 0, -1)}
    assert len(strided) == 62
    for count, visits in strided.items():
        assert (spaced(T, count, compat="diffusers").tolist() == visits) == (T % count == 0)


@pytest.mark.parametrize(("count", "offset"), [(50, 1), (50, 19), (7, 5), (3, 0), (500, 1)])
def test_offset_is_added(count: int, offset: int) -> None:
    assert spaced(T, count, steps_offset=offset).tolist() == (spaced(T, count) + offset).tolist()


@pytest.mark.parametrize(
    ("count", "offset", "reached"), [(1000, 1, 1000), (50, 20, 1000), (2, 999, 1499), (501, 500, 1000)]
)
def test_offset_beyond_the_schedule_is_refused(count: int, offset: int, reached: int) -> None:
    message = f"steps_offset = {offset} with steps = {count} reaches timestep {reached}, beyond T - 1 = 999"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        spaced(T, count, steps_offset=offset)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda v: np.array(v, dtype=np.uint16)])
def test_given_lists_are_taken_as_they_are(kind: Any) -> None:
    visits = given(T, kind([999, 500, 499, 3]))
    assert visits.dtype == np.int64
    assert visits.tolist() == [999, 500, 499, 3]


def test_a_given_list_is_copied() -> None:
    mine = np.array([9, 5])
    given(T, mine)[0] = 7
    assert mine[0] == 9


@pytest.mark.parametrize(
    ("timesteps", "error", "message"),
    [
        ([], ValueError, "timesteps must be a non-empty list of integers, got shape [0]"),
        (7, ValueError, "timesteps must be a non-empty list of integers, got shape []"),
        ([[1, 0]], ValueError, "timesteps must be a non-empty list of integers, got shape [1, 2]"),
        ([2.0, 1.0], TypeError, "timesteps must be integers, got float64"),
        ([True, False], TypeError, "timesteps must be integers, got bool"),
        ([1000, 0], ValueError, "timesteps must lie in [0, 999], got 0 to 1000"),
        ([5, -1], ValueError, "timesteps must lie in [0, 999], got -1 to 5"),
        ([5, 3, 3, 1], ValueError, "timesteps must be strictly decreasing, got 3 followed by 3"),
        (np.array([5, 1, 3], np.uint8), ValueError, "timesteps must be strictly decreasing, got 1 followed by 3"),
    ],
)
def test_bad_lists_are_refused(timesteps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        given(NoiseSchedule.linear().num_timesteps, timesteps)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be in [1, 1000], got 0"),
        ({"steps": 1001}, ValueError, "steps must be in [1, 1000], got 1001"),
        ({"steps": 5.0}, TypeError, "steps must be an integer, got 5.0"),
        ({"steps": True}, TypeError, "steps must be an integer, got True"),
        ({"steps_offset": -1}, ValueError, "steps_offset must be in [0, 999], got -1"),
        ({"spacing": "even"}, ValueError,
         "spacing must be one of 'leading', 'trailing', 'linspace', got 'even'"),
        ({"num_train_timesteps": 0}, ValueError, "num_train_timesteps must be in [1, 1048576], got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        spaced(**{"num_train_timesteps": T, "steps": 10, **arguments})
