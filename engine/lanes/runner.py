"""Lanes and ticks: the loop that walks a table.

A lane is one image on its way. Everything about it lives on the device: its state x (float32), its row of the table,
its seed, index, label, guidance scale, and a flag that remembers the row at which it first became non-finite. A tick
moves every lane one row on: network, step, row. The host never asks the device anything in between: it knows by
counting when a lane is done.

A tick reads all of that, and the table itself, through buffers that stay where they are. So it can be captured once
as a CUDA graph, and another table, seed, label or guidance scale is other data in the same buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Self

import torch
from torch import Tensor

from stepfusion import kernels
from stepfusion.execution.cuda_graph import CapturePolicy, Graph, OrderedGraph
from stepfusion.execution.evaluator import Evaluator
from stepfusion.execution.streams import Reached
from stepfusion.kernels import FINITE, PARKED
from stepfusion.lanes.device_tables import DeviceTables
from stepfusion.lanes.prepared import Layout, PreparedConditions
from stepfusion.lanes.request import LaneStart
from stepfusion.lanes.transfer import as_index, upload
from stepfusion.samplers.table import StepTable


@dataclass(frozen=True)
class RunnerKey:
    """What a runner is made for: one runner serves every request that needs these.

    Attributes:
        lanes: how many there are.
        shape: of one image.
        device: where the lanes are.
        dtype: of the network's input.
        guided: the network is also called without a condition.
        null_label: the label that stands for none; None if the images' own label stands there, too.
        separate: call the network with and without conditions one after the other, which keeps the batch size,
            instead of for both at once.
        learned_variance: the table needs the variance that the network learned.
        history: how much of what earlier rows kept the table's rows use, 0 to 3 entries.
        known: some lane keeps a part of an image.
        whole_image: the table has rows that need all elements of an image at once.
        capacity: rows of a table to make room for.
        context_size: labels are contexts with so many entries, all zero if there is no condition; else None.
        conditions: shape and dtype of what is prepared of one image's other conditions.
        kept: shape of what the network keeps of one image, if rows reuse it; else None.
        logprobs: every tick writes the log-probability of each lane's step to ``logprobs``.
    """

    lanes: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    guided: bool = False
    null_label: int | None = None
    separate: bool = False
    learned_variance: bool = False
    history: int = 0
    known: bool = False
    whole_image: bool = False
    capacity: int = 0
    context_size: int | None = None
    conditions: Layout = ()
    kept: tuple[int, ...] | None = None
    logprobs: bool = False


class Part(Enum):
    """What of the network a tick runs: all of it, its outermost level, or both, each lane taking its row's."""

    WHOLE = "whole"
    OUTER = "outer"
    BOTH = "both"


