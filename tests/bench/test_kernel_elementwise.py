"""What the kernel benchmark accepts of a peer: its tables' rounding, at every timestep, and nothing beyond."""

from __future__ import annotations

import pytest
import torch

from stepfusion.bench import kernel_elementwise
from stepfusion.bench.kernel_work import DIFFUSERS, REFERENCE, Set, Work
from stepfusion.bench.measure import difference

pytest.importorskip("diffusers")


@pytest.fixture
def work() -> Work:
    works = kernel_elementwise.elementwise(torch.device("cpu"), [(1000, 1, 4, 4)])
    return next(w for w in works if w.op == "q_sample, noise given")


def at_every_timestep(work: Work) -> Set:
    """Inputs with all 1,000 timesteps, and with the largest normal that Box-Muller makes of 32 bits."""
    s = work.make()
    return {**s, "t": torch.arange(1000), "noise": torch.full_like(s["noise"], 6.66)}


def test_peers_q_sample_is_accepted_at_every_timestep(work: Work) -> None:
    s = at_every_timestep(work)
    assert work.limits[DIFFUSERS].holds(difference(work.runs[DIFFUSERS](s, True), work.runs[REFERENCE](s, True)))


def test_another_timestep_is_not_accepted(work: Work) -> None:
    s = at_every_timestep(work)
    truth = work.runs[REFERENCE](s, True)
    s["t"] = (s["t"] + 1).clamp(max=999)
    assert not work.limits[DIFFUSERS].holds(difference(work.runs[DIFFUSERS](s, True), truth))


def test_ours_are_held_to_their_own_rounding(work: Work) -> None:
    assert set(work.limits) == {DIFFUSERS}
    assert work.limits[DIFFUSERS].allowed > work.limit.allowed
