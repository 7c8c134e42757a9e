"""What the tests of bad input share: models that must not be called, directories to damage, and the checks."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import stepfusion as sf
from stepfusion.checkpoints.bundled import bundled_models
from stepfusion.files import atomic as files

NAN, INF = math.nan, math.inf


DEVICES = ", ".join(("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))))


MODELS = ", ".join(bundled_models()) or "none"


WEIGHTS = Path("model/unet/diffusion_pytorch_model.safetensors")


CALLS: list[str] = []  # who called a network


def network(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """A network that is never to be called."""
    CALLS.append("network")
    return x


LINEAR, COSINE = sf.NoiseSchedule.linear(100), sf.NoiseSchedule.cosine(100)


TABLE = sf.ddim(LINEAR, 4)


CPU = {"device": "cpu", "backend": "reference"}


ENGINE = sf.Engine(network, LINEAR, shape=(1, 4, 4), num_classes=3, null_label=2, **CPU)


NO_NULL = sf.Engine(network, LINEAR, shape=(1, 4, 4), num_classes=3, **CPU)


PLAIN = sf.Engine(network, LINEAR, shape=(1, 4, 4), **CPU)


DIFFUSION = sf.GaussianDiffusion(LINEAR, backend="reference")


X = torch.zeros(2, 1, 4, 4)  # two images


T = torch.zeros(2, dtype=torch.int64)


ROWS = torch.from_numpy(TABLE.coefficients.copy()).float()


TIMES = torch.from_numpy(TABLE.timesteps.copy())


LEVELS = torch.full((100,), 0.5)


NEXT = np.array([1, -1])


def engine(**arguments: Any) -> sf.Engine:
    """An engine made with ``arguments``."""
    return sf.Engine(network, LINEAR, **{"shape": (1, 4, 4), "num_classes": 3, **arguments})


def config_with(**changes: object) -> Callable[[], None]:
    """Change the network's config in the model directory."""
    return lambda: edit_json("model/unet/config.json", changes)


def scheduler_with(**changes: object) -> Callable[[], None]:
    """Change the scheduler's config in the model directory."""
    return lambda: edit_json("model/scheduler/scheduler_config.json", changes)


def facts_with(**changes: object) -> Callable[[], None]:
    """Change ``stepfusion.json`` in the model directory."""
    return lambda: edit_json("model/stepfusion.json", changes)


def edit_json(path: str, changes: dict[str, object]) -> None:
    """Write some keys of a JSON object anew."""
    Path(path).write_text(json.dumps({**json.loads(Path(path).read_text()), **changes}))


def weights_with(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[], None]:
    """Change the state dict in the model directory."""

    def prepare() -> None:
        state = load_file(WEIGHTS)
        edit(state)
        save_file(state, WEIGHTS)

    return prepare


def write(path: str | Path, data: bytes) -> Callable[[], object]:
    """Write a file of the model directory anew."""
    return lambda: Path(path).write_bytes(data)


def truncate() -> None:
    """Cut the weights in half."""
    WEIGHTS.write_bytes(WEIGHTS.read_bytes()[: WEIGHTS.stat().st_size // 2])


class Code:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def pickled_code(archive: bool) -> Callable[[], None]:
    """Put pickled code in the place of the weights: in a torch.save archive, or bare."""

    def prepare() -> None:
        WEIGHTS.unlink()
        path = WEIGHTS.with_suffix(".bin")
        torch.save({"conv_in.weight": Code()}, path) if archive else path.write_bytes(pickle.dumps(Code()))

    return prepare


@dataclass(frozen=True)
class Case:
    """``call`` raises ``error`` with ``message``, exactly; ``prepare`` spoils the model directory first."""

    name: str
    call: Callable[..., object]
    error: type[Exception]
    message: str
    prepare: Callable[[], object] | None = None


def tree() -> dict[str, bytes | None]:
    """Everything in the working directory, hidden files too."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def check(given: str, wanted: str) -> None:
    """One line, to the letter; up to "..." where another library's words follow."""
    assert "\n" not in given
    given = given.replace(os.getcwd(), "CWD")
    if wanted.endswith(" ..."):
        given = given[: len(wanted) - 4] + " ..."
    assert given == wanted


class FullFile(io.FileIO):
    """A file on a disk that has room for half of what is written."""

    def __init__(self, path: str, mode: str) -> None:
        super().__init__(path, mode.replace("b", ""))

    def write(self, data: bytes) -> int:
        super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing fails, half way."""
    monkeypatch.setattr(files, "open", FullFile, raising=False)


def full_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing succeeds, and the disk turns out to be full when the data must reach it."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def check_case(case: Case) -> None:
    """The call raises the case's error, of that very type and to the letter, and leaves the directory as it was."""
    if case.prepare is not None:
        case.prepare()
    before = tree()
    with pytest.raises(case.error) as caught:
        case.call()
    assert type(caught.value) is case.error
    check(str(caught.value), case.message)
    assert tree() == before
