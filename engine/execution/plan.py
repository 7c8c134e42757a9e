"""Which path runs each part of an engine, and why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import nn

from stepfusion import _checks, kernels
from stepfusion.execution.cache import use_triton_cache
from stepfusion.execution.cuda_graph import why_not_graph
from stepfusion.execution.float32 import float32_products
from stepfusion.execution.warm_cache import tell_if_unfit
from stepfusion.kernels import cpu_ops, reference
from stepfusion.kernels.backend import (
    BackendError,
    backend_from_environment,
    require_triton,
    why_not_triton,
)
from stepfusion.kernels.cpu.compiler import instruction_set
from stepfusion.kernels.cpu.library import bfloat16_unit, library_origin, why_not_cpu_kernels
from stepfusion.kernels.cpu.sampling_library import (
    require_sampling_kernels,
    sampling_library_origin,
    why_not_sampling_kernels,
)

BACKENDS = ("auto", "triton", "cpu", "reference")
NETWORK_MODES = ("auto", "eager", "cpp", "compile", "graph", "compile+graph", "openvino")
#: What runs on the reference path only, by the column of a table that asks for it, and why.
REFERENCE_ONLY = {
    "threshold": (
        "dynamic thresholding",
        "it needs a quantile of each whole image, which the fused step never sees",
    ),
    "rescale": (
        "rescaled guidance",
        "it needs the standard deviation of each whole image, which the fused step never sees",
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TF32 = "tf32"  # float32 whose products are rounded to ten bits of the mantissa, on CUDA


@dataclass(frozen=True)
class Choice:
    """One decision, the reason for it, and whether it was asked for."""

    value: str
    reason: str
    asked: bool = False


@dataclass(frozen=True)
class Plan:
    """The decisions of one engine: where it runs, in which dtype, by which step and which network path."""

    device: torch.device
    dtype: torch.dtype
    device_choice: Choice
    dtype_choice: Choice
    backend: Choice
    network: Choice

    def choices(self) -> dict[str, Choice]:
        """The decisions by the name of what was decided."""
        choices = {
            "device": self.device_choice,
            "network dtype": self.dtype_choice,
            "step": self.backend,
            "network": self.network,
        }
        if self.network.value == "compile" and self.device.type == "cpu":
            choices["layers"] = self._layers
        return choices

    @property
    def _layers(self) -> Choice:
        """What runs the layers of a network of ours on a CPU."""
        from stepfusion.execution.compiled import why_not_cpu_form

        reason = why_not_cpu_form(self.device, self.dtype)
        if reason is None:
            return Choice("C++", "residual and attention blocks of our networks whole, 3x3 convolutions by Winograd")
        return Choice("PyTorch", reason)

    @property
    def ops(self) -> ModuleType:
        """The module whose functions run the step: Triton's, those in C++, or the reference, under the same names."""
        return {"triton": kernels, "cpu": cpu_ops, "reference": reference}[self.backend.value]

    @property
    def products(self) -> Callable[[], AbstractContextManager[None]]:
        """The context in which the network is called: whether its convolutions and matrix products may use TF32."""
        if self.device.type != "cuda" or self.dtype != torch.float32:
            return nullcontext
        return partial(float32_products, tf32=self.dtype_choice.value == TF32)

    @property
    def captures(self) -> bool:
        """True if ticks are captured as CUDA graphs."""
        return "graph" in self.network.value

    @property
    def fuses_network(self) -> bool:
        """True if our own networks run their fused kernels; a compiler fuses on its own, and sees through."""
        return self.backend.value == "triton" and self.network.value in ("eager", "graph")

    @property
    def compiles_each_width(self) -> bool:
        """True if every other number of lanes waits for a compiler, for seconds to minutes."""
        return "compile" in self.network.value or self.network.value == "openvino"

    @property
    def compiler(self) -> Callable[[nn.Module], Callable[..., torch.Tensor]] | None:
        """What compiles the network, None if nothing does."""
        if self.network.value == "openvino":
            from stepfusion.execution.openvino_network import openvino_network

            return partial(openvino_network, dtype=self.dtype)
        if self.network.value == "cpp":
            from stepfusion.execution.compiled import cpp_network

            return partial(cpp_network, dtype=self.dtype)
        if "compile" in self.network.value:
            from stepfusion.execution.compiled import compile_network

            return partial(compile_network, device=self.device, dtype=self.dtype)
        return None

    def lines(self) -> list[str]:
        """One line for each decision."""
        return [f"{name:<14} {choice.value:<13} {choice.reason}" for name, choice in self.choices().items()]


