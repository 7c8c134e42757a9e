"""The peers: other networks and runtimes in diffusers' own sampling loop, and the list of everyone who may run.

Without diffusers, those whose network is not diffusers' run in a loop of our own (:mod:`stepfusion.bench.own_loop`),
and their names say so.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch

from stepfusion.bench.optional import need, why_not
from stepfusion.bench.ours import Ours
from stepfusion.bench.own_loop import OWN, OwnScheduler
from stepfusion.bench.providers import Built, Case, Provider, TensorOutput
from stepfusion.execution.openvino_network import openvino_core


class _Loop(Provider):
    """A network in diffusers' own loop: scheduler step by step, as its pipelines have it."""

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
            return out[:, : start.shape[1]].float()

        @torch.no_grad()
        def loop(noise: torch.Tensor | None = None) -> torch.Tensor:
            x = start
            with _injected(scheduler, noise):
                for i, t in enumerate(timesteps):
                    x = scheduler.step(network(x, on_device[i]), t, x).prev_sample
            return x.float()

        def finish() -> object:
            return (loop() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()

        return Built(evaluate, loop, finish)


class _DiffusersNetwork(_Loop):
    """One of diffusers' own networks there."""

    packages: tuple[str, ...] = ("diffusers",)

    def why_not(self, case: Case) -> str | None:
        if not case.model.is_diffusers:
            return f"diffusers has no network like {case.model.name}"
        return super().why_not(case)


class _OurNetwork(_Loop):
    """Our network there; or in a loop of our own without diffusers, or if diffusers' cannot take what it returns."""

    def __init__(self) -> None:
        if why_not("diffusers") is not None:
            self.name = f"{OWN}, {self.name}"


class Diffusers(_DiffusersNetwork):
    """diffusers as shipped: float32, eager; its own pipeline if the model has no labels."""

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
            with _injected(None, noise), mock.patch.object(module, "randn_tensor", return_value=case.start):
                images = pipeline(case.batch, num_inference_steps=case.steps, output_type="np").images
            return torch.from_numpy(images).permute(0, 3, 1, 2).mul(2).sub(1)

        return Built(built.evaluate, loop, finish)


class DiffusersHalf(_DiffusersNetwork):
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


class DiffusersCompiledFloat(_DiffusersNetwork):
    """diffusers in float32 on a CPU, compiled whole with frozen weights, without its pipeline."""

    family, dtype = "diffusers", "float32"
    name, devices, compiles = "diffusers float32 compiled", ("cpu",), True

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return _compiled(case.model.diffusers_network(), case, None)


class Eager(_OurNetwork):
    """Our network in diffusers' loop, float32: what the engine adds to it shows against this."""

    family, name, dtype = "eager", "eager float32", "float32"

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        unet = copy.deepcopy(case.model.network).to(case.device)
        return lambda x, t: unet(x, t.expand(len(x)), *_given(case.labels))


class EagerHalf(_OurNetwork):
    """The same in bfloat16 and channels_last."""

    family, name, dtype = "eager", "eager bfloat16 channels_last", "bfloat16"
    state_dtype = torch.bfloat16

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        unet: Any = copy.deepcopy(case.model.network).to(case.device, torch.bfloat16)
        unet = unet.to(memory_format=torch.channels_last)
        return lambda x, t: unet(_channels_last(x), t.expand(len(x)), *_given(case.labels))


class Inductor(_OurNetwork):
    """Our network in diffusers' loop, bfloat16 and channels_last, compiled with Inductor's defaults."""

    family, name, dtype = "inductor", "inductor bfloat16", "bfloat16"
    compiles = True
    state_dtype = torch.bfloat16

    def network(self, case: Case) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        unet: Any = copy.deepcopy(case.model.network).to(case.device, torch.bfloat16)
        unet = unet.to(memory_format=torch.channels_last)
        return _compiled(_Expanding(unet), case, None)


class OpenVINO(_DiffusersNetwork):
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


class OnnxRuntime(_DiffusersNetwork):
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
        modes = "eager", "cpp", "compile", "openvino"
        ours = [(mode, dtype) for mode in modes for dtype in ("float32", "bfloat16")]
    else:
        ours = [("eager", "bfloat16"), ("compile", "bfloat16"), ("graph", "bfloat16"), ("compile+graph", "bfloat16")]
    peers: list[Provider] = [Diffusers(), DiffusersHalf(), DiffusersCompiled(), Eager(), EagerHalf(), Inductor()]
    if device.type == "cpu":
        peers += [DiffusersCompiledFloat(), OpenVINO("float32"), OpenVINO("bfloat16"), OnnxRuntime()]
    return [*(Ours(mode, dtype) for mode, dtype in ours), *peers]


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

    whole = (unet if isinstance(unet, _Expanding) else TensorOutput(unet)).eval()
    compiled = torch.compile(whole, fullgraph=True, dynamic=False, mode=mode)
    on_cpu = case.device.type == "cpu"

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = compiled(_channels_last(x), t, case.labels)
        # a CUDA graph's output is overwritten by its next replay
        return out if on_cpu else out.clone()

    freezing: Any = config.patch(freezing=True) if on_cpu else nullcontext()
    with freezing, torch.no_grad():
        dtype = next(whole.parameters()).dtype
        network(case.start.to(dtype), torch.tensor(case.timestep, device=case.device))
    return network


def _scheduler(case: Case) -> Any:
    """diffusers' scheduler for the case's sampler, from the model's config; ours without diffusers, or for a network
    that returns its variance, too, which diffusers' DDIM cannot take.
    """
    if why_not("diffusers") is not None or not case.model.is_diffusers:
        return OwnScheduler(case.sampler, case.model.scheduler_config)
    kind = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[case.sampler]
    return getattr(need("diffusers"), kind).from_config(dict(case.model.scheduler_config))


@contextmanager
def _injected(scheduler: Any, noise: torch.Tensor | None) -> Iterator[None]:
    """DDPM's steps add the given noise, one entry a step, instead of what they would draw."""
    if noise is None:
        yield
        return
    if isinstance(scheduler, OwnScheduler):
        with scheduler.given(noise):
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
