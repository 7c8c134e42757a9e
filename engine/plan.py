"""Which path runs each part of an engine, and why."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from stepfusion import _checks, kernels
from stepfusion.kernels import reference
from stepfusion.kernels.backend import backend_from_environment, interpreting, require_triton, why_not_triton

BACKENDS = ("auto", "triton", "reference")
NETWORK_MODES = ("auto", "eager", "compile")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """One decision and the reason for it."""

    value: str
    reason: str


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
        return {
            "device": self.device_choice,
            "network dtype": self.dtype_choice,
            "step": self.backend,
            "network": self.network,
        }

    @property
    def ops(self) -> ModuleType:
        """The module whose functions run the step: the fused ones, or the reference under the same names."""
        return kernels if self.backend.value == "triton" else reference

    def lines(self) -> list[str]:
        """One line for each decision."""
        return [f"{name:<14} {choice.value:<11} {choice.reason}" for name, choice in self.choices().items()]


def make_plan(device: str | torch.device, dtype: str | torch.dtype, backend: str, network: str) -> Plan:
    """Decide. ``"auto"`` anywhere leaves the decision to what is found here; anything else is done, or is an error.

    Raises:
        TypeError, ValueError: naming the argument. BackendError: what was asked for cannot run here.
    """
    where, device_choice = choose_device(device)
    kind, dtype_choice = _dtype(dtype, where)
    return Plan(where, kind, device_choice, dtype_choice, _backend(backend, where), _network(network))


def choose_device(device: str | torch.device) -> tuple[torch.device, Choice]:
    """The device of this name, or the fastest one here for "auto"; ValueError where PyTorch finds none such."""
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


def _dtype(dtype: str | torch.dtype, device: torch.device) -> tuple[torch.dtype, Choice]:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype != "auto":
        _checks.choice("dtype", dtype, ("auto", *DTYPES))
        return DTYPES[dtype], Choice(dtype, "asked for; the state stays float32")
    if device.type == "cpu":
        return torch.float32, Choice("float32", "auto: the exact choice on a CPU")
    return torch.bfloat16, Choice("bfloat16", "auto: the fast choice on a GPU; the state stays float32")


def _backend(backend: str, device: torch.device) -> Choice:
    _checks.choice("backend", backend, BACKENDS)
    source = "asked for"
    if backend == "auto" and (asked := backend_from_environment()) not in ("", "auto"):
        backend = _checks.choice("STEPFUSION_BACKEND", asked, BACKENDS)
        source = "asked for by STEPFUSION_BACKEND"
    if backend == "triton":
        require_triton(device)
        return Choice("triton", f"{source}: the fused kernels")
    if backend == "reference":
        return Choice("reference", f"{source}: eager PyTorch")
    reason = why_not_triton(device)
    if reason is None and interpreting():
        reason = "Triton's interpreter is for tests, and slower than PyTorch"
    if reason is None:
        return Choice("triton", "auto: Triton drives this device")
    return Choice("reference", f"auto: {reason}")


def _network(network: str) -> Choice:
    _checks.choice("network", network, NETWORK_MODES)
    if network == "auto":
        return Choice("eager", "auto: no compilation to wait for")
    return Choice(network, "asked for")