def make_plan(
    device: str | torch.device, dtype: str | torch.dtype, backend: str, network: str, *, ours: bool = True
) -> Plan:
    """Decide. ``"auto"`` anywhere leaves the decision to what is found here; anything else is done, or is an error.

    Args:
        ours: whether the network is one of :mod:`stepfusion.networks`, whose layers the C++ kernels know.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: what was asked for cannot run here.
    """
    where, device_choice = choose_device(device)
    tell_if_unfit(where)
    step = _backend(backend, where)
    if where.type != "cpu":
        use_triton_cache()
    runs = _network(network, where, step, dtype, ours)
    kind, dtype_choice = _dtype(dtype, where, runs)
    return Plan(where, kind, device_choice, dtype_choice, step, runs)


def eager_plan(plan: Plan, network: object) -> Plan:
    """The plan for a network that is the caller's and may change: eager, in the dtype of its parameters.

    Raises:
        TypeError, ValueError: it is not callable, or its parameters are not on the plan's device.
    """
    if not callable(network):
        raise TypeError(f"network must be callable, got {type(network).__name__}")
    own = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if own is not None and own.device != plan.device:
        raise ValueError(
            f"network must be on {plan.device}, where this engine is, and its parameters are on {own.device}"
        )
    dtype = plan.dtype if own is None else own.dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"network must have parameters of {', '.join(DTYPES)}, got {dtype}")
    return replace(plan, dtype=dtype, network=Choice("eager", "a network of the caller's, as it is now"))


def choose_device(device: str | torch.device) -> tuple[torch.device, Choice]:
    """The device of this name, or the fastest one here for "auto"; ValueError if PyTorch finds none such."""
    if device != "auto":
        where = _usable(device)
        return where, Choice(str(where), "asked for")
    if torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
        return where, Choice(str(where), f"auto: {torch.cuda.get_device_name(where)}")
    if torch.xpu.is_available():
        return torch.device("xpu", 0), Choice("xpu:0", "auto: an Intel GPU is here, and no CUDA device")
    return torch.device("cpu"), Choice("cpu", "auto: PyTorch finds no GPU")


def _usable(device: str | torch.device) -> torch.device:
    """The device of this name, with its index; ValueError unless PyTorch can compute on it here."""
    try:
        where = torch.device(device)
        if where.type == "cpu" and where.index in (None, 0):
            return torch.device("cpu")
        if where.type == "cuda" and (where.index or 0) < torch.cuda.device_count():
            return where if where.index is not None else torch.device("cuda", torch.cuda.current_device())
        if where.type not in ("cpu", "cuda"):
            torch.zeros(1, device=where).item()
            return where
    except (AssertionError, RuntimeError, TypeError):  # PyTorch has one for each way of not having a device
        pass
    raise ValueError(f"device must be 'auto' or one that PyTorch finds here ({_found()}), got {str(device)!r}")


