"""The engine: a network, a schedule, and images."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from tqdm import tqdm

from stepfusion import _checks, kernels, samplers
from stepfusion.checkpoint import load_pretrained
from stepfusion.errors import NonFiniteError, SamplingCancelled
from stepfusion.kernels import FINITE, reference
from stepfusion.kernels.coefficients import PREDICTIONS
from stepfusion.plan import make_plan
from stepfusion.runner import Network, Runner, Ticket
from stepfusion.sampler_config import sampler_options
from stepfusion.schedule import NoiseSchedule
from stepfusion.table import StepTable

SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddim": samplers.ddim,
    "ddpm": samplers.ddpm,
    "ddim_inversion": samplers.ddim_inversion,
}
_DEFAULT_STEPS = 50
_DEFAULT_BATCH = {"cpu": 64}
_DEFAULT_BATCH_GPU = 256
_DEFAULT_BATCH_INVARIANT = 16


@dataclass(frozen=True)
class Event:
    """One step of some images, seen by :meth:`Engine.stream` and by callbacks.

    ``step`` counts from 0 to ``steps`` - 1, ``timestep`` is the training timestep the step started from; ``images`` are positions in the request, ``x`` [k, ...] their
    states after the step, ``x0`` [k, ...] the predictions it used. float32, valid until the next step: clone what you keep.
    """

    step: int
    steps: int
    timestep: int
    images: tuple[int, ...]
    x: torch.Tensor
    x0: torch.Tensor


@dataclass(frozen=True)
class _Request:
    """Images to make, checked: one ticket and one part of ``table`` each."""

    table: StepTable
    parts: list[int]
    tickets: list[Ticket]
    start: torch.Tensor | None
    noise: torch.Tensor | None
    guided: bool

    def __len__(self) -> int:
        return len(self.tickets)


class Engine:
    """Samples images from one network, on one device.

    Args:
        model: any callable ``model(x, timesteps)`` or ``model(x, timesteps, labels)`` that returns what ``prediction`` says: x [B, C, H, W] in the engine's
            dtype, timesteps and labels int64 [B]. A ``torch.nn.Module`` is moved to the device and dtype (a copy of it, where that changes it).
        schedule: the noise schedule it was trained with.
        prediction: "epsilon", "sample" or "v_prediction".
        shape: of one image, (C, H, W); by default the model's ``in_channels`` and ``sample_size``.
        num_classes: how many labels the model takes; by default the model's ``num_classes``, None for a model without labels.
        null_label: the label that stands for none, which guidance needs.
        class_names: what the labels are called.
        device, dtype, backend, network: "auto", or what :meth:`explain` would then name.
        batch: the most lanes at a time; batches are padded to powers of two up to it.
        invariant: keep one bucket of ``batch`` lanes for everything, so that an image's bits depend on nothing but its seed, index, label and table.
        options: default options of the samplers (clip, spacing, ...), as a checkpoint's scheduler config gives them.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: what was asked for cannot run here.
    """

    def __init__(
        self,
        model: Network,
        schedule: NoiseSchedule,
        *,
        prediction: str = "epsilon",
        shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
        class_names: Sequence[str] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        network: str = "auto",
        batch: int | None = None,
        invariant: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        self.schedule = schedule
        self.prediction = _checks.choice("prediction", prediction, PREDICTIONS)
        self.shape = _image_shape(model, shape)
        classes = getattr(model, "num_classes", None) if num_classes is None else num_classes
        self.num_classes = None if classes is None else _checks.integer("num_classes", classes, 1, 1 << 31)
        if null_label is not None:
            null_label = _checks.integer("null_label", null_label, 0, (self.num_classes or 0) - 1)
        self.null_label = null_label
        self.class_names = None if class_names is None else tuple(class_names)
        self.plan = make_plan(device, dtype, backend, network)
        self.invariant = _checks.boolean("invariant", invariant)
        self.batch = self._largest_batch(batch)
        self.options = dict(options or {})
        self._model = self._prepare(model)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **arguments: Any) -> Self:
        """An engine for a bundled model (by name) or a diffusers directory; ``arguments`` as for :class:`Engine`.

        Raises:
            CheckpointError: what is missing or wrong in the directory.
        """
        loaded = load_pretrained(source)
        prediction, options = sampler_options(loaded.scheduler_config)
        found = {
            "prediction": prediction,
            "null_label": loaded.null_label,
            "class_names": loaded.class_names,
            "options": options,
        }
        schedule = NoiseSchedule.from_config(loaded.scheduler_config)
        return cls(loaded.network, schedule, **{**found, **arguments})

    # What it does

    def table(self, sampler: str = "ddim", steps: int | None = None, **options: Any) -> StepTable:
        """A sampler's table for this engine's schedule and prediction type, with the checkpoint's options where none are given.

        ``steps`` is 50 by default, all timesteps for "ddpm".
        """
        function = SAMPLERS[_checks.choice("sampler", sampler, SAMPLERS)]
        if steps is None and "timesteps" not in options and sampler != "ddpm":
            steps = min(_DEFAULT_STEPS, self.schedule.num_timesteps)
        accepted = function.__kwdefaults__ or {}
        unknown = [name for name in options if name not in accepted]
        if unknown:
            raise TypeError(f"sampler {sampler!r} takes no option {unknown[0]!r}; it takes {', '.join(sorted(accepted))}")
        chosen = {name: value for name, value in self.options.items() if name in accepted}
        return function(self.schedule, steps, **{**chosen, "prediction": self.prediction, **options})

    def sample(
        self,
        n: int | None = None,
        table: StepTable | Sequence[StepTable] | None = None,
        *,
        steps: int | None = None,
        eta: float | None = None,
        sampler: str = "ddim",
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        start: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        progress: bool | None = None,
        callback: Callable[[Event], object] | None = None,
        nonfinite: str = "raise",
    ) -> torch.Tensor:
        """Make images.

        Args:
            n: how many; by default as many as ``indices``, ``start`` or the sequences say, else 1.
            table: a sampler's table, or one for each image; without one, ``sampler``, ``steps`` and ``eta`` make it.
            seed: in [0, 2**64), one for all or one each. indices: the images' numbers under their seeds, 0 .. n-1 by default, in [0, 2**32).
                An image is a function of model, table, seed, index and label, and of nothing else (to the bit with ``invariant=True``).
            labels: one for all or one each; the null label by default.
            guidance: classifier-free guidance scale (Ho & Salimans 2022), one for all or one each; 1 is none.
            start: float [n, C, H, W], states to start from instead of noise. noise: float [steps, n, C, H, W], the z of every step.
            progress: a bar on stderr; by default where that is a terminal.
            callback: called after every step with an :class:`Event`; returning False cancels.
            nonfinite: "raise" where an image becomes NaN or infinite, or "keep" it.

        Returns:
            float32 [n, C, H, W] on the engine's device, in [-1, 1] where the sampler ends in a clipped x0.

        Raises:
            TypeError, ValueError: naming the argument, before any work. NonFiniteError: naming image and step. SamplingCancelled: by the callback.
        """
        _checks.choice("nonfinite", nonfinite, ("raise", "keep"))
        request = self._request(n, table, steps, eta, sampler, seed, indices, labels, guidance, start, noise)
        result = torch.empty((len(request), *self.shape), device=self.plan.device)
        shown = sys.stderr.isatty() if progress is None else _checks.boolean("progress", progress)
        total = sum(request.table.steps(part) for part in request.parts)
        with tqdm(total=total, unit="step", disable=not shown, dynamic_ncols=True) as bar:
            for events in self._walk(request, result, nonfinite == "raise", callback is not None):
                bar.update(sum(len(event.images) for event in events))
                if callback is not None and any([callback(event) is False for event in events]):
                    raise SamplingCancelled(f"the callback cancelled sampling after {bar.n} of {total} steps")
        return result

    def stream(
        self,
        n: int | None = None,
        table: StepTable | None = None,
        *,
        every: int = 1,
        steps: int | None = None,
        eta: float | None = None,
        sampler: str = "ddim",
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        start: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> Iterator[Event]:
        """Yield an :class:`Event` after every ``every``-th step and after the last; stop iterating to cancel. Arguments as for :meth:`sample`."""
        every = _checks.integer("every", every, 1, 1 << 31)
        request = self._request(n, table, steps, eta, sampler, seed, indices, labels, guidance, start, noise)
        return self._stream(request, every)

    def encode(
        self,
        x: torch.Tensor,
        table: StepTable | None = None,
        *,
        steps: int | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        progress: bool | None = None,
    ) -> torch.Tensor:
        """Images [n, C, H, W] to the noise that :meth:`sample` with the same timesteps turns back into them (DDIM inversion). Returns float32 like x."""
        table = self.table("ddim_inversion", steps) if table is None else table
        return self.sample(table=table, start=x, labels=labels, progress=progress)

    def to_uint8(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, C, H, W] in [-1, 1] to pixels, uint8 [n, H, W, C], on their device, by this engine's backend."""
        return kernels.to_uint8(x) if self.plan.backend.value == "triton" else reference.to_uint8(x)

    def explain(self) -> str:
        """Which path runs each part, and why, a line each."""
        lines = self.plan.lines()
        if self.invariant:
            bucket = f"one bucket of {self.batch} lanes: bits depend on neither batch size nor neighbours"
        else:
            bucket = f"buckets of 1 to {self.batch} lanes: noise is identical, images agree to rounding between buckets"
        guided = "classifier-free, by the null label" if self.null_label is not None else "none: the model has no null label"
        return "\n".join((*lines, f"{'lanes':<14} {'':<11} {bucket}", f"{'guidance':<14} {'':<11} {guided}"))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"Engine({shape}, {self.prediction}, {self.schedule.name}, {self.plan.device}, {self.plan.backend.value})"

    # How it does it

    def _stream(self, request: _Request, every: int) -> Iterator[Event]:
        result = torch.empty((len(request), *self.shape), device=self.plan.device)
        for events in self._walk(request, result, True, True):
            for event in events:
                if (event.step + 1) % every == 0 or event.step + 1 == event.steps:
                    yield event

    @torch.no_grad()
    def _walk(self, request: _Request, result: torch.Tensor, strict: bool, watched: bool) -> Iterator[list[Event]]:
        """Run a request to its end, writing finished images into ``result``; yields the events of each tick.

        Where memory runs out, the batch is halved and the unfinished images start again: they come out the same.
        """
        waiting = list(range(len(request)))
        lanes = self._bucket(len(waiting))
        while waiting:
            try:
                yield from self._walk_lanes(request, result, waiting, lanes, strict, watched)
            except torch.OutOfMemoryError:
                if lanes == 1 or self.invariant:
                    raise
                lanes = max(1, lanes // 2)
                self.batch = lanes
                warnings.warn(f"out of memory: going on with {lanes} lanes at a time", RuntimeWarning, stacklevel=3)

    def _walk_lanes(
        self, request: _Request, result: torch.Tensor, waiting: list[int], lanes: int, strict: bool, watched: bool
    ) -> Iterator[list[Event]]:
        """One pass over ``waiting``, in ``lanes`` lanes; an image leaves the list when it is finished."""
        table = request.table
        runner = Runner(
            self._model,
            table.on(self.plan.device),
            self.shape,
            lanes,
            dtype=self.plan.dtype,
            backend=self.plan.backend.value,
            labelled=self.num_classes is not None,
            null_label=self.null_label if request.guided else None,
            separate=self.invariant,
        )
        queue = list(reversed(waiting))
        image_of: dict[int, int] = {}
        steps_done: dict[int, int] = {}
        while queue or image_of:
            free = [lane for lane in range(lanes) if lane not in image_of]
            entering = [(lane, queue.pop()) for lane in free[: len(queue)]]
            if entering:
                self._admit(runner, request, entering)
                image_of.update(entering)
                steps_done.update(dict.fromkeys(dict(entering), 0))
            runner.tick(self._given_noise(request, image_of, steps_done, lanes), keep_x0=watched)
            yield self._events(runner, request, image_of, steps_done, watched)
            finished = []
            for lane, image in list(image_of.items()):
                steps_done[lane] += 1
                if steps_done[lane] == table.steps(request.parts[image]):
                    finished.append((lane, image))
            if finished:
                self._collect(runner, request, result, finished, strict)
                for lane, image in finished:
                    del image_of[lane], steps_done[lane]
                    waiting.remove(image)

    def _admit(self, runner: Runner, request: _Request, entering: list[tuple[int, int]]) -> None:
        lanes, images = zip(*entering, strict=True)
        start = None if request.start is None else request.start[list(images)]
        runner.admit(lanes, [request.tickets[image] for image in images], start)

    def _given_noise(
        self, request: _Request, image_of: dict[int, int], steps_done: dict[int, int], lanes: int
    ) -> torch.Tensor | None:
        """The z of this tick for every lane, where the request brought its own."""
        if request.noise is None:
            return None
        noise = torch.zeros((lanes, *self.shape), device=self.plan.device)
        where = list(image_of)
        rows, images = [steps_done[lane] for lane in where], [image_of[lane] for lane in where]
        noise[where] = request.noise[rows, images].to(self.plan.device, torch.float32)
        return noise

    def _events(
        self, runner: Runner, request: _Request, image_of: dict[int, int], steps_done: dict[int, int], watched: bool
    ) -> list[Event]:
        """One event for all lanes at the same step of the same part."""
        groups: dict[tuple[int, int], list[int]] = {}
        for lane, image in image_of.items():
            groups.setdefault((request.parts[image], steps_done[lane]), []).append(lane)
        events = []
        for (part, step), lanes in groups.items():
            row = request.table.starts[part] + step
            images = tuple(image_of[lane] for lane in lanes)
            x, x0 = (runner.x[lanes], runner.x0[lanes]) if watched else (runner.x[:0], runner.x0[:0])
            timestep = int(request.table.timesteps[row])
            events.append(Event(step, request.table.steps(part), timestep, images, x, x0))
        return events

    def _collect(
        self, runner: Runner, request: _Request, result: torch.Tensor, finished: list[tuple[int, int]], strict: bool
    ) -> None:
        lanes, images = (list(column) for column in zip(*finished, strict=True))
        result[images] = runner.x[lanes]
        if not strict:
            return
        broken = runner.broken_rows()
        for lane, image in finished:
            if broken[lane] != FINITE:
                ticket, row = request.tickets[image], broken[lane]
                step = row - request.table.starts[request.parts[image]]
                raise NonFiniteError(
                    f"image {image} (seed {ticket.seed}, index {ticket.index}) became non-finite at step {step + 1} of "
                    f"{request.table.steps(request.parts[image])} (timestep {request.table.timesteps[row]})"
                )

    # How it is set up

    def _largest_batch(self, batch: int | None) -> int:
        if batch is not None:
            return _checks.integer("batch", batch, 1, 1 << 20)
        if self.invariant:
            return _DEFAULT_BATCH_INVARIANT
        return _DEFAULT_BATCH.get(self.plan.device.type, _DEFAULT_BATCH_GPU)

    def _bucket(self, images: int) -> int:
        """The number of lanes for so many images: the smallest power of two that holds them, at most ``batch``."""
        if self.invariant:
            return self.batch
        return min(self.batch, 1 << max(0, images - 1).bit_length())

    def _prepare(self, model: Network) -> Network:
        """The model on the engine's device, in its dtype, in eval mode; compiled where that was asked for."""
        if isinstance(model, torch.nn.Module):
            tensors = [*model.parameters(), *model.buffers()]
            at_home = all(t.device == self.plan.device for t in tensors) and all(
                t.dtype == self.plan.dtype for t in tensors if t.is_floating_point()
            )
            if not at_home or model.training:
                model = copy.deepcopy(model).to(self.plan.device, self.plan.dtype).eval()
        if self.plan.network.value == "compile":
            return torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[no-any-return]
        return model

    # What a request must be

    def _request(
        self,
        n: int | None,
        table: StepTable | Sequence[StepTable] | None,
        steps: int | None,
        eta: float | None,
        sampler: str,
        seed: int | Sequence[int],
        indices: Sequence[int] | None,
        labels: int | Sequence[int] | torch.Tensor | None,
        guidance: float | Sequence[float] | None,
        start: torch.Tensor | None,
        noise: torch.Tensor | None,
    ) -> _Request:
        """Check everything; nothing is computed before."""
        count = self._count(n, table, seed, indices, labels, guidance, start)
        joined, parts = self._tables(count, table, steps, eta, sampler)
        seeds = [_checks.integer("seed", s, 0, (1 << 64) - 1) for s in _each("seed", seed, count)]
        numbers = range(count) if indices is None else _each("indices", indices, count)
        numbers = [_checks.integer("indices", i, 0, (1 << 32) - 1) for i in numbers]
        scales = [_checks.number("guidance", g, 0.0, 1e4) for g in _each("guidance", 1.0 if guidance is None else guidance, count)]
        guided = any(scale != 1.0 for scale in scales)
        if guided and self.null_label is None:
            raise ValueError("guidance needs a null label, and this engine's model has none")
        tickets = [
            Ticket(joined.starts[part], *identity)
            for part, *identity in zip(parts, seeds, numbers, self._labels(labels, count), scales, strict=True)
        ]
        if start is not None:
            _check_images("start", start, (count, *self.shape))
        if noise is not None:
            longest = max((joined.steps(part) for part in parts), default=0)
            _check_images("noise", noise, (longest, count, *self.shape))
        return _Request(joined, parts, tickets, start, noise, guided)

    def _count(self, n: int | None, *others: Any) -> int:
        """The number of images: ``n``, or the length of whatever was given one for each."""
        if n is not None:
            return _checks.integer("n", n, 0, 1 << 31)
        for value in others:
            if isinstance(value, torch.Tensor) and value.ndim == 0:
                continue
            if isinstance(value, (Sequence, torch.Tensor)) and not isinstance(value, str):
                return len(value)
        return 1

    def _tables(
        self, count: int, table: StepTable | Sequence[StepTable] | None, steps: int | None, eta: float | None, sampler: str
    ) -> tuple[StepTable, list[int]]:
        """All tables of a request in one, and each image's part of it."""
        if table is None:
            return self.table(sampler, steps, **({} if eta is None else {"eta": eta})), [0] * count
        if steps is not None or eta is not None:
            raise ValueError("table excludes steps and eta, got both")
        if isinstance(table, StepTable):
            if len(table.starts) != 1:
                raise ValueError(f"table holds {len(table.starts)} samplers: give a list with one table for each image")
            self._check_table(table)
            return table, [0] * count
        if not isinstance(table, Sequence) or not all(isinstance(t, StepTable) for t in table):
            raise TypeError(f"table must be a StepTable or a list of them, got {type(table).__name__}")
        if len(table) != count:
            raise ValueError(f"table must be one StepTable or one for each of the {count} images, got {len(table)}")
        distinct = list({id(t): t for t in table}.values())
        for one in distinct:
            self._check_table(one)
        position = {id(t): i for i, t in enumerate(distinct)}
        return StepTable.concatenate(distinct), [position[id(t)] for t in table]

    def _check_table(self, table: StepTable) -> None:
        if table.prediction != self.prediction:
            raise ValueError(f"table is for prediction {table.prediction!r}, and the network's is {self.prediction!r}")
        if table.schedule != self.schedule:
            raise ValueError(f"table is for {table.schedule!r}, and the network's is {self.schedule!r}")

    def _labels(self, labels: int | Sequence[int] | torch.Tensor | None, count: int) -> list[int]:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels were given, and this engine's model takes none")
            return [0] * count
        if labels is None:
            if self.null_label is None:
                raise ValueError(f"labels are needed: the model has {self.num_classes} classes and no null label")
            return [self.null_label] * count
        if isinstance(labels, torch.Tensor):
            if labels.is_floating_point() or labels.dtype == torch.bool:
                raise TypeError(f"labels must be integers, got {labels.dtype}")
            labels = labels.tolist()
        return [_checks.integer("labels", label, 0, self.num_classes - 1) for label in _each("labels", labels, count)]


def _image_shape(model: Network, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:
        channels, size = getattr(model, "in_channels", None), getattr(model, "sample_size", None)
        if channels is None or size is None:
            raise ValueError("shape is needed, e.g. (3, 32, 32): the model has no in_channels and sample_size")
        shape = (channels, *((size, size) if isinstance(size, int) else size))
    if isinstance(shape, str) or not isinstance(shape, Sequence) or not shape:
        raise TypeError(f"shape must be a sequence of sizes, e.g. (3, 32, 32), got {shape!r}")
    return tuple(_checks.integer("shape", size, 1, 1 << 20) for size in shape)


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each image: ``value`` for all, or a sequence of so many."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, (Sequence, range)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one value or one for each of the {count} images, got {len(value)}")
    return list(value)


def _check_images(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
