"""Rows of cold and warm starts: the images are compared, and a warm start that compiles is an error."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from stepfusion.bench import start
from stepfusion.bench.options import Options
from stepfusion.bench.rows import Row

COMPILING = "stepfusion: compiling the C++ sampling kernels, once on this machine\n"


def rows(first: start.Start, cache: Path) -> list[Row]:
    return list(start._rows("sample", first, cache, 2, "a model", "cpu", 5))


def test_a_cold_and_a_warm_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    seen: list[str] = []

    def first(environment: Mapping[str, str]) -> tuple[float, bytes, str]:
        assert not {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} & set(environment)
        seen.append(environment["STEPFUSION_CACHE"])
        is_cold = seen[-1] != str(tmp_path)
        assert not is_cold or not list(Path(seen[-1]).iterdir())
        return (8.0 if is_cold else 2.0), b"image", COMPILING if is_cold else ""

    cold, warm = rows(first, tmp_path)
    assert (cold.provider, cold.median_ms, cold.notes) == (
        "cold",
        8000.0,
        "empty caches; compiled 1 libraries or networks",
    )
    assert (warm.provider, warm.median_ms, warm.batch, warm.steps) == ("warm", 2000.0, 1, 5)
    assert [place == str(tmp_path) for place in seen] == [True, False, True, False, True]
    assert len(set(seen)) == 3, "each cold start has an empty folder of its own"


@pytest.mark.parametrize(
    ("images", "said", "error"),
    [
        ([b"one", b"two"], "", "a process with empty caches made another image"),
        ([b"one", b"one", b"two"], "", "a process with warm caches made another image"),
        ([b"one"], COMPILING, "a process with warm caches compiled: stepfusion: compiling the C++ sampling kernels"),
        (
            [b"one"],
            "stepfusion: compiled anew: the network\n",
            "a process with warm caches compiled: stepfusion: compiled",
        ),
    ],
)
def test_what_is_not_warm_or_not_equal_has_no_time(
    images: list[bytes], said: str, error: str, tmp_path: Path
) -> None:
    made = itertools.chain(images, itertools.repeat(images[-1]))
    (row,) = rows(lambda environment: (1.0, next(made), said), tmp_path)
    assert row.error is not None
    assert row.error.startswith(error)
    assert row.median_ms is None


def test_a_process_that_fails_is_an_error() -> None:
    with pytest.raises(start.StartError, match=r"a process failed: .*nowhere"):
        start._run(["sample", "nowhere"], {"PYTHONSAFEPATH": "1"})


def test_random_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="--model of start must be a bundled model or a model directory, got 'cifar10'"
    ):
        next(start.start_rows(Options(torch.device("cpu"), models=("cifar10",))))


@pytest.mark.soak
def test_all_three_are_measured() -> None:
    found = list(start.start_rows(Options(torch.device("cpu"), tiny=True)))
    assert [row.error for row in found] == [None] * len(found)
    assert {"first image: sample", "first image: serve"} <= {row.op for row in found}
    assert {row.provider for row in found} == {"cold", "warm"}