def _found() -> str:
    """The devices that PyTorch finds, by name."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return ", ".join(("cpu", *(f"{accelerator}:{i}" for i in range(count))))


def _dtype(dtype: str | torch.dtype, device: torch.device, network: Choice) -> tuple[torch.dtype, Choice]:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype != "auto":
        _checks.choice("dtype", dtype, ("auto", *DTYPES, TF32))
        return _asked_dtype(dtype, device)
    if device.type != "cpu":
        return torch.bfloat16, Choice("bfloat16", "auto: the fast choice on a GPU; the state stays float32")
    if network.value in ("eager", "cpp"):
        return torch.float32, Choice("float32", "auto: the exact choice on a CPU")
    if (unit := bfloat16_unit()) is not None:
        reason = f"auto: a compiled network uses this CPU's {unit}; the state stays float32"
        return torch.bfloat16, Choice("bfloat16", reason)
    return torch.float32, Choice("float32", "auto: neither AMX nor AVX512-BF16 can be used here")


def _asked_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, Choice]:
    if dtype == TF32:
        if device.type != "cuda":
            raise BackendError(f"dtype={TF32!r} needs a CUDA device, and the device is {device}: use dtype='float32'")
        reason = "asked for: float32 with TF32 in convolutions and matrix products; the state stays float32"
        return torch.float32, Choice(TF32, reason)
    exact = ", without TF32" if dtype == "float32" and device.type == "cuda" else ""
    return DTYPES[dtype], Choice(dtype, f"asked for{exact}; the state stays float32")


def _backend(backend: str, device: torch.device) -> Choice:
    _checks.choice("backend", backend, BACKENDS)
    source = "asked for"
    if backend == "auto" and (asked := backend_from_environment()) not in ("", "auto"):
        backend = _checks.choice("STEPFUSION_BACKEND", asked, BACKENDS)
        source = "asked for by STEPFUSION_BACKEND"
    if backend == "triton":
        require_triton(device)
        return Choice("triton", f"{source}: the fused kernels", asked=True)
    if backend == "cpu":
        require_sampling_kernels(device)
        return Choice("cpu", f"{source}: {_cpp_step()}", asked=True)
    if backend == "reference":
        return Choice("reference", f"{source}: eager PyTorch", asked=True)
    if device.type == "cpu":
        reason = why_not_sampling_kernels()
        if reason is None:
            return Choice("cpu", f"auto: {_cpp_step()}, with the reference's bits")
        return Choice("reference", f"auto: the fused kernels in C++ cannot run: {reason}")
    reason = why_not_triton(device)
    if reason is None:
        return Choice("triton", "auto: Triton drives this device")
    return Choice("reference", f"auto: {reason}")


def _cpp_step() -> str:
    return f"the fused kernels in C++ ({instruction_set()}, {sampling_library_origin()})"


def _network(network: str, device: torch.device, step: Choice, dtype: str | torch.dtype, ours: bool) -> Choice:
    _checks.choice("network", network, NETWORK_MODES)
    if network in ("cpp", "openvino") and device.type != "cpu":
        raise BackendError(f"network={network!r} cannot run on {device}: it is for CPUs")
    reason = _why_not_captured(device, step)
    if network == "auto" and reason is None:
        return Choice("graph", "auto: a tick is captured once, and launched as one CUDA graph")
    if network in ("auto", "cpp") and device.type == "cpu":
        return _cpu_network(network, dtype, ours)
    if network == "auto":
        return Choice("eager", f"auto: {reason}" if device.type == "cuda" else "auto: no compilation to wait for")
    if "graph" in network and reason is not None:
        instead = "compile" if "compile" in network else "eager"
        raise BackendError(f"network={network!r} cannot run: {reason}; use network={instead!r}")
    return Choice(network, "asked for")


def _cpu_network(network: str, dtype: str | torch.dtype, ours: bool) -> Choice:
    """What runs a network on a CPU if it is "auto", or "cpp"."""
    if network == "auto" and not ours:
        return Choice("eager", "auto: the C++ kernels know the layers of stepfusion's networks alone")
    name = str(dtype).removeprefix("torch.")
    kind = torch.float32 if name == "auto" else DTYPES.get(name, torch.float64)
    reason = why_not_cpu_kernels(kind)
    if reason is None:
        source = "auto" if network == "auto" else "asked for"
        facts = library_origin(kind) or "compiled when first used"
        facts += f", products by {bfloat16_unit()}" if kind == torch.bfloat16 else ""
        return Choice("cpp", f"{source}: C++ kernels run networks of ours ({facts}), and nothing else is compiled")
    if network == "cpp":
        raise BackendError(f"network='cpp' cannot run: {reason}; use network='eager'")
    return Choice("eager", f"auto: {reason}")


def _why_not_captured(device: torch.device, step: Choice) -> str | None:
    """The reason why ticks with this step cannot be captured; None if they can."""
    reason = why_not_graph(device)
    if reason is None and step.value == "reference":
        return "the reference step waits for the device, which a CUDA graph cannot hold"
    if reason is None and step.value == "cpu":
        return "the step in C++ runs on the CPU, which a CUDA graph cannot hold"
    return reason
