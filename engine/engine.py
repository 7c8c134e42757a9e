"""The engine: a network, a schedule, and images."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Self

import torch
from tqdm import tqdm

from stepfusion import _checks, samplers
from stepfusion.checkpoints.diffusers_directory import Pretrained
from stepfusion.checkpoints.guided_diffusion import GuidedDiffusionModel
from stepfusion.checkpoints.load import load_model
from stepfusion.errors import BackendError, SamplingCancelled
from stepfusion.execution.evaluator import Evaluator, Network
from stepfusion.execution.plan import make_plan
from stepfusion.kernels import STREAM_INITIAL, reference
from stepfusion.kernels.coefficients import PREDICTIONS
from stepfusion.lanes.batch_size import free_bytes, largest_batch, peak_bytes
from stepfusion.lanes.cuda_graph import capture
from stepfusion.lanes.device_tables import TableStore
from stepfusion.lanes.editing import make_edit, noised
from stepfusion.lanes.interpolation import slerp
from stepfusion.lanes.request import Model, Request, check_images, make_request
from stepfusion.lanes.runner import Runner, RunnerPool, Settings, as_int64
from stepfusion.lanes.transfer import HostCopy, upload
from stepfusion.lanes.walk import Event, Walk
from stepfusion.networks import prepare_network
from stepfusion.samplers.schedule import NoiseSchedule
from stepfusion.samplers.scheduler_config import read_config
from stepfusion.samplers.table import StepTable

SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddim": samplers.ddim,
    "ddpm": samplers.ddpm,
    "dpmpp_2m": samplers.dpmpp_2m,
    "euler_ancestral": samplers.euler_ancestral,
    "ddim_inversion": samplers.ddim_inversion,
}
#: The eta of those that take one, by default.
SAMPLERS_WITH_ETA: dict[str, float] = {
    name: options["eta"]
    for name, make in SAMPLERS.items()
    for options in [make.__kwdefaults__ or {}]
    if "eta" in options
}
_DEFAULT_STEPS = 50
_DEFAULT_BATCH = {"cpu": 64}
_DEFAULT_BATCH_GPU = 256
_DEFAULT_BATCH_INVARIANT = 16
_IDLE_RUNNERS = 4
_WHY_NOT_THRESHOLD = "it needs a quantile of each whole image, which the fused step never sees"


class Engine:
    """Samples images from one network, on one device.

    Args:
        model: any callable ``model(x, timesteps)`` or ``model(x, timesteps, labels)`` that returns what
            ``prediction`` says: x [B, C, H, W] in the engine's dtype, timesteps and labels int64 [B]. A
            ``torch.nn.Module`` is moved to the device and dtype (a copy of it, where that changes it).
        schedule: the noise schedule it was trained with.
        prediction: "epsilon", "sample" or "v_prediction".
        shape: of one image, (C, H, W); by default the model's ``in_channels`` and ``sample_size``.
        num_classes: how many labels the model takes; by default the model's ``num_classes``, None for a model without
            labels.
        null_label: the label that stands for none, which guidance needs.
        class_names: what the labels are called.
        device, dtype, backend, network: "auto", or what :meth:`explain` would then name.
        batch: the most lanes at a time; batches are padded to powers of two up to it. By default 64 on a CPU, and on
            a GPU up to 256 as its free memory allows, found by a trial before the first images.
        invariant: keep one bucket of ``batch`` lanes for everything, so that an image's bits depend on nothing but
            its seed, index, label and table.
        options: default options of the samplers (clip, spacing, ...), as a checkpoint's scheduler config gives them.
        decode: what turns a final latent into an image, for latent diffusion: a module (moved to the device) or any
            callable, float32 [n, C, H, W] -> floating-point [n, C', H', W'] in [-1, 1]. Pixels are then of decoded
            images (:meth:`to_uint8`, :meth:`generate`), and :meth:`decode_latents` gives them as they are;
            :meth:`sample` returns latents as ever.

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
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
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
        self.null_label = self._check_null_label(null_label)
        self.class_names = self._check_names(class_names)
        self.plan = make_plan(device, dtype, backend, network)
        self.invariant = _checks.boolean("invariant", invariant)
        self._batch = self._fixed_batch(batch)
        self.options = _check_options(options)
        if decode is not None and not callable(decode):
            raise TypeError(f"decode must be callable, got {type(decode).__name__}")
        self._decoder = _decoder_on(decode, self.plan.device) if isinstance(decode, torch.nn.Module) else decode
        self._model = self._on_device(model)
        self._evaluator = Evaluator(self._model, self.num_classes is not None)
        compiler = self.plan.compiler
        if compiler is not None:
            self._evaluator.compile_with(compiler)
        self._idle = RunnerPool(_IDLE_RUNNERS)
        self._uncaptured: str | None = None
        self._exported: str | None = None

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] | Pretrained | GuidedDiffusionModel, **arguments: Any
    ) -> Self:
        """An engine for a bundled model (by name), a diffusers directory, a ``.pt`` file of guided-diffusion, or what
        :func:`stepfusion.load_guided_diffusion` or :func:`stepfusion.load_pretrained` returned.

        ``arguments`` as for :class:`Engine`. A ``.pt`` file is one with a published name, or has its flags in a JSON
        file beside it.

        Raises:
            CheckpointError: what is missing or wrong in the directory or file.
        """
        loaded = source if isinstance(source, Pretrained | GuidedDiffusionModel) else load_model(source)
        schedule, prediction, options = read_config(loaded.scheduler_config)
        found = {
            "prediction": prediction,
            "null_label": loaded.null_label,
            "class_names": loaded.class_names,
            "options": options,
        }
        return cls(loaded.network, schedule, **{**found, **arguments})

    @classmethod
    def from_exported(cls, directory: str | os.PathLike[str], **arguments: Any) -> Self:
        """An engine whose network was exported (``stepfusion export``); ``arguments`` as for :class:`Engine`.

        The bundle's hashes, versions, device and dtype are checked before anything of it is loaded.

        Raises:
            ExportError: what is damaged, missing, or made for something else.
            ValueError: ``network`` asks for compiling what is compiled.
        """
        way = arguments.get("network", "auto")
        if way not in ("auto", "eager", "graph"):
            raise ValueError(f"network must be 'auto', 'eager' or 'graph' for an exported network, got {way!r}")
        # export depends on the engine, and not the engine on export: it is imported when it is asked for
        load = import_module("stepfusion.export.load").load_network
        network = load(directory, arguments.pop("device", "auto"), arguments.pop("dtype", "auto"))
        found = {
            "prediction": network.prediction,
            "shape": network.shape,
            "num_classes": network.num_classes,
            "null_label": network.null_label,
            "class_names": network.class_names,
            "options": network.options,
            "device": network.device,
            "dtype": network.dtype,
        }
        engine = cls(network, network.schedule, **{**found, **arguments})
        engine._exported = f"{network.bundle.manifest.format:<13} {network.bundle.path}"
        return engine

    # What it does

    def table(self, sampler: str = "ddim", steps: int | None = None, **options: Any) -> StepTable:
        """A sampler's table for this engine's schedule and prediction type, with the checkpoint's options where none
        are given; its clip only for samplers that clip by default.

        ``steps`` is 50 by default, all timesteps for "ddpm".
        """
        function = SAMPLERS[_checks.choice("sampler", sampler, SAMPLERS)]
        if steps is None and "timesteps" not in options and sampler != "ddpm":
            steps = min(_DEFAULT_STEPS, self.schedule.num_timesteps)
        accepted = function.__kwdefaults__ or {}
        unknown = [name for name in options if name not in accepted]
        if unknown:
            raise TypeError(
                f"sampler {sampler!r} takes no option {unknown[0]!r}; it takes {', '.join(sorted(accepted))}"
            )
        chosen = {name: value for name, value in self.options.items() if name in accepted}
        if accepted.get("clip") is None:
            chosen.pop("clip", None)
        return function(self.schedule, steps, **{**chosen, "prediction": self.prediction, **options})

    def sample(
        self,
        n: int | None = None,
        table: StepTable | Sequence[StepTable] | None = None,
        *,
        steps: int | None = None,
        eta: float | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        start: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        strength: float | None = None,
        mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        progress: bool | None = None,
        callback: Callable[[Event], object] | None = None,
        nonfinite: str = "raise",
    ) -> torch.Tensor:
        """Make images.

        Args:
            n: how many; by default as many as ``indices``, ``start``, ``image`` or the sequences say, else 1.
            table: a sampler's table, or one for each image; without one, ``sampler``, ``steps`` and ``eta`` make it.
            seed: in [0, 2**64), one for all or one each.
            indices: the images' numbers under their seeds, in [0, 2**32); 0 .. n-1 by default. An image is a function
                of model, table, seed, index and label, and of nothing else (to the bit with ``invariant=True``).
            labels: one for all or one each; the null label by default. A context UNet
                (:class:`stepfusion.networks.ContextUNet`) also takes contexts as they are, mixed as one likes: float
                [K] for all or [n, K], zeros for none.
            guidance: classifier-free guidance scale (Ho & Salimans 2022), one for all or one each; 1 is none.
            start: float [n, C, H, W], states to start from instead of noise.
            image: float [n, C, H, W] in [-1, 1], or [1, C, H, W] for all: make images from this one, with
                ``strength``, ``mask`` or both (:mod:`stepfusion.lanes.editing`).
            strength: in (0, 1]: start from the image noised with its own counter-based noise, and walk the last
                ceil(strength * steps) rows of the table. At 1, the default with a mask, start from noise alone.
            mask: [n or 1, C or 1, H, W], 1 where to repaint and 0 where to keep, as in diffusers: the kept region is
                noised again by every step and ends exactly equal to the image.
            noise: float [steps, n, C, H, W], the z of every step instead of the counter-based one, of a kept region
                too; with a strength, as many steps as are walked.
            progress: a bar on stderr; by default where that is a terminal.
            callback: called after every step with an :class:`Event`; returning False cancels.
            nonfinite: "raise" where an image becomes NaN or infinite, or "keep" it.

        Returns:
            float32 [n, C, H, W] on the engine's device, in [-1, 1] where the sampler ends in a clipped x0.

        Raises:
            TypeError, ValueError: naming the argument, before any work.
            NonFiniteError: naming image and step.
            SamplingCancelled: by the callback.
        """
        _checks.choice("nonfinite", nonfinite, ("raise", "keep"))
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        table = self._table(table, sampler, steps, eta)
        edit = make_edit(image, strength, mask, start)
        request = self._request(n, table, seed, indices, labels, guidance, start, noise, edit)
        result = torch.empty((len(request), *self.shape), device=self.plan.device)
        shown = sys.stderr.isatty() if progress is None else _checks.boolean("progress", progress)
        total = sum(request.table.steps(part) for part in request.parts)
        done = 0
        with tqdm(total=total, unit="step", disable=not shown, dynamic_ncols=True) as bar:
            for moved, events in self._walk(request, result, nonfinite == "raise", callback is not None):
                done += moved
                if shown:
                    bar.update(moved)
                if callback is not None and False in [callback(event) for event in events]:
                    raise SamplingCancelled(f"the callback cancelled sampling after {done} of {total} steps")
        return result

    def generate(
        self,
        n: int | None = None,
        table: StepTable | Sequence[StepTable] | None = None,
        *,
        steps: int | None = None,
        eta: float | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        image: torch.Tensor | None = None,
        strength: float | None = None,
        mask: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """Make images in bulk, as pixels on the host: a batch is copied there while the next one is computed.

        Arguments as for :meth:`sample`.

        Yields:
            uint8 [k, H, W, C], k at most :attr:`batch`, in order.
        """
        request = self.request(
            n,
            table,
            steps=steps,
            eta=eta,
            sampler=sampler,
            seed=seed,
            indices=indices,
            labels=labels,
            guidance=guidance,
            image=image,
            strength=strength,
            mask=mask,
        )
        return self._generate(request)

    def request(
        self,
        n: int | None = None,
        table: StepTable | Sequence[StepTable] | None = None,
        *,
        steps: int | None = None,
        eta: float | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        image: torch.Tensor | None = None,
        strength: float | None = None,
        mask: torch.Tensor | None = None,
    ) -> Request:
        """What :meth:`sample` would do with these arguments, checked, and not done.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        tables = self._table(table, sampler, steps, eta)
        edit = make_edit(image, strength, mask, None)
        return self._request(n, tables, seed, indices, labels, guidance, None, None, edit)

    def stream(
        self,
        n: int | None = None,
        table: StepTable | None = None,
        *,
        every: int = 1,
        steps: int | None = None,
        eta: float | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] = 0,
        indices: Sequence[int] | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        start: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        strength: float | None = None,
        mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> Iterator[Event]:
        """Yield an :class:`Event` after every ``every``-th step and after the last; stop iterating to cancel.

        Arguments as for :meth:`sample`.
        """
        every = _checks.integer("every", every, 1, 1 << 31)
        tables = self._table(table, sampler, steps, eta)
        edit = make_edit(image, strength, mask, start)
        request = self._request(n, tables, seed, indices, labels, guidance, start, noise, edit)
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
        """DDIM inversion: images to the noise that :meth:`sample` with the same timesteps turns back into them.

        Args:
            x: float [n, C, H, W] in [-1, 1].
            table: a :func:`stepfusion.ddim_inversion`; without one, ``steps`` makes it.
            labels, progress: as for :meth:`sample`.

        Returns:
            float32 [n, C, H, W].
        """
        check_images("x", x, (len(x) if isinstance(x, torch.Tensor) and x.ndim else 0, *self.shape))
        if table is not None and steps is not None:
            raise ValueError("table and steps exclude each other, got both")
        table = self.table("ddim_inversion", steps) if table is None else table
        if isinstance(table, StepTable) and table.timesteps[0] > table.timesteps[-1]:
            raise ValueError(f"encode needs a table that climbs, as ddim_inversion makes it, got {table!r}")
        return self.sample(table=table, start=x, labels=labels, progress=progress)

    def reconstruct(
        self,
        x: torch.Tensor,
        *,
        steps: int | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        progress: bool | None = None,
    ) -> torch.Tensor:
        """Images to their noise by :meth:`encode`, and back by DDIM with eta 0 (Song et al. 2021, section 5.4).

        Both walk the same timesteps without a clip, each by Euler's method on one differential equation: the more
        steps, the closer what comes back is to ``x``.

        Args:
            x: float [n, C, H, W] in [-1, 1].
            steps: of each half, 50 by default.
            labels, progress: as for :meth:`sample`.

        Returns:
            float32 [n, C, H, W], not clipped.
        """
        noise = self.encode(x, steps=steps, labels=labels, progress=progress)
        table = self.table("ddim", steps, eta=0.0, clip=None)
        return self.sample(table=table, start=noise, labels=labels, progress=progress)

    def interpolate(
        self,
        a: int | torch.Tensor,
        b: int | torch.Tensor,
        weights: int | Sequence[float] = 7,
        table: StepTable | None = None,
        *,
        steps: int | None = None,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        progress: bool | None = None,
    ) -> torch.Tensor:
        """The images of the noises on the arc from ``a`` to ``b`` (:func:`stepfusion.slerp`), by DDIM with eta 0.

        Two pictures are mixed through what :meth:`encode` makes of them; a table of as many steps without a clip then
        takes both ends back, as :meth:`reconstruct` does.

        Args:
            a, b: float [C, H, W], noises; or seeds in [0, 2**64), for the noise that their image 0 starts from.
            weights: each in [0, 1], where 0 is ``a`` and 1 is ``b``; or how many, evenly spaced with both ends.
            table, steps, labels, guidance, progress: as for :meth:`sample`; one label for all or one each.

        Returns:
            float32 [k, C, H, W], one image for each weight.
        """
        start = slerp(self._noise("a", a), self._noise("b", b), weights)
        return self.sample(
            None,
            self.table("ddim", steps, eta=0.0) if table is None else table,
            steps=None if table is None else steps,
            start=start,
            labels=labels,
            guidance=guidance,
            progress=progress,
        )

    @property
    def network(self) -> Network:
        """The model as this engine runs it: on its device, in its dtype."""
        return self._model

    @property
    def batch(self) -> int:
        """The most lanes at a time."""
        if self._batch is None:
            self._batch = self._batch_that_fits()
        return self._batch

    def to_uint8(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, C, H, W] in [-1, 1], or latents of an engine that decodes, to pixels, uint8 [n, H, W, C].

        They stay on their device; by this engine's backend.
        """
        pixels: torch.Tensor = self.plan.ops.to_uint8(self.decode_latents(x))
        return pixels

    @torch.no_grad()
    def decode_latents(self, x: torch.Tensor) -> torch.Tensor:
        """The images [n, C', H', W'] of latents float [n, C, H, W], :attr:`batch` at a time, by the hook ``decode``.

        Without one, ``x`` itself. ValueError where the hook returns no images.
        """
        if self._decoder is None:
            return x
        check_images("x", x, (len(x) if isinstance(x, torch.Tensor) and x.ndim else 0, *self.shape))
        latents = x.to(self.plan.device, torch.float32)
        parts = []
        for latent in torch.split(latents, self.batch):
            part = self._decoder(latent)
            image = isinstance(part, torch.Tensor) and part.is_floating_point()
            if not image or part.ndim != 4 or len(part) != len(latent):
                given = _checks.describe(part) if isinstance(part, torch.Tensor) else type(part).__name__
                raise ValueError(f"decode must return floating-point images [{len(latent)}, C, H, W], got {given}")
            parts.append(part)
        return torch.cat(parts)

    def explain(self) -> str:
        """Which path runs each part, and why, a line each."""
        lines = self.plan.lines()
        if self.plan.backend.value == "triton":
            value = "refused" if self.plan.backend.asked else "reference"
            lines.append(f"{'threshold':<14} {value:<13} {_WHY_NOT_THRESHOLD}")
        if self._exported is not None:
            lines.append(f"{'exported':<14} {self._exported}")
        if self._uncaptured is not None:
            lines.append(f"{'':<14} {'eager':<13} no tick was captured: {self._uncaptured}")
        if (declined := self._evaluator.declined) is not None:
            lines.append(f"{'':<14} {'declined':<13} {declined}")
        if self._batch is None:
            bucket = "buckets of lanes up to what fits, found before the first images"
        elif self.invariant:
            bucket = f"one bucket of {self.batch} lanes: bits depend on neither batch size nor neighbours"
        else:
            bucket = (
                f"buckets of 1 to {self.batch} lanes: noise is identical, images agree to rounding between buckets"
            )
        guided = (
            "classifier-free, by the null label"
            if self.null_label is not None
            else "none: the model has no null label"
        )
        return "\n".join((*lines, f"{'lanes':<14} {'':<13} {bucket}", f"{'guidance':<14} {'':<13} {guided}"))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return (
            f"Engine({shape}, {self.prediction}, {self.schedule.name}, {self.plan.device}, {self.plan.backend.value})"
        )

    # How it does it

    @property
    def _facts(self) -> Model:
        """What a request is checked against."""
        contexts = getattr(self._model, "context_size", None)
        return Model(self.schedule, self.prediction, self.shape, self.num_classes, self.null_label, contexts)

    def _noise(self, name: str, value: int | torch.Tensor) -> torch.Tensor:
        """A noise [C, H, W] as given, or the one that image 0 of a seed starts from."""
        device = self.plan.device
        if isinstance(value, torch.Tensor):
            check_images(name, value, self.shape)
            return value.to(device)
        seed = torch.tensor([as_int64(_checks.integer(name, value, 0, (1 << 64) - 1))], device=device)
        zero = torch.zeros_like(seed)
        noise: torch.Tensor = self.plan.ops.normal(seed, zero, zero, self.shape, STREAM_INITIAL)[0]
        return noise

    def _table(
        self, table: StepTable | Sequence[StepTable] | None, sampler: str | None, steps: int | None, eta: float | None
    ) -> StepTable | Sequence[StepTable]:
        """The table as given, or the one that sampler, steps and eta describe."""
        if table is None:
            return self.table(sampler or "ddim", steps, **({} if eta is None else {"eta": eta}))
        for name, value in (("sampler", sampler), ("steps", steps), ("eta", eta)):
            if value is not None:
                raise ValueError(f"table and {name} exclude each other, got both")
        return table

    def _request(self, *arguments: Any) -> Request:
        """:func:`stepfusion.lanes.request.make_request` for this engine.

        BackendError: the step was asked for from kernels that cannot take it.
        """
        request = make_request(self._facts, *arguments)
        if request.table.thresholds and self.plan.backend.value == "triton" and self.plan.backend.asked:
            raise BackendError(f"backend='triton' cannot run dynamic thresholding: {_WHY_NOT_THRESHOLD}")
        return request

    def _noised(self, request: Request) -> Request:
        """The request with the states that its image gives it to start from."""
        if request.image is None:
            return request
        device, table = self.plan.device, request.table
        numbers = [[int(table.timesteps[t.row]), as_int64(t.seed), t.index] for t in request.tickets]
        values = torch.tensor(numbers, dtype=torch.int64).reshape(-1, 3).t().contiguous()
        timesteps, seeds, indices = upload(values, device)
        start = noised(request.image.to(device), timesteps, seeds, indices, self.schedule, self.plan.ops)
        return replace(request, image=None, start=start)

    def _stream(self, request: Request, every: int) -> Iterator[Event]:
        result = torch.empty((len(request), *self.shape), device=self.plan.device)
        for _, events in self._walk(request, result, True, True):
            for event in events:
                if (event.step + 1) % every == 0 or event.step + 1 == event.steps:
                    yield event

    def _generate(self, request: Request) -> Iterator[torch.Tensor]:
        """One batch on its way to the host while the next one is computed."""
        under_way: deque[tuple[HostCopy, list[Walk]]] = deque()
        first = 0
        while first < len(request) or under_way:
            if first < len(request):
                part = request.part(first, min(first + self.batch, len(request)))
                result, unchecked = torch.empty((len(part), *self.shape), device=self.plan.device), list[Walk]()
                for _ in self._walk(part, result, True, False, unchecked):
                    pass
                under_way.append((HostCopy(self.to_uint8(result)), unchecked))
                first += len(part)
            if len(under_way) > 1 or first == len(request):
                copy, walks = under_way.popleft()
                for walk in walks:
                    walk.check()
                yield copy.wait()

    @torch.no_grad()
    def _walk(
        self,
        request: Request,
        result: torch.Tensor,
        strict: bool,
        watched: bool,
        unchecked: list[Walk] | None = None,
    ) -> Iterator[tuple[int, list[Event]]]:
        """Run a request to its end, writing finished images into ``result``; yields what each tick moved, and events.

        The flags of the last images to leave are read here, unless the walks are to be left in ``unchecked``. Where
        memory runs out, the batch is halved and the unfinished images start again: they come out the same.
        """
        request = self._noised(request)
        waiting = dict.fromkeys(range(len(request)))
        while waiting:
            lanes = self._bucket(len(request))
            settings = self._settings(request, lanes)
            try:
                runner = self._idle.take(settings, self._runner)
                deferred = unchecked is not None
                walk = Walk(runner, request, result, waiting, strict=strict, watched=watched, deferred=deferred)
                try:
                    yield from walk.run()
                    if unchecked is None:
                        walk.check()
                    else:
                        unchecked.append(walk)
                finally:
                    self._note_capture(runner)
                    self._idle.give(settings, runner)
            except torch.OutOfMemoryError:
                if lanes == 1 or self.invariant:
                    raise
                self._idle.clear()
                self._batch = max(1, lanes // 2)
                warnings.warn(
                    f"out of memory: going on with {self._batch} lanes at a time", RuntimeWarning, stacklevel=3
                )

    def _settings(self, request: Request, lanes: int) -> Settings:
        captured = self.plan.captures
        return Settings(
            lanes,
            self.shape,
            self.plan.device,
            self.plan.dtype,
            null_label=self.null_label if request.guided else None,
            separate=self.invariant,
            learned_variance=request.table.learned_variance,
            history=request.table.history,
            known=request.known is not None,
            threshold=request.table.thresholds,
            capacity=self.schedule.num_timesteps if captured else 0,
            context_size=self._facts.context_size if request.mixed else None,
        )

    def _runner(self, settings: Settings, tables: TableStore | None = None) -> Runner:
        captured = self.plan.captures and self._uncaptured is None and not settings.threshold
        ops = reference if settings.threshold else self.plan.ops
        return Runner(self._evaluator, settings, ops, capture if captured else None, tables)

    def _note_capture(self, runner: Runner) -> None:
        """Remember, and say once, that ticks cannot be captured."""
        if runner.uncaptured is not None and self._uncaptured is None:
            self._uncaptured = runner.uncaptured
            warnings.warn(
                f"the tick cannot be captured as a CUDA graph, and runs eagerly: {self._uncaptured}",
                RuntimeWarning,
                stacklevel=4,
            )

    # How it is set up

    def _check_null_label(self, null_label: int | None) -> int | None:
        if null_label is None:
            return None
        if self.num_classes is None:
            raise ValueError(f"null_label is {null_label!r}, and the model takes no labels")
        return _checks.integer("null_label", null_label, 0, self.num_classes - 1)

    def _check_names(self, names: Sequence[str] | None) -> tuple[str, ...] | None:
        """One name a class; the null label needs none."""
        if names is None:
            return None
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"class_names must be a sequence of names, got {names!r}")
        classes = self.num_classes or 0
        if len(names) not in ((classes, classes - 1) if self.null_label is not None else (classes,)):
            raise ValueError(f"class_names must name each of the {classes} classes, got {len(names)} names")
        return tuple(names)

    def _fixed_batch(self, batch: int | None) -> int | None:
        """The largest batch as given or by default; None where it is to be found from the free memory."""
        if batch is not None:
            return _checks.integer("batch", batch, 1, 1 << 20)
        if self.invariant:
            return _DEFAULT_BATCH_INVARIANT
        if self.plan.device.type == "cuda":
            return None
        return _DEFAULT_BATCH.get(self.plan.device.type, _DEFAULT_BATCH_GPU)

    def _batch_that_fits(self) -> int:
        """The largest batch that the free memory allows, by trial."""
        table = self.table("ddim", 1)
        request = make_request(self._facts, 1, table, 0, None, 0 if self.num_classes else None, None, None, None)

        def peak(lanes: int) -> int:
            def run() -> None:
                runner = Runner(self._evaluator, self._settings(request, lanes), self.plan.ops)
                runner.load(table)
                with torch.no_grad():
                    runner.tick()

            run()  # what is paid once is paid before measuring
            return peak_bytes(run, self.plan.device)

        return largest_batch(peak, free_bytes(self.plan.device), _DEFAULT_BATCH_GPU)

    def _bucket(self, images: int) -> int:
        """The number of lanes for so many images: the smallest power of two that holds them, at most ``batch``."""
        if self.invariant:
            return self.batch
        return min(self.batch, 1 << max(0, images - 1).bit_length())

    def _on_device(self, model: Network) -> Network:
        """The model on the engine's device, in its dtype, in eval mode; our own networks also laid out for it."""
        if not isinstance(model, torch.nn.Module):
            return model
        return prepare_network(model, self.plan.device, self.plan.dtype, fused=self.plan.fuses_network)


def _check_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options that some sampler takes."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict, got {type(options).__name__}")
    known = sorted({name for function in SAMPLERS.values() for name in function.__kwdefaults__ or {}})
    for name in options:
        if name not in known:
            raise ValueError(f"options must be options of the samplers ({', '.join(known)}), got {name!r}")
    return dict(options)


def _decoder_on(decoder: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A decoder in eval mode on a device; a copy, unless it is already there."""
    tensors = (*decoder.parameters(), *decoder.buffers())
    if not decoder.training and all(tensor.device == device for tensor in tensors):
        return decoder
    return copy.deepcopy(decoder).to(device).eval()


def _image_shape(model: Network, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one image, as given or as the model says."""
    if shape is None:
        channels, size = getattr(model, "in_channels", None), getattr(model, "sample_size", None)
        if channels is None or size is None:
            raise ValueError("shape is needed, e.g. (3, 32, 32): the model has no in_channels and sample_size")
        shape = (channels, *((size, size) if isinstance(size, int) else size))
    if isinstance(shape, str) or not isinstance(shape, Sequence) or not shape:
        raise TypeError(f"shape must be a sequence of sizes, e.g. (3, 32, 32), got {shape!r}")
    return tuple(_checks.integer("shape", size, 1, 1 << 20) for size in shape)
