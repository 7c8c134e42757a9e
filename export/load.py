"""Exported networks back in the engine: verified, checked against what is here, then loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stepfusion.errors import ExportError
from stepfusion.execution.plan import DTYPES, choose_device
from stepfusion.execution.streams import Turns
from stepfusion.export.batch import Batch
from stepfusion.export.bundle import Bundle, read_bundle
from stepfusion.export.environment import check_runs_here, require
from stepfusion.export.formats import FORMATS
from stepfusion.export.manifest import ANY_DEVICE, NULL, Manifest
from stepfusion.export.runtimes import OnnxRuntimeNetwork, OpenVINONetwork, Runtime, TensorRTNetwork, TickRuntime
from stepfusion.export.tick_loop import walk
from stepfusion.networks.conditioned import ConditionSpec
from stepfusion.samplers.table import StepTable

Loader = Callable[[Bundle, torch.device], Runtime]
_Loads = TypeVar("_Loads")


class ExportedNetwork:
    """An exported network as :class:`stepfusion.Engine` takes one: ``network(x, timesteps[, labels], **conditions)``.

    Batches that the artefact was not made for are split, or filled up with zeros.

    Attributes:
        spec: of the model that was exported.
        in_channels, sample_size, shape, num_classes, null_label: what the spec says, under the names that an engine
            looks for.
        class_names, schedule, prediction, options, conditions: likewise.
        device, dtype: where it runs, and the dtype of x and out.
        bundle: where it comes from.
        turns: in which calls must be launched; None if they need not take turns.
    """

    def __init__(self, bundle: Bundle, run: Runtime, device: torch.device) -> None:
        spec = bundle.spec
        self.bundle, self.device, self.dtype = bundle, device, DTYPES[bundle.manifest.dtype]
        self.spec, self.shape = spec, spec.shape
        self.in_channels, self.sample_size = spec.shape[0], spec.shape[1:]
        self.num_classes, self.null_label, self.class_names = spec.num_classes, spec.null_label, spec.class_names
        self.schedule, self.prediction, self.options = spec.schedule, spec.prediction, spec.options
        self.conditions = spec.conditions
        self._run = run
        self.turns: Turns | None = getattr(run, "turns", None)
        self._batch = bundle.batch or Batch(1, 1, 1 << 16)

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """Map x [B, C, H, W], timesteps [B], labels int64 [B], if it takes any, and conditions to [B, C', H, W].

        Timesteps are int64; on a path that is not discrete they are what the path tells, float32. ``conditions`` are
        all those of the spec, [B, ...] each.

        Raises:
            ExportError: labels or a condition are missing, or given and not taken, or a condition has another shape.
        """
        inputs = (x, timesteps) if labels is None else (x, timesteps, labels)
        inputs = (*inputs, *given_conditions(self.conditions, "the network", conditions, len(x)))
        most = self._batch.high
        parts = [tuple(value[i : i + most] for value in inputs) for i in range(0, len(x), most)]
        outputs = [self._run_filled(part) for part in parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.to(x.device, x.dtype)

    def _run_filled(self, inputs: tuple[Tensor, ...]) -> Tensor:
        size = len(inputs[0])
        missing = self._batch.low - size
        if missing > 0:
            inputs = tuple(torch.cat((value, value.new_zeros(missing, *value.shape[1:]))) for value in inputs)
        return self._run(*inputs)[:size]


def given_conditions(
    specs: Sequence[ConditionSpec], what: str, conditions: Mapping[str, Tensor], batch: int
) -> tuple[Tensor, ...]:
    """The conditions [batch, ...] in the order of their specs.

    Raises:
        ExportError: one is missing, unknown, or of another shape or kind; ``what`` takes them.
    """
    names = [spec.name for spec in specs]
    for name in (*conditions, *names):
        if name not in names or name not in conditions:
            state = f"takes no condition {name}" if name in conditions else f"needs the condition {name}"
            raise ExportError(f"{what} {state}; it has {', '.join(names) or 'none'}")
    try:
        return tuple(spec.check(conditions[spec.name], batch) for spec in specs)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{what} cannot take a condition: {error}") from None


def load_network(
    bundle: Bundle | str | os.PathLike[str], device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> ExportedNetwork:
    """Load the network of a bundle. Every hash and version is checked before anything is deserialised.

    Args:
        bundle: read by :func:`stepfusion.export.bundle.read_bundle`, or its directory.
        device, dtype: "auto" takes what the bundle was made for.

    Raises:
        ExportError: the bundle is damaged, holds no network, or is for another device, dtype, GPU or version; or a
            package is missing.
    """
    bundle, loader, where = _open(bundle, "network", _LOADERS, device, dtype)
    return ExportedNetwork(bundle, loader(bundle, where), where)


@dataclass(frozen=True)
class ExportedTick:
    """One step of a sampler, exported: what a consumer without stepfusion runs, for trying it from Python.

    Attributes:
        tick: the inputs that the manifest lists -> what it returns (:meth:`stepfusion.export.tick.Tick.forward`).
        initial_noise: (seed, index), int64 [B] each -> standard normal noise, float32 [B, C, H, W].
        bundle: where it comes from, with the table.
    """

    tick: TickRuntime
    initial_noise: Runtime
    bundle: Bundle

    def start(self, seed: Tensor, index: Tensor, part: int = 0) -> Tensor:
        """The states that images start from with sampler ``part`` of the bundle's table, float32 [B, C, H, W]."""
        return self._table.start_scales[part] * self.initial_noise(seed, index)

    def sample(
        self,
        seed: Tensor,
        index: Tensor,
        *,
        labels: Tensor | None = None,
        guidance: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        null_conditions: Mapping[str, Tensor] | None = None,
        part: int = 0,
    ) -> Tensor:
        """Images by sampler ``part`` of the bundle's table: every row of it, from :meth:`start` on.

        Args:
            seed, index: int64 [B]. labels: int64 [B]. guidance: float32 [B].
            conditions: of every image, by name, [B, ...] each. null_conditions: what stands for none of them, in a
                guided tick; those of ``conditions`` by default, of a model that has a null label.

        Returns:
            float32 [B, C, H, W].

        Raises:
            ExportError: the bundle has no table, or labels, guidance or conditions are missing, or given and not
                taken.
        """
        table, inputs = self._table, self.bundle.manifest.inputs
        given = {name: value for name, value in (("labels", labels), ("guidance", guidance)) if value is not None}
        for name in ("labels", "guidance"):
            if (name in given) != (name in [spec.name for spec in inputs]):
                state = "was given, and the tick takes none" if name in given else "is missing, and the tick takes it"
                raise ExportError(f"{name} {state}")
        given |= self._conditions(conditions or {}, null_conditions, len(seed))
        x, first = self.start(seed, index, part), table.starts[part]
        lanes = {name: value.to(x.device) for name, value in (("seed", seed), ("index", index), *given.items())}
        return walk(self.tick, inputs, table, range(first, first + table.steps(part)), x, lanes)

    def _conditions(
        self, conditions: Mapping[str, Tensor], null: Mapping[str, Tensor] | None, batch: int
    ) -> dict[str, Tensor]:
        """The tick's inputs that are conditions, by name."""
        spec = self.bundle.spec
        guided = "guidance" in [one.name for one in self.bundle.manifest.inputs]
        if null is not None and not guided:
            raise ExportError("null_conditions was given, and the tick is not guided")
        names = [one.name for one in spec.conditions]
        inputs = dict(zip(names, given_conditions(spec.conditions, "the tick", conditions, batch), strict=True))
        if guided:
            if names and null is None and spec.null_label is None:
                raise ExportError("null_conditions is missing, and the tick takes it: the model has none of its own")
            both = given_conditions(spec.conditions, "the tick", {**conditions, **(null or {})}, batch)
            inputs |= {NULL + name: value for name, value in zip(names, both, strict=True)}
        return inputs

    @property
    def _table(self) -> StepTable:
        if self.bundle.table is None:
            raise ExportError(f"{self.bundle.path} has no table, whose rows a tick walks")
        return self.bundle.table


def load_tick(bundle: Bundle | str | os.PathLike[str], device: str | torch.device = "auto") -> ExportedTick:
    """Load the tick of a bundle. Every hash and version is checked before anything is deserialised.

    Raises:
        ExportError: as :func:`load_network`.
    """
    bundle, loader, where = _open(bundle, "tick", _TICK_LOADERS, device, "auto")
    tick, initial_noise = loader(bundle, where)
    return ExportedTick(tick, initial_noise, bundle)


def _open(
    bundle: Bundle | str | os.PathLike[str],
    kind: str,
    loaders: Mapping[str, _Loads],
    device: str | torch.device,
    dtype: str | torch.dtype,
) -> tuple[Bundle, _Loads, torch.device]:
    """A bundle of this kind that runs here, what loads it, and the device to load it on."""
    if not isinstance(bundle, Bundle):
        bundle = read_bundle(bundle)
    manifest = bundle.manifest
    loader = loaders.get(manifest.format)
    if manifest.kind != kind or loader is None:
        able = ", ".join(loaders)
        raise ExportError(
            f"{bundle.path} holds a {manifest.kind} as {manifest.format}; a {kind} as {able} can be loaded"
        )
    where = _device(manifest, device)
    check_runs_here(manifest, device=where, dtype=manifest.dtype if dtype == "auto" else dtype)
    return bundle, loader, where


def _device(manifest: Manifest, device: str | torch.device) -> torch.device:
    """The device to load on; "auto" is the manifest's."""
    wanted = "auto" if manifest.device == ANY_DEVICE else manifest.device
    try:
        return choose_device(wanted if device == "auto" else device)[0]
    except ValueError as error:
        raise ExportError(f"the {manifest.format} bundle cannot run here: {error}") from None


def _load_onnx(bundle: Bundle, device: torch.device) -> Runtime:
    require(("onnxruntime",), "onnx")
    return OnnxRuntimeNetwork(bundle.path / "model.onnx", bundle.manifest, device)


def _load_openvino(bundle: Bundle, device: torch.device) -> Runtime:
    require(("openvino",), "openvino")
    return OpenVINONetwork(bundle.path / "model.xml", bundle.manifest)


def _load_tensorrt(bundle: Bundle, device: torch.device) -> Runtime:
    package = bundle.manifest.format.replace("-", "_")
    require((package,), FORMATS[bundle.manifest.format].extra)
    stripped = bundle.manifest.model.get("weights") == "stripped"
    weights = bundle.path / "model.onnx" if stripped else None
    return TensorRTNetwork(bundle.path / "model.engine", bundle.manifest, device, package, weights)


def _load_torch_tensorrt(bundle: Bundle, device: torch.device) -> Runtime:
    from stepfusion.export.to_torch_tensorrt import load_torch_tensorrt

    return load_torch_tensorrt(bundle, device)


def _load_aoti(bundle: Bundle, device: torch.device) -> Runtime:
    from stepfusion.export.to_aoti import load_aoti

    return load_aoti(bundle, device)


def _load_onnx_tick(bundle: Bundle, device: torch.device) -> tuple[TickRuntime, Runtime]:
    from stepfusion.export.to_onnx import load_onnx_tick

    require(("onnxruntime",), "onnx")
    return load_onnx_tick(bundle.path, bundle.manifest, device)


def _load_aoti_tick(bundle: Bundle, device: torch.device) -> tuple[TickRuntime, Runtime]:
    from stepfusion.export.to_aoti import load_aoti, load_initial_noise

    return load_aoti(bundle, device), load_initial_noise(bundle, device)


_LOADERS: dict[str, Loader] = {
    "onnx": _load_onnx,
    "openvino": _load_openvino,
    "tensorrt": _load_tensorrt,
    "tensorrt-rtx": _load_tensorrt,
    "torch-tensorrt": _load_torch_tensorrt,
    "aoti": _load_aoti,
}
_TICK_LOADERS: dict[str, Callable[[Bundle, torch.device], tuple[TickRuntime, Runtime]]] = {
    "onnx": _load_onnx_tick,
    "aoti": _load_aoti_tick,
}
