"""Who runs a network and a whole sampling loop: stepfusion in each of its ways, and its peers.

A provider is one class: its name, what it needs, and :meth:`Provider.build`. All get the same weights, start, labels
and timesteps, and return float32 tensors that are compared before anything is timed.
"""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from stepfusion.bench.models import BenchModel
from stepfusion.bench.optional import need, why_not
from stepfusion.engine import Engine
from stepfusion.errors import ExportError
from stepfusion.execution.openvino_network import openvino_core
from stepfusion.export.formats import FORMATS, exporter
from stepfusion.export.program import Batch
from stepfusion.kernels import BackendError
from stepfusion.samplers.scheduler_config import read_config

_OPSET = 20  # the first with a native GroupNormalization in the runtimes measured


@dataclass(frozen=True)
class Case:
    """The work that all providers share.

    Attributes:
        model, device, batch: what runs where. steps: of the loop. sampler: "ddim" (eta 0) or "ddpm".
        evaluations: how many are timed together, so that the host time of a call weighs less on a GPU.
    """

    model: BenchModel
    device: torch.device
    batch: int
    steps: int
    sampler: str = "ddim"
    evaluations: int = 1
    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory, repr=False)

    @cached_property
    def start(self) -> torch.Tensor:
        """The noise that every loop starts from, float32 [B, C, H, W]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, *self.model.image_shape, generator=generator).to(self.device)

    @cached_property
    def noise(self) -> torch.Tensor | None:
        """The z of every step of a stochastic loop, [steps, B, C, H, W], for the comparison; None for DDIM."""
        if self.sampler == "ddim":
            return None
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.steps, self.batch, *self.model.image_shape, generator=generator).to(self.device)

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """One label an image on the device, int64 [B], or None."""
        labels = self.model.labels(self.batch)
        return None if labels is None else labels.to(self.device)

    @property
    def timestep(self) -> int:
        """Of the evaluation that is measured: the middle of the schedule."""
        return self.model.schedule.num_timesteps // 2

    @cached_property
    def onnx(self) -> Path:
        """diffusers' network as an ONNX file of this case's shapes: inputs x and t, and labels if there are any."""
        network = _Sample(self.model.diffusers_network()).eval()
        path = Path(self.folder.name) / "network.onnx"
        timesteps = torch.full((self.batch,), self.timestep)
        inputs: tuple[torch.Tensor, ...] = (self.start.cpu(), timesteps)
        if self.labels is not None:
            inputs = (*inputs, self.labels.cpu())
        names = ["x", "t", "labels"][: len(inputs)]
        torch.onnx.export(
            network,
            inputs,
            path,
            dynamo=True,
            opset_version=_OPSET,
            input_names=names,
            external_data=False,
            verbose=False,
        )
        return path


@dataclass(frozen=True)
class Built:
    """What can be run.

    ``evaluate(count)``: so many evaluations of the network, the first on the start; the last output, float32
    [B, C, H, W]. Only that of one evaluation can be compared: what the next ones are given differs.
    ``loop(noise)``: from the start to the last state, float32 [B, C, H, W] on the device; without noise, a stochastic
    sampler draws its own. ``finish()``: the loop, and the finished images on the host.
    """

    evaluate: Callable[[int], torch.Tensor]
    loop: Callable[[torch.Tensor | None], torch.Tensor]
    finish: Callable[[], object]


class Provider(ABC):
    """Somebody who can run a case. ``family`` is what ``--peer`` selects; ``dtype`` the network's; ``compiles``: it
    takes many seconds to prepare.
    """

    family: str
    name: str
    dtype: str
    compiles = False
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")

    def why_not(self, case: Case) -> str | None:
        """The reason why this provider cannot run the case here; None if it can."""
        if case.device.type not in self.devices:
            return f"not for device type '{case.device.type}'"
        return why_not(*self.packages)

    @abstractmethod
    def build(self, case: Case) -> Built:
        """Prepare everything that is not part of a call. :class:`Unavailable` where this cannot run here."""


class Unavailable(RuntimeError):
    """This provider cannot run here; the message says what is missing."""


class Ours(Provider):
    """stepfusion's engine with one of its ``network`` modes."""

    family = "stepfusion"

    def __init__(self, mode: str, dtype: str) -> None:
        self.mode, self.dtype = mode, dtype
        self.name = f"stepfusion {mode} {dtype}"
        self.compiles = "compile" in mode or mode == "openvino"

    def engine(self, case: Case) -> Engine:
        """The engine that is measured."""
        return make_engine(case, case.model.network, self.mode, self.dtype)

    def build(self, case: Case) -> Built:
        try:
            engine = self.engine(case)
        except (BackendError, ExportError) as error:
            raise Unavailable(str(error)) from error
        table = engine.table(case.sampler, case.steps, compat="diffusers")
        evaluations = {n: case.model.evaluation_table(case.timestep, n) for n in (1, case.evaluations)}

        def sample(walked: Any, noise: torch.Tensor | None = None) -> torch.Tensor:
            return engine.sample(table=walked, start=case.start, labels=case.labels, noise=noise, progress=False)

        def finish() -> torch.Tensor:
            return engine.to_uint8(sample(table)).cpu()

        def loop(noise: torch.Tensor | None = None) -> torch.Tensor:
            return sample(table, noise)

        return Built(lambda count: sample(evaluations[count]), loop, finish)


