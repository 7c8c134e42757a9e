"""Packages that some peers need, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

#: Package -> what installs it.
_INSTALL = {
    "diffusers": "diffusers",
    "mlperf_loadgen": "mlcommons-loadgen",
    "openvino": "openvino onnx onnxscript",
    "onnxruntime": "onnxruntime onnx onnxscript",
}


def need(name: str) -> ModuleType:
    """Import a module of an optional package; ImportError with the command that installs it."""
    reason = why_not(name.partition(".")[0])
    if reason is not None:
        raise ImportError(reason)
    return import_module(name)


def why_not(*packages: str) -> str | None:
    """Why these packages cannot be used: the first that is not installed; None if all are."""
    for package in packages:
        if find_spec(package) is None:
            return f"not installed: pip install {_INSTALL.get(package, package)}"
    return None
