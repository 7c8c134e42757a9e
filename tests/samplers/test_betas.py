"""What may be given as betas, and one sentence for each thing that may not."""

from __future__ import annotations

import array
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stepfusion.errors import CheckpointError
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.scheduler_config import read_config

WANTED = NoiseSchedule.from_betas([0.125, 0.25])


@pytest.mark.parametrize(
    "betas",
    [
        (0.125, 0.25),
        [Fraction(1, 8), 0.25],
        [np.float32(0.125), np.float16(0.25)],
        [torch.tensor(0.125), np.array(0.25)],
        np.array([0.125, 0.25], dtype=np.float16),
        np.array([0.125, 0.25], dtype=np.longdouble),
        np.array([0.125, 0.25], dtype=object),
        np.ma.array([0.125, 0.25], mask=[False, False]),
        np.array([0.125, 0.5, 0.25])[::2],
        array.array("d", [0.125, 0.25]),
        torch.tensor([0.125, 0.25], dtype=torch.bfloat16),
        torch.tensor([0.125, 0.25], dtype=torch.float16),
        nn.Parameter(torch.tensor([0.125, 0.25]), requires_grad=False),
        nn.Parameter(torch.tensor([0.125, 0.25])).detach(),
    ],
    ids=lambda betas: f"{type(betas).__name__} {getattr(betas, 'dtype', '')}",
)
def test_numbers_are_taken_whatever_holds_them(betas: Any) -> None:
    assert NoiseSchedule.from_betas(betas) == WANTED


def test_a_tensor_is_copied() -> None:
    betas = torch.tensor([0.125, 0.25], dtype=torch.float64)
    schedule = NoiseSchedule(betas)
    betas[0] = 0.5
    assert schedule == WANTED


REFUSED: dict[str, tuple[Any, str]] = {
    "a string": ("0.1", "betas must be a sequence of numbers, got '0.1'"),
    "bytes": (b"0.1", "betas must be a sequence of numbers, got b'0.1'"),
    "strings": (["0.1", "0.2"], "betas must be real numbers, got betas[0] = '0.1'"),
    "a string among numbers": ([0.1, "0.2"], "betas must be real numbers, got betas[1] = '0.2'"),
    "an array of strings": (np.array(["0.1"]), "betas must be real numbers, got an array of <U3"),
    "an array of bytes": (np.array([b"0.1"]), "betas must be real numbers, got an array of |S3"),
    "an array of dates": (
        np.array(["2020-01-01"], "M8[D]"),
        "betas must be real numbers, got an array of datetime64[D]",
    ),
    "bools": ([True], "betas must be real numbers, got betas[0] = True"),
    "a bool among numbers": ([0.5, True], "betas must be real numbers, got betas[1] = True"),
    "an array of bools": (np.array([True]), "betas must be real numbers, got an array of bool"),
    "an object bool": (np.array([0.5, True], object), "betas must be real numbers, got betas[1] = True"),
    "a tensor of bools": (torch.tensor([True]), "betas must be real numbers, got a tensor of bool [1]"),
    "complex": ([0.1 + 0j], "betas must be real numbers, got betas[0] = (0.1+0j)"),
    "an array of complex": (np.array([0.1 + 1j]), "betas must be real numbers, got an array of complex128"),
    "a tensor of complex": (torch.tensor([0.1 + 0j]), "betas must be real numbers, got a tensor of complex64 [1]"),
    "a parameter": (
        nn.Parameter(torch.tensor([0.1, 0.2])),
        "betas must be constants, got a tensor that requires a gradient (float32 [2]): detach it",
    ),
    "a result of one": (
        nn.Parameter(torch.tensor([0.1])) * 0.5,
        "betas must be constants, got a tensor that requires a gradient (float32 [1]): detach it",
    ),
    "parameters in a list": (
        [nn.Parameter(torch.tensor(0.1))],
        "betas[0] must be constants, got a tensor that requires a gradient (float32 []): detach it",
    ),
    "a tensor without data": (
        torch.empty(2, device="meta"),
        "betas must be numbers, got a tensor that is sparse, quantised or without data (float32 [2])",
    ),
    "masked entries": (
        np.ma.array([0.1, 0.2], mask=[0, 1]),
        "betas must be numbers, got an array with masked entries",
    ),
    "none": (None, "betas must be a sequence of numbers, got None"),
    "none inside": ([None], "betas must be real numbers, got betas[0] = None"),
    "a number": (0.1, "betas must be a sequence of numbers, got 0.1"),
    "a dict": ({"a": 1}, "betas must be a sequence of numbers, got {'a': 1}"),
    "a set": ({0.1}, "betas must be a sequence of numbers, got {0.1}"),
    "an iterator": (iter([0.1]), "betas must be a sequence of numbers, got <"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_numbers_is_refused(name: str) -> None:
    betas, message = REFUSED[name]
    for make in (NoiseSchedule, NoiseSchedule.from_betas):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}") as caught:
            make(betas)
        assert "\n" not in str(caught.value)


def test_a_ragged_list_and_a_huge_integer_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^betas must be numbers: "):
        NoiseSchedule([[0.1], [0.2, 0.3]])
    with pytest.raises(ValueError, match=r"^betas must lie in \(0, 1\), .*, got betas\[0\] = 1000"):
        NoiseSchedule([10**400])
    with pytest.raises(ValueError, match=r"got shape \(1, 1\)$"):
        NoiseSchedule([torch.tensor([0.1])])


@pytest.mark.parametrize(
    ("config", "wanted", "got"),
    [
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 3}, 3, 2),
        ({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 2}, 2, 3),
        ({"trained_betas": np.full(500, 0.01).tolist(), "num_train_timesteps": 1000}, 1000, 500),
        ({"trained_betas": [0.1, 0.2]}, 1000, 2),
    ],
)
def test_trained_betas_have_the_length_of_the_training(config: dict[str, Any], wanted: int, got: int) -> None:
    message = f"trained_betas must have num_train_timesteps = {wanted} entries, got {got}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        NoiseSchedule.from_config(config)
    with pytest.raises(CheckpointError, match=f"^scheduler config: {message}$"):
        read_config(config)


@pytest.mark.parametrize("betas", ["0.1", [True, 0.1], [0.1, "0.2"], {"a": 0.1}, [[0.1]], [0.1, float("nan")]])
def test_trained_betas_of_another_kind_are_refused(betas: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^scheduler config: trained_betas"):
        read_config({"trained_betas": betas, "num_train_timesteps": 2})