class Exported(Ours):
    """stepfusion's engine with its network exported in one of the formats, and loaded back."""

    def __init__(self, form: str, dtype: str) -> None:
        self.form, self.dtype = form, dtype
        self.compiles = form != "onnx"
        self.name = f"stepfusion exported {form} {dtype}"
        self.packages = FORMATS[form].needs

    def engine(self, case: Case) -> Engine:
        home = case.device if FORMATS[self.form].device in ("any", case.device.type) else torch.device("cpu")
        source = make_engine(replace(case, device=home), case.model.network, "eager", self.dtype)
        bundle = Path(case.folder.name) / f"{self.form}-{self.dtype}"
        exporter(self.form)(source, bundle, batch=Batch.fixed(case.batch))
        return Engine.from_exported(bundle, device=case.device, batch=case.batch)


def make_engine(case: Case, network: Callable[..., torch.Tensor], mode: str, dtype: str) -> Engine:
    """An engine for a case, with its own network or another that takes and returns the same shapes."""
    schedule, prediction, options = read_config(case.model.scheduler_config)
    return Engine(
        network,
        schedule,
        prediction=prediction,
        shape=case.model.image_shape,
        num_classes=case.model.network.num_classes,
        null_label=case.model.null_label,
        options=options,
        device=case.device,
        dtype=dtype,
        network=mode,
        batch=case.batch,
    )


