"""Lanes and ticks: the loop that walks a table.

A lane is one image on its way. Everything about it lives on the device: its state x (float32), its row of the table,
its seed, index, label, guidance scale, and a flag that remembers the row at which it first became non-finite. A tick
moves every lane one row on: network, step, row. The
host never asks the device anything in between: it knows by counting when a lane is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from stepfusion import kernels
from stepfusion.kernels import FINITE, PARKED
from stepfusion.table import DeviceTable

Network = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Ticket:
    """What a lane needs to start: its first row, its identity, and its condition."""

    row: int
    seed: int
    index: int
    label: int = 0
    guidance: float = 1.0


class Runner:
    """``lanes`` lanes of images of one shape, walking one table on one device.

    ``network(x, timesteps[, labels])`` is called with x [lanes, ...] in ``dtype``; with ``null_label`` given, lanes
        are guided, and it is called for the
    labels and for the null label: at once on [2 lanes, ...], or one after the other with ``separate``, which keeps
        the batch size.
    """

    def __init__(
        self,
        network: Network,
        table: DeviceTable,
        shape: Sequence[int],
        lanes: int,
        *,
        dtype: torch.dtype,
        ops: ModuleType,
        labelled: bool = False,
        null_label: int | None = None,
        separate: bool = False,
        learned_variance: bool = False,
    ) -> None:
        self._network, self._table = network, table
        self._labelled, self._null_label, self._separate = labelled, null_label, separate
        self._learned = learned_variance
        self._ops = ops
        self._shape = tuple(shape)
        device = table.timesteps.device
        copies = 2 if null_label is not None and not separate else 1
        self.x = torch.zeros((lanes, *shape), device=device)
        self.x0 = torch.zeros_like(self.x)
        self._x_net = torch.zeros((copies * lanes, *shape), device=device, dtype=dtype)
        self._rows = torch.full((lanes,), PARKED, device=device)
        self._seeds = torch.zeros(lanes, dtype=torch.int64, device=device)
        self._indices = torch.zeros_like(self._seeds)
        self._labels = torch.zeros_like(self._seeds)
        self._guidance = torch.ones(lanes, device=device)
        self._flags = torch.full((lanes,), FINITE, device=device)

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return len(self.x)

    def admit(self, lanes: Sequence[int], tickets: Sequence[Ticket], start: torch.Tensor | None = None) -> None:
        """Put new images into free lanes, from ``start`` [k, ...] or from noise of their own."""
        device = self.x.device

        def column(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        where = column(list(lanes))
        seeds = column([as_int64(ticket.seed) for ticket in tickets])
        indices = column([ticket.index for ticket in tickets])
        if start is None:
            start = self._ops.normal(seeds, indices, torch.zeros_like(seeds), self._shape, kernels.STREAM_INITIAL)
        self.x[where] = start.to(device, torch.float32)
        for i in range(len(self._x_net) // len(self.x)):
            self._x_net[where + i * len(self.x)] = self.x[where].to(self._x_net.dtype)
        self._rows[where] = column([ticket.row for ticket in tickets])
        self._seeds[where], self._indices[where] = seeds, indices
        self._labels[where] = column([ticket.label for ticket in tickets])
        self._guidance[where] = torch.tensor([ticket.guidance for ticket in tickets], device=device)
        self._flags[where] = FINITE

    def tick(self, noise: torch.Tensor | None = None, *, keep_x0: bool = False) -> None:
        """Move every lane one row on.

        ``noise`` [lanes, ...] replaces the counter-based noise; ``keep_x0`` writes the predictions to ``x0``.
        """
        timesteps = self._table.timesteps[self._rows.clamp(min=0)]
        out, out_uncond = self._evaluate(timesteps)
        self._ops.diffusion_step(
            self.x,
            out,
            self._rows,
            self._table.coefficients,
            self._table.timesteps,
            seeds=self._seeds if noise is None else None,
            indices=self._indices if noise is None else None,
            noise=noise,
            out_uncond=out_uncond,
            guidance=None if out_uncond is None else self._guidance,
            x_next=self.x,
            x_net=self._x_net,
            x0=self.x0 if keep_x0 else None,
            flags=self._flags,
        )
        following = self._table.next_row[self._rows.clamp(min=0)]
        torch.where(self._rows < 0, self._rows, following, out=self._rows)

    def broken_rows(self) -> list[int]:
        """For each lane, the row at which it first became non-finite, or :data:`stepfusion.kernels.FINITE`.

        Waits for the device.
        """
        rows: list[int] = self._flags.tolist()
        return rows

    def _evaluate(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The network's output with the condition, and without it where lanes are guided."""
        if self._null_label is None:
            return self._call(self._x_net, timesteps, self._labels), None
        nothing = torch.full_like(self._labels, self._null_label)
        if self._separate:
            return self._call(self._x_net, timesteps, self._labels), self._call(self._x_net, timesteps, nothing)
        both = self._call(self._x_net, timesteps.repeat(2), torch.cat((self._labels, nothing)))
        out, out_uncond = both.chunk(2)
        return out, out_uncond

    def _call(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = self._network(x, timesteps, labels) if self._labelled else self._network(x, timesteps)
        out = getattr(out, "sample", out)  # diffusers models return an object
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"the network must return a tensor, got {type(out).__name__}")
        doubled = (len(x), 2 * x.shape[1], *x.shape[2:])
        accepted = (doubled,) if self._learned else (tuple(x.shape), doubled)
        if tuple(out.shape) not in accepted:
            wanted = " or ".join(str(list(shape)) for shape in accepted)
            reason = "the sampler's learned variance needs" if self._learned else "this shape of x needs"
            raise ValueError(f"the network returned shape {list(out.shape)}, and {reason} {wanted}")
        return out


def as_int64(seed: int) -> int:
    """A 64-bit unsigned seed as the int64 with the same bits."""
    return seed - (1 << 64) if seed >> 63 else seed
