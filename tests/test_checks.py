"""Requests for very many images: what is kept of them is small, and says the same of each image."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion._checks import Same, any_other, contexts, integers, numbers
from stepfusion.lanes.request import LaneStart

MANY = 3_000_000
HIGHEST = (1 << 64) - 1


def network(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return 0.1 * x + 0.01 * labels.view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def engine() -> sf.Engine:
    known = {"num_classes": 4, "null_label": 3, "shape": (1, 2, 2), "device": "cpu", "batch": 4}
    return sf.Engine(network, sf.NoiseSchedule.linear(100), **known)  # type: ignore[arg-type]


@contextmanager
def few_bytes(most: int) -> Iterator[None]:
    """AssertionError if Python and NumPy have more at any moment."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most


def test_the_first_pixels_of_millions_cost_what_those_of_a_few_cost(engine: sf.Engine) -> None:
    few = next(engine.generate(4, steps=1, seed=5))  # what is made once is made
    with few_bytes(1 << 20):
        many = next(engine.generate(MANY, steps=1, seed=5))
    assert torch.equal(many, few)


def test_parts_far_into_a_request_are_those_images(engine: sf.Engine) -> None:
    request = engine.request(MANY, steps=2, seed=7).part(MANY - 3, MANY)
    assert list(request.lane_starts) == [LaneStart(0, 7, index, 3, 1.0) for index in range(MANY - 3, MANY)]
    assert list(request.parts) == [0, 0, 0]
    assert request.first == MANY - 3


COLUMNS: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "one of each": lambda: {"seed": 3, "labels": 1, "guidance": 2.0},
    "range": lambda: {"indices": range(5, MANY + 5)},
    "tensors": lambda: {
        "seed": torch.arange(MANY),
        "indices": torch.arange(MANY, dtype=torch.int32),
        "labels": torch.zeros(MANY, dtype=torch.uint8),
        "guidance": torch.full((MANY,), 2.0),
    },
    "lists": lambda: {"labels": [2] * MANY, "seed": [1 << 60] * MANY},
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_no_object_is_kept_for_an_image(engine: sf.Engine, columns: Callable[[], dict[str, Any]]) -> None:
    options = columns()
    engine.request(3, steps=1)
    before = sys.getallocatedblocks()
    request = engine.request(MANY, steps=1, **options)
    assert sys.getallocatedblocks() - before < 10_000
    assert len(request) == MANY


def test_a_list_of_objects_for_each_image_is_noticed() -> None:
    """The control of the tests above."""
    gc.collect()  # else it may free what other tests left, in between
    before = sys.getallocatedblocks()
    kept = [LaneStart(0, 0, index) for index in range(20_000)]
    assert sys.getallocatedblocks() - before > 10_000
    with pytest.raises(AssertionError), few_bytes(1 << 20):
        kept += [LaneStart(0, 0, index) for index in range(20_000)]


def test_one_image_and_mask_for_all_are_kept_once(engine: sf.Engine) -> None:
    image, mask = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0, 1], [1, 0]]]])
    request = engine.request(MANY, steps=2, image=image, mask=mask, strength=0.5)
    for values in (request.known, request.image):
        assert values is not None
        assert values.shape == (MANY, 1, 2, 2)
        assert values.untyped_storage().nbytes() == 16
    few = engine.sample(3, steps=2, image=image, mask=mask, strength=0.5)
    each = engine.sample(3, steps=2, image=image.expand(3, -1, -1, -1), mask=mask.expand(3, -1, -1, -1), strength=0.5)
    assert torch.equal(few, each)


# The same values, however they are given


def ways(values: Sequence[int]) -> Iterator[Any]:
    """A list of integers in every form that is accepted."""
    yield list(values)
    yield tuple(values)
    yield [np.int64(value) for value in values]
    yield torch.tensor(values)
    yield torch.tensor([*values, 0])[: len(values)]
    yield torch.tensor([value for one in values for value in (one, 0)])[::2]


