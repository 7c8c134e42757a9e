"""How many images fit: the arithmetic, and the copies that do not stop the host."""

from collections.abc import Callable

import pytest
import torch

from stepfusion.lanes.batch_size import largest_batch
from stepfusion.lanes.transfer import HostCopy, as_index, upload

GIB = 1 << 30


def linear(fixed: int, each: int) -> Callable[[int], int]:
    return lambda images: fixed + each * images


@pytest.mark.parametrize(
    ("fixed", "each", "free", "most", "batch"),
    [
        (0, GIB, 10 * GIB, 256, 8),
        (0, GIB, 9 * GIB, 256, 4),  # 7.2 fit: a fifth stays free
        (7 * GIB, GIB, 10 * GIB, 256, 1),
        (9 * GIB, GIB, 10 * GIB, 256, 1),  # nothing fits, and one is tried
        (0, 1000, 100 * GIB, 256, 256),
        (0, 1000, 100 * GIB, 100, 64),
        (0, 0, GIB, 32, 32),
    ],
)
def test_largest_batch(fixed: int, each: int, free: int, most: int, batch: int) -> None:
    assert largest_batch(linear(fixed, each), free, most) == batch


@pytest.mark.parametrize(("room", "batch"), [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 4)])
def test_a_trial_may_not_fit(room: int, batch: int) -> None:
    def peak(images: int) -> int:
        if images > room:
            raise torch.OutOfMemoryError("no room")
        return images * GIB

    assert largest_batch(peak, room * GIB) == batch


@pytest.mark.parametrize(
    ("positions", "kind"), [([0], slice), ([3, 4, 5], slice), ([3, 5], torch.Tensor), ([1, 0], torch.Tensor)]
)
def test_as_index(positions: list[int], kind: type) -> None:
    index = as_index(positions, torch.device("cpu"))
    assert isinstance(index, kind)
    assert torch.arange(9)[index].tolist() == positions


def test_copies_between_host_and_device() -> None:
    values = torch.arange(4)
    assert torch.equal(upload(values, torch.device("cpu")), values)
    assert torch.equal(HostCopy(values).wait(), values)
