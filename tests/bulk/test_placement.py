"""Devices and launchers: what they say is checked before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepfusion.bulk import Placement
from stepfusion.bulk.placement import Launch
from stepfusion_testing.bulk_jobs import TINY, generate


@pytest.mark.parametrize("devices", ["", " ", ",", "cpu,", ",cpu", "cpu,,cpu", "cpu, "])
def test_devices_without_a_name_are_refused(devices: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate(f"{TINY} --out out", extra=["--devices", devices], status=1)
    wanted = f"stepfusion: --devices must be names of devices, separated by commas, got {devices!r}\n"
    assert capsys.readouterr().err == wanted
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("RANK=3 WORLD_SIZE=3 LOCAL_RANK=0", "RANK must be an integer in [0, 2], got '3'"),
        ("RANK=-1 WORLD_SIZE=3 LOCAL_RANK=0", "RANK must be an integer in [0, 2], got '-1'"),
        ("RANK=1 WORLD_SIZE=1 LOCAL_RANK=0", "RANK must be an integer in [0, 0], got '1'"),
        ("RANK=one WORLD_SIZE=3 LOCAL_RANK=0", "RANK must be an integer in [0, 2], got 'one'"),
        ("RANK= WORLD_SIZE=3 LOCAL_RANK=0", "RANK must be an integer in [0, 2], got ''"),
        ("RANK=1.0 WORLD_SIZE=3 LOCAL_RANK=0", "RANK must be an integer in [0, 2], got '1.0'"),
        ("RANK=\u0661 WORLD_SIZE=3 LOCAL_RANK=0", "RANK must be an integer in [0, 2], got '\u0661'"),
        ("RANK=0 WORLD_SIZE=0 LOCAL_RANK=0", "WORLD_SIZE must be an integer in [1, 65536], got '0'"),
        ("RANK=0 WORLD_SIZE=-3 LOCAL_RANK=0", "WORLD_SIZE must be an integer in [1, 65536], got '-3'"),
        ("RANK=0 WORLD_SIZE=9999999999999 LOCAL_RANK=0",
         "WORLD_SIZE must be an integer in [1, 65536], got '9999999999999'"),
        ("RANK=0 WORLD_SIZE=3 LOCAL_RANK=-1", "LOCAL_RANK must be an integer in [0, 2], got '-1'"),
        ("RANK=0 WORLD_SIZE=3 LOCAL_RANK=3", "LOCAL_RANK must be an integer in [0, 2], got '3'"),
        ("RANK=2 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK must be an integer in [0, 1], got '2'"),
        ("RANK=2 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=0",
         "LOCAL_WORLD_SIZE must be an integer in [1, 4], got '0'"),
        ("RANK=2 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8",
         "LOCAL_WORLD_SIZE must be an integer in [1, 4], got '8'"),
        ("RANK=2", "WORLD_SIZE is not set: a launcher sets RANK, WORLD_SIZE, LOCAL_RANK together"),
        ("WORLD_SIZE=2", "RANK is not set: a launcher sets RANK, WORLD_SIZE, LOCAL_RANK together"),
        ("RANK=0 WORLD_SIZE=2", "LOCAL_RANK is not set: a launcher sets RANK, WORLD_SIZE, LOCAL_RANK together"),
    ],
)  # fmt: skip
def test_what_a_launcher_may_not_say(
    environment: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for entry in environment.split(" "):
        monkeypatch.setenv(*entry.split("="))
    generate(f"{TINY} --out out", status=1)
    assert capsys.readouterr().err == f"stepfusion: {message}\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"LOCAL_RANK": "3"}, None),
        ({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}, Launch(2, 3, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(0, 4, 1, 2)),
    ],
)
def test_what_a_launcher_says(environment: dict[str, str], launch: Launch | None) -> None:
    assert Launch.here(environment) == launch


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"devices": ()}, ValueError, r"devices must be a sequence of names of devices, got \(\)"),
        ({"devices": ("",)}, ValueError, "devices must be a sequence of names of devices"),
        ({"devices": "cpu"}, ValueError, "devices must be a sequence of names of devices, got 'cpu'"),
        ({"devices": (0,)}, ValueError, "devices must be a sequence of names of devices"),
        ({"rank": 2, "world": 2}, ValueError, r"rank must be in \[0, 1\], got 2"),
        ({"rank": -1, "world": 2}, ValueError, r"rank must be in \[0, 1\], got -1"),
        ({"rank": True, "world": 2}, TypeError, "rank must be an integer, got True"),
        ({"world": 0}, ValueError, r"world must be in \[1, 65536\], got 0"),
        ({"ray": "auto", "workers": 0}, ValueError, r"workers must be in \[1, 65536\], got 0"),
        ({"ray": ""}, ValueError, "ray must be the address of a cluster"),
        (
            {"ray": "auto", "devices": ("cpu", "cpu")},
            ValueError,
            "ray must be the address of a cluster, with one kind",
        ),
        ({"ray": "auto", "world": 2}, ValueError, "ray must be the address of a cluster, with one kind"),
    ],
)
def test_a_placement_that_cannot_be(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Placement(**fields)


def test_every_unit_is_of_one_rank() -> None:
    ranks = [Placement(rank=rank, world=3) for rank in range(3)]
    assert all(sum(rank.mine(unit) for rank in ranks) == 1 for unit in range(100))