class _Loop(Provider):
    """A network in diffusers' own loop: scheduler step by step, as its pipelines have it."""

    packages: tuple[str, ...] = ("diffusers",)
    state_dtype = torch.float32

    @abstractmethod
    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """``network(x, t)`` with x in ``state_dtype`` and t int64, no dimensions, on the device -> output."""

    def build(self, case: Case) -> Built:
        network = self.network(case)
        scheduler = _scheduler(case)
        scheduler.set_timesteps(case.steps)
        timesteps = scheduler.timesteps.tolist()
        on_device = scheduler.timesteps.to(case.device)
        middle = torch.tensor(case.timestep, device=case.device)
        start = case.start.to(self.state_dtype)

        @torch.no_grad()
        def evaluate(count: int) -> torch.Tensor:
            for _ in range(count):
                out = network(start, middle)
            return out.float()

        @torch.no_grad()
        def loop(noise: torch.Tensor | None = None) -> torch.Tensor:
            x = start
            with _injected(noise):
                for i, t in enumerate(timesteps):
                    x = scheduler.step(network(x, on_device[i]), t, x).prev_sample
            return x.float()

        def finish() -> object:
            return (loop() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()

        return Built(evaluate, loop, finish)


class Diffusers(_Loop):
    """diffusers as shipped: float32, eager; its own pipeline where the model has no labels."""

    family, name, dtype = "diffusers", "diffusers float32", "float32"

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        unet = case.model.diffusers_network().to(case.device)
        return lambda x, t: unet(x, t, class_labels=case.labels).sample

    def build(self, case: Case) -> Built:
        built = super().build(case)
        if case.labels is not None:
            return built  # the pipelines cannot pass labels on
        kind = {"ddim": "DDIM", "ddpm": "DDPM"}[case.sampler]
        module = need(f"diffusers.pipelines.{case.sampler}.pipeline_{case.sampler}")
        pipeline = getattr(module, f"{kind}Pipeline")(case.model.diffusers_network(), _scheduler(case)).to(
            case.device
        )
        pipeline.set_progress_bar_config(disable=True)

        def finish() -> object:
            with mock.patch.object(module, "randn_tensor", return_value=case.start):
                return pipeline(case.batch, num_inference_steps=case.steps, output_type="np").images

        def loop(noise: torch.Tensor | None = None) -> torch.Tensor:
            with _injected(noise), mock.patch.object(module, "randn_tensor", return_value=case.start):
                images = pipeline(case.batch, num_inference_steps=case.steps, output_type="np").images
            return torch.from_numpy(images).permute(0, 3, 1, 2).mul(2).sub(1)

        return Built(built.evaluate, loop, finish)


class DiffusersHalf(_Loop):
    """diffusers in bfloat16 and channels_last, eager."""

    family, name, dtype = "diffusers", "diffusers bfloat16 channels_last", "bfloat16"
    state_dtype = torch.bfloat16

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        unet = self._unet(case)
        return lambda x, t: unet(_channels_last(x), t, class_labels=case.labels).sample

    @staticmethod
    def _unet(case: Case) -> Any:
        unet = case.model.diffusers_network().to(case.device, torch.bfloat16)
        return unet.to(memory_format=torch.channels_last)


class DiffusersCompiled(DiffusersHalf):
    """diffusers at its documented best: bfloat16, channels_last, compiled whole.

    On a GPU with ``mode="max-autotune"``, which captures CUDA graphs; on a CPU with frozen weights.
    """

    name, compiles = "diffusers bfloat16 channels_last compiled", True

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return _compiled(self._unet(case), case, "max-autotune" if case.device.type == "cuda" else None)


class Eager(_Loop):
    """Our UNet in diffusers' loop, float32: what the engine adds to it shows against this."""

    family, name, dtype = "eager", "eager float32", "float32"

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        unet = copy.deepcopy(case.model.network).to(case.device)
        return lambda x, t: unet(x, t.expand(len(x)), *_given(case.labels))


class Inductor(_Loop):
    """Our UNet in diffusers' loop, bfloat16 and channels_last, compiled with Inductor's defaults."""

    family, name, dtype = "inductor", "inductor bfloat16", "bfloat16"
    compiles = True
    state_dtype = torch.bfloat16

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        unet: Any = copy.deepcopy(case.model.network).to(case.device, torch.bfloat16)
        unet = unet.to(memory_format=torch.channels_last)
        return _compiled(_Expanding(unet), case, None)


class OpenVINO(_Loop):
    """diffusers' network through ONNX in OpenVINO, with a hint for the precision of its arithmetic."""

    family, packages, devices = "openvino", ("diffusers", "openvino", "onnx", "onnxscript"), ("cpu",)
    compiles = True

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.name = f"openvino {dtype}"

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        hint = {"float32": "f32", "bfloat16": "bf16"}[self.dtype]
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        model = openvino_core().compile_model(str(case.onnx), "CPU", settings)
        return lambda x, t: torch.from_numpy(model(list(_arrays(x, t, case.labels)))[0])


class OnnxRuntime(_Loop):
    """diffusers' network through ONNX in onnxruntime, float32."""

    family, name, dtype = "onnxruntime", "onnxruntime float32", "float32"
    packages, devices = ("diffusers", "onnxruntime", "onnx", "onnxscript"), ("cpu",)
    compiles = True

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        runtime = need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(case.onnx), options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            arrays = dict(zip(names, _arrays(x, t, case.labels), strict=True))
            return torch.from_numpy(session.run(None, arrays)[0])

        return network


def all_providers(device: torch.device) -> list[Provider]:
    """Everyone who may run on a device, ours first; who is missing a package is among them and says so."""
    if device.type == "cpu":
        ours = [("eager", "float32"), ("eager", "bfloat16"), ("compile", "bfloat16"), ("openvino", "bfloat16")]
    else:
        ours = [("eager", "bfloat16"), ("compile", "bfloat16"), ("graph", "bfloat16"), ("compile+graph", "bfloat16")]
    peers: list[Provider] = [Diffusers(), DiffusersHalf(), DiffusersCompiled(), Eager(), Inductor()]
    if device.type == "cpu":
        peers += [OpenVINO("float32"), OpenVINO("bfloat16"), OnnxRuntime()]
    return [*(Ours(mode, dtype) for mode, dtype in ours), *peers]


def exported_providers(device: torch.device) -> list[Provider]:
    """The engine without an export first, then with each format that can run on a device."""
    if device.type == "cpu":
        plain, forms = "eager", [("onnx", "float32"), ("openvino", "float32"), ("aoti", "float32")]
    else:
        plain, forms = "graph", [(form, "bfloat16") for form in ("aoti", "torch-tensorrt", "tensorrt")]
    return [Ours(plain, forms[0][1]), *(Exported(form, dtype) for form, dtype in forms)]


class _Sample(torch.nn.Module):
    """A diffusers network that returns a tensor, for exporters and compilers."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.unet(x, t, class_labels=labels).sample
        return out


class _Expanding(torch.nn.Module):
    """Our UNet under diffusers' convention of one timestep for the batch."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.unet(x, t.expand(len(x)), *_given(labels))
        return out


def _compiled(
    unet: torch.nn.Module, case: Case, mode: str | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The network compiled whole for the case's shapes; on a CPU with frozen weights. Compiled before it returns."""
    from torch._inductor import config

    whole = (unet if isinstance(unet, _Expanding) else _Sample(unet)).eval()
    compiled = torch.compile(whole, fullgraph=True, dynamic=False, mode=mode)
    on_cpu = case.device.type == "cpu"

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = compiled(_channels_last(x), t, case.labels)
        # a CUDA graph's output is overwritten by its next replay
        return out if on_cpu else out.clone()

    freezing: Any = config.patch(freezing=True) if on_cpu else nullcontext()
    with freezing, torch.no_grad():
        network(case.start.to(torch.bfloat16), torch.tensor(case.timestep, device=case.device))
    return network


def _scheduler(case: Case) -> Any:
    """diffusers' scheduler for the case's sampler, from the model's config."""
    kind = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[case.sampler]
    return getattr(need("diffusers"), kind).from_config(dict(case.model.scheduler_config))


@contextmanager
def _injected(noise: torch.Tensor | None) -> Iterator[None]:
    """diffusers' DDPM steps add the given noise, one entry a step, instead of what they would draw."""
    if noise is None:
        yield
        return
    left = iter(noise)
    module = need("diffusers.schedulers.scheduling_ddpm")
    with mock.patch.object(module, "randn_tensor", lambda *_, dtype, **__: next(left).to(dtype)):
        yield


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _given(labels: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if labels is None else (labels,)


def _arrays(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> Iterator[np.ndarray[Any, Any]]:
    """The inputs of an ONNX network."""
    for tensor in (x, t.expand(len(x)).contiguous(), *_given(labels)):
        yield tensor.numpy()
