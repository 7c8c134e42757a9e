"""The engine: a network, a schedule, and images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from importlib import import_module
from typing import Any, Self, Unpack

import torch

from stepfusion import _checks
from stepfusion.checkpoints.load import load_model
from stepfusion.checkpoints.loaded import LoadedModel
from stepfusion.execution import explain
from stepfusion.execution.decoder import Decode, decode_batches, decoded_shape, decoder_on
from stepfusion.execution.evaluator import Evaluator, Network
from stepfusion.execution.plan import make_plan
from stepfusion.kernels.launch import plain_torch
from stepfusion.lanes import offline
from stepfusion.lanes.conditions import Prompts
from stepfusion.lanes.interpolation import slerp
from stepfusion.lanes.inversion import climbing_table
from stepfusion.lanes.policy import PolicyMethods
from stepfusion.lanes.request import Event, Request, Tables
from stepfusion.lanes.runners import Runners
from stepfusion.model_spec import SPEC_ARGUMENTS, ModelSpec
from stepfusion.networks import prepare_network
from stepfusion.networks.conditioned import ConditionSpec
from stepfusion.networks.time_conditioned import TimeConditioned
from stepfusion.options import Backend, DType, ExecutionOptions, NetworkMode, Sampler, SamplerOptions, SamplingOptions
from stepfusion.samplers.path import Path
from stepfusion.samplers.table import StepTable


class Engine(PolicyMethods):
    """Samples images from one network, on one device.

    Args:
        model: any callable ``model(x, timesteps)`` or ``model(x, timesteps, labels)`` that returns what
            ``prediction`` says: x [B, C, H, W] in the engine's dtype, timesteps and labels int64 [B]; on a path that
            is not discrete, timesteps are what the path tells (``path.told``), float32 [B]. A
            ``torch.nn.Module`` is copied as it is now, in eval mode, on the engine's device, in its dtype: what is
            changed afterwards in the module or its weights does not change this engine. In a training loop, make an
            engine for each preview.
        schedule: the noise schedule it was trained with, or another path: a :class:`stepfusion.SigmaPath` or
            :class:`stepfusion.FlowPath`.
        prediction: "epsilon", "sample" or "v_prediction"; on other paths one of its ``predictions``. By default the
            first of them.
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
        conditions: what images are conditioned on beside labels, which the model takes as keyword arguments; by
            default what a network of ours says.
        prompts: makes the conditions of a prompt, by name, and of None those of no prompt.
        decode: what turns a final latent into an image, for latent diffusion: a module (moved to the device) or any
            callable, float32 [n, C, H, W] -> floating-point [n, C', H', W'] in [-1, 1]. Pixels are then of decoded
            images (:meth:`to_uint8`, :meth:`generate`), and :meth:`decode_latents` gives them as they are;
            :meth:`sample` still returns latents.
        encode_images: its inverse, by which the ``image`` of a request becomes a latent.
        copy: False saves the memory of the copy if the module is already in eval mode on the device, in the dtype;
            its weights must not change then.

    Attributes:
        spec: what is known of the model; its fields are attributes of the engine, too.
        plan: which path runs each part.
        network: the model as this engine runs it: on its device, in its dtype.
        evaluator: what calls the network.
        runners: what checks requests and makes the runners that move their lanes.
        source: the name or path that alone the model was loaded by; None if it came otherwise.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: what was asked for cannot run here.
    """

    @plain_torch(gradients=False)
    def __init__(
        self,
        model: Network,
        schedule: Path,
        *,
        prediction: str | None = None,
        shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
        class_names: Sequence[str] | None = None,
        device: str | torch.device = "auto",
        dtype: DType | torch.dtype = "auto",
        backend: Backend = "auto",
        network: NetworkMode = "auto",
        batch: int | None = None,
        invariant: bool = False,
        options: Mapping[str, Any] | None = None,
        conditions: Sequence[ConditionSpec] | None = None,
        prompts: Prompts | None = None,
        decode: Decode | None = None,
        encode_images: Decode | None = None,
        copy: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        self.spec = spec = ModelSpec.of_network(
            model,
            schedule,
            prediction=prediction,
            shape=shape,
            num_classes=num_classes,
            null_label=null_label,
            class_names=class_names,
            options=options,
            conditions=conditions,
        )
        self.schedule, self.prediction, self.shape = spec.schedule, spec.prediction, spec.shape
        self.num_classes, self.null_label, self.class_names = spec.num_classes, spec.null_label, spec.class_names
        self.options = dict(spec.options)
        self.plan = make_plan(device, dtype, backend, network, ours=isinstance(model, TimeConditioned))
        execution = ExecutionOptions(device, dtype, backend, network, batch, invariant)
        self.invariant = execution.invariant
        self._decode = decoder_on(decode, self.plan.device)
        self.network = model
        if isinstance(model, torch.nn.Module):
            self.network = prepare_network(
                model, self.plan.device, self.plan.dtype, fused=self.plan.fuses_network, copied=copy
            )
        labelled, products = spec.num_classes is not None, self.plan.products
        self.evaluator = Evaluator(self.network, labelled, products, spec.told_dtype, spec.conditions)
        if self.plan.compiler is not None:
            self.evaluator.compile_with(self.plan.compiler)
        encoder = decoder_on(encode_images, self.plan.device, "encode_images")
        pictured = partial(decoded_shape, self._decode, spec.shape, self.plan.device)
        self.runners = Runners(spec, self.plan, self.evaluator, execution, prompts, encoder, pictured)
        self._exported: str | None = None
        self.source: str | None = None

    @classmethod
    @plain_torch(gradients=False)
    def from_pretrained(cls, source: str | os.PathLike[str] | LoadedModel, **arguments: Any) -> Self:
        """An engine for a bundled model (by name), a diffusers directory, a ``.pt`` file of guided-diffusion, a
        ``.safetensors`` file of EDM or Stable Diffusion (docs/models.md), or what :func:`stepfusion.load_pretrained`
        and its likes returned.

        ``arguments`` as for :class:`Engine`, and ``lora``: LoRA files, which :func:`stepfusion.load_pretrained` adds.
        A ``.pt`` file has a published name, or its flags in a JSON file beside it.

        CheckpointError says what is missing or wrong in the directory or file.
        """
        alone = arguments.keys() <= {field.name for field in fields(ExecutionOptions)}
        if not isinstance(source, LoadedModel):
            arguments.setdefault("copy", False)  # nobody else has what is loaded here
        loaded = load_model(source, arguments.pop("lora", None))
        known = {name: arguments.pop(name) for name in SPEC_ARGUMENTS if name in arguments}
        spec = loaded.spec_with(**known)
        engine = cls._of_spec(loaded.network, spec, {**loaded.around(spec), **arguments})
        if alone and not isinstance(source, LoadedModel):
            engine.source = os.fspath(source)
        return engine

    @classmethod
    @plain_torch(gradients=False)
    def from_exported(cls, directory: str | os.PathLike[str], **arguments: Any) -> Self:
        """An engine whose network was exported (``stepfusion export``); ``arguments`` as for :class:`Engine`.

        The bundle's hashes, versions, device and dtype are checked before anything of it is loaded.

        Raises:
            ExportError: what is damaged, missing, or made for something else.
            ValueError: ``network`` asks for compiling what is compiled.
        """
        if (way := arguments.get("network", "auto")) not in ("auto", "eager", "graph"):
            raise ValueError(f"network must be 'auto', 'eager' or 'graph' for an exported network, got {way!r}")
        # export depends on the engine, and not the engine on export: it is imported when it is asked for
        load = import_module("stepfusion.export.load").load_network
        network = load(directory, arguments.pop("device", "auto"), arguments.pop("dtype", "auto"))
        engine = cls._of_spec(network, network.spec, {"device": network.device, "dtype": network.dtype, **arguments})
        engine._exported = f"{network.bundle.manifest.format:<13} {network.bundle.path}"
        return engine

    @classmethod
    def _of_spec(cls, network: Network, spec: ModelSpec, arguments: Mapping[str, Any]) -> Self:
        """An engine for a network whose spec is known; ``arguments`` go before what the spec says."""
        return cls(network, spec.schedule, **{**{name: getattr(spec, name) for name in SPEC_ARGUMENTS}, **arguments})

    def table(
        self, sampler: Sampler | None = None, steps: int | None = None, **options: Unpack[SamplerOptions]
    ) -> StepTable:
        """A sampler's table for this engine's schedule and prediction type.

        The checkpoint's options hold if none are given, its clip only for samplers that clip by default. The sampler
        is "ddim" by default, on other paths "heun" or "euler"; ``steps`` is 50 by default, 18 for "heun", and all
        timesteps for "ddpm".
        """
        return self.spec.table(sampler, steps, **options)

    def sample(
        self,
        n: int | Request | None = None,
        table: Tables | None = None,
        *,
        progress: bool | None = None,
        callback: Callable[[Event], object] | None = None,
        nonfinite: str = "raise",
        **options: Unpack[SamplingOptions],
    ) -> torch.Tensor:
        """Make images.

        Args:
            n: how many; by default as many as ``indices``, ``start``, ``image`` or the sequences say, else 1. Or what
                :meth:`request` returned, without further arguments.
            table: a sampler's table, or one for each image; without one, ``sampler``, ``steps`` and ``eta`` make it.
            progress: a bar on stderr; by default if that is a terminal.
            callback: called after every step with an :class:`Event`; returning False cancels.
            nonfinite: "raise" if an image becomes NaN or infinite, or "keep" it.
            options: sampler, steps, spacing, seed, labels, prompt, guidance, image and others, as
                :class:`stepfusion.options.SamplingOptions` describes them.

        Returns:
            float32 [n, C, H, W] on the engine's device, in [-1, 1] if the sampler ends in a clipped x0.

        Raises:
            TypeError, ValueError: naming the argument, before any work.
            NonFiniteError: naming image and step.
            SamplingCancelled: by the callback.
        """
        _checks.choice("nonfinite", nonfinite, ("raise", "keep"))
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        request = self.runners.request(n, table, options)
        shown = sys.stderr.isatty() if progress is None else _checks.boolean("progress", progress)
        return offline.sample(self.runners, request, shown=shown, strict=nonfinite == "raise", callback=callback)

    def generate(
        self, n: int | Request | None = None, table: Tables | None = None, **options: Unpack[SamplingOptions]
    ) -> Iterator[torch.Tensor]:
        """Make images in bulk, as pixels on the host: a batch is copied there while the next one is computed.

        Arguments as for :meth:`sample`. Yields uint8 [k, H, W, C] in order, k at most :attr:`batch`.
        """
        return offline.generate(self.runners, self.runners.request(n, table, options), self.to_uint8)

    def request(
        self, n: int | Request | None = None, table: Tables | None = None, **options: Unpack[SamplingOptions]
    ) -> Request:
        """What :meth:`sample` would do with these arguments, checked, and not done.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        return self.runners.request(n, table, options)

    def stream(
        self,
        n: int | Request | None = None,
        table: Tables | None = None,
        *,
        every: int = 1,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Event]:
        """Yield an :class:`Event` after every ``every``-th step and after the last; stop iterating to cancel.

        Arguments as for :meth:`sample`.
        """
        every = _checks.integer("every", every, 1, 1 << 31)
        return offline.stream(self.runners, self.runners.request(n, table, options), every)

    def encode(
        self,
        x: torch.Tensor,
        table: StepTable | None = None,
        *,
        steps: int | None = None,
        labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> torch.Tensor:
        """DDIM inversion: images to the noise that :meth:`sample` turns back into them.

        Args:
            x: float [n, C, H, W] in [-1, 1].
            table: a :func:`stepfusion.ddim_inversion`; without one, ``steps`` makes it.
            labels, prompt, progress: as for :meth:`sample`.

        Returns:
            float32 [n, C, H, W]. TypeError or ValueError name the argument.
        """
        table = climbing_table(self.spec, x, table, steps)
        return self.sample(table=table, start=x, labels=labels, prompt=prompt, progress=progress)

    def reconstruct(
        self,
        x: torch.Tensor,
        *,
        steps: int | None = None,
        labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> torch.Tensor:
        """Images to their noise by :meth:`encode`, and back by DDIM with eta 0 (Song et al. 2021, section 5.4).

        Both walk the same timesteps without a clip, by Euler's method: the more steps, the closer ``x`` comes back.

        Args:
            x, labels, prompt, progress: as for :meth:`encode`.
            steps: of each half, 50 by default.

        Returns:
            float32 [n, C, H, W], not clipped.
        """
        noise = self.encode(x, steps=steps, labels=labels, prompt=prompt, progress=progress)
        table = self.table("ddim", steps, eta=0.0, clip=None)
        return self.sample(table=table, start=noise, labels=labels, prompt=prompt, progress=progress)

    def interpolate(
        self,
        a: int | torch.Tensor,
        b: int | torch.Tensor,
        weights: int | Sequence[float] = 7,
        table: StepTable | None = None,
        *,
        steps: int | None = None,
        labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        guidance: float | Sequence[float] | None = None,
        prompt: str | Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> torch.Tensor:
        """The images of the noises on the arc from ``a`` to ``b`` (:func:`stepfusion.slerp`), by DDIM with eta 0.

        Two pictures are mixed through what :meth:`encode` makes of them; a table of as many steps without a clip then
        takes both ends back, as :meth:`reconstruct` does.

        Args:
            a, b: float [C, H, W], states to start from; or seeds in [0, 2**64), for that of their image 0.
            weights: each in [0, 1], where 0 is ``a`` and 1 is ``b``; or how many, evenly spaced with both ends.
            table, steps, labels, guidance, prompt, progress: as for :meth:`sample`; one label for all or one each.

        Returns:
            float32 [k, C, H, W], one image for each weight.
        """
        if table is None:
            table, steps = self.table("ddim", steps, eta=0.0), None
        options: SamplingOptions = {"labels": labels, "guidance": guidance, "prompt": prompt, "steps": steps}
        first = self.runners.first_state
        options["start"] = slerp(first("a", a, table), first("b", b, table), weights)
        return self.sample(None, table, progress=progress, **options)

    @plain_torch(gradients=False)
    def to_uint8(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, C, H, W] in [-1, 1], or latents of an engine that decodes, to pixels, uint8 [n, H, W, C].

        They stay on their device; by this engine's backend.
        """
        pixels: torch.Tensor = self.plan.ops.to_uint8(self.decode_latents(x))
        return pixels

    @plain_torch(gradients=False)
    def decode_latents(self, x: torch.Tensor) -> torch.Tensor:
        """The images [n, C', H', W'] of latents float [n, C, H, W], :attr:`batch` at a time, by the hook ``decode``.

        Without one, ``x`` itself. ValueError if the hook returns no images.
        """
        if self._decode is None:
            return x
        _checks.images("x", x, (len(x) if isinstance(x, torch.Tensor) and x.ndim else 0, *self.shape))
        return decode_batches(self._decode, x.to(self.plan.device, torch.float32), self.batch)

    @cached_property
    def image_shape(self) -> tuple[int, ...]:
        """Of one image as :meth:`decode_latents` gives it, (C, H, W)."""
        return decoded_shape(self._decode, self.shape, self.plan.device)

    @property
    def batch(self) -> int:
        """The most lanes at a time."""
        return self.runners.batch

    def explain(self) -> str:
        """Which path runs each part, and why, a line each."""
        runners, policy = self.runners, self.runners.policy
        failures = explain.failure_lines(None if policy is None else policy.failure, self.evaluator.declined)
        lanes = explain.lanes_line(runners.batch if runners.batch_is_known else None, invariant=self.invariant)
        around = explain.around_lines(runners.prompts, self._decode)
        return "\n".join(explain.engine_lines(self.plan, self.spec, self._exported, failures, lanes, around))

    def __repr__(self) -> str:
        shape, plan = "x".join(map(str, self.shape)), self.plan
        return f"Engine({shape}, {self.prediction}, {self.schedule.name}, {plan.device}, {plan.backend.value})"
