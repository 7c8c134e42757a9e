"""Tables on a device: where they stand, who holds them, and who goes when room is needed."""

import numpy as np
import pytest
import torch

import stepfusion as sf
from stepfusion.execution.evaluator import Evaluator
from stepfusion.kernels import PARKED
from stepfusion.lanes.device_tables import DeviceTables
from stepfusion_testing.networks import smooth

SCHEDULE = sf.NoiseSchedule.linear()
CPU = torch.device("cpu")


def table(steps: int, eta: float = 0.0) -> sf.StepTable:
    return sf.ddim(SCHEDULE, steps, eta=eta)


@pytest.fixture
def store() -> DeviceTables:
    """Room for 31 rows."""
    return DeviceTables(Evaluator(smooth, labelled=False), CPU, 31)


def place(store: DeviceTables, given: sf.StepTable) -> int:
    """Hold a table for which there is room, and check that its rows are where they are said to be."""
    first = store.hold(given)
    assert first is not None
    where = slice(first, first + len(given))
    np.testing.assert_array_equal(store.coefficients[where].numpy(), given.coefficients.astype(np.float32))
    assert store.timesteps[where].tolist() == store.features[where].tolist() == given.timesteps.tolist()
    follows = [row + first if row != PARKED else PARKED for row in given.next_row.tolist()]
    assert store.next_row[where].tolist() == follows
    return first


def test_tables_stand_side_by_side_and_equal_ones_in_one_place(store: DeviceTables) -> None:
    assert [place(store, table(n)) for n in (10, 12, 9)] == [0, 10, 22]
    assert place(store, table(12)) == 10
    assert store.held == 3
    assert store.next_row[31] == PARKED, "the last row is the parked lanes'"


def test_who_is_held_stays(store: DeviceTables) -> None:
    place(store, table(16))
    assert store.hold(table(16, eta=1.0)) is None
    assert store.hold(table(32)) is None, "that never fits"
    place(store, table(16))
    store.release(table(16))
    assert store.hold(table(16, eta=1.0)) is None, "it was held twice"
    store.release(table(16))
    assert place(store, table(16, eta=1.0)) == 0


def test_who_was_held_longest_ago_goes_first(store: DeviceTables) -> None:
    first, second, third = (table(n) for n in (10, 11, 9))
    for one in (first, second, third, first):
        place(store, one)
    store.release_all()
    buffers = (store.coefficients.data_ptr(), store.features.data_ptr())
    assert place(store, table(8)) == 10, "in the place of the second"
    assert place(store, first) == 0
    assert place(store, third) == 21
    assert buffers == (store.coefficients.data_ptr(), store.features.data_ptr())


def test_room_for_more(store: DeviceTables) -> None:
    store.grow(100)
    assert store.capacity == 127
    assert place(store, table(100)) == 0


def test_a_runner_of_its_own_store_makes_room_by_itself() -> None:
    engine = sf.Engine(smooth, SCHEDULE, shape=(1, 2, 2), device="cpu")
    for steps in (3, 50, 4, 200, 50):
        fresh = sf.Engine(smooth, SCHEDULE, shape=(1, 2, 2), device="cpu")
        assert torch.equal(engine.sample(2, steps=steps), fresh.sample(2, steps=steps))


def test_digests_tell_tables_apart() -> None:
    tables = [table(10), table(11), table(10, eta=0.5), table(10, eta=1.0), sf.ddim_inversion(SCHEDULE, 10)]
    assert len({one.digest for one in tables}) == len(tables)
    assert table(10).digest == table(10).digest