class Runner:
    """Lanes of images of one shape, walking tables on one device.

    Args:
        evaluator: the network.
        ops: where the step comes from, :mod:`stepfusion.kernels` or :mod:`stepfusion.kernels.reference`.
        policy: whether ticks are captured, and what captures them; None to run them one launch after the other.
        tables: what lanes walk, shared with other runners of this evaluator; by default this runner's own.
        prepared: prepares the conditions of images, if they have any beside a label.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        key: RunnerKey,
        ops: ModuleType,
        policy: CapturePolicy | None = None,
        tables: DeviceTables | None = None,
        prepared: PreparedConditions | None = None,
    ) -> None:
        self._evaluator, self._key, self._ops, self._policy = evaluator, key, ops, policy
        self._prepares = prepared
        lanes, device = key.lanes, key.device
        # With guidance the network is called once for both halves of a doubled batch, so the step writes x_net twice.
        copies = 2 if key.guided and not key.separate else 1
        self.x = torch.zeros((lanes, *key.shape), dtype=torch.float32, device=device)
        self.x0 = torch.zeros_like(self.x)
        self.flags = torch.full((lanes,), FINITE, device=device)
        self.logprobs = torch.zeros(lanes if key.logprobs else 0, dtype=torch.float64, device=device)
        # Free lanes show the network a wave: norms of an image of zeros amplify rounding, and a compiled network is
        # compared with the eager one on whatever its first call brings.
        wave = torch.arange(math.prod(key.shape), dtype=torch.float32, device=device).sin().reshape(key.shape)
        self._x_net = wave.to(key.dtype).expand(copies * lanes, *key.shape).contiguous()
        if ops is kernels and evaluator.hoisted:  # our networks are NHWC on a GPU, and the fused step is either
            self._x_net = self._x_net.to(memory_format=torch.channels_last)
        self._known = torch.full_like(self.x, math.nan) if key.known else None
        self._history = (
            torch.zeros((key.history, *self.x.shape), dtype=torch.float32, device=device) if key.history else None
        )
        self._noise: Tensor | None = None
        # Everything below is data of a lane and stays at its address: a captured tick reads it by address.
        self.rows = torch.full((lanes,), PARKED, device=device)
        self._seeds = torch.zeros(lanes, dtype=torch.int64, device=device)
        self._indices = torch.zeros_like(self._seeds)
        # Labels of all lanes, then as many of no condition: both halves of what a guided tick shows the network.
        if key.context_size is None:
            self._conditions = torch.zeros((2, lanes), dtype=torch.int64, device=device)
            self._conditions[1] = key.null_label or 0
        else:
            self._conditions = torch.zeros(2, lanes, key.context_size, device=device, dtype=key.dtype)
        self._labels, self._nothing = self._conditions[0], self._conditions[1]
        halves = 2 if key.guided else 1
        self._kept = (
            None if key.kept is None else torch.zeros((halves, lanes, *key.kept), device=device, dtype=key.dtype)
        )
        self._prepared = [
            torch.zeros((halves, lanes, *shape), dtype=dtype, device=device) for shape, dtype in key.conditions
        ]
        self._guidance = torch.ones(lanes, dtype=torch.float32, device=device)
        self.tables = tables or DeviceTables(evaluator, device, key.capacity, transitions=key.logprobs)
        self.learned: bool | None = None  # whether the network learned its variance, once it was called
        self._graphs: dict[tuple[bool, bool, Part], Graph] = {}

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return self._key.lanes

    @property
    def keeps(self) -> bool:
        """Whether some row may reuse what the network made at an earlier one."""
        return self._kept is not None

    @property
    def captures(self) -> int:
        """How many graphs were captured and are in use."""
        return len(self._graphs)

    def load(self, table: StepTable) -> int:
        """Make room for a table in this runner's own store; every lane must be parked. Returns its first row."""
        self.tables.release_all()
        first = self.tables.hold(table)
        if first is None:
            # Growing allocates new buffers, and captured ticks still read the old ones.
            self._graphs.clear()
            self.tables.grow(len(table))
            first = self.tables.hold(table)
            assert first is not None
        return first

    def prepare(self, *, noise: bool, keep_x0: bool) -> None:
        """Capture the kind of tick that is to come, if ticks are captured; every lane must be parked."""
        if noise and self._noise is None:
            # A replay reads the noise at the address that the capture saw, so given noise is copied to this buffer.
            self._noise = torch.zeros_like(self.x)
        for part in Part if self.keeps else (Part.WHOLE,):
            self._capture((noise, keep_x0, part))

    def _capture(self, kind: tuple[bool, bool, Part]) -> None:
        noise, keep_x0, part = kind
        policy = self._policy
        if policy is None or kind in self._graphs or not policy.captures(whole_image=self._key.whole_image):
            return
        graph = policy.capture(
            lambda: self._launch(self._noise if noise else None, keep_x0, part), self.x.device, self.tables.graph_pool
        )
        if graph is not None:
            turns = self._evaluator.turns
            self._graphs[kind] = graph if turns is None else OrderedGraph(graph, turns)

    def admit(
        self,
        lanes: Sequence[int],
        starts: Sequence[LaneStart],
        first: int | Sequence[int],
        start: Tensor | None = None,
        known: Tensor | None = None,
    ) -> None:
        """Put new images into free lanes, from ``start`` [k, ...] or from noise of their own.

        ``first`` is the row of the store at which their table stands, or each image's. ``known`` [k, ...] is what
        they keep of an image, NaN for those that are free.
        """
        device = self.x.device
        places = [first] * len(starts) if isinstance(first, int) else first
        # One upload for three columns: a copy to the device costs more than its bytes.
        numbers = [[place + s.row, as_int64(s.seed), s.index] for place, s in zip(places, starts, strict=True)]
        rows, seeds, indices = upload(torch.tensor(numbers, dtype=torch.int64).t().contiguous(), device)
        labels = upload(torch.tensor([s.label for s in starts], dtype=self._labels.dtype), device)
        if start is None:
            shape = self._key.shape
            start = self._ops.normal(seeds, indices, torch.zeros_like(seeds), shape, kernels.STREAM_INITIAL)
            start = _scaled(start, [s.start_scale for s in starts])
        where = as_index(lanes, device)
        self.x[where] = start.to(device, torch.float32)
        # Between ticks x_net holds what the network is shown next; for a new image the step has not written it yet.
        shown = _scaled(self.x[where], [s.in_scale for s in starts])
        self._x_net.view(-1, *self.x.shape)[:, where] = shown.to(self._x_net.dtype)
        if self._known is not None:
            self._known[where] = math.nan if known is None else known.to(device, torch.float32)
        self.rows[where], self._seeds[where], self._indices[where] = rows, seeds, indices
        self._labels[where] = labels
        if self._key.guided and self._key.null_label is None and self._key.context_size is None:
            self._nothing[where] = labels  # guidance is by the other conditions alone
        self._condition(where, starts)
        self._guidance[where] = upload(torch.tensor([s.guidance for s in starts], dtype=torch.float32), device)
        self.flags[where] = FINITE

    def tick(self, noise: Tensor | None = None, *, keep_x0: bool = False, part: Part = Part.WHOLE) -> None:
        """Move every lane one row on.

        ``noise`` [lanes, ...] replaces the counter-based noise; ``keep_x0`` writes the predictions to ``x0``. Both as
        :meth:`prepare` was told. ``part`` is what the rows of the lanes need, if this runner :attr:`keeps`.
        """
        graph = self._graphs.get((noise is not None, keep_x0, part))
        if graph is None:
            self._launch(noise, keep_x0, part)
            return
        if noise is not None and self._noise is not None:
            self._noise.copy_(noise)
        graph.replay()

    def park(self, lanes: Sequence[int] | None = None) -> None:
        """Take the images out of these lanes, or out of every lane."""
        self.rows[slice(None) if lanes is None else as_index(lanes, self.x.device)] = PARKED

    def take_over(self, other: Self, lanes: Sequence[int]) -> None:
        """Go on with the images in these lanes of ``other`` in the first lanes of this runner.

        All lanes of this runner must be parked before, and those of ``other`` are afterwards. Both must share their
        device tables and all of their key but ``lanes``.
        """
        where = as_index(lanes, self.x.device)
        for mine, theirs in zip(self._lane_buffers(), other._lane_buffers(), strict=True):
            mine[:, : len(lanes)] = theirs[:, where]
        other.park()

    @property
    def buffers(self) -> list[Tensor]:
        """Every tensor that a tick reads or writes, but the network's and what is computed on the way."""
        given = () if self._noise is None else (self._noise,)
        return [*self._lane_buffers(), self.logprobs, *given, *self.tables.buffers]

    def reached(self) -> Reached | None:
        """The end of what was launched so far; None on a device without streams."""
        return Reached(self.x.device) if self.x.device.type == "cuda" else None

    def _condition(self, where: Tensor | slice, starts: Sequence[LaneStart]) -> None:
        """Write what is prepared of the conditions of new images, and of what stands for none, into their lanes."""
        if self._prepares is None or not self._prepared:
            return
        conditions = [start.conditions for start in starts]
        for half in range(len(self._prepared[0])):
            each = [self._prepares.of(c.null if half else c.given) for c in conditions if c is not None]
            for buffer, tensors in zip(self._prepared, zip(*each, strict=True), strict=True):
                buffer[half, where] = torch.stack(tensors)

    def _lane_buffers(self) -> list[Tensor]:
        """Everything that is a lane's own, [copies, lanes, ...]."""
        single = (self.x, self.x0, self.flags, self.rows, self._seeds, self._indices, self._guidance)
        known = () if self._known is None else (self._known,)
        history = () if self._history is None else (self._history,)
        copies = self._x_net.view(-1, *self.x.shape)
        kept = () if self._kept is None else (self._kept,)
        return [
            copies,
            self._conditions,
            *history,
            *self._prepared,
            *kept,
            *(buffer.unsqueeze(0) for buffer in (*single, *known)),
        ]

    def _evaluate(self, part: Part) -> list[Tensor]:
        """What the network returns for all lanes, and with guidance what it returns without a condition."""
        tables, key, kept = self.tables, self._key, self._kept
        rows = self.rows
        if key.guided and not key.separate:  # both halves of the batch in one call
            rows = rows.expand(2, -1)
            prepared = [halves.flatten(0, 1) for halves in self._prepared]
            calls = [(self._conditions.flatten(0, 1), prepared, None if kept is None else kept.flatten(0, 1))]
        else:
            calls = [
                (self._conditions[i], [halves[i] for halves in self._prepared], None if kept is None else kept[i])
                for i in range(2 if key.guided else 1)
            ]
        features = tables.features[rows]  # parked lanes, row -1, read the last
        features = features if rows.ndim == 1 else features.flatten(0, 1)
        outputs = [self._call(part, rows, features, *call) for call in calls]
        for output in outputs:
            self._check_output(output)
        return list(outputs[0].chunk(2)) if key.guided and not key.separate else outputs

    def _call(
        self,
        part: Part,
        rows: Tensor,
        features: Tensor,
        labels: Tensor,
        prepared: Sequence[Tensor],
        kept: Tensor | None,
    ) -> Tensor:
        """One call of the network, or one of each of its parts."""
        x, evaluator = self._x_net, self._evaluator
        if kept is None:
            return evaluator.network(x, features, labels, *prepared)
        if part is Part.WHOLE:
            return evaluator.keeping(x, kept, features, labels, *prepared)
        before = kept.clone() if part is Part.BOTH else kept
        outer = evaluator.outer(x, before, features, labels, *prepared)
        if part is Part.OUTER:
            return outer
        whole = evaluator.keeping(x, kept, features, labels, *prepared)
        reuses = self.tables.reuses[rows].view(-1, *[1] * (whole.ndim - 1))
        kept.copy_(torch.where(reuses, before, kept))
        return torch.where(reuses, outer, whole)

    def _launch(self, noise: Tensor | None, keep_x0: bool, part: Part = Part.WHOLE) -> None:
        """The launches of a tick, which read and write nothing but this runner's buffers."""
        tables = self.tables
        outputs = self._evaluate(part)
        out, out_uncond = outputs if self._key.guided else (outputs[0], None)
        guidance = None if out_uncond is None else self._guidance
        before = self.x.clone() if self._key.logprobs else None
        self._ops.diffusion_step(
            self.x,
            out,
            self.rows,
            tables.coefficients,
            tables.timesteps,
            seeds=self._seeds if noise is None else None,
            indices=self._indices if noise is None else None,
            noise=noise,
            out_uncond=out_uncond,
            guidance=guidance,
            x_next=self.x,
            x_net=self._x_net,
            x0=self.x0 if keep_x0 else None,
            flags=self.flags,
            known=self._known,
            history=self._history,
        )
        if before is not None:
            steps = (before, self.x, out, self.rows, tables.coefficients, tables.transitions)
            self.logprobs.copy_(self._ops.transition_logprob(*steps, out_uncond=out_uncond, guidance=guidance))
        # In place, and after the step, which reads the row: parked lanes stay parked, for the last row's next is -1.
        self.rows.copy_(tables.next_row[self.rows])

    def _check_output(self, out: Tensor) -> None:
        """TypeError or ValueError unless the network returned what the step takes."""
        if not isinstance(out, Tensor):
            raise TypeError(f"the network must return a tensor, got {type(out).__name__}")
        single = tuple(self._x_net.shape)
        doubled = (single[0], 2 * single[1], *single[2:])
        learned = self._key.learned_variance
        accepted = (doubled,) if learned else (single, doubled)
        if tuple(out.shape) not in accepted:
            wanted = " or ".join(str(list(shape)) for shape in accepted)
            reason = "the sampler's learned variance needs" if learned else "this shape of x needs"
            raise ValueError(f"the network returned shape {list(out.shape)}, and {reason} {wanted}")
        self.learned = tuple(out.shape) == doubled


def _scaled(images: Tensor, scales: Sequence[float]) -> Tensor:
    """Each image [k, ...] times its scale; themselves if all scales are 1, as they are on a discrete schedule."""
    if all(scale == 1.0 for scale in scales):
        return images
    each = upload(torch.tensor(scales, dtype=images.dtype), images.device)
    return images * each.view(-1, *[1] * (images.ndim - 1))


def as_int64(seed: int) -> int:
    """A 64-bit unsigned seed as the int64 with the same bits."""
    return seed - (1 << 64) if seed >> 63 else seed
