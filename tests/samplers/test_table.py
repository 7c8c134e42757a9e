"""What a table must be: rows that a lane walks once, and then is done."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import stepfusion as sf

LINEAR = sf.NoiseSchedule.linear(100)
ONE, TWO = sf.ddim(LINEAR, 4), sf.StepTable.concatenate([sf.ddim(LINEAR, 4), sf.ddpm(LINEAR, 3)])


def rows(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


WALKS: dict[str, tuple[sf.StepTable, np.ndarray[Any, Any], str]] = {
    "a cycle": (ONE, rows(1, 2, 3, 0), "after row 3 comes -1, got 0"),
    "a row that follows itself": (ONE, rows(1, 1, 3, -1), "after row 1 comes 2, got 1"),
    "a cycle in the middle": (ONE, rows(1, 2, 1, -1), "after row 2 comes 3, got 1"),
    "an early end": (ONE, rows(1, -1, 3, -1), "after row 1 comes 2, got -1"),
    "a row left out": (ONE, rows(1, 3, 3, -1), "after row 1 comes 2, got 3"),
    "another order": (ONE, rows(2, 3, 1, -1), "after row 0 comes 1, got 2"),
    "into the next sampler": (TWO, rows(1, 2, 3, 4, 5, 6, -1), "after row 3 comes -1, got 4"),
    "back into the one before": (TWO, rows(1, 2, 3, -1, 5, 6, 0), "after row 6 comes -1, got 0"),
}


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_that_is_not_through_the_rows_is_refused(name: str) -> None:
    """A table of which the rows form a cycle made images, of a lane that was taken out by counting."""
    table, next_row, message = WALKS[name]
    whole = f"next_row must lead through the rows of each sampler once, and then be -1: {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(whole)}$"):
        replace(table, next_row=next_row)


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        ((), ValueError, "starts must rise from 0 and stay below 7 rows, got []"),
        ((-1, 4), ValueError, "starts must rise from 0 and stay below 7 rows, got [-1, 4]"),
        ((1, 4), ValueError, "starts must rise from 0 and stay below 7 rows, got [1, 4]"),
        ((0, 7), ValueError, "starts must rise from 0 and stay below 7 rows, got [0, 7]"),
        ((0, 0), ValueError, "starts must rise from 0 and stay below 7 rows, got [0, 0]"),
        ((0, 5, 4), ValueError, "starts must rise from 0 and stay below 7 rows, got [0, 5, 4]"),
        ((0, 3), ValueError, "next_row must lead through the rows of each sampler once"),
        ((0,), ValueError, "next_row must lead through the rows of each sampler once"),
        ([0, 4], TypeError, "starts must be a tuple of integers, got [0, 4]"),
        ((0, 4.0), TypeError, "starts must be a tuple of integers, got (0, 4.0)"),
        ((False, 4), TypeError, "starts must be a tuple of integers, got (False, 4)"),
        (0, TypeError, "starts must be a tuple of integers, got 0"),
    ],
)
def test_bad_starts_are_refused(starts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        replace(TWO, starts=starts)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"next_row": rows(1, 2, 3, 4)}, ValueError, "next_row must lie in [-1, 3], got [1, 2, 3, 4]"),
        ({"next_row": rows(1, 2, 3, -2)}, ValueError, "next_row must lie in [-1, 3], got [1, 2, 3, -2]"),
        ({"next_row": ONE.next_row.astype(float)}, TypeError, "next_row must be an array of int64, got float64"),
        ({"next_row": [1, 2, 3, -1]}, TypeError, "next_row must be an array of int64, got list"),
        ({"timesteps": ONE.timesteps.astype(np.int32)}, TypeError, "timesteps must be an array of int64, got int32"),
        ({"timesteps": ONE.timesteps[None]}, ValueError, "timesteps must be one-dimensional, got shape [1, 4]"),
        (
            {"coefficients": ONE.coefficients.astype(np.float32)},
            TypeError,
            "coefficients must be an array of float64",
        ),
        ({"schedule": "linear"}, TypeError, "schedule must be a NoiseSchedule or another path, got str"),
        ({"prediction": "eps"}, ValueError, "prediction must be one of"),
        ({"learned_variance": 1}, TypeError, "learned_variance must be True or False, got 1"),
    ],
)
def test_fields_of_another_kind_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        replace(ONE, **fields)
    assert str(caught.value).startswith(message)


def test_what_samplers_make_is_accepted_again() -> None:
    for table in (ONE, TWO, TWO.concatenate([TWO, ONE]), ONE.last(2), sf.ddim(LINEAR, 1)):
        again = replace(table)
        assert (again.digest, again.starts) == (table.digest, table.starts)