@pytest.mark.parametrize("values", [[], [0], [3, 1, 2], [2, 2, 2, 2]], ids=str)
def test_every_form_of_integers_is_the_same(values: list[int]) -> None:
    for given in ways(values):
        column = integers("labels", given, len(values), 0, 5)
        assert list(column) == values
        assert all(type(value) is int for value in column)
        assert list(column[1:3]) == values[1:3]
        assert list(reversed(column)) == values[::-1]


def test_what_is_kept_does_not_change_with_what_was_given() -> None:
    labels, mine = torch.tensor([1, 2]), [1, 2]
    columns = [integers("labels", given, 2, 0, 5) for given in (labels, mine)]
    vectors = torch.ones(2, 3)
    rows = contexts(vectors, 2)
    labels.zero_()
    mine.clear()
    vectors.zero_()
    assert [list(column) for column in columns] == [[1, 2], [1, 2]]
    assert list(rows) == [(1.0, 1.0, 1.0)] * 2


def test_ranges_and_unsigned_seeds() -> None:
    assert integers("indices", range(7, 1, -2), 3, 0, 9) == range(7, 1, -2)
    assert list(integers("indices", range(0), 0, 0, 9)) == []
    seeds = [0, HIGHEST, 1 << 63]
    for given in (seeds, torch.tensor(seeds, dtype=torch.uint64)):
        assert list(integers("seed", given, 3, 0, HIGHEST)) == seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_scales_are_floats(dtype: torch.dtype) -> None:
    scales = numbers("guidance", torch.tensor([1, 3], dtype=dtype), 2, 0.0, 10.0)
    assert list(scales) == [1.0, 3.0]
    assert all(type(scale) is float for scale in scales)
    assert any_other(scales, 1.0)
    assert not any_other(scales[:1], 1.0)
    assert list(numbers("guidance", [1, 2.5], 2, 0.0, 10.0)) == [1.0, 2.5]


@pytest.mark.parametrize("wrong", [-1, 6])
def test_the_first_that_is_wrong_is_named(wrong: int) -> None:
    for given in ways([0, wrong, 5, wrong * 3]):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\], got {wrong}$"):
            integers("labels", given, 4, 0, 5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (range(-1, 3), ValueError, r"must be in \[0, 5\], got -1"),
        (range(4, 8), ValueError, r"must be in \[0, 5\], got 6"),
        (range(9, 5, -1), ValueError, r"must be in \[0, 5\], got 9"),
        ([1, True, 2, 3], TypeError, "must be an integer, got True"),
        ([1, 2.0, 2, 3], TypeError, "must be an integer, got 2.0"),
        ([1, "2", 2, 3], TypeError, "must be an integer, got '2'"),
        (torch.tensor([True, False, True, True]), TypeError, "must be an integer, got True"),
        (torch.tensor([1.0, 2, 3, 4]), TypeError, r"must be an integer, got 1\.0"),
        (torch.zeros(4, 1, dtype=torch.int64), TypeError, r"must be an integer, got \[0\]"),
        ([1, 2, 3], ValueError, "must be one value or one for each of the 4 images, got 3"),
        (torch.zeros(5, dtype=torch.int64), ValueError, "one for each of the 4 images, got 5"),
    ],
    ids=str,
)
def test_wrong_integers(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^labels .*{message}"):
        integers("labels", given, 4, 0, 5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -0.5, 11.0])
def test_wrong_scales(wrong: float) -> None:
    for given in ([1.0, wrong], torch.tensor([1.0, wrong]), torch.tensor([wrong, 1.0]), wrong):
        with pytest.raises(ValueError, match=rf"guidance must be a finite number in \[0, 10\], got {wrong}"):
            numbers("guidance", given, 2, 0.0, 10.0)


def test_one_value_for_all_is_a_sequence() -> None:
    same = Same("a", 3)
    assert (list(same), len(same), same[-1], list(same[1:])) == (["a"] * 3, 3, "a", ["a"] * 2)
    for place in (3, -4):
        with pytest.raises(IndexError):
            same[place]
    assert not any_other(Same(2.0, 0), 1.0), "there is no image"
    assert any_other(Same(2.0, 1), 1.0)
