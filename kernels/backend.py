"""Whether Triton is here, and where its kernels can run."""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = [
    "HAS_TRITON",
    "BackendError",
    "backend_from_environment",
    "interpreting",
    "require_triton",
    "tl",
    "triton",
    "why_not_triton",
]


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here; the message says what is missing."""


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS and Windows have no Triton wheel; the reference path needs none

    class _Absent:
        """Lets kernel files be imported without Triton: ``jit`` keeps the function, every other name is inert."""

        @staticmethod
        def jit(function: Any = None, **_: Any) -> Any:
            return function if function is not None else (lambda f: f)

        def __getattr__(self, name: str) -> Any:
            return _Absent()

        def __call__(self, *_: Any, **__: Any) -> Any:
            return self

    triton = tl = _Absent()
    HAS_TRITON = False


def interpreting() -> bool:
    """True if ``TRITON_INTERPRET=1`` was set before Triton was imported: kernels then run on the CPU, slowly."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)


def why_not_triton(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on ``device``; None if they can."""
    if not HAS_TRITON:
        return "the package 'triton' is not installed"
    if device.type == "cpu":
        if interpreting():
            return None
        return "the device is a CPU and Triton drives GPUs (TRITON_INTERPRET=1 runs kernels on a CPU, for tests)"
    if device.type not in ("cuda", "xpu"):
        return f"Triton has no backend for device type '{device.type}'"
    if interpreting():
        return "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors only"
    return None


def require_triton(device: torch.device) -> None:
    """Raise :class:`BackendError` if Triton kernels cannot run on ``device``."""
    reason = why_not_triton(device)
    if reason is not None:
        raise BackendError(f"the fused kernels cannot run on {device}: {reason}; use backend='reference'")


def backend_from_environment() -> str:
    """``STEPFUSION_BACKEND`` if it is set, else ``"auto"``."""
    return os.environ.get("STEPFUSION_BACKEND", "auto")
