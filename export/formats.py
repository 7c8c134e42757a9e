"""The formats that a network can be exported to, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass

from stepfusion import _checks
from stepfusion.errors import ExportError
from stepfusion.execution.plan import DTYPES
from stepfusion.export.manifest import KINDS


@dataclass(frozen=True)
class Format:
    """One format; :func:`stepfusion.export.exporters.exporter` returns the function that writes it.

    Attributes:
        needs: the packages that must be installed for writing it, by their import names.
        extra: the extra of stepfusion that installs them.
        dtypes: of the network.
        device: where the engine to export must live: "cpu", "cuda", or "any".
        kinds: "network", and if the format carries it, "tick".
    """

    needs: tuple[str, ...]
    extra: str
    dtypes: tuple[str, ...] = tuple(DTYPES)
    device: str = "cpu"
    kinds: tuple[str, ...] = ("network",)


_ONNX = ("onnx", "onnxscript")

FORMATS = {
    "onnx": Format(_ONNX, "onnx", kinds=KINDS),
    "openvino": Format((*_ONNX, "openvino"), "openvino", ("float32", "bfloat16")),
    "tensorrt": Format((*_ONNX, "tensorrt"), "tensorrt"),
    "tensorrt-rtx": Format((*_ONNX, "tensorrt_rtx"), "tensorrt-rtx"),
    "torch-tensorrt": Format(("torch_tensorrt",), "torch-tensorrt", device="cuda"),
    "aoti": Format((), "aoti", device="any", kinds=KINDS),
    "triton-server": Format(_ONNX, "onnx"),
}


def find_format(name: str, *, kind: str = "network", dtype: str = "float32") -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none. ExportError: it does not carry this kind or dtype.
    """
    found = FORMATS[_checks.choice("format", name, FORMATS)]
    _checks.choice("kind", kind, KINDS)
    if kind not in found.kinds:
        able = " and ".join(other for other, entry in FORMATS.items() if kind in entry.kinds)
        raise ExportError(f"the format {name} does not carry a {kind}; {able} do")
    if dtype not in found.dtypes:
        raise ExportError(f"the format {name} has no {dtype} networks; it has {', '.join(found.dtypes)}")
    return found
