"""The formats that a network can be exported to, and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from stepfusion import _checks
from stepfusion.errors import ExportError
from stepfusion.execution.plan import DTYPES


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        module, function: what writes it, ``function(engine, out, *, batch, table, ...)``.
        needs: the packages that must be installed for writing it, by their import names.
        extra: the extra of stepfusion that installs them.
        dtypes: of the network.
        device: where the engine to export must live: "cpu", "cuda", or "any".
        kinds: "network", and where the format carries it, "tick".
    """

    module: str
    function: str
    needs: tuple[str, ...]
    extra: str
    dtypes: tuple[str, ...] = tuple(DTYPES)
    device: str = "cpu"
    kinds: tuple[str, ...] = ("network",)


_ONNX = ("onnx", "onnxscript")

FORMATS = {
    "onnx": Format("stepfusion.export.to_onnx", "export_onnx", _ONNX, "onnx", kinds=("network", "tick")),
    "openvino": Format(
        "stepfusion.export.to_openvino", "export_openvino", (*_ONNX, "openvino"), "openvino", ("float32", "bfloat16")
    ),
    "tensorrt": Format("stepfusion.export.to_tensorrt", "export_tensorrt", (*_ONNX, "tensorrt"), "tensorrt"),
    "tensorrt-rtx": Format(
        "stepfusion.export.to_tensorrt", "export_tensorrt_rtx", (*_ONNX, "tensorrt_rtx"), "tensorrt-rtx"
    ),
    "torch-tensorrt": Format(
        "stepfusion.export.to_torch_tensorrt",
        "export_torch_tensorrt",
        ("torch_tensorrt",),
        "torch-tensorrt",
        device="cuda",
    ),
    "aoti": Format("stepfusion.export.to_aoti", "export_aoti", (), "aoti", device="any", kinds=("network", "tick")),
    "triton-server": Format("stepfusion.export.to_triton_server", "export_triton_server", _ONNX, "onnx"),
}


def find_format(name: str, *, kind: str = "network", dtype: str = "float32") -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none. ExportError: it does not carry this kind or dtype.
    """
    found = FORMATS[_checks.choice("format", name, FORMATS)]
    _checks.choice("kind", kind, ("network", "tick"))
    if kind not in found.kinds:
        able = " and ".join(other for other, entry in FORMATS.items() if kind in entry.kinds)
        raise ExportError(f"the format {name} does not carry a {kind}; {able} do")
    if dtype not in found.dtypes:
        raise ExportError(f"the format {name} has no {dtype} networks; it has {', '.join(found.dtypes)}")
    return found


def require(packages: Iterable[str], extra: str) -> None:
    """Refuse to go on without these packages.

    Raises:
        ExportError: one is not installed; the sentence names the extra that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ExportError(f"the package {package} is not installed: pip install 'stepfusion[{extra}]'")


def exporter(name: str) -> Callable[..., Any]:
    """The function that writes a format.

    Raises:
        ExportError: a package that it needs is not installed.
    """
    found = FORMATS[name]
    require(found.needs, found.extra)
    function: Callable[..., Any] = getattr(import_module(found.module), found.function)
    return function
