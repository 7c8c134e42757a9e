"""The function that writes each format, imported when it is asked for: a format's packages need not be installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from stepfusion.export.bundle import Bundle
from stepfusion.export.environment import require
from stepfusion.export.formats import FORMATS

#: ``export(engine, out, **options) -> Bundle``, with options as :class:`stepfusion.export.base.ExportOptions`.
Exporter: TypeAlias = Callable[..., Bundle]


def exporter(name: str) -> Exporter:
    """The function that writes a format.

    Raises:
        ExportError: a package that it needs is not installed.
    """
    found = FORMATS[name]
    require(found.needs, found.extra)
    return _IMPORTS[name]()


def _onnx() -> Exporter:
    from stepfusion.export.to_onnx import export_onnx

    return export_onnx


def _openvino() -> Exporter:
    from stepfusion.export.to_openvino import export_openvino

    return export_openvino


def _tensorrt() -> Exporter:
    from stepfusion.export.to_tensorrt import export_tensorrt

    return export_tensorrt


def _tensorrt_rtx() -> Exporter:
    from stepfusion.export.to_tensorrt import export_tensorrt_rtx

    return export_tensorrt_rtx


def _torch_tensorrt() -> Exporter:
    from stepfusion.export.to_torch_tensorrt import export_torch_tensorrt

    return export_torch_tensorrt


def _aoti() -> Exporter:
    from stepfusion.export.to_aoti import export_aoti

    return export_aoti


def _triton_server() -> Exporter:
    from stepfusion.export.to_triton_server import export_triton_server

    return export_triton_server


_IMPORTS: dict[str, Callable[[], Exporter]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
    "torch-tensorrt": _torch_tensorrt,
    "aoti": _aoti,
    "triton-server": _triton_server,
}
