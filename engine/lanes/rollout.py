"""Rollouts: the states that images went through, and how probable each step was, for policy gradients.

A row with noise makes x_next ~ N(mean, std^2 I), so sampling is a Markov decision process whose policy is the network
(Black et al. 2023, section 4.3): state (x, row), action x_next, and the log-probability of the action in closed form.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor

from stepfusion.errors import CheckpointError
from stepfusion.files.atomic import atomic_write
from stepfusion.kernels.philox import normal_reference
from stepfusion.latents.tensor_file import TensorFile, read_tensors
from stepfusion.samplers.table import StepTable

_FORMAT = "stepfusion rollout 1"
_ALWAYS = ("images", "states", "logprobs", "seeds", "indices", "labels")  # in a file
_SOMETIMES = ("guidance", "noise")


@dataclass(frozen=True, eq=False)
class Rollout:
    """Images with the steps that made them; n images, K chosen rows of the table.

    ``rollout[lanes]`` is the same of some images: a slice, a list of places, or a bool or integer tensor. All tensors
    are on one device (:meth:`to`).

    Attributes:
        table: the rows that were walked.
        rows: the chosen ones, rising.
        images: float32 [n, C, H, W], the last states.
        states: float32 [S, n, C, H, W], the states before and after each chosen row, each once: K + 1 of them if the
            rows follow each other. Read by :meth:`state` and :meth:`next_state`.
        logprobs: float64 [K, n], the log-probability of each step in nats, summed over the elements of an image. Over
            C * H * W it is the mean that DDPO's code has.
        seeds, indices: int64 [n], what keyed the noise; seeds beyond 2**63 are negative.
        labels: int64 [n], or contexts float [n, K]; zeros for a model without labels.
        guidance: float32 [n], or None if no image was guided.
        conditions, null_conditions: tensors [n, ...] by name: what images were conditioned on beside labels, and what
            stood for none of it.
        noise: float32 [K, n, C, H, W] if it was given (:attr:`noises`), else None.
    """

    table: StepTable
    rows: tuple[int, ...]
    images: Tensor
    states: Tensor
    logprobs: Tensor
    seeds: Tensor
    indices: Tensor
    labels: Tensor
    guidance: Tensor | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    null_conditions: Mapping[str, Tensor] = field(default_factory=dict)
    noise: Tensor | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.states.device

    @property
    def noises(self) -> Tensor:
        """The z of every chosen row, float32 [K, n, C, H, W].

        As they were given; else drawn again from their counters, to the bits that the steps drew.
        """
        if self.noise is not None:
            return self.noise
        steps = torch.from_numpy(self.table.timesteps.copy()).to(self.device)
        shape = tuple(self.images.shape[1:])
        each = [normal_reference(self.seeds, self.indices, steps[row].expand(len(self)), shape) for row in self.rows]
        return torch.stack(each)

    def state(self, step: int) -> Tensor:
        """x before the row ``rows[step]``, float32 [n, C, H, W]."""
        return self.states[place_of(self.rows, self.rows[step])]

    def next_state(self, step: int) -> Tensor:
        """x after the row ``rows[step]``, float32 [n, C, H, W]."""
        return self.states[place_of(self.rows, self.rows[step]) + 1]

    def __getitem__(self, lanes: slice | Sequence[int] | Tensor) -> Rollout:
        if isinstance(lanes, int):
            raise TypeError(
                f"a rollout is indexed by a slice or a list of images, got {lanes}: use [{lanes}:{lanes + 1}]"
            )
        where = lanes if isinstance(lanes, slice) else torch.as_tensor(lanes, device=self.device)
        if isinstance(where, Tensor) and not where.numel():
            where = where.to(torch.int64)  # an empty list makes a tensor of floats
        return self._map(lambda name, x: x[:, where] if name in ("states", "logprobs", "noise") else x[where])

    def to(self, device: str | torch.device) -> Rollout:
        """The same with its tensors on a device."""
        return self._map(lambda name, x: x.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the table to a file, as safetensors.

        Raises:
            ValueError: the name does not end with ``.safetensors``. OSError: it cannot be written.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"path must be a file that ends in .safetensors, got {path}")
        tensors: dict[str, Tensor] = {}
        self._map(lambda name, x: tensors.setdefault(name, x.detach().cpu().contiguous()))
        rows = ",".join(map(str, self.rows))
        metadata = {"format": _FORMAT, "table": self.table.digest.hex(), "rows": rows}
        atomic_write(path, save({name: tensor.clone() for name, tensor in tensors.items()}, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], table: StepTable) -> Self:
        """Read what :meth:`save` wrote, onto the CPU; ``table`` is the one that was walked. No pickle is read.

        Raises:
            CheckpointError: it is missing, damaged, or no rollout. ValueError: it walked another table.
        """
        file = read_tensors(path)
        if file.metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is no rollout: its metadata must have format={_FORMAT!r}")
        if file.metadata.get("table") != table.digest.hex():
            raise ValueError(f"{path} walked another table than {table!r}: give the one of Rollout.table")
        return cls(table, **_checked(Path(path), file, table))

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> Rollout:
        """What ``function`` makes of every tensor and its name; those of conditions are ``conditions.NAME``."""
        changed: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                changed[one.name] = function(one.name, value)
            elif isinstance(value, Mapping):
                changed[one.name] = {name: function(f"{one.name}.{name}", x) for name, x in value.items()}
        return replace(self, **changed)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"Rollout({len(self)} images of {shape}, {len(self.rows)} rows of {self.table.name}, {self.device})"


def kept_states(rows: Sequence[int]) -> list[int]:
    """The states that these rows start from and lead to, by how many rows were walked before: each once, rising."""
    return sorted({state for row in rows for state in (row, row + 1)})


def place_of(rows: Sequence[int], row: int) -> int:
    """Where the state before a row stands among those that are kept; the one after it comes next."""
    return kept_states(rows).index(row)


def _checked(path: Path, file: TensorFile, table: StepTable) -> dict[str, Any]:
    """The fields of a rollout from a file, whose tensors fit each other."""
    tensors, rows = file.tensors, _rows(path, file, table)
    _check_tensors(path, tensors, rows)
    values: dict[str, Any] = {"rows": rows, "conditions": {}, "null_conditions": {}}
    for name, x in tensors.items():
        half, dot, condition = name.partition(".")
        if dot and half in ("conditions", "null_conditions"):
            values[half][condition] = x
        elif name in (*_ALWAYS, *_SOMETIMES):
            values[name] = x
        else:
            raise CheckpointError(f"{path} is damaged: a rollout has no {name!r}")
    return values


def _rows(path: Path, file: TensorFile, table: StepTable) -> tuple[int, ...]:
    """The chosen rows that a file names."""
    words = file.metadata.get("rows", "").split(",")
    rows = tuple(int(word) for word in words if word.isdecimal() and len(word) < 10)
    if not rows or len(rows) != len(words) or list(rows) != sorted(set(rows)) or rows[-1] >= len(table):
        raise CheckpointError(f"{path} is damaged: its rows must rise and lie in the table's {len(table)}")
    return rows


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], rows: Sequence[int]) -> None:
    """CheckpointError unless the tensors are there, and of shapes that fit each other."""
    shape = tuple(tensors["images"].shape) if "images" in tensors else ()
    n = shape[:1]
    wanted = {
        "images": (torch.float32, shape),
        "states": (torch.float32, (len(kept_states(rows)), *shape)),
        "logprobs": (torch.float64, (len(rows), *n)),
        "seeds": (torch.int64, n),
        "indices": (torch.int64, n),
        "guidance": (torch.float32, n),
        "noise": (torch.float32, (len(rows), *shape)),
    }
    for name in _ALWAYS:
        if name not in tensors:
            raise CheckpointError(f"{path} is damaged: it has no {name}")
    for name, x in tensors.items():
        dtype, expected = wanted.get(name, (x.dtype, (*n, *x.shape[1:])))
        if x.dtype != dtype or tuple(x.shape) != expected:
            raise CheckpointError(
                f"{path} is damaged: {name} must be {dtype} {list(expected)}, got {x.dtype} {list(x.shape)}"
            )
